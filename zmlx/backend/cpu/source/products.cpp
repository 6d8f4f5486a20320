#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "floats.h"
#include "pool.h"
#include "step.h"

namespace zmlx {
namespace {

const Kernels* chosen_kernels = nullptr;

// Memory that a thread keeps between operations, unless it is large.
class Buffer {
 public:
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      size_ = memory_ ? bytes : 0;
      if (!memory_) {
        throw std::bad_alloc();
      }
    }
    return memory_.get();
  }

  void trim() {
    if (size_ > kKept) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr size_t kKept = size_t(8) << 20;
  std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
  size_t size_ = 0;
};

// What one operation needs beside its operands. Each stream of MLX has its own thread.
struct Workspace {
  Buffer packed, sums;
  std::vector<Buffer> scratch{kMaxThreads}, results{kMaxThreads}, extra{kMaxThreads};
};

// Lends the calling thread's workspace to one operation.
class Lent {
 public:
  Lent() : space_(own(0)), second_(own(1)) {}

  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;

  ~Lent() {
    for (Workspace* space : {&space_, &second_}) {
      space->packed.trim();
      space->sums.trim();
    }
    for (auto* buffers : {&space_.scratch, &space_.results, &space_.extra}) {
      for (int worker = 0; worker < num_threads(); ++worker) {
        (*buffers)[worker].trim();
      }
    }
  }

  Workspace& operator*() {
    return space_;
  }

  // For activations that are packed in two ways.
  Workspace& second() {
    return second_;
  }

 private:
  static Workspace& own(int index) {
    thread_local Workspace spaces[2];
    return spaces[index];
  }

  Workspace& space_;
  Workspace& second_;
};

// Products of consecutive positions in `order` that share an expert.
struct Segment {
  int64_t expert;
  int64_t first;
  int64_t count;
};

struct Plan {
  std::vector<int64_t> order; // positions, grouped by expert
  std::vector<Segment> segments;
  int64_t largest = 0;
};

Plan plan_of(const Routing& routing, int64_t experts) {
  const auto expert_of = [&](int64_t p) {
    return std::min<int64_t>(routing.indices[p], experts - 1);
  };
  Plan plan;
  plan.order.resize(routing.count);
  std::iota(plan.order.begin(), plan.order.end(), 0);
  std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) {
    return expert_of(a) < expert_of(b);
  });
  for (int64_t at = 0; at < routing.count; ++at) {
    const int64_t expert = expert_of(plan.order[at]);
    if (plan.segments.empty() || plan.segments.back().expert != expert) {
      plan.segments.push_back({expert, at, 0});
    }
    plan.largest = std::max(plan.largest, ++plan.segments.back().count);
  }
  return plan;
}

// One batch of all rows.
Batch pack_all(const Weight& like, const Rows& x, Workspace& space) {
  Batch batch{x.count, x.width, nullptr, nullptr};
  batch.data = space.packed.reserve(kernels().row_size(like, x.type, x.count) * x.count);
  batch.sums = static_cast<float*>(
      space.sums.reserve(sizeof(float) * size_t(like.groups()) * x.count));
  const int64_t per_task = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, x.width));
  parallel((x.count + per_task - 1) / per_task, [&](int64_t task, int) {
    const int64_t end = std::min(x.count, (task + 1) * per_task);
    for (int64_t row = task * per_task; row < end; ++row) {
      kernels().pack(like, x.row(row), x.type, batch, row);
    }
  });
  return batch;
}

// One batch for each segment. Where every expert has a single row, rows are packed once and shared.
std::vector<Batch> pack_segments(
    const Weight& like, const Routing& routing, const Plan& plan, const Rows& x, Workspace& space) {
  const bool shared = plan.largest == 1;
  const int64_t rows = shared ? x.count : routing.count;
  const size_t row_bytes = std::max(
      kernels().row_size(like, x.type, 1), kernels().row_size(like, x.type, plan.largest));
  char* data = static_cast<char*>(space.packed.reserve(row_bytes * rows));
  float* sums =
      static_cast<float*>(space.sums.reserve(sizeof(float) * size_t(like.groups()) * rows));
  const auto batch_at = [&](int64_t row, int64_t count) {
    return Batch{count, x.width, sums + row * like.groups(), data + row * row_bytes};
  };
  std::vector<Batch> batches;
  for (const Segment& segment : plan.segments) {
    const int64_t first = shared ? plan.order[segment.first] / routing.per_row : segment.first;
    batches.push_back(batch_at(first, segment.count));
  }
  if (shared) {
    parallel(rows, [&](int64_t row, int) {
      Batch alone = batch_at(row, 1);
      kernels().pack(like, x.row(row), x.type, alone, 0);
    });
    return batches;
  }
  parallel(int64_t(plan.segments.size()), [&](int64_t s, int) {
    const Segment& segment = plan.segments[s];
    for (int64_t i = 0; i < segment.count; ++i) {
      const int64_t position = plan.order[segment.first + i];
      kernels().pack(like, x.row(position / routing.per_row), x.type, batches[s], i);
    }
  });
  return batches;
}

