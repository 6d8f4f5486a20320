// 1,024 flows of control that take turns, each with values of its own in registers and on its stack.
// Exits with 0 when each ends with what it would have alone.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "emulator_fiber.h"

using namespace zmlx::emulator;

namespace {

struct Flow {
  Context context;
  uint64_t number;
  double result = 0;
  bool done = false;
};
Context scheduler;
Flow* current;

void pause() {
  zmlx_switch_context(&current->context, scheduler);
}

double expected(uint64_t number, bool pausing) {
  double sums[8] = {};
  uint64_t whole = number;
  for (int step = 0; step < 5; ++step) {
    for (int i = 0; i < 8; ++i) {
      sums[i] += double(number * 8 + i) / (step + 1);
      whole = whole * 6364136223846793005ull + i;
    }
    if (pausing) {
      pause();
    }
  }
  double total = double(whole >> 40);
  for (double sum : sums) {
    total += sum;
  }
  return total;
}

void run(void* argument) {
  auto* flow = static_cast<Flow*>(argument);
  alignas(32) volatile char aligned[64];
  aligned[0] = char(flow->number);
  flow->result = expected(flow->number, true);
  flow->done = reinterpret_cast<uintptr_t>(aligned) % 32 == 0 && aligned[0] == char(flow->number);
  for (;;) {
    pause();
  }
}

} // namespace

int main() {
  Stacks stacks;
  std::vector<Flow> flows(kMostThreads);
  for (int round = 0; round < 2; ++round) {
    for (size_t i = 0; i < flows.size(); ++i) {
      flows[i] = {nullptr, i * 77 + round};
      flows[i].context = start_context(stacks.take(), 100, run, &flows[i]);
    }
    for (int turn = 0; turn < 6; ++turn) {
      for (Flow& flow : flows) {
        current = &flow;
        zmlx_switch_context(&scheduler, flow.context);
      }
    }
    for (const Flow& flow : flows) {
      if (!flow.done || flow.result != expected(flow.number, false)) {
        std::printf("flow %llu went wrong\n", (unsigned long long)flow.number);
        return 1;
      }
    }
    stacks.reset();
  }
  return 0;
}
