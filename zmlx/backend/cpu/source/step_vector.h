// The step kernels in the compiler's vector types: sixteen float32 lanes, whatever the instruction
// set. Included by one file per instruction set, each compiled with its own flags.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "floats.h"
#include "step.h"

namespace zmlx {
namespace {

constexpr int64_t kLanes = 16;
typedef float Wide __attribute__((vector_size(64)));
typedef int32_t WideInt __attribute__((vector_size(64)));
typedef uint32_t WideWord __attribute__((vector_size(64)));
typedef uint16_t WideHalf __attribute__((vector_size(32)));

template <class To, class From>
inline To read_as(const From* from) {
  To value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <Float type>
inline Wide load(const void* data, int64_t index) {
  if constexpr (type == Float::f32) {
    return read_as<Wide>(static_cast<const float*>(data) + index);
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + index;
  if constexpr (type == Float::bf16) {
#if defined(__AVX512F__) // one instruction, of which compilers make three
    const WideWord words = (WideWord)_mm512_cvtepu16_epi32(read_as<__m256i>(from));
#else
    const WideWord words = __builtin_convertvector(read_as<WideHalf>(from), WideWord);
#endif
    return (Wide)(words << 16);
  }
  Wide value;
#if defined(__AVX512F__)
  value = (Wide)_mm512_cvtph_ps(read_as<__m256i>(from));
#elif defined(__F16C__)
  const __m256 halves[2] = {
      _mm256_cvtph_ps(read_as<__m128i>(from)), _mm256_cvtph_ps(read_as<__m128i>(from + 8))};
  std::memcpy(&value, halves, sizeof value);
#else
  for (int i = 0; i < kLanes; ++i) {
    value[i] = from_f16(from[i]);
  }
#endif
  return value;
}

template <Float type>
inline void store(void* data, int64_t index, Wide value) {
  if constexpr (type == Float::f32) {
    std::memcpy(static_cast<float*>(data) + index, &value, sizeof value);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data) + index;
  WideHalf halves;
  if constexpr (type == Float::bf16) {
    const WideWord bits = (WideWord)value;
    const WideWord rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const WideWord quiet = (bits >> 16) | 0x40u;
    const WideWord nan = (WideWord)(value != value);
    halves = __builtin_convertvector((nan & quiet) | (~nan & rounded), WideHalf);
  } else {
#if defined(__AVX512F__)
    const __m256i packed = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(&halves, &packed, sizeof halves);
#else
    for (int i = 0; i < kLanes; ++i) {
      halves[i] = to_f16(value[i]);
    }
#endif
  }
  std::memcpy(to, &halves, sizeof halves);
}

// As load and store, for `count` lanes; the others read as `fill` and are not written.
template <Float type>
inline Wide load_some(const void* data, int64_t index, int64_t count, float fill = 0.0f) {
  if (count >= kLanes) {
    return load<type>(data, index);
  }
  Wide value = Wide{} + fill;
  for (int64_t i = 0; i < count; ++i) {
    value[i] = load_float(data, type, index + i);
  }
  return value;
}

template <Float type>
inline void store_some(void* data, int64_t index, Wide value, int64_t count) {
  if (count >= kLanes) {
    return store<type>(data, index, value);
  }
  for (int64_t i = 0; i < count; ++i) {
    store_float(data, type, index + i, value[i]);
  }
}

typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

// The sums of the lanes i, i + 4, i + 8 and i + 12.
inline Quarter quarter_sums(Wide v) {
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  return quarters[0] + quarters[1];
}

inline float sum_of(Wide v) {
  const Quarter q = quarter_sums(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sums of four vectors, each as sum_of has it.
inline Quarter sums_of(const Wide (&v)[4]) {
  const Quarter a = quarter_sums(v[0]), b = quarter_sums(v[1]);
  const Quarter c = quarter_sums(v[2]), d = quarter_sums(v[3]);
  typedef int32_t Index __attribute__((vector_size(16)));
  const Quarter ab = __builtin_shuffle(a, b, Index{0, 1, 4, 5}) +
      __builtin_shuffle(a, b, Index{2, 3, 6, 7}); // a0+a2 a1+a3 b0+b2 b1+b3
  const Quarter cd = __builtin_shuffle(c, d, Index{0, 1, 4, 5}) +
      __builtin_shuffle(c, d, Index{2, 3, 6, 7});
  return __builtin_shuffle(ab, cd, Index{0, 2, 4, 6}) +
      __builtin_shuffle(ab, cd, Index{1, 3, 5, 7});
}

inline Wide larger(Wide a, Wide b) {
  return a > b ? a : b;
}

// e^x to within a unit or two of the last place: 2^n * e^r with |r| <= ln(2) / 2, and the Taylor
// polynomial of degree 7 for e^r. Below -87.3 the result is zero, above 88.7 infinite.
inline Wide exponential(Wide x) {
  const Wide low = Wide{} - 87.33654f, high = Wide{} + 88.72283f;
  const Wide bounded = x < low ? low : (x > high ? high : x);
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
  const Wide shift = Wide{} + 12582912.0f;
  const Wide n = (bounded * 1.44269504f + shift) - shift;
  const Wide r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Wide p = Wide{} + 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The factor 2^n in two steps: 2^128 itself is no float.
  const WideInt whole = __builtin_convertvector(n, WideInt);
  const WideInt half = whole >> 1;
  const Wide first = (Wide)((half + 127) << 23);
  const Wide second = (Wide)((whole - half + 127) << 23);
  Wide y = p * first * second;
  y = x < low ? Wide{} : y;
  y = x > high ? Wide{} + std::numeric_limits<float>::infinity() : y;
  return x != x ? x : y;
}

// ---------------------------------------------------------------------------------------------

// Call `run` with the type as a template argument.
template <class Run>
auto with_type(Float type, Run run) {
  switch (type) {
    case Float::f32:
      return run(std::integral_constant<Float, Float::f32>());
    case Float::f16:
      return run(std::integral_constant<Float, Float::f16>());
    default:
      return run(std::integral_constant<Float, Float::bf16>());
  }
}

// `count` lanes of a type that is known when it runs.
inline Wide load_any(const void* data, Float type, int64_t index, int64_t count) {
  return with_type(type, [&](auto t) { return load_some<t.value>(data, index, count); });
}

void rms_norm(
    const void* x, Float type, const void* weight, Float weight_type, float eps, int64_t width,
    void* out, Float out_type) {
  Wide squares[4] = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Wide v = load_any(x, type, i, width - i);
    squares[(i / kLanes) % 4] += v * v;
  }
  const float sum = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const float factor = 1.0f / std::sqrt(sum / float(width) + eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    Wide v = load_any(x, type, i, width - i) * factor;
    if (weight != nullptr) {
      v *= load_any(weight, weight_type, i, width - i);
    }
    with_type(out_type, [&](auto t) { store_some<t.value>(out, i, v, width - i); });
  }
}

template <Float type>
void rotate_halves(
    const void* x, const float* cosines, const float* sines, int64_t half, void* out) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i;
    const Wide c = load_some<Float::f32>(cosines, i, count);
    const Wide s = load_some<Float::f32>(sines, i, count);
    const Wide a = load_some<type>(x, i, count), b = load_some<type>(x, i + half, count);
    store_some<type>(out, i, a * c - b * s, count);
    store_some<type>(out, i + half, a * s + b * c, count);
  }
}

void rotate(
    const void* x, Float type, const float* cosines, const float* sines, int64_t half,
    bool traditional, int64_t width, void* out) {
  if (!traditional) {
    with_type(type, [&](auto t) { rotate_halves<t.value>(x, cosines, sines, half, out); });
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float a = load_float(x, type, 2 * i), b = load_float(x, type, 2 * i + 1);
      store_float(out, type, 2 * i, a * cosines[i] - b * sines[i]);
      store_float(out, type, 2 * i + 1, a * sines[i] + b * cosines[i]);
    }
  }
  const size_t size = size_of(type), done = size_t(2 * half) * size;
  std::memcpy(
      static_cast<char*>(out) + done, static_cast<const char*>(x) + done, width * size - done);
}

// ---------------------------------------------------------------------------------------------

// As load_some, where it is known whether all lanes are there.
template <Float type, bool whole>
inline Wide load_lanes(const void* data, int64_t index, int64_t count) {
  if constexpr (whole) {
    return load<type>(data, index);
  }
  return load_some<type>(data, index, count);
}

constexpr int kKeys = 4; // scored at a time, for their sums cost as much as one

// sums[r][j] += the products of the lanes from i on of queries[r] and keys[j]
template <Float type, int Rows, bool whole>
inline void add_scores(
    const AttentionRows& a, const char* const (&keys)[kKeys], int64_t i,
    Wide (&sums)[Rows][kKeys]) {
  const int64_t count = a.key_width - i;
  Wide k[kKeys];
  for (int j = 0; j < kKeys; ++j) {
    k[j] = load_lanes<type, whole>(keys[j], i, count);
  }
  for (int r = 0; r < Rows; ++r) {
    const Wide q = load_lanes<type, whole>(a.queries[r], i, count);
    for (int j = 0; j < kKeys; ++j) {
      sums[r][j] += k[j] * q;
    }
  }
}

// scores[r * keys + s] = scale * queries[r] . key[s]
template <Float type, int Rows>
void score(const AttentionRows& a, float* scores) {
  const int64_t whole = a.key_width / kLanes * kLanes;
  for (int64_t s = 0; s < a.keys; s += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, a.keys - s);
    const char* keys[kKeys];
    for (int64_t j = 0; j < kKeys; ++j) {
      const int64_t at = s + std::min(j, count - 1);
      keys[j] = static_cast<const char*>(a.key) + at * a.key_stride * size_of(type);
    }
    Wide sums[Rows][kKeys] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      add_scores<type, Rows, true>(a, keys, i, sums);
    }
    if (whole < a.key_width) {
      add_scores<type, Rows, false>(a, keys, whole, sums);
    }
    for (int r = 0; r < Rows; ++r) {
      const Quarter scaled = sums_of(sums[r]) * a.scale;
      std::memcpy(scores + r * a.keys + s, &scaled, count * sizeof(float));
    }
  }
}

