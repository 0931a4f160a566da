#include "../register.h"
namespace gemm_small_cu {
#include "../../../kernels/gemm_small.cu"
#define REGISTER_FORMAT(format)        \
  REGISTER(gemm_small_##format##_1);   \
  REGISTER(gemm_small_##format##_2);   \
  REGISTER(gemm_small_##format##_4);   \
  REGISTER(gemm_small_##format##_8);   \
  REGISTER(gemm_small_##format##_16);
static const bool registered = [] {
  REGISTER_FORMAT(f32)
  REGISTER_FORMAT(f16)
  REGISTER_FORMAT(bf16)
  REGISTER_FORMAT(q4)
  return true;
}();
}  // namespace gemm_small_cu
