// Many rows of activations, for AVX-512 with BF16 and VBMI: Zen 4, Sapphire Rapids and later.
//
// 32 rows of weights are unpacked once into panels, which then meet all activations. An integer of
// up to eight bits is exact in bfloat16, and so is a small float: a packed value becomes one by a
// table lookup (`vpermw`), and `vdpbf16ps` multiplies 32 of them by 32 bfloat16 activations into
// float32 sums. With other activations, or weights, the panels are float32.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "floats.h"
#include "kernels.h"
#include "load_avx512.h"

namespace zmlx {
namespace {

constexpr int64_t kPanelRows = 32;
constexpr int64_t kTurn = 32; // values of a row that are unpacked at once
constexpr int64_t kRun = 64; // values without groups whose products are summed before the rest

// Whether so many rows are worth the time that it takes to unpack weights into panels.
bool panels(const Weight& weight, int64_t count, Float type) {
  const int64_t bf16 = of_nibbles(weight.code) ? 28 : 14; // 4 bits are quicker to unpack
  return count >= (type == Float::bf16 ? bf16 : type == Float::f16 ? 14 : 10);
}

// Table of the bfloat16 patterns of the shifted values, repeated to fill 32 entries: the bits above
// a field need no mask then.
template <Code code>
__m512i table(int offset = 0) {
  constexpr int bits = bits_of(code);
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; ++i) {
    values[i] = to_bf16(
        code == Code::e2m1 ? 0.5f * float(kTwiceE2m1[i & 15])
                           : float(((i + offset) & ((1 << bits) - 1)) - (1 << (bits - 1))));
  }
  return _mm512_load_si512(values);
}

// 32 consecutive values as bfloat16, in order; those of integers are shifted.
template <Code code>
struct Unpack {
  static constexpr int bits = bits_of(code);

  __m512i bytes, shifts, low, high;

  Unpack() {
    alignas(64) uint8_t index[64];
    alignas(64) uint16_t shift[32];
    for (int i = 0; i < 32; ++i) {
      const int bit = i * bits;
      index[2 * i] = uint8_t(bit / 8);
      index[2 * i + 1] = uint8_t(bit / 8 + 1);
      shift[i] = uint16_t(bit % 8);
    }
    bytes = _mm512_load_si512(index);
    shifts = _mm512_load_si512(shift);
    low = table<code>();
    high = table<code>(32);
  }

  // Zero behind `count` values.
  __m512i operator()(const uint8_t* from, int64_t count) const {
    const uint64_t all = ~0ull >> (64 - 4 * bits);
    const uint64_t live = count >= kTurn ? all : (1ull << (count * bits / 8)) - 1;
    if constexpr (code == Code::bf16) {
      return _mm512_maskz_loadu_epi8(live, from);
    } else if constexpr (code == Code::e4m3) {
      const auto* packed = reinterpret_cast<const __m128i*>(from);
      const __m512 unit = _mm512_set1_ps(256.0f);
      return (__m512i)_mm512_cvtne2ps_pbh(
          _mm512_mul_ps(load_e4m3(_mm_loadu_si128(packed + 1)), unit),
          _mm512_mul_ps(load_e4m3(_mm_loadu_si128(packed)), unit));
    } else if constexpr (code == Code::u8) {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
      const __m512i half = _mm512_set1_epi32(128);
      const __m512 even = _mm512_cvtepi32_ps(
          _mm512_sub_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0xffff)), half));
      const __m512 odd = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(wide, 16), half));
      const __m512i top = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
      return _mm512_mask_blend_epi16(0xaaaaaaaa, top, _mm512_castps_si512(odd));
    }
    const __m256i packed = _mm256_maskz_loadu_epi8(uint32_t(live), from);
    const __m512i placed = _mm512_permutexvar_epi8(bytes, _mm512_castsi256_si512(packed));
    const __m512i fields = _mm512_srlv_epi16(placed, shifts);
    if constexpr (bits == 6) {
      return _mm512_permutex2var_epi16(low, fields, high);
    }
    return _mm512_permutexvar_epi16(fields, low);
  }
};

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// ---------------------------------------------------------------------------------------------
// Many rows. Weights: scratch holds, for 32 rows, the values as [inputs / 2][32] pairs of bfloat16
// (or [inputs][32] float32), then scales and biases as [group][32] float32. Activations: bfloat16,
// others as float32, [count][inputs]. Inputs are filled up with zeros to whole turns.

