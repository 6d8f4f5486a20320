#include "emulator_fiber.h"

#include <sys/mman.h>

#include <cerrno>
#include <new>
#include <system_error>

namespace zmlx::emulator {

Stacks::Stacks() {
  // Pages exist when they are touched: most threads need one or two of theirs.
  void* memory = mmap(
      nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::system_error(errno, std::generic_category(), "[emulator] no memory for stacks");
  }
  memory_ = static_cast<char*>(memory);
  reset();
}

Stacks::~Stacks() {
  munmap(memory_, kStackBytes * kMostThreads);
}

char* Stacks::take() {
  char* stack = free_.back();
  free_.pop_back();
  return stack;
}

void Stacks::reset() {
  free_.clear();
  for (size_t i = kMostThreads; i > 0; --i) {
    free_.push_back(memory_ + (i - 1) * kStackBytes);
  }
}

} // namespace zmlx::emulator

// Only what a called function has to leave as it was is kept: the switch is a call to the compiler.
#if defined(__x86_64__) && !defined(ZMLX_UCONTEXT)

asm(R"(
.text
.globl zmlx_switch_context
.hidden zmlx_switch_context
.type zmlx_switch_context, @function
zmlx_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size zmlx_switch_context, .-zmlx_switch_context

.type zmlx_start_context, @function
.hidden zmlx_start_context
.globl zmlx_start_context
zmlx_start_context:
  movq %r12, %rdi
  xorl %ebp, %ebp
  callq *%rbx
  ud2
.size zmlx_start_context, .-zmlx_start_context
)");

extern "C" void zmlx_start_context();

zmlx::emulator::Context zmlx::emulator::start_context(
    char* stack, size_t room, void (*run)(void*), void* argument) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes - room) & ~uintptr_t(63);
  auto* words = reinterpret_cast<void**>(top);
  // As zmlx_switch_context leaves a stack; the return to zmlx_start_context aligns it again.
  *--words = reinterpret_cast<void*>(&zmlx_start_context);
  *--words = nullptr; // rbp
  *--words = reinterpret_cast<void*>(run); // rbx
  *--words = argument; // r12
  words -= 3; // r13, r14, r15
  return words;
}

#elif defined(__aarch64__) && !defined(ZMLX_UCONTEXT)

asm(R"(
.text
.globl zmlx_switch_context
.hidden zmlx_switch_context
.type zmlx_switch_context, %function
zmlx_switch_context:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size zmlx_switch_context, .-zmlx_switch_context

.type zmlx_start_context, %function
.hidden zmlx_start_context
.globl zmlx_start_context
zmlx_start_context:
  mov x0, x20
  mov x29, xzr
  mov x30, xzr
  blr x19
  brk #1
.size zmlx_start_context, .-zmlx_start_context
)");

extern "C" void zmlx_start_context();

zmlx::emulator::Context zmlx::emulator::start_context(
    char* stack, size_t room, void (*run)(void*), void* argument) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes - room) & ~uintptr_t(63);
  auto* words = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i) {
    words[i] = nullptr;
  }
  words[0] = reinterpret_cast<void*>(run); // x19
  words[1] = argument; // x20
  words[11] = reinterpret_cast<void*>(&zmlx_start_context); // x30
  return words;
}

#else

#include <ucontext.h>

extern "C" void zmlx_switch_context(
    zmlx::emulator::Context* from, zmlx::emulator::Context to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

namespace {

struct Start {
  ucontext_t context;
  void (*run)(void*);
  void* argument;
};

// makecontext passes whole numbers only.
void begin(unsigned high, unsigned low) {
  auto* start = reinterpret_cast<Start*>(uintptr_t(uint64_t(high) << 32 | low));
  start->run(start->argument);
}

} // namespace

zmlx::emulator::Context zmlx::emulator::start_context(
    char* stack, size_t room, void (*run)(void*), void* argument) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes - room - sizeof(Start));
  auto* start = new (reinterpret_cast<void*>(top & ~uintptr_t(63))) Start{{}, run, argument};
  getcontext(&start->context);
  start->context.uc_stack.ss_sp = stack;
  start->context.uc_stack.ss_size = size_t(reinterpret_cast<char*>(start) - stack);
  const auto bits = uint64_t(reinterpret_cast<uintptr_t>(start));
  makecontext(
      &start->context, reinterpret_cast<void (*)()>(begin), 2, unsigned(bits >> 32),
      unsigned(bits));
  return &start->context;
}

#endif
