#include "bench.h"

#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>

namespace ni::cuda::bench {
namespace {

std::string text_of(const char* how, int digits, double number) {
  char out[64];
  std::snprintf(out, sizeof(out), how, digits, number);
  return out;
}

}  // namespace

// -- Tables ---------------------------------------------------------------------------------------

std::string Cell::markdown() const {
  if (is_text) return text;
  if (std::isnan(number)) return "-";
  const double size = std::abs(number);
  const int digits = number == std::floor(number) || size >= 100 ? 0 : size >= 10 ? 1 : 2;
  return text_of("%.*f", digits, number);
}

std::string Cell::json() const {
  if (is_text) return "\"" + text + "\"";
  return std::isfinite(number) ? text_of("%.*g", 6, number) : "null";
}

void Table::print() const {
  std::printf("\n%s\n\n|", title.c_str());
  for (const std::string& c : columns) std::printf(" %s |", c.c_str());
  std::printf("\n|");
  for (size_t i = 0; i < columns.size(); ++i) std::printf(i == 0 ? "---|" : "--:|");
  std::printf("\n");
  for (const auto& row : rows) {
    std::printf("|");
    for (const Cell& c : row) std::printf(" %s |", c.markdown().c_str());
    std::printf("\n");
  }
  std::fflush(stdout);
}

std::string Table::json() const {
  std::string out = "\"" + name + "\": [";
  for (size_t r = 0; r < rows.size(); ++r) {
    out += r == 0 ? "\n    {" : ",\n    {";
    for (size_t c = 0; c < columns.size(); ++c)
      out += (c == 0 ? "\"" : ", \"") + columns[c] + "\": " + rows[r][c].json();
    out += "}";
  }
  return out + "\n  ]";
}

// -- Memory ---------------------------------------------------------------------------------------

const std::vector<float>& normals() {
  static const std::vector<float> pool = [] {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> v(1'000'008);  // no power of two: rows of a matrix differ
    for (float& x : v) x = normal(rng);
    return v;
  }();
  return pool;
}

Device<bf16> random_bf16(int64_t n, float scale) {
  return random_of<bf16>(n, [&](float v) { return to_bf16(scale * v); });
}
Device<float> random_f32(int64_t n, float scale) {
  return random_of<float>(n, [&](float v) { return scale * v; });
}

std::vector<int32_t> permutation(int32_t n) {
  std::vector<int32_t> v(static_cast<size_t>(n));
  std::iota(v.begin(), v.end(), 0);
  std::shuffle(v.begin(), v.end(), std::mt19937(1));
  return v;
}

// -- Time -----------------------------------------------------------------------------------------

Timer::Timer() {
  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
  for (cudaEvent_t& e : events_) check_cuda(cudaEventCreate(&e), "an event");
}

Timer::~Timer() {
  for (cudaEvent_t e : events_) cudaEventDestroy(e);
  cudaStreamDestroy(stream_);
}

double Timer::us(int64_t copies, const Call& call) {
  check_cuda(cudaDeviceSynchronize(), "a benchmark");  // fills do not use our stream
  call(int64_t{0});                                    // loads the kernel
  record(0);
  call(copies - 1);
  record(1);
  const double once = std::max(1.0, between(0, 1));
  const int64_t least = std::max<int64_t>(copies, 4);
  return us_of(std::clamp(static_cast<int64_t>(kGraphUs / once), least, std::max(least, kCalls)),
               copies, call);
}

double Timer::us_of(int64_t calls, int64_t copies, const Call& call) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
  for (int64_t i = 0; i < calls; ++i) call(i % copies);
  check_cuda(cudaStreamEndCapture(stream_, &graph), "capture");
  check_cuda(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  const double us =
      us_on_stream([&](int64_t) { check_cuda(cudaGraphLaunch(exec, stream_), "cudaGraphLaunch"); });
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  return us / static_cast<double>(calls);
}

double Timer::us_on_stream(const Call& call) {
  // All at once, so that the card never waits for the host.
  for (int i = -kWarmups; i < kRounds; ++i) {
    if (i >= 0) record(i);
    call(i);
  }
  record(kRounds);
  std::vector<double> times;
  for (int i = 0; i < kRounds; ++i) times.push_back(between(i, i + 1));
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2];
}

void Timer::record(int i) {
  check_cuda(cudaEventRecord(events_[i], stream_), "cudaEventRecord");
}

double Timer::between(int i, int j) {
  float ms = 0;
  check_cuda(cudaEventSynchronize(events_[j]), "a benchmark");
  check_cuda(cudaEventElapsedTime(&ms, events_[i], events_[j]), "cudaEventElapsedTime");
  return 1000.0 * static_cast<double>(ms);
}

Bench::Bench() {
  cudaDeviceProp p{};
  check_cuda(cudaGetDeviceProperties(&p, 0), "cudaGetDeviceProperties");
  name = p.name;
  card = {10 * p.major + p.minor, p.multiProcessorCount, static_cast<int>(p.sharedMemPerBlockOptin),
          static_cast<int>(p.sharedMemPerMultiprocessor)};
  l2_bytes = p.l2CacheSize;
}

void Bench::finish(Table table) {
  table.print();
  tables.push_back(std::move(table));
}

}  // namespace ni::cuda::bench
