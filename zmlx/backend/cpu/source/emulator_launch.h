// One launch of a kernel: its threads, and what they may do.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "emulator_fiber.h"
#include "emulator_memory.h"

namespace zmlx::emulator {

using Triple = std::array<uint32_t, 3>;

// A compiled kernel, loaded.
class Library {
 public:
  // Raises std::runtime_error when the file is no kernel's library.
  explicit Library(const std::string& file);
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  const std::string& file() const {
    return file_;
  }
  Entry entry() const {
    return entry_;
  }
  const SharedLayout& shared() const {
    return shared_;
  }
  // Whether an address lies in the library: constants of the program scope do.
  bool holds(uintptr_t address) const {
    return address - begin_ < bytes_;
  }
  uintptr_t begin() const {
    return begin_;
  }

 private:
  std::string file_;
  Entry entry_;
  SharedLayout shared_;
  uintptr_t begin_ = 0;
  size_t bytes_ = 0;
};

struct Thread {
  enum State : uint8_t { fresh, ready, at_exchange, at_simd_barrier, at_barrier, done };
  State state = fresh;
  char* stack = nullptr;
  Context context = nullptr;
  Site site{};
  uint32_t flags = 0;
  std::array<uintptr_t, 6> callers{}; // of the place where it waits, the outermost first
  Exchange exchange{};
};

// The lanes' values: those that arrive, and those of the last meeting, which may still be read.
struct Simdgroup {
  alignas(64) unsigned char arriving[kLanes * kSlotBytes];
  alignas(64) unsigned char met[kLanes * kSlotBytes];
  uint32_t epoch = 0;
};

class Launch {
 public:
  Launch(
      const Library& library, std::string name, std::vector<Buffer>& buffers, Memory& memory,
      std::vector<void*> arguments, Triple grid, Triple threadgroup);

  // Runs all threads. Throws Fault.
  void run();

  // What hooks call, on a thread's stack. `pc` is where in the kernel.
  void access(uintptr_t address, size_t bytes, Access access, uintptr_t pc);
  void misaligned(const Site& site, uintptr_t address, size_t alignment, const char* type);
  void barrier(uint32_t flags, bool simdgroup, const Site& site);
  const Exchange* exchange(const void* value, size_t bytes, const Site& site);
  // Notes where in the kernel the current thread is: return addresses, by its frame pointers.
  void trace(void** frame);
  void* shared(const SharedVariable& variable);
  [[noreturn]] void fail(Kind kind, std::string text, uintptr_t pc);
  [[noreturn]] void fail_at(Kind kind, std::string text, const Site& site);

  bool on_own_stack(uintptr_t address) const {
    return address - stack_ < kStackBytes;
  }

 private:
  void run_threadgroup(const Triple& group, const Triple& size);
  void run_simdgroup(uint32_t index);
  bool meet(uint32_t simdgroup);
  void release_barrier();
  [[noreturn]] void diverge(const Site& site, std::string text) const;
  void run_thread(uint32_t index);
  void start(uint32_t index);
  void wait(Thread::State state, const Site& site);
  void back_to_scheduler();
  [[noreturn]] void fail(Fault fault);
  Fault fault_of(Kind kind, std::string text) const;
  static void body(void* launch);
  void check_written() const;

  void check_buffer(Buffer& buffer, uintptr_t address, size_t bytes, Access access, uintptr_t pc);
  void check_shared(uintptr_t address, size_t bytes, Access access, uintptr_t pc);
  void check_element(
      const Buffer& buffer, size_t element, Access access, uintptr_t address, size_t bytes,
      uintptr_t pc);
  void expect_same(uintptr_t address, size_t bytes, uintptr_t pc, std::string what);
  void settle();
  void defer(Kind kind, std::string text, uintptr_t pc);
  void raise_deferred();
  bool ordered(const Moment& earlier) const;
  Moment now(Access access) const;
  std::string describe_thread(uint32_t index) const;
  [[noreturn]] void stray(uintptr_t address, Access access, uintptr_t pc);

  const Library& library_;
  std::string name_;
  std::vector<Buffer>& buffers_;
  Memory& memory_;
  SharedMemory shared_;
  std::vector<void*> arguments_;
  Triple grid_;
  Triple threadgroup_;
  Triple groups_{};
  Triple group_{};
  Triple size_{}; // of the threadgroup that runs
  uint32_t group_number_ = 0;
  uint32_t epoch_ = 0;
  uint32_t device_epoch_ = 0;

  Stacks& stacks_;
  std::vector<Thread> threads_;
  std::vector<Simdgroup> simdgroups_;
  uint32_t count_ = 0; // of threads in the threadgroup that runs
  uint32_t current_ = 0;
  uintptr_t stack_ = 0;
  Context scheduler_ = nullptr;
  bool in_thread_ = false;
  std::unique_ptr<Fault> fault_;
  std::unique_ptr<Fault> deferred_;

  // A second write to a place that another thread wrote: harmless when it writes the same.
  struct Pending {
    uintptr_t address = 0;
    size_t bytes = 0;
    unsigned char before[16];
    uintptr_t pc = 0;
    std::string text;
  } pending_;
};

// The launch that runs on this operating system thread; null between launches.
Launch* current_launch();

const Hooks& hooks();

} // namespace zmlx::emulator
