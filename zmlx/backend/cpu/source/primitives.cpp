#include "primitives.h"

#include <stdexcept>

#include "fused.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "weights.h"

namespace zmlx {
namespace {

// An operand that may be missing: a vector that is added to every row.
class BiasOperand {
 public:
  explicit BiasOperand(const View* view) {
    if (view != nullptr) {
      values_.emplace(*view);
    }
  }

  Bias bias() const {
    return values_ ? Bias{values_->data(), values_->type()} : Bias{};
  }

 private:
  std::optional<Ordered> values_;
};

Routing routing_of(const Ordered& indices, int64_t per_row) {
  return {static_cast<const uint32_t*>(indices.data()), indices.view().size, per_row};
}

mx::array stock_matmul(const mx::array& x, const Arrays& in, size_t at, Format f) {
  if (f.mode == Mode::dense) {
    return mx::matmul(x, mx::swapaxes(in[at], -1, -2));
  }
  return mx::quantized_matmul(
      x, in[at], in[at + 1], weight_at(in, at, f).biases, true, f.group_size, f.bits,
      name_of(f.mode));
}

mx::array stock_gather(
    const mx::array& x, const Arrays& in, size_t at, Format f, const mx::array& indices) {
  if (f.mode == Mode::dense) {
    return mx::gather_mm(x, mx::swapaxes(in[at], -1, -2), std::nullopt, indices);
  }
  return mx::gather_qmm(
      x, in[at], in[at + 1], weight_at(in, at, f).biases, std::nullopt, indices, true,
      f.group_size, f.bits, name_of(f.mode));
}

mx::array stock_activation(Activation activation, const mx::array& x) {
  const auto number = [&](float value) { return mx::array(value, x.dtype()); };
  switch (activation) {
    case Activation::silu:
      return x * mx::sigmoid(x);
    case Activation::gelu:
      return x * (number(1) + mx::erf(x * number(0.70710678f))) * number(0.5);
    default:
      return number(0.5) * x *
          (number(1) +
           mx::tanh(number(0.79788456f) * (x + number(0.044715f) * x * x * x)));
  }
}

class QuantizedMatmul : public Fused {
 public:
  QuantizedMatmul(mx::Stream stream, Format format) : Fused(stream), format_(format) {}

  const char* name() const override {
    return "ZmlxQuantizedMatmul";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return format_ == static_cast<const QuantizedMatmul&>(other).format_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() = inputs[1].shape(-2);
    return {shape};
  }

  Arrays stock(const Arrays& in) const override {
    const mx::array y = stock_matmul(in[0], in, 1, format_);
    return {in.size() > 4 ? y + in[4] : y};
  }

  std::optional<mx::array> over_rows(const Arrays& in) const override {
    const auto bias = in.size() > 4 ? std::optional<mx::array>(in[4]) : std::nullopt;
    return quantized_matmul(in[0], weight_at(in, 1, format_), bias);
  }

  void run(Operands in, const View& out) const override {
    const Ordered x(*in[0]);
    const WeightOperand weight(in, 1, format_);
    const BiasOperand bias(in.size() > 4 ? in[4] : nullptr);
    product(weight.weight(), bias.bias(), rows_of(x), rows_of(out));
  }

 private:
  Format format_;
};

class QuantizedGlu : public Fused {
 public:
  QuantizedGlu(
      mx::Stream stream, Format gate, Format up, Activation activation, bool gate_bias, bool up_bias)
      : Fused(stream),
        gate_(gate),
        up_(up),
        activation_(activation),
        gate_bias_(gate_bias),
        up_bias_(up_bias) {}

  const char* name() const override {
    return "ZmlxQuantizedGlu";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const QuantizedGlu&>(other);
    return gate_ == o.gate_ && up_ == o.up_ && activation_ == o.activation_ && gate_bias_ == o.gate_bias_ && up_bias_ == o.up_bias_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() = inputs[1].shape(-2);
    return {shape};
  }

