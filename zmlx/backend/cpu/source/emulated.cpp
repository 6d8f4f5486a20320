#include "emulated.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "emulator_launch.h"
#include "fused.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace zmlx {
namespace {

using emulator::Buffer;
using emulator::Triple;

// What a parameter of a kernel is given.
enum class Part : int { data, shape, strides, ndim, output, absent };

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
      const std::string& file, std::string name,
      const std::vector<std::tuple<int, int, std::string>>& parts, bool ensure_row_contiguous)
      : library(file), name(std::move(name)), ensure_row_contiguous(ensure_row_contiguous) {
    for (const auto& [part, index, parameter] : parts) {
      parameters.push_back({Part(part), index, parameter});
    }
  }
};

// The bytes from the first to the last element of an array, and where the first one in memory lies.
struct Extent {
  int64_t before = 0; // bytes of elements that lie before element (0, 0, ...)
  size_t bytes = 0;

  explicit Extent(const View& view) {
    if (view.size == 0) {
      return;
    }
    int64_t after = 0;
    for (int axis = 0; axis < view.ndim(); ++axis) {
      const int64_t reach =
          (view.shape[axis] - 1) * view.strides[axis] * int64_t(view.item());
      (reach < 0 ? before : after) += std::abs(reach);
    }
    bytes = size_t(before + after) + view.item();
  }
};

class Emulated : public mx::Primitive {
 public:
  Emulated(
      mx::Stream stream, std::shared_ptr<Kernel> kernel, Triple grid, Triple threadgroup,
      std::optional<float> init_value, bool may_leave_unwritten)
      : Primitive(stream),
        kernel_(std::move(kernel)),
        grid_(grid),
        threadgroup_(threadgroup),
        init_value_(init_value),
        may_leave_unwritten_(may_leave_unwritten) {}

  const char* name() const override {
    return "ZmlxEmulated";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Emulated&>(other);
    return kernel_ == o.kernel_ && grid_ == o.grid_ && threadgroup_ == o.threadgroup_ &&
        init_value_ == o.init_value_ && may_leave_unwritten_ == o.may_leave_unwritten_;
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("[emulator] runs on the CPU only");
  }

  // Runs here and now: what it throws then reaches the caller of eval, and no array counts as
  // computed. What was put in the queue before has to be computed first.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    mx::synchronize(stream());
    std::vector<Buffer> buffers;
    buffers.reserve(kernel_->parameters.size());
    std::vector<View> views(inputs.begin(), inputs.end());
    for (mx::array& out : outputs) {
      out.set_data(mx::allocator::malloc(out.nbytes()));
    }
    for (const Parameter& parameter : kernel_->parameters) {
      buffers.push_back(buffer_of(parameter, inputs, views, outputs));
    }
    emulator::Memory memory(buffers);
    std::vector<void*> arguments;
    for (size_t i = 0; i < buffers.size(); ++i) {
      arguments.push_back(fill(kernel_->parameters[i], buffers[i], views, outputs));
    }
    emulator::Launch(
        kernel_->library, kernel_->name, buffers, memory, std::move(arguments), grid_,
        threadgroup_)
        .run();
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (buffers[i].writable && buffers[i].bytes != 0) {
        mx::array& out = outputs[kernel_->parameters[i].index];
        std::memcpy(out.data<char>(), buffers[i].data, buffers[i].bytes);
      }
    }
  }

 private:
  bool copied(const View& view) const {
    return kernel_->ensure_row_contiguous && !view.dense();
  }

  Buffer buffer_of(
      const Parameter& parameter, const Arrays& inputs, const std::vector<View>& views,
      const Arrays& outputs) const {
    Buffer buffer;
    buffer.name = parameter.name;
    const auto ndim = [&] { return size_t(views[parameter.index].ndim()); };
    switch (parameter.part) {
      case Part::data: {
        const View& view = views[parameter.index];
        buffer.item = view.item();
        if (copied(view)) {
          buffer.bytes = view.bytes();
        } else {
          const Extent extent(view);
          buffer.bytes = extent.bytes;
          // On a device memory begins at a page, and a slice somewhere in it.
          buffer.misalignment =
              size_t(inputs[parameter.index].offset() - extent.before) % 64;
        }
        break;
      }
      case Part::shape:
        buffer.item = sizeof(int32_t);
        buffer.bytes = ndim() * buffer.item;
        break;
      case Part::strides:
        buffer.item = sizeof(int64_t);
        buffer.bytes = ndim() * buffer.item;
        break;
      case Part::ndim:
        buffer.item = buffer.bytes = sizeof(int32_t);
        break;
      case Part::output: {
        const mx::array& out = outputs[parameter.index];
        buffer.item = out.itemsize();
        buffer.bytes = out.nbytes();
        buffer.writable = true;
        buffer.initialized = init_value_.has_value();
        buffer.may_stay_unwritten = may_leave_unwritten_;
        buffer.writers.resize(out.size());
        buffer.written.resize(buffer.initialized ? 0 : buffer.bytes);
        break;
      }
      case Part::absent:
        break;
    }
    return buffer;
  }

  // Copies what a parameter is given; returns what the kernel gets as its address.
  void* fill(
      const Parameter& parameter, const Buffer& buffer, const std::vector<View>& views,
      const Arrays& outputs) const {
    switch (parameter.part) {
      case Part::data: {
        const View& view = views[parameter.index];
        if (copied(view)) {
          copy_elements(view, View(view.shape, view.dtype, buffer.data));
          return buffer.data;
        }
        const Extent extent(view);
        if (buffer.bytes != 0) {
          std::memcpy(buffer.data, view.data - extent.before, buffer.bytes);
        }
        return buffer.data + extent.before;
      }
      case Part::shape: {
        const mx::Shape& shape = views[parameter.index].shape;
        std::copy(shape.begin(), shape.end(), reinterpret_cast<int32_t*>(buffer.data));
        break;
      }
      case Part::strides: {
        const View& view = views[parameter.index];
        const mx::Strides strides =
            copied(view) ? View(view.shape, view.dtype).strides : view.strides;
        std::copy(strides.begin(), strides.end(), reinterpret_cast<int64_t*>(buffer.data));
        break;
      }
      case Part::ndim:
        *reinterpret_cast<int32_t*>(buffer.data) = views[parameter.index].ndim();
        break;
      case Part::output:
        fill_output(buffer, outputs[parameter.index].dtype());
        break;
      case Part::absent:
        return nullptr;
    }
    return buffer.data;
  }

  void fill_output(const Buffer& buffer, mx::Dtype dtype) const {
    if (!init_value_) {
      std::memset(buffer.data, 0xff, buffer.bytes); // NaN, where the value can be one
      return;
    }
    const mx::array value(*init_value_, dtype);
    for (size_t at = 0; at < buffer.bytes; at += buffer.item) {
      std::memcpy(buffer.data + at, value.data<char>(), buffer.item);
    }
  }

  std::shared_ptr<Kernel> kernel_;
  Triple grid_;
  Triple threadgroup_;
  std::optional<float> init_value_;
  bool may_leave_unwritten_;
};

