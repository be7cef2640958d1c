// The sampler, one row (a whole vocabulary) at a time:
//   raw log-probabilities and ranks -> bias -> mask -> penalties -> temperature -> top-k -> top-p
//   -> min-p -> draw (core/philox.h): the inverse CDF in the order of token ids, then a tournament.
//
// Penalties are Hugging Face's and vLLM's: repetition divides positive logits and multiplies
// negative ones, presence and frequency subtract. top-k keeps exactly k tokens (ties: lower ids
// first); top-p keeps the fewest most likely tokens whose mass within the top-k reaches p, one at
// least; min-p drops tokens less likely than min_p times the most likely one, which does not depend
// on the order. A temperature below 1e-5 is greedy; the lowest id wins ties. NaN counts as
// -infinity. Where every token is banned, the best raw logit that the mask allows is taken, and 0
// if there is none. Log-probabilities, ranks and top tokens are written where num_logprobs >= 0 or
// a target is scored.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/philox.h"
#include "cpu/cpu_backend.h"

namespace ni {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;
// Tokens are sorted into bins of 1/64 nat below the maximum, so that only the bin in which top-k or
// top-p cuts needs sorting. What lies further below than all bins (64 nats: a factor of 1e-28) is
// not cut: neither the 53 bits of a draw nor its rounds reach it.
constexpr int kBins = 4096;
constexpr float kBinsPerNat = 64;
constexpr int64_t kChunk = 1024;

// A thread's memory for one row; `n` is the vocabulary.
struct Workspace {
  float* z;         // [n] processed logits
  float* p;         // [n] exp((z - max) / temperature)
  int32_t* ids;     // [n] tokens of the bin that is cut; the heap of the most likely tokens
  uint16_t* bins;   // [n] kBins: below all bins
  double* mass;     // [kBins + 1]
  double* chunks;   // [chunks of n]
  int32_t* counts;  // [kBins + 1]

  static int64_t bytes(int64_t n) {
    return ((n + kChunk - 1) / kChunk + kBins + 1) * 8 + (kBins + 1) * 4 + (n + n % 2) * 14 + 64;
  }
  Workspace(char* data, int64_t n) {
    mass = reinterpret_cast<double*>(data);
    chunks = mass + kBins + 1;
    counts = reinterpret_cast<int32_t*>(chunks + (n + kChunk - 1) / kChunk);
    z = reinterpret_cast<float*>(counts + kBins + 1);
    p = z + n;
    ids = reinterpret_cast<int32_t*>(p + n);
    bins = reinterpret_cast<uint16_t*>(ids + n);
  }
};

float without_nan(float logit) {
  return std::isnan(logit) ? -kInf : logit;
}

// More likely first; ties: lower id first.
struct ByLogit {
  const float* z;
  bool operator()(int32_t a, int32_t b) const {
    const float x = without_nan(z[a]), y = without_nan(z[b]);
    return x != y ? x > y : a < b;
  }
};

class RowSampler {
 public:
  RowSampler(const KernelTable& kernels, const StepInputs& in, const SamplingRow& row,
             const float* raw, int64_t vocab, Workspace ws)
      : kernels_(kernels), in_(in), row_(row), raw_(raw), n_(vocab), ws_(ws) {
    check_arg(row.target < vocab, "sample: target ", row.target, " is not in the vocabulary");
    const int64_t words = (vocab + 31) / 32;
    if (row.mask_row >= 0) mask_ = in.token_masks + row.mask_row * words;
  }

  int32_t choose() {
    if (row_.target >= 0) return row_.target;
    const float* z = process();
    const float best = kernels_.max(z, n_);
    if (best == -kInf) return fallback();
    if (row_.temperature < kGreedyBelow || best == kInf) return first_equal(z, best);
    return draw(z, best);
  }

