// Activations of a group as integers of 16 bits, or of 8.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace zmlx {
namespace {

// What one unit of a group's integers stands for, given the largest magnitude in the group. Integers
// have so many limbs of 8 bits, each with its sign.
inline float step_of(float largest, Float type, int limbs = 2) {
  if (!(largest <= std::numeric_limits<float>::max())) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  // Below this its inverse would overflow; the error is one of numbers that hardly exist.
  largest = std::max(largest, 1e-30f);
  if (limbs == 1) {
    return largest / 127.0f;
  }
  if (type == Float::bf16) {
    int exponent;
    std::frexp(largest, &exponent); // largest < 2^exponent
    return std::ldexp(1.0f, exponent - 14);
  }
  return largest / 32639.0f; // so that the high limb is below 128
}

} // namespace
} // namespace zmlx
