// Products of a few activation rows with rows of an affine-quantized matrix.
//
// A weight row holds K unsigned values of `bits` bits, packed without gaps (value k starts at bit
// k * bits), and a scale and a bias for each group:  w[n, k] = s[n, g] * q[n, k] + b[n, g].
// With c = 2^(bits - 1) and q' = q - c, which is of both signs and exact in every format used here,
//   y[n] = sum_g s[n, g] * dot_g(q'[n], x) + (b[n, g] + c * s[n, g]) * sum_g(x).
// All sums are float32; the bias costs one multiplication per group. Without the shift by c the two
// terms would be several times larger than their sum, and so would be its rounding.
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

struct Weight {
  const uint8_t* q;
  const void* scales;
  const void* biases;
  int64_t rows;
  int64_t inputs;
  int bits;
  int group;
  Float type; // of scales and biases
  Float results = Float::f32; // what products are rounded to: no more precision is of use

  int64_t groups() const {
    return inputs / group;
  }
  int64_t row_bytes() const {
    return inputs * bits / 8;
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

// Call `run` with a width of weights as a template argument.
template <class Run>
auto with_bits(int bits, Run run) {
  switch (bits) {
    case 2:
      return run(std::integral_constant<int, 2>());
    case 3:
      return run(std::integral_constant<int, 3>());
    case 4:
      return run(std::integral_constant<int, 4>());
    case 5:
      return run(std::integral_constant<int, 5>());
    case 6:
      return run(std::integral_constant<int, 6>());
    default:
      return run(std::integral_constant<int, 8>());
  }
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
