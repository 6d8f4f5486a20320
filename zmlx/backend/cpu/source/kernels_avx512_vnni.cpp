// Kernels for AVX-512 with VNNI and VBMI: Ice Lake, Zen 4 and later.
//
// `vpdpbusd` multiplies 64 unsigned bytes by 64 signed ones into int32 sums, twice as many as
// `vdpbf16ps` and at twice its rate, and unpacking weights to bytes takes a shift and a mask. So the
// activations of a group become integers of 16 bits, each split into two signed bytes, its limbs:
// x = step * (256 * high + low). All products and sums of a group are exact; what is rounded is the
// step. For bfloat16 it is a power of two, for which the values within a factor of 64 of the group's
// largest are exact, too. Where 8 bits suffice there is one limb, and half the work.
//
// Results in float32 are left to the float32 kernels, and many rows to those with panels, where the
// processor has them.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "floats.h"
#include "kernels.h"
#include "limbs.h"
#include "load_avx512.h"

namespace zmlx {
namespace {

constexpr int64_t kAhead = 6144; // bytes between a load of weights and its prefetch
constexpr int64_t kLine = 64;

// Values that are multiplied in one turn.
constexpr int64_t block_of(Code code) {
  return code == Code::u2 ? 256 : of_nibbles(code) ? 128 : 64;
}

// A row of activations: limbs [block][limb][block values], the high one first; then the steps of the
// groups as float32. The values of a block lie as weights are unpacked: of nibbles the even ones
// before the odd ones, of two bits every fourth one from the first on, then from the second on, ...
struct RowLayout {
  int64_t blocks, steps, bytes;
  int limbs;

  explicit RowLayout(const Weight& weight) {
    const int64_t block = block_of(weight.code);
    blocks = (weight.inputs + block - 1) / block;
    limbs = weight.short_activations ? 1 : 2;
    steps = blocks * block * limbs;
    bytes = steps + rounded_up(weight.groups() * int64_t(sizeof(float)), kLine);
  }
};

// Weights are multiplied as w = scale * u + bias with u of no sign. For small floats u is twice the
// value and 12 more. That the two terms are larger than their sum rounds no 16-bit result otherwise.
template <Code code>
inline void load_terms(
    const Weight& weight, int64_t at, __mmask16 live, __m512& scale, __m512& bias) {
  scale = load_scales(weight, at, live);
  if constexpr (code == Code::e2m1) {
    bias = _mm512_mul_ps(scale, _mm512_set1_ps(-6.0f));
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(0.5f));
  } else {
    bias = load_biases(weight, at, live);
  }
}

// 64 values of a block as bytes.
template <Code code>
struct Unpack {
  static constexpr int bits = bits_of(code);

  __m512i places, offsets;

  Unpack() {
    alignas(64) uint8_t place[64], offset[64];
    for (int i = 0; i < 64; ++i) {
      place[i] = uint8_t(i / 8 * bits + i % 8); // eight values begin at a whole byte
      offset[i] = uint8_t(i % 8 * bits);
    }
    places = _mm512_load_si512(place);
    offsets = _mm512_load_si512(offset);
    if constexpr (code == Code::e2m1) {
      for (int i = 0; i < 64; ++i) {
        place[i] = uint8_t(kTwiceE2m1[i & 15] + 12);
      }
      places = _mm512_load_si512(place);
    }
  }

  // The values of low nibbles, or of bytes below 16.
  __m512i nibbles(__m512i packed) const {
    const __m512i low = _mm512_and_si512(packed, _mm512_set1_epi8(15));
    return code == Code::e2m1 ? _mm512_shuffle_epi8(places, low) : low;
  }

  __m512i operator()(__m512i packed) const {
    if constexpr (bits == 8) {
      return packed;
    }
    const __m512i eights = _mm512_permutexvar_epi8(places, packed);
    const __m512i fields = _mm512_multishift_epi64_epi8(offsets, eights);
    return _mm512_and_si512(fields, _mm512_set1_epi8((1 << bits) - 1));
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
  if constexpr (Bits == 2 || Bits == 4 || Bits == 8) {
    return _mm512_loadu_si512(from);
  }
  return _mm512_maskz_loadu_epi8((uint64_t(1) << (8 * Bits)) - 1, from);
}

// What does not change from one row of weights to the next.
template <Code code, int Limbs>
struct Sweep {
  static constexpr int64_t block = block_of(code);
  static constexpr int parts = int(block / 64);
  static constexpr int bits = bits_of(code);

