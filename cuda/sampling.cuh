// What the kernels of the sampler (sampling.cu) work with: the order of tokens by likelihood as
// 64-bit integers, histograms of logits, the inverse CDF, and, for top-k, top-p and lists of likely
// tokens, the Selector. It finds where a row is cut in that order: in a sorted list of the row's
// first tokens, if such a list has been made; else which bin of a histogram, and within the bin by
// sorting its tokens, if they are few (they are, unless many logits are nearly equal), or by bins
// of bins. All here runs on a block of 1024 threads.
#pragma once

#include <cmath>

#include "cuda/logit_units.cuh"

namespace ni::cuda::sampling {

inline constexpr int32_t kMaxInt = std::numeric_limits<int32_t>::max();
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kSegments = 32;  // as a warp has lanes, and choose_kernel warps
inline constexpr int kChooseThreads = 32 * kSegments;
inline constexpr int kUnroll = 4;
inline constexpr int kBins =
    2 * kChooseThreads;  // the last one also takes what lies below all bins
inline constexpr float kBinsPerNat = 64;
inline constexpr int kSortCapacity = 2 * kChooseThreads;
// Masses that are compared for top-p are multiples of this; 2^21 tokens of p = 1 fit into 64 bits.
inline constexpr float kMassUnits = 0x1p42f;

// Of a row that is narrowed or scored.
struct SegmentStats {
  float max;      // of the processed logits
  float raw_max;  // of the logits as they came; rows that are scored
  double raw_mass;
};

// What the kernels take.
struct Sampler {
  const float* logits;
  int64_t stride;
  int32_t vocab;
  int32_t segment;  // tokens in a segment
  const StepInputs* step;
  int32_t first;
  bool has_units;  // of the logits as they came
  SampleOutputs out;
  LogitUnit* units;          // [rows, logit_units(vocab)] of the processed logits
  SegmentStats* stats;       // [rows, kSegments]
  unsigned long long* mass;  // [rows, kBins]
  uint32_t* counts;          // [rows, kBins]
  uint64_t* listed;          // [rows, kSortCapacity] order_of the first tokens, unsorted
  int32_t* num_listed;       // [rows] 0: there is no list
  float* processed;          // [rows, vocab]

