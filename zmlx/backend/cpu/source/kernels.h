// Products of a few activation rows with rows of a matrix, quantized or not.
//
// A row of an affine-quantized matrix holds K unsigned values of 2 to 8 bits, packed without gaps
// (value k starts at bit k * bits), and a scale and a bias for each group:
//   w[n, k] = s[n, g] * q[n, k] + b[n, g].
// With c = 2^(bits - 1) and q' = q - c, which is of both signs and exact in every format used here,
//   y[n] = sum_g s[n, g] * dot_g(q'[n], x) + (b[n, g] + c * s[n, g]) * sum_g(x).
// All sums are float32; the bias costs one multiplication per group. Without the shift by c the two
// terms would be several times larger than their sum, and so would be its rounding.
//
// Values may also be small floats with a scale for each group and no bias (the OCP microscaling
// formats, and NVFP4), or plain floats without groups.
//
// kernels_*.cpp implement `Kernels` for one instruction set each; the library holds them all and
// picks one when it is loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace zmlx {

enum class Float { f32, f16, bf16 };

inline size_t size_of(Float type) {
  return type == Float::f32 ? 4 : 2;
}

// How a value of a weight is stored: as an unsigned integer, a small float of so many bits of
// exponent and mantissa, or a plain float.
enum class Code { u2, u3, u4, u5, u6, u8, e2m1, e4m3, f16, bf16, f32 };

constexpr bool affine(Code code) {
  return code <= Code::u8;
}
constexpr bool dense(Code code) {
  return code >= Code::f16;
}
constexpr bool of_nibbles(Code code) {
  return code == Code::u4 || code == Code::e2m1;
}
constexpr int bits_of(Code code) {
  constexpr int bits[] = {2, 3, 4, 5, 6, 8, 4, 8, 16, 16, 32};
  return bits[int(code)];
}

// Of a dense code.
constexpr Float float_of(Code code) {
  return code == Code::f32 ? Float::f32 : code == Code::f16 ? Float::f16 : Float::bf16;
}

// How the scale of a group is stored; e8m0 is a power of two, e4m3 a small float.
enum class Scale { f32, f16, bf16, e8m0, e4m3 };

inline Scale scale_of(Float type) {
  return type == Float::f32 ? Scale::f32 : type == Float::f16 ? Scale::f16 : Scale::bf16;
}

struct Weight {
  const uint8_t* q;
  const void* scales; // null without groups
  const void* biases; // only of affine codes; in the scales' type
  int64_t rows;
  int64_t inputs;
  Code code;
  int64_t group; // all inputs where there are no groups
  Scale scale;
  Float results = Float::f32; // what products are rounded to: no more precision is of use
  bool short_activations = false; // 8 bits of them suffice, where that is faster

  int bits() const {
    return bits_of(code);
  }
  int64_t groups() const {
    return inputs / group;
  }
  int64_t row_bytes() const {
    return inputs * bits() / 8;
  }
  size_t scale_size() const {
    return dense(code) ? 0 : scale == Scale::f32 ? 4 : scale >= Scale::e8m0 ? 1 : 2;
  }
};

// Activation rows in the form that a kernel reads; `sums` is [count][groups] and `data` is the
// kernel's own. Both lie in memory that the caller owns.
struct Batch {
  int64_t count;
  int64_t inputs;
  float* sums;
  void* data;
};

// Call `run` with a code as a template argument.
template <class Run>
auto with_code(Code code, Run run) {
  switch (code) {
    case Code::u2:
      return run(std::integral_constant<Code, Code::u2>());
    case Code::u3:
      return run(std::integral_constant<Code, Code::u3>());
    case Code::u4:
      return run(std::integral_constant<Code, Code::u4>());
    case Code::u5:
      return run(std::integral_constant<Code, Code::u5>());
    case Code::u6:
      return run(std::integral_constant<Code, Code::u6>());
    case Code::u8:
      return run(std::integral_constant<Code, Code::u8>());
    case Code::e2m1:
      return run(std::integral_constant<Code, Code::e2m1>());
    case Code::e4m3:
      return run(std::integral_constant<Code, Code::e4m3>());
    case Code::f16:
      return run(std::integral_constant<Code, Code::f16>());
    case Code::bf16:
      return run(std::integral_constant<Code, Code::bf16>());
    default:
      return run(std::integral_constant<Code, Code::f32>());
  }
}

inline int64_t rounded_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

struct Kernels {
  const char* name;

  // Bytes of `Batch::data` for each of `count` rows of activations of `type`, for weights like
  // `weight`; at most the larger of those for one row and for more.
  size_t (*row_size)(const Weight& weight, Float type, int64_t count);

  // Write row `row` of a batch from activations x[0..K) of `type`.
  void (*pack)(const Weight& weight, const void* x, Float type, Batch& batch, int64_t row);

  // out[m * stride + n - first] = <row n of the weight, row m of the batch>
  // for n in [first, last) and every m of the batch. `type` is the one that `pack` was given.
  // `scratch` holds scratch_size bytes.
  void (*multiply)(
      const Weight& weight,
      const Batch& batch,
      Float type,
      int64_t first,
      int64_t last,
      float* out,
      int64_t stride,
      void* scratch);

  size_t (*scratch_size)(const Weight& weight, Float type, int64_t count);
};

// Null where the library was not built for the instruction set.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_neon_dotprod();

// For many rows of activations only, with scratch; null where this processor cannot. `scratch_size`
// is zero for so few rows that others are faster.
const Kernels* panels_best();
const Kernels* panels_avx512_bf16();

// The best of those that this processor runs, or the named one; null if it cannot run.
const Kernels* kernels_named(const char* name);
const Kernels* kernels_best();

} // namespace zmlx
