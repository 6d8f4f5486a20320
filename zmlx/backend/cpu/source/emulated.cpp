#include "emulated.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "fused.h"

namespace zmlx {
namespace {

using emulator::Buffer;
using emulator::Triple;

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
      if (buffers[i].writable) {
        put_back(kernel_->parameters[i], buffers[i], views, outputs);
      }
    }
  }

 private:
  bool copied(const View& view) const {
    return kernel_->ensure_row_contiguous && !view.dense();
  }

  // Copies what a kernel wrote: all of an output; of an input only the elements that were written,
  // since between them may lie those of another one.
  static void put_back(
      const Parameter& parameter, const Buffer& buffer, const std::vector<View>& views,
      Arrays& outputs) {
    if (buffer.bytes == 0) {
      return;
    }
    if (parameter.part == Part::output) {
      std::memcpy(outputs[parameter.index].data<char>(), buffer.data, buffer.bytes);
      return;
    }
    const View& view = views[parameter.index];
    char* const first = view.data - Extent(view).before;
    for (size_t i = 0; i < buffer.writers.size(); ++i) {
      if (buffer.writers[i].group != 0) {
        std::memcpy(first + i * buffer.item, buffer.data + i * buffer.item, buffer.item);
      }
    }
  }

  Buffer buffer_of(
      const Parameter& parameter, const Arrays& inputs, const std::vector<View>& views,
      const Arrays& outputs) const {
    Buffer buffer;
    buffer.name = parameter.name;
    const auto ndim = [&] { return size_t(views[parameter.index].ndim()); };
    switch (parameter.part) {
      case Part::data:
      case Part::updated: {
        const View& view = views[parameter.index];
        buffer.item = view.item();
        buffer.writable = parameter.part == Part::updated;
        if (copied(view)) {
          buffer.bytes = view.bytes();
        } else {
          const Extent extent(view);
          buffer.bytes = extent.bytes;
          // On a device memory begins at a page, and a slice somewhere in it.
          buffer.misalignment =
              size_t(inputs[parameter.index].offset() - extent.before) % 64;
        }
        if (buffer.writable) {
          buffer.writers.resize(buffer.bytes / buffer.item);
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
      case Part::data:
      case Part::updated: {
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

} // namespace

std::vector<mx::array> emulate(
    std::shared_ptr<Kernel> kernel, std::vector<mx::array> inputs,
    const std::vector<mx::Shape>& shapes, const std::vector<mx::Dtype>& dtypes, Triple grid,
    Triple threadgroup, std::optional<float> init_value, bool may_leave_unwritten,
    std::optional<mx::Stream> stream) {
  const mx::Stream where = stream && stream->device == mx::Device::cpu
      ? *stream
      : mx::default_stream(mx::Device::cpu);
  return mx::array::make_arrays(
      shapes, dtypes,
      std::make_shared<Emulated>(
          where, std::move(kernel), grid, threadgroup, init_value, may_leave_unwritten),
      std::move(inputs));
}

} // namespace zmlx
