// Kernels for AVX-512: sixteen float32 lanes. Skylake-X and later; where there is VNNI too, these
// are for results in float32 and for codes that are no integers.
//
// 32 values are unpacked in one turn, most of them by a table lookup (`vpermps`), which takes the
// bits it needs from a lane and leaves the others.
#include <immintrin.h>

#include <algorithm>

#include "floats.h"
#include "kernels.h"
#include "load_avx512.h"

namespace zmlx {
namespace {

constexpr int64_t kAhead = 6144; // bytes between a load of weights and its prefetch
constexpr int64_t kTurn = 32; // values

// Tables of the values of a code, and how its bits get into lanes.
template <Code code>
class Unpack {
 public:
  static constexpr int bits = bits_of(code);

  Unpack() {
    alignas(64) float values[32];
    for (int i = 0; i < 32; ++i) {
      values[i] = code == Code::e2m1 ? 0.5f * float(kTwiceE2m1[i & 15])
                                     : float((i & ((1 << bits) - 1)) - (1 << (bits - 1)));
    }
    low_ = _mm512_load_ps(values);
    high_ = _mm512_load_ps(values + 16);
    alignas(64) uint16_t places[32];
    alignas(64) uint32_t shifts[16];
    for (int i = 0; i < 16; ++i) {
      const int bit = i * bits;
      places[2 * i] = uint16_t(bit / 16 & 7);
      places[2 * i + 1] = uint16_t(bit / 16 + 1 & 7);
      shifts[i] = uint32_t(bit % 16);
    }
    places_ = _mm512_load_si512(places);
    shifts_ = _mm512_load_si512(shifts);
  }

  // The values of a turn, of nibbles the even ones first; what is behind `count` is of no account.
  void operator()(const uint8_t* from, int64_t count, __m512 (&values)[2]) const {
    if constexpr (of_nibbles(code)) {
      const __m512i packed =
          _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(count / 2), from));
      values[0] = _mm512_permutexvar_ps(packed, low_);
      values[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), low_);
    } else {
      values[0] = sixteen(from);
      values[1] = sixteen(from + 2 * bits);
    }
  }

 private:
  __m512 sixteen(const uint8_t* from) const {
    if constexpr (code == Code::u8) {
      const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      const __m128i shifted = _mm_xor_si128(packed, _mm_set1_epi8(-128));
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(shifted));
    } else if constexpr (code == Code::e4m3) {
      return load_e4m3(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    const __m128i packed = _mm_maskz_loadu_epi8(__mmask16((1u << (2 * bits)) - 1), from);
    const __m512i words = _mm512_permutexvar_epi16(places_, _mm512_castsi128_si512(packed));
    const __m512i fields = _mm512_srlv_epi32(words, shifts_);
    if constexpr (bits <= 4) {
      return _mm512_permutexvar_ps(fields, low_);
    } else if constexpr (bits == 5) {
      return _mm512_permutex2var_ps(low_, fields, high_);
    }
    // Behind the exponent of 2^23 an integer is a mantissa.
    const __m512i number = _mm512_or_si512(
        _mm512_and_si512(fields, _mm512_set1_epi32((1 << bits) - 1)),
        _mm512_set1_epi32(0x4b000000));
    const float zero = 0x1p23f + float(1 << (bits - 1));
    return _mm512_sub_ps(_mm512_castsi512_ps(number), _mm512_set1_ps(zero));
  }

  __m512 low_, high_;
  __m512i places_, shifts_;
};

// Rows of activations: float32, with zeros up to a whole turn.
int64_t padded(const Weight& weight) {
  return rounded_up(weight.inputs, kTurn);
}

template <Code code, int Count>
class Sweep {
 public:
  Sweep(const Weight& weight, const float* x, const float* sums)
      : weight_(weight), x_(x), sums_(sums), stride_(padded(weight)), groups_(weight.groups()) {}

