#include "lookup.h"

#include <algorithm>

#include "floats.h"
#include "fused.h"
#include "pool.h"
#include "weights.h"

namespace zmlx {
namespace {

// A value of a row as the integer or float that it is stored as.
template <Code code>
inline float stored(const uint8_t* row, int64_t k) {
  if constexpr (dense(code)) {
    return load_float(row, float_of(code), k);
  } else if constexpr (code == Code::e4m3) {
    return from_e4m3(row[k]);
  }
  constexpr int bits = bits_of(code);
  const int64_t bit = k * bits;
  uint32_t word = row[bit / 8];
  if (bit % 8 + bits > 8) {
    word |= uint32_t(row[bit / 8 + 1]) << 8;
  }
  const uint32_t value = word >> (bit % 8) & ((1u << bits) - 1);
  return code == Code::e2m1 ? 0.5f * float(kTwiceE2m1[value & 15]) : float(value);
}

void copy_row(const Weight& weight, int64_t n, const Rows& out, int64_t to) {
  const uint8_t* row = weight.q + n * weight.row_bytes();
  with_code(weight.code, [&](auto code) {
    for (int64_t g = 0; g < weight.groups(); ++g) {
      float scale = 1.0f, bias = 0.0f;
      if constexpr (!dense(code.value)) {
        scale = load_scale(weight, n * weight.groups() + g);
      }
      if constexpr (affine(code.value)) {
        bias = load_bias(weight, n * weight.groups() + g);
      }
      for (int64_t k = g * weight.group; k < (g + 1) * weight.group; ++k) {
        const float value = stored<code.value>(row, k);
        const float result = dense(code.value) ? value : scale * value + bias;
        store_float(out.row(to), out.type, k, result);
      }
    }
  });
}

int64_t index_at(const View& indices, const void* data, int64_t i) {
  if (indices.dtype == mx::int64) {
    return static_cast<const int64_t*>(data)[i];
  }
  return indices.dtype == mx::uint32 ? int64_t(static_cast<const uint32_t*>(data)[i])
                                     : int64_t(static_cast<const int32_t*>(data)[i]);
}

// Inputs: indices, weight.
class Lookup : public Fused {
 public:
  Lookup(mx::Stream stream, Format format) : Fused(stream), format_(format) {}

  const char* name() const override {
    return "ZmlxLookup";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return format_ == static_cast<const Lookup&>(other).format_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    mx::Shape shape = in[0].shape();
    shape.push_back(int(inputs_of(weight_at(in, 1, format_))));
    return {shape};
  }

  Arrays stock(const Arrays& in) const override {
    const WeightArray weight = weight_at(in, 1, format_);
    const auto chosen = [&](const mx::array& part) { return mx::take(part, in[0], 0); };
    if (format_.mode == Mode::dense) {
      return {chosen(weight.w)};
    }
    const auto biases =
        weight.biases ? std::optional<mx::array>(chosen(*weight.biases)) : std::nullopt;
    return {mx::dequantize(
        chosen(weight.w), chosen(*weight.scales), biases, format_.group_size, format_.bits,
        name_of(format_.mode))};
  }

  void run(Operands in, const View& out) const override {
    const Ordered indices(*in[0]);
    const WeightOperand operand(in, 1, format_);
    const Weight weight = operand.weight();
    const Rows rows = rows_of(out);
    parallel(rows.count, [&](int64_t i, int) {
      const int64_t index = index_at(*in[0], indices.data(), i);
      const int64_t row = index < 0 ? index + weight.rows : index;
      copy_row(weight, std::clamp<int64_t>(row, 0, weight.rows - 1), rows, i);
    });
  }

 private:
  Format format_;
};

bool takes_indices(const mx::array& indices) {
  const mx::Dtype type = indices.dtype();
  return indices.size() > 0 && (type == mx::int32 || type == mx::uint32 || type == mx::int64);
}

} // namespace

mx::array lookup(const mx::array& indices, const WeightArray& weight) {
  Arrays inputs = {indices};
  append(inputs, weight);
  const auto stream = cpu_stream();
  auto primitive = std::make_shared<Lookup>(
      stream.value_or(mx::Stream(0, mx::Device::cpu)), weight.format);
  if (!stream || !takes(weight, 2) || !takes_indices(indices)) {
    return primitive->stock(inputs)[0];
  }
  mx::Shape shape = indices.shape();
  shape.push_back(int(inputs_of(weight)));
  const mx::Dtype type = weight.format.mode == Mode::affine ? weight.scales->dtype()
      : weight.format.mode == Mode::dense                   ? weight.w.dtype()
                                                            : mx::bfloat16;
  return made(std::move(shape), type, std::move(primitive), std::move(inputs));
}

} // namespace zmlx
