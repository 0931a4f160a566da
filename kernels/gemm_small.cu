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

/// How `STEP` neighbouring weights of a row are read (`load`) and become f32 (`widen`, AT_ONCE or fewer from
/// `part` on). `vectors`: rows are such that a whole step can be loaded at once.
template <class T> struct Plain {
  static constexpr u32 STEP = 16 / sizeof(T), PART = STEP < AT_ONCE ? STEP : AT_ONCE;
  struct Raw {
    uint4 words;
  };
  const T* weights;
  u32 inputs;
  bool vectors;
  DEVICE Plain(const void* weights, u32 inputs)
      : weights((const T*)weights), inputs(inputs), vectors(inputs % STEP == 0 && aligned(weights, 16)) {}
  DEVICE Raw load(u32 row, u32 k) const {
    const T* from = weights + (u64)row * inputs + k;
    Raw raw = {make_uint4(0, 0, 0, 0)};
    if (k >= inputs) return raw;
    if (vectors) {
      raw.words = __ldg((const uint4*)from);
      return raw;
    }
    union {
      uint4 words;
      T elements[STEP];
    } some = {raw.words};
    UNROLL
    for (u32 i = 0; i < STEP; i++) {
      if (k + i < inputs) some.elements[i] = from[i];
    }
    raw.words = some.words;
    return raw;
  }
  DEVICE void widen_part(const Raw& raw, u32, f32 (&w)[PART]) const {
    const u32 words[4] = {raw.words.x, raw.words.y, raw.words.z, raw.words.w};
    UNROLL
    for (u32 i = 0; i < PART; i++) w[i] = element(words, i, (T*)0);
  }

 private:
  static DEVICE f32 element(const u32 (&words)[4], u32 i, f32*) { return float_of(words[i]); }
  static DEVICE f32 element(const u32 (&words)[4], u32 i, Half*) {
    return half_to_float((u16)(words[i / 2] >> (i % 2 * 16)));
  }
  static DEVICE f32 element(const u32 (&words)[4], u32 i, Bf16*) {
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
  DEVICE Quantised(const void* weights, u32 inputs)
      : weights((const u8*)weights), inputs(inputs), groups((inputs + GROUP - 1) / GROUP) {}
  DEVICE Raw load(u32 row, u32 k) const {
    const u8* panel = weights + (u64)(row / PANEL_ROWS) * groups * (PANEL_ROWS * GROUP_BYTES);
    Raw raw = {};
    if (k >= inputs) return raw;
    u64 index = (u64)(row % PANEL_ROWS) * groups + k / GROUP;
    const u8* codes = panel + index * (GROUP / 2) + k % GROUP / 2;
    if (WORDS == 4) {
      uint4 four = __ldg((const uint4*)codes);
      raw.words[0] = four.x, raw.words[1] = four.y, raw.words[2 % WORDS] = four.z, raw.words[3 % WORDS] = four.w;
    } else {
      uint2 two = __ldg((const uint2*)codes);
      raw.words[0] = two.x, raw.words[1] = two.y;
    }
    raw.ends = __ldg((const u32*)(panel + (u64)PANEL_ROWS * groups * (GROUP / 2)) + index);
    return raw;
  }
  DEVICE void widen_part(const Raw& raw, u32 part, f32 (&w)[PART]) const {
    f32 scale = half_to_float((u16)raw.ends), minimum = half_to_float((u16)(raw.ends >> 16));
    UNROLL
    for (u32 i = 0; i < PART; i++) {
      // 2^23 + code, exactly, without the slow conversion of integers.
      u32 code = raw.words[part] >> (i / 2 * 4 + i % 2 * 16) & 15;
      w[i] = fmaf(float_of(0x4b000000u | code) - 8388608.0f, scale, minimum);
    }
  }
};

/// `COUNT` activations from k on, zeros past the inputs.
template <u32 COUNT> DEVICE void load_x(const f32* row, u32 k, u32 inputs, bool vectors, f32 (&x)[COUNT]) {
  if (vectors && k + COUNT <= inputs) {
    UNROLL
    for (u32 i = 0; i < COUNT; i += 4) {
      float4 four = *(const float4*)(row + k + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
    return;
  }
  UNROLL
  for (u32 i = 0; i < COUNT; i++) x[i] = k + i < inputs ? row[k + i] : 0.0f;
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

  DEVICE void finish(u32 i, u32 n, f32 sum) const {
    if (i >= m || n >= rows) return;
    out[(u64)i * out_stride + n] = activate(bias ? sum + bias[n] : sum, act);
  }
};

/// N = 1, 2, 4. Launch: grid ceil(rows / 4), block 128. A block makes four outputs of each row of
/// activations; its warps take steps of 32 lanes × STEP inputs in turn, and their sums are added in order.
template <class W, u32 N> DEVICE void few(const Product& p, const W& weights) {
  const u32 warps = 4, span = 32 * W::STEP;
  SHARED(f32, parts, [4][ROWS * N]);
  u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_row = blockIdx.x * ROWS;
  bool vectors = aligned(p.x, 16) && p.x_stride % 4 == 0;
  f32 sums[ROWS][N] = {};
  typename W::Raw next[ROWS];
  u32 k = warp * span + lane * W::STEP;
  UNROLL
  for (u32 r = 0; r < ROWS; r++) next[r] = weights.load(first_row + r, k);
  for (; k < p.inputs; k += warps * span) {
    typename W::Raw raw[ROWS];
    UNROLL
    for (u32 r = 0; r < ROWS; r++) {
      raw[r] = next[r];
      next[r] = weights.load(first_row + r, k + warps * span);
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
        load_x(p.x + (u64)i * p.x_stride, k + part * W::PART, p.inputs, vectors, x);
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
    for (u32 w = 0; w < warps; w++) sum += parts[w][threadIdx.x];
    p.finish(threadIdx.x % N, first_row + threadIdx.x / N, sum);
  }
}

/// N = 8, 16. Launch: grid ceil(rows / 32), block 256. A warp makes four outputs of each row of activations;
/// the activations of a step lie in shared memory for all eight warps, `[i][quad of a lane][lane]`.
template <class W, u32 N> DEVICE void many(const Product& p, const W& weights) {
  const u32 quads = W::STEP / 4, span = 32 * W::STEP, threads = 256;
  SHARED(float4, staged, [N][W::STEP / 4][32]);
  u32 lane = threadIdx.x % 32, first_row = (blockIdx.x * (threads / 32) + threadIdx.x / 32) * ROWS;
  // Warps past the matrix may be past the last panel too; they only help to stage.
  bool idle = first_row >= p.rows;
  bool vectors = aligned(p.x, 16) && p.x_stride % 4 == 0;
  f32 sums[ROWS][N] = {};
  typename W::Raw next[ROWS] = {};
  UNROLL
  for (u32 r = 0; r < ROWS; r++) {
    if (!idle) next[r] = weights.load(first_row + r, lane * W::STEP);
  }
  for (u32 from = 0; from < p.inputs; from += span) {
    __syncthreads();
    for (u32 at = threadIdx.x; at < N * quads * 32; at += threads) {
      u32 i = at / (quads * 32), quad = at % (quads * 32);
      f32 x[4] = {};
      if (i < p.m) load_x(p.x + (u64)i * p.x_stride, from + quad * 4, p.inputs, vectors, x);
      staged[i][quad % quads][quad / quads] = make_float4(x[0], x[1], x[2], x[3]);
    }
    __syncthreads();
    if (idle) continue;
    typename W::Raw raw[ROWS];
    UNROLL
    for (u32 r = 0; r < ROWS; r++) {
      raw[r] = next[r];
      next[r] = weights.load(first_row + r, from + span + lane * W::STEP);
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
  UNROLL
  for (u32 r = 0; r < ROWS; r++) {
    UNROLL
    for (u32 i = 0; i < N; i++) {
      f32 sum = warp_sum(sums[r][i]);
      if (lane == 0) p.finish(i, first_row + r, sum);
    }
  }
}

#define GEMM_SMALL(format, W, N, shape, threads)                                                                     \
  KERNEL __launch_bounds__(threads) gemm_small_##format##_##N(                                                       \
      const f32* x, u32 x_stride, u32 m, u32 inputs, const void* weights, u32 rows, const f32* bias, u32 act,        \
      f32* out, u32 out_stride) {                                                                                    \
    Product product = {x, x_stride, m, inputs, rows, bias, act, out, out_stride};                                    \
    shape<W, N>(product, W(weights, inputs));                                                                        \
  }
#define GEMM_SMALL_ALL(format, Narrow, Wide)  \
  GEMM_SMALL(format, Narrow, 1, few, 128)     \
  GEMM_SMALL(format, Narrow, 2, few, 128)     \
  GEMM_SMALL(format, Narrow, 4, few, 128)     \
  GEMM_SMALL(format, Wide, 8, many, 256)      \
  GEMM_SMALL(format, Wide, 16, many, 256)

GEMM_SMALL_ALL(f32, Plain<f32>, Plain<f32>)
GEMM_SMALL_ALL(f16, Plain<Half>, Plain<Half>)
GEMM_SMALL_ALL(bf16, Plain<Bf16>, Plain<Bf16>)
GEMM_SMALL_ALL(q4, Quantised<32>, Quantised<16>)
