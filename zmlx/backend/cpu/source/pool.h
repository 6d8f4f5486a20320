// Threads that wait for work, share out its tasks and cost nothing while there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace zmlx {

constexpr int kMaxThreads = 256;

// Threads that the next calls of `parallel` use, the calling one included: 1 to kMaxThreads.
void set_num_threads(int count);
int num_threads();

// Call work(task, worker) once for every task in [0, tasks), on several threads. `worker` is below
// kMaxThreads and names the thread. Tasks are taken in order as threads become free. Returns when
// all are done, and throws what one of them threw. A call while another is under way runs on the
// calling thread alone.
void parallel(int64_t tasks, const std::function<void(int64_t task, int worker)>& work);

// Memory that lies together.
struct Region {
  const char* data = nullptr;
  size_t bytes = 0;
};

constexpr int kMaxRegions = 2;

// What the next calls of `parallel` will read, whose tasks split each region in order. Threads that
// wait fetch the beginning of their shares into their caches. Replaces what was said before; nothing
// breaks where a region is gone or not read after all.
void read_ahead(const Region (&regions)[kMaxRegions]);

} // namespace zmlx