// As stock: what is not allowed has the lowest finite score, so that a row which may see nothing
// is the mean of all values.
void apply_mask(const AttentionRows& a, int64_t r, float* scores) {
  constexpr float lowest = std::numeric_limits<float>::lowest();
  if (a.mask == Mask::causal) {
    std::fill(
        scores + std::clamp<int64_t>(a.visible[r], 0, a.keys), scores + a.keys, lowest);
  } else if (a.mask == Mask::allowed) {
    const bool* allowed = static_cast<const bool*>(a.masks[r]);
    for (int64_t s = 0; s < a.keys; ++s) {
      scores[s] = allowed[s * a.mask_stride] ? scores[s] : lowest;
    }
  } else if (a.mask == Mask::added) {
    for (int64_t s = 0; s < a.keys; ++s) {
      scores[s] += load_float(a.masks[r], a.type, s * a.mask_stride);
    }
  }
}

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// NaN if there is one.
template <Float type>
float largest_of(const void* values, int64_t count) {
  Wide most = Wide{} + kLowest;
  WideInt nan = {};
  for (int64_t s = 0; s < count; s += kLanes) {
    const Wide v = load_some<type>(values, s, count - s, kLowest);
    most = larger(most, v);
    nan |= v != v;
  }
  float top = kLowest;
  for (int i = 0; i < kLanes; ++i) {
    top = nan[i] != 0 ? std::numeric_limits<float>::quiet_NaN() : std::max(top, most[i]);
    if (top != top) {
      break;
    }
  }
  return top;
}

