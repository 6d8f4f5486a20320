// The step kernels of step_vector.h, compiled for AVX512.
#include "step_vector.h"

namespace zmlx {

const Step* step_avx512() {
  static const Step step = {"avx512", rms_norm, exponentials, extreme, rotate,
                            attend, binary, convert, gate};
  return &step;
}

} // namespace zmlx
