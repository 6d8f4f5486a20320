// The operations as lazy MLX arrays.
#pragma once

#include <optional>
#include <string>

#include "mlx/array.h"

namespace zmlx {

namespace mx = mlx::core;

// How a weight is stored: in a mode of mx.quantize, or as plain floats.
enum class Mode { affine, mxfp4, nvfp4, mxfp8, dense };

// Raises std::invalid_argument for any other name.
Mode mode_of(const std::string& name);

struct Format {
  Mode mode;
  int group_size; // these two only of quantized weights
  int bits;

  bool operator==(const Format&) const = default;
};

// A weight: w (..., N, K * bits / 32) uint32, scales (..., N, K / group_size) and, only in affine
// mode, biases like them; or dense, w (..., N, K) of floats alone.
struct WeightArray {
  mx::array w;
  std::optional<mx::array> scales;
  std::optional<mx::array> biases;
  Format format;
};

// x (..., K) -> (..., N), as mx.quantized_matmul(transpose=True) or x @ w.T, plus bias (N,).
mx::array quantized_matmul(
    const mx::array& x, const WeightArray& weight, const std::optional<mx::array>& bias);

// act(x @ gate.T + gate_bias) * (x @ up.T + up_bias); activation is silu, gelu or gelu_tanh.
mx::array quantized_glu(
    const mx::array& x,
    const WeightArray& gate,
    const WeightArray& up,
    const std::optional<mx::array>& gate_bias,
    const std::optional<mx::array>& up_bias,
    const std::string& activation);

// As mx.gather_qmm(rhs_indices=indices, transpose=True).
mx::array gather_quantized_matmul(
    const mx::array& x, const WeightArray& weight, const mx::array& indices);

// x (T, K), indices (T, k) -> (T, k, N).
mx::array gather_quantized_glu(
    const mx::array& x,
    const mx::array& indices,
    const WeightArray& gate,
    const WeightArray& up,
    const std::string& activation);

// h (T, k, K), indices (T, k), weights (T, k) -> (T, N).
mx::array gather_quantized_combine(
    const mx::array& h,
    const mx::array& indices,
    const mx::array& weights,
    const WeightArray& weight);

} // namespace zmlx
