#include "../register.h"
namespace rows_cu {
#include "../../../kernels/rows.cu"
static const bool registered = [] {
  REGISTER(embed_f32);
  REGISTER(embed_f16);
  REGISTER(embed_bf16);
  REGISTER(add_positions_f32);
  REGISTER(add_positions_f16);
  REGISTER(add_positions_bf16);
  REGISTER(gather_rows);
  REGISTER(scatter_rows);
  REGISTER(add_rows);
  return true;
}();
}  // namespace rows_cu
