// The weight of a layer as MLX arrays, and as operands of an operation.
#pragma once

#include <optional>
#include <string>

#include "fused.h"
#include "products.h"

namespace zmlx {

// How a weight is stored: in a mode of mx.quantize, or as plain floats.
enum class Mode { affine, mxfp4, nvfp4, mxfp8, dense };

// Raises std::invalid_argument for any other name.
Mode mode_of(const std::string& name);
const char* name_of(Mode mode);

struct Format {
  Mode mode;
  int group_size; // these two only of quantized weights
  int bits;
  bool short_activations = false; // what it is multiplied with may be rounded to 8 bits

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

// Values in a row of a weight.
int64_t inputs_of(const WeightArray& weight);

// Whether the kernels take a weight of so many axes; if so, whether they take x (..., K) with it.
bool takes(const WeightArray& weight, size_t ndim);
bool takes(const mx::array& x, const WeightArray& weight);

// A weight is always three operands; what it lacks is stood for by what it has.
void append(Arrays& inputs, const WeightArray& weight);
WeightArray weight_at(const Arrays& in, size_t at, Format format);

// The three operands when they have been computed.
class WeightOperand {
 public:
  WeightOperand(Operands in, size_t at, Format format)
      : w_(*in[at]), scales_(*in[at + 1]), biases_(*in[at + 2]), format_(format) {}

  Weight weight() const;

  Experts experts() const {
    return {weight(), w_.view().extent(0)};
  }

 private:
  Weight stored() const;

  Ordered w_, scales_, biases_;
  Format format_;
};

Rows rows_of(const Ordered& operand);
Rows rows_of(const View& output);

} // namespace zmlx
