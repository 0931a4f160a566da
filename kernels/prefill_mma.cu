// Attention of many query rows on tensor cores: out = causal softmax(q · k / √head_size) · v, products in fp16
// with sums in f32, no matrix of scores. Head sizes up to D; what is missing to D is zero.
// Launch: grid (tiles of 64 query rows of all items, heads), block 128; `first_part` counts tiles. A warp has 16
// of the tile's queries. Keys go by in 64s (before sm_80 in 32s for the widest heads): brought to shared memory as
// fp16, whatever the cache's format, scored, and folded into a running maximum, sum and weighted value, all in registers.
// Twin: cpu/kernels/prefill.rs.
#include "device.cuh"

constexpr u32 THREADS = 128, QUERIES = 64, WARP_QUERIES = 16;
/// Key columns of a score fragment.
constexpr u32 FRAGMENT = 8;

/// Keys of a turn, for heads of up to D: the buffers of two blocks are to fit a multiprocessor, of 64 KiB on sm_75.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <u32 D> constexpr u32 KEYS_OF = D > 80 ? 32 : 64;
#else
template <u32 D> constexpr u32 KEYS_OF = 64;
#endif

/// Eight elements as fp16.
DEVICE uint4 halves(const f32 (&x)[EACH]) {
  return make_uint4(half_pair(x[0], x[1]), half_pair(x[2], x[3]), half_pair(x[4], x[5]), half_pair(x[6], x[7]));
}

/// What a block works on.
struct Tile {
  KvItem item;
  u32 head_size, hidden, start;
  /// First query of the tile in its item, how many there are, and the keys that the last one sees.
  u32 first_query, queries, keys;
};

/// `stage` of rows that are not aligned, element by element.
template <class C, u32 D, u32 KEYS>
DEVICE void stage_any(const Tile& tile, u32 side, u32 first, Half (&rows)[KEYS][D + EACH]) {
  constexpr u32 PIECES = D / EACH;
  for (u32 at = threadIdx.x; at < KEYS * PIECES; at += THREADS) {
    u32 key = at / PIECES, d = at % PIECES * EACH;
    f32 x[EACH] = {};
    if (first + key < tile.keys) {
      const u8* row = kv_row<C>(tile.item, first + key, side, tile.hidden);
      read_head<C>(row, tile.start, d, tile.head_size, false, x);
    }
    *(uint4*)&rows[key][d] = halves(x);
  }
}

/// Starts to bring K (side 0) or V (side 1) of keys first.. to shared memory, zeros past the last key; there after
/// `copies_done` and a barrier. fp16 rows are copied while the block goes on, others widened by it.
template <class C, u32 D, u32 KEYS>
DEVICE void stage(const Tile& tile, u32 side, u32 first, bool vectors, Half (&rows)[KEYS][D + EACH]) {
  constexpr u32 PIECES = D / EACH, TURNS = KEYS * PIECES / THREADS;
  static_assert(TURNS * THREADS == KEYS * PIECES, "all threads have as many pieces");
  if (!vectors) return stage_any<C, D>(tile, side, first, rows);
  // All places are looked up before the first copy, behind which no load would begin. What is not there is read as
  // the first key's first elements.
  const u8* row[TURNS];
  void* to[TURNS];
  u32 element[TURNS];
  bool there[TURNS];
  UNROLL
  for (u32 turn = 0; turn < TURNS; turn++) {
    u32 at = turn * THREADS + threadIdx.x, key = at / PIECES, d = at % PIECES * EACH;
    there[turn] = first + key < tile.keys && d < tile.head_size;
    row[turn] = kv_row<C>(tile.item, there[turn] ? first + key : 0, side, tile.hidden);
    element[turn] = tile.start + (there[turn] ? d : 0);
    to[turn] = &rows[key][d];
  }
  if constexpr (sizeof(C) == sizeof(Half)) {
    const void* from[TURNS];
    UNROLL
    for (u32 turn = 0; turn < TURNS; turn++) from[turn] = row[turn] + 2 * element[turn];
    copy_async(to, from, there);
  } else {
    UNROLL
    for (u32 turn = 0; turn < TURNS; turn++) {
      f32 x[EACH];
      read8(row[turn], element[turn], true, x, (C*)0);
      *(uint4*)to[turn] = there[turn] ? halves(x) : make_uint4(0, 0, 0, 0);
    }
  }
}

