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

/// Copies of 16 bytes each from global memory, which nobody writes meanwhile, to shared memory, all aligned; zeros
/// where not `there`, from where it may be read all the same. Done after `copies_done` by the same thread (and a
/// barrier, for the others). Before sm_80 they are done at once, all read before the first one is written.
template <u32 COUNT>
DEVICE void copy_async(void* const (&to)[COUNT], const void* const (&from)[COUNT], const bool (&there)[COUNT]) {
#if __CUDA_ARCH__ >= 800
  UNROLL
  for (u32 i = 0; i < COUNT; i++) {
    asm volatile(
        "{ .reg .u64 a; .reg .u32 s; cvta.to.shared.u64 a, %0; cvt.u32.u64 s, a;"
        " cp.async.cg.shared.global [s], [%1], 16, %2; }" ::"l"(to[i]), "l"(from[i]), "r"(there[i] ? 16 : 0)
        : "memory");
  }
#else
  uint4 words[COUNT];
  UNROLL
  for (u32 i = 0; i < COUNT; i++) words[i] = __ldg((const uint4*)from[i]);
  UNROLL
  for (u32 i = 0; i < COUNT; i++) *(uint4*)to[i] = there[i] ? words[i] : make_uint4(0, 0, 0, 0);
#endif
}
DEVICE void copies_done() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/// C += A·B by one warp: A 16 × 16, B 16 × 8 in fp16, C in f32; fragments as mma.m16n8k16 has them. Before
/// sm_80 the tensor cores take half as many k at once: the registers are the same.
DEVICE void mma_16816(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%8}, {%0,%1,%2,%3};\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%6,%7}, {%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// Four 8 × 8 matrices of fp16 from shared memory: lane l says where row l % 8 of matrix l / 8 begins (aligned to
/// 16 bytes) and gets two neighbours of row lane / 4 of each; transposed, of column lane / 4.
template <bool TRANSPOSED> DEVICE void load_matrices(u32 (&to)[4], const void* row) {
  u32 at;
  asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(at) : "l"(row));
  if (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
  }
}
#endif

DEVICE f32 widen(f32 value) { return value; }
DEVICE f32 widen(Half value) { return half_to_float(value.bits); }
DEVICE f32 widen(Bf16 value) { return float_of((u32)value.bits << 16); }

/// A 4-bit code as f32. 2^23 + code is made of bits, without the slow conversion of integers, and exact.
DEVICE f32 code_value(u32 code) { return float_of(0x4b000000u | code) - 8388608.0f; }

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

/// e^x as cpu/kernels/math.rs computes it: the same bits. Not a number stays so, and is told apart for it: the
/// hardware's is 0x7fffffff, to whose bits 0xff800000 would be added, which makes the largest number of it.
DEVICE f32 exp_exact(f32 given) {
  const f32 rounder = 12582912.0f;
  f32 x = smaller(88.0f, larger(-87.0f, given));
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
  return given != given ? given : float_of(bits_of(mantissa) + (bits_of(power) << 23));
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
    return fmaf(code_value(code), half_to_float(group[16]), half_to_float(group[17]));
  }
};

/// Where the K row (side 0) or V row (side 1) of a token begins.
template <class C> DEVICE u8* kv_row(const KvItem& item, u32 token, u32 side, u32 hidden) {
  u64 record = item.slots ? __ldg((const u32*)item.slots + token) : token;
  return (u8*)item.records + (2 * record + side) * KvFormat<C>::row_bytes(hidden);
}

/// Elements of a row that a thread takes at once.
constexpr u32 EACH = 8;

/// Elements first..first + 8 of a K or V row as f32, zeros past `end`. `vectors`: rows and heads are such that
/// eight elements are aligned to 16 bytes (q4: to eight codes of one height).
DEVICE void read8(const u8* row, u32 first, bool vectors, f32 (&x)[EACH], f32*) {
  if (vectors) {
    float4 a = __ldg((const float4*)(row + 4 * first)), b = __ldg((const float4*)(row + 4 * first + 16));
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    return;
  }
  for (u32 i = 0; i < EACH; i++) x[i] = KvFormat<f32>::read(row, first + i);
}
DEVICE void read8(const u8* row, u32 first, bool vectors, f32 (&x)[EACH], Half*) {
  if (vectors) {
    uint4 raw = __ldg((const uint4*)(row + 2 * first));
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    UNROLL
    for (u32 i = 0; i < EACH; i++) x[i] = half_to_float((u16)(words[i / 2] >> (i % 2 * 16)));
    return;
  }
  for (u32 i = 0; i < EACH; i++) x[i] = KvFormat<Half>::read(row, first + i);
}
DEVICE void read8(const u8* row, u32 first, bool vectors, f32 (&x)[EACH], Q4*) {
  if (vectors) {
    const u32* group = (const u32*)(row + first / GROUP * GROUP_BYTES);
    u32 ends = __ldg(group + 8), inside = first % GROUP, nibble = inside / 16 * 4;
    f32 scale = half_to_float((u16)ends), minimum = half_to_float((u16)(ends >> 16));
    UNROLL
    for (u32 i = 0; i < EACH; i += 2) {
      u32 pair = __ldg(group + (inside % 16 + i) / 2) >> nibble;
      x[i] = fmaf(code_value(pair & 15), scale, minimum);
      x[i + 1] = fmaf(code_value(pair >> 16 & 15), scale, minimum);
    }
    return;
  }
  for (u32 i = 0; i < EACH; i++) x[i] = KvFormat<Q4>::read(row, first + i);
}

/// The 8 elements from `d` on of a head, zeros past its end.
template <class C>
DEVICE void read_head(const u8* row, u32 start, u32 d, u32 head_size, bool vectors, f32 (&x)[EACH]) {
  if (d + EACH <= head_size) return read8(row, start + d, vectors, x, (C*)0);
  for (u32 i = 0; i < EACH; i++) x[i] = d + i < head_size ? KvFormat<C>::read(row, start + d + i) : 0.0f;
}

/// Whether `read8` may take vectors: every head begins at a multiple of eight elements, every row aligned.
template <class C> DEVICE bool whole_vectors(const KvItem& item, u32 head_size, u32 hidden) {
  return head_size % EACH == 0 && (sizeof(C) == 1 || (item.records % 16 == 0 && KvFormat<C>::row_bytes(hidden) % 16 == 0));
}

#endif
