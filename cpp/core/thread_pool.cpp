#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <string>
#include <utility>

#include "core/check.h"

namespace ni {
namespace {

// CPU quota of the cgroup (v2, then v1) in cores; 0: none.
double cgroup_cores() {
  std::string quota;
  double period = 0;
  if (std::ifstream("/sys/fs/cgroup/cpu.max") >> quota >> period && quota != "max" && period > 0)
    return std::stod(quota) / period;
  double quota_us = 0;
  if (std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota_us && quota_us > 0 &&
      std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period && period > 0)
    return quota_us / period;
  return 0;
}

void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns the value once it differs from `old`: spins for the gap between two operators of a step,
// gives way where cores are shared, then sleeps on the futex behind std::atomic::wait.
int wait_change(const std::atomic<int>& value, int old) {
  for (int i = 0; i < 2000; ++i) {
    const int now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    cpu_pause();
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  do {
    const int now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

// The thread's floating-point control word; 0 on machines that we do not know.
uint64_t float_control() {
  uint64_t word = 0;
#if defined(__x86_64__)
  word = __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(word));
#endif
  return word;
}

void set_float_control([[maybe_unused]] uint64_t word) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(static_cast<unsigned>(word));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(word));
#endif
}

#if defined(__x86_64__)
constexpr uint64_t kDefaultFloatControl = 0x1f80;  // all exceptions masked
#else
constexpr uint64_t kDefaultFloatControl = 0;
#endif

}  // namespace

FloatEnvironment::FloatEnvironment() : saved_(float_control()) {
  set_float_control(kDefaultFloatControl);
}

FloatEnvironment::~FloatEnvironment() {
  set_float_control(saved_);
}

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0
                  ? CPU_COUNT(&set)
                  : static_cast<int>(std::thread::hardware_concurrency());
  const double quota = cgroup_cores();
  if (quota > 0) cores = std::min(cores, std::max(1, static_cast<int>(quota + 0.5)));
  return std::max(1, cores);
}

ThreadPool::ThreadPool(int num_threads) {
  check_arg(num_threads >= 0 && num_threads <= 1024, "num_threads is ", num_threads,
            "; it must be 0 (one per core) to 1024");
  const int n = num_threads > 0 ? num_threads : available_cores();
  shares_ = std::vector<Share>(static_cast<size_t>(n));
  threads_.reserve(static_cast<size_t>(n - 1));
  try {
    for (int worker = 1; worker < n; ++worker)
      threads_.emplace_back([this, worker] { work(worker); });
  } catch (const std::exception& error) {  // those that run must be joined
    const size_t started = threads_.size() + 1;
    stop();
    throw std::runtime_error(
        concat("only ", started, " of ", n, " threads could be started: ", error.what()));
  }
}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::stop() {
  stop_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& t : threads_) t.join();
}

void ThreadPool::run(const Job& job) {
  const std::lock_guard<std::mutex> turn(callers_);
  // All ranges of the job before are done, so nobody reads job_ now: a thread does so only after
  // taking a range, and the shares have none.
  job_ = job;
  error_ = nullptr;
  left_.store(job.ranges, std::memory_order_relaxed);
  const int epoch = epoch_.load(std::memory_order_relaxed) + 1;
  for (int w = 0; w < size(); ++w)
    shares_[static_cast<size_t>(w)].word.store(
        share_word(epoch, job.ranges * w / size(), job.ranges * (w + 1) / size()),
        std::memory_order_release);
  epoch_.store(epoch, std::memory_order_release);
  epoch_.notify_all();
  run_ranges(epoch, 0);
  for (int left = left_.load(std::memory_order_acquire); left > 0;) left = wait_change(left_, left);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

// One's own share first, then the others'.
void ThreadPool::run_ranges(int epoch, int worker) {
  for (int i = 0; i < size(); ++i) {
    Share& share = shares_[static_cast<size_t>((worker + i) % size())];
    for (int range; (range = take(share, epoch)) >= 0;) {
      run_range(range, worker);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_all();
    }
  }
}

// -1: nothing is left, or it belongs to another job.
int ThreadPool::take(Share& share, int epoch) {
  uint64_t word = share.word.load(std::memory_order_acquire);
  for (;;) {
    const int next = static_cast<int>(word & 0xffff), end = static_cast<int>(word >> 16 & 0xffff);
    if (word >> 32 != static_cast<uint32_t>(epoch) || next == end) return -1;
    if (share.word.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel,
                                         std::memory_order_acquire))
      return next;
  }
}

void ThreadPool::run_range(int range, int worker) noexcept {
  const Job& job = job_;
  try {
    job.call(job.fn, job.n * range / job.ranges, job.n * (range + 1) / job.ranges, worker);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::work(int worker) {
  const FloatEnvironment environment;
  for (int seen = 0;;) {
    seen = wait_change(epoch_, seen);
    if (stop_.load(std::memory_order_relaxed)) return;
    run_ranges(seen, worker);
  }
}

}  // namespace ni