  Arrays stock(const Arrays& in) const override {
    mx::array gate = stock_matmul(in[0], in, 1, gate_);
    mx::array up = stock_matmul(in[0], in, 4, up_);
    gate = gate_bias_ ? gate + in[7] : gate;
    up = up_bias_ ? up + in[up_bias_at()] : up;
    return {stock_activation(activation_, gate) * up};
  }

  void run(Operands in, const View& out) const override {
    const Ordered x(*in[0]);
    const WeightOperand gate(in, 1, gate_), up(in, 4, up_);
    const BiasOperand gate_bias(gate_bias_ ? in[7] : nullptr);
    const BiasOperand up_bias(up_bias_ ? in[up_bias_at()] : nullptr);
    gated_product(
        gate.weight(),
        gate_bias.bias(),
        up.weight(),
        up_bias.bias(),
        activation_,
        rows_of(x),
        rows_of(out));
  }

 private:
  size_t up_bias_at() const {
    return gate_bias_ ? 8 : 7;
  }

  Format gate_, up_;
  Activation activation_;
  bool gate_bias_, up_bias_;
};

// Inputs: x, w, scales, biases, indices; the product p takes row p / per_row of x.
class GatherMatmul : public Fused {
 public:
  GatherMatmul(mx::Stream stream, Format format, int64_t per_row)
      : Fused(stream), format_(format), per_row_(per_row) {}

  const char* name() const override {
    return "ZmlxGatherQuantizedMatmul";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const GatherMatmul&>(other);
    return format_ == o.format_ && per_row_ == o.per_row_;
  }

  Arrays stock(const Arrays& in) const override {
    return {stock_gather(in[0], in, 1, format_, in[4])};
  }

  void run(Operands in, const View& out) const override {
    const Ordered x(*in[0]), indices(*in[4]);
    const WeightOperand weight(in, 1, format_);
    gather_product(weight.experts(), routing_of(indices, per_row_), rows_of(x), rows_of(out));
  }

 private:
  Format format_;
  int64_t per_row_;
};

// Inputs: x (T, K), indices (T, k), gate, up.
class GatherGlu : public Fused {
 public:
  GatherGlu(mx::Stream stream, Format gate, Format up, Activation activation)
      : Fused(stream), gate_(gate), up_(up), activation_(activation) {}

  const char* name() const override {
    return "ZmlxGatherQuantizedGlu";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const GatherGlu&>(other);
    return gate_ == o.gate_ && up_ == o.up_ && activation_ == o.activation_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {{in[1].shape(0), in[1].shape(1), in[2].shape(-2)}};
  }

  Arrays stock(const Arrays& in) const override {
    const mx::array x = mx::expand_dims(in[0], {1, 2});
    const mx::array gate = stock_gather(x, in, 2, gate_, in[1]);
    const mx::array up = stock_gather(x, in, 5, up_, in[1]);
    return {mx::squeeze(stock_activation(activation_, gate) * up, -2)};
  }

  void run(Operands in, const View& out) const override {
    const Ordered x(*in[0]), indices(*in[1]);
    const WeightOperand gate(in, 2, gate_), up(in, 5, up_);
    const Routing routing = routing_of(indices, indices.view().extent(1));
    gather_gated_product(
        gate.experts(), up.experts(), activation_, routing, rows_of(x), rows_of(out));
  }

 private:
  Format gate_, up_;
  Activation activation_;
};

// Inputs: h (T, k, K), indices (T, k), weights (T, k), w, scales, biases.
class GatherCombine : public Fused {
 public:
  GatherCombine(mx::Stream stream, Format format) : Fused(stream), format_(format) {}

  const char* name() const override {
    return "ZmlxGatherQuantizedCombine";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return format_ == static_cast<const GatherCombine&>(other).format_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    return {{in[0].shape(0), in[3].shape(-2)}};
  }

  Arrays stock(const Arrays& in) const override {
    const mx::array h = mx::expand_dims(in[0], -2);
    const mx::array y = mx::squeeze(stock_gather(h, in, 3, format_, in[1]), -2);
    return {mx::sum(y * mx::expand_dims(in[2], -1), -2)};
  }

