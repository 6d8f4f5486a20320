// Many rows of activations, for AVX-512 with BF16 and VBMI: Zen 4, Sapphire Rapids and later.
//
// 32 rows of weights are unpacked once into panels, which then meet all activations. An integer of
// up to eight bits is exact in bfloat16, so a packed value becomes one by a table lookup (`vpermw`),
// and `vdpbf16ps` multiplies 32 of them by 32 bfloat16 activations into float32 sums. With other
// activations the panels are float32.
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

// Whether so many rows are worth the time that it takes to unpack weights into panels.
bool panels(const Weight& weight, int64_t count, Float type) {
  const int64_t bf16 = weight.bits == 4 ? 28 : 14; // 4 bits are quicker to unpack
  return count >= (type == Float::bf16 ? bf16 : type == Float::f16 ? 14 : 10);
}

// Table of the bfloat16 patterns of the shifted values, repeated to fill 32 entries: the bits above
// a field need no mask then.
template <int Bits>
__m512i table(int offset = 0) {
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; ++i) {
    values[i] = to_bf16(float(((i + offset) & ((1 << Bits) - 1)) - (1 << (Bits - 1))));
  }
  return _mm512_load_si512(values);
}

// 32 consecutive shifted values of `Bits` bits as bfloat16, in order.
template <int Bits>
struct Unpack {
  __m512i bytes, shifts, low, high;

  Unpack() {
    alignas(64) uint8_t index[64];
    alignas(64) uint16_t shift[32];
    for (int i = 0; i < 32; ++i) {
      const int bit = i * Bits;
      index[2 * i] = uint8_t(bit / 8);
      index[2 * i + 1] = uint8_t(bit / 8 + 1);
      shift[i] = uint16_t(bit % 8);
    }
    bytes = _mm512_load_si512(index);
    shifts = _mm512_load_si512(shift);
    low = table<Bits>();
    high = table<Bits>(32);
  }

  __m512i operator()(const uint8_t* from) const {
    if constexpr (Bits == 8) {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
      const __m512i half = _mm512_set1_epi32(128);
      const __m512 even = _mm512_cvtepi32_ps(
          _mm512_sub_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0xffff)), half));
      const __m512 odd = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(wide, 16), half));
      const __m512i top = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
      return _mm512_mask_blend_epi16(0xaaaaaaaa, top, _mm512_castps_si512(odd));
    }
    const __m256i packed = _mm256_maskz_loadu_epi8(uint32_t((uint64_t(1) << (4 * Bits)) - 1), from);
    const __m512i placed = _mm512_permutexvar_epi8(bytes, _mm512_castsi256_si512(packed));
    const __m512i fields = _mm512_srlv_epi16(placed, shifts);
    if constexpr (Bits == 6) {
      return _mm512_permutex2var_epi16(low, fields, high);
    }
    return _mm512_permutexvar_epi16(fields, low);
  }
};

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// ---------------------------------------------------------------------------------------------
// Many rows. Weights: scratch holds, for 32 rows, the integers as [inputs / 2][32] pairs of
// bfloat16 (or [inputs][32] float32), then scales and biases as [group][32] float32.
// Activations: bfloat16 as they are, others as float32, [count][inputs].

struct Panel {
  void* values;
  float* scales;
  float* biases;
};

bool in_bf16(Float type) {
  return type == Float::bf16;
}

size_t panel_bytes(const Weight& weight, Float type) {
  return size_t(weight.inputs) * kPanelRows * (in_bf16(type) ? 2 : 4);
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

template <int Bits, bool Bf16>
void fill_panel(const Weight& weight, int64_t first, int64_t count, Panel& panel) {
  const Unpack<Bits> unpack;
  const int64_t groups = weight.groups();
  for (int64_t side = 0; side < kPanelRows; side += 16) {
    for (int64_t k = 0; k < weight.inputs; k += 32) {
      __m512i pairs[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t n = first + side + i;
        pairs[i] = side + i < count ? unpack(weight.q + n * weight.row_bytes() + k * Bits / 8)
                                    : _mm512_setzero_si512();
      }
      transpose(pairs);
      for (int i = 0; i < 16; ++i) {
        if constexpr (Bf16) {
          uint32_t* to = static_cast<uint32_t*>(panel.values) + (k / 2 + i) * kPanelRows + side;
          _mm512_storeu_si512(to, pairs[i]);
        } else {
          float* to = static_cast<float*>(panel.values) + (k + 2 * i) * kPanelRows + side;
          _mm512_storeu_si512(to, _mm512_slli_epi32(pairs[i], 16));
          _mm512_storeu_si512(
              to + kPanelRows, _mm512_and_si512(pairs[i], _mm512_set1_epi32(int(0xffff0000u))));
        }
      }
    }
  }
  for (int64_t i = 0; i < kPanelRows; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (first + i) * groups + g;
      const float scale = i < count ? load_float(weight.scales, weight.type, at) : 0.0f;
      const float bias = i < count ? load_float(weight.biases, weight.type, at) : 0.0f;
      panel.scales[g * kPanelRows + i] = scale;
      panel.biases[g * kPanelRows + i] = bias + float(1 << (Bits - 1)) * scale;
    }
  }
}

