#include "step_primitives.h"

#include <array>
#include <cmath>

#include "floats.h"
#include "fused.h"
#include "mlx/fast.h"
#include "pool.h"
#include "step.h"

namespace zmlx {
namespace {

// Elements that one thread handles faster than it would wake another.
constexpr int64_t kSerial = 32768;

// An operand whose last axis lies in order: as it lies, or as a copy.
class Strided {
 public:
  explicit Strided(const View& view) : view_(view), data_(view.data), strides_(view.strides) {
    const int last = view.ndim() - 1;
    if (last < 0 || view.shape[last] == 1 || view.strides[last] == 1) {
      return;
    }
    copy_.emplace(view);
    data_ = static_cast<const char*>(copy_->data());
    strides_ = View(view.shape, view.dtype).strides;
  }

  const char* at(std::initializer_list<int64_t> index) const {
    int64_t offset = 0;
    size_t axis = 0;
    for (int64_t i : index) {
      offset += i * strides_[axis++];
    }
    return data_ + offset * int64_t(view_.item());
  }

  // The row of a number, where rows are counted over all axes but the last.
  const char* row(int64_t number) const {
    int64_t offset = 0;
    for (int axis = view_.ndim() - 2; axis >= 0; --axis) {
      offset += number % view_.shape[axis] * strides_[axis];
      number /= view_.shape[axis];
    }
    return data_ + offset * int64_t(view_.item());
  }

  int64_t stride(int axis) const {
    return strides_[axis];
  }

  const View& view() const {
    return view_;
  }

  Float type() const {
    return view_.type();
  }

 private:
  const View& view_;
  const char* data_;
  mx::Strides strides_;
  std::optional<Ordered> copy_;
};

// Call work(first, last, worker) for ranges of [0, count), on one thread where the work is small.
template <class Work>
void in_ranges(int64_t count, int64_t cost, Work work) {
  const int64_t per_task =
      count * cost <= kSerial ? count : std::max<int64_t>(1, kSerial / std::max<int64_t>(1, cost));
  parallel((count + per_task - 1) / per_task, [&](int64_t task, int worker) {
    work(task * per_task, std::min(count, (task + 1) * per_task), worker);
  });
}

class RmsNorm : public Fused {
 public:
  RmsNorm(mx::Stream stream, float eps) : Fused(stream), eps_(eps) {}

  const char* name() const override {
    return "ZmlxRmsNorm";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return eps_ == static_cast<const RmsNorm&>(other).eps_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape()};
  }

  Arrays stock(const Arrays& in) const override {
    const auto weight = in.size() > 1 ? std::optional<mx::array>(in[1]) : std::nullopt;
    return {mx::fast::rms_norm(in[0], weight, eps_)};
  }

  std::optional<mx::array> over_rows(const Arrays& in) const override {
    return rms_norm(in[0], in.size() > 1 ? std::optional<mx::array>(in[1]) : std::nullopt, eps_);
  }

  void run(Operands in, const View& out) const override {
    const Strided x(*in[0]);
    std::optional<Ordered> weight;
    if (in.size() > 1) {
      weight.emplace(*in[1]);
    }
    const int64_t width = out.extent(-1), rows = out.size / width;
    const void* factors = weight ? weight->data() : nullptr;
    const Float factor_type = weight ? weight->type() : Float::f32;
    in_ranges(rows, width, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row) {
        void* at = out.data + row * width * int64_t(out.item());
        step().rms_norm(
            x.row(row), x.type(), factors, factor_type, eps_, width, at, out.type());
      }
    });
  }

 private:
  float eps_;
};

// A vocabulary is long: its parts are summed by themselves, whatever the number of threads.
class LogSumExp : public Fused {
 public:
  using Fused::Fused;

  const char* name() const override {
    return "ZmlxLogSumExp";
  }

  bool is_equivalent(const mx::Primitive&) const override {
    return true;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() = 1;
    return {shape};
  }

  Arrays stock(const Arrays& in) const override {
    return {mx::logsumexp(in[0], -1, true)};
  }

  std::optional<mx::array> over_rows(const Arrays& in) const override {
    return log_sum_exp(in[0]);
  }

  void run(Operands in, const View& out) const override {
    const Strided x(*in[0]);
    const int64_t width = in[0]->extent(-1), parts = (width + kPart - 1) / kPart;
    std::vector<float> largest(parts), sums(parts);
    for (int64_t row = 0; row < out.size; ++row) {
      const char* from = x.row(row);
      in_ranges(parts, kPart, [&](int64_t first, int64_t last, int) {
        for (int64_t part = first; part < last; ++part) {
          const int64_t begin = part * kPart, count = std::min(kPart, width - begin);
          step().exponentials(
              from + begin * in[0]->item(), x.type(), count, &largest[part], &sums[part]);
        }
      });
      store_float(out.data, out.type(), row, combined(largest, sums));
    }
  }

