// The kernels in the compiler's vector types: eight float32 lanes, whatever the instruction set.
// Included by one file per instruction set, each compiled with its own flags.
#pragma once

#include <algorithm>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "floats.h"
#include "kernels.h"

namespace zmlx {
namespace {

typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Signed __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(8)));
typedef int8_t SignedBytes __attribute__((vector_size(8)));

#if defined(__ARM_NEON) && !defined(__clang__)
// GCC keeps a vector of two registers in memory, a structure of two in registers.
struct Lanes {
  float32x4_t low = {}, high = {};

  Lanes() = default;
  Lanes(float32x4_t first, float32x4_t second) : low(first), high(second) {}

  float operator[](int i) const {
    return i < 4 ? low[i] : high[i - 4];
  }
  Lanes operator+(const Lanes& other) const {
    return {low + other.low, high + other.high};
  }
  Lanes operator*(const Lanes& other) const {
    return {low * other.low, high * other.high};
  }
  Lanes operator*(float factor) const {
    return {low * factor, high * factor};
  }
  Lanes& operator+=(const Lanes& other) {
    return *this = *this + other;
  }
};

inline Lanes load_lanes(const float* from) {
  return {vld1q_f32(from), vld1q_f32(from + 4)};
}
#else
typedef float Lanes __attribute__((vector_size(32)));

inline Lanes load_lanes(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
#endif

constexpr int kBatchRows = 4; // rows of activations multiplied in one pass over the weights

inline float sum_lanes(Lanes v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Eight shifted values of `Bits` bits as float32, four in each word.
#if defined(__ARM_NEON)
inline Lanes to_lanes(int32x4_t low, int32x4_t high) {
  const float32x4_t parts[2] = {vcvtq_f32_s32(low), vcvtq_f32_s32(high)};
  Lanes value;
  std::memcpy(&value, parts, sizeof value);
  return value;
}

template <int Bits>
inline Lanes spread(uint32_t low, uint32_t high) {
  const int32x4_t right = {0, -Bits, -2 * Bits, -3 * Bits};
  const uint32x4_t mask = vdupq_n_u32((1u << Bits) - 1);
  const int32x4_t half = vdupq_n_s32(1 << (Bits - 1));
  const auto shifted = [&](uint32_t word) {
    const uint32x4_t fields = vandq_u32(vshlq_u32(vdupq_n_u32(word), right), mask);
    return vsubq_s32(vreinterpretq_s32_u32(fields), half);
  };
  return to_lanes(shifted(low), shifted(high));
}
#else
template <int Bits>
inline Lanes spread(uint32_t low, uint32_t high) {
  constexpr uint32_t mask = (1u << Bits) - 1;
  Words words = {low, low, low, low, high, high, high, high};
  const Words shift = {0, Bits, 2 * Bits, 3 * Bits, 0, Bits, 2 * Bits, 3 * Bits};
  words = (words >> shift) & mask;
  return __builtin_convertvector(Signed(words) - (1 << (Bits - 1)), Lanes);
}
#endif

// The same of packed bytes. `whole` allows reading eight bytes at `from`.
template <int Bits>
inline Lanes unpack(const uint8_t* from, bool whole) {
  uint64_t packed = 0;
  if (whole) {
    std::memcpy(&packed, from, 8);
  } else {
    std::memcpy(&packed, from, Bits);
  }
  return spread<Bits>(uint32_t(packed), uint32_t(packed >> (4 * Bits)));
}

#if defined(__AVX2__)
// Compilers take conversions of bytes apart into single values; these are what is meant.
inline Lanes widen(__m128i signed_bytes) {
  return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed_bytes));
}

inline void widen_nibbles(const uint8_t* from, Lanes (&values)[2]) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i both = _mm_unpacklo_epi64(packed, _mm_srli_epi16(packed, 4));
  const __m128i shifted = _mm_sub_epi8(_mm_and_si128(both, _mm_set1_epi8(15)), _mm_set1_epi8(8));
  values[0] = widen(shifted);
  values[1] = widen(_mm_unpackhi_epi64(shifted, shifted));
}

inline void widen_bytes(const uint8_t* from, Lanes (&values)[2]) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i shifted = _mm_xor_si128(packed, _mm_set1_epi8(-128));
  values[0] = widen(shifted);
  values[1] = widen(_mm_unpackhi_epi64(shifted, shifted));
}
#elif defined(__ARM_NEON)
inline Lanes widen(int8x8_t signed_bytes) {
  const int16x8_t halves = vmovl_s8(signed_bytes);
  return to_lanes(vmovl_s16(vget_low_s16(halves)), vmovl_high_s16(halves));
}

inline void widen_nibbles(const uint8_t* from, Lanes (&values)[2]) {
  const uint8x8_t packed = vld1_u8(from);
  const int8x8_t low = vreinterpret_s8_u8(vand_u8(packed, vdup_n_u8(15)));
  const int8x8_t high = vreinterpret_s8_u8(vshr_n_u8(packed, 4));
  values[0] = widen(vsub_s8(low, vdup_n_s8(8)));
  values[1] = widen(vsub_s8(high, vdup_n_s8(8)));
}

