// Cost of scheduler and block manager alone: one decode step (schedule + update) in the steady
// state, without a model. Wanted: linear in the batch, less than 1.5 times from 10 k to 1 M blocks,
// and under 30 us a step at 256 sequences.
//
//   bench_scheduler [--json]
//
// Contexts are about 500 tokens; in each step a sixteenth of the sequences fills a block and
// another sixteenth takes a new one. `prefix`: 480 of the tokens are a common prefix, because 4096
// separate contexts do not fit into 10 k blocks; `own`: none are. `fresh`: the pool has never been
// used. `aged`: every block holds cached contents, in random order, so each new block costs an
// eviction and, with 1 M blocks, a few cache lines from memory: what is left of the dependence on
// the number of blocks.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "engine/scheduler.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kBlockSize = 16;
constexpr int kVocab = 32000;
constexpr int kShared = 480;
constexpr int kStepsPerRound = 16;  // one new block for each sequence
constexpr int kRounds = 60;

struct Result {
  int num_seqs;
  int num_blocks;
  bool shared;
  bool aged;
  double median_us;
  double best_round_us;  // the quietest round's median: what is left without the machine's noise
};

std::shared_ptr<ni::Request> make_request(uint64_t id, int length, int num_shared,
                                          std::mt19937& random) {
  auto request = std::make_shared<ni::Request>();
  request->id = id;
  request->params.max_tokens = 64;
  std::uniform_int_distribution<int32_t> token(0, kVocab - 1);
  for (int i = 0; i < length; ++i) request->prompt.push_back(i < num_shared ? i : token(random));
  return request;
}

// Fills all blocks with cached contents and leaves them unreferenced, in random order.
void age(ni::BlockManager& blocks, std::mt19937& random) {
  const int per_sequence = 20;
  std::vector<ni::Sequence> sequences(static_cast<size_t>(blocks.num_blocks() / per_sequence));
  std::vector<size_t> order(sequences.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::vector<ni::BlockCopy> copies;
  for (ni::Sequence& seq : sequences) {
    auto request = make_request(0, per_sequence * kBlockSize, 0, random);
    seq.tokens = request->prompt;
    seq.request = std::move(request);
  }
  for (int b = 1; b <= per_sequence; ++b) {
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) blocks.grow(sequences[i], b * kBlockSize, copies);
  }
  for (const size_t i : order) {
    sequences[i].num_computed = sequences[i].num_tokens();
    blocks.commit(sequences[i]);
    blocks.free(sequences[i]);
  }
}

class Bench {
 public:
  Bench(int num_seqs, int num_blocks, bool shared, bool aged)
      : num_seqs_(num_seqs),
        shared_(shared),
        aged_(aged),
        blocks_(block_config(num_blocks)),
        scheduler_(scheduler_config(num_seqs), blocks_),
        samples_(static_cast<size_t>(num_seqs)) {
    if (aged) age(blocks_, random_);
  }

  Result run() {
    std::vector<double> all, round_medians;
    for (int round = 0; round < kRounds; ++round) {
      fill();
      std::vector<double> times;
      for (int i = 0; i < kStepsPerRound; ++i) times.push_back(timed_step());
      if (round >= 2) {  // the first ones warm up
        all.insert(all.end(), times.begin(), times.end());
        round_medians.push_back(median(times));
      }
      drain();
    }
    return {num_seqs_,   blocks_.num_blocks(),
            shared_,     aged_,
            median(all), *std::min_element(round_medians.begin(), round_medians.end())};
  }

 private:
  static ni::BlockManagerConfig block_config(int num_blocks) {
    ni::BlockManagerConfig config;
    config.num_blocks = num_blocks;
    config.block_size = kBlockSize;
    return config;
  }
  static ni::SchedulerConfig scheduler_config(int num_seqs) {
    ni::SchedulerConfig config;
    config.max_num_seqs = num_seqs;
    config.max_num_batched_tokens = 1 << 22;  // all prompts in one step
    config.max_model_len = 4096;
    config.max_waiting = 0;
    config.vocab_size = kVocab;
    config.eos_token_ids = {kVocab - 1, kVocab - 2};
    return config;
  }
  static double median(std::vector<double> values) {
    const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
  }