  void score(int32_t token, int64_t at, const SampleOutputs& out) {
    if (row_.num_logprobs < 0 && row_.target < 0) return;
    const float best = kernels_.max(raw_, n_);
    const double sum = std::isinf(best) ? 1 : kernels_.exp_sum(raw_, n_, best, 1.0f, nullptr);
    const double log_sum = static_cast<double>(best) + std::log(sum);
    const auto logprob = [&](int32_t id) {
      if (best == -kInf || std::isnan(raw_[id])) return -kInf;
      return raw_[id] == best && sum == 1
                 ? 0.0f
                 : static_cast<float>(static_cast<double>(raw_[id]) - log_sum);
    };
    if (out.logprobs != nullptr) out.logprobs[at] = logprob(token);
    if (out.ranks != nullptr) {
      const float value = without_nan(raw_[token]);
      int32_t above = 0;
      for (int64_t i = 0; i < n_; ++i) above += raw_[i] > value;
      out.ranks[at] = above + 1;
    }
    const int64_t wanted = std::min<int64_t>(row_.num_logprobs, out.max_logprobs);
    if (wanted <= 0) return;
    const int64_t found = most_likely(wanted);
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t to = at * out.max_logprobs + i;
      out.top_ids[to] = i < found ? ws_.ids[i] : -1;
      out.top_logprobs[to] = i < found ? logprob(ws_.ids[i]) : -kInf;
    }
  }

 private:
  bool allowed(int64_t id) const {
    return mask_ == nullptr || (mask_[id / 32] >> (id % 32) & 1u) != 0;
  }
  void check_token(int32_t id) const {
    check_arg(id >= 0 && id < n_, "sample: token ", id, " is not in the vocabulary of ", n_);
  }

  // The logits after bias, mask and penalties; the raw ones stay as they are.
  const float* process() {
    const bool penalties =
        row_.counts_end > row_.counts_begin &&
        (row_.repetition_penalty != 1 || row_.presence_penalty != 0 || row_.frequency_penalty != 0);
    const bool biases = row_.bias_end > row_.bias_begin;
    if (!penalties && !biases && mask_ == nullptr) return raw_;
    float* z = ws_.z;
    std::copy_n(raw_, n_, z);
    for (int32_t i = row_.bias_begin; i < row_.bias_end; ++i) {
      const auto [token, bias] = in_.token_biases[i];
      check_token(token);
      z[token] += bias;
    }
    if (mask_ != nullptr) {
      for (int64_t i = 0; i < n_; ++i)
        if (!allowed(i)) z[i] = -kInf;
    }
    if (!penalties) return z;
    for (int32_t i = row_.counts_begin; i < row_.counts_end; ++i) {
      const auto [token, count] = in_.token_counts[i];
      check_token(token);
      float& v = z[token];
      v = v > 0 ? v / row_.repetition_penalty : v * row_.repetition_penalty;
      if (count > 0)
        v -= row_.presence_penalty + row_.frequency_penalty * static_cast<float>(count);
    }
    return z;
  }

  int32_t fallback() const {
    int32_t best = -1, lowest = -1;
    for (int32_t i = 0; i < n_; ++i) {
      if (!allowed(i)) continue;
      if (lowest < 0) lowest = i;
      if (raw_[i] > (best < 0 ? -kInf : raw_[best])) best = i;
    }
    return best >= 0 ? best : std::max(lowest, 0);
  }

  int32_t first_equal(const float* z, float value) const {
    return static_cast<int32_t>(std::find(z, z + n_, value) - z);
  }

  // Ids of the `wanted` largest raw logits into ws_.ids, by a heap whose front is the least of
  // them.
  int64_t most_likely(int64_t wanted) {
    const ByLogit before{raw_};
    const int64_t size = std::min(wanted, n_);
    int32_t* heap = ws_.ids;
    for (int32_t i = 0; i < size; ++i) heap[i] = i;
    std::make_heap(heap, heap + size, before);
    const auto least = [&] { return without_nan(raw_[heap[0]]); };
    float limit = least();
    for (auto i = static_cast<int32_t>(size); i < n_; ++i) {
      if (!(raw_[i] > limit)) continue;  // a tie with a lower id loses
      std::pop_heap(heap, heap + size, before);
      heap[size - 1] = i;
      std::push_heap(heap, heap + size, before);
      limit = least();
    }
    std::sort_heap(heap, heap + size, before);
    return size;
  }

