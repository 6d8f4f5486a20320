// The operations as lazy MLX arrays.
#pragma once

#include <optional>
#include <string>

#include "weights.h"

namespace zmlx {

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
