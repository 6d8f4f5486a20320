#include "fuse.h"

#include <algorithm>
#include <unordered_map>

#include "program.h"

namespace zmlx {
namespace {

// Until a value has its number in a program.
constexpr int kConstant = -2, kInput = -3;

// A program of fewer operations than this costs as much as they do.
constexpr int kFewest = 2;

// Arrays in a decode step of a model of many layers.
constexpr size_t kUsual = 4096;

struct Node {
  const Operation* operation; // null if not known
  std::vector<int> inputs; // values
  int first_output; // value
  int outputs;
  int segment;
};

struct Value {
  mx::array array;
  int node; // -1: computed already, or constant
  bool wanted = false; // outside of its node's program
  bool renewed = false; // `array` is the one that stands for it outside of programs
  bool changed = false; // and is another than at first
  int place = -1; // its number in the program that is being made
};

// The part of a graph that has not run, in an order in which it can.
//
// Known operations are numbered by segment: how many changes from unknown to known ones lie before
// them. Known operations of one segment never wait for each other by way of an unknown one, so that
// each segment can run as one program.
class Graph {
 public:
  // False where a function is being traced, or there is nothing to do.
  bool read(const Arrays& wanted) {
    nodes_.reserve(kUsual);
    values_.reserve(kUsual);
    numbers_.reserve(kUsual);
    for (const mx::array& array : wanted) {
      if (array.is_tracer() || !visit(array)) {
        return false;
      }
    }
    dissolve_small_segments();
    for (const mx::array& array : wanted) {
      want(numbers_.at(array.id()));
    }
    for (const Node& node : nodes_) {
      for (int input : node.inputs) {
        if (!inside(values_[input], node)) {
          want(input);
        }
      }
    }
    return !nodes_.empty();
  }

