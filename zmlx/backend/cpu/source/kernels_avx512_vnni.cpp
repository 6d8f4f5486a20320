// Kernels for AVX-512 with VNNI and VBMI: Ice Lake, Zen 4 and later.
//
// `vpdpbusd` multiplies 64 unsigned bytes by 64 signed ones into int32 sums, twice as many as
// `vdpbf16ps` and at twice its rate, and unpacking weights to bytes takes a shift and a mask. So the
// activations of a group become integers of 16 bits (of 24 for float32), each split into two (three)
// signed bytes, its limbs:  x = step * (256 * high + low).  All products and sums of a group are
// exact; what is rounded is the step. For bfloat16 it is a power of two, for which the values within
// a factor of 64 of the group's largest are exact, too.
//
// Many rows are left to the kernels with panels, where the processor has them.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "floats.h"
#include "kernels.h"
#include "load_avx512.h"

namespace zmlx {
namespace {

constexpr int64_t kAhead = 6144; // bytes between a load of weights and its prefetch
constexpr int64_t kLine = 64;

int limbs_of(const Weight& weight, Float type) {
  return type == Float::f32 || weight.results == Float::f32 ? 3 : 2;
}

// Whether weights are multiplied as values of both signs: see kernels.h. To 16-bit results the
// rounding that this saves makes no difference.
constexpr bool shifted(int limbs) {
  return limbs == 3;
}

// Values that are multiplied in one turn.
template <int Bits>
constexpr int64_t kBlock = Bits == 4 ? 128 : 64;

int64_t block_of(int bits) {
  return bits == 4 ? 128 : 64;
}

int64_t rounded(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

// A row of activations: limbs [block][limb][block values], the highest limb first (for 4 bits even
// values before odd ones); then, of float32 ones, for each block 16 int32 to be added to its sums,
// which shift the weights by half their range; then the steps of the groups as float32.
struct RowLayout {
  int64_t blocks, shifts, steps, bytes;

  RowLayout(const Weight& weight, int limbs) {
    const int64_t block = block_of(weight.bits);
    blocks = (weight.inputs + block - 1) / block;
    shifts = blocks * block * limbs;
    steps = shifts + (shifted(limbs) ? blocks * kLine : 0);
    bytes = steps + rounded(weight.groups() * int64_t(sizeof(float)), kLine);
  }
};

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : __mmask16((1u << count) - 1);
}

// 64 values of a block as bytes.
template <int Bits>
struct Unpack {
  __m512i places, offsets;

  Unpack() {
    alignas(64) uint8_t place[64], offset[64];
    for (int i = 0; i < 64; ++i) {
      place[i] = uint8_t(i / 8 * Bits + i % 8); // eight values begin at a whole byte
      offset[i] = uint8_t(i % 8 * Bits);
    }
    places = _mm512_load_si512(place);
    offsets = _mm512_load_si512(offset);
  }