void exponentials(const void* x, Float type, int64_t count, float* largest, float* sum) {
  with_type(type, [&](auto t) {
    *largest = largest_of<t.value>(x, count);
    // Infinities would give NaN where the sum is as infinite as they are.
    const float shift = std::isinf(*largest) ? 0.0f : *largest;
    Wide sums[2] = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      sums[i / kLanes % 2] += exponential(load_some<t.value>(x, i, count - i, kLowest) - shift);
    }
    *sum = sum_of(sums[0] + sums[1]);
  });
}

// Where the first element of a value is, or the first NaN.
template <Float type, bool nan>
int64_t find(const void* x, int64_t count, float value) {
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    const Wide v = load<type>(x, at);
    const WideInt found = nan ? v != v : v == value;
    if (sum_of(__builtin_convertvector(found, Wide)) != 0) {
      break;
    }
  }
  for (; at < count; ++at) {
    const float v = load_float(x, type, at);
    if (nan ? v != v : v == value) {
      break;
    }
  }
  return at;
}

template <Float type, bool smallest>
int64_t extreme_of(const void* x, int64_t count) {
  const float first = load_float(x, type, 0);
  Wide best = Wide{} + first;
  WideInt nan = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Wide v = load_some<type>(x, i, count - i, first);
    best = (smallest ? v < best : v > best) ? v : best;
    nan |= v != v;
  }
  if (sum_of(__builtin_convertvector(nan, Wide)) != 0) {
    return find<type, true>(x, count, 0);
  }
  float value = first;
  for (int i = 0; i < kLanes; ++i) {
    value = (smallest ? best[i] < value : best[i] > value) ? best[i] : value;
  }
  return find<type, false>(x, count, value);
}