 private:
  static constexpr int64_t kPart = 8192;

  // What a part's exponents are relative to.
  static float shift_of(float largest) {
    return std::isinf(largest) ? 0.0f : largest;
  }

  static float combined(const std::vector<float>& largest, const std::vector<float>& sums) {
    const float shift = shift_of(*std::max_element(largest.begin(), largest.end()));
    float sum = 0;
    for (size_t part = 0; part < sums.size(); ++part) {
      sum += sums[part] == 0 ? 0 : sums[part] * std::exp(shift_of(largest[part]) - shift);
    }
    return std::log(sum) + shift;
  }
};

// ---------------------------------------------------------------------------------------------

// How a rotary embedding turns with the position: by a base, or by given frequencies.
struct Turning {
  int half;
  bool traditional;
  bool by_base;
  float base;
  float scale;

  bool operator==(const Turning&) const = default;
};

// Cosines and sines of consecutive positions. The layers of a model ask for the same ones.
struct Angles {
  Turning turning{};
  std::vector<float> freqs;
  int64_t first = 0;
  int64_t count = 0;
  std::vector<float> cosines, sines;

  void compute(const Turning& t, const std::vector<float>& given, int64_t from, int64_t n) {
    turning = t;
    freqs = given;
    first = from;
    count = n;
    cosines.resize(size_t(n) * t.half);
    sines.resize(size_t(n) * t.half);
    for (int i = 0; i < t.half; ++i) {
      const double inverse = t.by_base
          ? std::exp(-double(i) * std::log(double(t.base)) / t.half)
          : 1.0 / double(given[i]);
      for (int64_t p = 0; p < n; ++p) {
        const double angle = double(from + p) * double(t.scale) * inverse;
        cosines[p * t.half + i] = float(std::cos(angle));
        sines[p * t.half + i] = float(std::sin(angle));
      }
    }
  }
};

const Angles& angles_of(const Turning& t, const std::vector<float>& freqs, int64_t from, int64_t n) {
  thread_local std::array<Angles, 4> known;
  thread_local size_t oldest = 0;
  for (const Angles& angles : known) {
    if (angles.count == n && angles.first == from && angles.turning == t && angles.freqs == freqs) {
      return angles;
    }
  }
  Angles& angles = known[oldest++ % known.size()];
  angles.compute(t, freqs, from, n);
  return angles;
}

// Inputs: x (B, ..., T, D), then the offset where it is an array, then freqs where they are given.
class Rope : public Fused {
 public:
  Rope(mx::Stream stream, Turning turning, std::optional<int> offset)
      : Fused(stream), turning_(turning), offset_(offset) {}

  const char* name() const override {
    return "ZmlxRope";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Rope&>(other);
    return turning_ == o.turning_ && offset_ == o.offset_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape()};
  }

  Arrays stock(const Arrays& in) const override {
    const auto base = turning_.by_base ? std::optional<float>(turning_.base) : std::nullopt;
    const auto freqs = turning_.by_base ? std::nullopt : std::optional<mx::array>(in.back());
    const mx::array offset = offset_ ? mx::array(*offset_, mx::int32) : in[1];
    return {mx::fast::rope(
        in[0], 2 * turning_.half, turning_.traditional, base, turning_.scale, offset, freqs)};
  }

  void run(Operands in, const View& out) const override {
    const Strided x(*in[0]);
    std::optional<Ordered> offsets, given;
    if (!offset_) {
      offsets.emplace(*in[1]);
    }
    std::vector<float> freqs;
    if (!turning_.by_base) {
      given.emplace(*in.back());
      const float* from = static_cast<const float*>(given->data());
      freqs.assign(from, from + turning_.half);
    }
    const int64_t width = out.extent(-1), length = out.extent(-2), batch = out.extent(0);
    const int64_t per_batch = out.size / (batch * width);
    const bool each = offsets && offsets->view().size > 1;
    const size_t row_bytes = size_t(width) * out.item();
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t from =
          offsets ? static_cast<const int32_t*>(offsets->data())[each ? b : 0] : *offset_;
      const Angles& angles = angles_of(turning_, freqs, from, length);
      in_ranges(per_batch, width, [&](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t at = i % length * turning_.half, row = b * per_batch + i;
          step().rotate(
              x.row(row), x.type(), angles.cosines.data() + at, angles.sines.data() + at,
              turning_.half, turning_.traditional, width, out.data + row * row_bytes);
        }
      });
    }
  }

 private:
  Turning turning_;
  std::optional<int> offset_;
};

