// Kernels for ARMv8.2 with the dot product instructions: Cortex-A75, Neoverse N1 and later.
//
// `sdot` multiplies 16 signed bytes by 16 others into four int32 sums. So, as in
// kernels_avx512_vnni.cpp, the activations of a group become integers of 16 bits, each split into
// two signed bytes, its limbs:  x = step * (256 * high + low).  All products and sums of a group are
// exact; what is rounded is the step, which is a power of two for bfloat16.
//
// That loses less than storing a result of 16 bits loses. Others are left to the float32 kernels.
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "floats.h"
#include "kernels.h"
#include "limbs.h"

namespace zmlx {
namespace {

constexpr int kBatchRows = 4; // rows of activations multiplied in one pass over the weights
constexpr int64_t kAhead = 2048; // bytes between a load of weights and its prefetch
constexpr int64_t kLine = 64;
constexpr int kBlock = 32; // values that are unpacked at a time; each group is some of them
constexpr int kTurn = 4; // groups whose sums become one vector

// The kernels for what these do not take; null where they do.
const Kernels* floats_for(const Weight& weight, Float type) {
  const bool taken =
      type != Float::f32 && weight.results != Float::f32 && affine(weight.code);
  return taken ? nullptr : kernels_portable();
}

// What unpacked weights are too small by: eight bits do not fit into a signed byte.
template <int Bits>
constexpr float kShift = Bits == 8 ? 128.0f : 0.0f;

// A row of activations: for each block the high limbs of its values and then the low ones, both in
// the order in which weights are unpacked; then, for whole turns of groups, the steps and the sums
// of the activations as float32. (Those of the batch do not fill turns and stay unused.)
struct RowLayout {
  int64_t steps, sums, bytes;

  explicit RowLayout(const Weight& weight) {
    const int64_t groups = rounded_up(weight.groups(), kTurn);
    steps = 2 * weight.inputs;
    sums = steps + groups * int64_t(sizeof(float));
    bytes = rounded_up(sums + groups * int64_t(sizeof(float)), kLine);
  }
};

inline float32x4_t load_4(const void* from, Float type, int64_t index) {
  if (type == Float::f32) {
    return vld1q_f32(static_cast<const float*>(from) + index);
  }
  const uint16x4_t halves = vld1_u16(static_cast<const uint16_t*>(from) + index);
  return type == Float::bf16
      ? vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(halves), 16))
      : vcvt_f32_f16(vreinterpret_f16_u16(halves));
}

// The same of `count` values only, and zeros behind them.
inline float32x4_t load_some(const void* from, Float type, int64_t index, int64_t count) {
  if (count == 4) {
    return load_4(from, type, index);
  }
  alignas(16) char values[16] = {};
  const char* first = static_cast<const char*>(from) + index * int64_t(size_of(type));
  std::memcpy(values, first, size_t(count) * size_of(type));
  return load_4(values, type, 0);
}

// ---------------------------------------------------------------------------------------------

// Sixteen values of a block, of which two bytes each may be needed: `At` is where the first of them
// starts in a vector of packed bytes.
template <int Bits, int At>
struct Fields {
  uint8x16_t first, second;
  int8x16_t right, left;

  Fields() {
    uint8_t byte[16];
    int8_t shift[16];
    for (int i = 0; i < 16; ++i) {
      byte[i] = uint8_t(At + i * Bits / 8);
      shift[i] = int8_t(i * Bits % 8);
    }
    first = vld1q_u8(byte);
    second = vaddq_u8(first, vdupq_n_u8(1));
    right = vnegq_s8(vld1q_s8(shift));
    left = vaddq_s8(right, vdupq_n_s8(8));
  }

  int8x16_t operator()(uint8x16_t packed) const {
    const uint8x16_t low = vshlq_u8(vqtbl1q_u8(packed, first), right);
    const uint8x16_t high = vshlq_u8(vqtbl1q_u8(packed, second), left);
    const uint8x16_t mask = vdupq_n_u8((1 << Bits) - 1);
    return vreinterpretq_s8_u8(vandq_u8(vorrq_u8(low, high), mask));
  }
};

