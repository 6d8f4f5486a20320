#include "program.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <unordered_map>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"

namespace zmlx {
namespace {

constexpr size_t kAlignment = 64;

// ---------------------------------------------------------------------------------------------
// Memory for values that live inside of one run. A run takes an arena when it is laid out and gives
// it back when it is done; with one run waiting while another computes there are two.

using Arena = std::unique_ptr<std::vector<char>>;

class Arenas {
 public:
  Arena take(size_t bytes) {
    Arena arena;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        arena = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (arena == nullptr) {
      arena = std::make_unique<std::vector<char>>();
    }
    if (arena->size() < bytes) {
      arena->clear();
      arena->resize(bytes);
    }
    return arena;
  }

  void give_back(Arena arena) {
    if (arena->size() <= kLargest) {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(std::move(arena));
    }
  }

 private:
  static constexpr size_t kLargest = 64 << 20; // more is freed at once

  std::mutex mutex_;
  std::vector<Arena> free_;
};

// Never freed: the thread of a stream may outlive the static objects of a process that exits.
Arenas& arenas() {
  static Arenas* all = new Arenas;
  return *all;
}

// First fit over the gaps between what is in use.
class Gaps {
 public:
  size_t take(size_t bytes) {
    bytes = rounded(bytes);
    for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
      if (gap->bytes >= bytes) {
        const size_t at = gap->at;
        gap->at += bytes;
        gap->bytes -= bytes;
        if (gap->bytes == 0) {
          gaps_.erase(gap);
        }
        return at;
      }
    }
    const size_t at = end_;
    end_ += bytes;
    return at;
  }

  void free(size_t at, size_t bytes) {
    bytes = rounded(bytes);
    auto next = std::find_if(gaps_.begin(), gaps_.end(), [&](const Gap& g) { return g.at > at; });
    if (next != gaps_.end() && at + bytes == next->at) {
      next->at = at;
      next->bytes += bytes;
    } else {
      next = gaps_.insert(next, {at, bytes});
    }
    if (next != gaps_.begin() && (next - 1)->at + (next - 1)->bytes == next->at) {
      (next - 1)->bytes += next->bytes;
      gaps_.erase(next);
    }
  }

  size_t end() const {
    return end_;
  }

 private:
  struct Gap {
    size_t at, bytes;
  };

  static size_t rounded(size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  std::vector<Gap> gaps_;
  size_t end_ = 0;
};

// ---------------------------------------------------------------------------------------------
// Which run wrote some memory last, while it is under way: until it is over, MLX itself holds that
// memory, which looks as if somebody else wanted it.

class Run {
 public:
  // A thread that waits gets what is left of the run, if there is one: to take hundreds of objects
  // apart would hold up the next run, which the calling thread is about to begin.
  void end(std::shared_ptr<void> remains = nullptr) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
      if (waiting_ > 0 && remains != nullptr) {
        remains_ = std::move(remains);
      }
    }
    ended_.notify_all();
  }

  bool over() const {
    return over_;
  }

  // Returns what is left of the run, for the caller to drop.
  std::shared_ptr<void> wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    ++waiting_;
    ended_.wait_for(lock, kLongest, [this] { return over_.load(); });
    --waiting_;
    return std::move(remains_);
  }

 private:
  // Longer than any step takes: after it, memory is copied instead of written over.
  static constexpr auto kLongest = std::chrono::seconds(60);

  std::mutex mutex_;
  std::condition_variable ended_;
  std::atomic<bool> over_{false};
  int waiting_ = 0;
  std::shared_ptr<void> remains_;
};

class Runs {
 public:
  // The run that wrote this memory, or null if it is over.
  std::shared_ptr<Run> writer_of(const void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = writers_.find(memory);
    return found == writers_.end() || found->second->over() ? nullptr : found->second;
  }

  void add(const Arrays& written, const std::shared_ptr<Run>& run) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (writers_.size() > kMany) {
      std::erase_if(writers_, [](const auto& entry) { return entry.second->over(); });
    }
    for (const mx::array& array : written) {
      writers_[array.data_shared_ptr().get()] = run;
    }
  }

 private:
  static constexpr size_t kMany = 4096;

  std::mutex mutex_;
  std::unordered_map<const void*, std::shared_ptr<Run>> writers_;
};

