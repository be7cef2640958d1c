// The sampler; what it computes is told at the top of cpu/sampling.cpp, with which it agrees token
// for token, up to rounding at the boundary of a draw:
//   raw log-probabilities, ranks; bias -> mask -> penalties -> temperature -> top-k -> top-p ->
//   min-p -> draw (core/philox.h).
// logits: [rows, vocab] fp32, never written. Of every 16 neighbours, a unit, the maximum, the mass
// and the choice (logit_units.cuh) come with the logits, or instead, or are made here. A row is cut
// into 32 segments:
//   units_kernel    32 blocks a row: units, where they are not there. Only if all rows are plain,
//                   that is, greedy, or drawn at a temperature and nothing else; then follows
//   draw_kernel     1 block a row, a warp a segment: the unit, the token. Else:
//   segment_kernel  32 blocks a row: units, where they are not there. Rows with biases, masks or
//                   penalties get a processed copy in the workspace, and units of that. Of narrowed
//                   and scored rows the segment's maximum, and mass before any processing.
//   bin_kernel      4 to 32 blocks a row, narrowed rows only (top-k, top-p, min-p): tokens and mass
//                   by distance from the maximum, in bins of 1/64 nat.
//   list_kernel     as many: the tokens up to the bin in which the row is cut, if they are few.
//   choose_kernel   as draw_kernel: the cut, the draw, the scores.
// draw_kernel reads half a byte a logit, and is bound by latency. Kernels that make
// units or score read each logit once, which bounds them; narrowed rows are read three times, and
// where the tokens that are kept are too many to list, some times more by one block. Masses that
// decide a cut are integers, so atomics may add them in any order; all other sums have a fixed one.
#include "core/philox.h"
#include "cuda/sampling.cuh"

