#include "../register.h"
namespace prefill_cu {
#include "../../../kernels/prefill.cu"
static const bool registered = [] {
  REGISTER(attend_prefill_f32);
  REGISTER(attend_prefill_f16);
  REGISTER(attend_prefill_q4);
  return true;
}();
}  // namespace prefill_cu
