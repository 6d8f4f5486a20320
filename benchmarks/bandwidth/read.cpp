// The time that it takes to read an array once, with some threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

// Eight sums of eight values: enough loads in flight for every processor, whatever its vectors.
static uint64_t sum(const uint64_t* from, const uint64_t* to) {
  uint64_t sums[64] = {};
  for (; from + 64 <= to; from += 64) {
    for (int i = 0; i < 64; ++i) {
      sums[i] += from[i];
    }
  }
  uint64_t all = 0;
  for (uint64_t each : sums) {
    all += each;
  }
  return all;
}

// Seconds from the start of the first thread's reading to the end of the last one's.
extern "C" double seconds_to_read(const uint64_t* data, int64_t count, int threads) {
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> began(threads), ended(threads);
  std::atomic<int> ready{0};
  std::atomic<uint64_t> kept{0}; // so that no compiler leaves the sums out
  auto share = [&](int number) {
    ready.fetch_add(1);
    while (ready.load() < threads) {
      std::this_thread::yield();
    }
    began[number] = Clock::now();
    kept += sum(data + count * number / threads, data + count * (number + 1) / threads);
    ended[number] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int number = 1; number < threads; ++number) {
    others.emplace_back(share, number);
  }
  share(0);
  for (std::thread& other : others) {
    other.join();
  }
  Clock::time_point first = began[0], last = ended[0];
  for (int number = 1; number < threads; ++number) {
    first = std::min(first, began[number]);
    last = std::max(last, ended[number]);
  }
  return std::chrono::duration<double>(last - first).count();
}