  __m512i operator()(__m512i packed) const {
    if constexpr (Bits == 8) {
      return packed;
    }
    const __m512i eights = _mm512_permutexvar_epi8(places, packed);
    const __m512i fields = _mm512_multishift_epi64_epi8(offsets, eights);
    return _mm512_and_si512(fields, _mm512_set1_epi8((1 << Bits) - 1));
  }
};

// The packed bytes of a block, of which `rest` values are there.
template <int Bits>
inline __m512i load_packed(const uint8_t* from, int64_t rest) {
  return _mm512_maskz_loadu_epi8((uint64_t(1) << (rest * Bits / 8)) - 1, from);
}

// The same of a block that is not cut off. No byte behind it may be touched.
template <int Bits>
inline __m512i load_whole(const uint8_t* from) {
  if constexpr (Bits == 4 || Bits == 8) {
    return _mm512_loadu_si512(from);
  } else if constexpr (Bits == 2) {
    return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  return _mm512_maskz_loadu_epi8((uint64_t(1) << (8 * Bits)) - 1, from);
}

// What does not change from one row of weights to the next.
template <int Bits, int Limbs>
struct Sweep {
  static constexpr int64_t block = kBlock<Bits>;

  const Weight& weight;
  const RowLayout layout;
  const Unpack<Bits> unpack;
  const int64_t groups, bytes;
  const int64_t turns; // blocks that 16 groups fill
  const int64_t whole; // blocks that are not cut off
  const __m512i first_group; // of each lane, which holds block / 16 neighbouring values
  const __m512i next_group; // what a block adds to it
  const bool halves; // two blocks make a group

  explicit Sweep(const Weight& w)
      : weight(w),
        layout(w, Limbs),
        groups(w.groups()),
        bytes(w.row_bytes()),
        turns(16 * w.group / block),
        whole(w.inputs / block),
        first_group(_mm512_srl_epi32(
            _mm512_mullo_epi32(
                _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                _mm512_set1_epi32(int(block / 16))),
            _mm_cvtsi32_si128(__builtin_ctz(w.group)))),
        next_group(_mm512_set1_epi32(int(block / w.group))),
        halves(block < w.group) {}

  template <int Rows>
  void load(const uint8_t* q, int64_t at, __m512i (&w)[Rows][2]) const {
    for (int r = 0; r < Rows; ++r) {
      const uint8_t* from = q + r * bytes + at * (block * Bits / 8);
      // Into the second cache: the first one keeps the activations.
      _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T1);
      const __m512i packed = at < whole
          ? load_whole<Bits>(from)
          : load_packed<Bits>(from, weight.inputs - at * block);
      if constexpr (Bits == 4) {
        const __m512i nibble = _mm512_set1_epi8(15);
        w[r][0] = _mm512_and_si512(packed, nibble);
        w[r][1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
      } else {
        w[r][0] = unpack(packed);
      }
    }
  }

  // Products of some rows of weights, one behind the other, with some rows of activations.
  template <int Count, int Rows>
  void run(const char* x, const float* sums, int64_t n, float* out, int64_t stride) const {
    const uint8_t* q = weight.q + n * bytes;
    __m512 total[Rows][Count];
    for (auto& of_row : total) {
      std::fill_n(of_row, Count, _mm512_setzero_ps());
    }
    int64_t at = 0;
    for (int64_t g = 0; g < groups; g += 16) {
      __m512 scales[Rows][Count];
      scale<Count, Rows>(x, sums, n, g, scales, total);
      const int64_t end = std::min(layout.blocks, at + turns);
      __m512i group = first_group;
      for (; at < end; ++at) {
        __m512i w[Rows][2];
        load<Rows>(q, at, w);
        for (int m = 0; m < Count; ++m) {
          __m512i sum[Rows];
          multiply<Rows>(w, x + m * layout.bytes, at, sum);
          for (int r = 0; r < Rows; ++r) {
            const __m512 own = _mm512_permutexvar_ps(group, scales[r][m]);
            total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), own, total[r][m]);
          }
        }
        group = _mm512_add_epi32(group, next_group);
        if (halves && (at & 1) != 0) {
          group = _mm512_add_epi32(group, _mm512_set1_epi32(1));
        }
      }
    }
    for (int m = 0; m < Count; ++m) {
      for (int r = 0; r < Rows; ++r) {
        out[m * stride + r] = _mm512_reduce_add_ps(total[r][m]);
      }
    }
  }

  // Load the scales of 16 groups, in units of the activations' steps, and add the biases' share.
  template <int Count, int Rows>
  void scale(
      const char* x, const float* sums, int64_t n, int64_t g, __m512 (&scales)[Rows][Count],
      __m512 (&total)[Rows][Count]) const {
    const __mmask16 live = first_lanes(groups - g);
    for (int r = 0; r < Rows; ++r) {
      const int64_t first = (n + r) * groups + g;
      const __m512 scale = load_16(weight.scales, weight.type, first, live);
      __m512 bias = load_16(weight.biases, weight.type, first, live);
      if constexpr (shifted(Limbs)) {
        bias = _mm512_fmadd_ps(scale, _mm512_set1_ps(float(1 << (Bits - 1))), bias);
      }
      for (int m = 0; m < Count; ++m) {
        const char* steps = x + m * layout.bytes + layout.steps;
        const __m512 step = _mm512_maskz_loadu_ps(live, steps + g * int64_t(sizeof(float)));
        scales[r][m] = _mm512_mul_ps(scale, step);
        const __m512 sum = _mm512_maskz_loadu_ps(live, sums + m * groups + g);
        total[r][m] = _mm512_fmadd_ps(bias, sum, total[r][m]);
      }
    }
  }