/// The warp's queries as the left operand, times log2(e) / √head_size: scores are exponents of two.
template <u32 D>
DEVICE void load_queries(const f32* qkv, u32 qkv_stride, const Tile& tile, u32 first, u32 (&q)[D / 16][4]) {
  u32 lane = threadIdx.x % 32;
  f32 scale = 1.44269504f / sqrtf((f32)tile.head_size);
  UNROLL
  for (u32 i = 0; i < D / 4; i++) {
    u32 query = first + lane / 4 + i % 2 * 8, d = i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
    const f32* from = qkv + (u64)(tile.item.first_row + tile.first_query + query) * qkv_stride + tile.start;
    f32 low = query < tile.queries && d < tile.head_size ? from[d] * scale : 0.0f;
    f32 high = query < tile.queries && d + 1 < tile.head_size ? from[d + 1] * scale : 0.0f;
    q[i / 4][i % 4] = half_pair(low, high);
  }
}

/// scores = q · k for the staged keys.
template <u32 D, u32 KEYS>
DEVICE void score(const u32 (&q)[D / 16][4], const Half (&keys)[KEYS][D + EACH], f32 (&scores)[KEYS / FRAGMENT][4]) {
  u32 lane = threadIdx.x % 32;
  // Matrices 0, 1: eight keys, dimensions 0..8 and 8..16; matrices 2, 3: the next eight keys.
  u32 key = lane / 16 * 8 + lane % 8, d = lane / 8 % 2 * 8;
  UNROLL
  for (u32 n = 0; n < KEYS / FRAGMENT; n += 2) {
    UNROLL
    for (u32 k = 0; k < D / 16; k++) {
      u32 b[4];
      load_matrices<false>(b, &keys[n * FRAGMENT + key][k * 16 + d]);
      mma_16816(scores[n], q[k], b[0], b[1]);
      mma_16816(scores[n + 1], q[k], b[2], b[3]);
    }
  }
}

/// sums += weights · v for the staged values.
template <u32 D, u32 KEYS>
DEVICE void add_values(const f32 (&weights)[KEYS / FRAGMENT][4], const Half (&values)[KEYS][D + EACH],
                       f32 (&sums)[D / 8][4]) {
  u32 lane = threadIdx.x % 32;
  // Matrices 0, 1: keys 0..8 and 8..16 of eight dimensions; matrices 2, 3: of the next eight.
  u32 key = lane % 16, d = lane / 16 * 8;
  UNROLL
  for (u32 k = 0; k < KEYS / 16; k++) {
    u32 p[4];
    UNROLL
    for (u32 i = 0; i < 4; i++) p[i] = half_pair(weights[2 * k + i / 2][i % 2 * 2], weights[2 * k + i / 2][i % 2 * 2 + 1]);
    UNROLL
    for (u32 n = 0; n < D / 8; n += 2) {
      u32 b[4];
      load_matrices<true>(b, &values[k * 16 + key][n * 8 + d]);
      mma_16816(sums[n], p, b[0], b[1]);
      mma_16816(sums[n + 1], p, b[2], b[3]);
    }
  }
}

/// Scores become weights 2^(score - maximum); `shrink` is what brings older sums to the new maximum. `seen`: keys
/// of this turn that the lane's two rows see; those behind have no weight.
template <u32 FRAGMENTS>
DEVICE void weigh(f32 (&scores)[FRAGMENTS][4], const u32 (&seen)[2], f32 (&maximum)[2], f32 (&total)[2], f32 (&shrink)[2]) {
  u32 column = threadIdx.x % 4 * 2;
  UNROLL
  for (u32 row = 0; row < 2; row++) {
    f32 highest = maximum[row];
    UNROLL
    for (u32 i = 0; i < FRAGMENTS * 2; i++) {
      f32& value = scores[i / 2][row * 2 + i % 2];
      if (i / 2 * FRAGMENT + column + i % 2 >= seen[row]) value = -INFINITE;
      highest = larger(value, highest);
    }
    // The four lanes of a row.
    highest = larger(__shfl_xor_sync(~0u, highest, 1), highest);
    highest = larger(__shfl_xor_sync(~0u, highest, 2), highest);
    shrink[row] = exp2_fast(maximum[row] - highest);
    maximum[row] = highest;
    f32 sum = 0.0f;
    UNROLL
    for (u32 i = 0; i < FRAGMENTS * 2; i++) {
      f32& value = scores[i / 2][row * 2 + i % 2];
      value = i / 2 * FRAGMENT + column + i % 2 < seen[row] ? exp2_fast(value - highest) : 0.0f;
      sum += value;
    }
    total[row] = fmaf(total[row], shrink[row], sum);
  }
}

