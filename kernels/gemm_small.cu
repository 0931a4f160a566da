// out[i][n] = act(Σ_k x[i][k] · w[n][k] + bias[n]) for at most 16 rows i, sums in f32: bound by reading the
// weights, so each is read once, 16 bytes a lane. Weights in `gpu-rowmajor` panels (README.md), which
// always have whole panels of rows, so rows past the matrix may be read. Twin: cpu/kernels/gemm.rs.
//
// The sum over k is split in a fixed way (lanes, and for few rows warps too) and combined in a fixed order.
#include "device.cuh"

/// Rows of weights that a warp multiplies at once: activations are loaded once for them.
constexpr u32 ROWS = 4;
/// Inputs widened at once, at most.
constexpr u32 AT_ONCE = 8;

/// How `STEP` neighbouring weights of a row are read (`load`) and become f32 (`widen_part`: PART of them);
/// `element` is the slow way to any one. `whole`: rows consist of aligned steps.
template <class T> struct Plain {
  static constexpr u32 STEP = 16 / sizeof(T), PART = STEP < AT_ONCE ? STEP : AT_ONCE;
  struct Raw {
    uint4 words;
  };
  const T* weights;
  u32 inputs;
  bool whole;
  DEVICE Plain(const void* weights, u32 inputs)
      : weights((const T*)weights), inputs(inputs), whole(inputs % STEP == 0 && aligned(weights, 16)) {}
  DEVICE f32 element(u32 row, u32 k) const { return widen(weights[(u64)row * inputs + k]); }
  DEVICE Raw load(u32 row, u32 k) const {
    Raw raw = {__ldg((const uint4*)(weights + (u64)row * inputs + k))};
    return raw;
  }
  DEVICE void widen_part(const Raw& raw, u32, f32 (&w)[PART]) const {
    const u32 words[4] = {raw.words.x, raw.words.y, raw.words.z, raw.words.w};
    UNROLL
    for (u32 i = 0; i < PART; i++) w[i] = from_words(words, i, (T*)0);
  }

 private:
  static DEVICE f32 from_words(const u32 (&words)[4], u32 i, f32*) { return float_of(words[i]); }
  static DEVICE f32 from_words(const u32 (&words)[4], u32 i, Half*) {
    return half_to_float((u16)(words[i / 2] >> (i % 2 * 16)));
  }
  static DEVICE f32 from_words(const u32 (&words)[4], u32 i, Bf16*) {
    return float_of(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
};

/// Half a group (STEP 32) or a quarter (16) with its scale and minimum.
template <u32 WIDTH> struct Quantised {
  static constexpr u32 STEP = WIDTH, PART = AT_ONCE, WORDS = STEP / 8;
  struct Raw {
    u32 words[WORDS];
    u32 ends;
  };
  const u8* weights;
  u32 inputs, groups;
  bool whole;
  DEVICE Quantised(const void* weights, u32 inputs)
      : weights((const u8*)weights), inputs(inputs), groups((inputs + GROUP - 1) / GROUP),
        whole(inputs % STEP == 0 && aligned(weights, 16)) {}
  DEVICE f32 element(u32 row, u32 k) const {
    const u8* panel = panel_of(row);
    u64 index = (u64)(row % PANEL_ROWS) * groups + k / GROUP;
    u32 word = ((const u32*)panel)[index * 8 + k % GROUP / 8];
    return value(word >> (k % 8 / 2 * 4 + k % 2 * 16) & 15, ((const u32*)ends_of(panel))[index]);
  }
  DEVICE Raw load(u32 row, u32 k) const {
    const u8* panel = panel_of(row);
    u64 index = (u64)(row % PANEL_ROWS) * groups + k / GROUP;
    const u8* codes = panel + index * (GROUP / 2) + k % GROUP / 2;
    Raw raw;
    load_words(codes, raw.words);
    raw.ends = __ldg((const u32*)ends_of(panel) + index);
    return raw;
  }
  DEVICE void widen_part(const Raw& raw, u32 part, f32 (&w)[PART]) const {
    UNROLL
    for (u32 i = 0; i < PART; i++) w[i] = value(raw.words[part] >> (i / 2 * 4 + i % 2 * 16) & 15, raw.ends);
  }

 private:
  DEVICE const u8* panel_of(u32 row) const {
    return weights + (u64)(row / PANEL_ROWS) * groups * (PANEL_ROWS * GROUP_BYTES);
  }
  DEVICE const u8* ends_of(const u8* panel) const { return panel + (u64)PANEL_ROWS * groups * (GROUP / 2); }
  static DEVICE void load_words(const u8* codes, u32 (&words)[4]) {
    uint4 four = __ldg((const uint4*)codes);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }
  static DEVICE void load_words(const u8* codes, u32 (&words)[2]) {
    uint2 two = __ldg((const uint2*)codes);
    words[0] = two.x, words[1] = two.y;
  }
  static DEVICE f32 value(u32 code, u32 ends) {
    f32 scale = half_to_float((u16)ends), minimum = half_to_float((u16)(ends >> 16));
    return fmaf(code_value(code), scale, minimum);
  }
};

/// `COUNT` activations; aligned.
template <u32 COUNT> DEVICE void load_x(const f32* from, f32 (&x)[COUNT]) {
  UNROLL
  for (u32 i = 0; i < COUNT; i += 4) {
    float4 four = *(const float4*)(from + i);
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}

/// sums[r][i] += w[r] · x of one row of activations.
template <u32 N, u32 COUNT>
DEVICE void multiply(const f32 (&w)[ROWS][COUNT], const f32 (&x)[COUNT], u32 i, f32 (&sums)[ROWS][N]) {
  UNROLL
  for (u32 r = 0; r < ROWS; r++) {
    UNROLL
    for (u32 k = 0; k < COUNT; k++) sums[r][i] = fmaf(w[r][k], x[k], sums[r][i]);
  }
}

struct Product {
  const f32* x;
  u32 x_stride, m, inputs;
  u32 rows;
  const f32* bias;
  u32 act;
  f32* out;
  u32 out_stride;

  DEVICE bool vectors() const { return aligned(x, 16) && x_stride % 4 == 0; }
  DEVICE void finish(u32 i, u32 n, f32 sum) const {
    if (i >= m || n >= rows) return;
    out[(u64)i * out_stride + n] = activate(bias ? sum + bias[n] : sum, act);
  }
};

/// Any shape and alignment: a warp makes `own` outputs of each row of activations, one after the other.
template <class W> DEVICE void any_shape(const Product& p, const W& weights, u32 own) {
  u32 lane = threadIdx.x % 32, first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * own;
  for (u32 n = first; n < first + own && n < p.rows; n++) {
    for (u32 i = 0; i < p.m; i++) {
      const f32* x = p.x + (u64)i * p.x_stride;
      f32 sum = 0;
      for (u32 k = lane; k < p.inputs; k += 32) sum = fmaf(weights.element(n, k), x[k], sum);
      sum = warp_sum(sum);
      if (lane == 0) p.finish(i, n, sum);
    }
  }
}

/// N = 1, 2, 4. Launch: grid ceil(rows / 4), block 128. A block makes four outputs of each row of
/// activations; its warps take steps of 32 lanes × STEP inputs in turn, and their sums are added in order.
template <class W, u32 N> DEVICE void few(const Product& p, const W& weights) {
  constexpr u32 WARPS = 4;
  SHARED(f32, parts, [4][ROWS * N]);
  if (!p.vectors() || !weights.whole) return any_shape(p, weights, ROWS / WARPS);
  const u32 stride = WARPS * 32 * W::STEP;
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_row = blockIdx.x * ROWS;
  f32 sums[ROWS][N] = {};
  typename W::Raw next[ROWS];
  u32 k = (warp * 32 + lane) * W::STEP;
  // A step past the end loads what was loaded before: it is never used.
  UNROLL
  for (u32 r = 0; r < ROWS; r++) next[r] = weights.load(first_row + r, k < p.inputs ? k : 0);
  for (; k < p.inputs; k += stride) {
    typename W::Raw raw[ROWS];
    u32 ahead = k + stride < p.inputs ? k + stride : k;
    UNROLL
    for (u32 r = 0; r < ROWS; r++) {
      raw[r] = next[r];
      next[r] = weights.load(first_row + r, ahead);
    }
    UNROLL
    for (u32 part = 0; part < W::STEP / W::PART; part++) {
      f32 w[ROWS][W::PART];
      UNROLL
      for (u32 r = 0; r < ROWS; r++) weights.widen_part(raw[r], part, w[r]);
      UNROLL
      for (u32 i = 0; i < N; i++) {
        if (i >= p.m) break;
        f32 x[W::PART];
        load_x(p.x + (u64)i * p.x_stride + k + part * W::PART, x);
        multiply<N>(w, x, i, sums);
      }
    }
  }
  UNROLL
  for (u32 r = 0; r < ROWS; r++) {
    UNROLL
    for (u32 i = 0; i < N; i++) {
      f32 sum = warp_sum(sums[r][i]);
      if (lane == 0) parts[warp][r * N + i] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x < ROWS * N) {
    f32 sum = 0;
    for (u32 w = 0; w < WARPS; w++) sum += parts[w][threadIdx.x];
    p.finish(threadIdx.x % N, first_row + threadIdx.x / N, sum);
  }
}

/// N = 8, 16. Launch: grid ceil(rows / 32), block 256. A warp makes four outputs of each row of activations;
/// the activations of a step lie in shared memory for all eight warps, `[i][quad of a lane][lane]`. Lanes are followed
/// by so much room that what eight neighbouring threads store at once lies in as many banks.
template <class W, u32 N> DEVICE void many(const Product& p, const W& weights) {
  constexpr u32 QUADS = W::STEP / 4, STRIDE = 32 * W::STEP, SPREAD = 256, ROOM = QUADS > 1 ? 8 / QUADS : 0;
  SHARED(float4, staged, [N][QUADS][32 + ROOM]);
  if (!p.vectors() || !weights.whole) return any_shape(p, weights, ROWS);
  u32 lane = threadIdx.x % 32, first_row = (blockIdx.x * (SPREAD / 32) + threadIdx.x / 32) * ROWS;
  f32 sums[ROWS][N] = {};
  typename W::Raw next[ROWS];
  UNROLL
  for (u32 r = 0; r < ROWS; r++) next[r] = weights.load(first_row + r, lane * W::STEP < p.inputs ? lane * W::STEP : 0);
  for (u32 from = 0; from < p.inputs; from += STRIDE) {
    __syncthreads();
    for (u32 at = threadIdx.x; at < N * QUADS * 32; at += SPREAD) {
      u32 i = at / (QUADS * 32), quad = at % (QUADS * 32), k = from + quad * 4;
      bool inside = i < p.m && k < p.inputs;
      staged[i][quad % QUADS][quad / QUADS] =
          inside ? *(const float4*)(p.x + (u64)i * p.x_stride + k) : make_float4(0, 0, 0, 0);
    }
    __syncthreads();
    // Lanes past the inputs multiply some weights by zero.
    typename W::Raw raw[ROWS];
    u32 ahead = from + STRIDE + lane * W::STEP;
    UNROLL
    for (u32 r = 0; r < ROWS; r++) {
      raw[r] = next[r];
      next[r] = weights.load(first_row + r, ahead < p.inputs ? ahead : 0);
    }
    UNROLL
    for (u32 part = 0; part < W::STEP / W::PART; part++) {
      f32 w[ROWS][W::PART];
      UNROLL
      for (u32 r = 0; r < ROWS; r++) weights.widen_part(raw[r], part, w[r]);
      UNROLL
      for (u32 i = 0; i < N; i++) {
        f32 x[W::PART];
        UNROLL
        for (u32 q = 0; q < W::PART / 4; q++) {
          float4 four = staged[i][part * (W::PART / 4) + q][lane];
          x[4 * q] = four.x, x[4 * q + 1] = four.y, x[4 * q + 2] = four.z, x[4 * q + 3] = four.w;
        }
        multiply<N>(w, x, i, sums);
      }
    }
  }
  // Output i of the warp ends in lane i % 32, so that every lane finishes one or two.
  constexpr u32 TURNS = (ROWS * N + 31) / 32;
  f32 mine[TURNS];
  UNROLL
  for (u32 i = 0; i < ROWS * N; i++) {
    f32 sum = warp_sum(sums[i / N][i % N]);
    if (lane == i % 32) mine[i / 32] = sum;
  }
  UNROLL
  for (u32 turn = 0; turn < TURNS; turn++) {
    u32 i = turn * 32 + lane;
    if (i < ROWS * N) p.finish(i % N, first_row + i / N, mine[turn]);
  }
}

/// `blocks`: how many should fit a multiprocessor at once, which bounds the registers.
#define GEMM_SMALL(format, W, N, shape, threads, blocks)                                                             \
  KERNEL __launch_bounds__(threads, blocks) gemm_small_##format##_##N(                                               \
      const f32* x, u32 x_stride, u32 m, u32 inputs, const void* weights, u32 rows, const f32* bias, u32 act,        \
      f32* out, u32 out_stride) {                                                                                    \
    Product product = {x, x_stride, m, inputs, rows, bias, act, out, out_stride};                                    \
    shape<W, N>(product, W(weights, inputs));                                                                        \
  }
#define GEMM_SMALL_ALL(format, Narrow, Wide, blocks_8) \
  GEMM_SMALL(format, Narrow, 1, few, 128, 6)           \
  GEMM_SMALL(format, Narrow, 2, few, 128, 4)           \
  GEMM_SMALL(format, Narrow, 4, few, 128, 4)           \
  GEMM_SMALL(format, Wide, 8, many, 256, blocks_8)     \
  GEMM_SMALL(format, Wide, 16, many, 256, 1)

GEMM_SMALL_ALL(f32, Plain<f32>, Plain<f32>, 2)
GEMM_SMALL_ALL(f16, Plain<Half>, Plain<Half>, 2)
GEMM_SMALL_ALL(bf16, Plain<Bf16>, Plain<Bf16>, 2)
GEMM_SMALL_ALL(q4, Quantised<32>, Quantised<16>, 1)
