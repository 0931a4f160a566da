// Layer norm of rows, into other rows or in place.
#include "device.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / 32;

/// The sum over the block, in every thread; `parts` serves one call.
DEVICE f32 block_sum(f32 value, f32 (&parts)[WARPS]) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  f32 sum = 0;
  for (u32 warp = 0; warp < WARPS; warp++) sum += parts[warp];
  return sum;
}

/// out[out_rows[i]] = (x[rows[i]] - mean) / sqrt(variance + eps) * weight + bias, each optional table or
/// vector null where absent. Mean first, then squares of the differences, as the twin does.
/// Launch: grid count, block 256: one row a block. Twin: cpu/kernels/norm.rs.
KERNEL __launch_bounds__(THREADS) layer_norm(const f32* x, const u32* rows, const f32* weight, const f32* bias,
                                             f32* out, const u32* out_rows, u32 count, u32 width, f32 eps) {
  SHARED(f32, parts, [2][WARPS]);
  if (blockIdx.x >= count) return;
  const f32* from = x + (u64)(rows ? rows[blockIdx.x] : blockIdx.x) * width;
  f32* to = out + (u64)(out_rows ? out_rows[blockIdx.x] : blockIdx.x) * width;
  f32 sum = 0;
  for (u32 i = threadIdx.x; i < width; i += THREADS) sum += from[i];
  f32 mean = block_sum(sum, parts[0]) / (f32)width;
  f32 squares = 0;
  for (u32 i = threadIdx.x; i < width; i += THREADS) squares = fmaf(from[i] - mean, from[i] - mean, squares);
  f32 scale = 1.0f / sqrtf(block_sum(squares, parts[1]) / (f32)width + eps);
  for (u32 i = threadIdx.x; i < width; i += THREADS) {
    f32 value = (from[i] - mean) * scale;
    if (weight && bias) value = fmaf(value, weight[i], bias[i]);
    else if (weight) value *= weight[i];
    else if (bias) value += bias[i];
    to[i] = value;
  }
}
