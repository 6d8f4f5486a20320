#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zmlx {
namespace {

// Between the operations of one decode step lie tens of microseconds; waking a sleeping thread
// takes about as long as a small operation.
constexpr auto kSpin = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int worker = 1; worker < threads; ++worker) {
      std::thread([this, worker] { serve(worker); }).detach();
    }
  }

  int threads() const {
    return threads_;
  }

  void run(int64_t tasks, const std::function<void(int64_t, int)>& work) {
    work_ = &work;
    done_.store(0, std::memory_order_relaxed);
    tickets_.store(uint64_t(tasks) << 32, std::memory_order_release);
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      round_.notify_all();
    }
    take(0);
    // Only tasks are waited for: a thread that the system does not run has taken none.
    for (int turn = 1; done_.load(std::memory_order_acquire) < tasks; ++turn) {
      rest(turn);
    }
  }

 private:
  // A ticket holds the number of tasks and the next one, so that a thread that comes late cannot
  // take one number for the other's round. A task that is taken keeps its round from ending.
  void take(int worker) {
    while (true) {
      const uint64_t ticket = tickets_.fetch_add(1, std::memory_order_acq_rel);
      const int64_t task = int64_t(ticket & 0xffffffffu);
      if (task >= int64_t(ticket >> 32)) {
        return;
      }
      (*work_)(task, worker);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void serve(int worker) {
    uint32_t seen = 0;
    while (true) {
      seen = await(seen);
      take(worker);
    }
  }

  // Wait until the round is no longer `seen`; return the new one.
  uint32_t await(uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    uint32_t now;
    for (int turn = 1; (now = round_.load(std::memory_order_acquire)) == seen; ++turn) {
      rest(turn);
      if (turn % 64 == 0 && std::chrono::steady_clock::now() > until) {
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        round_.wait(seen, std::memory_order_acquire);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
    }
    return now;
  }

  // Pass the time of one turn of waiting; the processor goes to others now and then.
  static void rest(int turn) {
    pause();
    if (turn % 256 == 0) {
      sched_yield();
    }
  }

  const int threads_;
  const std::function<void(int64_t, int)>* work_ = nullptr;
  alignas(64) std::atomic<uint64_t> tickets_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  std::atomic<int> sleeping_{0};
};

std::atomic<int> wanted{1};

// Never freed: its threads may outlive the static objects of a process that exits. A forked child
// has no threads, and its pool starts anew.
struct State {
  std::mutex busy;
  Pool* pool = nullptr;
};

State* state = new State;

void after_fork() {
  state = new State;
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork);

} // namespace

void set_num_threads(int count) {
  wanted.store(count < 1 ? 1 : count);
}

int num_threads() {
  return wanted.load();
}

void parallel(int64_t tasks, const std::function<void(int64_t, int)>& work) {
  State& shared = *state;
  std::unique_lock<std::mutex> lock(shared.busy, std::try_to_lock);
  const int threads = num_threads();
  if (!lock.owns_lock() || threads == 1 || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) {
      work(task, 0);
    }
    return;
  }
  if (shared.pool == nullptr || shared.pool->threads() != threads) {
    shared.pool = new Pool(threads); // the threads of an earlier one sleep for good
  }
  shared.pool->run(tasks, work);
}

} // namespace zmlx