  void run(int64_t n, float* out, int64_t stride) const {
    __m512 total[Count];
    std::fill_n(total, Count, _mm512_setzero_ps());
    const uint8_t* q = weight_.q + n * weight_.row_bytes();
    const int64_t step = std::max<int64_t>(1, kTurn / weight_.group);
    for (int64_t first = 0; first < groups_; first += 16) {
      alignas(64) float scales[16];
      load(n * groups_ + first, first, scales, total);
      const int64_t last = std::min(groups_, first + 16);
      for (int64_t g = first; g < last; g += step) {
        const __m512 scale = step == 1
            ? _mm512_set1_ps(scales[g - first])
            : _mm512_mask_blend_ps(
                  0xff00, _mm512_set1_ps(scales[g - first]), _mm512_set1_ps(scales[g - first + 1]));
        add_group(q, g * weight_.group, scale, total);
      }
    }
    for (int m = 0; m < Count; ++m) {
      out[m * stride] = _mm512_reduce_add_ps(total[m]);
    }
  }

 private:
  // Scales of 16 groups; the biases' share is added at once.
  void load(int64_t at, int64_t g, float (&scales)[16], __m512 (&total)[Count]) const {
    const __mmask16 live = first_lanes(groups_ - g);
    __m512 scale = load_scales(weight_, at, live);
    if constexpr (affine(code)) {
      const float half = float(1 << (bits_of(code) - 1));
      const __m512 bias =
          _mm512_fmadd_ps(scale, _mm512_set1_ps(half), load_biases(weight_, at, live));
      for (int m = 0; m < Count; ++m) {
        const __m512 sum = _mm512_maskz_loadu_ps(live, sums_ + m * groups_ + g);
        total[m] = _mm512_fmadd_ps(bias, sum, total[m]);
      }
    } else if constexpr (code == Code::e4m3) {
      scale = _mm512_mul_ps(scale, _mm512_set1_ps(256.0f));
    }
    _mm512_store_ps(scales, scale);
  }

  void add_group(const uint8_t*& q, int64_t k, __m512 scale, __m512 (&total)[Count]) const {
    __m512 dot[Count][2];
    for (auto& of_row : dot) {
      of_row[0] = of_row[1] = _mm512_setzero_ps();
    }
    const int64_t end = k + std::max(weight_.group, kTurn);
    for (; k < end; k += kTurn, q += kTurn * bits_of(code) / 8) {
      // Into the second cache: the first one keeps the activations.
      _mm_prefetch(reinterpret_cast<const char*>(q + kAhead), _MM_HINT_T1);
      __m512 values[2];
      unpack_(q, weight_.inputs - k, values);
      for (int m = 0; m < Count; ++m) {
        const float* x = x_ + m * stride_ + k;
        dot[m][0] = _mm512_fmadd_ps(values[0], _mm512_loadu_ps(x), dot[m][0]);
        dot[m][1] = _mm512_fmadd_ps(values[1], _mm512_loadu_ps(x + 16), dot[m][1]);
      }
    }
    for (int m = 0; m < Count; ++m) {
      total[m] = _mm512_fmadd_ps(_mm512_add_ps(dot[m][0], dot[m][1]), scale, total[m]);
    }
  }

  const Weight& weight_;
  const float* x_;
  const float* sums_;
  const int64_t stride_, groups_;
  const Unpack<code> unpack_;
};

// The same without groups.
template <Float type, int Count>
class DenseSweep {
 public:
  DenseSweep(const Weight& weight, const float* x)
      : weight_(weight), x_(x), stride_(padded(weight)) {}

