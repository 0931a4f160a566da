#include "../register.h"
namespace epilogue_cu {
#include "../../../kernels/epilogue.cu"
static const bool registered = [] {
  REGISTER(bias_activate);
  REGISTER(narrow_f16);
  REGISTER(narrow_bf16);
  REGISTER(dequantise_q4_f16);
  return true;
}();
}  // namespace epilogue_cu
