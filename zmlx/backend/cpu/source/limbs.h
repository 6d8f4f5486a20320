// Activations of a group as integers of 16 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace zmlx {
namespace {

// What one unit of a group's integers stands for, given the largest magnitude in the group.
inline float step_of(float largest, Float type) {
  if (!(largest <= std::numeric_limits<float>::max())) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  // Below this its inverse would overflow; the error is one of numbers that hardly exist.
  largest = std::max(largest, 1e-30f);
  if (type == Float::bf16) {
    int exponent;
    std::frexp(largest, &exponent); // largest < 2^exponent
    return std::ldexp(1.0f, exponent - 14);
  }
  return largest / 32639.0f; // so that the high limb is below 128
}

} // namespace
} // namespace zmlx
