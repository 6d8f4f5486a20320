// An evaluated array as kernels see it: where it lies and how, whoever owns the memory.
#pragma once

#include <cstring>
#include <optional>
#include <vector>

#include "kernels.h"
#include "mlx/array.h"

namespace zmlx {

namespace mx = mlx::core;

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

// Whether the elements lie in order without gaps; axes of one element have any stride.
inline bool row_contiguous(const mx::Shape& shape, const mx::Strides& strides) {
  int64_t expected = 1;
  for (int axis = int(shape.size()) - 1; axis >= 0; --axis) {
    if (shape[axis] != 1 && strides[axis] != expected) {
      return false;
    }
    expected *= shape[axis];
  }
  return true;
}

struct View {
  char* data = nullptr;
  mx::Dtype dtype = mx::float32;
  mx::Shape shape;
  mx::Strides strides; // in elements
  int64_t size = 0;

  View() = default;

  // Elements in order, at an address that may still be unknown.
  View(const mx::Shape& shape, mx::Dtype dtype, char* data = nullptr)
      : data(data), dtype(dtype), shape(shape), strides(shape.size(), 1), size(1) {
    for (int axis = int(shape.size()) - 1; axis >= 0; --axis) {
      strides[axis] = size;
      size *= shape[axis];
    }
  }

  explicit View(const mx::array& array)
      : data(const_cast<char*>(array.data<char>())),
        dtype(array.dtype()),
        shape(array.shape()),
        strides(array.strides()),
        size(int64_t(array.size())) {}

  int ndim() const {
    return int(shape.size());
  }
  // Of an axis, or with a negative number counted from the end.
  int64_t extent(int axis) const {
    return shape[axis < 0 ? ndim() + axis : axis];
  }
  size_t item() const {
    return dtype.size();
  }
  size_t bytes() const {
    return size_t(size) * item();
  }
  Float type() const {
    return *float_of(dtype);
  }
  bool dense() const {
    return size == 0 || row_contiguous(shape, strides);
  }
};

// A view in the shape of `like`: axes that it lacks, or has one element of, are repeated.
View repeated(const View& in, const View& like);

// Copy elements between views of one shape and dtype.
void copy_elements(const View& from, const View& to);

// The elements of a view in order: as they lie, or as a copy.
class Ordered {
 public:
  explicit Ordered(const View& view) : view_(view), data_(view.data) {
    if (!view.dense()) {
      copy_.resize(view.bytes());
      data_ = copy_.data();
      copy_elements(view, View(view.shape, view.dtype, copy_.data()));
    }
  }
  Ordered(const Ordered&) = delete;
  Ordered& operator=(const Ordered&) = delete;

  void* data() const {
    return data_;
  }
  const View& view() const {
    return view_;
  }
  Float type() const {
    return view_.type();
  }

 private:
  const View& view_;
  std::vector<char> copy_;
  char* data_;
};

} // namespace zmlx
