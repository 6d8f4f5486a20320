#include "step.h"

#include <cstring>

namespace zmlx {

const Step& step() {
#if defined(__x86_64__)
  const char* name = kernels().name;
  if (std::strncmp(name, "avx512", 6) == 0) {
    return *step_avx512();
  }
  if (std::strcmp(name, "avx2") == 0) {
    return *step_avx2();
  }
#endif
  return *step_portable();
}

} // namespace zmlx
