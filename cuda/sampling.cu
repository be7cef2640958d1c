// The sampler; what it computes is told at the top of cpu/sampling.cpp, with which it agrees token
// for token, up to rounding at the boundary of a draw:
//   raw log-probabilities, ranks; bias -> mask -> penalties -> temperature -> top-k -> top-p ->
//   min-p -> the first token at which the running sum of p exceeds u times the whole.
// logits: [rows, vocab] fp32, never written. A row is cut into 32 segments, whatever else runs:
//   segment_kernel  32 blocks a row: maximum, and mass = sum exp((z - maximum) / temperature).
//                   Rows with biases, masks or penalties get a processed copy in the workspace.
//   bin_kernel      4 to 32 blocks a row, narrowed rows only (top-k, top-p, min-p): tokens and mass
//                   by distance from the maximum, in bins of 1/64 nat.
//   list_kernel     as many: the tokens up to the bin in which the row is cut, if they are few.
//   choose_kernel   1 block a row, a warp a segment: the cut, the draw, the scores.
// Greedy and plain draws read each logit once from device memory (rows * vocab * 4 bytes, which
// bounds them), and one segment again; narrowed rows are read three times, and where the tokens
// that are kept are too many to list, some times more by one block. Masses that decide a cut are
// integers, so atomics may add them in any order; all other sums have a fixed one.
#include "core/philox.h"
#include "cuda/sampling.cuh"

namespace ni::cuda {
namespace {

using namespace sampling;

constexpr float kGreedyBelow = 1e-5f;
constexpr int kSegmentThreads = 256, kBinThreads = 512;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kMaxVocab = 1 << 21;  // so that masses fit into 64 bits

__device__ bool is_greedy(const SamplingRow& r) {
  return r.temperature < kGreedyBelow;
}
__device__ float factor_of(const SamplingRow& r) {
  return is_greedy(r) ? 1.0f : 1.0f / r.temperature;
}
__device__ bool is_scored(const SamplingRow& r) {
  return r.num_logprobs >= 0 || r.target >= 0;
}
__device__ bool has_penalties(const SamplingRow& r) {
  return r.counts_end > r.counts_begin &&
         (r.repetition_penalty != 1 || r.presence_penalty != 0 || r.frequency_penalty != 0);
}
__device__ bool is_processed(const SamplingRow& r) {
  return r.bias_end > r.bias_begin || r.mask_row >= 0 || has_penalties(r);
}
__device__ bool has_top_k(const SamplingRow& r, int32_t vocab) {
  return r.top_k > 0 && r.top_k < vocab;
}
__device__ bool has_cut(const SamplingRow& r, int32_t vocab) {
  return r.target < 0 && !is_greedy(r) && (has_top_k(r, vocab) || r.top_p < 1);
}
__device__ bool is_narrowed(const SamplingRow& r, int32_t vocab) {
  return has_cut(r, vocab) || (r.target < 0 && !is_greedy(r) && r.min_p > 0);
}
__device__ const uint32_t* mask_of(const Sampler& s, const SamplingRow& r) {
  const int64_t words = (s.vocab + 31) / 32;
  return r.mask_row < 0 ? nullptr : s.step->token_masks + r.mask_row * words;
}
__device__ bool is_allowed(const uint32_t* mask, int32_t id) {
  return mask == nullptr || (mask[id / 32] >> (id % 32) & 1u) != 0;
}

// -- segment_kernel -------------------------------------------------------------------------------

struct Summary {
  float max;
  int32_t argmax;
  double mass;
};

// What a thread has of a segment, or of a part of it: all on the way at once, vectors of four where
// rows are aligned. NaN counts as -infinity.
struct Batch {
  static constexpr int kVectors = 5, kSize = 4 * kVectors;
  float v[kSize];

