// Stacks and the switch between them: each thread of a threadgroup that has to wait has its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace zmlx::emulator {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMostThreads = 1024;

// Where a stopped flow of control goes on.
using Context = void*;

// Stop here, to be continued through *from, and continue at `to`.
extern "C" void zmlx_switch_context(Context* from, Context to);

// The stacks of an operating system thread, used again by one threadgroup after the other.
class Stacks {
 public:
  Stacks();
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* take();
  void give_back(char* stack) {
    free_.push_back(stack);
  }
  // All are free again, whatever runs on them.
  void reset();

  const char* begin() const {
    return memory_;
  }

 private:
  char* memory_;
  std::vector<char*> free_;
};

// What calls `run(argument)` on a stack; `room` bytes at its upper end stay as they are. `run` must
// not return.
Context start_context(char* stack, size_t room, void (*run)(void*), void* argument);

} // namespace zmlx::emulator
