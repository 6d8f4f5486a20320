// Loads that the AVX-512 kernels share; each file that includes this has its own flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace zmlx {
namespace {

// Sixteen values as float32, zero where the mask is.
inline __m512 load_16(const void* data, Float type, int64_t index, __mmask16 mask) {
  switch (type) {
    case Float::f32:
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + index);
    case Float::f16:
      return _mm512_cvtph_ps(
          _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + index));
    default:
      return _mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(
              _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + index)),
          16));
  }
}

} // namespace
} // namespace zmlx
