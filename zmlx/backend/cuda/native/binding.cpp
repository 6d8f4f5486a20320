// The Python module: recordings, and the operation that launches one.
#include <cassert>

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "mlx/backend/cuda/device.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace zmlx {
namespace {

using Arrays = std::vector<mx::array>;

// Inputs: those that are copied, then the buffers. Outputs: the results.
class Replay : public mx::Primitive {
 public:
  Replay(mx::Stream stream, std::shared_ptr<Recording> recording)
      : mx::Primitive(stream), recording_(std::move(recording)) {}

  const char* name() const override {
    return "ZmlxReplay";
  }

  void eval_cpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("[zmlx] a recording runs on CUDA only");
  }

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    for (const mx::array& input : inputs) {
      if (!input.flags().row_contiguous) {
        throw std::invalid_argument("[zmlx] a recording got an array that is not in row order");
      }
    }
    auto& encoder = mx::cu::get_command_encoder(stream());
    // What MLX has built so far runs before, what it builds from now on after.
    encoder.commit();
    recording_->launch(CUstream(cudaStream_t(encoder.stream())), inputs, outputs);
  }

 private:
  std::shared_ptr<Recording> recording_;
};

// What Python holds; a recording lives on while something is to launch it.
struct Held {
  std::shared_ptr<Recording> recording;
};

using PythonArgument = std::tuple<int, size_t, uint64_t, nb::bytes>;
using PythonLaunch = std::tuple<
    size_t, std::array<unsigned, 3>, std::array<unsigned, 3>, std::vector<PythonArgument>>;
using PythonPart = std::pair<uint64_t, uint64_t>;

std::vector<Part> parts_of(const std::vector<PythonPart>& given) {
  std::vector<Part> parts;
  for (const auto& [offset, bytes] : given) {
    parts.push_back({offset, bytes});
  }
  return parts;
}

Held record(
    const std::vector<std::pair<nb::bytes, std::string>>& functions, size_t mover,
    const std::vector<PythonLaunch>& launches, const std::vector<PythonPart>& inputs,
    const std::vector<PythonPart>& results, size_t buffers, const mx::array& arena,
    const Arrays& fixed, bool overlapped) {
  Plan plan;
  plan.mover = mover;
  plan.inputs = parts_of(inputs);
  plan.results = parts_of(results);
  plan.buffers = buffers;
  plan.overlapped = overlapped;
  for (const auto& [binary, name] : functions) {
    plan.functions.emplace_back(std::string(binary.c_str(), binary.size()), name);
  }
  for (const auto& [function, grid, block, arguments] : launches) {
    Launch& launch = plan.launches.emplace_back(Launch{function, grid, block, {}});
    for (const auto& [base, index, offset, bytes] : arguments) {
      launch.arguments.push_back(
          {Base(base), index, offset, std::string(bytes.c_str(), bytes.size())});
    }
  }
  // MLX computes in other threads' contexts, too; this one may have had none yet.
  mx::cu::device(mx::default_device()).make_current();
  return {std::make_shared<Recording>(std::move(plan), arena, fixed)};
}

Arrays replay(
    const Held& held, const Arrays& inputs, const std::vector<std::vector<int>>& shapes,
    const std::vector<mx::Dtype>& dtypes) {
  std::vector<mx::Shape> wanted;
  for (const auto& shape : shapes) {
    wanted.emplace_back(shape.begin(), shape.end());
  }
  return mx::array::make_arrays(
      std::move(wanted), dtypes, std::make_shared<Replay>(mx::to_stream({}), held.recording),
      inputs);
}

} // namespace
} // namespace zmlx

NB_MODULE(_zmlx_replay, m) {
  nb::module_::import_("mlx.core");
  nb::class_<zmlx::Places>(m, "Places")
      .def(nb::init<zmlx::Arrays>(), "arrays"_a)
      .def("moved", &zmlx::Places::moved);
  nb::class_<zmlx::Held>(m, "Recording").def_prop_ro("overlapped", [](const zmlx::Held& held) {
    return held.recording->overlapped();
  });
  m.def(
      "record", &zmlx::record, "functions"_a, "mover"_a, "launches"_a, "inputs"_a, "results"_a,
      "buffers"_a, "arena"_a, "fixed"_a, "overlapped"_a);
  m.def("replay", &zmlx::replay, "recording"_a, "inputs"_a, "shapes"_a, "dtypes"_a);
  m.attr("most_moves") = zmlx::kMostMoves;
}
