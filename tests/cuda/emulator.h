// Runs a CUDA kernel's source on the CPU: one OS thread runs a block, every CUDA thread of it is a fiber.
// Include this before a kernel file. What a missing barrier would allow on a GPU happens here for certain in
// one of five orders, because a fiber runs on until a barrier or a warp operation stops it. EMULATOR_ORDER:
//   0, 1, 2  every fiber a turn: forwards, backwards, each round from another one on
//   3, 4     a warp runs until it stands at a barrier, then the next; forwards, backwards
// EMULATOR_DROP_BARRIER=n leaves out every thread's n-th barrier (from 0) of each block.
// Only full warps and full masks: that is all the kernels use, and checked.
#ifndef LOADMASTER_EMULATOR_H
#define LOADMASTER_EMULATOR_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <immintrin.h>

#define LOADMASTER_EMULATED
#define __global__
#define __device__
#define __launch_bounds__(...)
#define DEVICE inline
#define KERNEL extern "C" void
#define UNROLL

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

constexpr unsigned WARP = 32;
/// Bytes that a lane can hand to its warp in one operation.
constexpr size_t MESSAGE = 64;

struct Coordinates {
  dim3 thread, block, block_dim, grid_dim;
  unsigned lane;
};
/// Of the fiber that runs.
const Coordinates& current();

/// __syncthreads.
void barrier();
/// Waits until all lanes of the warp have handed in `bytes`; then `lane`'s message can be read until this
/// lane's next warp operation but one.
void exchange(const void* message, size_t bytes);
const void* message_of(unsigned lane);
/// A copy of 16 bytes (zeros from null) by this thread, carried out by `keep_promises`.
void promise_copy(void* to, const void* from);
void keep_promises();
/// Storage of one shared variable of the running block, first filled with bytes 0xff (not a number).
void* shared_variable(int id, size_t bytes);

/// Runs all blocks, over as many OS threads as EMULATOR_THREADS says (2).
void launch(dim3 grid, dim3 block, const std::function<void()>& body);

template <class T, int ID> T& shared() { return *static_cast<T*>(shared_variable(ID, sizeof(T))); }

template <class T> T shuffle(T value, unsigned from) {
  static_assert(sizeof(T) <= MESSAGE, "too wide for a warp operation");
  exchange(&value, sizeof value);
  T found;
  memcpy(&found, message_of(from % WARP), sizeof found);
  return found;
}

}  // namespace emulator

#define SHARED(type, name, dims)  \
  typedef type name##_array dims; \
  name##_array& name = emulator::shared<name##_array, __COUNTER__>()

#define threadIdx (emulator::current().thread)
#define blockIdx (emulator::current().block)
#define blockDim (emulator::current().block_dim)
#define gridDim (emulator::current().grid_dim)

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() { emulator::exchange("", 0); }
void require_full_mask(unsigned mask);
template <class T> T __shfl_sync(unsigned mask, T value, unsigned from) {
  require_full_mask(mask);
  return emulator::shuffle(value, from);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  require_full_mask(mask);
  return emulator::shuffle(value, emulator::current().lane ^ distance);
}
inline unsigned atomicXor(unsigned* at, unsigned value) { return __atomic_fetch_xor(at, value, __ATOMIC_RELAXED); }
template <class T> T __ldg(const T* at) { return *at; }

// What device.cuh does in PTX.
inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
inline float exp2_fast(float x) { return exp2f(x); }

/// What is not a number leaves a GPU's arithmetic as 0x7fffffff, whatever went in; x86 keeps the operand's bits. Here
/// contractions do as the GPU, sums and products alone do not.
inline float fused(float a, float b, float c) {
  float value = __builtin_fmaf(a, b, c);
  return value == value ? value : float_of(0x7fffffff);
}
#define fmaf(a, b, c) fused(a, b, c)

/// cp.async: what is copied shows when the thread has waited for it.
template <uint32_t COUNT>
inline void copy_async(void* const (&to)[COUNT], const void* const (&from)[COUNT], const bool (&there)[COUNT]) {
  for (uint32_t i = 0; i < COUNT; i++) emulator::promise_copy(to[i], there[i] ? from[i] : nullptr);
}
inline void copies_done() { emulator::keep_promises(); }

/// The tensor core's C += A·B for one warp: A 16 × 16, B 16 × 8 in fp16, C 16 × 8 in f32, spread over the
/// lanes as mma.m16n8k16 wants them. A fragment register holds two neighbouring k.
struct MmaOperands {
  float a[8], b[4];
};
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto element = [](uint32_t pair, int which) { return half_to_float(uint16_t(pair >> (16 * which))); };
  MmaOperands own;
  for (int i = 0; i < 8; i++) own.a[i] = element(a[i / 2], i % 2);
  for (int i = 0; i < 4; i++) own.b[i] = element(i / 2 ? b1 : b0, i % 2);
  emulator::exchange(&own, sizeof own);
  unsigned lane = emulator::current().lane;
  auto of = [](unsigned lane) { return static_cast<const MmaOperands*>(emulator::message_of(lane)); };
  for (int i = 0; i < 4; i++) {
    // Row lane / 4 (+ 8), column lane % 4 * 2 (+ 1) of C.
    unsigned row = lane / 4, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; k++) {
      unsigned holder = k % 8 / 2, upper = k / 8;
      float left = of(row * 4 + holder)->a[(upper * 2 + i / 2) * 2 + k % 2];
      sum = fmaf(left, of(column * 4 + holder)->b[upper * 2 + k % 2], sum);
    }
    c[i] += sum;
  }
}

/// ldmatrix.x4: four 8 × 8 matrices of fp16; lane l says where row l % 8 of matrix l / 8 is. Each lane gets of
/// every matrix two neighbours in row lane / 4, or (transposed) in column lane / 4.
template <bool TRANSPOSED> inline void load_matrices(uint32_t (&to)[4], const void* row) {
  if (uintptr_t(row) % 16) require_full_mask(0);
  emulator::exchange(&row, sizeof row);
  unsigned lane = emulator::current().lane;
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    auto element = [&](unsigned r, unsigned column) -> uint32_t {
      const uint16_t* from;
      memcpy(&from, emulator::message_of(matrix * 8 + r), sizeof from);
      return from[column];
    };
    unsigned line = lane / 4, pair = lane % 4 * 2;
    uint32_t low = TRANSPOSED ? element(pair, line) : element(line, pair);
    uint32_t high = TRANSPOSED ? element(pair + 1, line) : element(line, pair + 1);
    to[matrix] = low | high << 16;
  }
}

#endif
