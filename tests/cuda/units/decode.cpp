#include "../register.h"
namespace decode_cu {
#include "../../../kernels/decode.cu"
static const bool registered = [] {
  REGISTER(attend_decode_f32);
  REGISTER(attend_decode_f16);
  REGISTER(attend_decode_q4);
  REGISTER(attend_combine);
  return true;
}();
}  // namespace decode_cu
