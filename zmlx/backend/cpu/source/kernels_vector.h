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
typedef uint16_t Halves __attribute__((vector_size(16)));
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

// Eight shifted values of `bits` bits as float32, four in each word.
#if defined(__ARM_NEON)
inline Lanes to_lanes(int32x4_t low, int32x4_t high) {
  const float32x4_t parts[2] = {vcvtq_f32_s32(low), vcvtq_f32_s32(high)};
  Lanes value;
  std::memcpy(&value, parts, sizeof value);
  return value;
}

template <int bits>
inline Lanes spread(uint32_t low, uint32_t high) {
  const int32x4_t right = {0, -bits, -2 * bits, -3 * bits};
  const uint32x4_t mask = vdupq_n_u32((1u << bits) - 1);
  const int32x4_t half = vdupq_n_s32(1 << (bits - 1));
  const auto shifted = [&](uint32_t word) {
    const uint32x4_t fields = vandq_u32(vshlq_u32(vdupq_n_u32(word), right), mask);
    return vsubq_s32(vreinterpretq_s32_u32(fields), half);
  };
  return to_lanes(shifted(low), shifted(high));
}
#else
template <int bits>
inline Lanes spread(uint32_t low, uint32_t high) {
  constexpr uint32_t mask = (1u << bits) - 1;
  Words words = {low, low, low, low, high, high, high, high};
  const Words shift = {0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits};
  words = (words >> shift) & mask;
  return __builtin_convertvector(Signed(words) - (1 << (bits - 1)), Lanes);
}
#endif

// The same of packed bytes. `whole` allows reading eight bytes at `from`.
template <int bits>
inline Lanes unpack(const uint8_t* from, bool whole) {
  uint64_t packed = 0;
  if (whole) {
    std::memcpy(&packed, from, 8);
  } else {
    std::memcpy(&packed, from, bits);
  }
  return spread<bits>(uint32_t(packed), uint32_t(packed >> (4 * bits)));
}

#if defined(__AVX2__)
// Compilers take conversions of bytes apart into single values; these are what is meant.
inline Lanes widen(__m128i signed_bytes) {
  return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed_bytes));
}

// Sixteen nibbles, the even ones first: shifted integers, or small floats doubled.
template <Code code>
inline void widen_nibbles(const uint8_t* from, Lanes (&values)[2]) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i both = _mm_and_si128(
      _mm_unpacklo_epi64(packed, _mm_srli_epi16(packed, 4)), _mm_set1_epi8(15));
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kTwiceE2m1));
  const __m128i chosen = code == Code::e2m1 ? _mm_shuffle_epi8(table, both)
                                            : _mm_sub_epi8(both, _mm_set1_epi8(8));
  values[0] = widen(chosen);
  values[1] = widen(_mm_unpackhi_epi64(chosen, chosen));
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

template <Code code>
inline void widen_nibbles(const uint8_t* from, Lanes (&values)[2]) {
  const uint8x8_t packed = vld1_u8(from);
  const uint8x8_t nibbles[2] = {vand_u8(packed, vdup_n_u8(15)), vshr_n_u8(packed, 4)};
  const int8x16_t table = vld1q_s8(kTwiceE2m1);
  for (int half = 0; half < 2; ++half) {
    values[half] = widen(
        code == Code::e2m1 ? vqtbl1_s8(table, nibbles[half])
                           : vsub_s8(vreinterpret_s8_u8(nibbles[half]), vdup_n_s8(8)));
  }
}

inline void widen_bytes(const uint8_t* from, Lanes (&values)[2]) {
  const int8x16_t shifted = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(128)));
  values[0] = widen(vget_low_s8(shifted));
  values[1] = widen(vget_high_s8(shifted));
}
#else
template <Code code>
inline void widen_nibbles(const uint8_t* from, Lanes (&values)[2]) {
  Bytes packed;
  std::memcpy(&packed, from, 8);
  const Bytes nibbles[2] = {packed & 15, packed >> 4};
  for (int half = 0; half < 2; ++half) {
    if constexpr (code == Code::e2m1) {
      for (int i = 0; i < 8; ++i) {
        values[half][i] = float(kTwiceE2m1[nibbles[half][i]]);
      }
    } else {
      values[half] = __builtin_convertvector(SignedBytes(nibbles[half]) - 8, Lanes);
    }
  }
}