struct Panel {
  void* values;
  float* scales;
  float* biases;
};

int64_t padded(const Weight& weight) {
  return rounded_up(weight.inputs, kTurn);
}

bool in_bf16(const Weight& weight, Float type) {
  return type == Float::bf16 && weight.code != Code::f16 && weight.code != Code::f32;
}

size_t row_bytes(const Weight& weight, Float type) {
  return size_t(padded(weight)) * (in_bf16(weight, type) ? 2 : 4);
}

size_t panel_bytes(const Weight& weight, Float type) {
  return row_bytes(weight, type) * kPanelRows;
}

// Transpose 16 rows of 16 words.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int half = 0; half < 16; half += 8) {
    for (int i = 0; i < 4; ++i) {
      t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
      t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Write a turn of 16 rows, each given as pairs of bfloat16.
template <bool Bf16>
inline void store_pairs(__m512i (&pairs)[16], int64_t k, int64_t side, void* panel) {
  transpose(pairs);
  for (int i = 0; i < 16; ++i) {
    if constexpr (Bf16) {
      uint32_t* to = static_cast<uint32_t*>(panel) + (k / 2 + i) * kPanelRows + side;
      _mm512_storeu_si512(to, pairs[i]);
    } else {
      float* to = static_cast<float*>(panel) + (k + 2 * i) * kPanelRows + side;
      _mm512_storeu_si512(to, _mm512_slli_epi32(pairs[i], 16));
      _mm512_storeu_si512(
          to + kPanelRows, _mm512_and_si512(pairs[i], _mm512_set1_epi32(int(0xffff0000u))));
    }
  }
}

// Values as float32, which bfloat16 would not hold.
template <Float type>
void fill_floats(const Weight& weight, int64_t first, int64_t count, int64_t side, void* panel) {
  for (int64_t k = 0; k < padded(weight); k += 16) {
    const __mmask16 live = first_lanes(std::max<int64_t>(0, weight.inputs - k));
    __m512i values[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t at = (first + side + i) * weight.inputs + k;
      values[i] = side + i < count ? _mm512_castps_si512(load_16(weight.q, type, at, live))
                                   : _mm512_setzero_si512();
    }
    transpose(values);
    for (int i = 0; i < 16; ++i) {
      float* to = static_cast<float*>(panel) + (k + i) * kPanelRows + side;
      _mm512_storeu_si512(to, values[i]);
    }
  }
}

template <Code code, bool Bf16>
void fill_values(const Weight& weight, int64_t first, int64_t count, int64_t side, void* panel) {
  const Unpack<code> unpack;
  for (int64_t k = 0; k < padded(weight); k += kTurn) {
    __m512i pairs[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t n = first + side + i;
      const uint8_t* from = weight.q + n * weight.row_bytes() + k * bits_of(code) / 8;
      pairs[i] =
          side + i < count ? unpack(from, weight.inputs - k) : _mm512_setzero_si512();
    }
    store_pairs<Bf16>(pairs, k, side, panel);
  }
}

template <Code code>
void fill_terms(const Weight& weight, int64_t first, int64_t count, Panel& panel) {
  for (int64_t i = 0; i < kPanelRows; ++i) {
    for (int64_t g = 0; g < weight.groups(); ++g) {
      const int64_t at = (first + i) * weight.groups() + g;
      const float scale = i < count ? load_scale(weight, at) : 0.0f;
      panel.scales[g * kPanelRows + i] = scale;
      if constexpr (affine(code)) {
        const float bias = i < count ? load_bias(weight, at) : 0.0f;
        panel.biases[g * kPanelRows + i] = bias + float(1 << (bits_of(code) - 1)) * scale;
      }
    }
  }
}

template <Code code, bool Bf16>
void fill_panel(const Weight& weight, int64_t first, int64_t count, Panel& panel) {
  for (int64_t side = 0; side < kPanelRows; side += 16) {
    if constexpr (code == Code::f16 || code == Code::f32) {
      fill_floats<float_of(code)>(weight, first, count, side, panel.values);
    } else {
      fill_values<code, Bf16>(weight, first, count, side, panel.values);
    }
  }
  if constexpr (!dense(code)) {
    fill_terms<code>(weight, first, count, panel);
  }
}

// What a group has beside its values.
enum class Terms { none, scale, scale_and_bias };

constexpr Terms terms_of(Code code) {
  return dense(code) ? Terms::none : affine(code) ? Terms::scale_and_bias : Terms::scale;
}

// Add the sums of a group's products to the totals of 32 rows.
template <Terms terms, int Count>
inline void add_group(
    const Weight& weight, const Batch& batch, const Panel& panel, int64_t row, int64_t g,
    const __m512 (&sum)[Count][2], __m512 (&total)[Count][2]) {
  for (int side = 0; side < 2; ++side) {
    if constexpr (terms == Terms::none) {
      for (int m = 0; m < Count; ++m) {
        total[m][side] = _mm512_add_ps(total[m][side], sum[m][side]);
      }
      continue;
    }
    const __m512 scale = _mm512_loadu_ps(panel.scales + g * kPanelRows + side * 16);
    for (int m = 0; m < Count; ++m) {
      total[m][side] = _mm512_fmadd_ps(sum[m][side], scale, total[m][side]);
    }
    if constexpr (terms == Terms::scale_and_bias) {
      const __m512 bias = _mm512_loadu_ps(panel.biases + g * kPanelRows + side * 16);
      for (int m = 0; m < Count; ++m) {
        const __m512 of_group = _mm512_set1_ps(batch.sums[(row + m) * weight.groups() + g]);
        total[m][side] = _mm512_fmadd_ps(bias, of_group, total[m][side]);
      }
    }
  }
}

template <Terms terms, bool Bf16, int Count>
void multiply_panel(
    const Weight& weight, const Batch& batch, const Panel& panel, int64_t row,
    float (&result)[Count][kPanelRows]) {
  const int64_t words = padded(weight) / (Bf16 ? 2 : 1); // of a row
  const int64_t step = (terms == Terms::none ? kRun : weight.group) / (Bf16 ? 2 : 1);
  const uint32_t* x = static_cast<const uint32_t*>(batch.data) + row * words;
  const float* values = static_cast<const float*>(panel.values);
  __m512 total[Count][2];
  for (auto& of_row : total) {
    of_row[0] = of_row[1] = _mm512_setzero_ps();
  }
  const int64_t live = terms == Terms::none ? words : weight.groups() * step;
  for (int64_t first = 0, g = 0; first < live; first += step, ++g) {
    __m512 sum[Count][2];
    for (auto& of_row : sum) {
      of_row[0] = of_row[1] = _mm512_setzero_ps();
    }
    const int64_t last = std::min(live, first + step);
    for (int64_t k = first; k < last; ++k) {
      const __m512 w0 = _mm512_loadu_ps(values + k * kPanelRows);
      const __m512 w1 = _mm512_loadu_ps(values + k * kPanelRows + 16);
      for (int m = 0; m < Count; ++m) {
        const __m512i word = _mm512_set1_epi32(int(x[m * words + k]));
        if constexpr (Bf16) {
          sum[m][0] = dot(sum[m][0], _mm512_castps_si512(w0), word);
          sum[m][1] = dot(sum[m][1], _mm512_castps_si512(w1), word);
        } else {
          sum[m][0] = _mm512_fmadd_ps(w0, _mm512_castsi512_ps(word), sum[m][0]);
          sum[m][1] = _mm512_fmadd_ps(w1, _mm512_castsi512_ps(word), sum[m][1]);
        }
      }
    }
    add_group<terms, Count>(weight, batch, panel, row, g, sum, total);
  }
  for (int m = 0; m < Count; ++m) {
    _mm512_storeu_ps(result[m], total[m][0]);
    _mm512_storeu_ps(result[m] + 16, total[m][1]);
  }
}

template <Terms terms, bool Bf16, int Count>
void panel_rows(
    const Weight& weight,
    const Batch& batch,
    const Panel& panel,
    int64_t row,
    int64_t width,
    float* out,
    int64_t stride) {
  float result[Count][kPanelRows];
  multiply_panel<terms, Bf16, Count>(weight, batch, panel, row, result);
  for (int m = 0; m < Count; ++m) {
    std::copy_n(result[m], width, out + (row + m) * stride);
  }
}

template <Code code, bool Bf16>
void many(
    const Weight& weight,
    const Batch& batch,
    Float type,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride,
    void* scratch) {
  Panel panel;
  panel.values = scratch;
  panel.scales =
      reinterpret_cast<float*>(static_cast<char*>(scratch) + panel_bytes(weight, type));
  panel.biases = panel.scales + weight.groups() * kPanelRows;
  for (int64_t n = first; n < last; n += kPanelRows) {
    const int64_t width = std::min(kPanelRows, last - n);
    fill_panel<code, Bf16>(weight, n, width, panel);
    float* to = out + n - first;
    int64_t row = 0;
    for (; row + 6 <= batch.count; row += 6) {
      panel_rows<terms_of(code), Bf16, 6>(weight, batch, panel, row, width, to, stride);
    }
    for (; row < batch.count; ++row) {
      panel_rows<terms_of(code), Bf16, 1>(weight, batch, panel, row, width, to, stride);
    }
  }
}

// ---------------------------------------------------------------------------------------------

void multiply(
    const Weight& weight, const Batch& batch, Float type, int64_t first, int64_t last, float* out,
    int64_t stride, void* scratch) {
  with_code(weight.code, [&](auto code) {
    if constexpr (code.value != Code::f16 && code.value != Code::f32) {
      if (in_bf16(weight, type)) {
        return many<code.value, true>(
            weight, batch, type, first, last, out, stride, scratch);
      }
    }
    many<code.value, false>(weight, batch, type, first, last, out, stride, scratch);
  });
}

size_t row_size(const Weight& weight, Float type, int64_t) {
  return row_bytes(weight, type);
}

size_t scratch_size(const Weight& weight, Float type, int64_t count) {
  if (!panels(weight, count, type)) {
    return 0;
  }
  return panel_bytes(weight, type) + 2 * size_t(weight.groups()) * kPanelRows * sizeof(float);
}

void pack(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row) {
  char* to = static_cast<char*>(batch.data) + row * row_bytes(weight, type);
  if (in_bf16(weight, type)) {
    std::memcpy(to, x, weight.inputs * 2);
    std::memset(to + weight.inputs * 2, 0, (padded(weight) - weight.inputs) * 2);
  } else {
    for (int64_t k = 0; k < padded(weight); k += 16) {
      const __mmask16 live = first_lanes(std::max<int64_t>(0, weight.inputs - k));
      _mm512_storeu_ps(reinterpret_cast<float*>(to) + k, load_16(x, type, k, live));
    }
  }
  if (affine(weight.code)) {
    group_sums(weight, x, type, batch.sums + row * weight.groups());
  }
}

} // namespace

const Kernels* panels_avx512_bf16() {
  static const Kernels kernels = {"avx512_bf16", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