  // Of the i-th element; neighbours of four are one vector.
  static __device__ int32_t id(int32_t begin, int i) {
    return begin + 4 * (i / 4 * kSegmentThreads + static_cast<int32_t>(threadIdx.x)) + i % 4;
  }
  __device__ void load(const float* x, int32_t begin, int32_t end) {
    const bool vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int32_t from = id(begin, 4 * u);
      float4 four{-kInf, -kInf, -kInf, -kInf};
      if (vectors && from + 4 <= end) {
        four = *reinterpret_cast<const float4*>(x + from);
      } else if (from < end) {
        four.x = x[from];
        if (from + 1 < end) four.y = x[from + 1];
        if (from + 2 < end) four.z = x[from + 2];
        if (from + 3 < end) four.w = x[from + 3];
      }
      v[4 * u] = four.x, v[4 * u + 1] = four.y, v[4 * u + 2] = four.z, v[4 * u + 3] = four.w;
    }
  }
  // The lowest id that has the value, or kMaxInt.
  __device__ int32_t find(float value, int32_t begin) const {
    int32_t found = kMaxInt;
#pragma unroll
    for (int i = kSize - 1; i >= 0; --i)
      if (v[i] == value) found = id(begin, i);
    return found;
  }
  // The same of a batch that is here no more.
  static __device__ int32_t find_again(const float* x, int32_t begin, int32_t end, float value) {
#pragma unroll 1
    for (int i = 0; i < kSize; ++i)
      if (const int32_t at = id(begin, i); at < end && x[at] == value) return at;
    return kMaxInt;
  }
};

// Of x[begin, end), of which the first batch is there: in thread 0. A thread's sum follows its own
// maximum, and is scaled to the block's at the end.
__device__ Summary summarize(Batch batch, const float* x, int32_t begin, int32_t end, float factor,
                             bool with_mass) {
  constexpr int kWarps = kSegmentThreads / 32;
  __shared__ uint32_t keys[kWarps], ids[kWarps];
  __shared__ double masses[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float top = -kInf;
  int32_t top_begin = begin;  // of the batch that has it
  double mass = 0;
  for (;;) {
    const float before = top;
#pragma unroll
    for (const float v : batch.v) top = fmaxf(top, v);  // not NaN
    if (top > before) top_begin = begin;
    if (with_mass) {
      const Softmax softmax{fmaxf(top, kLowest), factor};
      float sum = 0;
#pragma unroll
      for (const float v : batch.v) sum += softmax.p_of(fmaxf(v, -kInf));
      mass = mass * static_cast<double>(softmax.p(before)) + static_cast<double>(sum);
    }
    begin += Batch::kSize * kSegmentThreads;
    if (begin >= end) break;
    batch.load(x, begin, end);
  }
  const uint32_t warp_key = __reduce_max_sync(kAllLanes, key_of(top));
  __syncthreads();  // earlier readers are done
  if (lane == 0) keys[warp] = warp_key;
  __syncthreads();
  const float max = value_of(__reduce_max_sync(kAllLanes, keys[lane % kWarps]));
  int32_t at = kMaxInt;
  if (top == max) {
    const bool is_here = top_begin + Batch::kSize * kSegmentThreads >= begin;
    at = is_here ? batch.find(max, top_begin) : Batch::find_again(x, top_begin, end, max);
  }
  const auto warp_id = __reduce_min_sync(kAllLanes, static_cast<uint32_t>(at));
  if (with_mass) mass = warp_reduce(mass * static_cast<double>(Softmax{max, factor}.p(top)), Add{});
  if (lane == 0) {
    ids[warp] = warp_id;
    masses[warp] = mass;
  }
  __syncthreads();
  Summary s{max, 0, 0};
  if (warp == 0) {
    s.argmax = static_cast<int32_t>(__reduce_min_sync(kAllLanes, ids[lane % kWarps]));
    if (with_mass) s.mass = warp_reduce(masses[lane % kWarps], Add{}, kWarps);
  }
  return s;
}

// z[begin, end) = the logits after bias, mask and penalties. What is masked stays at -infinity (or
// becomes NaN, which is the same), so the mask may come before the biases.
__device__ void process(const Sampler& s, const SamplingRow& r, const float* raw, float* z,
                        int32_t begin, int32_t end) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const uint32_t* mask = mask_of(s, r);
  for (int32_t i = begin + thread; i < end; i += kSegmentThreads)
    z[i] = is_allowed(mask, i) ? raw[i] : -kInf;
  __syncthreads();
  const auto is_mine = [&](int32_t token) { return token >= begin && token < end; };
  // A token may have several biases: one thread adds them, in their order.
  for (int32_t i = r.bias_begin; i < r.bias_end; ++i) {
    const TokenBias b = s.step->token_biases[i];
    if (b.token % kSegmentThreads == thread && is_mine(b.token)) z[b.token] += b.bias;
  }
  __syncthreads();
  if (!has_penalties(r)) return;
  for (int32_t i = r.counts_begin + thread; i < r.counts_end; i += kSegmentThreads) {
    const TokenCount c = s.step->token_counts[i];
    if (!is_mine(c.token)) continue;
    float v = z[c.token];  // rounded at each operation, as on the CPU
    v = v > 0 ? __fdiv_rn(v, r.repetition_penalty) : __fmul_rn(v, r.repetition_penalty);
    if (c.output_count > 0) {
      const float frequency = __fmul_rn(r.frequency_penalty, static_cast<float>(c.output_count));
      v = __fsub_rn(v, __fadd_rn(r.presence_penalty, frequency));
    }
    z[c.token] = v;
  }
  __syncthreads();
}

// Grid: [rows, kSegments].
__global__ void __launch_bounds__(kSegmentThreads, 4) segment_kernel(Sampler s) {
  wait_for_previous();
  let_next_start();
  const int row = static_cast<int>(blockIdx.x), segment = static_cast<int>(blockIdx.y);
  if (s.is_padding(row)) return;
  const int32_t begin = s.begin(segment), end = s.begin(segment + 1);
  const float* raw = s.raw(row);
  Batch batch;  // comes while the rest is looked up
  batch.load(raw, begin, end);
  const SamplingRow& r = s.step->sampling[s.first + row];
  constexpr int kShare = kBins / kSegments;
  if (is_narrowed(r, s.vocab) && threadIdx.x < kShare) {  // the next two kernels add to them
    const int bin = row * kBins + segment * kShare + static_cast<int>(threadIdx.x);
    s.counts[bin] = 0;
    s.mass[bin] = 0;
    s.num_listed[row] = 0;
  }
  const float factor = factor_of(r);
  Summary of_raw{}, of_z{};
  if (is_scored(r)) of_raw = summarize(batch, raw, begin, end, 1.0f, true);
  if (r.target < 0) {
    const bool processed = is_processed(r);
    if (processed) {
      process(s, r, raw, s.copy(row), begin, end);
      batch.load(s.copy(row), begin, end);
    }
    of_z = !processed && is_scored(r) && factor == 1
               ? of_raw
               : summarize(batch, processed ? s.copy(row) : raw, begin, end, factor, !is_greedy(r));
  }
  if (threadIdx.x == 0)
    s.stats[row * kSegments + segment] = {of_z.max, of_z.argmax, of_z.mass, of_raw.max,
                                          of_raw.mass};
}

// -- bin_kernel, list_kernel ----------------------------------------------------------------------

// A narrowed row's logits, and what a block of these kernels has of them.
struct Share {
  const float* z;
  int32_t begin, end;
  Softmax softmax;