inline void widen_bytes(const uint8_t* from, Lanes (&values)[2]) {
  for (int half = 0; half < 2; ++half) {
    Bytes packed;
    std::memcpy(&packed, from + 8 * half, 8);
    values[half] = __builtin_convertvector(SignedBytes(packed ^ 128), Lanes);
  }
}
#endif

// Eight floats of a type, or small ones 256 times too small (floats.h).
#if defined(__ARM_NEON)
inline Lanes both(float32x4_t low, float32x4_t high) {
  const float32x4_t parts[2] = {low, high};
  Lanes value;
  std::memcpy(&value, parts, sizeof value);
  return value;
}

template <Code code>
inline Lanes load_eight(const void* data, int64_t index) {
  if constexpr (code == Code::f32) {
    return load_lanes(static_cast<const float*>(data) + index);
  }
  uint16x8_t halves;
  if constexpr (code == Code::e4m3) {
    const int8x8_t bytes = vld1_s8(static_cast<const int8_t*>(data) + index);
    const int16x8_t wide = vshlq_n_s16(vmovl_s8(bytes), 7); // the sign comes twice
    halves = vandq_u16(vreinterpretq_u16_s16(wide), vdupq_n_u16(0xbf80));
  } else {
    halves = vld1q_u16(static_cast<const uint16_t*>(data) + index);
  }
  if constexpr (code == Code::bf16) {
    return both(
        vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
        vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16)));
  }
  const float16x8_t floats = vreinterpretq_f16_u16(halves);
  return both(vcvt_f32_f16(vget_low_f16(floats)), vcvt_high_f32_f16(floats));
}
#else
template <Code code>
inline Lanes load_eight(const void* data, int64_t index) {
  if constexpr (code == Code::f32) {
    return load_lanes(static_cast<const float*>(data) + index);
  } else if constexpr (code == Code::bf16) {
    Halves halves;
    std::memcpy(&halves, static_cast<const uint16_t*>(data) + index, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Words) << 16);
  }
#if defined(__F16C__)
  __m128i halves;
  if constexpr (code == Code::e4m3) {
    const auto* from = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(data) + index);
    const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(from)), 7);
    halves = _mm_and_si128(wide, _mm_set1_epi16(int16_t(0xbf80))); // the sign came twice
  } else {
    const auto* from = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + index);
    halves = _mm_loadu_si128(from);
  }
  return (Lanes)_mm256_cvtph_ps(halves);
#else
  Lanes values;
  for (int i = 0; i < 8; ++i) {
    values[i] = code == Code::e4m3
        ? from_e4m3(static_cast<const uint8_t*>(data)[index + i]) * 0x1p-8f
        : load_float(data, float_of(code), index + i);
  }
  return values;
#endif
}
#endif

// Sixteen values, of nibbles the even ones first, which is the order in which `pack` stores
// activations for them. Integers are shifted; small floats come in units of `unit`. `left` bytes
// may be read.
template <Code code>
inline void unpack_16(const uint8_t* from, int64_t left, Lanes (&values)[2]) {
  constexpr int bits = bits_of(code);
  if constexpr (of_nibbles(code)) {
    widen_nibbles<code>(from, values);
  } else if constexpr (code == Code::u8) {
    widen_bytes(from, values);
  } else if constexpr (code == Code::e4m3) {
    values[0] = load_eight<code>(from, 0);
    values[1] = load_eight<code>(from, 8);
  } else {
    values[0] = unpack<bits>(from, left >= 8);
    values[1] = unpack<bits>(from + bits, left >= 8 + bits);
  }
}

template <Code code>
constexpr float unit = code == Code::e2m1 ? 0.5f : code == Code::e4m3 ? 256.0f : 1.0f;

// Rows of activations are float32, with zeros up to sixteen.
int64_t padded(const Weight& weight) {
  return rounded_up(weight.inputs, 16);
}

