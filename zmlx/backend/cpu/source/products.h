// The operations on plain memory: who multiplies what, split over the threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace zmlx {

enum class Activation { silu, gelu, gelu_tanh };

// Rows of activations (or of a result), of one type, one behind the other.
struct Rows {
  void* data;
  Float type;
  int64_t count;
  int64_t width;

  void* row(int64_t index) const {
    return static_cast<char*>(data) + size_t(index) * width * size_of(type);
  }
};

// An optional vector that is added to every row of a product.
struct Bias {
  const void* data = nullptr;
  Float type = Float::f32;
};

// The experts' weights lie one behind the other; `weight` is that of the first.
struct Experts {
  Weight weight;
  int64_t count;

  Weight expert(int64_t index) const;
};

// Which expert each of `count` products uses, and which row of activations: the product p takes row
// p / per_row. An index outside of the experts reads the nearest one.
struct Routing {
  const uint32_t* indices;
  int64_t count;
  int64_t per_row;
};

const Kernels& kernels();
void set_kernels(const Kernels* chosen);

// out = x @ w.T + bias
void product(const Weight& weight, Bias bias, const Rows& x, const Rows& out);

// out = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)
void gated_product(
    const Weight& gate,
    Bias gate_bias,
    const Weight& up,
    Bias up_bias,
    Activation activation,
    const Rows& x,
    const Rows& out);

// out[p] = x[p / per_row] @ w[indices[p]].T
void gather_product(const Experts& experts, const Routing& routing, const Rows& x, const Rows& out);

// out[p] = act(x[p / per_row] @ gate[indices[p]].T) * (x[p / per_row] @ up[indices[p]].T)
void gather_gated_product(
    const Experts& gate,
    const Experts& up,
    Activation activation,
    const Routing& routing,
    const Rows& x,
    const Rows& out);

// out[t] = sum_j weights[t * top_k + j] * (x[t * top_k + j] @ w[indices[t * top_k + j]].T)
void gather_combine(
    const Experts& experts,
    const Routing& routing,
    const Rows& weights,
    int64_t top_k,
    const Rows& x,
    const Rows& out);

} // namespace zmlx