  // Grid: [rows, 2^n], 2^n up to kSegments.
  __device__ Share(const Sampler& s, const SamplingRow& r, int row)
      : z(is_processed(r) ? s.copy(row) : s.raw(row)) {
    const auto share = static_cast<int>(kSegments / gridDim.y);
    begin = s.begin(static_cast<int>(blockIdx.y) * share);
    end = s.begin(static_cast<int>(blockIdx.y + 1) * share);
    softmax = {warp_max(s.stats[row * kSegments + static_cast<int>(threadIdx.x) % 32].max),
               factor_of(r)};
  }
  // Else nothing will be drawn.
  __device__ bool has_maximum() const { return !isinf(softmax.base); }
};

__global__ void __launch_bounds__(kBinThreads) bin_kernel(Sampler s) {
  wait_for_previous();
  let_next_start();
  const int row = static_cast<int>(blockIdx.x);
  if (s.is_padding(row)) return;
  const SamplingRow& r = s.step->sampling[s.first + row];
  if (!is_narrowed(r, s.vocab)) return;
  const Share share(s, r, row);
  if (!share.has_maximum()) return;

  __shared__ Bins bins;
  bins.clear();
  __syncthreads();
  const bool with_mass = r.top_p < 1;
  each_token(share.z, share.begin, share.end, [&](float v, int32_t) {
    bins.add(share.softmax.bin(v), with_mass ? share.softmax.units(v) : 0);
  });
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kBinThreads) {
    if (bins.counts[b] == 0) continue;
    atomicAdd(&s.counts[row * kBins + b], bins.counts[b]);
    atomicAdd(&s.mass[row * kBins + b], static_cast<unsigned long long>(bins.mass_of(b)));
  }
}

