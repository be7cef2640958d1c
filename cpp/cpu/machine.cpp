#include "cpu/machine.h"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ni {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs fn(thread, round) on all threads, again and again, in rounds of less than a millisecond.
// Work a second in the fastest: where others use the machine, too, that one says what it can do.
template <typename Fn>
double rate(int threads, double seconds, double work, const Fn& fn) {
  std::barrier gate(threads);
  double best = 1e9;
  bool done = false;
  const double start = now();
  const auto rounds = [&](int thread) {
    double begin = 0;
    for (int round = 0; !done; ++round) {
      gate.arrive_and_wait();
      if (thread == 0) begin = now();
      fn(thread, round);
      gate.arrive_and_wait();
      if (thread == 0) {
        best = std::min(best, now() - begin);
        done = round >= 8 && now() - start > seconds;
      }
      gate.arrive_and_wait();
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(rounds, i);
  rounds(0);
  for (std::thread& thread : pool) thread.join();
  return work / best;
}

// Where results go, so that they are computed.
std::atomic<float> sink;

void keep(float x) {
  sink.store(x, std::memory_order_relaxed);
}

// -- Reading --------------------------------------------------------------------------------------

// Four sums of 64 bytes each, in whatever registers the function around it may use.
inline __attribute__((always_inline)) uint64_t read_words(const uint64_t* data, size_t n) {
  typedef uint64_t Vec __attribute__((vector_size(64)));
  Vec sum[4] = {};
  for (size_t i = 0; i + 32 <= n; i += 32) {
    for (size_t j = 0; j < 4; ++j)
      sum[j] += *reinterpret_cast<const Vec*>(__builtin_assume_aligned(data + i + 8 * j, 64));
  }
  const Vec total = sum[0] + sum[1] + sum[2] + sum[3];
  uint64_t out = 0;
  for (int i = 0; i < 8; ++i) out += total[i];
  return out;
}

uint64_t read_plain(const uint64_t* data, size_t n) {
  return read_words(data, n);
}
#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t read_avx2(const uint64_t* data, size_t n) {
  return read_words(data, n);
}
__attribute__((target("avx512f"))) uint64_t read_avx512(const uint64_t* data, size_t n) {
  return read_words(data, n);
}
#endif

// -- Multiplying ----------------------------------------------------------------------------------
// Each returns the operations of one loop.

constexpr int kChains = 16;  // independent sums: enough to hide the latency
constexpr int kLoops = 200'000;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) double fma_avx512(int loops) {
  __m512 sum[kChains];
  for (auto& s : sum) s = _mm512_set1_ps(1e-9f);
  const __m512 a = _mm512_set1_ps(1.0f - 1e-6f), b = _mm512_set1_ps(1e-7f);
  for (int i = 0; i < loops; ++i)
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_fmadd_ps(s, a, b);
  for (auto& s : sum) keep(s[0]);
  return 2.0 * 16 * kChains;
}
__attribute__((target("avx512f,avx512bf16"))) double dot_avx512(int loops) {
  __m512 sum[kChains];
  for (auto& s : sum) s = _mm512_set1_ps(1e-9f);
  const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x33803380));  // 2^-24 twice
  for (int i = 0; i < loops; ++i)
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, a, a);
  for (auto& s : sum) keep(s[0]);
  return 2.0 * 32 * kChains;
}
__attribute__((target("avx2,fma"))) double fma_avx2(int loops) {
  __m256 sum[12];  // of 16 registers
  for (auto& s : sum) s = _mm256_set1_ps(1e-9f);
  const __m256 a = _mm256_set1_ps(1.0f - 1e-6f), b = _mm256_set1_ps(1e-7f);
  for (int i = 0; i < loops; ++i)
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm256_fmadd_ps(s, a, b);
  for (auto& s : sum) keep(s[0]);
  return 2.0 * 8 * 12;
}
#endif
double fma_plain(int loops) {
  typedef float Vec __attribute__((vector_size(16)));
  Vec sum[12];
  for (auto& s : sum) s = Vec{} + 1e-9f;
  const Vec a = Vec{} + (1.0f - 1e-6f), b = Vec{} + 1e-7f;
  for (int i = 0; i < loops; ++i)
#pragma GCC unroll 12
    for (auto& s : sum) s = s * a + b;
  for (auto& s : sum) keep(s[0]);
  return 2.0 * 4 * 12;
}

double multiply_adds(int threads, double seconds, double (*kernel)(int)) {
  const double work = kernel(1) * kLoops * threads;
  return rate(threads, seconds, work, [kernel](int, int) { kernel(kLoops); });
}

}  // namespace

MachineRates measure_machine(int threads, double seconds, int megabytes) {
  uint64_t (*read)(const uint64_t*, size_t) = read_plain;
  double (*fma)(int) = fma_plain;
  double (*dot)(int) = nullptr;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) {
    read = read_avx512;
    fma = fma_avx512;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    read = read_avx2;
    fma = fma_avx2;
  }
  if (__builtin_cpu_supports("avx512bf16")) dot = dot_avx512;
#endif

  // Words of a thread's part, which it touches first and reads alone, a slice a round: when a slice
  // comes again, all the others have gone through the caches.
  constexpr size_t kSlices = 8;
  const size_t slice =
      (static_cast<size_t>(megabytes) << 17) / static_cast<size_t>(threads) / kSlices / 32 * 32;
  const size_t words = slice * kSlices;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<uint64_t, Free>> parts;
  for (int i = 0; i < threads; ++i) {
    parts.emplace_back(static_cast<uint64_t*>(std::aligned_alloc(64, words * 8)));
    if (parts.back() == nullptr) throw std::bad_alloc();
  }
  {
    std::vector<std::thread> pool;
    for (const auto& part : parts)
      pool.emplace_back([&part, words] { std::fill_n(part.get(), words, uint64_t{1}); });
    for (std::thread& thread : pool) thread.join();
  }

  MachineRates rates;
  rates.read = rate(threads, seconds, static_cast<double>(slice) * 8 * threads, [&](int i, int r) {
    const uint64_t* part = parts[static_cast<size_t>(i)].get();
    keep(static_cast<float>(read(part + static_cast<size_t>(r) % kSlices * slice, slice)));
  });
  rates.fp32 = multiply_adds(threads, seconds, fma);
  const double bf16 = dot != nullptr ? multiply_adds(threads, seconds, dot) : 0.0;
  rates.bf16 = std::max(bf16, rates.fp32);
  return rates;
}

}  // namespace ni
