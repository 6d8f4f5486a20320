// CUDA's threads on the CPU, as far as hand-written bodies need them: fibers that wait for each
// other at barriers, and what a warp does together. Blocks run one after another, from the first or
// from the last; of shared memory nothing is known at a block's start. A program includes this,
// then kernels with `__global__` as functions, and runs them with `run_grid`.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __grid_constant__
#define __shared__ static __attribute__((section("shared_memory")))

extern char __start_shared_memory[], __stop_shared_memory[];

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(unsigned(bits) << 16); }
};
using __half = _Float16;
namespace zmlx {
inline void wait_for_earlier() {}
}

inline float wide(uint16_t bits, __nv_bfloat16) { return __nv_bfloat16{bits}; }
inline float wide(uint16_t bits, __half) { return float(std::bit_cast<__half>(bits)); }
inline uint16_t narrow(float x, __half) { return std::bit_cast<uint16_t>(__half(x)); }
inline uint16_t narrow(float x, __nv_bfloat16) {
  unsigned bits = std::bit_cast<unsigned>(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// ---- threads -------------------------------------------------------------------------------------

constexpr int MOST_THREADS = 1024, STACK = 128 * 1024;

struct Meeting {  // a barrier, with room for what each thread brings to it
  int wanted = 0, arrived = 0;
  long generation = 0;
  std::array<std::array<float, 12>, 32> brought[2];
};
struct Machine {
  ucontext_t scheduler, fibers[MOST_THREADS];
  std::vector<char> stacks = std::vector<char>(size_t(MOST_THREADS) * STACK);
  Meeting block, warps[MOST_THREADS / 32];
  bool ended[MOST_THREADS];
  int current, running;
  long events;  // of arrivals and ends; where there are none for long, all wait for each other
  const std::function<void()>* body;
};
inline Machine machine;
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

inline void yield_fiber() {
  int me = machine.current;
  swapcontext(&machine.fibers[me], &machine.scheduler);
}
inline void leave(Meeting& meeting) {
  --meeting.wanted;
  if (meeting.wanted > 0 && meeting.arrived == meeting.wanted) {
    throw std::runtime_error("a thread ended while others waited for it");
  }
}
inline void wait_for_all(Meeting& meeting) {
  long generation = meeting.generation;
  ++machine.events;
  if (++meeting.arrived == meeting.wanted) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) {
    yield_fiber();
  }
}
inline std::exception_ptr failure;
inline void fiber_main() {
  int me = machine.current;
  try {
    (*machine.body)();
    leave(machine.warps[me / 32]);
    leave(machine.block);
  } catch (...) {
    failure = std::current_exception();
  }
  machine.ended[me] = true;
  --machine.running;
  ++machine.events;
  swapcontext(&machine.fibers[me], &machine.scheduler);
}
inline void run_block(int threads, const std::function<void()>& body, bool backwards) {
  std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  machine.body = &body;
  machine.running = threads;
  machine.block.wanted = threads;
  machine.block.arrived = 0;
  for (int i = 0; i < threads; ++i) {
    machine.ended[i] = false;
    machine.warps[i / 32].wanted = 32;
    machine.warps[i / 32].arrived = 0;
    getcontext(&machine.fibers[i]);
    machine.fibers[i].uc_stack.ss_sp = machine.stacks.data() + size_t(i) * STACK;
    machine.fibers[i].uc_stack.ss_size = STACK;
    makecontext(&machine.fibers[i], fiber_main, 0);
  }
  while (machine.running) {
    long before = machine.events;
    for (int n = 0; n < threads; ++n) {
      int i = backwards ? threads - 1 - n : n;
      if (!machine.ended[i]) {
        machine.current = i;
        threadIdx = {unsigned(i), 0, 0};
        swapcontext(&machine.scheduler, &machine.fibers[i]);
        if (failure) {
          std::rethrow_exception(std::exchange(failure, nullptr));
        }
      }
    }
    if (machine.events == before) {
      throw std::runtime_error("all threads wait for each other");
    }
  }
}
// Runs a kernel; returns what went wrong, or an empty text.
inline const char* run_grid(dim3 grid, int threads, bool backwards, std::function<void()> body) {
  static std::string told;
  gridDim = grid;
  blockDim = {unsigned(threads), 1, 1};
  unsigned blocks = grid.x * grid.y * grid.z;
  told.clear();
  try {
    for (unsigned n = 0; n < blocks; ++n) {
      unsigned i = backwards ? blocks - 1 - n : n;
      blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      run_block(threads, body, backwards);
    }
  } catch (const std::exception& error) {
    told = error.what();
    std::memset(machine.stacks.data(), 0, machine.stacks.size());
  }
  return told.c_str();
}

inline void __syncthreads() { wait_for_all(machine.block); }

// ---- what a warp does together ---------------------------------------------------------------------

// Brings some numbers, and returns what all lanes brought. Rooms alternate: nobody brings something
// to the next but one meeting before all have left this.
template <size_t N>
const std::array<float, 12>* together(const std::array<float, N>& mine) {
  Meeting& warp = machine.warps[machine.current / 32];
  auto& room = warp.brought[warp.generation % 2];
  std::copy(mine.begin(), mine.end(), room[machine.current % 32].begin());
  wait_for_all(warp);
  return room.data();
}
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) {
    throw std::runtime_error("only whole warps are known here");
  }
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  check_mask(mask);
  together<0>({});
}
template <typename X>
X __shfl_xor_sync(unsigned mask, X x, int lanes) {
  check_mask(mask);
  return std::bit_cast<X>(together<1>({std::bit_cast<float>(x)})[machine.current % 32 ^ lanes][0]);
}

// mma.sync.aligned.m16n8k16.row.col: the fragments are those of the PTX manual. The products are
// summed in float64 and rounded once.
template <typename T>
void mma_16_8_16(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                 unsigned b1, T kind) {
  auto bits = [](unsigned x) { return std::bit_cast<float>(x); };
  const auto* all = together<6>({bits(a0), bits(a1), bits(a2), bits(a3), bits(b0), bits(b1)});
  auto element = [&](int lane, int word, int half) {
    return double(wide(uint16_t(std::bit_cast<unsigned>(all[lane][word]) >> 16 * half), kind));
  };
  int lane = machine.current % 32;
  for (int i = 0; i < 4; ++i) {
    int m = lane / 4 + (i >= 2 ? 8 : 0), n = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      // A: lane m % 8 * 4 + k % 8 / 2; B: lane n * 4 + k % 8 / 2; upper halves of k in later words
      double a = element(m % 8 * 4 + k % 8 / 2, m / 8 + 2 * (k / 8), k % 2);
      double b = element(n * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      sum += a * b;
    }
    c[i] = float(sum);
  }
}

// ---- functions of one thread -----------------------------------------------------------------------

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned order) {
  uint64_t both = uint64_t(y) << 32 | x;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) {
    found |= unsigned(both >> 8 * (order >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return found;
}
template <typename X>
X __ldcg(const X* from) {
  return *from;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
using std::max;
using std::min;
using std::size_t;

namespace mlx::core::cu {
using Shape = std::array<int32_t, 10>;
using Strides = std::array<int64_t, 10>;
}
