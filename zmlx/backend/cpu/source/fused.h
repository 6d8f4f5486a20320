// What the primitives of this library share: inputs, and transformations by stock operations.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"
#include "view.h"

namespace zmlx {

using Arrays = std::vector<mx::array>;
using Operands = std::span<const View* const>;

// A primitive whose gradients, batching and second meaning are those of stock operations.
class Fused : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  // The same computation in stock operations.
  virtual Arrays stock(const Arrays& inputs) const = 0;

  // Compute into memory that is there, from inputs that have been computed.
  virtual void run(Operands inputs, const View& output) const = 0;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    mx::array& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    struct Task {
      std::shared_ptr<mx::Primitive> primitive;
      std::vector<View> views;
      std::vector<const View*> operands;
    };
    auto task = std::make_shared<Task>();
    task->primitive = out.primitive_ptr();
    task->views.reserve(inputs.size() + 1);
    for (const mx::array& input : inputs) {
      task->operands.push_back(&task->views.emplace_back(input));
    }
    task->views.emplace_back(out);
    mx::cpu::get_command_encoder(stream()).dispatch([task] {
      static_cast<const Fused&>(*task->primitive).run(task->operands, task->views.back());
    });
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

inline std::optional<mx::Stream> cpu_stream() {
  const mx::Stream stream = mx::to_stream({});
  return stream.device == mx::Device::cpu ? std::optional<mx::Stream>(stream) : std::nullopt;
}

inline mx::array made(
    mx::Shape shape, mx::Dtype type, std::shared_ptr<mx::Primitive> primitive, Arrays inputs) {
  return mx::array(std::move(shape), type, std::move(primitive), std::move(inputs));
}

} // namespace zmlx