  void run(Operands in, const View& out) const override {
    const Ordered h(*in[0]), indices(*in[1]), weights(*in[2]);
    const WeightOperand weight(in, 3, format_);
    gather_combine(
        weight.experts(),
        routing_of(indices, 1),
        rows_of(weights),
        indices.view().extent(1),
        rows_of(h),
        rows_of(out));
  }

 private:
  Format format_;
};

// ---------------------------------------------------------------------------------------------
// From arrays to primitives. What the kernels do not take becomes the stock operation, which also
// words the errors.

bool takes(const std::optional<mx::array>& bias, const WeightArray& weight) {
  return !bias ||
      (float_of(bias->dtype()) && bias->ndim() == 1 && bias->shape(0) == weight.w.shape(-2));
}

Activation activation_of(const std::string& name) {
  if (name == "silu") {
    return Activation::silu;
  }
  if (name == "gelu") {
    return Activation::gelu;
  }
  if (name == "gelu_tanh") {
    return Activation::gelu_tanh;
  }
  throw std::invalid_argument(
      "[zmlx] activation '" + name + "': expected silu, gelu or gelu_tanh");
}

mx::Dtype promoted(mx::Dtype type, const std::optional<mx::array>& other) {
  return other ? mx::promote_types(type, other->dtype()) : type;
}

// The type of x @ w.T in stock operations.
mx::Dtype product_type(const mx::array& x, const WeightArray& weight) {
  switch (weight.format.mode) {
    case Mode::affine:
      return promoted(x.dtype(), weight.scales);
    case Mode::dense:
      return mx::promote_types(x.dtype(), weight.w.dtype());
    default:
      return x.dtype();
  }
}

mx::array as_indices(const mx::array& indices) {
  return indices.dtype() == mx::uint32 ? indices : mx::astype(indices, mx::uint32);
}

} // namespace

mx::array quantized_matmul(
    const mx::array& x, const WeightArray& weight, const std::optional<mx::array>& bias) {
  Arrays inputs = {x};
  append(inputs, weight);
  if (bias) {
    inputs.push_back(*bias);
  }
  const auto stream = cpu_stream();
  auto primitive = std::make_shared<QuantizedMatmul>(
      stream.value_or(mx::Stream(0, mx::Device::cpu)), weight.format);
  if (!stream || !takes(weight, 2) || !takes(x, weight) || !takes(bias, weight)) {
    return primitive->stock(inputs)[0];
  }
  mx::Shape shape = x.shape();
  shape.back() = weight.w.shape(0);
  const mx::Dtype type = promoted(product_type(x, weight), bias);
  return made(std::move(shape), type, std::move(primitive), std::move(inputs));
}

mx::array quantized_glu(
    const mx::array& x,
    const WeightArray& gate,
    const WeightArray& up,
    const std::optional<mx::array>& gate_bias,
    const std::optional<mx::array>& up_bias,
    const std::string& activation) {
  Arrays inputs = {x};
  append(inputs, gate);
  append(inputs, up);
  for (const auto& bias : {gate_bias, up_bias}) {
    if (bias) {
      inputs.push_back(*bias);
    }
  }
  const auto stream = cpu_stream();
  auto primitive = std::make_shared<QuantizedGlu>(
      stream.value_or(mx::Stream(0, mx::Device::cpu)),
      gate.format,
      up.format,
      activation_of(activation),
      gate_bias.has_value(),
      up_bias.has_value());
  if (!stream || !takes(gate, 2) || !takes(up, 2) || !takes(x, gate) || !takes(x, up) ||
      !takes(gate_bias, gate) || !takes(up_bias, up) || gate.w.shape(0) != up.w.shape(0)) {
    return primitive->stock(inputs)[0];
  }
  mx::Shape shape = x.shape();
  shape.back() = gate.w.shape(0);
  const mx::Dtype gates = promoted(product_type(x, gate), gate_bias);
  const mx::Dtype ups = promoted(product_type(x, up), up_bias);
  return made(
      std::move(shape), mx::promote_types(gates, ups), std::move(primitive), std::move(inputs));
}

mx::array gather_quantized_matmul(
    const mx::array& x, const WeightArray& weight, const mx::array& indices) {
  const auto stream = cpu_stream();
  // Either one row for each index, or one row for all indices of the last axis.
  mx::Shape batch(x.shape().begin(), x.shape().end() - std::min<size_t>(2, x.ndim()));
  const bool each = batch == indices.shape();
  int64_t per_row = 1;
  if (!each && !batch.empty() && batch.back() == 1 && batch.size() == indices.ndim()) {
    per_row = indices.shape(-1);
    batch.back() = int(per_row);
  }
  Arrays inputs = {x};
  append(inputs, weight);
  inputs.push_back(as_indices(indices));
  auto primitive = std::make_shared<GatherMatmul>(
      stream.value_or(mx::Stream(0, mx::Device::cpu)), weight.format, per_row);
  if (!stream || !takes(weight, 3) || !takes(x, weight) || x.ndim() < 3 || x.shape(-2) != 1 ||
      batch != indices.shape() || indices.size() == 0) {
    return primitive->stock(inputs)[0];
  }
  mx::Shape shape = indices.shape();
  shape.push_back(1);
  shape.push_back(weight.w.shape(1));
  const mx::Dtype type = product_type(x, weight);
  return made(std::move(shape), type, std::move(primitive), std::move(inputs));
}

mx::array gather_quantized_glu(
    const mx::array& x,
    const mx::array& indices,
    const WeightArray& gate,
    const WeightArray& up,
    const std::string& activation) {
  Arrays inputs = {x, as_indices(indices)};
  append(inputs, gate);
  append(inputs, up);
  const auto stream = cpu_stream();
  auto primitive = std::make_shared<GatherGlu>(
      stream.value_or(mx::Stream(0, mx::Device::cpu)),
      gate.format,
      up.format,
      activation_of(activation));
  if (x.ndim() != 2 || indices.ndim() != 2 || x.shape(0) != indices.shape(0)) {
    throw std::invalid_argument(
        "[zmlx] gather_quantized_glu: expected x (T, K) and indices (T, k)");
  }
  if (!stream || !takes(gate, 3) || !takes(up, 3) || !takes(x, gate) || !takes(x, up) ||
      gate.w.shape(0) != up.w.shape(0) || gate.w.shape(1) != up.w.shape(1) ||
      indices.size() == 0) {
    return primitive->stock(inputs)[0];
  }
  mx::Shape shape = {indices.shape(0), indices.shape(1), gate.w.shape(1)};
  const mx::Dtype type = mx::promote_types(product_type(x, gate), product_type(x, up));
  return made(std::move(shape), type, std::move(primitive), std::move(inputs));
}

mx::array gather_quantized_combine(
    const mx::array& h,
    const mx::array& indices,
    const mx::array& weights,
    const WeightArray& weight) {
  if (h.ndim() != 3 || indices.ndim() != 2 || weights.shape() != indices.shape() ||
      h.shape(0) != indices.shape(0) || h.shape(1) != indices.shape(1)) {
    throw std::invalid_argument(
        "[zmlx] gather_quantized_combine: expected h (T, k, K), indices (T, k), weights (T, k)");
  }
  Arrays inputs = {h, as_indices(indices), weights};
  append(inputs, weight);
  const auto stream = cpu_stream();
  auto primitive = std::make_shared<GatherCombine>(
      stream.value_or(mx::Stream(0, mx::Device::cpu)), weight.format);
  if (!stream || !takes(weight, 3) || !takes(h, weight) || !float_of(weights.dtype()) ||
      indices.size() == 0) {
    return primitive->stock(inputs)[0];
  }
  mx::Shape shape = {h.shape(0), weight.w.shape(1)};
  const mx::Dtype type = mx::promote_types(product_type(h, weight), weights.dtype());
  return made(std::move(shape), type, std::move(primitive), std::move(inputs));
}

} // namespace zmlx
