// What the CUDA kernels reach, beside the ceilings of the card in the same run: the rate of a copy,
// and that of a large bf16 product. One table a group; --json also writes the numbers to a file.
//   bench_cuda [--json FILE] [rows|linear|skinny|large|decode|prefill|sampler|launch …]
//   default: all
//
// A time is the median over replays of a graph of many calls, over the number of calls, so kernels
// overlap as they do in a captured step (programmatic dependent launch). Data are random. What a
// step finds in device memory alternates between enough copies that L2 does not hold it: weights,
// caches, embedding rows, and activations larger than half of L2. Smaller activations stay: in a
// step, too, the operator before has just written them.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>

#include "bench.h"

namespace ni::cuda::bench {
namespace {

// -- Ceilings -------------------------------------------------------------------------------------

void bench_ceilings(Bench& b) {
  const double tflops = product_tflops(b);  // also brings the clocks up
  constexpr int64_t kBytes = 1024 * kMiB;
  const Device<bf16> from = random_bf16(kBytes / 2), to(kBytes / 2);
  const double us = b.timer.us_on_stream([&](int64_t) {
    check_cuda(
        cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, b.timer.stream()),
        "a copy");
  });
  b.copy_gbs = b.gbs(2.0 * kBytes, us);
  b.finish({"ceilings",
            "Ceilings",
            {"ceiling", "value", "unit"},
            {{"copy of 1 GiB, read and written", b.copy_gbs, "GB/s"},
             {"bf16 product of 8192 x 8192 x 8192, fastest plan", tflops, "TFLOP/s"}}});
}

// -- Launches -------------------------------------------------------------------------------------

void bench_launch(Bench& b) {
  constexpr int64_t kNodes = 100, kColumns = 64;
  const Device<bf16> x = random_bf16(kColumns), out(kColumns);
  const Device<float> weight = random_f32(kColumns);
  const auto tiny = [&](int64_t) {
    norm(x.data(), kColumns, nullptr, 0, 1, kColumns, {weight.data(), nullptr}, {}, DType::bf16,
         out.data(), kColumns, true, b.timer.stream());
  };
  tiny(0);  // loads the kernel
  b.finish({"launch",
            "The price of a launch",
            {"what", "us"},
            {{"node of a graph of 100 (norm of one row of 64)", b.timer.us_of(kNodes, 1, tiny)}}});
}

// -- The program ----------------------------------------------------------------------------------

struct Group {
  const char* name;
  void (*run)(Bench&);
};
constexpr Group kGroups[] = {{"rows", bench_rows},       {"linear", bench_linear},
                             {"skinny", bench_skinny},   {"large", bench_large},
                             {"decode", bench_decode},   {"prefill", bench_prefill},
                             {"sampler", bench_sampler}, {"launch", bench_launch}};

void write_json(const Bench& b, const std::string& path) {
  std::ofstream file(path);
  file << "{\n  \"card\": \"" << b.name << "\",\n  \"arch\": " << b.card.arch
       << ",\n  \"multiprocessors\": " << b.card.num_sms << ",\n  \"l2_bytes\": " << b.l2_bytes;
  for (const Table& t : b.tables) file << ",\n  " << t.json();
  file << "\n}\n";
  check_runtime(static_cast<bool>(file.flush()), "cannot write ", path);
}

void run(const std::vector<std::string>& args) {
  std::string json;
  std::vector<std::string> wanted;
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i] == "--json") {
      check_arg(i + 1 < args.size(), "--json needs a file");
      json = args[++i];
      continue;
    }
    check_arg(std::any_of(std::begin(kGroups), std::end(kGroups),
                          [&](const Group& g) { return args[i] == g.name; }),
              "no group ", args[i],
              "; rows, linear, skinny, large, decode, prefill, sampler and launch are");
    wanted.push_back(args[i]);
  }
  Bench bench;
  std::printf("%s, %d multiprocessors, %lld MiB of L2\n", bench.name.c_str(), bench.card.num_sms,
              static_cast<long long>(bench.l2_bytes / kMiB));
  bench_ceilings(bench);
  for (const Group& g : kGroups)
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), g.name) != wanted.end())
      g.run(bench);
  if (!json.empty()) write_json(bench, json);
}

}  // namespace
}  // namespace ni::cuda::bench

int main(int argc, char** argv) {
  try {
    ni::cuda::bench::run({argv + 1, argv + argc});
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_cuda: %s\n", e.what());
    return 1;
  }
}