  template <int Rows>
  void multiply(const __m512i (&w)[Rows][2], const char* x, int64_t at, __m512i (&sum)[Rows]) const {
    const char* limb = x + at * block * Limbs;
    std::fill_n(sum, Rows, _mm512_setzero_si512());
    for (int l = 0; l < Limbs; ++l) {
      for (int r = 0; r < Rows; ++r) {
        sum[r] = l == 0 ? sum[r] : _mm512_slli_epi32(sum[r], 8);
        if (shifted(Limbs) && l == Limbs - 1) {
          const __m512i shift = _mm512_load_si512(x + layout.shifts + at * kLine);
          sum[r] = _mm512_add_epi32(sum[r], shift);
        }
      }
      for (int p = 0; p < block / 64; ++p, limb += 64) {
        const __m512i values = _mm512_load_si512(limb);
        for (int r = 0; r < Rows; ++r) {
          sum[r] = _mm512_dpbusd_epi32(sum[r], w[r][p], values);
        }
      }
    }
  }
};

template <int Bits, int Limbs, int Count>
void rows(
    const Weight& weight, const Batch& batch, int64_t row, int64_t first, int64_t last, float* out,
    int64_t stride) {
  const Sweep<Bits, Limbs> sweep(weight);
  const char* x = static_cast<const char*>(batch.data) + row * sweep.layout.bytes;
  const float* sums = batch.sums + row * weight.groups();
  float* to = out + row * stride;
  int64_t n = first;
  // For one row of activations memory is what counts, and it is read best from front to back.
  if constexpr (Count > 1) {
    for (; n + 2 <= last; n += 2) {
      sweep.template run<Count, 2>(x, sums, n, to + n - first, stride);
    }
  }
  for (; n < last; ++n) {
    sweep.template run<Count, 1>(x, sums, n, to + n - first, stride);
  }
}

template <int Bits, int Limbs>
void few(
    const Weight& weight, const Batch& batch, int64_t first, int64_t last, float* out,
    int64_t stride) {
  int64_t row = 0;
  for (; row + 4 <= batch.count; row += 4) {
    rows<Bits, Limbs, 4>(weight, batch, row, first, last, out, stride);
  }
  for (; row < batch.count; ++row) {
    rows<Bits, Limbs, 1>(weight, batch, row, first, last, out, stride);
  }
}

template <int Bits>
void few(
    const Weight& weight, const Batch& batch, Float type, int64_t first, int64_t last, float* out,
    int64_t stride) {
  if (limbs_of(weight, type) == 2) {
    few<Bits, 2>(weight, batch, first, last, out, stride);
  } else {
    few<Bits, 3>(weight, batch, first, last, out, stride);
  }
}

// ---------------------------------------------------------------------------------------------

// The kernels for many rows, or null where these here have to do.
const Kernels* many(const Weight& weight, Float type, int64_t count) {
  static const Kernels* const panels = panels_best();
  if (panels != nullptr && panels->scratch_size(weight, type, count) > 0) {
    return panels;
  }
  // One value far above its group's others costs these their last bits of 24.
  return limbs_of(weight, type) == 3 ? kernels_avx512() : nullptr;
}

void multiply(
    const Weight& weight, const Batch& batch, Float type, int64_t first, int64_t last, float* out,
    int64_t stride, void* scratch) {
  if (const Kernels* panels = many(weight, type, batch.count)) {
    return panels->multiply(weight, batch, type, first, last, out, stride, scratch);
  }
  with_bits(weight.bits, [&](auto bits) {
    few<bits.value>(weight, batch, type, first, last, out, stride);
  });
}

size_t row_size(const Weight& weight, Float type, int64_t count) {
  const Kernels* panels = many(weight, type, count);
  return panels != nullptr ? panels->row_size(weight, type, count)
                           : size_t(RowLayout(weight, limbs_of(weight, type)).bytes);
}

size_t scratch_size(const Weight& weight, Float type, int64_t count) {
  const Kernels* panels = many(weight, type, count);
  return panels != nullptr ? panels->scratch_size(weight, type, count) : 0;
}

// What one unit of a group's integers stands for, given the largest magnitude in the group.
inline float step_of(float largest, int limbs, Float type, int bits) {
  if (!(largest <= std::numeric_limits<float>::max())) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  // Below this its inverse would overflow; the error is one of numbers that hardly exist.
  largest = std::max(largest, 1e-30f);
  if (limbs == 2 && type == Float::bf16) {
    int exponent;
    std::frexp(largest, &exponent); // largest < 2^exponent
    return std::ldexp(1.0f, exponent - 14);
  }
  // So that the highest limb is below 128, and that sums of four products fit into 32 bits.
  const float units = limbs == 2 ? 32639.0f : bits == 8 ? 4.1e6f : 8.3e6f;
  return largest / units;
}

// The limbs of 16 integers as bytes, the highest first.
template <int Limbs>
inline void store_limbs(__m512i v, char* to, int64_t apart) {
  for (int l = Limbs - 1; l >= 0; --l) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + l * apart), _mm512_cvtepi32_epi8(v));
    v = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
  }
}

