#include "../register.h"
namespace norm_cu {
#include "../../../kernels/norm.cu"
static const bool registered = [] {
  REGISTER(layer_norm);
  return true;
}();
}  // namespace norm_cu