  __device__ const float* raw(int row) const { return logits + row * stride; }
  __device__ float* copy(int row) const { return processed + static_cast<int64_t>(row) * vocab; }
  __device__ LogitUnit* units_of(int row) const { return units + row * logit_units(vocab); }
  __device__ int32_t begin(int at) const { return min(at * segment, vocab); }
  // Rows beyond the step's are nobody's.
  __device__ bool is_padding(int row) const { return first + row >= step->num_logits; }
};

// NaN counts as -infinity.
__device__ inline float clean(float v) {
  return v == v ? v : -kInf;
}
// Larger floats have larger keys; -0 and 0 the same one.
__device__ inline uint32_t key_of(float v) {
  const uint32_t bits = __float_as_uint(v + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
// The order of likelihood: the largest logit first, ties: the lowest id first.
__device__ inline uint64_t order_of(uint32_t key, int32_t id) {
  return static_cast<uint64_t>(~key) << 32 | static_cast<uint32_t>(id);
}
inline constexpr uint64_t kNothing = ~0ull;  // comes after every token

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Min {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// The same bits in every lane, since a + b is b + a.
template <typename T, typename Op>
__device__ T warp_reduce(T v, Op op, int lanes = 32) {
  for (int i = lanes / 2; i > 0; i /= 2) v = op(v, __shfl_xor_sync(kAllLanes, v, i));
  return v;
}
// Over a block of 2^n warps, in every thread.
template <typename T, typename Op>
__device__ T block_reduce(T v, Op op) {
  __shared__ T shared[32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = warp_reduce(v, op);
  __syncthreads();  // earlier readers of `shared` are done
  if (lane == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_reduce(shared[lane % warps], op, warps);
}
template <typename T>
__device__ T warp_inclusive(T v) {
  for (int i = 1; i < 32; i *= 2) {
    const T below = __shfl_up_sync(kAllLanes, v, i);
    if (static_cast<int>(threadIdx.x % 32) >= i) v += below;
  }
  return v;
}
// The sum over the threads before this one, of a block of 32 warps.
template <typename T>
__device__ T block_exclusive(T v) {
  __shared__ T totals[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T upto = warp_inclusive(v);
  T before = __shfl_up_sync(kAllLanes, upto, 1);
  if (lane == 0) before = 0;
  __syncthreads();  // earlier readers of `totals` are done
  if (lane == 31) totals[warp] = upto;
  __syncthreads();
  const T warps = __shfl_sync(kAllLanes, warp_inclusive(totals[lane]), max(warp - 1, 0));
  return warp == 0 ? before : warps + before;
}

struct BinnedSoftmax : Softmax {
  __device__ uint64_t units(float z) const { return __float2ull_rn(p(z) * kMassUnits); }
  // Bins of 1/64 nat below `base`, the maximum. It never falls where z falls, -infinity and a
  // maximum that is infinite included.
  __device__ int bin(float z) const {
    const float below = (base - z) * (factor * kBinsPerNat);
    return static_cast<int>(below < kBins - 1 ? below : static_cast<float>(kBins - 1));
  }
};

// A histogram in shared memory.
struct Bins {
  uint32_t counts[kBins];
  uint32_t mass[kBins][2];  // low and high half: shared memory adds 32 bits at a time

  __device__ void clear() {
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += static_cast<int>(blockDim.x)) {
      counts[b] = 0;
      mass[b][0] = mass[b][1] = 0;
    }
  }
  __device__ void add(int bin, uint64_t units) {
    atomicAdd(&counts[bin], 1u);
    const auto low = static_cast<uint32_t>(units);
    auto high = static_cast<uint32_t>(units >> 32);
    if (low != 0 && atomicAdd(&mass[bin][0], low) > ~low) ++high;  // the carry
    if (high != 0) atomicAdd(&mass[bin][1], high);
  }
  __device__ uint64_t mass_of(int bin) const {
    return static_cast<uint64_t>(mass[bin][1]) << 32 | mass[bin][0];
  }
};

// In the order of likelihood, a cut is after the first token with which so many tokens, or so much
// mass, are kept; one at least.
struct Goal {
  bool by_mass;
  uint32_t count;
  uint64_t mass;
  __device__ bool reached(uint32_t with_count, uint64_t with_mass) const {
    return with_count > 0 && (by_mass ? with_mass >= mass : with_count >= count);
  }
};

// Where a goal is reached: in which slot, and what comes before it.
struct Place {
  int32_t slot;
  uint32_t count;
  uint64_t mass;
};

struct Cut {
  uint64_t last = kNothing;  // order_of the last token that is kept
  uint64_t mass = 0;         // kept
};

// Of a row, a warp each, and where in it a draw lies.
struct Segments {
  float max[kSegments];
  int32_t first[kSegments];  // token that has the maximum, or one of its unit (see LogitUnit)
  double mass[kSegments];    // under it
  int32_t drawn;
  double left;  // mass of that one which lies before the draw
};

struct Shared {
  Segments segments;
  Bins bins;
  uint64_t items[kSortCapacity];  // order_of tokens
  int32_t num_items;
  Place place;
  uint32_t lowest, highest;  // keys of a bin
  int32_t first_thread, last_thread, found;
  double log_sum;
};

// Positive for tokens that may be drawn.
struct Weight {
  Softmax softmax;
  float min_p;
  uint64_t last;
  __device__ float operator()(float z, int32_t id) const {
    if (order_of(key_of(z), id) > last) return 0;
    const float p = softmax.p(z);
    return p < min_p ? 0.0f : p;
  }
};
struct EqualWeight {
  uint32_t key;
  __device__ float operator()(float z, int32_t) const { return key_of(z) == key ? 1.0f : 0.0f; }
};

// Calls f(logit, id) for tokens [begin, end), spread over the block's threads. What f writes must
// not hold up loads, so a batch of them comes first.
template <typename F>
__device__ __forceinline__ void each_token(const float* z, int32_t begin, int32_t end, F f) {
  constexpr int kBatch = 8;
  const auto threads = static_cast<int32_t>(blockDim.x);
  for (int32_t i = begin + static_cast<int32_t>(threadIdx.x); i < end; i += kBatch * threads) {
    float v[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (const int32_t id = i + u * threads; id < end) v[u] = z[id];
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (const int32_t id = i + u * threads; id < end) f(clean(v[u]), id);
  }
}

// By one warp, a mass a lane: the lane at which the running sum exceeds `left`, which becomes what
// is left of it there; if rounding leaves none, the last that is possible.
__device__ inline int pick_lane(double mass, double& left) {
  const double upto = warp_inclusive(mass);
  double before = __shfl_up_sync(kAllLanes, upto, 1);
  if (threadIdx.x % 32 == 0) before = 0;
  const unsigned possible = __ballot_sync(kAllLanes, mass > 0);
  const unsigned beyond = __ballot_sync(kAllLanes, mass > 0 && left < upto);
  const int lane = max(
      beyond != 0 ? __ffs(static_cast<int>(beyond)) - 1 : 31 - __clz(static_cast<int>(possible)),
      0);
  left -= __shfl_sync(kAllLanes, before, lane);
  return lane;
}

// By one warp, a segment's mass a lane: the one at which the running sum exceeds u times the whole.
// What is left of that there is told in units of the lane's `scale`.
__device__ inline void pick_segment(double mass, double u, double scale, Segments& segments) {
  double left = u * warp_reduce(mass, Add{});
  const int lane = pick_lane(mass, left);
  if (static_cast<int>(threadIdx.x) % 32 == lane) {
    segments.drawn = lane;
    segments.left = left / scale;
  }
}

// The index in [begin, end) at which the running sum of weight(index) exceeds `left`; if rounding
// leaves none, the last that is possible.
template <typename W>
__device__ int32_t find_index(int32_t begin, int32_t end, W weight, double left, Shared& sh) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t share = (end - begin + kChooseThreads - 1) / kChooseThreads;
  const int32_t from = min(begin + thread * share, end), to = min(from + share, end);
  if (thread == 0) {
    sh.first_thread = kMaxInt;
    sh.last_thread = -1;
    sh.found = begin;
  }
  double own = 0;
  for (int32_t i = from; i < to; ++i) own += static_cast<double>(weight(i));
  const double before = block_exclusive(own);
  if (own > 0) {
    atomicMax(&sh.last_thread, thread);
    if (left < before + own) atomicMin(&sh.first_thread, thread);
  }
  __syncthreads();
  if (thread == (sh.first_thread < kMaxInt ? sh.first_thread : sh.last_thread)) {
    double rest = left - before;
    for (int32_t i = from; i < to; ++i) {
      const auto w = static_cast<double>(weight(i));
      if (w <= 0) continue;
      sh.found = i;
      if (rest < w) break;
      rest -= w;
    }
  }
  __syncthreads();
  return sh.found;
}

// The same of a row's tokens.
template <typename W>
__device__ int32_t find_token(const float* z, int32_t begin, int32_t end, W weight, double left,
                              Shared& sh) {
  return find_index(begin, end, [&](int32_t i) { return weight(clean(z[i]), i); }, left, sh);
}

// The token at which the running sum of weights exceeds u times the whole.
template <typename W>
__device__ int32_t find_in_row(const Sampler& s, const float* z, W weight, double draw,
                               Shared& sh) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t end = s.begin(warp + 1);
  double mass = 0;
  for (int32_t i = s.begin(warp) + lane; i < end; i += 32 * kUnroll) {
    float sum = 0;  // doubles are slow on some cards
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t id = i + 32 * u;
      if (id < end) sum += weight(clean(z[id]), id);
    }
    mass += static_cast<double>(sum);
  }
  mass = warp_reduce(mass, Add{});
  if (lane == 0) sh.segments.mass[warp] = mass;
  __syncthreads();
  if (warp == 0) pick_segment(sh.segments.mass[lane], draw, 1.0, sh.segments);
  __syncthreads();
  const int at = sh.segments.drawn;
  return find_token(z, s.begin(at), s.begin(at + 1), weight, sh.segments.left, sh);
}

// Finds cuts in a row in the order of likelihood.
class Selector {
 public:
  // `row`: of which bin_kernel has made bins, -1: none.
  __device__ Selector(const Sampler& s, const float* z, BinnedSoftmax softmax, bool with_mass,
                      int row, Shared& sh)
      : s_(s), z_(z), softmax_(softmax), with_mass_(with_mass), row_(row), sh_(sh) {}

  // The row's first tokens, which list_kernel has listed, sorted; all later cuts are found among
  // them. Their number, 0: there is no list.
  __device__ int load_list() {
    num_listed_ = row_ >= 0 ? s_.num_listed[row_] : 0;
    if (num_listed_ == 0) return 0;
    for (int i = static_cast<int>(threadIdx.x); i < num_listed_; i += kChooseThreads)
      sh_.items[i] = s_.listed[static_cast<int64_t>(row_) * kSortCapacity + i];
    sort(num_listed_);
    return num_listed_;
  }

  // The bin in which the goal is reached.
  __device__ int bin_of(const Goal& goal) {
    fill_bins();
    return place_in_bins(goal, 0, 0).slot;
  }
  // Tokens in bins up to this one.
  __device__ uint32_t count_upto(int bin) {
    fill_bins();
    const int b = 2 * static_cast<int>(threadIdx.x);
    return block_reduce(
        (b <= bin ? sh_.bins.counts[b] : 0) + (b < bin ? sh_.bins.counts[b + 1] : 0), Add{});
  }

  __device__ Cut cut(const Goal& goal) {
    if (num_listed_ > 0) return cut_items(goal, {0, 0, 0}, num_listed_);
    fill_bins();
    Place at = place_in_bins(goal, 0, 0);
    // What lies 32 nats below the maximum has no part in a draw, cut or not.
    if (row_ >= 0 && at.slot == kBins - 1) return {kNothing, at.mass + sh_.bins.mass_of(at.slot)};
    if (threadIdx.x == 0) sh_.lowest = lowest_key(at.slot);
    if (threadIdx.x == 32) sh_.highest = highest_key(at.slot);
    __syncthreads();
    uint32_t low = sh_.lowest, high = sh_.highest;
    // More tokens than can be sorted: cut the bin's keys into bins again.
    while (sh_.bins.counts[at.slot] > kSortCapacity && low < high) {
      const int shift = max(21 - __clz(static_cast<int>(high - low)), 0);
      fill_key_bins(low, high, shift);
      at = place_in_bins(goal, at.count, at.mass);
      high -= static_cast<uint32_t>(at.slot) << shift;
      low = max(low, high - ((1u << shift) - 1));
    }
    const uint32_t size = sh_.bins.counts[at.slot];
    if (size > kSortCapacity) return cut_equal(goal, at, low, size);
    return cut_sorted(goal, at, low, high);
  }

  // Of the whole row.
  __device__ uint64_t mass() {
    fill_bins();
    const auto b = 2 * static_cast<int>(threadIdx.x);
    return block_reduce(sh_.bins.mass_of(b) + sh_.bins.mass_of(b + 1), Add{});
  }

  // sh.items = tokens after `before` and up to `last`, sorted; kSortCapacity at most.
  __device__ int sort_items(uint64_t before, bool has_before, uint64_t last) {
    __syncthreads();  // earlier readers of `items` and `num_items` are done
    if (threadIdx.x == 0) sh_.num_items = 0;
    __syncthreads();
    each_token(z_, 0, s_.vocab, [&](float z, int32_t id) {
      const uint64_t order = order_of(key_of(z), id);
      if (order > last || (has_before && order <= before)) return;
      const int to = atomicAdd(&sh_.num_items, 1);
      if (to < kSortCapacity) sh_.items[to] = order;
    });
    __syncthreads();
    const int count = min(sh_.num_items, kSortCapacity);
    sort(count);
    return count;
  }

  // sh.items[0, count), which may have been written just now; kNothing behind them.
  __device__ void sort(int count) {
    int size = 2;
    while (size < count) size *= 2;
    for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kChooseThreads)
      sh_.items[i] = kNothing;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
      for (int step = run / 2; step > 0; step /= 2) {
        for (int t = static_cast<int>(threadIdx.x); t < size / 2; t += kChooseThreads) {
          const int a = 2 * t - (t & (step - 1)), b = a + step;
          const uint64_t x = sh_.items[a], y = sh_.items[b];
          if ((x > y) == ((a & run) == 0)) {
            sh_.items[a] = y;
            sh_.items[b] = x;
          }
        }
        __syncthreads();
      }
    }
  }

 private:
  // By distance from the maximum.
  __device__ void fill_bins() {
    if (has_bins_) return;
    has_bins_ = true;
    __syncthreads();  // earlier readers of the bins are done
    if (row_ >= 0) {
      for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kChooseThreads) {
        sh_.bins.counts[b] = s_.counts[row_ * kBins + b];
        const uint64_t mass = s_.mass[row_ * kBins + b];
        sh_.bins.mass[b][0] = static_cast<uint32_t>(mass);
        sh_.bins.mass[b][1] = static_cast<uint32_t>(mass >> 32);
      }
    } else {
      sh_.bins.clear();
      __syncthreads();
      each_token(z_, 0, s_.vocab,
                 [&](float z, int32_t) { sh_.bins.add(softmax_.bin(z), units(z)); });
    }
    __syncthreads();
  }

  __device__ void fill_key_bins(uint32_t low, uint32_t high, int shift) {
    has_bins_ = false;
    __syncthreads();  // earlier readers of the bins are done
    sh_.bins.clear();
    __syncthreads();
    each_token(z_, 0, s_.vocab, [&](float z, int32_t) {
      const uint32_t key = key_of(z);
      if (key >= low && key <= high)
        sh_.bins.add(static_cast<int>((high - key) >> shift), units(z));
    });
    __syncthreads();
  }

  __device__ uint64_t units(float z) const { return with_mass_ ? softmax_.units(z) : 0; }

  // Keys of -infinity to the maximum are searched for those of a bin.
  __device__ uint32_t lowest_key(int bin) const {
    uint32_t low = key_of(-kInf), high = key_of(softmax_.base);
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (softmax_.bin(value_of(middle)) <= bin) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
  __device__ uint32_t highest_key(int bin) const {
    uint32_t low = key_of(-kInf), high = key_of(softmax_.base);
    while (low < high) {
      const uint32_t middle = high - (high - low) / 2;
      if (softmax_.bin(value_of(middle)) >= bin) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return high;
  }

  // The goal's place among slots, two a thread, that come after `count` tokens of `mass`.
  __device__ Place place(const Goal& goal, uint32_t count, uint64_t mass,
                         const uint32_t (&counts)[2], const uint64_t (&masses)[2]) {
    uint32_t upto_count = count + block_exclusive(counts[0] + counts[1]);
    if (threadIdx.x == 0) sh_.place = {0, count, mass};  // earlier ones have been read
    uint64_t upto_mass = mass + block_exclusive(masses[0] + masses[1]);
    for (int i = 0; i < 2; ++i) {
      const bool before = goal.reached(upto_count, upto_mass);
      if (!before && goal.reached(upto_count + counts[i], upto_mass + masses[i]))
        sh_.place = {2 * static_cast<int>(threadIdx.x) + i, upto_count, upto_mass};
      upto_count += counts[i];
      upto_mass += masses[i];
    }
    __syncthreads();
    return sh_.place;
  }

  __device__ Place place_in_bins(const Goal& goal, uint32_t count, uint64_t mass) {
    const int b = 2 * static_cast<int>(threadIdx.x);
    return place(goal, count, mass, {sh_.bins.counts[b], sh_.bins.counts[b + 1]},
                 {sh_.bins.mass_of(b), sh_.bins.mass_of(b + 1)});
  }

  // Within the keys [low, high], by sorting their tokens.
  __device__ Cut cut_sorted(const Goal& goal, const Place& bin, uint32_t low, uint32_t high) {
    const uint64_t first = order_of(high, 0);
    return cut_items(goal, bin, sort_items(first - 1, first > 0, order_of(low, kMaxInt)));
  }
  // Among sh.items[0, size), sorted, which come after `bin.count` tokens.
  __device__ Cut cut_items(const Goal& goal, const Place& bin, int size) {
    const int at = 2 * static_cast<int>(threadIdx.x);
    uint32_t counts[2];
    uint64_t masses[2];
    for (int i = 0; i < 2; ++i) {
      counts[i] = at + i < size ? 1 : 0;
      masses[i] = at + i < size ? item_units(at + i) : 0;
    }
    const Place item = place(goal, bin.count, bin.mass, counts, masses);
    return {sh_.items[item.slot], item.mass + item_units(item.slot)};
  }
  __device__ uint64_t item_units(int item) const {
    return units(value_of(~static_cast<uint32_t>(sh_.items[item] >> 32)));
  }

  // Among `size` equal tokens, too many to be sorted: the lowest ids are kept.
  __device__ Cut cut_equal(const Goal& goal, const Place& bin, uint32_t key, uint32_t size) {
    const uint64_t each = units(value_of(key));
    uint64_t kept = goal.count - bin.count;
    if (goal.by_mass) kept = each > 0 ? (goal.mass - bin.mass + each - 1) / each : 1;
    kept = kept < 1 ? 1 : kept > size ? size : kept;
    const double u = (static_cast<double>(kept) - 0.5) / static_cast<double>(size);
    const int32_t last = find_in_row(s_, z_, EqualWeight{key}, u, sh_);
    return {order_of(key, last), bin.mass + kept * each};
  }

  const Sampler& s_;
  const float* z_;
  const BinnedSoftmax softmax_;
  const bool with_mass_;
  const int row_;
  int num_listed_ = 0;
  bool has_bins_ = false;  // those of fill_bins()
  Shared& sh_;
};

}  // namespace ni::cuda::sampling