template <Code code, int Count>
void multiply_rows(
    const Weight& weight, const float* x, const float* sums, int64_t first, int64_t last,
    float* out, int64_t stride) {
  const int64_t groups = weight.groups();
  const uint8_t* end = weight.q + weight.rows * weight.row_bytes();
  for (int64_t n = first; n < last; ++n) {
    const uint8_t* q = weight.q + n * weight.row_bytes();
    float biased[Count] = {};
    Lanes total[Count] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = load_scale(weight, n * groups + g) * unit<code>;
      Lanes dot[Count][2] = {}; // two of them, for each waits on its last addition
      for (int k = 0; k < weight.group; k += 16) {
        Lanes values[2];
        unpack_16<code>(q, end - q, values);
        q += 2 * bits_of(code);
#pragma GCC unroll 4 // GCC keeps sums in registers only where it knows which ones
        for (int m = 0; m < Count; ++m) {
          const float* xs = x + m * padded(weight) + g * weight.group + k;
          dot[m][0] += values[0] * load_lanes(xs);
          dot[m][1] += values[1] * load_lanes(xs + 8);
        }
      }
      for (int m = 0; m < Count; ++m) {
        total[m] += (dot[m][0] + dot[m][1]) * scale;
      }
      if constexpr (affine(code)) {
        const float half = float(1 << (bits_of(code) - 1));
        const float bias = load_bias(weight, n * groups + g) + half * scale;
        for (int m = 0; m < Count; ++m) {
          biased[m] += bias * sums[m * groups + g];
        }
      }
    }
    for (int m = 0; m < Count; ++m) {
      out[m * stride + n - first] = sum_lanes(total[m]) + biased[m];
    }
  }
}

// The same without groups.
template <Code code, int Count>
void multiply_dense_rows(
    const Weight& weight, const float* x, int64_t first, int64_t last, float* out,
    int64_t stride) {
  constexpr int kSums = Count == 1 ? 4 : 2; // as many, for each waits on its last addition
  const int64_t whole = weight.inputs / (8 * kSums) * 8 * kSums;
  for (int64_t n = first; n < last; ++n) {
    const uint8_t* row = weight.q + n * weight.row_bytes();
    Lanes sum[Count][kSums] = {};
    for (int64_t k = 0; k < whole; k += 8 * kSums) {
      for (int i = 0; i < kSums; ++i) {
        const Lanes values = load_eight<code>(row, k + 8 * i);
        for (int m = 0; m < Count; ++m) {
          sum[m][i] += values * load_lanes(x + m * padded(weight) + k + 8 * i);
        }
      }
    }
    for (int m = 0; m < Count; ++m) {
      float rest = 0;
      for (int64_t k = whole; k < weight.inputs; ++k) {
        rest += load_float(row, float_of(code), k) * x[m * padded(weight) + k];
      }
      for (int i = 1; i < kSums; ++i) {
        sum[m][0] += sum[m][i];
      }
      out[m * stride + n - first] = sum_lanes(sum[m][0]) + rest;
    }
  }
}

template <Code code, int Count>
void rows(
    const Weight& weight, const Batch& batch, int64_t row, int64_t first, int64_t last, float* out,
    int64_t stride) {
  const float* x = static_cast<const float*>(batch.data) + row * padded(weight);
  float* to = out + row * stride;
  if constexpr (dense(code)) {
    multiply_dense_rows<code, Count>(weight, x, first, last, to, stride);
  } else {
    const float* sums = batch.sums + row * weight.groups();
    multiply_rows<code, Count>(weight, x, sums, first, last, to, stride);
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
  with_code(weight.code, [&](auto code) {
    int64_t row = 0;
    for (; row + kBatchRows <= batch.count; row += kBatchRows) {
      rows<code.value, kBatchRows>(weight, batch, row, first, last, out, stride);
    }
    for (; row < batch.count; ++row) {
      rows<code.value, 1>(weight, batch, row, first, last, out, stride);
    }
  });
}

size_t row_size(const Weight& weight, Float, int64_t) {
  return size_t(padded(weight)) * sizeof(float);
}

void pack(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row) {
  float* to = static_cast<float*>(batch.data) + row * padded(weight);
  std::fill(to + weight.inputs, to + padded(weight), 0.0f);
  float* sums = batch.sums + row * weight.groups();
  for (int64_t g = 0; g < weight.groups(); ++g) {
    float sum = 0;
    for (int64_t k = g * weight.group; k < (g + 1) * weight.group; ++k) {
      const float value = load_float(x, type, k);
      to[of_nibbles(weight.code) ? (k & ~15) + (k & 1) * 8 + (k & 15) / 2 : k] = value;
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
