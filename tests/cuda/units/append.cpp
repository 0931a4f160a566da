#include "../register.h"
namespace append_cu {
#include "../../../kernels/append.cu"
static const bool registered = [] {
  REGISTER(append_f32);
  REGISTER(append_f16);
  REGISTER(append_q4);
  return true;
}();
}  // namespace append_cu