  void step() {
    updates_.clear();
    const ni::StepPlan& plan = scheduler_.schedule();
    if (!plan.empty()) scheduler_.update(samples_.data(), updates_);
  }

  double timed_step() {
    for (int32_t& token : samples_) token = static_cast<int32_t>(random_() % (kVocab - 2));
    const auto start = Clock::now();
    step();
    const std::chrono::duration<double, std::micro> time = Clock::now() - start;
    if (updates_.size() != static_cast<size_t>(num_seqs_)) {
      std::fprintf(stderr, "not the steady state: %zu of %d sequences got a token\n",
                   updates_.size(), num_seqs_);
      std::exit(1);
    }
    return time.count();
  }

  // Brings all sequences to decoding. Lengths differ, so that in each step a sixteenth of them
  // needs a new block.
  void fill() {
    const int num_shared = shared_ ? kShared : 0;
    for (int i = 0; i < num_seqs_; ++i) {
      scheduler_.add(make_request(next_id_++, kShared + 1 + i % kBlockSize, num_shared, random_));
      if (i == 0) step();  // the common prefix is in the cache before the others look it up
    }
    do {
      step();
    } while (updates_.size() != static_cast<size_t>(num_seqs_));
  }

  void drain() {
    updates_.clear();
    for (uint64_t id = next_id_ - static_cast<uint64_t>(num_seqs_); id < next_id_; ++id)
      scheduler_.abort(id, -1, ni::FinishReason::abort, updates_);
  }

  int num_seqs_;
  bool shared_;
  bool aged_;
  ni::BlockManager blocks_;
  ni::Scheduler scheduler_;
  std::vector<int32_t> samples_;
  std::vector<ni::SequenceUpdate> updates_;
  std::mt19937 random_{1};
  uint64_t next_id_ = 0;
};

void print_table(const std::vector<Result>& results) {
  std::printf("%9s %9s %8s %6s %10s %12s %8s\n", "sequences", "blocks", "context", "pool",
              "median us", "quietest us", "ns/seq");
  for (const Result& r : results)
    std::printf("%9d %9d %8s %6s %10.2f %12.2f %8.1f\n", r.num_seqs, r.num_blocks,
                r.shared ? "prefix" : "own", r.aged ? "aged" : "fresh", r.median_us,
                r.best_round_us, 1000 * r.median_us / r.num_seqs);
}

void print_json(const std::vector<Result>& results) {
  std::printf("{\"benchmark\": \"scheduler\", \"block_size\": %d, \"results\": [", kBlockSize);
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    std::printf(
        "%s\n  {\"num_seqs\": %d, \"num_blocks\": %d, \"context\": \"%s\", \"pool\": \"%s\", "
        "\"median_us\": %.3f, \"quietest_us\": %.3f}",
        i == 0 ? "" : ",", r.num_seqs, r.num_blocks, r.shared ? "prefix" : "own",
        r.aged ? "aged" : "fresh", r.median_us, r.best_round_us);
  }
  std::printf("\n]}\n");
}

}  // namespace

int main(int argc, char** argv) {
  const bool json = argc == 2 && std::strcmp(argv[1], "--json") == 0;
  if (argc > 1 && !json) {
    std::fprintf(stderr, "usage: %s [--json]\n", argv[0]);
    return 2;
  }
  constexpr int kSmall = 10'000, kLarge = 1'000'000;
  std::vector<Result> results;
  for (const bool aged : {false, true}) {
    for (const int num_seqs : {16, 256, 4096})
      for (const int num_blocks : {kSmall, kLarge})
        results.push_back(Bench(num_seqs, num_blocks, true, aged).run());
    for (const int num_blocks : {kSmall, kLarge})
      results.push_back(Bench(256, num_blocks, false, aged).run());
    results.push_back(Bench(4096, kLarge, false, aged).run());
  }
  json ? print_json(results) : print_table(results);
  return 0;
}
