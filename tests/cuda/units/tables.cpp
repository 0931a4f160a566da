#include "../register.h"
namespace tables_cu {
#include "../../../kernels/tables.cu"
static const bool registered = [] {
  REGISTER(copy_table);
  return true;
}();
}  // namespace tables_cu