// Makes a Python exception of a fault: (kind, text, kernel, thread, library, offset, place).
nb::object& fault_exception() {
  static nb::object* function = new nb::object(); // lives as long as the interpreter
  return *function;
}

void raise(const std::exception_ptr& caught, void*) {
  try {
    std::rethrow_exception(caught);
  } catch (const emulator::Fault& fault) {
    const nb::object made = fault_exception()(
        int(fault.kind), fault.text, fault.kernel, fault.thread, fault.library, fault.offset,
        fault.place);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
  }
}

std::vector<mx::array> emulate(
    std::shared_ptr<Kernel> kernel, std::vector<mx::array> inputs,
    const std::vector<std::vector<int>>& shapes, const std::vector<mx::Dtype>& dtypes, Triple grid,
    Triple threadgroup, std::optional<float> init_value, bool may_leave_unwritten,
    std::optional<mx::Stream> stream) {
  std::vector<mx::Shape> all;
  for (const auto& shape : shapes) {
    all.emplace_back(shape.begin(), shape.end());
  }
  const mx::Stream where = stream && stream->device == mx::Device::cpu
      ? *stream
      : mx::default_stream(mx::Device::cpu);
  return mx::array::make_arrays(
      std::move(all), dtypes,
      std::make_shared<Emulated>(
          where, std::move(kernel), grid, threadgroup, init_value, may_leave_unwritten),
      std::move(inputs));
}

} // namespace

void bind_emulator(nb::module_& m) {
  nb::class_<Kernel>(m, "Kernel")
      .def(
          nb::init<
              const std::string&, std::string,
              const std::vector<std::tuple<int, int, std::string>>&, bool>(),
          "file"_a, "name"_a, "parameters"_a, "ensure_row_contiguous"_a)
      .def_prop_ro(
          "threadgroup_bytes",
          [](const Kernel& kernel) { return kernel.library.shared().device_bytes(); });
  m.def(
      "emulate",
      [](std::shared_ptr<Kernel> kernel, std::vector<mx::array> inputs,
         const std::vector<std::vector<int>>& shapes, const std::vector<mx::Dtype>& dtypes,
         std::tuple<uint32_t, uint32_t, uint32_t> grid,
         std::tuple<uint32_t, uint32_t, uint32_t> threadgroup, std::optional<float> init_value,
         bool may_leave_unwritten, std::optional<mx::Stream> stream) {
        const auto triple = [](const auto& tuple) {
          return Triple{std::get<0>(tuple), std::get<1>(tuple), std::get<2>(tuple)};
        };
        return emulate(
            std::move(kernel), std::move(inputs), shapes, dtypes, triple(grid),
            triple(threadgroup), init_value, may_leave_unwritten, stream);
      },
      "kernel"_a, "inputs"_a, "shapes"_a, "dtypes"_a, nb::kw_only(), "grid"_a, "threadgroup"_a,
      "init_value"_a = nb::none(), "may_leave_unwritten"_a = false, "stream"_a = nb::none());
  m.def("set_fault_exception", [](nb::object function) {
    fault_exception() = std::move(function);
  });
  nb::register_exception_translator(raise);
}

} // namespace zmlx