inline void widen_bytes(const uint8_t* from, Lanes (&values)[2]) {
  const int8x16_t shifted = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(128)));
  values[0] = widen(vget_low_s8(shifted));
  values[1] = widen(vget_high_s8(shifted));
}
#else
inline void widen_nibbles(const uint8_t* from, Lanes (&values)[2]) {
  Bytes packed;
  std::memcpy(&packed, from, 8);
  values[0] = __builtin_convertvector(SignedBytes(packed & 15) - 8, Lanes);
  values[1] = __builtin_convertvector(SignedBytes(packed >> 4) - 8, Lanes);
}

inline void widen_bytes(const uint8_t* from, Lanes (&values)[2]) {
  for (int half = 0; half < 2; ++half) {
    Bytes packed;
    std::memcpy(&packed, from + 8 * half, 8);
    values[half] = __builtin_convertvector(SignedBytes(packed ^ 128), Lanes);
  }
}
#endif

// Sixteen shifted values; `left` bytes may be read. Those of 4 bits come out with the even ones
// first, which is the order in which `pack` stores activations for them.
template <int Bits>
inline void unpack_16(const uint8_t* from, int64_t left, Lanes (&values)[2]) {
  if constexpr (Bits == 4) {
    widen_nibbles(from, values);
  } else if constexpr (Bits == 8) {
    widen_bytes(from, values);
  } else {
    values[0] = unpack<Bits>(from, left >= 8);
    values[1] = unpack<Bits>(from + Bits, left >= 8 + Bits);
  }
}

template <int Bits, int Count>
void multiply_rows(
    const Weight& weight,
    const Batch& batch,
    int64_t row,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride) {
  const int64_t groups = weight.groups();
  const float* x = static_cast<const float*>(batch.data) + row * batch.inputs;
  const float* sums = batch.sums + row * groups;
  const uint8_t* end = weight.q + weight.rows * weight.row_bytes();
  for (int64_t n = first; n < last; ++n) {
    const uint8_t* q = weight.q + n * weight.row_bytes();
    float biased[Count] = {};
    Lanes total[Count] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = load_float(weight.scales, weight.type, n * groups + g);
      const float bias = load_float(weight.biases, weight.type, n * groups + g) +
          float(1 << (Bits - 1)) * scale;
      Lanes dot[Count][2] = {}; // two of them, for each waits on its last addition
      for (int k = 0; k < weight.group; k += 16) {
        Lanes values[2];
        unpack_16<Bits>(q, end - q, values);
        q += 2 * Bits;
#pragma GCC unroll 4 // GCC keeps sums in registers only where it knows which ones
        for (int m = 0; m < Count; ++m) {
          const float* xs = x + m * batch.inputs + g * weight.group + k;
          dot[m][0] += values[0] * load_lanes(xs);
          dot[m][1] += values[1] * load_lanes(xs + 8);
        }
      }
      for (int m = 0; m < Count; ++m) {
        total[m] += (dot[m][0] + dot[m][1]) * scale;
        biased[m] += bias * sums[m * groups + g];
      }
    }
    for (int m = 0; m < Count; ++m) {
      out[(row + m) * stride + n - first] = sum_lanes(total[m]) + biased[m];
    }
  }
}

template <int Bits>
void multiply_bits(
    const Weight& weight,
    const Batch& batch,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride) {
  int64_t row = 0;
  for (; row + kBatchRows <= batch.count; row += kBatchRows) {
    multiply_rows<Bits, kBatchRows>(weight, batch, row, first, last, out, stride);
  }
  for (; row < batch.count; ++row) {
    multiply_rows<Bits, 1>(weight, batch, row, first, last, out, stride);
  }
}

void multiply(
    const Weight& weight,
    const Batch& batch,
    Float,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride,
    void*) {
  with_bits(weight.bits, [&](auto bits) {
    multiply_bits<bits.value>(weight, batch, first, last, out, stride);
  });
}

size_t row_size(const Weight& weight, Float, int64_t) {
  return size_t(weight.inputs) * sizeof(float);
}

void pack(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row) {
  float* to = static_cast<float*>(batch.data) + row * batch.inputs;
  float* sums = batch.sums + row * weight.groups();
  for (int64_t g = 0; g < weight.groups(); ++g) {
    float sum = 0;
    for (int64_t k = g * weight.group; k < (g + 1) * weight.group; ++k) {
      const float value = load_float(x, type, k);
      to[weight.bits == 4 ? (k & ~15) + (k & 1) * 8 + (k & 15) / 2 : k] = value;
      sum += value;
    }
    sums[g] = sum;
  }
}

size_t scratch_size(const Weight&, Float, int64_t) {
  return 0;
}

} // namespace
} // namespace zmlx
