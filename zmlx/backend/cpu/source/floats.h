// Conversions between float32 and the two 16-bit formats.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace zmlx {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bf16(uint16_t value) {
  return bits_to_float(uint32_t(value) << 16);
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return uint16_t((bits >> 16) | 0x40u);
  }
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_f16(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) { // infinity and NaN
    return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Shifted into float32's fields the exponent is 112 too small; the product mends that, also for
  // subnormal values.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return sign | 0x7e00u;
  }
  if (magnitude >= 0x477ff000u) { // rounds to more than the largest finite half
    return sign | 0x7c00u;
  }
  if (magnitude < 0x38800000u) { // subnormal: let a float addition round at the right place
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return sign | uint16_t(float_to_bits(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | uint16_t((rounded - 0x38000000u) >> 13);
}

inline float load_float(const void* data, Float type, int64_t index) {
  switch (type) {
    case Float::f32:
      return static_cast<const float*>(data)[index];
    case Float::f16:
      return from_f16(static_cast<const uint16_t*>(data)[index]);
    default:
      return from_bf16(static_cast<const uint16_t*>(data)[index]);
  }
}

// Four bits of exponent, three of mantissa: with the same bits a half is 256 times smaller.
inline float from_e4m3(uint8_t value) {
  return from_f16(uint16_t((value & 0x80u) << 8 | (value & 0x7fu) << 7)) * 256.0f;
}

// A power of two; zero stands for the least.
inline float from_e8m0(uint8_t value) {
  return bits_to_float(value == 0 ? 0x00400000u : uint32_t(value) << 23);
}

// Twice the values of two bits of exponent and one of mantissa.
constexpr int8_t kTwiceE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

inline float load_scale(const Weight& weight, int64_t index) {
  switch (weight.scale) {
    case Scale::e8m0:
      return from_e8m0(static_cast<const uint8_t*>(weight.scales)[index]);
    case Scale::e4m3:
      return from_e4m3(static_cast<const uint8_t*>(weight.scales)[index]);
    default:
      return load_float(weight.scales, Float(weight.scale), index);
  }
}

inline float load_bias(const Weight& weight, int64_t index) {
  return load_float(weight.biases, Float(weight.scale), index);
}

inline void store_float(void* data, Float type, int64_t index, float value) {
  switch (type) {
    case Float::f32:
      static_cast<float*>(data)[index] = value;
      break;
    case Float::f16:
      static_cast<uint16_t*>(data)[index] = to_f16(value);
      break;
    default:
      static_cast<uint16_t*>(data)[index] = to_bf16(value);
  }
}

} // namespace zmlx
