// Threads that wait for work, share out its tasks and cost nothing while there is none.
#pragma once

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

} // namespace zmlx
