// What the primitives of this library share: inputs, and transformations by stock operations.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"

namespace zmlx {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

inline std::optional<Float> float_of(mx::Dtype type) {
  if (type == mx::float32) {
    return Float::f32;
  }
  if (type == mx::float16) {
    return Float::f16;
  }
  if (type == mx::bfloat16) {
    return Float::bf16;
  }
  return std::nullopt;
}

// An evaluated input, read when the task runs: as it lies in memory, or as a contiguous copy.
class Input {
 public:
  explicit Input(const mx::array& array) : array_(mx::array::unsafe_weak_copy(array)) {}

  // Valid until the object goes; call it in the task.
  const void* data() {
    const char* from = array_.data<char>();
    if (array_.flags().row_contiguous || array_.size() == 0) {
      return from;
    }
    copy_.resize(array_.nbytes());
    char* to = copy_.data();
    copy(from, to, 0);
    return copy_.data();
  }

  Float type() const {
    return *float_of(array_.dtype());
  }

  const mx::array& array() const {
    return array_;
  }

 private:
  void copy(const char* from, char*& to, int axis) {
    const size_t item = array_.itemsize();
    if (axis == int(array_.ndim())) {
      std::memcpy(to, from, item);
      to += item;
      return;
    }
    for (int64_t i = 0; i < array_.shape(axis); ++i) {
      copy(from + i * array_.strides(axis) * int64_t(item), to, axis + 1);
    }
  }

  mx::array array_;
  std::vector<char> copy_;
};

// A primitive whose gradients, batching and second meaning are those of stock operations.
class Fused : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  // The same computation in stock operations.
  virtual Arrays stock(const Arrays& inputs) const = 0;

  // Compute on the CPU; runs on the stream's thread.
  virtual std::function<void()> task(const Arrays& inputs, mx::array& output) = 0;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    mx::array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch(task(inputs, out));
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string("[zmlx] ") + name() + " runs on the CPU only");
  }

  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums)
      override {
    Arrays chosen;
    for (int argnum : argnums) {
      chosen.push_back(primals[argnum]);
    }
    return mx::jvp(function_of(primals, argnums), chosen, tangents).second;
  }

  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays&) override {
    Arrays chosen;
    for (int argnum : argnums) {
      chosen.push_back(primals[argnum]);
    }
    return mx::vjp(function_of(primals, argnums), chosen, cotangents).second;
  }

  // The same operation on activations with one more axis in front, where that is all there is to it.
  virtual std::optional<mx::array> over_rows(const Arrays&) const {
    return std::nullopt;
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes)
      override {
    if (std::all_of(axes.begin() + 1, axes.end(), [](int axis) { return axis < 0; })) {
      Arrays moved = inputs;
      moved[0] = mx::moveaxis(inputs[0], axes[0], 0);
      if (const auto out = over_rows(moved)) {
        return {{*out}, {0}};
      }
    }
    auto mapped = mx::vmap([this](const Arrays& all) { return stock(all); }, axes);
    return {mapped(inputs), {0}};
  }

 private:
  // The stock computation as a function of some of its inputs; the others are held.
  std::function<Arrays(const Arrays&)> function_of(
      const Arrays& primals, const std::vector<int>& argnums) const {
    return [this, primals, argnums](const Arrays& chosen) {
      Arrays all = primals;
      for (size_t i = 0; i < argnums.size(); ++i) {
        all[argnums[i]] = chosen[i];
      }
      return stock(all);
    };
  }
};

// `std::function` copies what it holds, and an Input is not to be copied: hold it behind a pointer.
template <class State, class Run>
std::function<void()> task_with(State state, Run run) {
  auto shared = std::make_shared<State>(std::move(state));
  return [shared, run] { run(*shared); };
}

inline std::optional<mx::Stream> cpu_stream() {
  const mx::Stream stream = mx::to_stream({});
  return stream.device == mx::Device::cpu ? std::optional<mx::Stream>(stream) : std::nullopt;
}

inline mx::array made(
    mx::Shape shape, mx::Dtype type, std::shared_ptr<mx::Primitive> primitive, Arrays inputs) {
  return mx::array(std::move(shape), type, std::move(primitive), std::move(inputs));
}

} // namespace zmlx