  void run(int64_t n, float* out, int64_t stride) const {
    // Several sums, for each waits on its last addition.
    constexpr int kSums = Count == 1 ? 4 : 2;
    __m512 sum[Count][kSums];
    for (auto& of_row : sum) {
      std::fill_n(of_row, kSums, _mm512_setzero_ps());
    }
    const int64_t first = n * weight_.inputs, whole = weight_.inputs / (16 * kSums) * 16 * kSums;
    for (int64_t k = 0; k < whole; k += 16 * kSums) {
      prefetch(first + k, kSums);
      for (int i = 0; i < kSums; ++i) {
        add<kSums>(load_16(weight_.q, type, first + k + 16 * i, 0xffff), k + 16 * i, i, sum);
      }
    }
    for (int64_t k = whole; k < weight_.inputs; k += 16) {
      const __mmask16 live = first_lanes(weight_.inputs - k);
      add<kSums>(load_16(weight_.q, type, first + k, live), k, 0, sum);
    }
    for (int m = 0; m < Count; ++m) {
      for (int i = 1; i < kSums; ++i) {
        sum[m][0] = _mm512_add_ps(sum[m][0], sum[m][i]);
      }
      out[m * stride] = _mm512_reduce_add_ps(sum[m][0]);
    }
  }

 private:
  void prefetch(int64_t index, int sums) const {
    const char* from = reinterpret_cast<const char*>(weight_.q) + index * size_of(type) + kAhead;
    for (int line = 0; line < int(16 * sums * size_of(type)) / 64; ++line) {
      _mm_prefetch(from + 64 * line, _MM_HINT_T1);
    }
  }

  template <int kSums>
  void add(__m512 w, int64_t k, int i, __m512 (&sum)[Count][kSums]) const {
    for (int m = 0; m < Count; ++m) {
      sum[m][i] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x_ + m * stride_ + k), sum[m][i]);
    }
  }

  const Weight& weight_;
  const float* x_;
  const int64_t stride_;
};

template <Code code, int Count>
void rows(
    const Weight& weight, const Batch& batch, int64_t row, int64_t first, int64_t last, float* out,
    int64_t stride) {
  const float* x = static_cast<const float*>(batch.data) + row * padded(weight);
  const auto sweep = [&] {
    if constexpr (dense(code)) {
      return DenseSweep<float_of(code), Count>(weight, x);
    } else {
      return Sweep<code, Count>(weight, x, batch.sums + row * weight.groups());
    }
  }();
  for (int64_t n = first; n < last; ++n) {
    sweep.run(n, out + row * stride + n - first, stride);
  }
}

void multiply(
    const Weight& weight, const Batch& batch, Float, int64_t first, int64_t last, float* out,
    int64_t stride, void*) {
  with_code(weight.code, [&](auto code) {
    int64_t row = 0;
    for (; row + 4 <= batch.count; row += 4) {
      rows<code.value, 4>(weight, batch, row, first, last, out, stride);
    }
    for (; row < batch.count; ++row) {
      rows<code.value, 1>(weight, batch, row, first, last, out, stride);
    }
  });
}

size_t row_size(const Weight& weight, Float, int64_t) {
  return size_t(padded(weight)) * sizeof(float);
}

size_t scratch_size(const Weight&, Float, int64_t) {
  return 0;
}

void pack(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row) {
  float* to = static_cast<float*>(batch.data) + row * padded(weight);
  for (int64_t k = 0; k < padded(weight); k += kTurn) {
    const int64_t rest = std::max<int64_t>(0, weight.inputs - k - 16);
    __m512i low = _mm512_castps_si512(load_16(x, type, k, first_lanes(weight.inputs - k)));
    __m512i high = _mm512_castps_si512(load_16(x, type, k + 16, first_lanes(rest)));
    if (of_nibbles(weight.code)) {
      deal(low, high);
    }
    _mm512_storeu_si512(to + k, low);
    _mm512_storeu_si512(to + k + 16, high);
  }
  if (affine(weight.code)) {
    group_sums(weight, x, type, batch.sums + row * weight.groups());
  }
}

} // namespace

const Kernels* kernels_avx512() {
  static const Kernels kernels = {"avx512", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