// What top-k, or else top-p, asks for; top-p of what top-k leaves, a mass of `kept`.
__device__ Goal top_k_goal(const SamplingRow& r) {
  return {false, static_cast<uint32_t>(r.top_k), 0};
}
__device__ Goal top_p_goal(const SamplingRow& r, uint64_t kept) {
  const double wanted = static_cast<double>(r.top_p) * static_cast<double>(kept);
  return {true, 0, __double2ull_ru(wanted)};
}

// All tokens up to the bin that the first of top-k, top-p and min-p reaches, if they can be sorted.
// Each block finds that bin for itself.
__global__ void __launch_bounds__(kChooseThreads) list_kernel(Sampler s) {
  __shared__ Shared sh;
  wait_for_previous();
  let_next_start();
  const int row = static_cast<int>(blockIdx.x);
  if (s.is_padding(row)) return;
  const SamplingRow& r = s.step->sampling[s.first + row];
  if (!is_narrowed(r, s.vocab)) return;
  const Share share(s, r, row);
  if (!share.has_maximum()) return;

  Selector selector(s, share.z, share.softmax, r.top_p < 1, row, sh);
  int last = kBins - 1;
  if (has_top_k(r, s.vocab)) {
    last = selector.bin_of(top_k_goal(r));
  } else if (r.top_p < 1) {
    last = selector.bin_of(top_p_goal(r, selector.mass()));
  } else {  // p >= min_p, and one bin for rounding
    last = static_cast<int>(fminf(-logf(r.min_p) * kBinsPerNat + 1, static_cast<float>(last)));
  }
  // The last bin has no lower end.
  if (last == kBins - 1 || selector.count_upto(last) > kSortCapacity) return;
  if (threadIdx.x == 0) sh.num_items = 0;
  __syncthreads();
  each_token(share.z, share.begin, share.end, [&](float v, int32_t id) {
    if (share.softmax.bin(v) <= last)
      sh.items[atomicAdd(&sh.num_items, 1)] = order_of(key_of(v), id);
  });
  __syncthreads();
  if (threadIdx.x == 0) sh.found = atomicAdd(&s.num_listed[row], sh.num_items);
  __syncthreads();
  uint64_t* listed = s.listed + static_cast<int64_t>(row) * kSortCapacity + sh.found;
  for (int i = static_cast<int>(threadIdx.x); i < sh.num_items; i += kChooseThreads)
    listed[i] = sh.items[i];
}

// -- choose_kernel --------------------------------------------------------------------------------

// Everything is banned: the best raw logit that the mask allows, else its lowest token, else 0.
__device__ int32_t fallback(const Sampler& s, const SamplingRow& r, const float* raw) {
  const uint32_t* mask = mask_of(s, r);
  uint64_t best = order_of(0, 0);
  each_token(raw, 0, s.vocab, [&](float v, int32_t id) {
    if (is_allowed(mask, id)) best = min(best, order_of(key_of(v), id));
  });
  return static_cast<int32_t>(block_reduce(best, Min{}));
}

// A draw from what top-k, top-p and min-p leave.
__device__ int32_t choose_narrowed(const Sampler& s, const SamplingRow& r, int row, const float* z,
                                   Softmax softmax, double u, Shared& sh) {
  const bool top_p = r.top_p < 1;
  Selector selector(s, z, softmax, top_p, s.plain ? -1 : row, sh);
  const int listed = selector.load_list();
  Cut cut;
  if (has_top_k(r, s.vocab)) {
    cut = selector.cut(top_k_goal(r));
  } else if (top_p) {
    cut.mass = selector.mass();
  }
  if (top_p) cut = selector.cut(top_p_goal(r, cut.mass));
  const Weight weight{softmax, r.min_p, cut.last};
  if (listed == 0) return find_in_row(s, z, weight, u, sh);

  // Ids ascend, as in the row.
  const auto swap = [](uint64_t v) { return v << 32 | v >> 32; };
  __syncthreads();  // earlier readers of `items` are done
  for (int i = static_cast<int>(threadIdx.x); i < listed; i += kChooseThreads)
    sh.items[i] = swap(sh.items[i]);
  selector.sort(listed);
  const auto weight_of = [&](int32_t i) {
    const uint64_t item = sh.items[i];
    return weight(value_of(~static_cast<uint32_t>(item)), static_cast<int32_t>(item >> 32));
  };
  double mass = 0;
  for (int i = static_cast<int>(threadIdx.x); i < listed; i += kChooseThreads)
    mass += static_cast<double>(weight_of(i));
  const int32_t found = find_index(0, listed, weight_of, u * block_reduce(mass, Add{}), sh);
  return static_cast<int32_t>(sh.items[found] >> 32);
}