// Unpacks a block. No byte behind it may be touched.
template <int Bits>
struct Unpack {
  // The second half of a block ends where its bytes do.
  static constexpr int kLoad = Bits == 3 ? 8 : 16;
  static constexpr int kLast = 4 * Bits - kLoad;
  Fields<Bits, 0> front;
  Fields<Bits, 2 * Bits - kLast + (Bits == 3 ? 8 : 0)> back;

  void operator()(const uint8_t* from, int8x16_t* w) const {
    if constexpr (Bits == 3) {
      const uint8x16_t both = vcombine_u8(vld1_u8(from), vld1_u8(from + kLast));
      w[0] = front(both);
      w[1] = back(both);
    } else {
      w[0] = front(vld1q_u8(from));
      w[1] = back(vld1q_u8(from + kLast));
    }
  }
};

// Values 4i and 4i + 2, then 4i + 1 and 4i + 3.
template <>
struct Unpack<2> {
  void operator()(const uint8_t* from, int8x16_t* w) const {
    const uint8x8_t packed = vld1_u8(from);
    const uint8x16_t both = vcombine_u8(packed, vshr_n_u8(packed, 4));
    const uint8x16_t mask = vdupq_n_u8(3);
    w[0] = vreinterpretq_s8_u8(vandq_u8(both, mask));
    w[1] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(both, 2), mask));
  }
};

// Even values before odd ones.
template <>
struct Unpack<4> {
  void operator()(const uint8_t* from, int8x16_t* w) const {
    const uint8x16_t packed = vld1q_u8(from);
    w[0] = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15)));
    w[1] = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
  }
};

template <>
struct Unpack<8> {
  void operator()(const uint8_t* from, int8x16_t* w) const {
    for (int half = 0; half < 2; ++half) {
      const uint8x16_t packed = vld1q_u8(from + 16 * half);
      w[half] = vreinterpretq_s8_u8(veorq_u8(packed, vdupq_n_u8(128)));
    }
  }
};

// Where each byte of an unpacked block comes from.
struct Order {
  uint8x16_t halves[2];

  explicit Order(int bits) {
    uint8_t from[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const int part = i / 8;
      from[i] = uint8_t(
          bits == 4 ? i % 16 * 2 + i / 16
              : bits == 2 ? i % 8 * 4 + (part == 1 ? 2 : part == 2 ? 1 : part)
                          : i);
    }
    halves[0] = vld1q_u8(from);
    halves[1] = vld1q_u8(from + 16);
  }
};

// ---------------------------------------------------------------------------------------------

// What does not change from one row of weights to the next.
template <int Bits, int Group, int Count>
struct Sweep {
  static constexpr int kVectors = Group / 16;
  static constexpr int64_t kBytes = Group * Bits / 8;

  const Weight& weight;
  const RowLayout layout;
  const Unpack<Bits> unpack{};
  const int64_t groups;

  explicit Sweep(const Weight& w) : weight(w), layout(w), groups(w.groups()) {}

  // Products of a row of weights with some rows of activations.
  void run(const char* x, int64_t n, float* out, int64_t stride) const {
    const uint8_t* q = weight.q + n * weight.row_bytes();
    float32x4_t total[Count];
    std::fill_n(total, Count, vdupq_n_f32(0));
    int64_t g = 0;
    for (; g + kTurn <= groups; g += kTurn, q += kTurn * kBytes) {
      for (int64_t line = 0; line < kTurn * kBytes; line += kLine) {
        __builtin_prefetch(q + kAhead + line, 0, 2);
      }
      int32x4_t sums[kTurn][Count];
#pragma GCC unroll 4
      for (int j = 0; j < kTurn; ++j) {
        multiply(q + j * kBytes, x + (g + j) * 2 * Group, sums[j]);
      }
      add(sums, x, n, g, kTurn, total);
    }
    if (g < groups) {
      int32x4_t sums[kTurn][Count] = {};
      for (int j = 0; j < groups - g; ++j) {
        multiply(q + j * kBytes, x + (g + j) * 2 * Group, sums[j]);
      }
      add(sums, x, n, g, groups - g, total);
    }
    for (int m = 0; m < Count; ++m) {
      out[m * stride] = vaddvq_f32(total[m]);
    }
  }