  int32_t draw(const float* z, float best) {
    const float factor = 1.0f / row_.temperature;
    kernels_.exp_sum(z, n_, best, factor, ws_.p);
    const bool top_k = row_.top_k > 0 && row_.top_k < n_, top_p = row_.top_p < 1;
    if (top_k || top_p) {
      fill_bins(z, best, factor);
      double kept = 0;  // mass of the tokens that stay
      for (int b = 0; b < kBins; ++b) kept += ws_.mass[b];
      int32_t last = -1;  // the least likely token that stays; -1: all stay
      if (top_k) last = cut_count(z, row_.top_k, kept);
      if (top_p) last = cut_mass(z, static_cast<double>(row_.top_p) * kept, last);
      if (last >= 0) {
        const float limit = z[last];
        for (int32_t i = 0; i < n_; ++i)
          ws_.p[i] = (z[i] > limit) | ((z[i] == limit) & (i <= last)) ? ws_.p[i] : 0;
      }
    }
    if (row_.min_p > 0) {  // the most likely token has p = 1
      for (int64_t i = 0; i < n_; ++i) ws_.p[i] = ws_.p[i] < row_.min_p ? 0 : ws_.p[i];
    }
    const auto position = static_cast<uint32_t>(row_.position);
    const int32_t at = inverse_cdf(philox_uniform(row_.seed, row_.choice, position));
    return play(at / kUnitTokens, philox_rounds(row_.seed, row_.choice, position));
  }

  // The tournament's winner in a unit.
  int32_t play(int32_t unit, const RoundDraws& draws) const {
    float p[kUnitTokens] = {};  // of all that have met on the token's side; after a round, of the
                                // lower one's place
    int32_t winner[kUnitTokens];
    for (int32_t i = 0; i < kUnitTokens; ++i) {
      winner[i] = unit * kUnitTokens + i;
      if (winner[i] < n_) p[i] = ws_.p[winner[i]];
    }
    int met = 0;  // bits in which nobody differs any more
    for (int r = 0; r < kUnitRounds; ++r) {
      const int bit = 1 << round_bit(r);
      met |= bit;
      for (int low = 0; low < kUnitTokens; ++low) {
        if ((low & met) != 0) continue;
        const float both = p[low] + p[low | bit];
        if (!low_side_wins(draws.v[r], p[low], both)) winner[low] = winner[low | bit];
        p[low] = both;
      }
    }
    return winner[0];
  }

  void fill_bins(const float* z, float best, float factor) {
    std::fill_n(ws_.counts, kBins + 1, 0);
    std::fill_n(ws_.mass, kBins + 1, 0.0);
    const float per_logit = factor * kBinsPerNat, end = kBins;
    for (int64_t i = 0; i < n_; ++i) {  // NaN and -infinity go to the end, too
      const float below = (best - z[i]) * per_logit;
      ws_.bins[i] = static_cast<uint16_t>(static_cast<int32_t>(below < end ? below : end));
    }
    for (int64_t i = 0; i < n_; ++i) {
      ++ws_.counts[ws_.bins[i]];
      ws_.mass[ws_.bins[i]] += static_cast<double>(ws_.p[i]);
    }
  }

  // Tokens of a bin into ws_.ids, most likely first.
  int64_t sort_bin(const float* z, int bin) {
    int64_t count = 0;
    for (int32_t i = 0; i < n_; ++i)
      if (ws_.bins[i] == bin) ws_.ids[count++] = i;
    std::sort(ws_.ids, ws_.ids + count, ByLogit{z});
    return count;
  }

  // The k-th most likely token (-1 if there are fewer); `kept` becomes the mass down to it.
  int32_t cut_count(const float* z, int32_t k, double& kept) {
    int32_t count = 0;
    double mass = 0;
    for (int b = 0; b < kBins; ++b) {
      if (count + ws_.counts[b] >= k) {
        sort_bin(z, b);
        for (int32_t i = 0; i < k - count; ++i) mass += static_cast<double>(ws_.p[ws_.ids[i]]);
        kept = mass;
        return ws_.ids[k - count - 1];
      }
      count += ws_.counts[b];
      mass += ws_.mass[b];
    }
    return -1;
  }

