// CUDA C++ on a CPU, as far as the kernels written by hand need it: a block of threads is so many
// fibers, which run one at a time from one meeting to the next, in an order that changes. What blocks
// share keeps what the one before left in it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __global__
#define __grid_constant__

using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct dim3 { unsigned x, y, z; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline unsigned __float_as_uint(float v) { unsigned b; std::memcpy(&b, &v, 4); return b; }
inline float __uint_as_float(unsigned b) { float v; std::memcpy(&v, &b, 4); return v; }
inline uint16_t bfloat_bits(float v) {
  unsigned b = __float_as_uint(v);
  if (v != v) return 0x7fff;
  return (b + 0x7fffu + (b >> 16 & 1)) >> 16;
}
struct __nv_bfloat16 {
  uint16_t bits = 0;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) : bits(bfloat_bits(v)) {}
  operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
struct __half {
  _Float16 value = 0;
  __half() = default;
  explicit __half(float v) : value(_Float16(v)) {}
  operator float() const { return float(value); }
};
inline __half __ushort_as_half(unsigned short b) { __half h; std::memcpy(&h, &b, 2); return h; }
inline float __half2float(__half h) { return float(h); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t both = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

namespace block {

// Threads that wait for each other: all must come to the same place, and none may be missing.
struct Meeting {
  int threads = 0, arrived = 0, round = 0;
  const char* where = nullptr;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  Meeting* waits = nullptr;
  int round = 0;
  bool done = false;
};
struct Warp {
  Meeting meeting;
  uint64_t given[32];
  unsigned a[32][4], b[32][2];
};
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Meeting barriers[16];
inline Thread* current;
inline ucontext_t scheduler;
inline dim3 block_index;

[[noreturn]] inline void fail(const char* what, const char* where) {
  std::fprintf(stderr, "%s: %s\n", what, where);
  std::_Exit(3);
}
inline void meet(Meeting& meeting, int count, const char* where) {
  if (meeting.arrived == 0) {
    meeting.threads = count;
    meeting.where = where;
  } else if (meeting.threads != count || std::strcmp(meeting.where, where)) {
    fail("threads meet in different places", where);
  }
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  current->waits = &meeting;
  current->round = meeting.round;
  swapcontext(&current->context, &scheduler);
}
inline Warp& warp() { return warps[current->index.x / 32]; }
inline int lane() { return current->index.x % 32; }
inline void meet_warp(const char* where) { meet(warp().meeting, 32, where); }

// What earlier kernels write, which is there when a thread has waited for them, and how many did.
struct Late {
  char* at;
  std::vector<char> data;
};
inline std::vector<Late> late;
inline long waited = 0;

// Before a block nothing of it is there.
inline void take_away() {
  for (Late& one : late) std::memset(one.at, 0xff, one.data.size());
}

inline void (*kernel)();
inline void start() {
  kernel();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// Run a block; `seed` decides on the order of its threads.
inline void run(int count, dim3 index, unsigned seed) {
  block_index = index;
  threads = std::vector<Thread>(count);
  warps = std::vector<Warp>(count / 32);
  for (Meeting& barrier : barriers) barrier = Meeting();
  constexpr size_t STACK = 256 << 10;
  int stuck = 0;
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.stack.reset(new char[STACK]);
    thread.index = {unsigned(i), 0, 0};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    makecontext(&thread.context, start, 0);
  }
  // A warp runs as far as it can before another does: whoever does not wait is far ahead then.
  for (int left = count; left;) {
    bool moved = false;
    seed = seed * 1664525u + 1013904223u;
    const int warp = (seed >> 8) % warps.size();
    for (bool again = true; again;) {
      again = false;
      seed = seed * 1664525u + 1013904223u;
      const int first = seed >> 8 & 31, step = seed >> 13 & 1 ? 1 : 31;
      for (int i = 0; i < 32; ++i) {
        current = &threads[warp * 32 + (first + i * step) % 32];
        if (current->done || (current->waits && current->waits->round == current->round)) continue;
        current->waits = nullptr;
        swapcontext(&scheduler, &current->context);
        left -= current->done;
        again = moved = true;
      }
    }
    stuck = moved ? 0 : stuck + 1;
    if (stuck > 1000 * int(warps.size())) fail("threads wait for others that never come", "a meeting");
  }
}

}  // namespace block

namespace zmlx {
inline void wait_for_earlier() {
  ++block::waited;
  for (const block::Late& one : block::late) std::memcpy(one.at, one.data.data(), one.data.size());
}
}  // namespace zmlx

#define threadIdx (::block::current->index)
#define blockIdx (::block::block_index)

inline void __syncwarp() { block::meet_warp("__syncwarp"); }
inline void __syncthreads() {
  block::meet(block::barriers[0], int(block::threads.size()), "__syncthreads");
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  block::Warp& warp = block::warp();
  warp.given[block::lane()] = __float_as_uint(value);
  block::meet_warp("shuffle");
  float other = __uint_as_float(unsigned(warp.given[block::lane() ^ mask]));
  block::meet_warp("shuffle's end");
  return other;
}
