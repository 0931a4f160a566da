// What stands around a product of cuBLAS: narrowing the activations, widening 4-bit weights, bias and
// activation of the result. Blocks of 256 threads; a thread takes columns that lie together.
#include "device.cuh"

constexpr u32 COLUMNS = 4, PAIRS = 4;

/// out[i][n] = act(out[i][n] + bias[n]), bias null where absent.
/// Launch: grid (m, ceil(rows / 1024)), block 256. Twin: cpu/kernels/tile.rs Finish::apply.
KERNEL bias_activate(f32* out, u32 out_stride, u32 m, u32 rows, const f32* bias, u32 act) {
  u32 first = (blockIdx.y * blockDim.x + threadIdx.x) * COLUMNS;
  if (blockIdx.x >= m) return;
  f32* row = out + (u64)blockIdx.x * out_stride;
  UNROLL
  for (u32 i = 0; i < COLUMNS; i++) {
    u32 n = first + i;
    if (n < rows) row[n] = activate(bias ? row[n] + bias[n] : row[n], act);
  }
}

DEVICE void narrow(f32 value, Half* to) { *to = to_half(value); }
DEVICE void narrow(f32 value, Bf16* to) { *to = to_bf16(value); }

/// out[i][k] = r · scale in T, r being what the first `part` roundings of x[i][k] to T left: part 0 is x itself, and
/// the parts together are x. Launch: grid (m, ceil(width / 1024)), block 256. Twin: kv.rs write_halves.
template <class T>
DEVICE void narrow_rows(const f32* x, u32 x_stride, T* out, u32 out_stride, u32 m, u32 width, u32 part, f32 scale) {
  u32 first = (blockIdx.y * blockDim.x + threadIdx.x) * COLUMNS;
  if (blockIdx.x >= m) return;
  const f32* from = x + (u64)blockIdx.x * x_stride;
  T* to = out + (u64)blockIdx.x * out_stride;
  UNROLL
  for (u32 i = 0; i < COLUMNS; i++) {
    if (first + i >= width) continue;
    f32 value = from[first + i];
    for (u32 before = 0; before < part; before++) {
      T rounded;
      narrow(value, &rounded);
      value -= widen(rounded);
    }
    narrow(value * scale, to + first + i);
  }
}
KERNEL narrow_f16(const f32* x, u32 x_stride, Half* out, u32 out_stride, u32 m, u32 width, u32 part, f32 scale) {
  narrow_rows<Half>(x, x_stride, out, out_stride, m, width, part, scale);
}
KERNEL narrow_bf16(const f32* x, u32 x_stride, Bf16* out, u32 out_stride, u32 m, u32 width, u32 part, f32 scale) {
  narrow_rows<Bf16>(x, x_stride, out, out_stride, m, width, part, scale);
}

/// out[n][k] = code · scale + minimum in fp16, from q4 panels (README.md) to row-major `[rows][inputs]`.
/// Launch: grid (rows, ceil(inputs / 2048)), block 256; a thread takes one word of eight codes.
/// Twin: cpu/kernels/pack.rs element.
KERNEL dequantise_q4_f16(const u8* weights, Half* out, u32 rows, u32 inputs) {
  u32 row = blockIdx.x, word = blockIdx.y * blockDim.x + threadIdx.x;
  if (row >= rows || word * 8 >= inputs) return;
  u32 groups = (inputs + GROUP - 1) / GROUP, group = word / 8;
  const u8* panel = weights + (u64)(row / PANEL_ROWS) * groups * (PANEL_ROWS * GROUP_BYTES);
  u64 index = (u64)(row % PANEL_ROWS) * groups + group;
  u32 codes = ((const u32*)panel)[index * 8 + word % 8];
  u32 ends = ((const u32*)(panel + (u64)PANEL_ROWS * groups * (GROUP / 2)))[index];
  f32 scale = half_to_float((u16)ends), minimum = half_to_float((u16)(ends >> 16));
  Half* to = out + (u64)row * inputs + word * 8;
  u32 values[PAIRS];
  UNROLL
  for (u32 i = 0; i < PAIRS; i++) {
    u32 pair = codes >> (4 * i);
    f32 first = fmaf(code_value(pair & 15), scale, minimum);
    values[i] = half_pair(first, fmaf(code_value(pair >> 16 & 15), scale, minimum));
  }
  if (inputs % 8 == 0 && aligned(to, 16)) {
    *(uint4*)to = make_uint4(values[0], values[1], values[2], values[3]);
    return;
  }
  UNROLL
  for (u32 i = 0; i < 8; i++) {
    if (word * 8 + i < inputs) to[i].bits = (u16)(values[i / 2] >> (i % 2 * 16));
  }
}
