// The kernels in the compiler's vector types: eight float32 lanes, whatever the instruction set.
// Included by one file per instruction set, each compiled with its own flags.
#pragma once

#include <algorithm>
#include <cstring>

#include "floats.h"
#include "kernels.h"

namespace zmlx {
namespace {

typedef float Lanes __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));

constexpr int kBatchRows = 4; // rows of activations multiplied in one pass over the weights

inline Lanes load_lanes(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline float sum_lanes(Lanes v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Eight shifted values of `Bits` bits as float32. `whole` allows reading eight bytes at `from`.
template <int Bits>
inline Lanes unpack(const uint8_t* from, bool whole) {
  uint64_t packed = 0;
  if (whole) {
    std::memcpy(&packed, from, 8);
  } else {
    std::memcpy(&packed, from, Bits);
  }
  const uint32_t low = uint32_t(packed);
  const uint32_t high = uint32_t(packed >> (4 * Bits));
  constexpr uint32_t mask = (1u << Bits) - 1;
  Words words = {low, low, low, low, high, high, high, high};
  const Words shift = {0, Bits, 2 * Bits, 3 * Bits, 0, Bits, 2 * Bits, 3 * Bits};
  words = (words >> shift) & mask;
  typedef int32_t Signed __attribute__((vector_size(32)));
  return __builtin_convertvector(Signed(words) - (1 << (Bits - 1)), Lanes);
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
  for (int64_t n = first; n < last; ++n) {
    const uint8_t* q = weight.q + n * weight.row_bytes();
    float biased[Count] = {};
    Lanes total[Count] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = load_float(weight.scales, weight.type, n * groups + g);
      const float bias = load_float(weight.biases, weight.type, n * groups + g) +
          float(1 << (Bits - 1)) * scale;
      const bool whole = g + 1 < groups || n + 1 < weight.rows;
      Lanes dot[Count] = {};
      for (int k = 0; k < weight.group; k += 8) {
        const Lanes values = unpack<Bits>(q, whole || (weight.group - k) / 8 * Bits >= 8);
        q += Bits;
        for (int m = 0; m < Count; ++m) {
          dot[m] += values * load_lanes(x + m * batch.inputs + g * weight.group + k);
        }
      }
      for (int m = 0; m < Count; ++m) {
        total[m] += dot[m] * scale;
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
  switch (weight.bits) {
    case 2:
      return multiply_bits<2>(weight, batch, first, last, out, stride);
    case 3:
      return multiply_bits<3>(weight, batch, first, last, out, stride);
    case 4:
      return multiply_bits<4>(weight, batch, first, last, out, stride);
    case 5:
      return multiply_bits<5>(weight, batch, first, last, out, stride);
    case 6:
      return multiply_bits<6>(weight, batch, first, last, out, stride);
    default:
      return multiply_bits<8>(weight, batch, first, last, out, stride);
  }
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
      to[k] = load_float(x, type, k);
      sum += to[k];
    }
    sums[g] = sum;
  }
}

size_t scratch_size(const Weight&, Float, int64_t) {
  return 0;
}

} // namespace
} // namespace zmlx
