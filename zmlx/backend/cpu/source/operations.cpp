#include "operations.h"

#include <string>
#include <string_view>
#include <typeindex>
#include <unordered_map>

#include "arithmetic.h"
#include "mlx/primitives.h"

namespace zmlx {
namespace {

template <class P>
P& as(mx::Primitive& primitive) {
  return static_cast<P&>(primitive);
}

bool always(const mx::array&) {
  return true;
}

// ---------------------------------------------------------------------------------------------
// Views

bool view_same(mx::Primitive&, const View& in, View* out, int) {
  out->data = in.data;
  out->strides = in.strides;
  return true;
}

bool view_reshaped(mx::Primitive&, const View& in, View* out, int) {
  out->data = in.data; // the strides of an ordered view are there already
  return in.dense();
}

bool view_transposed(mx::Primitive& primitive, const View& in, View* out, int) {
  const std::vector<int> axes = as<mx::Transpose>(primitive).state();
  out->data = in.data;
  for (size_t axis = 0; axis < axes.size(); ++axis) {
    out->strides[axis] = in.strides[axes[axis]];
  }
  return true;
}

// Axes of one element are added or taken away: the others keep their strides, in order.
bool view_singletons(mx::Primitive&, const View& in, View* out, int) {
  out->data = in.data;
  int from = 0;
  for (int axis = 0; axis < out->ndim(); ++axis) {
    if (out->shape[axis] == 1) {
      continue;
    }
    while (in.shape[from] == 1) {
      ++from;
    }
    out->strides[axis] = in.strides[from++];
  }
  return true;
}

bool view_broadcast(mx::Primitive&, const View& in, View* out, int) {
  *out = repeated(in, *out);
  return true;
}

// Let `out` lie where every stride-th element of `in` lies, from `start` on.
void cut(const View& in, const mx::Shape& start, const mx::Shape& strides, View* out) {
  int64_t offset = 0;
  for (int axis = 0; axis < in.ndim(); ++axis) {
    offset += int64_t(start[axis]) * in.strides[axis];
    out->strides[axis] = in.strides[axis] * strides[axis];
  }
  out->data = in.data + offset * int64_t(in.item());
}

bool view_slice(mx::Primitive& primitive, const View& in, View* out, int) {
  const auto [start, end, strides] = as<mx::Slice>(primitive).state();
  cut(in, start, strides, out);
  return true;
}

bool view_split(mx::Primitive& primitive, const View& in, View* outs, int count) {
  const auto [indices, axis] = as<mx::Split>(primitive).state();
  const int at = axis < 0 ? axis + in.ndim() : axis;
  for (int i = 0; i < count; ++i) {
    const int64_t start = i == 0 ? 0 : indices[i - 1];
    outs[i].data = in.data + start * in.strides[at] * int64_t(in.item());
    outs[i].strides = in.strides;
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// Copies

void run_concatenate(mx::Primitive& primitive, Operands in, const View& out) {
  const int axis = as<mx::Concatenate>(primitive).state();
  const int at = axis < 0 ? axis + out.ndim() : axis;
  View part = out;
  for (const View* one : in) {
    part.shape = one->shape;
    part.size = one->size;
    copy_elements(*one, part);
    part.data += one->shape[at] * out.strides[at] * int64_t(out.item());
  }
}

bool plain_update(const mx::array& out) {
  const auto& primitive = static_cast<const mx::SliceUpdate&>(out.primitive());
  return std::get<0>(primitive.state()) == mx::SliceUpdate::None &&
      out.inputs()[1].ndim() == out.ndim();
}

void run_copied_update(mx::Primitive& primitive, Operands in, const View& out) {
  copy_elements(*in[0], out);
  run_update(primitive, in, out);
}

constexpr Operation kOperations[] = {
    {"Reshape", always, view_reshaped, nullptr},
    {"Flatten", always, view_reshaped, nullptr},
    {"Unflatten", always, view_reshaped, nullptr},
    {"Transpose", always, view_transposed, nullptr},
    {"ExpandDims", always, view_singletons, nullptr},
    {"Squeeze", always, view_singletons, nullptr},
    {"Broadcast", always, view_broadcast, nullptr},
    {"Slice", always, view_slice, nullptr},
    {"Split", always, view_split, nullptr},
    {"StopGradient", always, view_same, nullptr},
    {"Contiguous", always, view_reshaped, nullptr},
    {"Concatenate", always, nullptr, run_concatenate},
    {"SliceUpdate", plain_update, nullptr, run_copied_update},
};

void run_fused(mx::Primitive& primitive, Operands in, const View& out) {
  static_cast<const Fused&>(primitive).run(in, out);
}

constexpr Operation kFused = {"", always, nullptr, run_fused};

// The operation of a kind of primitive, or null.
const Operation* recognised(mx::Primitive& primitive) {
  if (dynamic_cast<const Fused*>(&primitive) != nullptr) {
    return &kFused;
  }
  const std::string_view full = typeid(primitive).name();
  for (const auto table : {std::span<const Operation>(kOperations), arithmetic()}) {
    for (const Operation& operation : table) {
      // As the compiler writes mlx::core::Add: 3mlx, 4core, 3Add.
      const std::string name = operation.name;
      if (full == "N3mlx4core" + std::to_string(name.size()) + name + "E") {
        return &operation;
      }
    }
  }
  return nullptr;
}

} // namespace

const Operation* operation_of(const mx::array& array) {
  mx::Primitive& primitive = array.primitive();
  if (primitive.device() != mx::Device::cpu || array.size() == 0) {
    return nullptr;
  }
  thread_local std::unordered_map<std::type_index, const Operation*> known;
  const auto [entry, added] = known.try_emplace(typeid(primitive), nullptr);
  if (added) {
    entry->second = recognised(primitive);
  }
  const Operation* operation = entry->second;
  return operation != nullptr && operation->takes(array) ? operation : nullptr;
}

bool updates_first(const Operation& operation) {
  return operation.run == run_copied_update;
}

void run_update(mx::Primitive& primitive, Operands in, const View& out) {
  const auto [kind, start, end, strides] = as<mx::SliceUpdate>(primitive).state();
  View part = *in[1];
  cut(out, start, strides, &part);
  copy_elements(*in[1], part);
}

} // namespace zmlx