// The integers of 32 activations, of which only whole groups are there.
inline void integers(
    const Weight& weight, const void* x, Float type, const float* steps, int64_t k, __m512i& low,
    __m512i& high) {
  if (k >= weight.inputs) {
    low = high = _mm512_setzero_si512();
    return;
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / steps[k / weight.group]);
  low = _mm512_cvtps_epi32(_mm512_mul_ps(load_16(x, type, k, 0xffff), inverse));
  high = _mm512_cvtps_epi32(_mm512_mul_ps(load_16(x, type, k + 16, 0xffff), inverse));
}

// The sum of each lane's integers.
template <int Limbs>
inline __m512i sum_of(const char* limb, int parts) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  for (int l = 0; l < Limbs; ++l) {
    sum = _mm512_slli_epi32(sum, 8);
    for (int p = 0; p < parts; ++p, limb += 64) {
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(limb));
    }
  }
  return sum;
}

template <int Limbs>
void pack_limbs(const Weight& weight, const void* x, Float type, const float* steps, char* to) {
  const RowLayout layout(weight, Limbs);
  const int64_t block = block_of(weight.bits);
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int64_t b = 0; b < layout.blocks; ++b) {
    char* limbs = to + b * block * Limbs;
    for (int64_t k = 0; k < block; k += 32) {
      __m512i low, high;
      integers(weight, x, type, steps, b * block + k, low, high);
      if (weight.bits == 4) {
        store_limbs<Limbs>(_mm512_permutex2var_epi32(low, even, high), limbs + k / 2, block);
        store_limbs<Limbs>(_mm512_permutex2var_epi32(low, odd, high), limbs + 64 + k / 2, block);
      } else {
        store_limbs<Limbs>(low, limbs + k, block);
        store_limbs<Limbs>(high, limbs + k + 16, block);
      }
    }
    if constexpr (shifted(Limbs)) {
      const __m512i sum = sum_of<Limbs>(limbs, int(block / 64));
      const __m512i half = _mm512_sll_epi32(sum, _mm_cvtsi32_si128(weight.bits - 1));
      _mm512_store_si512(
          to + layout.shifts + b * kLine, _mm512_sub_epi32(_mm512_setzero_si512(), half));
    }
  }
}

void pack(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row) {
  if (const Kernels* panels = many(weight, type, batch.count)) {
    return panels->pack(weight, x, type, batch, row);
  }
  const RowLayout layout(weight, limbs_of(weight, type));
  char* to = static_cast<char*>(batch.data) + row * layout.bytes;
  float* steps = reinterpret_cast<float*>(to + layout.steps);
  float* sums = batch.sums + row * weight.groups();
  const __m512 sign = _mm512_set1_ps(-0.0f);
  for (int64_t g = 0; g < weight.groups(); ++g) {
    const int64_t first = g * weight.group, last = first + weight.group;
    __m512 largest = _mm512_setzero_ps();
    bool nan = false;
    for (int64_t k = first; k < last; k += 16) {
      const __m512 v = load_16(x, type, k, 0xffff);
      largest = _mm512_max_ps(_mm512_andnot_ps(sign, v), largest);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0;
    }
    const float top = nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(largest);
    steps[g] = step_of(top, limbs_of(weight, type), type, weight.bits);
    // The biases meet the same values as the weights do.
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = first; k < last; k += 32) {
      __m512i low, high;
      integers(weight, x, type, steps, k, low, high);
      sum = _mm512_add_epi32(sum, _mm512_add_epi32(low, high));
    }
    sums[g] = steps[g] * float(_mm512_reduce_add_epi32(sum));
  }
  if (limbs_of(weight, type) == 2) {
    pack_limbs<2>(weight, x, type, steps, to);
  } else {
    pack_limbs<3>(weight, x, type, steps, to);
  }
}

} // namespace

const Kernels* kernels_avx512_vnni() {
  static const Kernels kernels = {"avx512_vnni", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