int64_t extreme(const void* x, Float type, int64_t count, bool smallest) {
  return with_type(type, [&](auto t) {
    return smallest ? extreme_of<t.value, true>(x, count) : extreme_of<t.value, false>(x, count);
  });
}

void softmax(float* scores, int64_t count) {
  constexpr float lowest = kLowest;
  const float top = largest_of<Float::f32>(scores, count);
  Wide sums = {};
  for (int64_t s = 0; s < count; s += kLanes) {
    const Wide v = exponential(load_some<Float::f32>(scores, s, count - s, lowest) - top);
    store_some<Float::f32>(scores, s, v, count - s);
    sums += load_some<Float::f32>(scores, s, count - s);
  }
  const float factor = 1.0f / sum_of(sums);
  for (int64_t s = 0; s < count; s += kLanes) {
    store_some<Float::f32>(
        scores, s, load_some<Float::f32>(scores, s, count - s) * factor, count - s);
  }
}

// out[r] = sum_s weights[r * keys + s] * value[s], for some vectors of columns. Their number is a
// template argument so that the sums stay in registers.
template <Float type, int Rows, int Columns, bool whole>
void combine_columns(const AttentionRows& a, const float* weights, int64_t from) {
  const int64_t count = a.value_width - from; // from the first column on
  Wide sums[Rows][Columns] = {};
  for (int64_t s = 0; s < a.keys; ++s) {
    const char* value = static_cast<const char*>(a.value) + s * a.value_stride * size_of(type);
    for (int c = 0; c < Columns; ++c) {
      const int64_t at = c * kLanes;
      const Wide v = load_lanes<type, whole>(value, from + at, count - at);
      for (int r = 0; r < Rows; ++r) {
        sums[r][c] += v * weights[r * a.keys + s];
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < Columns; ++c) {
      store_some<type>(a.out[r], from + c * kLanes, sums[r][c], count - c * kLanes);
    }
  }
}

template <Float type, int Rows>
void combine(const AttentionRows& a, const float* weights) {
  constexpr int kColumns = 4;
  int64_t from = 0;
  for (; from + kColumns * kLanes <= a.value_width; from += kColumns * kLanes) {
    combine_columns<type, Rows, kColumns, true>(a, weights, from);
  }
  for (; from + kLanes <= a.value_width; from += kLanes) {
    combine_columns<type, Rows, 1, true>(a, weights, from);
  }
  if (from < a.value_width) {
    combine_columns<type, Rows, 1, false>(a, weights, from);
  }
}

template <Float type, int Rows>
void attend_rows(const AttentionRows& a, float* scores) {
  score<type, Rows>(a, scores);
  for (int r = 0; r < Rows; ++r) {
    apply_mask(a, r, scores + r * a.keys);
    softmax(scores + r * a.keys, a.keys);
  }
  combine<type, Rows>(a, scores);
}

void attend(const AttentionRows& a, float* scratch) {
  with_type(a.type, [&](auto t) {
    switch (a.rows) {
      case 1:
        return attend_rows<t.value, 1>(a, scratch);
      case 2:
        return attend_rows<t.value, 2>(a, scratch);
      case 3:
        return attend_rows<t.value, 3>(a, scratch);
      default:
        return attend_rows<t.value, 4>(a, scratch);
    }
  });
}

// ---------------------------------------------------------------------------------------------

template <Binary kind>
inline auto apply(auto a, auto b) {
  if constexpr (kind == Binary::add) {
    return a + b;
  } else if constexpr (kind == Binary::subtract) {
    return a - b;
  } else if constexpr (kind == Binary::multiply) {
    return a * b;
  } else {
    return a / b;
  }
}

// Elements that lie one behind the other, or one that is repeated.
template <Float type>
inline Wide load_strided(const void* data, int64_t index, int64_t stride, int64_t count) {
  return stride == 0 ? Wide{} + load_float(data, type, 0)
                     : load_some<type>(data, index, count);
}

template <Binary kind, Float type>
void binary_of(
    const void* a, int64_t a_stride, const void* b, int64_t b_stride, int64_t count, void* out) {
  if (a_stride > 1 || b_stride > 1 || a_stride < 0 || b_stride < 0) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = load_float(a, type, i * a_stride), y = load_float(b, type, i * b_stride);
      store_float(out, type, i, apply<kind>(x, y));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const Wide x = load_strided<type>(a, i, a_stride, count - i);
    const Wide y = load_strided<type>(b, i, b_stride, count - i);
    store_some<type>(out, i, apply<kind>(x, y), count - i);
  }
}

