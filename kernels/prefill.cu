// Attention of many query rows over the cache, in f32, for every format and head size up to 256:
// out = causal softmax(q · k / √head_size) · v without a matrix of scores. prefill_mma.cu is the fast way.
// Launch: grid (tiles of 16 query rows of all items, heads), block 128; `first_part` counts tiles.
// A tile walks over its keys 16 at a time and folds them into a running maximum, sum and weighted value.
// Twin: cpu/kernels/prefill.rs.
#include "device.cuh"

constexpr u32 THREADS = 128, TILE = 16, KEYS = 16, WIDEST = 256, ROW = WIDEST + 1, OWNERS = THREADS / TILE;

/// K (side 0) or V (side 1) rows of one head, keys `first`.., as f32; nothing past `keys`.
template <class C>
DEVICE void stage(const KvItem& item, u32 side, u32 first, u32 keys, u32 head, u32 head_size, u32 hidden,
                  f32 (&rows)[KEYS][ROW]) {
  for (u32 at = threadIdx.x; at < KEYS * head_size; at += THREADS) {
    u32 key = at / head_size, d = at % head_size;
    if (first + key >= keys) continue;
    rows[key][d] = KvFormat<C>::read(kv_row<C>(item, first + key, side, hidden), head * head_size + d);
  }
}

template <class C>
DEVICE void attend_prefill(const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 heads,
                           u32 head_size, f32* out, u32 out_stride) {
  SHARED(f32, queries, [TILE][ROW]);
  SHARED(f32, rows, [KEYS][ROW]);
  SHARED(f32, weights, [TILE][KEYS]);
  KvItem item = find_item(items, items_count, blockIdx.x);
  u32 head = blockIdx.y, hidden = heads * head_size;
  u32 first_query = (blockIdx.x - item.first_part) * TILE;
  u32 queries_count = item.rows - first_query < TILE ? item.rows - first_query : TILE;
  f32 scale = 1.0f / sqrtf((f32)head_size);
  for (u32 at = threadIdx.x; at < TILE * head_size; at += THREADS) {
    u32 query = at / head_size, d = at % head_size;
    u64 row = item.first_row + first_query + query;
    queries[query][d] = query < queries_count ? qkv[row * qkv_stride + head * head_size + d] * scale : 0.0f;
  }
  // Each query belongs to eight neighbouring threads, each of which sums every eighth element.
  u32 query = threadIdx.x / OWNERS, owner = threadIdx.x % OWNERS;
  u32 seen = item.past + first_query + query + 1;
  u32 keys = item.past + first_query + queries_count;
  f32 sums[WIDEST / OWNERS] = {};
  f32 maximum = -INFINITE, total = 0.0f;
  for (u32 first = 0; first < keys; first += KEYS) {
    __syncthreads();
    stage<C>(item, 0, first, keys, head, head_size, hidden, rows);
    __syncthreads();
    for (u32 key = owner; key < KEYS; key += OWNERS) {
      f32 score = -INFINITE;
      if (first + key < seen && first + key < keys) {
        score = 0.0f;
        for (u32 d = 0; d < head_size; d++) score = fmaf(queries[query][d], rows[key][d], score);
      }
      weights[query][key] = score;
    }
    __syncthreads();
    stage<C>(item, 1, first, keys, head, head_size, hidden, rows);
    __syncthreads();
    f32 before = maximum;
    for (u32 key = 0; key < KEYS; key++) maximum = larger(weights[query][key], maximum);
    // A query sees key 0, so from the first keys on the maximum is a number.
    f32 shrink = exp_exact(before - maximum);
    total *= shrink;
    UNROLL
    for (u32 i = 0; i < WIDEST / OWNERS; i++) sums[i] *= shrink;
    for (u32 key = 0; key < KEYS && first + key < seen && first + key < keys; key++) {
      f32 weight = exp_exact(weights[query][key] - maximum);
      total += weight;
      UNROLL
      for (u32 i = 0; i < WIDEST / OWNERS; i++) {
        u32 d = i * OWNERS + owner;
        if (d < head_size) sums[i] = fmaf(weight, rows[key][d], sums[i]);
      }
    }
  }
  if (query >= queries_count) return;
  f32* to = out + (u64)(item.first_row + first_query + query) * out_stride + head * head_size;
  UNROLL
  for (u32 i = 0; i < WIDEST / OWNERS; i++) {
    u32 d = i * OWNERS + owner;
    if (d < head_size) to[d] = sums[i] / total;
  }
}

#define ATTEND_PREFILL(name, C)                                                                                      \
  KERNEL __launch_bounds__(THREADS) attend_prefill_##name(const f32* qkv, u32 qkv_stride, const KvItem* items,       \
                                                          u32 items_count, u32 heads, u32 head_size, f32* out,       \
                                                          u32 out_stride) {                                          \
    attend_prefill<C>(qkv, qkv_stride, items, items_count, heads, head_size, out, out_stride);                       \
  }
ATTEND_PREFILL(f32, f32)
ATTEND_PREFILL(f16, Half)
ATTEND_PREFILL(q4, Q4)