namespace ni::cuda {
namespace {

using namespace sampling;

constexpr int kSegmentThreads = 256, kBinThreads = 512;
constexpr int64_t kMaxVocab = 1 << 21;  // so that masses fit into 64 bits

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

// Calls f(token, logits of tokens token + {0, 1, 8, 9}) for what the thread has of a segment: four
// lanes have a unit, as in a warpgroup's product. All are on their way at once, as vectors where
// rows are aligned. f is called by whole warps, with -infinity where there are no more tokens.
template <typename F>
__device__ void each_four(const float* x, int32_t begin, int32_t end, F f) {
  constexpr int kBatch = 5;
  const bool vectors = reinterpret_cast<uintptr_t>(x) % 8 == 0;
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  const auto warp_begin = static_cast<int32_t>(threadIdx.x / 32 * 128);
  const int32_t in_warp = lane / 4 * kUnitTokens + lane % 4 * 2;
  for (int32_t from = begin + warp_begin; from < end; from += 4 * kBatch * kSegmentThreads) {
    float v[kBatch][4];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int32_t at = from + 4 * i * kSegmentThreads + in_warp + 4 * j;
        float2 two{-kInf, -kInf};
        if (vectors && at + 2 <= end) {
          two = *reinterpret_cast<const float2*>(x + at);
        } else if (at < end) {
          two.x = x[at];
          if (at + 1 < end) two.y = x[at + 1];
        }
        v[i][j] = two.x;
        v[i][j + 1] = two.y;
      }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (const int32_t at = from + 4 * i * kSegmentThreads; at < end) f(at + in_warp, v[i]);
  }
}

__device__ void store_unit(const Sampler& s, int row, int32_t at, int32_t end, const float (&v)[4],
                           const UnitRow& how) {
  LogitUnit unit;
  const bool stores = logit_unit<1>(v, how, at % kUnitTokens, unit);
  const int32_t number = at / kUnitTokens;
  if (stores && number * kUnitTokens < end) s.units_of(row)[number] = unit;
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

// Grid: [rows, kSegments]. Units only.
__global__ void __launch_bounds__(kSegmentThreads) units_kernel(Sampler s) {
  wait_for_previous();
  let_next_start();
  const int row = static_cast<int>(blockIdx.x), segment = static_cast<int>(blockIdx.y);
  if (s.is_padding(row)) return;
  const UnitRow how(s.step->sampling[s.first + row]);
  const int32_t end = s.begin(segment + 1);
  each_four(s.raw(row), s.begin(segment), end,
            [&](int32_t at, const float (&v)[4]) { store_unit(s, row, at, end, v, how); });
}

// Grid: [rows, kSegments].
__global__ void __launch_bounds__(kSegmentThreads, 4) segment_kernel(Sampler s) {
  wait_for_previous();
  let_next_start();
  const int row = static_cast<int>(blockIdx.x), segment = static_cast<int>(blockIdx.y);
  if (s.is_padding(row)) return;
  const SamplingRow& r = s.step->sampling[s.first + row];
  const bool narrowed = is_narrowed(r, s.vocab), processed = is_processed(r), scored = is_scored(r);
  const bool makes_units = r.target < 0 && (processed || !s.has_units);
  if (!narrowed && !scored && !makes_units) return;
  constexpr int kShare = kBins / kSegments;
  if (narrowed && threadIdx.x < kShare) {  // the next two kernels add to them
    const int bin = row * kBins + segment * kShare + static_cast<int>(threadIdx.x);
    s.counts[bin] = 0;
    s.mass[bin] = 0;
    s.num_listed[row] = 0;
  }
  const int32_t begin = s.begin(segment), end = s.begin(segment + 1);
  const float* const raw = s.raw(row);
  if (processed) process(s, r, raw, s.copy(row), begin, end);
  const UnitRow how(r);
  float top = -kInf, raw_top = -kInf;
  double raw_mass = 0;                                        // under the thread's own maximum
  const auto add_max = [](float& max, const float (&v)[4]) {  // not NaN
    max = fmaxf(fmaxf(fmaxf(fmaxf(max, v[0]), v[1]), v[2]), v[3]);
  };
  if (scored)
    each_four(raw, begin, end, [&](int32_t, const float (&v)[4]) {
      const float before = raw_top;
      add_max(raw_top, v);
      const Softmax softmax{raw_top, 1.0f};
      const float sum = (softmax.p(clean(v[0])) + softmax.p(clean(v[1]))) +
                        (softmax.p(clean(v[2])) + softmax.p(clean(v[3])));
      raw_mass = raw_mass * static_cast<double>(softmax.p(before)) + static_cast<double>(sum);
    });
  if (narrowed || makes_units)
    each_four(processed ? s.copy(row) : raw, begin, end, [&](int32_t at, const float (&v)[4]) {
      if (makes_units) store_unit(s, row, at, end, v, how);
      add_max(top, v);
    });
  if (!narrowed && !scored) return;
  const Softmax softmax{value_of(block_reduce(key_of(raw_top), Max{})), 1.0f};
  top = value_of(block_reduce(key_of(top), Max{}));
  raw_mass = block_reduce(raw_mass * static_cast<double>(softmax.p(raw_top)), Add{});
  if (threadIdx.x == 0) s.stats[row * kSegments + segment] = {top, softmax.base, raw_mass};
}

// -- bin_kernel, list_kernel ----------------------------------------------------------------------

// A narrowed row's logits, and what a block of these kernels has of them.
struct Share {
  const float* z;
  int32_t begin, end;
  BinnedSoftmax softmax;

  // Grid: [rows, 2^n], 2^n up to kSegments.
  __device__ Share(const Sampler& s, const SamplingRow& r, int row)
      : z(is_processed(r) ? s.copy(row) : s.raw(row)) {
    const auto share = static_cast<int>(kSegments / gridDim.y);
    begin = s.begin(static_cast<int>(blockIdx.y) * share);
    end = s.begin(static_cast<int>(blockIdx.y + 1) * share);
    softmax = {warp_max(s.stats[row * kSegments + static_cast<int>(threadIdx.x) % 32].max),
               softmax_factor(r)};
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

// The tournament of the unit in which the token is, by weights.
template <typename W>
__device__ int32_t play(const SamplingRow& r, const float* z, int32_t vocab, W weight,
                        int32_t token) {
  const int lane = static_cast<int>(threadIdx.x) % 32, number = lane % kUnitTokens;
  const RoundDraws draws = philox_rounds(r.seed, r.choice, static_cast<uint32_t>(r.position));
  const int32_t id = token / kUnitTokens * kUnitTokens + number;
  UnitSide side{id < vocab ? weight(clean(z[id]), id) : 0.0f, number};
#pragma unroll
  for (int i = 0; i < kUnitRounds; ++i)
    side.meet(draws.v[i], 1 << round_bit(i), (number >> round_bit(i) & 1) == 0);
  const unsigned standing = __ballot_sync(kAllLanes, side.stands);  // in each half of the warp
  return __shfl_sync(kAllLanes, id, __ffs(static_cast<int>(standing)) - 1);
}

// A draw from what top-k, top-p and min-p leave.
__device__ int32_t choose_narrowed(const Sampler& s, const SamplingRow& r, int row, const float* z,
                                   BinnedSoftmax softmax, double u, Shared& sh) {
  const bool top_p = r.top_p < 1;
  Selector selector(s, z, softmax, top_p, row, sh);
  const int listed = selector.load_list();
  Cut cut;
  if (has_top_k(r, s.vocab)) {
    cut = selector.cut(top_k_goal(r));
  } else if (top_p) {
    cut.mass = selector.mass();
  }
  if (top_p) cut = selector.cut(top_p_goal(r, cut.mass));
  const Weight weight{softmax, r.min_p, cut.last};
  if (listed == 0) return play(r, z, s.vocab, weight, find_in_row(s, z, weight, u, sh));

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
  return play(r, z, s.vocab, weight, static_cast<int32_t>(sh.items[found] >> 32));
}

// A row's units, a segment a warp, neighbours a lane.
class Units {
 public:
  // All on the way at once; more than these only of vocabularies beyond 160 000.
  __device__ Units(const Sampler& s, int row)
      : units_(s.units_of(row)),
        of_segment_(s.segment / kUnitTokens),
        of_lane_((of_segment_ + 63) / 64 * 2),
        begin_(warp() * of_segment_ + lane() * of_lane_),
        end_(min(min(begin_ + of_lane_, (warp() + 1) * of_segment_),
                 (s.vocab + kUnitTokens - 1) / kUnitTokens)) {
    load(begin_);
  }

  // By all warps. Masses only where there is something to draw.
  __device__ void sum_up(float factor, bool with_mass, Segments& segments) {
    float top = -kInf;
    int32_t token = kMaxInt;
    mass_ = 0;
    for (int32_t from = begin_; from < end_; from += kBatch) {
      if (from > begin_) load(from);
      const float before = top;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (batch_[i].max > top) token = (from + i) * kUnitTokens + batch_[i].choice();
        top = fmaxf(top, batch_[i].max);
      }
      if (!with_mass) continue;
      const Softmax softmax{top, factor};
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        sum = __fmaf_rn(batch_[i].mass(), softmax.p(batch_[i].max), sum);
      mass_ = fma(mass_, static_cast<double>(softmax.p(before)), static_cast<double>(sum));
    }
    const float max = value_of(__reduce_max_sync(kAllLanes, key_of(top)));
    const auto first =
        __reduce_min_sync(kAllLanes, static_cast<uint32_t>(top == max ? token : kMaxInt));
    double mass = 0;
    if (with_mass) {
      mass_ *= static_cast<double>(Softmax{max, factor}.p(top));
      mass = warp_reduce(mass_, Add{});
    }
    if (lane() == 0) {
      segments.max[warp()] = max;
      segments.first[warp()] = static_cast<int32_t>(first);
      segments.mass[warp()] = mass;
    }
    __syncthreads();
  }

  // By all warps: the choice of the unit at which the running sum exceeds u times the whole, in
  // `found`.
  __device__ void draw(Softmax row, double u, Segments& segments, int32_t& found) const {
    if (warp() == 0) {
      const double below =
          static_cast<double>(segments.max[lane()]) - static_cast<double>(row.base);
      const double scale = exp(below * static_cast<double>(row.factor));
      pick_segment(segments.mass[lane()] * scale, u, scale, segments);
    }
    __syncthreads();
    if (warp() == segments.drawn) {
      const Softmax segment{segments.max[warp()], row.factor};
      const int32_t token = find(segment, segments.left);
      if (lane() == 0) found = token;
    }
    __syncthreads();
  }

 private:
  // By the warp of the segment in which the draw lies, `left` in units of its maximum: the token.
  __device__ int32_t find(Softmax segment, double left) const {
    const int owner = pick_lane(mass_, left);
    const int32_t begin = __shfl_sync(kAllLanes, begin_, owner),
                  end = __shfl_sync(kAllLanes, end_, owner);
    // A lane a unit; of more than a warp's, those in which the draw lies, or the last possible.
    LogitUnit mine{};
    double mass = 0, left_there = left;
    int32_t first = begin;
    for (int32_t from = begin; from < end; from += 32) {
      LogitUnit unit{-kInf, 0};
      if (from + lane() < end) unit = units_[from + lane()];
      const double own =
          static_cast<double>(unit.mass()) * static_cast<double>(segment.p(unit.max));
      const double sum = warp_reduce(own, Add{});
      if (sum > 0) mine = unit, mass = own, left_there = left, first = from;
      if (left < sum) break;
      left -= sum;
    }
    const int at = pick_lane(mass, left_there);
    return (first + at) * kUnitTokens + __shfl_sync(kAllLanes, mine.choice(), at);
  }

  static constexpr int kBatch = 10;

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ void load(int32_t from) {
#pragma unroll
    for (int i = 0; i < kBatch; i += 2) {
      float4 two{-kInf, 0, -kInf, 0};
      if (from + i < end_) two = *reinterpret_cast<const float4*>(units_ + from + i);
      batch_[i] = {two.x, __float_as_uint(two.y)};
      batch_[i + 1] =
          from + i + 1 < end_ ? LogitUnit{two.z, __float_as_uint(two.w)} : LogitUnit{-kInf, 0};
    }
  }

  const LogitUnit* units_;
  int32_t of_segment_, of_lane_, begin_, end_;
  LogitUnit batch_[kBatch];
  double mass_ = 0;  // the lane's, under the segment's maximum
};

// A row's largest logit, and the first token that has it, if the row is greedy or it is infinite.
struct Best {
  float value;
  int32_t token;

  __device__ explicit Best(const Segments& segments) {
    const int lane = threadIdx.x % 32;
    const uint64_t order =
        warp_reduce(order_of(key_of(segments.max[lane]), segments.first[lane]), Min{});
    value = value_of(~static_cast<uint32_t>(order >> 32));
    token = static_cast<int32_t>(order);
  }
};

__device__ double uniform_of(const SamplingRow& r) {
  return philox_uniform(r.seed, r.choice, static_cast<uint32_t>(r.position));
}

__device__ int32_t choose(const Sampler& s, const SamplingRow& r, int row, Shared& sh) {
  Units units(s, row);
  const float factor = softmax_factor(r);
  const bool narrowed = is_narrowed(r, s.vocab);
  units.sum_up(factor, !is_greedy(r) && !narrowed, sh.segments);
  const Best best(sh.segments);
  if (best.value == -kInf) return fallback(s, r, s.raw(row));
  if (is_greedy(r) || best.value == kInf) return best.token;
  const BinnedSoftmax softmax{{best.value, factor}};
  if (narrowed) {
    const float* z = is_processed(r) ? s.copy(row) : s.raw(row);
    return choose_narrowed(s, r, row, z, softmax, uniform_of(r), sh);
  }
  units.draw(softmax, uniform_of(r), sh.segments, sh.found);
  return sh.found;
}

// choose_kernel where all rows are plain, with the same result: in little code, which takes longer
// to come than to run, and with what is asked of the row known before the wait.
// Grid: [rows].
__global__ void __launch_bounds__(kChooseThreads) draw_kernel(Sampler s) {
  __shared__ Segments segments;
  __shared__ int32_t found;
  const int row = static_cast<int>(blockIdx.x);
  if (s.is_padding(row)) return wait_for_previous();
  const int64_t at = s.first + row;
  const SamplingRow& r = s.step->sampling[at];
  const bool greedy = is_greedy(r);
  const float factor = softmax_factor(r);
  const double u = greedy ? 0 : uniform_of(r);
  int32_t* const host_ids = s.step->host_ids;
  wait_for_previous();
  let_next_start();
  Units units(s, row);
  units.sum_up(factor, !greedy, segments);
  const Best best(segments);
  int32_t token = 0;  // where there is nothing but -infinity
  if (greedy || isinf(best.value)) {
    if (best.value > -kInf) token = best.token;
  } else {
    units.draw({best.value, factor}, u, segments, found);
    token = found;
  }
  if (threadIdx.x != 0) return;
  s.out.token_ids[at] = token;
  if (host_ids != nullptr) host_ids[at] = token;
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
    Selector selector(s_, raw_, {{best_, 1.0f}}, false, -1, sh_);
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
  parts.take(s.units, rows * logit_units(vocab));  // sample_units()
  parts.take(s.stats, rows * kSegments);
  parts.take(s.mass, rows * kBins);
  parts.take(s.counts, rows * kBins);
  parts.take(s.listed, rows * kSortCapacity);
  parts.take(s.num_listed, rows);
  parts.take(s.processed, rows * vocab);
  return parts.bytes();
}

void check_sampled(int64_t rows, int64_t vocab) {
  check_arg(vocab > 0 && vocab <= kMaxVocab, "sample: vocabulary of ", vocab, ", not in [1, ",
            kMaxVocab, "]");
  check_arg(rows >= 0 && rows <= 65535, "sample: ", rows, " rows, not in [0, 65535]");
}

Sampler sampler_of(const float* logits, int64_t logits_stride, int64_t vocab,
                   const StepInputs* step, int32_t first) {
  Sampler s{};
  s.logits = logits;
  s.stride = logits_stride;
  s.vocab = static_cast<int32_t>(vocab);
  s.segment = static_cast<int32_t>((vocab + 32 * kSegments - 1) / (32 * kSegments) * 32);
  s.step = step;
  s.first = first;
  return s;
}

dim3 segments_of(int64_t rows) {
  return dim3(static_cast<unsigned>(rows), kSegments);
}

}  // namespace

size_t sample_workspace_bytes(int64_t rows, int64_t vocab) {
  Sampler s{};
  return lay_out(s, rows, vocab, nullptr);
}

void sum_up_logits(const float* logits, int64_t logits_stride, int64_t rows, int64_t vocab,
                   const LogitUnits& units, cudaStream_t stream) {
  check_sampled(rows, vocab);
  Sampler s = sampler_of(logits, logits_stride, vocab, units.step, units.first);
  s.units = units.units;
  launch(units_kernel, segments_of(rows), kSegmentThreads, 0, stream, "sample", s);
}

void sample(const float* logits, int64_t logits_stride, int64_t rows, int64_t vocab,
            const StepInputs* step, int32_t first, bool has_units, bool plain,
            const SampleOutputs& out, void* workspace, cudaStream_t stream) {
  check_sampled(rows, vocab);
  check_arg(first >= 0, "sample: first row ", first, " is below 0");
  check_arg(out.token_ids != nullptr, "sample: no place for token_ids");
  check_arg(out.max_logprobs <= 0 || (out.top_ids != nullptr && out.top_logprobs != nullptr),
            "sample: no place for the most likely tokens");
  if (rows == 0) return;
  Sampler s = sampler_of(logits, logits_stride, vocab, step, first);
  s.has_units = has_units;
  s.out = out;
  lay_out(s, rows, vocab, workspace);
  const auto grid_rows = static_cast<unsigned>(rows);
  if (plain) {
    if (!has_units)
      launch(units_kernel, segments_of(rows), kSegmentThreads, 0, stream, "sample", s);
    launch(draw_kernel, grid_rows, kChooseThreads, 0, stream, "sample", s);
    return;
  }
  launch(segment_kernel, segments_of(rows), kSegmentThreads, 0, stream, "sample", s);
  // Few rows: more blocks for each. Many: fewer bins to add up.
  const dim3 grid(grid_rows, rows <= 8 ? kSegments : rows <= 64 ? kSegments / 4 : kSegments / 8);
  launch(bin_kernel, grid, kBinThreads, 0, stream, "sample", s);
  launch(list_kernel, grid, kChooseThreads, 0, stream, "sample", s);
  launch(choose_kernel, grid_rows, kChooseThreads, 0, stream, "sample", s);
}

}  // namespace ni::cuda