Runs& runs() {
  static Runs* all = new Runs;
  return *all;
}

// How many arrays share a description; MLX only tells whether it is one.
template <auto Member>
struct Opened {
  friend long owners(const mx::array& array) {
    return (array.*Member).use_count();
  }
};
long owners(const mx::array& array);
template struct Opened<&mx::array::array_desc_>;

using Clock = std::chrono::steady_clock;

// Wait for a moment without giving up the processor.
template <class Done>
void spin_until(Done done, Clock::duration limit) {
  const auto start = Clock::now();
  while (!done() && Clock::now() - start < limit) {
    std::this_thread::yield();
  }
}

} // namespace

// ---------------------------------------------------------------------------------------------
// Where everything lies in one run, and what it does.

class Layout {
 public:
  Layout(const Program& program, const Arrays& inputs, Arrays& outputs)
      : program_(program), inputs_(inputs), outputs_(outputs) {
    views_.resize(program.values_.size());
    places_.resize(program.values_.size());
    expiring_.resize(program.steps_.size());
    // A view keeps the address of others: none may move any more.
    for (size_t i = 0; i < views_.size(); ++i) {
      const ProgramValue& value = program.values_[i];
      const size_t constant = i - inputs.size(); // huge for an input
      views_[i] = i < inputs.size() ? View(inputs[i])
          : constant < program.constants_.size() ? View(program.constants_[constant])
                                                 : View(value.shape, value.dtype);
    }
    for (size_t i = 0; i < program.steps_.size(); ++i) {
      place(int(i));
      for (int value : expiring_[i]) {
        gaps_.free(places_[value].at, views_[value].bytes());
      }
    }
    arena_ = arenas().take(gaps_.end());
    settle_updates();
    for (size_t i = 0; i < views_.size(); ++i) {
      if (places_[i].base == kArena) {
        views_[i].data += reinterpret_cast<uintptr_t>(arena_->data());
      } else if (places_[i].base != kFixed) {
        views_[i].data += reinterpret_cast<uintptr_t>(updates_[places_[i].base].data);
      }
    }
  }

  ~Layout() {
    arenas().give_back(std::move(arena_));
  }

  void run() const {
    const View* const* operand = operands_.data();
    for (const Action& action : actions_) {
      const Operands in(operand, size_t(action.operands));
      action.run(*action.primitive, in, views_[action.output]);
      operand += action.operands;
    }
  }

 private:
  using Function = void (*)(mx::Primitive&, Operands, const View&);

  static constexpr auto kMoment = std::chrono::microseconds(300);
  static constexpr int kFixed = -1, kArena = -2;

  // A view's address is relative to the arena, or to the output of an update, until both are known.
  struct Place {
    int base = kFixed; // or the number of an update
    size_t at = 0; // in the arena
  };

  // A result that may take over the memory of an input.
  struct Update {
    int action;
    int input;
    int result;
    Function in_new_memory;
    char* data;
  };

  struct Action {
    Function run;
    mx::Primitive* primitive; // kept alive by the program
    int operands;
    int output;
  };

  void place(int number) {
    const ProgramStep& step = program_.steps_[number];
    const Operation& operation = *step.operation;
    const int out = step.first_output;
    if (operation.view != nullptr) {
      const int in = step.inputs[0];
      if (operation.view(*step.primitive, views_[in], &views_[out], step.outputs)) {
        for (int i = 0; i < step.outputs; ++i) {
          places_[out + i].base = places_[in].base;
        }
        return;
      }
      views_[out] = View(views_[out].shape, views_[out].dtype);
      allocate(number, out);
      act(copy_in_order, step, out);
      return;
    }
    if (updates_first(operation) && may_write_over(step)) {
      places_[out].base = int(updates_.size());
      updates_.push_back(
          {int(actions_.size()), step.inputs[0], program_.values_[out].result, operation.run,
           nullptr});
    } else {
      allocate(number, out);
    }
    act(operation.run, step, out);
  }

  static void copy_in_order(mx::Primitive&, Operands in, const View& out) {
    copy_elements(*in[0], View(in[0]->shape, in[0]->dtype, out.data));
  }

