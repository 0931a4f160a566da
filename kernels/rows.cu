// Moving and adding rows of the hidden state (f32, row-major, `width` wide).
// Launch of every kernel here: grid (count, ceil(width / 1024)), block 256; a thread takes four columns that
// lie together. No sums over several values, so results are the twins' bits (cpu/kernels/rows.rs).
#include "device.cuh"

constexpr u32 COLUMNS = 4;

/// Calls `each(column)` for the thread's columns.
template <class Each> DEVICE void for_columns(u32 width, Each each) {
  u32 first = (blockIdx.y * blockDim.x + threadIdx.x) * COLUMNS;
  UNROLL
  for (u32 i = 0; i < COLUMNS; i++) {
    if (first + i < width) each(first + i);
  }
}

/// x[rows[i]] = table[ids[i]]; table `[ids][width]` in T. Twin: embed_rows.
template <class T> DEVICE void embed(const T* table, const u32* ids, f32* x, const u32* rows, u32 width) {
  const T* from = table + (u64)ids[blockIdx.x] * width;
  f32* to = x + (u64)rows[blockIdx.x] * width;
  for_columns(width, [&](u32 column) { to[column] = widen(from[column]); });
}

/// x[rows[i]] += table[indices[i]]; table `[positions][width]` in T. Twin: add_rows_typed.
template <class T> DEVICE void add_positions(const T* table, const u32* indices, f32* x, const u32* rows, u32 width) {
  const T* from = table + (u64)indices[blockIdx.x] * width;
  f32* to = x + (u64)rows[blockIdx.x] * width;
  for_columns(width, [&](u32 column) { to[column] += widen(from[column]); });
}

#define TABLE_KERNELS(name, T)                                                                                       \
  KERNEL embed_##name(const T* table, const u32* ids, f32* x, const u32* rows, u32 count, u32 width) {               \
    if (blockIdx.x < count) embed<T>(table, ids, x, rows, width);                                                    \
  }                                                                                                                  \
  KERNEL add_positions_##name(const T* table, const u32* indices, f32* x, const u32* rows, u32 count, u32 width) {   \
    if (blockIdx.x < count) add_positions<T>(table, indices, x, rows, width);                                        \
  }
TABLE_KERNELS(f32, f32)
TABLE_KERNELS(f16, Half)
TABLE_KERNELS(bf16, Bf16)

/// out[i] = x[rows[i]]. Twin: copy_rows.
KERNEL gather_rows(const f32* x, const u32* rows, f32* out, u32 count, u32 width) {
  if (blockIdx.x >= count) return;
  const f32* from = x + (u64)rows[blockIdx.x] * width;
  f32* to = out + (u64)blockIdx.x * width;
  for_columns(width, [&](u32 column) { to[column] = from[column]; });
}

/// x[rows[i]] = y[i]. Twin: cpu/execute.rs scatter.
KERNEL scatter_rows(f32* x, const u32* rows, const f32* y, u32 count, u32 width) {
  if (blockIdx.x >= count) return;
  f32* to = x + (u64)rows[blockIdx.x] * width;
  const f32* from = y + (u64)blockIdx.x * width;
  for_columns(width, [&](u32 column) { to[column] = from[column]; });
}

/// x[rows[i]] += y[i]. Twin: add_rows.
KERNEL add_rows(f32* x, const u32* rows, const f32* y, u32 count, u32 width) {
  if (blockIdx.x >= count) return;
  f32* to = x + (u64)rows[blockIdx.x] * width;
  const f32* from = y + (u64)blockIdx.x * width;
  for_columns(width, [&](u32 column) { to[column] += from[column]; });
}
