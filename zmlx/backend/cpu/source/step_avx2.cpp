// The step kernels of step_vector.h, compiled for AVX2.
#include "step_vector.h"

namespace zmlx {

const Step* step_avx2() {
  static const Step step = {"avx2", rms_norm, exponentials, extreme, rotate,
                            attend, binary, convert, gate};
  return &step;
}

} // namespace zmlx
