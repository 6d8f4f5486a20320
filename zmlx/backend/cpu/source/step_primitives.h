// The operations of a decode step beside the products, as lazy MLX arrays. They take what the
// functions of mlx.core.fast of the same names take, and compute with float32 sums.
#pragma once

#include <optional>
#include <string>
#include <variant>

#include "mlx/array.h"

namespace zmlx {

namespace mx = mlx::core;

// x (..., D), weight (D,) or none -> (..., D).
mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps);

// x (..., D) -> (..., 1): log(sum(exp(x))), as mx.logsumexp over the last axis with keepdims.
mx::array log_sum_exp(const mx::array& x);

// x (B, ..., T, D); offset is a number, or an integer array () or (B,); either base or freqs
// (dims / 2,).
mx::array rope(
    const mx::array& x,
    int dims,
    bool traditional,
    std::optional<float> base,
    float scale,
    const std::variant<int, mx::array>& offset,
    const std::optional<mx::array>& freqs);

// queries (B, H, L, D), keys (B, G, S, D), values (B, G, S, E), H a multiple of G -> (B, H, L, E).
// mask: none, "causal", or an array that broadcasts to (B, H, L, S), of bool or added.
mx::array attention(
    const mx::array& queries,
    const mx::array& keys,
    const mx::array& values,
    float scale,
    const std::variant<std::monostate, std::string, mx::array>& mask,
    const std::optional<mx::array>& sinks);

} // namespace zmlx