  const Weight& weight;
  const RowLayout layout;
  const Unpack<code> unpack;
  const int64_t groups, bytes;
  const int64_t turns; // blocks that 16 groups fill
  const int64_t whole; // blocks that are not cut off
  const int64_t scales_ahead; // bytes between a load of scales and its prefetch
  const __m512i first_group; // of each lane, which holds block / 16 neighbouring values
  const __m512i next_group; // what a block adds to it
  const bool halves; // two blocks make a group

  explicit Sweep(const Weight& w)
      : weight(w),
        layout(w),
        groups(w.groups()),
        bytes(w.row_bytes()),
        turns(16 * w.group / block),
        whole(w.inputs / block),
        scales_ahead(rounded_up(kAhead * 8 / (bits * w.group) * int64_t(w.scale_size()), kLine)),
        first_group(_mm512_srl_epi32(
            _mm512_mullo_epi32(
                _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                _mm512_set1_epi32(int(block / 16))),
            _mm_cvtsi32_si128(__builtin_ctz(w.group)))),
        next_group(_mm512_set1_epi32(int(block / w.group))),
        halves(block < w.group) {}

  template <int Rows>
  void load(const uint8_t* q, int64_t at, __m512i (&w)[Rows][parts]) const {
    for (int r = 0; r < Rows; ++r) {
      const uint8_t* from = q + r * bytes + at * (block * bits / 8);
      // Into the second cache: the first one keeps the activations.
      _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T1);
      const __m512i packed = at < whole
          ? load_whole<bits>(from)
          : load_packed<bits>(from, weight.inputs - at * block);
      if constexpr (of_nibbles(code)) {
        w[r][0] = unpack.nibbles(packed);
        w[r][1] = unpack.nibbles(_mm512_srli_epi16(packed, 4));
      } else if constexpr (code == Code::u2) {
        for (int p = 0; p < parts; ++p) {
          w[r][p] = _mm512_and_si512(_mm512_srli_epi16(packed, 2 * p), _mm512_set1_epi8(3));
        }
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
        __m512i w[Rows][parts];
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
      __m512 scale, bias;
      load_terms<code>(weight, first, live, scale, bias);
      prefetch_scales(first);
      for (int m = 0; m < Count; ++m) {
        const char* steps = x + m * layout.bytes + layout.steps;
        const __m512 step = _mm512_maskz_loadu_ps(live, steps + g * int64_t(sizeof(float)));
        scales[r][m] = _mm512_mul_ps(scale, step);
        const __m512 sum = _mm512_maskz_loadu_ps(live, sums + m * groups + g);
        total[r][m] = _mm512_fmadd_ps(bias, sum, total[r][m]);
      }
    }
  }

  void prefetch_scales(int64_t at) const {
    const int64_t ahead = at * int64_t(weight.scale_size()) + scales_ahead;
    _mm_prefetch(static_cast<const char*>(weight.scales) + ahead, _MM_HINT_T1);
    if constexpr (affine(code)) {
      _mm_prefetch(static_cast<const char*>(weight.biases) + ahead, _MM_HINT_T1);
    }
  }

