// Puts the kernels of one file into the stand-in driver's registry. Each file of kernels is compiled by a unit
// that says which names it has; SIGNATURE is the file's first line.
#include "fake.h"
#define REGISTER(kernel) fake::add_kernel(fake::describe(#kernel, SIGNATURE, kernel))