  // Add the sums of `live` groups, one in each lane, in the units of their weights and activations.
  inline __attribute__((always_inline)) void add(
      const int32x4_t (&sums)[kTurn][Count], const char* x, int64_t n, int64_t g, int64_t live,
      float32x4_t (&total)[Count]) const {
    const float32x4_t scales = load_some(weight.scales, Float(weight.scale), n * groups + g, live);
    const float32x4_t biases = load_some(weight.biases, Float(weight.scale), n * groups + g, live);
    const float32x4_t shifted = vfmaq_n_f32(biases, scales, kShift<Bits>);
    const char* at = x + g * int64_t(sizeof(float));
#pragma GCC unroll 4
    for (int m = 0; m < Count; ++m, at += layout.bytes) {
      const float32x4_t steps = vld1q_f32(reinterpret_cast<const float*>(at + layout.steps));
      const float32x4_t inputs = vld1q_f32(reinterpret_cast<const float*>(at + layout.sums));
      const int32x4_t dots = vpaddq_s32(
          vpaddq_s32(sums[0][m], sums[1][m]), vpaddq_s32(sums[2][m], sums[3][m]));
      total[m] = vfmaq_f32(total[m], vcvtq_f32_s32(dots), vmulq_f32(scales, steps));
      total[m] = vfmaq_f32(total[m], shifted, inputs);
    }
  }

  // Four parts each of the sums of a group.
  inline __attribute__((always_inline)) void multiply(
      const uint8_t* q, const char* x, int32x4_t (&sums)[Count]) const {
    int8x16_t w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v += 2) {
      unpack(q + v / 2 * (kBlock * Bits / 8), w + v);
    }
#pragma GCC unroll 4
    for (int m = 0; m < Count; ++m) {
      const int8_t* limbs = reinterpret_cast<const int8_t*>(x + m * layout.bytes);
      int32x4_t sum = vdupq_n_s32(0);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum = vdotq_s32(sum, w[v], vld1q_s8(limbs + v / 2 * 2 * kBlock + v % 2 * 16));
      }
      sum = vshlq_n_s32(sum, 8);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum = vdotq_s32(sum, w[v], vld1q_s8(limbs + (v / 2 * 2 + 1) * kBlock + v % 2 * 16));
      }
      sums[m] = sum;
    }
  }
};

template <int Bits, int Group, int Count>
void rows(
    const Weight& weight, const Batch& batch, int64_t row, int64_t first, int64_t last, float* out,
    int64_t stride) {
  const Sweep<Bits, Group, Count> sweep(weight);
  const char* x = static_cast<const char*>(batch.data) + row * sweep.layout.bytes;
  for (int64_t n = first; n < last; ++n) {
    sweep.run(x, n, out + row * stride + n - first, stride);
  }
}

template <int Bits, int Group>
void all_rows(
    const Weight& weight, const Batch& batch, int64_t first, int64_t last, float* out,
    int64_t stride) {
  int64_t row = 0;
  for (; row + kBatchRows <= batch.count; row += kBatchRows) {
    rows<Bits, Group, kBatchRows>(weight, batch, row, first, last, out, stride);
  }
  for (; row < batch.count; ++row) {
    rows<Bits, Group, 1>(weight, batch, row, first, last, out, stride);
  }
}

template <class Run>
void with_group(int group, Run run) {
  switch (group) {
    case 32:
      return run(std::integral_constant<int, 32>());
    case 64:
      return run(std::integral_constant<int, 64>());
    default:
      return run(std::integral_constant<int, 128>());
  }
}

