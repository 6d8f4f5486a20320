// What a decode step does beside the products: norms, rotary embedding, attention, gates.
//
// step_*.cpp implement `Step` for one instruction set each. All sums are float32.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "products.h"

namespace zmlx {

enum class Binary { add, subtract, multiply, divide };

enum class Mask { none, causal, allowed, added };

// Attention of the rows of one key head: `rows` queries that meet the same keys.
struct AttentionRows {
  Float type; // of queries, keys, values and output
  int64_t rows;
  int64_t keys;
  int64_t key_width; // of a query and of a key
  int64_t value_width;
  float scale;

  const void* queries[4];
  const void* key; // the first key; each is key_stride elements after the one before it
  int64_t key_stride;
  const void* value;
  int64_t value_stride;

  Mask mask;
  int64_t visible[4]; // causal: the number of keys that a row may see
  const void* masks[4]; // allowed: bool for each key; added: numbers of `type`
  int64_t mask_stride; // in elements

  void* out[4];
};

struct Step {
  const char* name;

  // out[i] = x[i] * rsqrt(mean(x^2) + eps) * weight[i], or without a weight.
  void (*rms_norm)(
      const void* x, Float type, const void* weight, Float weight_type, float eps, int64_t width,
      void* out, Float out_type);

  // The largest of x and the sum of exp(x[i] - largest).
  void (*exponentials)(const void* x, Float type, int64_t count, float* largest, float* sum);

  // Where the first NaN of x is, or without one the first of the largest or smallest elements.
  int64_t (*extreme)(const void* x, Float type, int64_t count, bool smallest);

  // Rotate pairs of x by angles: (x[i], x[i + half]), or (x[2 i], x[2 i + 1]) if `traditional`.
  // What follows the 2 * half rotated elements is copied.
  void (*rotate)(
      const void* x, Float type, const float* cosines, const float* sines, int64_t half,
      bool traditional, int64_t width, void* out);

  // out[r] = softmax(scale * queries[r] . keys + mask) . values; `scratch` holds
  // rows * keys floats.
  void (*attend)(const AttentionRows& rows, float* scratch);

  // out[i] = a[i * a_stride] (op) b[i * b_stride], all of one type, rounded once.
  void (*binary)(
      Binary kind, const void* a, int64_t a_stride, const void* b, int64_t b_stride, Float type,
      int64_t count, void* out);

  // out[i] = x[i] in another type.
  void (*convert)(const void* x, Float type, int64_t count, void* out, Float out_type);

  // gates[i] = act(gates[i]) * ups[i]
  void (*gate)(Activation activation, float* gates, const float* ups, int64_t count);
};

const Step* step_portable();
const Step* step_avx2();
const Step* step_avx512();

// The step kernels that go with the chosen product kernels.
const Step& step();

} // namespace zmlx
