#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace zmlx {

void* driver_function_if_any(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);
}

void* driver_function(const char* name) {
  void* const found = driver_function_if_any(name);
  if (found == nullptr) {
    throw std::runtime_error(std::string("[zmlx] the CUDA driver here has no ") + name);
  }
  return found;
}

void check(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) {
    return;
  }
  const char* said = nullptr;
  ZMLX_DRIVER(cuGetErrorString)(result, &said);
  throw std::runtime_error(
      std::string("[zmlx] ") + call + " failed: " + (said != nullptr ? said : "unknown error"));
}

Current::Current(CUcontext context) {
  ZMLX_CALL(cuCtxPushCurrent, context);
}

Current::~Current() {
  CUcontext before = nullptr;
  ZMLX_DRIVER(cuCtxPopCurrent)(&before);
}

} // namespace zmlx
