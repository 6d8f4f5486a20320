// The step kernels of step_vector.h for any processor.
#include "step_vector.h"

namespace zmlx {

const Step* step_portable() {
  static const Step step = {"portable", rms_norm, exponentials, extreme, rotate,
                            attend, binary, convert, gate};
  return &step;
}

} // namespace zmlx
