// Which kernels this processor runs.
#include <cstring>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace zmlx {

namespace {

struct Choice {
  const Kernels* (*kernels)();
  bool (*runs)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vbmi");
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vbmi");
}
#endif

#if defined(__aarch64__)
bool has_dotprod() {
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}
#endif

bool always() {
  return true;
}

// From the best to the one that always runs.
const Choice kChoices[] = {
#if defined(__x86_64__)
    {kernels_avx512_vnni, has_avx512_vnni},
    {kernels_avx512, has_avx512},
    {kernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {kernels_neon_dotprod, has_dotprod},
#endif
    {kernels_portable, always},
};

} // namespace

const Kernels* kernels_named(const char* name) {
  for (const Choice& choice : kChoices) {
    if (choice.runs() && std::strcmp(choice.kernels()->name, name) == 0) {
      return choice.kernels();
    }
  }
  return nullptr;
}

const Kernels* panels_best() {
#if defined(__x86_64__)
  if (has_avx512_bf16()) {
    return panels_avx512_bf16();
  }
#endif
  return nullptr;
}

const Kernels* kernels_best() {
  for (const Choice& choice : kChoices) {
    if (choice.runs()) {
      return choice.kernels();
    }
  }
  return nullptr;
}

} // namespace zmlx
