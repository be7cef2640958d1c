// A fixed set of threads that share loops. No OpenMP: nothing to link, and sanitizers see every
// lock.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace ni {

// Cores this process may use: its affinity mask, bounded by the CPU quota of its cgroup.
int available_cores();

// While it lives, this thread rounds to nearest and keeps denormals. Libraries may have switched
// that (flush-to-zero) in the thread that calls us, and a row's bits must not depend on who
// computes it.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  uint64_t saved_;
};

class ThreadPool {
 public:
  // num_threads counts the caller, who works too; 0 = available_cores().
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(shares_.size()); }

  // Calls fn(begin, end, worker) for a fixed partition of [0, n) in at most kRangesPerThread *
  // size() ranges of at least `grain` (but for rounding). A thread takes the ranges that are its
  // own first, so that it meets the same memory again, then what others have not begun: one that
  // has no core at the moment holds nobody up, but for the range it is in. worker < size() is the
  // thread's number. Returns when all are done; the first exception is rethrown. Allocates nothing.
  // Callers take turns; fn must not call parallel_for on the same pool.
  template <typename Fn>
  void parallel_for(int64_t n, int64_t grain, const Fn& fn) {
    if (n <= 0) return;
    const FloatEnvironment environment;
    const int64_t ranges = grain > 1 ? (n + grain - 1) / grain : n;
    if (ranges == 1 || threads_.empty()) {
      fn(int64_t{0}, n, 0);
      return;
    }
    const Job job{[](const void* f, int64_t begin, int64_t end, int worker) {
                    (*static_cast<const Fn*>(f))(begin, end, worker);
                  },
                  &fn, n,
                  static_cast<int>(std::min<int64_t>(ranges, int64_t{kRangesPerThread} * size()))};
    run(job);
  }

  // The same with work handed out item by item: for items of unequal cost. fn(item, worker).
  template <typename Fn>
  void parallel_items(int64_t n, const Fn& fn) {
    std::atomic<int64_t> next{0};
    parallel_for(std::min<int64_t>(n, size()), 1, [&](int64_t, int64_t, int worker) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) fn(i, worker);
    });
  }

 private:
  static constexpr int kRangesPerThread = 4;

  struct Job {
    void (*call)(const void* fn, int64_t begin, int64_t end, int worker) = nullptr;
    const void* fn = nullptr;
    int64_t n = 0;
    int ranges = 0;
  };

  // The ranges [next, end) of job number `epoch` that a thread has not begun, in one word, so that
  // whoever takes one knows which job it belongs to.
  struct alignas(64) Share {
    std::atomic<uint64_t> word{0};
  };
  static uint64_t share_word(int epoch, int next, int end) {
    return uint64_t{static_cast<uint32_t>(epoch)} << 32 | static_cast<uint64_t>(end) << 16 |
           static_cast<uint64_t>(next);
  }

  void run(const Job& job);
  void stop();
  void work(int worker);
  void run_ranges(int epoch, int worker);
  int take(Share& share, int epoch);
  void run_range(int range, int worker) noexcept;

  std::vector<Share> shares_;  // one a thread, the caller's first
  std::vector<std::thread> threads_;
  std::mutex callers_;         // one job at a time
  Job job_;                    // written before the shares, read after taking from one
  std::atomic<int> epoch_{0};  // number of the present job
  std::atomic<int> left_{0};   // its ranges that are not done
  std::atomic<bool> stop_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace ni
