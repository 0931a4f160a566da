// What the probe measures beside the program's own kernels.
#include "device.cuh"

/// out[0] ^= the exclusive or of all words: reads `count` × 16 bytes once. Any grid, block 256.
KERNEL probe_read(const uint4* from, u64 count, u32* out) {
  u32 found = 0;
  u64 step = (u64)gridDim.x * blockDim.x;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    uint4 words = from[i];
    found ^= words.x ^ words.y ^ words.z ^ words.w;
  }
  for (u32 distance = 16; distance; distance >>= 1) found ^= __shfl_xor_sync(~0u, found, distance);
  if (threadIdx.x % 32 == 0) atomicXor(out, found);
}

/// Does nothing: what a launch costs. Any grid and block.
KERNEL probe_nothing() {}