template <bool Bf16, int Count>
void multiply_panel(
    const Weight& weight,
    const Batch& batch,
    const Panel& panel,
    int64_t row,
    float (&result)[Count][kPanelRows]) {
  const int64_t groups = weight.groups(), inputs = weight.inputs;
  const int64_t steps = Bf16 ? weight.group / 2 : weight.group;
  const int64_t x_words = Bf16 ? inputs / 2 : inputs;
  const uint32_t* x = static_cast<const uint32_t*>(batch.data) + row * x_words;
  const float* values = static_cast<const float*>(panel.values);
  __m512 total[Count][2];
  for (int m = 0; m < Count; ++m) {
    total[m][0] = total[m][1] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m512 sum[Count][2];
    for (int m = 0; m < Count; ++m) {
      sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    }
    for (int64_t k = g * steps; k < (g + 1) * steps; ++k) {
      const __m512 w0 = _mm512_loadu_ps(values + k * kPanelRows);
      const __m512 w1 = _mm512_loadu_ps(values + k * kPanelRows + 16);
      for (int m = 0; m < Count; ++m) {
        const __m512i word = _mm512_set1_epi32(int(x[m * x_words + k]));
        if constexpr (Bf16) {
          sum[m][0] = dot(sum[m][0], _mm512_castps_si512(w0), word);
          sum[m][1] = dot(sum[m][1], _mm512_castps_si512(w1), word);
        } else {
          sum[m][0] = _mm512_fmadd_ps(w0, _mm512_castsi512_ps(word), sum[m][0]);
          sum[m][1] = _mm512_fmadd_ps(w1, _mm512_castsi512_ps(word), sum[m][1]);
        }
      }
    }
    for (int side = 0; side < 2; ++side) {
      const __m512 scale = _mm512_loadu_ps(panel.scales + g * kPanelRows + side * 16);
      const __m512 bias = _mm512_loadu_ps(panel.biases + g * kPanelRows + side * 16);
      for (int m = 0; m < Count; ++m) {
        const __m512 of_group = _mm512_set1_ps(batch.sums[(row + m) * groups + g]);
        total[m][side] = _mm512_fmadd_ps(sum[m][side], scale, total[m][side]);
        total[m][side] = _mm512_fmadd_ps(bias, of_group, total[m][side]);
      }
    }
  }
  for (int m = 0; m < Count; ++m) {
    _mm512_storeu_ps(result[m], total[m][0]);
    _mm512_storeu_ps(result[m] + 16, total[m][1]);
  }
}

template <bool Bf16, int Count>
void panel_rows(
    const Weight& weight,
    const Batch& batch,
    const Panel& panel,
    int64_t row,
    int64_t width,
    float* out,
    int64_t stride) {
  float result[Count][kPanelRows];
  multiply_panel<Bf16, Count>(weight, batch, panel, row, result);
  for (int m = 0; m < Count; ++m) {
    std::copy_n(result[m], width, out + (row + m) * stride);
  }
}

template <int Bits, bool Bf16>
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
    fill_panel<Bits, Bf16>(weight, n, width, panel);
    float* to = out + n - first;
    int64_t row = 0;
    for (; row + 6 <= batch.count; row += 6) {
      panel_rows<Bf16, 6>(weight, batch, panel, row, width, to, stride);
    }
    for (; row < batch.count; ++row) {
      panel_rows<Bf16, 1>(weight, batch, panel, row, width, to, stride);
    }
  }
}

// ---------------------------------------------------------------------------------------------

template <int Bits>
void multiply_bits(
    const Weight& weight,
    const Batch& batch,
    Float type,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride,
    void* scratch) {
  if (in_bf16(type)) {
    return many<Bits, true>(weight, batch, type, first, last, out, stride, scratch);
  }
  return many<Bits, false>(weight, batch, type, first, last, out, stride, scratch);
}

void multiply(
    const Weight& weight,
    const Batch& batch,
    Float type,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride,
    void* scratch) {
  with_bits(weight.bits, [&](auto bits) {
    multiply_bits<bits.value>(weight, batch, type, first, last, out, stride, scratch);
  });
}

size_t row_size(const Weight& weight, Float type, int64_t) {
  return size_t(weight.inputs) * (in_bf16(type) ? 2 : 4);
}

size_t scratch_size(const Weight& weight, Float type, int64_t count) {
  if (!panels(weight, count, type)) {
    return 0;
  }
  return panel_bytes(weight, type) + 2 * size_t(weight.groups()) * kPanelRows * sizeof(float);
}

void pack(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row) {
  const size_t bytes = size_t(batch.inputs) * (in_bf16(type) ? 2 : 4);
  char* to = static_cast<char*>(batch.data) + row * bytes;
  if (type == Float::f16) {
    for (int64_t k = 0; k < batch.inputs; k += 16) {
      _mm512_storeu_ps(reinterpret_cast<float*>(to) + k, load_16(x, type, k, 0xffff));
    }
  } else {
    std::memcpy(to, x, bytes);
  }
  float* sums = batch.sums + row * weight.groups();
  for (int64_t g = 0; g < weight.groups(); ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = g * weight.group; k < (g + 1) * weight.group; k += 16) {
      sum = _mm512_add_ps(sum, load_16(x, type, k, 0xffff));
    }
    sums[g] = _mm512_reduce_add_ps(sum);
  }
}

} // namespace

const Kernels* panels_avx512_bf16() {
  static const Kernels kernels = {"avx512_bf16", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