__device__ int32_t choose(const Sampler& s, const SamplingRow& r, int row, Shared& sh) {
  const int lane = threadIdx.x % 32;
  const SegmentStats& stats = s.stats[row * kSegments + lane];
  const uint64_t order = warp_reduce(order_of(key_of(stats.max), stats.argmax), Min{});
  const float best = value_of(~static_cast<uint32_t>(order >> 32));
  if (best == -kInf) return fallback(s, r, s.raw(row));
  if (is_greedy(r) || best == kInf) return static_cast<int32_t>(order);

  const double u = philox_uniform(r.seed, r.choice, static_cast<uint32_t>(r.position));
  const float* z = is_processed(r) ? s.copy(row) : s.raw(row);
  const float factor = factor_of(r);
  if (is_narrowed(r, s.vocab)) return choose_narrowed(s, r, row, z, {best, factor}, u, sh);
  // In units of the segment's own maximum, as segment_kernel has summed.
  if (threadIdx.x < 32) {
    const double below = static_cast<double>(stats.max) - static_cast<double>(best);
    const double scale = exp(below * static_cast<double>(factor));
    pick_segment(stats.mass * scale, u, scale, sh);
  }
  __syncthreads();
  const Softmax softmax{s.stats[row * kSegments + sh.segment].max, factor};
  const int32_t begin = s.begin(sh.segment), end = s.begin(sh.segment + 1);
  return find_token(z, begin, end, Weight{softmax, 0, kNothing}, sh.left, sh);
}

// Log-probabilities and ranks of a row, over the logits as they came.
class Scorer {
 public:
  __device__ Scorer(const Sampler& s, int row, Shared& sh) : s_(s), raw_(s.raw(row)), sh_(sh) {
    const int lane = threadIdx.x % 32;
    const SegmentStats& stats = s.stats[row * kSegments + lane];
    best_ = warp_max(stats.raw_max);
    if (threadIdx.x < 32) {
      const double best = static_cast<double>(best_);
      const double mass = stats.raw_mass * exp(static_cast<double>(stats.raw_max) - best);
      const double sum = warp_reduce(stats.raw_max > -kInf ? mass : 0.0, Add{});
      if (lane == 0) sh.log_sum = isinf(best_) ? best : best + log(sum);
    }
    __syncthreads();
    log_sum_ = sh.log_sum;
  }

  __device__ float logprob(float value) const {
    if (best_ == -kInf) return -kInf;
    if (static_cast<double>(value) == log_sum_) return 0;  // both may be infinite
    return static_cast<float>(static_cast<double>(value) - log_sum_);
  }

  __device__ int32_t rank(float value) const {
    int32_t above = 0;
    each_token(raw_, 0, s_.vocab, [&](float v, int32_t) { above += v > value; });
    return block_reduce(above, Add{}) + 1;
  }

  // `wanted` of the most likely tokens, as many at a time as can be sorted.
  __device__ void write_top(int32_t wanted, int32_t* ids, float* logprobs) {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t found = min(wanted, s_.vocab);
    for (int32_t i = found + thread; i < wanted; i += kChooseThreads) {
      ids[i] = -1;
      logprobs[i] = -kInf;
    }
    Selector selector(s_, raw_, {best_, 1.0f}, false, -1, sh_);
    uint64_t before = 0;
    for (int32_t done = 0; done < found; done += kSortCapacity) {
      const int32_t upto = min(found, done + kSortCapacity);
      const uint64_t last = selector.cut({false, static_cast<uint32_t>(upto), 0}).last;
      const int count = selector.sort_items(before, done > 0, last);
      for (int i = thread; i < count; i += kChooseThreads) {
        const uint64_t order = sh_.items[i];
        ids[done + i] = static_cast<int32_t>(order);
        logprobs[done + i] = logprob(value_of(~static_cast<uint32_t>(order >> 32)));
      }
      before = last;
    }
  }

 private:
  const Sampler& s_;
  const float* raw_;
  Shared& sh_;
  float best_;
  double log_sum_;  // log sum exp(raw)
};

