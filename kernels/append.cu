// Keys and values of new tokens into their records of the cache (layouts: README.md).
// Launch of every kernel here: grid (rows of all items, 2: K and V), block 256; `first_part` of an item counts
// the rows before it. A row of qkv is [q | k | v], each `hidden` wide. Twin: cpu/kernels/kv.rs append_kv.
#include "device.cuh"

constexpr u32 THREADS = 256;

struct Row {
  const f32* from;
  u8* to;
};

/// The block's K or V row: where its values are and where its record is.
template <class C>
DEVICE Row row_of(const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 hidden) {
  KvItem item = find_item(items, items_count, blockIdx.x);
  u32 token = blockIdx.x - item.first_part, side = blockIdx.y;
  Row row = {qkv + (u64)(item.first_row + token) * qkv_stride + (1 + side) * (u64)hidden,
             kv_row<C>(item, item.past + token, side, hidden)};
  return row;
}

KERNEL append_f32(const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 hidden) {
  Row row = row_of<f32>(qkv, qkv_stride, items, items_count, hidden);
  for (u32 i = threadIdx.x; i < hidden; i += THREADS) ((f32*)row.to)[i] = row.from[i];
}

/// Finite values beyond fp16's range saturate.
KERNEL append_f16(const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 hidden) {
  Row row = row_of<Half>(qkv, qkv_stride, items, items_count, hidden);
  for (u32 i = threadIdx.x; i < hidden; i += THREADS) ((Half*)row.to)[i] = to_half(row.from[i]);
}

/// code = round((x - minimum) / scale) against the rounded scale and minimum; 0 to 15, 0 of what is not a number.
DEVICE u32 code_of(f32 value, f32 minimum, f32 steps_per_unit) {
  f32 steps = smaller(15.0f, larger((value - minimum) * steps_per_unit, 0.0f));
  return bits_of(steps + 12582912.0f) & 15;
}

/// Groups of 64: scale = (largest - smallest) / 15 and minimum = smallest in fp16. A warp takes a group, a
/// lane its elements lane and lane + 32; a last short group is filled up with its last value.
/// Twin: cpu/kernels/q4.rs write_row, the same bits.
KERNEL append_q4(const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 hidden) {
  Row row = row_of<Q4>(qkv, qkv_stride, items, items_count, hidden);
  const f32 largest = 65504.0f;
  u32 lane = threadIdx.x % 32;
  for (u32 first = threadIdx.x / 32 * GROUP; first < hidden; first += THREADS / 32 * GROUP) {
    u32 last = hidden - 1;
    f32 a = row.from[first + lane < last ? first + lane : last];
    f32 b = row.from[first + lane + 32 < last ? first + lane + 32 : last];
    f32 low = warp_min(smaller(b, smaller(a, largest)));
    f32 high = warp_max(larger(b, larger(a, -largest)));
    low = larger(-largest, smaller(largest, low));
    high = larger(-largest, smaller(largest, high));
    u16 scale = float_to_half((high - low) / 15.0f), minimum = float_to_half(low);
    f32 steps_per_unit = scale ? 1.0f / half_to_float(scale) : 0.0f;
    u32 codes = code_of(a, half_to_float(minimum), steps_per_unit);
    codes |= code_of(b, half_to_float(minimum), steps_per_unit) << 8;
    // Lanes below 16 hold nibbles 0 and 2 of word `lane`, the others nibbles 1 and 3 of word `lane - 16`.
    codes |= __shfl_xor_sync(~0u, codes, 16) << 4;
    u16* group = (u16*)(row.to + first / GROUP * GROUP_BYTES);
    if (lane < 16) group[lane] = (u16)codes;
    if (lane == 16) group[16] = scale;
    if (lane == 17) group[17] = minimum;
  }
}
