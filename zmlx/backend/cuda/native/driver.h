// CUDA's driver, by the functions of the library that MLX has loaded: nothing to link with.
#pragma once

#include <cuda.h>

namespace zmlx {

// A function of the driver by its name, which is there as soon as MLX is.
void* driver_function(const char* name);

// The same, or null where this driver has none of that name.
void* driver_function_if_any(const char* name);

// Throws what CUDA says if a call failed.
void check(CUresult result, const char* call);

// Makes a context the current one for as long as it lives.
class Current {
 public:
  explicit Current(CUcontext context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

} // namespace zmlx

#define ZMLX_QUOTED_(text) #text
#define ZMLX_QUOTED(text) ZMLX_QUOTED_(text)
// CUDA's header renames functions to their newest versions, hence the way through the macro.
#define ZMLX_DRIVER(function)                                                              \
  ([] {                                                                                    \
    static const auto found =                                                              \
        reinterpret_cast<decltype(&function)>(zmlx::driver_function(ZMLX_QUOTED(function))); \
    return found;                                                                          \
  }())
#define ZMLX_DRIVER_IF_ANY(function)    \
  (reinterpret_cast<decltype(&function)>( \
      zmlx::driver_function_if_any(ZMLX_QUOTED(function))))
#define ZMLX_CALL(function, ...) \
  zmlx::check(ZMLX_DRIVER(function)(__VA_ARGS__), ZMLX_QUOTED(function))
