// The kernels of kernels_vector.h for any processor.
#include "kernels_vector.h"

namespace zmlx {

const Kernels* kernels_portable() {
  static const Kernels kernels = {"portable", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