  // Changes the values: call it once.
  Arrays rewritten(const Arrays& wanted) {
    // Nodes stand in an order that respects what they need, but a program needs all that its
    // segment needs: segments first, then what is unknown after them.
    std::vector<int> order(nodes_.size());
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = int(i);
    }
    const auto rank = [&](int n) {
      return 2 * nodes_[n].segment + (nodes_[n].operation == nullptr ? 1 : 0);
    };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return rank(a) < rank(b); });
    for (size_t first = 0; first < order.size();) {
      size_t last = first + 1;
      if (nodes_[order[first]].operation == nullptr) {
        renew(nodes_[order[first]]);
      } else {
        while (last < order.size() && rank(order[last]) == rank(order[first])) {
          ++last;
        }
        make_program(std::span<const int>(order).subspan(first, last - first));
      }
      first = last;
    }
    Arrays result;
    for (const mx::array& array : wanted) {
      result.push_back(outside(numbers_.at(array.id())));
    }
    return result;
  }

 private:
  static bool pending(const mx::array& array) {
    return array.status() == mx::array::Status::unscheduled && array.has_primitive();
  }

  // Number an array and all that it needs, which comes first. False if there is a tracer.
  bool visit(const mx::array& root) {
    // Arrays of the graph stay where they are: their readers hold them.
    std::vector<std::pair<const mx::array*, size_t>> stack{{&root, 0}};
    while (!stack.empty()) {
      auto& [array, next] = stack.back();
      if (numbers_.contains(array->id())) {
        stack.pop_back();
      } else if (!pending(*array)) {
        add_value(*array, -1);
        stack.pop_back();
      } else if (next < array->inputs().size()) {
        const mx::array& input = array->inputs()[next++];
        if (input.is_tracer()) {
          return false;
        }
        if (!numbers_.contains(input.id())) {
          stack.emplace_back(&input, 0);
        }
      } else {
        add_node(*array);
        stack.pop_back();
      }
    }
    return true;
  }

  int add_value(const mx::array& array, int node) {
    const int number = int(values_.size());
    numbers_.emplace(array.id(), number);
    values_.push_back({array, node});
    return number;
  }

  void add_node(const mx::array& array) {
    Node node{operation_of(array), {}, int(values_.size()), 0, 0};
    if (node.operation != nullptr) {
      const mx::Stream stream = array.primitive().stream();
      if (stream_.value_or(stream) != stream) {
        node.operation = nullptr; // a program runs on one stream
      } else {
        stream_ = stream;
      }
    }
    for (const mx::array& input : array.inputs()) {
      const int number = numbers_.at(input.id());
      node.inputs.push_back(number);
      const int before = values_[number].node;
      if (before >= 0) {
        const bool resumes = node.operation != nullptr && nodes_[before].operation == nullptr;
        node.segment = std::max(node.segment, nodes_[before].segment + (resumes ? 1 : 0));
      }
    }
    if (array.siblings().empty()) {
      add_value(array, int(nodes_.size()));
      node.outputs = 1;
    } else {
      for (const mx::array& output : array.outputs()) {
        add_value(output, int(nodes_.size()));
        ++node.outputs;
      }
    }
    nodes_.push_back(std::move(node));
  }

  // Operations of a segment with too few of them count as unknown; the numbers stay valid.
  void dissolve_small_segments() {
    std::vector<int> computing(nodes_.size() + 1);
    for (const Node& node : nodes_) {
      computing[node.segment] += node.operation != nullptr && node.operation->run != nullptr;
    }
    for (Node& node : nodes_) {
      if (computing[node.segment] < kFewest) {
        node.operation = nullptr;
      }
    }
  }

  bool inside(const Value& value, const Node& node) const {
    return value.node >= 0 && node.operation != nullptr &&
        nodes_[value.node].operation != nullptr && nodes_[value.node].segment == node.segment;
  }

  // Note that a value is needed outside of its program. Views are then made outside, too: a
  // program gives whole memory only.
  void want(int number) {
    while (values_[number].node >= 0) {
      const Node& node = nodes_[values_[number].node];
      if (node.operation == nullptr) {
        return;
      }
      if (node.operation->view == nullptr) {
        values_[number].wanted = true;
        return;
      }
      number = node.inputs[0];
    }
  }

  // The array that stands for a value outside of programs.
  mx::array outside(int number) {
    if (!values_[number].renewed && values_[number].node >= 0) {
      renew(nodes_[values_[number].node]);
    }
    return values_[number].array;
  }

  // Make an operation's outputs again, from what its inputs have become.
  void renew(const Node& node) {
    Arrays inputs;
    bool same = true;
    for (int input : node.inputs) {
      const std::uintptr_t before = values_[input].array.id();
      inputs.push_back(outside(input));
      same &= !values_[input].changed && inputs.back().id() == before;
    }
    Arrays outputs;
    const Value* old = &values_[node.first_output];
    if (!same && node.outputs == 1) {
      outputs.emplace_back(
          old->array.shape(), old->array.dtype(), old->array.primitive_ptr(), std::move(inputs));
    } else if (!same) {
      std::vector<mx::Shape> shapes;
      std::vector<mx::Dtype> dtypes;
      for (int i = 0; i < node.outputs; ++i) {
        shapes.push_back(old[i].array.shape());
        dtypes.push_back(old[i].array.dtype());
      }
      outputs = mx::array::make_arrays(shapes, dtypes, old->array.primitive_ptr(), inputs);
    }
    for (int i = 0; i < node.outputs; ++i) {
      replace(node.first_output + i, same ? nullptr : &outputs[i]);
    }
  }

  void replace(int number, const mx::array* array) {
    Value& value = values_[number];
    value.renewed = true;
    value.changed = array != nullptr;
    if (array != nullptr) {
      value.array = *array;
    }
  }

  // What has been computed need not be waited for; but what an update may write over has to be
  // an input, for MLX knows who else wants an input's memory.
  bool constant(const mx::array& array, const Node& reader) const {
    return array.is_available() &&
        !(updates_first(*reader.operation) && values_[reader.inputs[0]].array.id() == array.id());
  }

  // Gather what a segment reads from elsewhere, each once.
  void gather(std::span<const int> members, std::vector<int>& inputs, std::vector<int>& constants) {
    std::vector<int> all;
    for (int member : members) {
      const Node& node = nodes_[member];
      for (int input : node.inputs) {
        Value& value = values_[input];
        if (inside(value, node)) {
          continue;
        }
        if (value.place == -1) {
          all.push_back(input);
          value.place = kConstant;
        }
        if (value.node >= 0 || !constant(value.array, node)) {
          value.place = kInput;
        }
      }
    }
    for (int number : all) {
      (values_[number].place == kConstant ? constants : inputs).push_back(number);
    }
  }

  void make_program(std::span<const int> members) {
    std::vector<int> inputs, constants, results, touched;
    gather(members, inputs, constants);
    std::vector<ProgramStep> steps;
    std::vector<ProgramValue> local;
    steps.reserve(members.size());
    local.reserve(members.size() + inputs.size() + constants.size());
    const auto add = [&](int number) {
      Value& value = values_[number];
      value.place = int(local.size());
      touched.push_back(number);
      local.push_back({value.array.shape(), value.array.dtype()});
    };
    std::for_each(inputs.begin(), inputs.end(), add);
    std::for_each(constants.begin(), constants.end(), add);
    for (int member : members) {
      const Node& node = nodes_[member];
      ProgramStep step{
          node.operation, values_[node.first_output].array.primitive_ptr(), {}, int(local.size()),
          node.outputs};
      step.inputs.reserve(node.inputs.size());
      for (int input : node.inputs) {
        step.inputs.push_back(values_[input].place);
      }
      for (int i = 0; i < node.outputs; ++i) {
        add(node.first_output + i);
        if (values_[node.first_output + i].wanted) {
          local.back().result = int(results.size());
          results.push_back(node.first_output + i);
        }
      }
      steps.push_back(std::move(step));
    }
    if (!results.empty()) { // else nobody wants what it computes
      make_results(results, std::move(steps), std::move(local), inputs, constants);
    }
    for (int number : touched) {
      values_[number].place = -1;
    }
  }

  void make_results(
      const std::vector<int>& results,
      std::vector<ProgramStep> steps,
      std::vector<ProgramValue> local,
      const std::vector<int>& inputs,
      const std::vector<int>& constants) {
    const auto arrays = [&](const std::vector<int>& numbers) {
      Arrays found;
      for (int number : numbers) {
        found.push_back(outside(number));
      }
      return found;
    };
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (int number : results) {
      shapes.push_back(values_[number].array.shape());
      dtypes.push_back(values_[number].array.dtype());
    }
    const auto program = std::make_shared<Program>(
        *stream_, std::move(steps), std::move(local), arrays(constants));
    const Arrays outputs = mx::array::make_arrays(shapes, dtypes, program, arrays(inputs));
    for (size_t i = 0; i < results.size(); ++i) {
      replace(results[i], &outputs[i]);
    }
  }

  std::optional<mx::Stream> stream_;
  std::vector<Node> nodes_;
  std::vector<Value> values_;
  std::unordered_map<std::uintptr_t, int> numbers_; // array -> value
};

} // namespace

Arrays fuse(const Arrays& wanted) {
  Graph graph;
  return graph.read(wanted) ? graph.rewritten(wanted) : wanted;
}

} // namespace zmlx
