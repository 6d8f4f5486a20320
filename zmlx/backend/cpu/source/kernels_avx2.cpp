// The kernels of kernels_vector.h, compiled for AVX2.
#include "kernels_vector.h"

namespace zmlx {

const Kernels* kernels_avx2() {
  static const Kernels kernels = {"avx2", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
