#include "weights.h"

#include <algorithm>
#include <stdexcept>

namespace zmlx {

const char* name_of(Mode mode) {
  constexpr const char* names[] = {"affine", "mxfp4", "nvfp4", "mxfp8", "dense"};
  return names[int(mode)];
}

Mode mode_of(const std::string& name) {
  for (const Mode mode : {Mode::affine, Mode::mxfp4, Mode::nvfp4, Mode::mxfp8, Mode::dense}) {
    if (name == name_of(mode)) {
      return mode;
    }
  }
  throw std::invalid_argument(
      "[zmlx] mode '" + name + "': expected affine, mxfp4, nvfp4, mxfp8 or dense");
}

Code code_of(Format format, mx::Dtype values) {
  switch (format.mode) {
    case Mode::mxfp4:
    case Mode::nvfp4:
      return Code::e2m1;
    case Mode::mxfp8:
      return Code::e4m3;
    case Mode::dense:
      return values == mx::float32 ? Code::f32 : values == mx::float16 ? Code::f16 : Code::bf16;
    default:
      return format.bits == 8 ? Code::u8 : Code(int(Code::u2) + format.bits - 2);
  }
}

WeightArray weight_at(const Arrays& in, size_t at, Format format) {
  WeightArray weight{in[at], std::nullopt, std::nullopt, format};
  if (format.mode != Mode::dense) {
    weight.scales = in[at + 1];
  }
  if (format.mode == Mode::affine) {
    weight.biases = in[at + 2];
  }
  return weight;
}

Weight WeightOperand::weight() const {
  Weight found = stored();
  found.short_activations = format_.short_activations;
  return found;
}

Weight WeightOperand::stored() const {
  const int64_t rows = w_.view().extent(-2), last = scales_.view().extent(-1);
  const Code code = code_of(format_, w_.view().dtype);
  const auto* q = static_cast<const uint8_t*>(w_.data());
  switch (format_.mode) {
    case Mode::affine:
      return {q, scales_.data(), biases_.data(), rows, last * format_.group_size, code,
              format_.group_size, scale_of(scales_.type())};
    case Mode::dense:
      return {q, nullptr, nullptr, rows, last, code, last, Scale::f32};
    default:
      return {q, scales_.data(), nullptr, rows, last * format_.group_size, code,
              format_.group_size, format_.mode == Mode::nvfp4 ? Scale::e4m3 : Scale::e8m0};
  }
}

void append(Arrays& inputs, const WeightArray& weight) {
  const mx::array& scales = weight.scales.value_or(weight.w);
  inputs.insert(inputs.end(), {weight.w, scales, weight.biases.value_or(scales)});
}

int64_t inputs_of(const WeightArray& weight) {
  return weight.format.mode == Mode::dense
      ? int64_t(weight.w.shape(-1))
      : int64_t(weight.scales->shape(-1)) * weight.format.group_size;
}

namespace {

bool takes(const Format& format) {
  const int bits = format.bits, group = format.group_size;
  switch (format.mode) {
    case Mode::affine:
      return bits >= 2 && bits <= 8 && bits != 7 && (group == 32 || group == 64 || group == 128);
    case Mode::mxfp8:
      return bits == 8 && group == 32;
    default:
      return bits == 4 && group == (format.mode == Mode::nvfp4 ? 16 : 32);
  }
}

bool takes_scales(const WeightArray& weight, size_t ndim) {
  if (!weight.scales || weight.scales->ndim() != ndim) {
    return false;
  }
  const mx::array& scales = *weight.scales;
  if (weight.format.mode == Mode::affine) {
    if (!float_of(scales.dtype()) || !weight.biases ||
        weight.biases->dtype() != scales.dtype() || weight.biases->shape() != scales.shape()) {
      return false;
    }
  } else if (scales.dtype() != mx::uint8 || weight.biases) {
    return false;
  }
  return std::equal(scales.shape().begin(), scales.shape().end() - 1, weight.w.shape().begin());
}

} // namespace

bool takes(const WeightArray& weight, size_t ndim) {
  if (weight.w.ndim() != ndim || weight.w.size() == 0) {
    return false;
  }
  if (weight.format.mode == Mode::dense) {
    return float_of(weight.w.dtype()).has_value() && !weight.scales && !weight.biases;
  }
  return takes(weight.format) && weight.w.dtype() == mx::uint32 && takes_scales(weight, ndim) &&
      int64_t(weight.w.shape(-1)) * 32 == inputs_of(weight) * weight.format.bits;
}

bool takes(const mx::array& x, const WeightArray& weight) {
  return x.ndim() > 0 && x.size() > 0 && float_of(x.dtype()) &&
      int64_t(x.shape(-1)) == inputs_of(weight);
}

Rows rows_of(const Ordered& operand) {
  const View& view = operand.view();
  const int64_t width = view.extent(-1);
  return {operand.data(), view.type(), width == 0 ? 0 : view.size / width, width};
}

Rows rows_of(const View& output) {
  const int64_t width = output.extent(-1);
  return {output.data, output.type(), output.size / width, width};
}

} // namespace zmlx
