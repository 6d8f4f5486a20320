// In place of MLX's file of this name: bfloat is a class here.
#pragma once

#include <zmlx/metal.h>

using namespace metal;

typedef bfloat bfloat16_t;

inline uint16_t bfloat16_to_uint16(bfloat16_t x) {
  return as_type<uint16_t>(x);
}
inline bfloat16_t uint16_to_bfloat16(uint16_t x) {
  return as_type<bfloat16_t>(x);
}