// ---------------------------------------------------------------------------------------------

// Inputs: queries, keys, values, then the mask, broadcast to (B, H, L, S), where there is one.
class Attention : public Fused {
 public:
  Attention(mx::Stream stream, float scale, Mask mask)
      : Fused(stream), scale_(scale), mask_(mask) {}

  const char* name() const override {
    return "ZmlxAttention";
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Attention&>(other);
    return scale_ == o.scale_ && mask_ == o.mask_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& in) override {
    mx::Shape shape = in[0].shape();
    shape.back() = in[2].shape(-1);
    return {shape};
  }

  Arrays stock(const Arrays& in) const override {
    const auto mask = in.size() > 3 ? std::optional<mx::array>(in[3]) : std::nullopt;
    const std::string mode = mask_ == Mask::causal ? "causal" : "";
    return {mx::fast::scaled_dot_product_attention(in[0], in[1], in[2], scale_, mode, mask)};
  }

  void run(Operands in, const View& out) const override {
    Operand s{Strided(*in[0]), Strided(*in[1]), Strided(*in[2]), nullptr, out};
    std::optional<Strided> mask;
    if (in.size() > 3) {
      s.mask = &mask.emplace(*in[3]);
    }
    const auto& q = s.queries.view().shape;
    const int64_t heads = s.keys.view().extent(1), keys = s.keys.view().extent(2);
    const int64_t length = q[2], shared = q[1] / heads;
    // Queries that meet the same keys: those of all heads that share them, position by position.
    const int64_t groups = (shared * length + kRows - 1) / kRows;
    const int64_t cost = kRows * keys * (q[3] + out.extent(3));
    thread_local std::vector<std::vector<float>> own(kMaxThreads);
    auto& scratch = own;
    in_ranges(q[0] * heads * groups, cost, [&](int64_t first, int64_t last, int worker) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t b = task / (heads * groups), h = task / groups % heads;
        attend(s, b, h, task % groups * kRows, shared, length, keys, scratch[worker]);
      }
    });
  }

 private:
  static constexpr int64_t kRows = 4;

  struct Operand {
    Strided queries, keys, values;
    const Strided* mask;
    const View& out;
  };

  void attend(
      const Operand& s, int64_t b, int64_t head, int64_t first, int64_t shared, int64_t length,
      int64_t keys, std::vector<float>& scratch) const {
    AttentionRows a{};
    a.type = s.queries.type();
    a.rows = std::min(kRows, shared * length - first);
    a.key_width = s.queries.view().extent(3);
    a.value_width = s.out.extent(3);
    a.scale = scale_;
    a.key = s.keys.at({b, head});
    a.key_stride = s.keys.stride(2);
    a.value = s.values.at({b, head});
    a.value_stride = s.values.stride(2);
    a.mask = mask_;
    a.keys = mask_ == Mask::causal ? 0 : keys;
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t h = head * shared + (first + r) / length, l = (first + r) % length;
      a.queries[r] = s.queries.at({b, h, l});
      const int64_t row = (b * s.out.extent(1) + h) * length + l;
      a.out[r] = s.out.data + row * a.value_width * int64_t(s.out.item());
      a.visible[r] = keys - length + l + 1;
      if (mask_ == Mask::causal) {
        a.keys = std::max(a.keys, a.visible[r]);
      }
      if (s.mask != nullptr) {
        a.masks[r] = s.mask->at({b, h, l});
        a.mask_stride = s.mask->stride(3);
      }
    }
    a.keys = std::clamp<int64_t>(a.keys, 1, keys);
    scratch.resize(std::max<size_t>(scratch.size(), size_t(a.rows * a.keys)));
    step().attend(a, scratch.data());
  }

  float scale_;
  Mask mask_;
};

bool same_head_shapes(const mx::array& q, const mx::array& k, const mx::array& v) {
  return q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && q.size() > 0 && k.size() > 0 &&
      v.size() > 0 && q.shape(0) == k.shape(0) && q.shape(0) == v.shape(0) &&
      k.shape(1) == v.shape(1) && k.shape(2) == v.shape(2) && q.shape(3) == k.shape(3) &&
      q.shape(1) % k.shape(1) == 0;
}

} // namespace

