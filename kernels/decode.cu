// Attention of one query row a sequence, each K and V row read once: out = softmax(q · k / √head_size) · v.
// The keys are cut into chunks of 256; `attend_combine` puts an item's chunks together in the order of their
// index, so that results depend on nothing but the item. Twin: cpu/kernels/decode.rs.
#include "device.cuh"

constexpr u32 THREADS = 128, WARPS = THREADS / 32, CHUNK = 256, WIDEST = 256;

/// The largest value or the sum over the block, in every thread; `parts` serves one call.
DEVICE f32 block_fold(f32 value, bool largest, f32 (&parts)[WARPS]) {
  value = largest ? warp_max(value) : warp_sum(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  f32 folded = parts[0];
  for (u32 warp = 1; warp < WARPS; warp++) folded = largest ? larger(parts[warp], folded) : folded + parts[warp];
  return folded;
}

/// Launch: grid (chunks of all items, heads), block 128; `first_part` counts chunks. Lanes of a warp share a
/// key in groups of 1, 2, .. 32, eight elements of the head each, and take as many keys at once as groups fit.
/// partial `[chunks][heads][head_size + 2]`: weighted values, maximum, sum; items of one chunk go to out.
template <class C>
DEVICE void attend_decode(const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 heads,
                          u32 head_size, f32* out, u32 out_stride, f32* partial) {
  SHARED(f32, scores, [CHUNK]);
  SHARED(f32, parts, [2][WARPS]);
  SHARED(f32, values, [WARPS][WIDEST]);
  KvItem item = find_item(items, items_count, blockIdx.x);
  u32 head = blockIdx.y, hidden = heads * head_size, start = head * head_size;
  u32 keys = item.past + 1, first = (blockIdx.x - item.first_part) * CHUNK;
  u32 count = keys - first < CHUNK ? keys - first : CHUNK;
  bool vectors = whole_vectors<C>(item, head_size, hidden);
  u32 sharing = 1;
  while (sharing * EACH < head_size) sharing *= 2;
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 together = 32 / sharing, d = lane % sharing * EACH, mine = warp * together + lane / sharing;

  const f32* query = qkv + (u64)item.first_row * qkv_stride + start;
  f32 scale = 1.0f / sqrtf((f32)head_size), q[EACH];
  for (u32 i = 0; i < EACH; i++) q[i] = d + i < head_size ? query[d + i] * scale : 0.0f;
  f32 maximum = -INFINITE, total = 0.0f;
  // All lanes go through every round: they sum together.
  for (u32 round = 0; round < count; round += WARPS * together) {
    u32 key = round + mine;
    f32 score = 0.0f, k[EACH];
    if (key < count && d < head_size) {
      read_head<C>(kv_row<C>(item, first + key, 0, hidden), start, d, head_size, vectors, k);
      UNROLL
      for (u32 i = 0; i < EACH; i++) score = fmaf(q[i], k[i], score);
    }
    for (u32 distance = sharing / 2; distance; distance /= 2) score += __shfl_xor_sync(~0u, score, distance);
    if (key < count && d == 0) scores[key] = score;
    if (key < count) maximum = larger(score, maximum);
  }
  // Its barrier shows every thread the scores, the next one the weights.
  maximum = block_fold(maximum, true, parts[0]);
  for (u32 key = threadIdx.x; key < count; key += THREADS) {
    f32 weight = exp_exact(scores[key] - maximum);
    scores[key] = weight;
    total += weight;
  }
  total = block_fold(total, false, parts[1]);

  f32 sums[EACH] = {};
  for (u32 key = mine; key < count; key += WARPS * together) {
    if (d >= head_size) break;
    f32 v[EACH];
    read_head<C>(kv_row<C>(item, first + key, 1, hidden), start, d, head_size, vectors, v);
    UNROLL
    for (u32 i = 0; i < EACH; i++) sums[i] = fmaf(scores[key], v[i], sums[i]);
  }
  UNROLL
  for (u32 i = 0; i < EACH; i++) {
    for (u32 distance = sharing; distance < 32; distance *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], distance);
    if (lane < sharing && d + i < head_size) values[warp][d + i] = sums[i];
  }
  __syncthreads();
  bool alone = keys <= CHUNK;
  f32* part = partial + ((u64)blockIdx.x * heads + head) * (head_size + 2);
  f32* to = alone ? out + (u64)item.first_row * out_stride + start : part;
  for (u32 i = threadIdx.x; i < head_size; i += THREADS) {
    f32 sum = values[0][i];
    for (u32 w = 1; w < WARPS; w++) sum += values[w][i];
    to[i] = alone ? sum / total : sum;
  }
  if (!alone && threadIdx.x == 0) {
    part[head_size] = maximum;
    part[head_size + 1] = total;
  }
}

/// Blocks that should fit a multiprocessor at once, which bounds the registers: a fifth one costs 4 bits no spill.
template <class C> constexpr u32 BLOCKS = sizeof(C) == 1 ? 5 : 4;

#define ATTEND_DECODE(name, C)                                                                                       \
  KERNEL __launch_bounds__(THREADS, BLOCKS<C>) attend_decode_##name(                                                 \
      const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 heads, u32 head_size, f32* out,      \
      u32 out_stride, f32* partial) {                                                                                \
    attend_decode<C>(qkv, qkv_stride, items, items_count, heads, head_size, out, out_stride, partial);               \
  }
ATTEND_DECODE(f32, f32)
ATTEND_DECODE(f16, Half)
ATTEND_DECODE(q4, Q4)

/// out = Σ chunks' values · e^(their maximum - running maximum) / the same over their sums, in order of index.
/// Launch: grid (items, heads), block 128; items of one chunk are left alone.
KERNEL attend_combine(const f32* partial, const KvItem* items, u32 items_count, u32 heads, u32 head_size, f32* out,
                      u32 out_stride) {
  if (blockIdx.x >= items_count) return;
  KvItem item = items[blockIdx.x];
  u32 chunks = (item.past + CHUNK) / CHUNK, stride = head_size + 2;
  if (chunks == 1) return;
  for (u32 d = threadIdx.x; d < head_size; d += THREADS) {
    f32 maximum = -INFINITE, total = 0.0f, sum = 0.0f;
    for (u32 chunk = 0; chunk < chunks; chunk++) {
      const f32* part = partial + ((u64)(item.first_part + chunk) * heads + blockIdx.y) * stride;
      f32 next = larger(part[head_size], maximum);
      f32 shrink = exp_exact(maximum - next), weight = exp_exact(part[head_size] - next);
      sum = fmaf(sum, shrink, part[d] * weight);
      total = fmaf(total, shrink, part[head_size + 1] * weight);
      maximum = next;
    }
    out[(u64)item.first_row * out_stride + blockIdx.y * head_size + d] = sum / total;
  }
}
