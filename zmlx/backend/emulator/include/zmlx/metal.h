// The Metal standard library for kernels that run on the CPU.
#pragma once

#include <zmlx/types.h>
#include <zmlx/floats.h>
#include <zmlx/vectors.h>
#include <zmlx/math.h>
#include <zmlx/hooks.h>
#include <zmlx/simd.h>
#include <zmlx/matrix.h>
#include <zmlx/atomics.h>

namespace metal {
struct os_log {
  constexpr os_log(const char*, const char*) {}
  template <class... T>
  void log_debug(T...) const {}
  template <class... T>
  void log(T...) const {}
};
} // namespace metal
