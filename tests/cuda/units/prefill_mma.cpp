#include "../register.h"
namespace prefill_mma_cu {
#include "../../../kernels/prefill_mma.cu"
#define REGISTER_FORMAT(format)               \
  REGISTER(attend_prefill_mma_##format##_32); \
  REGISTER(attend_prefill_mma_##format##_64); \
  REGISTER(attend_prefill_mma_##format##_80); \
  REGISTER(attend_prefill_mma_##format##_128);
static const bool registered = [] {
  REGISTER_FORMAT(f16)
  REGISTER_FORMAT(q4)
  return true;
}();
}  // namespace prefill_mma_cu
