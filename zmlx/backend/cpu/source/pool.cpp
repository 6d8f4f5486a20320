#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zmlx {
namespace {

using Work = std::function<void(int64_t, int)>;

// Between the operations of one decode step lie tens of microseconds; waking a sleeping thread
// takes about as long as a small operation.
constexpr auto kSpin = std::chrono::microseconds(100);

// A thread that others wait for has been stopped by the system when it takes so much longer than
// they do: tasks of one operation are of equal size.
constexpr auto kPatience = std::chrono::microseconds(80);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Pass the time of one turn of waiting; the processor goes to others now and then.
void rest(int turn) {
  pause();
  if (turn % 256 == 0) {
    sched_yield();
  }
}

// Threads are added as more are asked for, and never end: those too many only sleep.
//
// Each thread has a share of consecutive tasks, for these read memory one after the other. Who is
// done with his own takes from the others' shares.
class Pool {
 public:
  void run(int64_t tasks, int threads, const Work& work) {
    add_threads(threads);
    work_ = &work;
    failure_ = nullptr;
    active_.store(threads, std::memory_order_relaxed);
    tasks_ = int(tasks);
    done_.store(0, std::memory_order_relaxed);
    for (int64_t share = 0; share < threads; ++share) {
      const uint64_t first = uint64_t(share * tasks / threads);
      const uint64_t last = uint64_t((share + 1) * tasks / threads);
      shares_[share].tickets.store(last << 32 | first, std::memory_order_release);
    }
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      round_.notify_all();
    }
    take_all(0, threads);
    await_tasks();
    if (failure_) {
      std::rethrow_exception(failure_);
    }
  }

 private:
  void add_threads(int threads) {
    for (; threads_ < threads; ++threads_) {
      try {
        std::thread([this, worker = threads_, seen = round_.load()] {
          serve(worker, seen);
        }).detach();
      } catch (const std::system_error&) {
        return; // the system allows no more: fewer threads do the work
      }
    }
  }

  void take_all(int worker, int threads) {
    for (int share = 0; share < threads; ++share) {
      take(worker, shares_[(worker + share) % threads].tickets);
    }
  }

  // A ticket holds the end of a share and its next task, so that a thread that comes late cannot
  // take one number for the other's round. A task that is taken keeps its round from ending.
  void take(int worker, std::atomic<uint64_t>& tickets) {
    while (true) {
      const uint64_t ticket = tickets.fetch_add(1, std::memory_order_acq_rel);
      const int64_t task = int64_t(ticket & 0xffffffffu);
      if (task >= int64_t(ticket >> 32)) {
        return;
      }
      try {
        (*work_)(task, worker);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failing_);
        failure_ = std::current_exception();
      }
      const int tasks = tasks_; // of this round, which this task keeps from ending
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) {
        done_.notify_one();
      }
    }
  }

  // Only tasks are waited for: a thread that the system does not run has taken none, or is in the
  // middle of its last. For that one the processor on which this thread waits has to be free.
  void await_tasks() {
    const auto until = std::chrono::steady_clock::now() + kPatience;
    int done;
    for (int turn = 1; (done = done_.load(std::memory_order_acquire)) < tasks_; ++turn) {
      rest(turn);
      if (turn % 64 == 0 && std::chrono::steady_clock::now() > until) {
        done_.wait(done, std::memory_order_acquire);
      }
    }
  }

  void serve(int worker, uint32_t seen) {
    while (true) {
      seen = await(seen);
      const int threads = active_.load(std::memory_order_relaxed);
      if (worker < threads) {
        take_all(worker, threads);
      }
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
        round_.wait(seen, std::memory_order_seq_cst);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
    }
    return now;
  }

  int threads_ = 1; // the calling one
  const Work* work_ = nullptr;
  std::mutex failing_;
  std::exception_ptr failure_;
  std::atomic<int> active_{1};
  struct alignas(64) Share {
    std::atomic<uint64_t> tickets{0};
  };
  Share shares_[kMaxThreads];
  int tasks_ = 0;
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  std::atomic<int> sleeping_{0};
};

std::atomic<int> wanted{1};

// Never freed: its threads may outlive the static objects of a process that exits. A forked child
// has none of its parent's threads, so it starts anew.
struct Shared {
  std::mutex busy;
  Pool pool;
};

Shared* shared = new Shared;

void after_fork() {
  shared = new Shared;
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork);

} // namespace

void set_num_threads(int count) {
  wanted.store(std::clamp(count, 1, kMaxThreads));
}

int num_threads() {
  return wanted.load();
}

void parallel(int64_t tasks, const Work& work) {
  const int threads = num_threads();
  Shared& here = *shared;
  std::unique_lock<std::mutex> lock(here.busy, std::defer_lock);
  if (threads == 1 || tasks <= 1 || !lock.try_lock()) {
    for (int64_t task = 0; task < tasks; ++task) {
      work(task, 0);
    }
    return;
  }
  here.pool.run(tasks, threads, work);
}

} // namespace zmlx
