#include "arithmetic.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "floats.h"
#include "mlx/primitives.h"
#include "step.h"

namespace zmlx {
namespace {

// Routers choose among so many; longer rows are left to stock's vector code.
constexpr int64_t kLongestRow = 1024;

bool of_floats(const mx::array& out) {
  return float_of(out.dtype()) && float_of(out.inputs()[0].dtype());
}

template <class P>
const P& as(const mx::array& out) {
  return static_cast<const P&>(out.primitive());
}

bool is_last(int axis, const mx::array& of) {
  return axis == -1 || axis == int(of.ndim()) - 1;
}

template <Binary kind>
void run_binary(mx::Primitive&, Operands in, const View& out) {
  View a = *in[0], b = *in[1];
  for (View* side : {&a, &b}) {
    *side = repeated(*side, out);
  }
  const int last = out.ndim() - 1;
  const auto step_of = [&](const View& v) {
    return last < 0 || out.shape[last] == 1 ? 0 : v.strides[last];
  };
  if (a.dense() && b.dense()) {
    return step().binary(kind, a.data, 1, b.data, 1, out.type(), out.size, out.data);
  }
  const int64_t width = last < 0 ? 1 : out.shape[last], rows = out.size / std::max<int64_t>(1, width);
  const int64_t item = int64_t(out.item());
  for (int64_t row = 0; row < rows; ++row) {
    int64_t rest = row, from_a = 0, from_b = 0;
    for (int axis = last - 1; axis >= 0; --axis) {
      const int64_t index = rest % out.shape[axis];
      rest /= out.shape[axis];
      from_a += index * a.strides[axis];
      from_b += index * b.strides[axis];
    }
    step().binary(
        kind, a.data + from_a * item, step_of(a), b.data + from_b * item, step_of(b), out.type(),
        width, out.data + row * width * item);
  }
}

void run_astype(mx::Primitive&, Operands in, const View& out) {
  const Ordered x(*in[0]);
  step().convert(x.data(), x.type(), out.size, out.data, out.type());
}

template <float (*function)(float)>
void run_unary(mx::Primitive&, Operands in, const View& out) {
  const Ordered x(*in[0]);
  for (int64_t i = 0; i < out.size; ++i) {
    store_float(out.data, out.type(), i, function(load_float(x.data(), x.type(), i)));
  }
}

float negative(float x) {
  return -x;
}

float sigmoid(float x) {
  return 1.0f / (1.0f + std::exp(-x));
}

// ---------------------------------------------------------------------------------------------
// Along the last axis, as routers do

bool takes_rows(const mx::array& out) {
  return of_floats(out) && out.inputs()[0].shape(-1) <= kLongestRow;
}

void run_softmax(mx::Primitive&, Operands in, const View& out) {
  const Ordered x(*in[0]);
  const int64_t width = out.extent(-1);
  std::vector<float> row(width);
  for (int64_t from = 0; from < out.size; from += width) {
    float most = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t i = 0; i < width; ++i) {
      row[i] = load_float(x.data(), x.type(), from + i);
      most = std::max(most, row[i]);
    }
    for (float& value : row) {
      value = std::exp(value - most);
      sum += value;
    }
    for (int64_t i = 0; i < width; ++i) {
      store_float(out.data, out.type(), from + i, row[i] / sum);
    }
  }
}

bool takes_sum(const mx::array& out) {
  const auto [kind, axes] = as<mx::Reduce>(out).state();
  return kind == mx::Reduce::Sum && axes.size() == 1 && is_last(axes[0], out.inputs()[0]) &&
      takes_rows(out);
}

void run_sum(mx::Primitive&, Operands in, const View& out) {
  const Ordered x(*in[0]);
  const int64_t width = in[0]->extent(-1);
  for (int64_t row = 0; row < out.size; ++row) {
    float sum = 0;
    for (int64_t i = 0; i < width; ++i) {
      sum += load_float(x.data(), x.type(), row * width + i);
    }
    store_float(out.data, out.type(), row, sum);
  }
}

bool takes_extreme(const mx::array& out) {
  const mx::array& x = out.inputs()[0];
  return is_last(as<mx::ArgReduce>(out).state().second, x) && float_of(x.dtype()) && x.ndim() > 0 &&
      out.dtype() == mx::uint32;
}

void run_extreme(mx::Primitive& primitive, Operands in, const View& out) {
  const auto kind = static_cast<mx::ArgReduce&>(primitive).state().first;
  const Ordered x(*in[0]);
  const int64_t width = in[0]->extent(-1);
  uint32_t* to = reinterpret_cast<uint32_t*>(out.data);
  for (int64_t row = 0; row < out.size; ++row) {
    const char* from = static_cast<const char*>(x.data()) + row * width * int64_t(in[0]->item());
    to[row] = uint32_t(step().extreme(from, x.type(), width, kind == mx::ArgReduce::ArgMin));
  }
}

bool takes_partition(const mx::array& out) {
  const mx::array& x = out.inputs()[0];
  return is_last(as<mx::ArgPartition>(out).state().second, x) && float_of(x.dtype()) &&
      out.dtype() == mx::uint32 && x.shape(-1) <= kLongestRow;
}

// As stock: the same algorithm on the same order, in which NaN is last, so ties fall the same way.
void run_partition(mx::Primitive& primitive, Operands in, const View& out) {
  const int kth = static_cast<mx::ArgPartition&>(primitive).state().first;
  const Ordered x(*in[0]);
  const int64_t width = out.extent(-1);
  std::vector<float> row(width);
  for (int64_t from = 0; from < out.size; from += width) {
    for (int64_t i = 0; i < width; ++i) {
      row[i] = load_float(x.data(), x.type(), from + i);
    }
    uint32_t* order = reinterpret_cast<uint32_t*>(out.data) + from;
    std::iota(order, order + width, 0u);
    const int64_t middle = kth < 0 ? kth + width : kth;
    std::nth_element(order, order + middle, order + width, [&](uint32_t a, uint32_t b) {
      if (std::isnan(row[a]) || std::isnan(row[b])) {
        return !std::isnan(row[a]);
      }
      return row[a] < row[b] || (row[a] == row[b] && a < b);
    });
  }
}

bool takes_gather(const mx::array& out) {
  const Arrays& in = out.inputs();
  const mx::Dtype index = in[1].dtype();
  return is_last(as<mx::GatherAxis>(out).state(), in[0]) && float_of(out.dtype()) &&
      (index == mx::uint32 || index == mx::int32) && in[0].ndim() == in[1].ndim() &&
      std::equal(in[0].shape().begin(), in[0].shape().end() - 1, in[1].shape().begin());
}

void run_gather(mx::Primitive&, Operands in, const View& out) {
  const Ordered x(*in[0]), indices(*in[1]);
  const int64_t width = in[0]->extent(-1), chosen = out.extent(-1);
  const size_t item = out.item();
  const int32_t* at = static_cast<const int32_t*>(indices.data());
  for (int64_t i = 0; i < out.size; ++i) {
    const int64_t index = at[i] < 0 ? at[i] + width : at[i];
    const char* from = static_cast<const char*>(x.data()) + (i / chosen * width + index) * item;
    std::memcpy(out.data + i * item, from, item);
  }
}

// ---------------------------------------------------------------------------------------------

// x (B, T + K - 1, C), w (C, K, 1): each channel by itself, nothing added at the ends.
bool takes_depthwise(const mx::array& out) {
  const auto [strides, low, high, dilation, input_dilation, groups, flip] =
      as<mx::Convolution>(out).state();
  const mx::array &x = out.inputs()[0], &w = out.inputs()[1];
  return x.ndim() == 3 && groups == x.shape(2) && w.shape(0) == groups && w.shape(2) == 1 &&
      strides == std::vector<int>{1} && low == std::vector<int>{0} &&
      high == std::vector<int>{0} && dilation == std::vector<int>{1} &&
      input_dilation == std::vector<int>{1} && !flip && of_floats(out) &&
      w.dtype() == x.dtype() && out.dtype() == x.dtype();
}

void run_depthwise(mx::Primitive&, Operands in, const View& out) {
  const Ordered x(*in[0]), w(*in[1]);
  const int64_t batch = out.extent(0), length = out.extent(1), channels = out.extent(2);
  const int64_t taps = in[1]->extent(1), rows = in[0]->extent(1);
  std::vector<float> weights(taps * channels), sums(channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < taps; ++k) {
      weights[k * channels + c] = load_float(w.data(), w.type(), c * taps + k);
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < length; ++t) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t row = (b * rows + t + k) * channels;
        for (int64_t c = 0; c < channels; ++c) {
          sums[c] += weights[k * channels + c] * load_float(x.data(), x.type(), row + c);
        }
      }
      const int64_t to = (b * length + t) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        store_float(out.data, out.type(), to + c, sums[c]);
      }
    }
  }
}

constexpr Operation kArithmetic[] = {
    {"Add", of_floats, nullptr, run_binary<Binary::add>},
    {"Subtract", of_floats, nullptr, run_binary<Binary::subtract>},
    {"Multiply", of_floats, nullptr, run_binary<Binary::multiply>},
    {"Divide", of_floats, nullptr, run_binary<Binary::divide>},
    {"AsType", of_floats, nullptr, run_astype},
    {"Negative", of_floats, nullptr, run_unary<negative>},
    {"Sigmoid", of_floats, nullptr, run_unary<sigmoid>},
    {"Softmax", takes_rows, nullptr, run_softmax},
    {"Reduce", takes_sum, nullptr, run_sum},
    {"ArgReduce", takes_extreme, nullptr, run_extreme},
    {"ArgPartition", takes_partition, nullptr, run_partition},
    {"GatherAxis", takes_gather, nullptr, run_gather},
    {"Convolution", takes_depthwise, nullptr, run_depthwise},
};

} // namespace

std::span<const Operation> arithmetic() {
  return kArithmetic;
}

} // namespace zmlx
