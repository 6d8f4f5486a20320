// Metal kernels, compiled for the CPU, as lazy MLX operations.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "emulator_launch.h"
#include "mlx/array.h"

namespace zmlx {

namespace mx = mlx::core;

// What a parameter of a kernel is given; `updated` is an input that the kernel may write into.
enum class Part : int { data, shape, strides, ndim, output, absent, updated };

struct Parameter {
  Part part;
  int index; // of the input or output
  std::string name;
};

// A compiled kernel and how it takes its arguments.
struct Kernel {
  emulator::Library library;
  std::string name;
  std::vector<Parameter> parameters;
  bool ensure_row_contiguous;

  Kernel(
      const std::string& file, std::string name, std::vector<Parameter> parameters,
      bool ensure_row_contiguous)
      : library(file),
        name(std::move(name)),
        parameters(std::move(parameters)),
        ensure_row_contiguous(ensure_row_contiguous) {}
};

// One launch. Evaluation throws emulator::Fault when the kernel does what it must not.
std::vector<mx::array> emulate(
    std::shared_ptr<Kernel> kernel, std::vector<mx::array> inputs,
    const std::vector<mx::Shape>& shapes, const std::vector<mx::Dtype>& dtypes,
    emulator::Triple grid, emulator::Triple threadgroup, std::optional<float> init_value,
    bool may_leave_unwritten, std::optional<mx::Stream> stream);

} // namespace zmlx
