#include "../register.h"
namespace prefill_mma_cu {
#include "../../../kernels/prefill_mma.cu"
// The widest heads as GPUs before sm_80 have them (device code asks __CUDA_ARCH__): 32 keys at once.
#define BEFORE_80(format, C)                                                                                           \
  static void attend_prefill_mma_##format##_128_75(const f32* qkv, u32 qkv_stride, const KvItem* items,                \
                                                   u32 items_count, u32 heads, u32 head_size, f32* out,                \
                                                   u32 out_stride) {                                                   \
    attend_prefill_mma<C, 128, 32>(qkv, qkv_stride, items, items_count, heads, head_size, out, out_stride);            \
  }
BEFORE_80(f16, Half)
BEFORE_80(q4, Q4)
#define REGISTER_FORMAT(format)                \
  REGISTER(attend_prefill_mma_##format##_32);  \
  REGISTER(attend_prefill_mma_##format##_64);  \
  REGISTER(attend_prefill_mma_##format##_80);  \
  REGISTER(attend_prefill_mma_##format##_128); \
  REGISTER(attend_prefill_mma_##format##_128_75);
static const bool registered = [] {
  REGISTER_FORMAT(f16)
  REGISTER_FORMAT(q4)
  return true;
}();
}  // namespace prefill_mma_cu