  template <int Rows>
  void multiply(const __m512i (&w)[Rows][parts], const char* x, int64_t at, __m512i (&sum)[Rows]) const {
    const char* limb = x + at * block * Limbs;
    std::fill_n(sum, Rows, _mm512_setzero_si512());
    for (int l = 0; l < Limbs; ++l) {
      for (int r = 0; r < Rows && l > 0; ++r) {
        sum[r] = _mm512_slli_epi32(sum[r], 8);
      }
      for (int p = 0; p < parts; ++p, limb += 64) {
        const __m512i values = _mm512_load_si512(limb);
        for (int r = 0; r < Rows; ++r) {
          sum[r] = _mm512_dpbusd_epi32(sum[r], w[r][p], values);
        }
      }
    }
  }
};

template <Code code, int Limbs, int Count>
void rows(
    const Weight& weight, const Batch& batch, int64_t row, int64_t first, int64_t last, float* out,
    int64_t stride) {
  const Sweep<code, Limbs> sweep(weight);
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

template <Code code, int Limbs>
void few(
    const Weight& weight, const Batch& batch, int64_t first, int64_t last, float* out,
    int64_t stride) {
  int64_t row = 0;
  for (; row + 4 <= batch.count; row += 4) {
    rows<code, Limbs, 4>(weight, batch, row, first, last, out, stride);
  }
  for (; row < batch.count; ++row) {
    rows<code, Limbs, 1>(weight, batch, row, first, last, out, stride);
  }
}

// ---------------------------------------------------------------------------------------------

constexpr bool of_integers(Code code) {
  return affine(code) || code == Code::e2m1;
}

// The kernels to which products like these are left, or null.
const Kernels* others(const Weight& weight, Float type, int64_t count) {
  static const Kernels* const panels = panels_best();
  if (panels != nullptr && panels->scratch_size(weight, type, count) > 0) {
    return panels;
  }
  const bool in_float32 = type == Float::f32 || weight.results == Float::f32;
  return in_float32 || !of_integers(weight.code) ? kernels_avx512() : nullptr;
}

void multiply(
    const Weight& weight, const Batch& batch, Float type, int64_t first, int64_t last, float* out,
    int64_t stride, void* scratch) {
  if (const Kernels* kernels = others(weight, type, batch.count)) {
    return kernels->multiply(weight, batch, type, first, last, out, stride, scratch);
  }
  with_code(weight.code, [&](auto code) {
    if constexpr (of_integers(code.value)) {
      if (weight.short_activations) {
        few<code.value, 1>(weight, batch, first, last, out, stride);
      } else {
        few<code.value, 2>(weight, batch, first, last, out, stride);
      }
    }
  });
}

size_t row_size(const Weight& weight, Float type, int64_t count) {
  const Kernels* kernels = others(weight, type, count);
  return kernels != nullptr ? kernels->row_size(weight, type, count)
                            : size_t(RowLayout(weight).bytes);
}

size_t scratch_size(const Weight& weight, Float type, int64_t count) {
  const Kernels* kernels = others(weight, type, count);
  return kernels != nullptr ? kernels->scratch_size(weight, type, count) : 0;
}

// The limbs of 16 integers as bytes, the high one first.
inline void store_limbs(__m512i v, int limbs, char* to, int64_t apart) {
  for (int l = limbs - 1; l >= 0; --l) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + l * apart), _mm512_cvtepi32_epi8(v));
    v = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
  }
}

// The integers of 16 activations, of which only whole groups are there.
inline __m512i integers(
    const Weight& weight, const void* x, Float type, const float* steps, int64_t k) {
  if (k >= weight.inputs) {
    return _mm512_setzero_si512();
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / steps[k / weight.group]);
  return _mm512_cvtps_epi32(_mm512_mul_ps(load_16(x, type, k, 0xffff), inverse));
}

// Write the limbs of 64 integers, each 16 of them to a part of their own.
inline void store_parts(
    __m512i (&v)[4], Code code, int64_t k, int64_t block, int count, char* limbs) {
  if (code == Code::u2) {
    deal(v[0], v[1]);
    deal(v[2], v[3]);
    deal(v[0], v[2]); // 0, 4, 8, ... and 2, 6, 10, ...
    deal(v[1], v[3]);
    for (int part = 0; part < 4; ++part) {
      store_limbs(v[part], count, limbs + 64 * part + k / 4, block);
    }
    return;
  }
  for (int half = 0; half < 4; half += 2, k += 32) {
    if (of_nibbles(code)) {
      deal(v[half], v[half + 1]);
    }
    char* to = limbs + (of_nibbles(code) ? k / 2 : k);
    store_limbs(v[half], count, to, block);
    store_limbs(v[half + 1], count, to + (of_nibbles(code) ? 64 : 16), block);
  }
}

void pack_limbs(const Weight& weight, const void* x, Float type, const float* steps, char* to) {
  const RowLayout layout(weight);
  const int64_t block = block_of(weight.code);
  for (int64_t b = 0; b < layout.blocks; ++b) {
    for (int64_t k = 0; k < block; k += 64) {
      __m512i v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = integers(weight, x, type, steps, b * block + k + 16 * i);
      }
      store_parts(v, weight.code, k, block, layout.limbs, to + b * block * layout.limbs);
    }
  }
}

void pack(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row) {
  if (const Kernels* kernels = others(weight, type, batch.count)) {
    return kernels->pack(weight, x, type, batch, row);
  }
  const RowLayout layout(weight);
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
    steps[g] = step_of(top, type, layout.limbs);
    // The biases meet the same values as the weights do.
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = first; k < last; k += 16) {
      sum = _mm512_add_epi32(sum, integers(weight, x, type, steps, k));
    }
    sums[g] = steps[g] * float(_mm512_reduce_add_epi32(sum));
  }
  pack_limbs(weight, x, type, steps, to);
}

} // namespace

const Kernels* kernels_avx512_vnni() {
  static const Kernels kernels = {"avx512_vnni", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
