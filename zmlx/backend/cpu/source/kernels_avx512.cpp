// The kernels of kernels_vector.h, compiled for AVX512.
#include "kernels_vector.h"

namespace zmlx {

const Kernels* kernels_avx512() {
  static const Kernels kernels = {"avx512", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