  void act(Function run, const ProgramStep& step, int out) {
    for (int input : step.inputs) {
      operands_.push_back(&views_[input]);
    }
    actions_.push_back({run, step.primitive.get(), int(step.inputs.size()), out});
  }

  // Whether the first input is one that this step alone reads, and its output a result.
  bool may_write_over(const ProgramStep& step) const {
    const int in = step.inputs[0];
    return in < int(inputs_.size()) && program_.values_[step.first_output].result >= 0 &&
        program_.values_[in].uses == 1 && inputs_[in].flags().row_contiguous &&
        inputs_[in].size() == inputs_[in].data_size();
  }

  // Whether nobody but this program knows an input: each of its results holds all inputs.
  bool unwanted(const mx::array& input) const {
    return owners(input) == long(outputs_.size()) && input.data_shared_ptr().use_count() == 1 &&
        input.data_shared_ptr()->is_owned();
  }

  // Write over the memory that nobody else wants, and copy the rest.
  void settle_updates() {
    const auto free = [&](const Update& update) { return unwanted(inputs_[update.input]); };
    const auto ready = [&] { return std::all_of(updates_.begin(), updates_.end(), free); };
    std::vector<std::shared_ptr<void>> remains;
    if (!ready()) {
      bool waited = false;
      for (const Update& update : updates_) {
        const auto writer = runs().writer_of(inputs_[update.input].data_shared_ptr().get());
        if (writer != nullptr) {
          remains.push_back(writer->wait());
          waited = true;
        }
      }
      if (waited) {
        spin_until(ready, kMoment); // MLX lets go of the memory just after the run
      }
    }
    for (Update& update : updates_) {
      mx::array& output = outputs_[update.result];
      if (free(update)) {
        output.copy_shared_buffer(inputs_[update.input]);
        actions_[update.action].run = run_update;
      } else {
        output.set_data(mx::allocator::malloc(output.nbytes()));
        actions_[update.action].run = update.in_new_memory;
      }
      update.data = output.data<char>();
    }
  }

  void allocate(int number, int value) {
    const ProgramValue& of = program_.values_[value];
    if (of.result >= 0) {
      mx::array& output = outputs_[of.result];
      output.set_data(mx::allocator::malloc(output.nbytes()));
      views_[value].data = output.data<char>();
      return;
    }
    const size_t at = gaps_.take(views_[value].bytes());
    places_[value] = {kArena, at};
    views_[value].data = reinterpret_cast<char*>(at);
    expiring_[std::max(number, of.last_use)].push_back(value);
  }

  const Program& program_;
  const Arrays& inputs_;
  Arrays& outputs_;
  std::vector<View> views_;
  std::vector<Place> places_;
  std::vector<std::vector<int>> expiring_;
  std::vector<const View*> operands_;
  std::vector<Action> actions_;
  std::vector<Update> updates_;
  Gaps gaps_;
  Arena arena_;
};

Program::Program(
    mx::Stream stream,
    std::vector<ProgramStep> steps,
    std::vector<ProgramValue> values,
    Arrays constants)
    : Primitive(stream),
      steps_(std::move(steps)),
      values_(std::move(values)),
      constants_(std::move(constants)) {
  for (int i = int(steps_.size()) - 1; i >= 0; --i) {
    const ProgramStep& step = steps_[i];
    for (int input : step.inputs) {
      ++values_[input].uses;
      int& last = values_[input].last_use;
      last = std::max(last, i);
      for (int out = 0; step.operation->view != nullptr && out < step.outputs; ++out) {
        last = std::max(last, values_[step.first_output + out].last_use);
      }
    }
  }
}

void Program::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  struct Work {
    std::shared_ptr<mx::Primitive> program;
    Layout layout;
  };
  struct Task {
    std::shared_ptr<Work> work;
    std::shared_ptr<Run> run = std::make_shared<Run>();

    ~Task() {
      run->end();
    }
  };
  auto task = std::make_shared<Task>();
  task->work.reset(new Work{outputs[0].primitive_ptr(), Layout(*this, inputs, outputs)});
  runs().add(outputs, task->run);
  mx::cpu::get_command_encoder(stream()).dispatch([task] {
    task->work->layout.run();
    task->run->end(std::move(task->work));
  });
}

void Program::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("[zmlx] a program runs on the CPU only");
}

} // namespace zmlx