mx::array rms_norm(const mx::array& x, const std::optional<mx::array>& weight, float eps) {
  const auto stream = cpu_stream();
  const bool fits = !weight ||
      (weight->ndim() == 1 && float_of(weight->dtype()) && x.ndim() > 0 &&
       weight->shape(0) == x.shape(-1));
  if (!stream || !fits || x.ndim() == 0 || x.size() == 0 || !float_of(x.dtype())) {
    return mx::fast::rms_norm(x, weight, eps);
  }
  Arrays inputs = {x};
  mx::Dtype type = x.dtype();
  if (weight) {
    inputs.push_back(*weight);
    type = mx::promote_types(type, weight->dtype());
  }
  return made(x.shape(), type, std::make_shared<RmsNorm>(*stream, eps), std::move(inputs));
}

mx::array log_sum_exp(const mx::array& x) {
  const auto stream = cpu_stream();
  if (!stream || x.ndim() == 0 || x.size() == 0 || !float_of(x.dtype())) {
    return mx::logsumexp(x, -1, true);
  }
  mx::Shape shape = x.shape();
  shape.back() = 1;
  return made(std::move(shape), x.dtype(), std::make_shared<LogSumExp>(*stream), {x});
}

mx::array rope(
    const mx::array& x,
    int dims,
    bool traditional,
    std::optional<float> base,
    float scale,
    const std::variant<int, mx::array>& offset,
    const std::optional<mx::array>& freqs) {
  const auto stream = cpu_stream();
  const bool by_number = std::holds_alternative<int>(offset);
  const mx::array at =
      by_number ? mx::array(std::get<int>(offset), mx::int32) : std::get<mx::array>(offset);
  const bool one_of = base.has_value() != freqs.has_value();
  const bool offset_fits = by_number ||
      (at.dtype() == mx::int32 && at.ndim() <= 1 &&
       (at.size() == 1 || (x.ndim() > 0 && int64_t(at.size()) == x.shape(0))));
  const bool freqs_fit = !freqs || (freqs->ndim() == 1 && freqs->shape(0) == dims / 2);
  if (!stream || !one_of || !offset_fits || !freqs_fit || x.ndim() < 3 || x.size() == 0 ||
      !float_of(x.dtype()) || dims <= 0 || dims % 2 != 0 || dims > x.shape(-1)) {
    return mx::fast::rope(x, dims, traditional, base, scale, at, freqs);
  }
  Arrays inputs = {x};
  if (!by_number) {
    inputs.push_back(at);
  }
  if (freqs) {
    inputs.push_back(mx::astype(*freqs, mx::float32));
  }
  const Turning turning{dims / 2, traditional, base.has_value(), base.value_or(1.0f), scale};
  const auto fixed = by_number ? std::optional<int>(std::get<int>(offset)) : std::nullopt;
  return made(
      x.shape(), x.dtype(), std::make_shared<Rope>(*stream, turning, fixed), std::move(inputs));
}

mx::array attention(
    const mx::array& queries,
    const mx::array& keys,
    const mx::array& values,
    float scale,
    const std::variant<std::monostate, std::string, mx::array>& mask,
    const std::optional<mx::array>& sinks) {
  const auto stream = cpu_stream();
  const mx::Dtype type = mx::promote_types(
      mx::promote_types(queries.dtype(), keys.dtype()), values.dtype());
  const auto* mode = std::get_if<std::string>(&mask);
  const auto* given = std::get_if<mx::array>(&mask);
  const bool mask_fits = (mode == nullptr || *mode == "causal" || mode->empty()) &&
      (given == nullptr ||
       (given->ndim() <= 4 &&
        (given->dtype() == mx::bool_ || mx::promote_types(given->dtype(), type) == type)));
  if (!stream || sinks || !mask_fits || !float_of(type) ||
      !same_head_shapes(queries, keys, values)) {
    return mx::fast::scaled_dot_product_attention(
        queries,
        keys,
        values,
        scale,
        mode != nullptr ? *mode : "",
        given != nullptr ? std::optional<mx::array>(*given) : std::nullopt,
        sinks);
  }
  Arrays inputs;
  for (const mx::array& one : {queries, keys, values}) {
    inputs.push_back(one.dtype() == type ? one : mx::astype(one, type));
  }
  Mask kind = mode != nullptr && !mode->empty() ? Mask::causal : Mask::none;
  if (given != nullptr) {
    kind = given->dtype() == mx::bool_ ? Mask::allowed : Mask::added;
    const mx::array typed = kind == Mask::added && given->dtype() != type
        ? mx::astype(*given, type)
        : *given;
    mx::Shape shape = queries.shape();
    shape.back() = keys.shape(2);
    inputs.push_back(mx::broadcast_to(typed, shape));
  }
  mx::Shape shape = queries.shape();
  shape.back() = values.shape(3);
  return made(
      std::move(shape), type, std::make_shared<Attention>(*stream, scale, kind), std::move(inputs));
}

} // namespace zmlx