void binary(
    Binary kind, const void* a, int64_t a_stride, const void* b, int64_t b_stride, Float type,
    int64_t count, void* out) {
  with_type(type, [&](auto t) {
    switch (kind) {
      case Binary::add:
        return binary_of<Binary::add, t.value>(a, a_stride, b, b_stride, count, out);
      case Binary::subtract:
        return binary_of<Binary::subtract, t.value>(a, a_stride, b, b_stride, count, out);
      case Binary::multiply:
        return binary_of<Binary::multiply, t.value>(a, a_stride, b, b_stride, count, out);
      default:
        return binary_of<Binary::divide, t.value>(a, a_stride, b, b_stride, count, out);
    }
  });
}

void convert(const void* x, Float type, int64_t count, void* out, Float out_type) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Wide v = load_any(x, type, i, count - i);
    with_type(out_type, [&](auto t) { store_some<t.value>(out, i, v, count - i); });
  }
}

// ---------------------------------------------------------------------------------------------

void gate(Activation activation, float* gates, const float* ups, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Wide x = load_some<Float::f32>(gates, i, count - i);
    const Wide up = load_some<Float::f32>(ups, i, count - i);
    Wide y;
    if (activation == Activation::silu) {
      y = x / (1.0f + exponential(-x));
    } else if (activation == Activation::gelu_tanh) {
      // 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2 u))
      const Wide u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
      y = x / (1.0f + exponential(-2.0f * u));
    } else {
      for (int lane = 0; lane < kLanes; ++lane) {
        y[lane] = x[lane] * (1.0f + std::erf(x[lane] * 0.70710678118654752f)) * 0.5f;
      }
    }
    store_some<Float::f32>(gates, i, y * up, count - i);
  }
}

} // namespace
} // namespace zmlx