// Grid: [rows].
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(Sampler s) {
  __shared__ Shared sh;
  wait_for_previous();
  let_next_start();
  const int row = static_cast<int>(blockIdx.x);
  if (s.is_padding(row)) return;
  const int64_t at = s.first + row;
  const SamplingRow& r = s.step->sampling[at];
  const int32_t token = r.target >= 0 ? r.target : choose(s, r, row, sh);
  if (threadIdx.x == 0) {
    s.out.token_ids[at] = token;
    if (s.step->host_ids != nullptr) s.step->host_ids[at] = token;
  }
  if (!is_scored(r)) return;

  Scorer scorer(s, row, sh);
  const float value = token < s.vocab ? clean(s.raw(row)[token]) : -kInf;
  if (s.out.logprobs != nullptr && threadIdx.x == 0) s.out.logprobs[at] = scorer.logprob(value);
  if (s.out.ranks != nullptr) {
    const int32_t rank = scorer.rank(value);
    if (threadIdx.x == 0) s.out.ranks[at] = rank;
  }
  const int32_t wanted = min(r.num_logprobs, s.out.max_logprobs);
  if (wanted > 0) {
    const int64_t to = at * s.out.max_logprobs;
    scorer.write_top(wanted, s.out.top_ids + to, s.out.top_logprobs + to);
  }
}

// Hands out the parts of a workspace; of none, it tells their size.
class Parts {
 public:
  explicit Parts(void* data) : data_(static_cast<char*>(data)) {}
  template <typename T>
  void take(T*& part, int64_t count) {
    if (data_ != nullptr) part = reinterpret_cast<T*>(data_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* data_;
  size_t bytes_ = 0;
};

size_t lay_out(Sampler& s, int64_t rows, int64_t vocab, void* workspace) {
  Parts parts(workspace);
  parts.take(s.stats, rows * kSegments);
  parts.take(s.mass, rows * kBins);
  parts.take(s.counts, rows * kBins);
  parts.take(s.listed, rows * kSortCapacity);
  parts.take(s.num_listed, rows);
  parts.take(s.processed, rows * vocab);
  return parts.bytes();
}

}  // namespace

size_t sample_workspace_bytes(int64_t rows, int64_t vocab) {
  Sampler s{};
  return lay_out(s, rows, vocab, nullptr);
}

void sample(float* logits, int64_t logits_stride, int64_t rows, int64_t vocab,
            const StepInputs* step, int32_t first, bool plain, const SampleOutputs& out,
            void* workspace, const Card&, cudaStream_t stream) {
  check_arg(vocab > 0 && vocab <= kMaxVocab, "sample: vocabulary of ", vocab, ", not in [1, ",
            kMaxVocab, "]");
  check_arg(rows >= 0 && rows <= 65535, "sample: ", rows, " rows, not in [0, 65535]");
  check_arg(first >= 0, "sample: first row ", first, " is below 0");
  check_arg(out.token_ids != nullptr, "sample: no place for token_ids");
  check_arg(out.max_logprobs <= 0 || (out.top_ids != nullptr && out.top_logprobs != nullptr),
            "sample: no place for the most likely tokens");
  if (rows == 0) return;
  Sampler s{};
  s.logits = logits;
  s.stride = logits_stride;
  s.vocab = static_cast<int32_t>(vocab);
  s.segment = static_cast<int32_t>((vocab + 32 * kSegments - 1) / (32 * kSegments) * 32);
  s.step = step;
  s.first = first;
  s.plain = plain;
  s.out = out;
  lay_out(s, rows, vocab, workspace);
  const auto grid_rows = static_cast<unsigned>(rows);
  launch(segment_kernel, dim3(grid_rows, kSegments), kSegmentThreads, 0, stream, "sample", s);
  if (!plain) {
    // Few rows: more blocks for each. Many: fewer bins to add up.
    const dim3 grid(grid_rows, rows <= 8 ? kSegments : rows <= 64 ? kSegments / 4 : kSegments / 8);
    launch(bin_kernel, grid, kBinThreads, 0, stream, "sample", s);
    launch(list_kernel, grid, kChooseThreads, 0, stream, "sample", s);
  }
  launch(choose_kernel, grid_rows, kChooseThreads, 0, stream, "sample", s);
}

}  // namespace ni::cuda