  // The token with which the mass reaches `target`, not beyond `last`.
  int32_t cut_mass(const float* z, double target, int32_t last) {
    double mass = 0;
    for (int b = 0; b < kBins; ++b) {
      if (ws_.counts[b] > 0 && mass + ws_.mass[b] >= target) {
        const int64_t count = sort_bin(z, b);
        for (int64_t i = 0; i < count; ++i) {
          mass += static_cast<double>(ws_.p[ws_.ids[i]]);
          if (mass >= target || ws_.ids[i] == last) return ws_.ids[i];
        }
      } else {
        mass += ws_.mass[b];
      }
      if (last >= 0 && ws_.bins[last] == b) return last;
    }
    return last;
  }

  // The first token at which the running sum of p exceeds u times the whole.
  int32_t inverse_cdf(double u) {
    const int64_t chunks = (n_ + kChunk - 1) / kChunk;
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      double sum[4] = {};
      const int64_t begin = c * kChunk, end = std::min(begin + kChunk, n_);
      int64_t i = begin;
      for (; i + 4 <= end; i += 4)
        for (int j = 0; j < 4; ++j) sum[j] += static_cast<double>(ws_.p[i + j]);
      for (; i < end; ++i) sum[0] += static_cast<double>(ws_.p[i]);
      ws_.chunks[c] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      total += ws_.chunks[c];
    }
    double left = u * total;
    int64_t chunk = 0, last_chunk = 0;
    for (; chunk < chunks; ++chunk) {
      if (ws_.chunks[chunk] > 0) last_chunk = chunk;
      if (left < ws_.chunks[chunk]) break;
      left -= ws_.chunks[chunk];
    }
    if (chunk == chunks) chunk = last_chunk;  // rounding: the last token that is possible
    int64_t token = 0;
    for (int64_t i = chunk * kChunk; i < std::min((chunk + 1) * kChunk, n_); ++i) {
      if (ws_.p[i] <= 0) continue;
      token = i;
      if (left < static_cast<double>(ws_.p[i])) break;
      left -= static_cast<double>(ws_.p[i]);
    }
    return static_cast<int32_t>(token);
  }

  const KernelTable& kernels_;
  const StepInputs& in_;
  const SamplingRow& row_;
  const float* raw_;
  const int64_t n_;
  Workspace ws_;
  const uint32_t* mask_ = nullptr;
};

}  // namespace

void CpuBackend::sample(Tensor logits, const StepInputs& in, int32_t first,
                        const SampleOutputs& out) {
  const int64_t vocab = logits.cols();
  check_matrix(logits, logits.rows(), vocab, "sample: logits");
  check_arg(vocab > 0 && vocab < std::numeric_limits<int32_t>::max(), "sample: vocabulary of ",
            vocab);
  check_arg(first >= 0 && first + logits.rows() <= in.num_logits, "sample: rows [", first, ", ",
            first + logits.rows(), ") of ", in.num_logits);
  check_arg(out.token_ids != nullptr, "sample: no place for token_ids");
  check_arg(out.max_logprobs <= 0 || (out.top_ids != nullptr && out.top_logprobs != nullptr),
            "sample: no place for the most likely tokens");
  const int64_t workspace = (Workspace::bytes(vocab) + 63) / 64 * 64;
  char* memory = scratch(static_cast<size_t>(workspace * pool_.size()));
  pool_.parallel_items(logits.rows(), [&](int64_t r, int worker) {
    const int64_t at = first + r;
    RowSampler sampler(kernels_, in, in.sampling[at], logits.as<float>() + r * logits.row_stride,
                       vocab, Workspace(memory + worker * workspace, vocab));
    out.token_ids[at] = sampler.choose();
    if (in.host_ids != nullptr) in.host_ids[at] = out.token_ids[at];
    sampler.score(out.token_ids[at], at, out);
  });
}

}  // namespace ni