void multiply(
    const Weight& weight, const Batch& batch, Float type, int64_t first, int64_t last, float* out,
    int64_t stride, void* scratch) {
  if (const Kernels* floats = floats_for(weight, type)) {
    return floats->multiply(weight, batch, type, first, last, out, stride, scratch);
  }
  with_code(weight.code, [&](auto code) {
    if constexpr (affine(code.value)) {
      with_group(int(weight.group), [&](auto group) {
        all_rows<bits_of(code.value), group.value>(weight, batch, first, last, out, stride);
      });
    }
  });
}

// ---------------------------------------------------------------------------------------------

size_t row_size(const Weight& weight, Float type, int64_t count) {
  const Kernels* floats = floats_for(weight, type);
  return floats != nullptr ? floats->row_size(weight, type, count)
                           : size_t(RowLayout(weight).bytes);
}

size_t scratch_size(const Weight& weight, Float type, int64_t count) {
  const Kernels* floats = floats_for(weight, type);
  return floats != nullptr ? floats->scratch_size(weight, type, count) : 0;
}

// A NaN among them is the largest.
inline float largest_of(const void* x, Float type, int64_t first, int64_t last) {
  float32x4_t largest = vdupq_n_f32(0);
  for (int64_t k = first; k < last; k += 4) {
    largest = vmaxq_f32(largest, vabsq_f32(load_4(x, type, k)));
  }
  return vmaxvq_f32(largest);
}

// The integers of eight activations.
inline int16x8_t integers(const void* x, Float type, int64_t k, float inverse) {
  const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(load_4(x, type, k), inverse));
  const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(load_4(x, type, k + 4), inverse));
  return vcombine_s16(vmovn_s32(low), vmovn_s32(high));
}

// Write the limbs of a block in the order of the weights; return the sum of its integers.
inline int32_t store_limbs(
    const void* x, Float type, int64_t k, float inverse, const Order& order, uint8_t* to) {
  int8x8_t high[4], low[4];
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < 4; ++i) {
    const int16x8_t values = integers(x, type, k + 8 * i, inverse);
    high[i] = vrshrn_n_s16(values, 8);
    low[i] = vmovn_s16(values);
    sum = vpadalq_s16(sum, values);
  }
  for (const auto& limb : {high, low}) {
    const uint8x16x2_t natural = {
        vreinterpretq_u8_s8(vcombine_s8(limb[0], limb[1])),
        vreinterpretq_u8_s8(vcombine_s8(limb[2], limb[3]))};
    vst1q_u8(to, vqtbl2q_u8(natural, order.halves[0]));
    vst1q_u8(to + 16, vqtbl2q_u8(natural, order.halves[1]));
    to += kBlock;
  }
  return vaddvq_s32(sum);
}

void pack(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row) {
  if (const Kernels* floats = floats_for(weight, type)) {
    return floats->pack(weight, x, type, batch, row);
  }
  const RowLayout layout(weight);
  const Order order(weight.bits());
  char* to = static_cast<char*>(batch.data) + row * layout.bytes;
  std::memset(to + layout.steps, 0, layout.bytes - layout.steps);
  float* steps = reinterpret_cast<float*>(to + layout.steps);
  float* sums = reinterpret_cast<float*>(to + layout.sums);
  for (int64_t g = 0; g < weight.groups(); ++g) {
    const int64_t first = g * weight.group, last = first + weight.group;
    steps[g] = step_of(largest_of(x, type, first, last), type);
    const float inverse = 1.0f / steps[g];
    int32_t sum = 0;
    for (int64_t k = first; k < last; k += kBlock) {
      sum += store_limbs(x, type, k, inverse, order, reinterpret_cast<uint8_t*>(to + 2 * k));
    }
    sums[g] = steps[g] * float(sum); // the biases meet the same values as the weights do
  }
}

} // namespace

const Kernels* kernels_neon_dotprod() {
  static const Kernels kernels = {"neon_dotprod", row_size, pack, multiply, scratch_size};
  return &kernels;
}

} // namespace zmlx