// Width of the slices of a weight's rows that threads take: enough of them that all finish
// together, and each a whole number of panels.
int64_t slice_width(int64_t rows, int64_t products) {
  const int64_t wanted = rows * products / (8 * int64_t(num_threads()));
  return std::clamp<int64_t>((wanted + 31) / 32 * 32, 32, 256);
}

int64_t slices(int64_t rows, int64_t width) {
  return (rows + width - 1) / width;
}

void multiply(
    const Weight& weight,
    const Batch& batch,
    Float type,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride,
    Buffer& scratch) {
  void* memory = scratch.reserve(kernels().scratch_size(weight, type, batch.count));
  kernels().multiply(weight, batch, type, first, last, out, stride, memory);
}

float* floats(Buffer& buffer, int64_t count) {
  return static_cast<float*>(buffer.reserve(sizeof(float) * size_t(count)));
}

void add_bias(Bias bias, int64_t first, int64_t width, int64_t rows, float* values) {
  if (bias.data == nullptr) {
    return;
  }
  for (int64_t n = 0; n < width; ++n) {
    const float term = load_float(bias.data, bias.type, first + n);
    for (int64_t m = 0; m < rows; ++m) {
      values[m * width + n] += term;
    }
  }
}

void store_row(const float* values, int64_t first, int64_t width, const Rows& out, int64_t row) {
  void* to = out.row(row);
  for (int64_t n = 0; n < width; ++n) {
    store_float(to, out.type, first + n, values[n]);
  }
}

// A weight whose products are rounded to a type.
Weight rounded_to(Weight weight, Float results) {
  weight.results = results;
  return weight;
}

Experts rounded_to(Experts experts, Float results) {
  experts.weight.results = results;
  return experts;
}

bool same_packing(const Weight& a, const Weight& b) {
  return a.code == b.code && a.group == b.group && a.inputs == b.inputs &&
      a.short_activations == b.short_activations;
}

} // namespace

Weight Experts::expert(int64_t index) const {
  Weight one = weight;
  const size_t scale_bytes = size_t(weight.rows) * weight.groups() * weight.scale_size();
  one.q += size_t(index) * weight.rows * weight.row_bytes();
  if (!dense(weight.code)) {
    one.scales = static_cast<const char*>(weight.scales) + size_t(index) * scale_bytes;
  }
  if (affine(weight.code)) {
    one.biases = static_cast<const char*>(weight.biases) + size_t(index) * scale_bytes;
  }
  return one;
}

const Kernels& kernels() {
  return *chosen_kernels;
}

void set_kernels(const Kernels* chosen) {
  chosen_kernels = chosen;
}

void product(const Weight& given, Bias bias, const Rows& x, const Rows& out) {
  const Weight weight = rounded_to(given, out.type);
  Lent lent;
  Workspace& space = *lent;
  const Batch batch = pack_all(weight, x, space);
  const int64_t width = slice_width(weight.rows, 1);
  parallel(slices(weight.rows, width), [&](int64_t slice, int worker) {
    const int64_t first = slice * width, last = std::min(weight.rows, first + width);
    const int64_t columns = last - first;
    float* result = floats(space.results[worker], x.count * columns);
    multiply(weight, batch, x.type, first, last, result, columns, space.scratch[worker]);
    add_bias(bias, first, columns, x.count, result);
    for (int64_t row = 0; row < x.count; ++row) {
      store_row(result + row * columns, first, columns, out, row);
    }
  });
}

void gated_product(
    const Weight& gate,
    Bias gate_bias,
    const Weight& up,
    Bias up_bias,
    Activation activation,
    const Rows& x,
    const Rows& out) {
  const Weight gate_weight = rounded_to(gate, out.type), up_weight = rounded_to(up, out.type);
  Lent lent;
  Workspace& space = *lent;
  const Batch gate_batch = pack_all(gate_weight, x, space);
  const Batch up_batch =
      same_packing(gate_weight, up_weight) ? gate_batch : pack_all(up_weight, x, lent.second());
  const int64_t width = slice_width(gate_weight.rows, 1);
  parallel(slices(gate_weight.rows, width), [&](int64_t slice, int worker) {
    const int64_t first = slice * width, last = std::min(gate_weight.rows, first + width);
    const int64_t columns = last - first;
    float* gates = floats(space.results[worker], x.count * columns);
    float* ups = floats(space.extra[worker], x.count * columns);
    Buffer& scratch = space.scratch[worker];
    multiply(gate_weight, gate_batch, x.type, first, last, gates, columns, scratch);
    multiply(up_weight, up_batch, x.type, first, last, ups, columns, scratch);
    add_bias(gate_bias, first, columns, x.count, gates);
    add_bias(up_bias, first, columns, x.count, ups);
    step().gate(activation, gates, ups, x.count * columns);
    for (int64_t row = 0; row < x.count; ++row) {
      store_row(gates + row * columns, first, columns, out, row);
    }
  });
}

