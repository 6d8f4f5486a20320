// Metal kernels on the CPU, and their faults, for Python.
#include "emulator_binding.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <tuple>

#include "emulated.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace zmlx {
namespace {

using Numbers = std::tuple<uint32_t, uint32_t, uint32_t>;

emulator::Triple triple_of(const Numbers& numbers) {
  return {std::get<0>(numbers), std::get<1>(numbers), std::get<2>(numbers)};
}

using Held = std::shared_ptr<Kernel>;
constexpr const char* kCapsule = "zmlx emulated kernel";

Held kernel_of(const nb::capsule& capsule) {
  return *static_cast<Held*>(capsule.data(kCapsule));
}

// Makes a Python exception of a fault: (kind, text, kernel, thread, library, offset, place).
nb::object& fault_exception() {
  static nb::object* function = new nb::object(); // lives as long as the interpreter
  return *function;
}

void raise(const std::exception_ptr& caught, void*) {
  try {
    std::rethrow_exception(caught);
  } catch (const emulator::Fault& fault) {
    if (!fault_exception().is_valid()) {
      throw; // of another copy of this library
    }
    const nb::object made = fault_exception()(
        int(fault.kind), fault.text, fault.kernel, fault.thread, fault.library, fault.offset,
        fault.place);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
  }
}

} // namespace

void bind_emulator(nb::module_& m) {
  // In a capsule: a class would be one for all copies of this library in a process.
  m.def(
      "load_kernel",
      [](const std::string& file, const std::string& name,
         const std::vector<std::tuple<int, int, std::string>>& parts,
         bool ensure_row_contiguous) {
        std::vector<Parameter> parameters;
        for (const auto& [part, index, parameter] : parts) {
          parameters.push_back({Part(part), index, parameter});
        }
        auto kernel = std::make_unique<Held>(
            std::make_shared<Kernel>(file, name, std::move(parameters), ensure_row_contiguous));
        return nb::capsule(kernel.release(), kCapsule, [](void* held) noexcept {
          delete static_cast<Held*>(held);
        });
      },
      "file"_a, "name"_a, "parameters"_a, "ensure_row_contiguous"_a);
  m.def("threadgroup_bytes", [](const nb::capsule& kernel) {
    return kernel_of(kernel)->library.shared().device_bytes();
  });
  m.def(
      "emulate",
      [](const nb::capsule& kernel, std::vector<mx::array> inputs,
         const std::vector<std::vector<int>>& shapes, const std::vector<mx::Dtype>& dtypes,
         const Numbers& grid, const Numbers& threadgroup, std::optional<float> init_value,
         bool may_leave_unwritten, std::optional<mx::Stream> stream) {
        std::vector<mx::Shape> all;
        for (const auto& shape : shapes) {
          all.emplace_back(shape.begin(), shape.end());
        }
        return emulate(
            kernel_of(kernel), std::move(inputs), all, dtypes, triple_of(grid),
            triple_of(threadgroup), init_value, may_leave_unwritten, stream);
      },
      "kernel"_a, "inputs"_a, "shapes"_a, "dtypes"_a, nb::kw_only(), "grid"_a, "threadgroup"_a,
      "init_value"_a = nb::none(), "may_leave_unwritten"_a = false, "stream"_a = nb::none());
  m.def("set_fault_exception", [](nb::object function) {
    fault_exception() = std::move(function);
  });
  nb::register_exception_translator(raise);
}

} // namespace zmlx
