#include "core/thread_pool.h"

#include <gtest/gtest.h>

#include <bit>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ni {
namespace {

TEST(ThreadPool, EveryIndexExactlyOnce) {
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.size(), threads);
    for (int64_t n : {0, 1, 2, 5, 64, 1001}) {
      for (int64_t grain : {1, 3, 100}) {
        std::vector<std::atomic<int>> hits(static_cast<size_t>(n));
        pool.parallel_for(n, grain, [&](int64_t begin, int64_t end, int worker) {
          EXPECT_LT(begin, end);
          EXPECT_LT(worker, threads);
          for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
        });
        for (const auto& h : hits) EXPECT_EQ(h.load(), 1);
      }
    }
  }
}

TEST(ThreadPool, AWorkerRunsOneRangeAtATimeAndRangesAreAtLeastTheGrain) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> busy(4);
  std::atomic<int> small{0}, twice{0};
  pool.parallel_for(1000, 30, [&](int64_t begin, int64_t end, int worker) {
    twice += busy[static_cast<size_t>(worker)].exchange(1);
    small += end - begin < 30;
    std::this_thread::yield();
    busy[static_cast<size_t>(worker)] = 0;
  });
  EXPECT_EQ(twice.load(), 0);
  EXPECT_EQ(small.load(), 0);
}

// Worker 1 begins a range and is then held up until all others are done; with a static partition,
// its other ranges would wait for it.
TEST(ThreadPool, AHeldUpThreadHoldsUpNoMoreThanItsRange) {
  ThreadPool pool(2);
  std::atomic<int> done{0}, held{0};
  pool.parallel_for(8, 1, [&](int64_t, int64_t, int worker) {
    if (worker == 1 && held.exchange(1) == 0)
      while (done.load() < 7) std::this_thread::yield();
    else
      while (held.load() == 0) std::this_thread::yield();
    ++done;
  });
  EXPECT_EQ(done.load(), 8);
}

TEST(ThreadPool, ItemsExactlyOnce) {
  ThreadPool pool(3);
  std::vector<std::atomic<int>> hits(500);
  pool.parallel_items(500, [&](int64_t i, int) { ++hits[static_cast<size_t>(i)]; });
  for (const auto& h : hits) EXPECT_EQ(h.load(), 1);
}

TEST(ThreadPool, ExceptionsReachTheCallerAndThePoolLivesOn) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    EXPECT_THROW(pool.parallel_for(3, 1,
                                   [&](int64_t begin, int64_t, int) {
                                     if (begin == round % 3) throw std::runtime_error("range");
                                   }),
                 std::runtime_error);
    std::atomic<int64_t> sum{0};
    pool.parallel_for(10, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) sum += i;
    });
    EXPECT_EQ(sum.load(), 45);
  }
}

TEST(ThreadPool, ManySmallJobsAndSleepsBetween) {
  ThreadPool pool(2);
  int64_t left = 0, right = 0;  // plain: each range writes its own, the pool orders the reads
  for (int i = 0; i < 2000; ++i) {
    if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    pool.parallel_for(2, 1, [&](int64_t begin, int64_t, int) { ++(begin == 0 ? left : right); });
  }
  EXPECT_EQ(left, 2000);
  EXPECT_EQ(right, 2000);
}

TEST(ThreadPool, CallersTakeTurns) {
  ThreadPool pool(2);
  int64_t plain = 0;  // only the callers' turns protect it
  const auto caller = [&] {
    for (int i = 0; i < 300; ++i)
      pool.parallel_for(2, 1, [&](int64_t begin, int64_t, int) {
        if (begin == 0) ++plain;
      });
  };
  std::thread other(caller);
  caller();
  other.join();
  EXPECT_EQ(plain, 600);
}

TEST(ThreadPool, NumThreadsIsChecked) {
  EXPECT_THROW(ThreadPool(-1), std::invalid_argument);
  EXPECT_GE(available_cores(), 1);
  EXPECT_EQ(ThreadPool(0).size(), available_cores());
}

#if defined(__x86_64__)
// A library may have switched its thread to flush denormals to zero; results must not notice.
TEST(ThreadPool, KeepsDenormalsWhateverTheCallerDoes) {
  ThreadPool pool(2);
  const unsigned before = __builtin_ia32_stmxcsr(), flushing = before | 0x8040u;
  __builtin_ia32_ldmxcsr(flushing);
  ThreadPool born_flushing(2);
  volatile float tiny = 1e-30f;
  float halves[2] = {}, one = 0.0f;
  for (ThreadPool* p : {&pool, &born_flushing}) {
    halves[0] = halves[1] = one = 0.0f;
    p->parallel_for(2, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) halves[i] = tiny * 1e-10f;
    });
    p->parallel_for(1, 1, [&](int64_t, int64_t, int) { one = tiny * 1e-10f; });
    EXPECT_EQ(std::bit_cast<uint32_t>(halves[0]), std::bit_cast<uint32_t>(1e-30f * 1e-10f));
    EXPECT_EQ(std::bit_cast<uint32_t>(halves[1]), std::bit_cast<uint32_t>(1e-30f * 1e-10f));
    EXPECT_EQ(std::bit_cast<uint32_t>(one), std::bit_cast<uint32_t>(1e-30f * 1e-10f));
    EXPECT_EQ(__builtin_ia32_stmxcsr() & 0x8040u, 0x8040u);
  }
  __builtin_ia32_ldmxcsr(before);
}
#endif

}  // namespace
}  // namespace ni