template <class C, u32 D, u32 KEYS>
DEVICE void attend_prefill_mma(const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 heads,
                               u32 head_size, f32* out, u32 out_stride) {
  SHARED(Half, keys, [KEYS][D + EACH]);
  SHARED(Half, values, [KEYS][D + EACH]);
  Tile tile;
  tile.item = find_item(items, items_count, blockIdx.x);
  tile.head_size = head_size, tile.hidden = heads * head_size, tile.start = blockIdx.y * head_size;
  tile.first_query = (blockIdx.x - tile.item.first_part) * QUERIES;
  tile.queries = tile.item.rows - tile.first_query < QUERIES ? tile.item.rows - tile.first_query : QUERIES;
  tile.keys = tile.item.past + tile.first_query + tile.queries;
  bool vectors = whole_vectors<C>(tile.item, head_size, tile.hidden);
  u32 lane = threadIdx.x % 32, first = threadIdx.x / 32 * WARP_QUERIES;
  // The lane's two rows, and how many keys each sees.
  u32 rows[2] = {first + lane / 4, first + lane / 4 + 8};
  u32 visible = tile.item.past + tile.first_query + 1;
  u32 q[D / 16][4];
  load_queries<D>(qkv, qkv_stride, tile, first, q);
  f32 sums[D / 8][4] = {};
  f32 maximum[2] = {-INFINITE, -INFINITE}, total[2] = {};
  stage<C, D>(tile, 0, 0, vectors, keys);
  for (u32 from = 0; from < tile.keys; from += KEYS) {
    // The same for the whole warp: whether its last row sees any of these keys.
    bool sees = visible + first + WARP_QUERIES - 1 > from;
    f32 scores[KEYS / FRAGMENT][4] = {}, shrink[2];
    copies_done();
    __syncthreads();
    // Values come while scores are made, the next keys while values are added.
    stage<C, D>(tile, 1, from, vectors, values);
    if (sees) {
      score<D>(q, keys, scores);
      u32 seen[2];
      UNROLL
      for (u32 row = 0; row < 2; row++) seen[row] = visible + rows[row] > from ? visible + rows[row] - from : 0;
      weigh(scores, seen, maximum, total, shrink);
      UNROLL
      for (u32 i = 0; i < D / 8 * 4; i++) sums[i / 4][i % 4] *= shrink[i % 4 / 2];
    }
    copies_done();
    __syncthreads();
    if (from + KEYS < tile.keys) stage<C, D>(tile, 0, from + KEYS, vectors, keys);
    if (sees) add_values<D>(scores, values, sums);
  }
  UNROLL
  for (u32 row = 0; row < 2; row++) {
    f32 whole = total[row] + __shfl_xor_sync(~0u, total[row], 1);
    whole += __shfl_xor_sync(~0u, whole, 2);
    if (rows[row] >= tile.queries) continue;
    f32* to = out + (u64)(tile.item.first_row + tile.first_query + rows[row]) * out_stride + tile.start;
    UNROLL
    for (u32 i = 0; i < D / 4; i++) {
      u32 d = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (d < head_size) to[d] = sums[i / 2][row * 2 + i % 2] / whole;
    }
  }
}

/// Blocks that should fit a multiprocessor at once, which bounds the registers: a third one where they can be spared.
template <class C, u32 D> constexpr u32 BLOCKS = D == 80 && sizeof(C) == 1 ? 3 : 2;

#define ATTEND_PREFILL_MMA(name, C, D)                                                                               \
  KERNEL __launch_bounds__(THREADS, BLOCKS<C, D>) attend_prefill_mma_##name##_##D(                                   \
      const f32* qkv, u32 qkv_stride, const KvItem* items, u32 items_count, u32 heads, u32 head_size, f32* out,      \
      u32 out_stride) {                                                                                              \
    attend_prefill_mma<C, D, KEYS_OF<D>>(qkv, qkv_stride, items, items_count, heads, head_size, out, out_stride);    \
  }
#define ATTEND_PREFILL_MMA_ALL(name, C) \
  ATTEND_PREFILL_MMA(name, C, 32)       \
  ATTEND_PREFILL_MMA(name, C, 64)       \
  ATTEND_PREFILL_MMA(name, C, 80)       \
  ATTEND_PREFILL_MMA(name, C, 128)
ATTEND_PREFILL_MMA_ALL(f16, Half)
ATTEND_PREFILL_MMA_ALL(q4, Q4)
