// Small tables (rows, ids, token slots, attention items) on their way to the device. The multiprocessors fetch them:
// the copy engine has streamed weights in hand, and what is queued behind those waits for them, and all that needs it.
#include "device.cuh"

constexpr u32 THREADS = 256;

/// to[i] = from[i], 16 bytes each; `from` is page-locked DRAM at the address that the device has it mapped at, `to`
/// device memory. Launch: grid ceil(count / 256), block 256: a thread has one, so that all are on their way at once.
/// Twin: a copy.
KERNEL copy_table(const uint4* from, uint4* to, u32 count) {
  u32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i < count) to[i] = from[i];
}
