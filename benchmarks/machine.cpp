// What the machine gives, as one line of JSON: read bandwidth of memory and multiply-adds out of
// registers, with all threads. It shares nothing with the engine, so that the engine can be
// measured against it.
//   machine THREADS        rates are medians over about half a second each
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs fn(thread) on all threads, again and again for half a second. Median work a second.
template <typename Fn>
double rate(int threads, double work, const Fn& fn) {
  std::vector<double> times;
  for (const double start = now(); now() - start < 0.5 || times.size() < 5;) {
    std::vector<std::thread> pool;
    const double t = now();
    for (int i = 0; i < threads; ++i) pool.emplace_back(fn, i);
    for (std::thread& thread : pool) thread.join();
    times.push_back(now() - t);
  }
  std::sort(times.begin(), times.end());
  return work / times[times.size() / 2];
}

#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
uint64_t read_all(const uint64_t* data, size_t n) {
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

constexpr int kChains = 16;  // independent sums: enough to hide the latency
constexpr int kLoops = 2'000'000;
volatile float sink;  // where results go, so that they are computed

#if defined(__x86_64__)
__attribute__((target("avx512f"))) double fma_avx512(int loops) {
  __m512 sum[kChains];
  for (auto& s : sum) s = _mm512_set1_ps(1e-9f);
  const __m512 a = _mm512_set1_ps(1.0f - 1e-6f), b = _mm512_set1_ps(1e-7f);
  for (int i = 0; i < loops; ++i)
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_fmadd_ps(s, a, b);
  for (auto& s : sum) sink = s[0];
  return 2.0 * 16 * kChains;
}
__attribute__((target("avx512f,avx512bf16"))) double dot_avx512(int loops) {
  __m512 sum[kChains];
  for (auto& s : sum) s = _mm512_set1_ps(1e-9f);
  const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x33803380));  // 2^-24 twice
  for (int i = 0; i < loops; ++i)
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, a, a);
  for (auto& s : sum) sink = s[0];
  return 2.0 * 32 * kChains;
}
__attribute__((target("avx2,fma"))) double fma_avx2(int loops) {
  __m256 sum[12];  // of 16 registers
  for (auto& s : sum) s = _mm256_set1_ps(1e-9f);
  const __m256 a = _mm256_set1_ps(1.0f - 1e-6f), b = _mm256_set1_ps(1e-7f);
  for (int i = 0; i < loops; ++i)
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm256_fmadd_ps(s, a, b);
  for (auto& s : sum) sink = s[0];
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
  for (auto& s : sum) sink = s[0];
  return 2.0 * 4 * 12;
}

double multiply_adds(int threads, double (*kernel)(int)) {
  const double work = kernel(1) * kLoops * threads;
  return rate(threads, work, [kernel](int) { kernel(kLoops); });
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const size_t n = (size_t{64} << 20) / static_cast<size_t>(threads) / 32 * 32;  // 512 MiB in all
  std::vector<uint64_t*> data;
  for (int i = 0; i < threads; ++i) {
    data.push_back(static_cast<uint64_t*>(std::aligned_alloc(64, n * 8)));
    if (data.back() == nullptr) return 1;
    std::fill_n(data.back(), n, uint64_t{1});
  }
  const double bytes = static_cast<double>(n) * 8 * threads;
  const double read = rate(threads, bytes, [&](int i) {
    sink = static_cast<float>(read_all(data[static_cast<size_t>(i)], n));
  });

  double (*fma)(int) = fma_plain;
  double bf16 = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) bf16 = multiply_adds(threads, dot_avx512);
  if (__builtin_cpu_supports("avx512f"))
    fma = fma_avx512;
  else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    fma = fma_avx2;
#endif
  const double fp32 = multiply_adds(threads, fma);
  std::printf("{\"read\": %.4g, \"fp32\": %.4g, \"bf16\": %.4g}\n", read, fp32,
              std::max(bf16, fp32));
  for (uint64_t* p : data) std::free(p);
}