void gather_product(
    const Experts& given, const Routing& routing, const Rows& x, const Rows& out) {
  const Experts experts = rounded_to(given, out.type);
  Lent lent;
  Workspace& space = *lent;
  const Plan plan = plan_of(routing, experts.count);
  const std::vector<Batch> batches = pack_segments(experts.weight, routing, plan, x, space);
  const int64_t rows = experts.weight.rows;
  const int64_t width = slice_width(rows, int64_t(plan.segments.size()));
  const int64_t per_segment = slices(rows, width);
  parallel(per_segment * int64_t(plan.segments.size()), [&](int64_t task, int worker) {
    const Segment& segment = plan.segments[task / per_segment];
    const Batch& batch = batches[task / per_segment];
    const Weight weight = experts.expert(segment.expert);
    const int64_t first = task % per_segment * width, last = std::min(rows, first + width);
    const int64_t columns = last - first;
    float* result = floats(space.results[worker], segment.count * columns);
    multiply(weight, batch, x.type, first, last, result, columns, space.scratch[worker]);
    for (int64_t i = 0; i < segment.count; ++i) {
      store_row(result + i * columns, first, columns, out, plan.order[segment.first + i]);
    }
  });
}

void gather_gated_product(
    const Experts& gate,
    const Experts& up,
    Activation activation,
    const Routing& routing,
    const Rows& x,
    const Rows& out) {
  const Experts gates = rounded_to(gate, out.type), ups = rounded_to(up, out.type);
  Lent lent;
  Workspace& space = *lent;
  const Plan plan = plan_of(routing, gates.count);
  const std::vector<Batch> gate_batches = pack_segments(gates.weight, routing, plan, x, space);
  const std::vector<Batch> up_batches = same_packing(gates.weight, ups.weight)
      ? gate_batches
      : pack_segments(ups.weight, routing, plan, x, lent.second());
  const int64_t rows = gates.weight.rows;
  const int64_t width = slice_width(rows, int64_t(plan.segments.size()));
  const int64_t per_segment = slices(rows, width);
  parallel(per_segment * int64_t(plan.segments.size()), [&](int64_t task, int worker) {
    const int64_t s = task / per_segment;
    const Segment& segment = plan.segments[s];
    const Weight gate_weight = gates.expert(segment.expert);
    const Weight up_weight = ups.expert(segment.expert);
    const int64_t first = task % per_segment * width, last = std::min(rows, first + width);
    const int64_t columns = last - first;
    float* gate_result = floats(space.results[worker], segment.count * columns);
    float* up_result = floats(space.extra[worker], segment.count * columns);
    Buffer& scratch = space.scratch[worker];
    multiply(gate_weight, gate_batches[s], x.type, first, last, gate_result, columns, scratch);
    multiply(up_weight, up_batches[s], x.type, first, last, up_result, columns, scratch);
    step().gate(activation, gate_result, up_result, segment.count * columns);
    for (int64_t i = 0; i < segment.count; ++i) {
      store_row(gate_result + i * columns, first, columns, out, plan.order[segment.first + i]);
    }
  });
}

void gather_combine(
    const Experts& given,
    const Routing& routing,
    const Rows& weights,
    int64_t top_k,
    const Rows& x,
    const Rows& out) {
  const Experts experts = rounded_to(given, out.type);
  Lent lent;
  Workspace& space = *lent;
  const Plan plan = plan_of(routing, experts.count);
  const std::vector<Batch> batches = pack_segments(experts.weight, routing, plan, x, space);
  const int64_t rows = experts.weight.rows;
  const int64_t width = slice_width(rows, 1);
  // A slice adds up all experts of all tokens, in the experts' order: no two threads share a sum.
  parallel(slices(rows, width), [&](int64_t slice, int worker) {
    const int64_t first = slice * width, last = std::min(rows, first + width);
    const int64_t columns = last - first;
    float* total = floats(space.extra[worker], out.count * columns);
    std::fill_n(total, out.count * columns, 0.0f);
    for (size_t s = 0; s < plan.segments.size(); ++s) {
      const Segment& segment = plan.segments[s];
      const Weight weight = experts.expert(segment.expert);
      float* result = floats(space.results[worker], segment.count * columns);
      multiply(weight, batches[s], x.type, first, last, result, columns, space.scratch[worker]);
      for (int64_t i = 0; i < segment.count; ++i) {
        const int64_t position = plan.order[segment.first + i];
        const float share = load_float(weights.data, weights.type, position);
        float* sum = total + position / top_k * columns;
        for (int64_t n = 0; n < columns; ++n) {
          sum[n] += share * result[i * columns + n];
        }
      }
    }
    for (int64_t row = 0; row < out.count; ++row) {
      store_row(total + row * columns, first, columns, out, row);
    }
  });
}

} // namespace zmlx
