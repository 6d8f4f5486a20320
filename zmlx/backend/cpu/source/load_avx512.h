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

// Sixteen small floats, 256 times too small: see floats.h.
inline __m512 load_e4m3(__m128i bytes) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7); // the sign comes twice
  return _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(int16_t(0xbf80))));
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : __mmask16((1u << count) - 1);
}

// Sixteen scales of groups, zero where the mask is.
inline __m512 load_scales(const Weight& weight, int64_t index, __mmask16 mask) {
  if (weight.scale < Scale::e8m0) {
    return load_16(weight.scales, Float(weight.scale), index, mask);
  }
  const auto* from = static_cast<const uint8_t*>(weight.scales) + index;
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from));
  if (weight.scale == Scale::e8m0) {
    const __mmask16 least = _mm512_mask_testn_epi32_mask(mask, bytes, bytes);
    const __m512i words = _mm512_slli_epi32(bytes, 23);
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(words, least, _mm512_set1_epi32(0x00400000)));
  }
  return _mm512_mul_ps(load_e4m3(_mm512_cvtepi32_epi8(bytes)), _mm512_set1_ps(256.0f));
}

inline __m512 load_biases(const Weight& weight, int64_t index, __mmask16 mask) {
  return load_16(weight.biases, Float(weight.scale), index, mask);
}

// Take even and odd values of 32 apart.
inline void deal(__m512i& first, __m512i& second) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i evens = _mm512_permutex2var_epi32(first, even, second);
  second = _mm512_permutex2var_epi32(first, odd, second);
  first = evens;
}

// The sum of each group of activations.
inline void group_sums(const Weight& weight, const void* x, Float type, float* sums) {
  for (int64_t g = 0; g < weight.groups(); ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = g * weight.group; k < (g + 1) * weight.group; k += 16) {
      sum = _mm512_add_ps(sum, load_16(x, type, k, 0xffff));
    }
    sums[g] = _mm512_reduce_add_ps(sum);
  }
}

} // namespace
} // namespace zmlx
