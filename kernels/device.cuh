// What all kernels share: element formats, conversions, exp and GELU, warp sums, vector loads, the cache's
// records. The only header; it needs no toolkit headers. Inline PTX stands in functions of its own, which
// the emulation for the host (tests/cuda/emulator.h, included before this file) defines instead.
#ifndef LOADMASTER_DEVICE_CUH
#define LOADMASTER_DEVICE_CUH

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;

#ifndef LOADMASTER_EMULATED
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
// Static shared memory: SHARED(f32, sums, [4][32]); f32 (&sums)[4][32] under the emulation.
#define SHARED(type, name, dims) __shared__ __align__(16) type name dims
#define UNROLL _Pragma("unroll")
#endif

/// Elements as they are stored.
struct Half {
  u16 bits;
};
struct Bf16 {
  u16 bits;
};

// Bits of a float and back, and the hardware's fp16 conversions (nearest, ties to even; overflow is infinite).
#ifndef LOADMASTER_EMULATED
DEVICE u32 bits_of(f32 value) { return __float_as_uint(value); }
DEVICE f32 float_of(u32 bits) { return __uint_as_float(bits); }
DEVICE f32 half_to_float(u16 bits) {
  f32 value;
  asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "h"(bits));
  return value;
}
DEVICE u16 float_to_half(f32 value) {
  u16 bits;
  asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; mov.b16 %0, h; }" : "=h"(bits) : "f"(value));
  return bits;
}
/// 2^x to 2 ulp of f32.
DEVICE f32 exp2_fast(f32 x) {
  f32 value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
#endif

DEVICE f32 widen(f32 value) { return value; }
DEVICE f32 widen(Half value) { return half_to_float(value.bits); }
DEVICE f32 widen(Bf16 value) { return float_of((u32)value.bits << 16); }

/// Stands for minus infinity, negated: finite, so that differences of two stay numbers.
#define INFINITE 3.4e38f

/// a > b ? a : b, so b where one is not a number: the twins' order of operands keeps it.
DEVICE f32 larger(f32 a, f32 b) { return a > b ? a : b; }
DEVICE f32 smaller(f32 a, f32 b) { return a < b ? a : b; }

/// Nearest fp16; finite values beyond its range saturate.
DEVICE Half to_half(f32 value) {
  Half half = {float_to_half(smaller(65504.0f, larger(-65504.0f, value)))};
  return half;
}

/// Nearest bfloat16, ties to even; not a number stays so.
DEVICE Bf16 to_bf16(f32 value) {
  u32 bits = bits_of(value);
  u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  Bf16 narrow = {(u16)(value != value ? (bits >> 16 | 0x40) : rounded)};
  return narrow;
}

/// Two fp16 in a register, the first in the low half.
DEVICE u32 half_pair(f32 first, f32 second) {
  return (u32)to_half(first).bits | (u32)to_half(second).bits << 16;
}

/// e^x as cpu/kernels/math.rs computes it: the same bits.
DEVICE f32 exp_exact(f32 x) {
  const f32 rounder = 12582912.0f;
  x = smaller(88.0f, larger(-87.0f, x));
  f32 power = fmaf(x, 1.44269504088896340736f, rounder);
  f32 whole = power - rounder;
  f32 r = fmaf(whole, -0.6933594f, x);
  r = fmaf(whole, 2.1219444e-4f, r);
  f32 tail = 1.9875691e-4f;
  tail = fmaf(tail, r, 1.3982e-3f);
  tail = fmaf(tail, r, 8.333452e-3f);
  tail = fmaf(tail, r, 4.1665796e-2f);
  tail = fmaf(tail, r, 0.16666665f);
  tail = fmaf(tail, r, 0.5f);
  f32 mantissa = fmaf(r * r, tail, r) + 1.0f;
  return float_of(bits_of(mantissa) + (bits_of(power) << 23));
}

/// x Phi(x) in the erf form, as cpu/kernels/math.rs computes it.
DEVICE f32 gelu(f32 x) {
  f32 size = larger(x, 0.0f - x);
  f32 z = size * 0.70710678118654752440f;
  f32 t = 1.0f / fmaf(z, 0.5f, 1.0f);
  f32 sum = 0.17087277f;
  sum = fmaf(sum, t, -0.8221522f);
  sum = fmaf(sum, t, 1.4885159f);
  sum = fmaf(sum, t, -1.135204f);
  sum = fmaf(sum, t, 0.27886807f);
  sum = fmaf(sum, t, -0.18628806f);
  sum = fmaf(sum, t, 0.09678418f);
  sum = fmaf(sum, t, 0.37409196f);
  sum = fmaf(sum, t, 1.0000237f);
  sum = fmaf(sum, t, -1.2655122f);
  f32 erfc = t * exp_exact(fmaf(0.0f - z, z, sum));
  return fmaf(size * -0.5f, erfc, larger(0.0f, x));
}

/// `kind`: 0 nothing, 1 ReLU, 2 GELU.
DEVICE f32 activate(f32 value, u32 kind) {
  if (kind == 1) return larger(0.0f, value);
  return kind == 2 ? gelu(value) : value;
}

/// The sum over a warp, in every lane: a fixed tree.
DEVICE f32 warp_sum(f32 value) {
  for (u32 distance = 16; distance; distance >>= 1) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

DEVICE f32 warp_max(f32 value) {
  for (u32 distance = 16; distance; distance >>= 1) {
    value = larger(__shfl_xor_sync(~0u, value, distance), value);
  }
  return value;
}

/// The same over 16 lanes that lie together.
DEVICE f32 warp_min(f32 value) {
  for (u32 distance = 16; distance; distance >>= 1) {
    value = smaller(__shfl_xor_sync(~0u, value, distance), value);
  }
  return value;
}

DEVICE bool aligned(const void* at, u32 bytes) { return ((u64)at & (bytes - 1)) == 0; }

/// Inputs that share a scale and a minimum, and the bytes of a group in the KV cache.
constexpr u32 GROUP = 64, GROUP_BYTES = 36, PANEL_ROWS = 64;

/// One sequence as append and attention see it (README.md).
struct KvItem {
  u64 records;
  u64 slots;
  u32 first_row;
  u32 rows;
  u32 past;
  u32 first_part;
};

/// The item to which part `part` of a launch belongs: the last one whose first_part is not beyond it.
DEVICE KvItem find_item(const KvItem* items, u32 count, u32 part) {
  u32 low = 0;
  while (count > 1) {
    u32 half = count / 2;
    if (items[low + half].first_part <= part) low += half;
    count -= half;
  }
  return items[low];
}

/// The format of a cache or of weights in groups of 4-bit codes.
struct Q4 {};

/// How a K or V row is kept: its bytes, and one element of it.
template <class C> struct KvFormat;
template <> struct KvFormat<f32> {
  static DEVICE u64 row_bytes(u32 hidden) { return 4ull * hidden; }
  static DEVICE f32 read(const u8* row, u32 element) { return ((const f32*)row)[element]; }
};
template <> struct KvFormat<Half> {
  static DEVICE u64 row_bytes(u32 hidden) { return 2ull * hidden; }
  static DEVICE f32 read(const u8* row, u32 element) { return widen(((const Half*)row)[element]); }
};
template <> struct KvFormat<Q4> {
  static DEVICE u64 row_bytes(u32 hidden) { return (hidden + GROUP - 1) / GROUP * (u64)GROUP_BYTES; }
  static DEVICE f32 read(const u8* row, u32 element) {
    const u16* group = (const u16*)(row + element / GROUP * GROUP_BYTES);
    u32 inside = element % GROUP;
    u32 code = group[inside % 16] >> (inside / 16 * 4) & 15;
    return fmaf((f32)code, half_to_float(group[16]), half_to_float(group[17]));
  }
};

/// Where the K row (side 0) or V row (side 1) of a token begins.
template <class C> DEVICE u8* kv_row(const KvItem& item, u32 token, u32 side, u32 hidden) {
  u64 record = item.slots ? ((const u32*)item.slots)[token] : token;
  return (u8*)item.records + (2 * record + side) * KvFormat<C>::row_bytes(hidden);
}

#endif
