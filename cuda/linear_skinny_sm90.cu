// linear_skinny on Hopper: y[m, n] = sum over k of x[m, k] W[n, k] (+ bias) for few rows, in the
// canonical order (see linear_skinny.cu), with what stands before and after it in a decoder layer:
//   x := norm(x);   y := round(act(y[:, :n / 2]) * y[:, n / 2:]);   y := round(out + y)
// each rounded like the operators of their own, so fused and separate give the same bits.
//
// Layouts: x [M, x_stride], W [N, w_stride], K and w_stride multiples of 64. A CTA goes through
// tiles of up to 16 strips of 8 weight rows (gated: pairs, of the gate and of the others); one warp
// brings boxes of 64 columns by the copy engine through a ring in shared memory (128-byte swizzle),
// four warps for every 64 rows of x multiply (of logits two groups of four, in turns). x comes
// through the same ring, or as a whole, and is normalised by every CTA, few rows on their way into
// shared memory. Both operands are read from shared memory by the tensor core itself: with up to 16
// rows of x W is A (64 rows, or whatever lies there where they are fewer) and x is B, with more x
// is A and W is B. Moves N * K * 2 bytes once (with several blocks of rows, at worst as often);
// bound by bandwidth. What that takes: 50 KB (H100) to 150 KB (H200) in flight on every
// multiprocessor from the kernel's first moment on (the ring fills while the kernel before still
// works: weights depend on nobody), strips spread evenly, one CTA on every multiprocessor (see the
// plan), and a warp that only copies. For short N the chain of K / 16 dependent products is the
// bound: 18 cycles each with 8 rows of x, 33 with 64 of B, if they stand close; mma.sync takes 24,
// with the ldmatrix that it needs 36.
#include <algorithm>
#include <iterator>
#include <type_traits>
#include <utility>

#include "cuda/activation.cuh"
#include "cuda/linear.h"
#include "cuda/linear_plan.h"
#include "cuda/linear_skinny.cuh"
#include "cuda/logit_units.cuh"
#include "cuda/sm90.cuh"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.cuh"

namespace ni::cuda {
namespace {

constexpr int kAtom = 64;  // columns of a box, 128 bytes
constexpr int kStripRows = SkinnySm90Plan::kStripRows;
template <int kRows>
constexpr int kComputeWarps = kRows > 64 ? kRows / 16 : 4;
constexpr int kNormWarps = kSkinnyNormWarps;
// Groups of warps that take tiles in turns, so that one makes results while another multiplies: of
// logits, which have many tiles, and more to do with each.
template <typename Out, int kRows>
constexpr int kGroups = std::is_same_v<Out, float> && kRows <= 64 ? 2 : 1;

struct Params {
  SkinnyArgs a;
  SkinnySm90Plan plan;
  int n, k;                   // of the result (half of W's rows if gated), and of the sum
  int num_tiles, num_stages;  // stages of a tile
  bool vectors;               // out has rows of 16-byte vectors
  Place tile_stages;          // how much further in the ring the next tile is
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere the kernel is empty and never launched

constexpr int kStripBytes = kStripRows * 128;  // of an atom
constexpr int kBlockBytes = 64 * 128;          // of W as A operand

// Shared memory: the ring, x as a whole (or nothing) with the norm's weights and sums, results,
// barriers.
struct Memory {
  uint32_t base, x, out, barriers;
  int stage_bytes, stages;

  __device__ Memory(uint32_t begin, const SkinnySm90Plan& plan)
      : base((begin + kSkinnyAlign - 1) / kSkinnyAlign * kSkinnyAlign),
        x(base + plan.stages * plan.stage_bytes),
        out(x + plan.x_bytes),
        barriers(out + plan.out_bytes),
        stage_bytes(plan.stage_bytes),
        stages(plan.stages) {}
  __device__ __forceinline__ uint32_t stage(int i) const { return base + i * stage_bytes; }
  __device__ __forceinline__ uint32_t full(int i) const { return barriers + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return barriers + 8 * (stages + i); }
  __device__ __forceinline__ uint32_t x_full() const { return barriers + 16 * stages; }
  // A group may wait for its tile's stages: the other has seen all that lay there before, or a
  // stage's parity might be that of the one before.
  __device__ __forceinline__ uint32_t turn(int group) const { return x_full() + 8 + 8 * group; }
};

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Of x, in this row block. The last block has as many rows as the others, some of the one before
// it: to fill a box with zeros takes the copy engine longer than to bring rows.
__device__ __forceinline__ int first_row(const Params& p) {
  return min(static_cast<int>(blockIdx.y) * p.plan.rows, static_cast<int>(p.a.rows) - p.plan.rows);
}

// -- The warp that copies -------------------------------------------------------------------------

// Where a stage lies in the CTA's tiles. (No divisions: they take longer than a copy.)
struct Source {
  int tile, stage = 0;
  __device__ __forceinline__ void advance(const Params& p) {
    if (++stage < p.num_stages) return;
    stage = 0;
    tile += gridDim.x;
  }
};

__device__ __forceinline__ void copy(const Params& p, const Memory& memory,
                                     const CUtensorMap* w_map, const CUtensorMap* x_map) {
  const SkinnySm90Plan& plan = p.plan;
  const int w_bytes = plan.atoms * plan.tile * kStripBytes;
  const int bytes = w_bytes + (plan.whole ? 0 : plan.atoms * plan.rows * 128);

  // Weights, which nobody but other row blocks reads again in this step, do not push out what all
  // layers share.
  const uint64_t once = evict_first();
  const auto copy_w = [&](const Source& from, int stage) {
    const uint32_t to = memory.stage(stage), barrier = memory.full(stage);
    arrive_expecting(barrier, bytes);
    if (p.a.gated) {
      copy_box(to, w_map, 0, 0, 0, from.tile * plan.tile / 2, from.stage * plan.atoms, barrier,
               once);
    } else {
      copy_box(to, w_map, 0, from.tile * plan.tile * kStripRows, from.stage * plan.atoms, barrier,
               once);
    }
  };
  const auto copy_x = [&](const Source& from, int stage) {
    copy_box(memory.stage(stage) + w_bytes, x_map, 0, first_row(p), from.stage * plan.atoms,
             memory.full(stage));
  };

  if (!plan.held) prefetch_map(x_map);
  if (!p.a.settled) wait_for_previous();
  const Source begin{static_cast<int>(blockIdx.x)};
  const bool has_work = begin.tile < p.num_tiles, with_norm = p.a.norm.weight != nullptr;
  if (has_work && with_norm) {
    arrive_expecting(memory.x_full(), 4 * p.k);
    copy_bytes(memory.x + plan.whole_bytes, p.a.norm.weight, 4 * p.k, memory.x_full());
  }
  // The first stages of the weights come while the kernel before ends.
  Source next = begin;
  Place place;
  int ahead = 0;
  for (; ahead < plan.ahead && next.tile < p.num_tiles; ++ahead) {
    if (ahead >= plan.paced) {
      if (plan.lets_start) let_next_start();
      wait(memory.full(ahead - plan.paced), 0);
    }
    copy_w(next, place.stage);
    next.advance(p);
    place.advance(plan.stages);
  }
  // Already now: attention looks up its work, the next product fetches its weights meanwhile.
  if (plan.lets_start) let_next_start();
  wait_for_previous();
  if (!has_work) return;
  if (plan.held) {
    // Whoever normalises fetches x.
  } else if (plan.whole) {
    arrive_expecting(memory.x_full(), plan.whole_bytes);
    copy_box(memory.x, x_map, 0, 0, 0, memory.x_full());
  } else {
    Source from = begin;
    for (int stage = 0; stage < ahead; ++stage, from.advance(p)) copy_x(from, stage);
  }
  for (; next.tile < p.num_tiles; next.advance(p), place.advance(plan.stages)) {
    wait(memory.empty(place.stage), place.phase ^ 1);  // at first they are
    copy_w(next, place.stage);
    if (!plan.whole) copy_x(next, place.stage);
  }
  // The next kernel's ring fills while this one's last stages are multiplied.
  let_next_start();
}

// -- The warps that compute -----------------------------------------------------------------------

__device__ __forceinline__ void synchronise_normalisers() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kNormWarps) : "memory");
}

// x as a whole in shared memory: [K / 64][rows][64], as a box of it lies there; and behind it the
// norm's weights, and the sums of a row's parts (what a warp of norm.cu sums), 16 a row.
struct WholeX {
  uint32_t x, weights, sums;
  int rows, vectors, parts;

  __device__ WholeX(const Params& p, const Memory& memory)
      : x(memory.x),
        weights(x + p.plan.whole_bytes),
        sums(weights + p.k * 4),
        rows(static_cast<int>(p.a.rows)),
        vectors(p.k / 8),
        parts(norm_threads(vectors) / 32) {}
  __device__ __forceinline__ uint32_t place(int row, int vector) const {
    const int line = vector / 8 * rows + row;
    return x + line * 128 + ((vector ^ line) % 8 << 4);
  }
  __device__ __forceinline__ uint32_t sum(int row, int part) const {
    return sums + 4 * (row * 16 + part);
  }
  __device__ __forceinline__ void store_sum(int row, int part, float v) const {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(sum(row, part)), "f"(v) : "memory");
  }
  // rsqrt of the mean of the row's squares: for a warp, when all parts are there.
  __device__ __forceinline__ float factor(const Params& p, int row, int lane) const {
    float v = 0;
    if (lane < parts) asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(sum(row, lane)));
    return rsqrtf(warp_sum(v) / static_cast<float>(p.k) + p.a.norm_eps);
  }
  template <typename T>
  __device__ __forceinline__ void store(int row, int vector, Vec<T, 8> e, float by) const {
    const uint4 w[2] = {load_shared(weights + 32 * vector),
                        load_shared(weights + 32 * vector + 16)};
    const float* weight = reinterpret_cast<const float*>(w);
#pragma unroll
    for (int i = 0; i < 8; ++i) e.v[i] = from_float<T>(as_float(e.v[i]) * by * weight[i]);
    store_shared(place(row, vector), *reinterpret_cast<const uint4*>(&e));
  }
};

template <typename T>
__device__ __forceinline__ float add_squares(float sum, const Vec<T, 8>& e) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float h = as_float(e.v[i]);
    sum = __fmaf_rn(h, h, sum);
  }
  return sum;
}

// x, normalised as norm.cu does it, to the bit, by kNormWarps warps. Few rows: from memory at once,
// held in registers until the sums are there. A warp has parts warp, warp + 8, … of all rows'.
template <typename T>
__device__ __forceinline__ void normalise_held(const Params& p, const Memory& memory) {
  const WholeX whole(p, memory);
  const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
  const int all_parts = whole.rows * whole.parts;
  Vec<T, 8> x[kSkinnyHeldVectors];
  const auto for_each_part = [&](const auto& f) {
    int row = 0, part = warp;
#pragma unroll
    for (int j = 0; j < kSkinnyHeldVectors; ++j, part += kNormWarps) {
      if (warp + kNormWarps * j >= all_parts) break;
      while (part >= whole.parts) part -= whole.parts, ++row;
      f(x[j], row, part, 32 * part + lane);
    }
  };
  wait_for_previous();
  for_each_part([&](Vec<T, 8>& e, int row, int, int vector) {
    uint4 bits{};
    if (vector < whole.vectors)
      bits = __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.a.x) +
                                                   row * p.a.x_stride + 8 * vector));
    e = reinterpret_cast<const Vec<T, 8>&>(bits);
  });
  for_each_part([&](const Vec<T, 8>& e, int row, int part, int) {
    const float sum = warp_sum(add_squares(0.0f, e));
    if (lane == 0) whole.store_sum(row, part, sum);
  });
  wait(memory.x_full(), 0);  // the weights
  synchronise_normalisers();
  for_each_part([&](const Vec<T, 8>& e, int row, int, int vector) {
    const float factor = whole.factor(p, row, lane);
    if (vector < whole.vectors) whole.store(row, vector, e, factor);
  });
  fence_async_proxy();
  synchronise_normalisers();
}

// Other rows, where the copy engine has put them.
// In little code: it runs once a launch, and fetching it takes longer than running it.
template <typename T>
__device__ __forceinline__ void normalise(const Params& p, const Memory& memory) {
  constexpr int kAtOnce = 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WholeX whole(p, memory);
  const int rows = whole.rows, vectors = whole.vectors, parts = whole.parts;
  const auto load = [&](int row, int vector) {
    const uint4 raw = load_shared(whole.place(row, vector));
    return reinterpret_cast<const Vec<T, 8>&>(raw);
  };
  wait(memory.x_full(), 0);

  int row = 0, part = warp;
  while (part >= parts) part -= parts, ++row;
#pragma unroll 1
  while (row < rows) {
    float sum[kAtOnce] = {};
    int rows_of[kAtOnce], parts_of[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      rows_of[j] = row;
      parts_of[j] = part;
      part += kNormWarps;
      while (part >= parts) part -= parts, ++row;
    }
#pragma unroll 1
    for (int item = lane; item < vectors; item += 32 * parts) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int v = item + 32 * parts_of[j];
        if (v >= vectors || rows_of[j] >= rows) continue;
        sum[j] = add_squares(sum[j], load(rows_of[j], v));
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      sum[j] = warp_sum(sum[j]);
      if (lane == 0 && rows_of[j] < rows) whole.store_sum(rows_of[j], parts_of[j], sum[j]);
    }
  }
  synchronise_normalisers();
  const int log_warps = rows > 4 ? 0 : rows > 2 ? 1 : rows > 1 ? 2 : 3;  // of a row
  const int first = (warp & ((1 << log_warps) - 1)) * 32 + lane;
#pragma unroll 1
  for (int r = warp >> log_warps; r < rows; r += kNormWarps >> log_warps) {
    const float factor = whole.factor(p, r, lane);
#pragma unroll 1
    for (int v = first; v < vectors; v += 32 << log_warps) whole.store(r, v, load(r, v), factor);
  }
  fence_async_proxy();
  synchronise_normalisers();
}

// A tile's products. Few rows of x are the B operand, and W, in blocks of eight strips, is A. Many
// (kRows = 64, or up to 256 for as many groups of four warps as have 64 each) are A and kShape
// strips of W are B: 16 outputs with 64 rows take 20 cycles so, and 33 the other way.
template <typename T, typename Out, int kRows, int kShape>
struct Tile {
  static constexpr bool kWide = kRows >= 64;
  static constexpr bool kIsF32 = std::is_same_v<Out, float>;  // then perhaps with units
  static constexpr bool kTakesTurns = kGroups<Out, kRows> > 1;
  static constexpr int kBlocks = kWide ? 1 : kShape, kTiles = kWide ? kShape : kRows / 8;
  static constexpr int kAtoms = SkinnySm90Plan::stage_atoms(kRows, kWide ? kTiles : 8 * kBlocks);

  const Params& p;
  const Memory& memory;
  Place place;  // of the present stage
  float acc[kBlocks][kTiles][4];
  uint32_t before[kBlocks][kWide ? 1 : kTiles][4] = {};  // bits of T; few, so registers are enough
  UnitRow unit_rows[kWide ? 1 : kTiles][2];              // units of logits: this lane's rows
  int group, warp;                                       // of the group

  __device__ Tile(const Params& params, const Memory& m, int my_group, int my_warp, int lane)
      : p(params), memory(m), group(my_group), warp(my_warp) {
    if (kTakesTurns && group > 0) skip();
    if (!kIsF32 || p.a.units.units == nullptr) return;
    const SamplingRow* rows =
        p.a.units.step->sampling + p.a.units.first + (kWide ? first_row(p) : 0);
#pragma unroll
    for (int t = 0; t < (kWide ? 1 : kTiles); ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (const int row = row_of(t, i, lane); row < p.plan.rows)
          unit_rows[t][i] = UnitRow(rows[row]);
  }
  // Another group's tile.
  __device__ __forceinline__ void skip() {
    place.stage += p.tile_stages.stage;
    place.phase ^= p.tile_stages.phase;
    if (place.stage >= p.plan.stages) {
      place.stage -= p.plan.stages;
      place.phase ^= 1;
    }
  }
  // Of x: two rows a lane, of eight (few), or of the warp's sixteen.
  __device__ __forceinline__ int row_of(int t, int i, int lane) const {
    return kWide ? 16 * warp + 8 * i + lane / 4 : 8 * t + lane % 4 * 2 + i;
  }

  // The tile's sums. While the tensor core is at one stage, the next one's products are put behind.
  // A stage is given back when all of it has been multiplied.
  __device__ __forceinline__ void run(int tile, int lane) {
    const SkinnySm90Plan& plan = p.plan;
    const bool whole = !kWide && plan.whole;
    // In units of 16 bytes, as the tensor core takes addresses; uniform, so that they lie where it
    // takes them from.
    const uint32_t w_pitch = plan.tile * (kStripBytes / 16), x_pitch = 8 * plan.rows;
    const uint32_t begin = uniform(memory.base / 16), step = plan.stage_bytes / 16;
    uint32_t w = begin + uniform(place.stage) * step, x = uniform(memory.x / 16);
    const uint32_t my_rows = kRows > 64 ? uniform(warp / 4) * (64 * 128 / 16) : 0;
    int left = plan.stages - uniform(place.stage);  // in the ring
    if (whole && p.a.norm.weight == nullptr) wait(memory.x_full(), 0);
    wait(memory.full(place.stage), place.phase);
    if constexpr (!kWide && !kIsF32) fetch(tile, lane);  // x is there, so somebody has waited
    uint32_t before_this = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(acc[b]);
    wgmma_fence();
    // What stands between two stages' products the tensor core waits for, but for a few of them.
    for (int stage = 0; stage < p.num_stages; ++stage) {
      wait(memory.full(place.stage), place.phase);
      if (!whole) x = w + kAtoms * w_pitch;
#pragma unroll
      for (int atom = 0; atom < kAtoms; ++atom)
#pragma unroll
        for (int i = 0; i < kAtom / 16; ++i)
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            const uint32_t from_w = w + atom * w_pitch + b * (kBlockBytes / 16) + 2 * i;
            const uint32_t from_x = x + atom * x_pitch + 2 * i + my_rows;
            wgmma_shared<T>(acc[b], kWide ? from_x : from_w, kWide ? from_w : from_x,
                            i > 0 || atom > 0 || stage > 0);
          }
      wgmma_commit();
      if (stage > 0) {
        wgmma_wait<1>();
        if (lane == 0) arrive(before_this);
      }
      before_this = memory.empty(place.stage);
      place.advance(plan.stages);
      x += kAtoms * x_pitch;
      w += step;
      if (--left == 0) w = begin, left = plan.stages;
    }
    if (kTakesTurns && lane == 0) arrive(memory.turn(group ^ 1));
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(acc[b]);
    if (lane == 0) arrive(before_this);
    // Not looked at sooner: the products would wait for it.
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) pin(before[b]);
  }

  // Rows and columns of `out` that exist. Rows of x that the row block before has, too, are that
  // one's.
  __device__ __forceinline__ bool is_mine(int row, int col) const {
    const int from = kWide ? static_cast<int>(blockIdx.y) * p.plan.rows - first_row(p) : 0;
    return row >= from && row < p.plan.rows && col < p.n;
  }
  __device__ __forceinline__ int64_t place_of(int row, int col) const {
    return (int64_t{kWide ? first_row(p) : 0} + row) * p.a.out_stride + col;
  }
  __device__ __forceinline__ T gated(T gate, T other) const {
    return from_float<T>(activate(p.a.act, as_float(gate)) * as_float(other));
  }

  // -- The sums become results: few rows of x, at once --

  // Calls f(b, t, i, column, elements from `out`) for what this lane stores, if not gated.
  // acc[b][t][i] is of row 8 t + lane % 4 * 2 + i % 2 of x.
  template <typename F>
  __device__ __forceinline__ void for_each(int tile, int lane, const F& f) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 8 * t + lane % 4 * 2 + i % 2, strip = 8 * b + 2 * warp + i / 2;
          const int col = kStripRows * (tile * p.plan.tile + strip) + lane / 4;
          if (strip < p.plan.tile && is_mine(row, col)) f(b, t, i, col, place_of(row, col));
        }
  }
  // What the sums are added to comes while they are made.
  __device__ __forceinline__ void fetch(int tile, int lane) {
    if (p.a.accumulate)
      for_each(tile, lane, [&](int b, int t, int i, int, int64_t at) {
        before[b][t][i] = static_cast<const uint16_t*>(p.a.out)[at];
      });
  }
  __device__ __forceinline__ void store_narrow(int tile, int lane) const {
    if constexpr (kIsF32) {
      if (!p.a.units.only)
        for_each(tile, lane, [&](int b, int t, int i, int col, int64_t at) {
          static_cast<float*>(p.a.out)[at] = with_bias<T>(p.a, acc[b][t][i], col);
        });
      if (p.a.units.units != nullptr) store_units_narrow(tile, lane);
    } else if (p.a.gated) {
      store_gated(tile, lane);
    } else {
      for_each(tile, lane, [&](int b, int t, int i, int col, int64_t at) {
        const auto bits = static_cast<uint16_t>(before[b][t][i]);
        store_16bit<T>(p.a, at, with_bias<T>(p.a, acc[b][t][i], col),
                       reinterpret_cast<const T&>(bits));
      });
    }
  }
  // Calls f(pair of strips, row of x, acc of the one, of the other, t, i) for the pairs of which
  // this lane has a column each.
  template <typename F>
  __device__ __forceinline__ void for_each_pair(int lane, const F& f) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          f(4 * b + warp, row_of(t, i, lane), acc[b][t][i], acc[b][t][i + 2], t, i);
  }
  // The gate's strip stands before the other half's.
  __device__ __forceinline__ void store_gated(int tile, int lane) const {
    for_each_pair(lane, [&](int pair, int row, float gate, float other, int, int) {
      const int col = kStripRows * (tile * p.plan.tile / 2 + pair) + lane / 4;
      if (2 * pair >= p.plan.tile || !is_mine(row, col)) return;
      static_cast<T*>(p.a.out)[place_of(row, col)] =
          gated(round_linear<T>(with_bias<T>(p.a, gate, col)),
                round_linear<T>(with_bias<T>(p.a, other, p.n + col)));
    });
  }
  __device__ __forceinline__ void store_units_narrow(int tile, int lane) const {
    for_each_pair(lane, [&](int pair, int row, float low, float high, int t, int i) {
      const int strip = 2 * pair, col = kStripRows * (tile * p.plan.tile + strip);
      float v[2] = {low, high};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int mine = col + kStripRows * j + lane / 4;
        v[j] = mine < p.n ? with_bias<T>(p.a, v[j], mine) : -INFINITY;
      }
      LogitUnit unit;
      if (logit_unit<4>(v, unit_rows[t][i], lane / 4, unit) && strip < p.plan.tile &&
          is_mine(row, col))
        p.a.units.units[row * logit_units(p.n) + col / kUnitTokens] = unit;
    });
  }

  // -- Many rows: by way of shared memory --
  // [row of x][row of the tile] in 16 bits (fp32: below): then a lane has eight neighbours of a
  // row, and little code makes them results. Code that runs once a launch takes longer to come than
  // to run. A warp makes results of its own sums.

  __device__ __forceinline__ uint32_t staged(int row, int strip) const {
    return memory.out + row * (16 * kTiles + 16) + 16 * strip;
  }
  static __device__ __forceinline__ T load_one(uint32_t address) {
    uint16_t bits;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
    return reinterpret_cast<const T&>(bits);
  }
  static __device__ __forceinline__ void store_one(uint32_t address, T v) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(reinterpret_cast<const uint16_t&>(v))
                 : "memory");
  }
  // Calls f(sum, row of x, strip, row of the strip).
  template <typename F>
  __device__ __forceinline__ void for_each_sum(int lane, const F& f) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f(acc[0][t][i], 16 * warp + i / 2 * 8 + lane / 4, t, lane % 4 * 2 + i % 2);
  }

  __device__ __forceinline__ void store_wide(int tile, int lane) {
    if (p.a.bias != nullptr)
      for_each_sum(lane, [&](float& sum, int, int strip, int in_strip) {
        const bool with_gate = !kIsF32 && p.a.gated;
        const int all = tile * kTiles + strip, half = with_gate ? all % 2 : 0;
        const int col = kStripRows * (with_gate ? all / 2 : all) + in_strip;
        if (col < p.n) sum = with_bias<T>(p.a, sum, half * p.n + col);
      });
    if constexpr (kIsF32) {
      if (!p.a.units.only) store_f32(tile, lane);
      if (p.a.units.units != nullptr) store_units_wide(tile, lane);
      return;
    }
    __syncwarp();  // the tile before is stored
    for_each_sum(lane, [&](float sum, int row, int strip, int in_strip) {
      store_one(staged(row, strip) + 2 * in_strip, round_linear<T>(sum));
    });
    __syncwarp();
    if (p.a.gated) {
      finish<true>(tile, lane);
    } else {
      finish<false>(tile, lane);
    }
  }
  __device__ __forceinline__ void store_units_wide(int tile, int lane) {
    const int first = kStripRows * kTiles * tile, low = row_of(0, 0, lane);
    LogitUnit* const units = p.a.units.units + (first_row(p) + low) * logit_units(p.n);
    store_units(acc[0], unit_rows[0], first, p.n, {is_mine(low, first), is_mine(low + 8, first)},
                {units, units + 8 * logit_units(p.n)});
  }
  // Never gated; four strips at a time, so that stores are of whole lines: 32 bytes at a time, as
  // the sums lie, all took 2% longer (64 rows of 0.6B's lm_head, H200). Each group has its own
  // place.
  template <int kFrom = 0>
  __device__ __forceinline__ void store_f32(int tile, int lane) {
    constexpr int kTo = kFrom + 4 < kTiles ? kFrom + 4 : kTiles, kVectors = 2 * (kTo - kFrom);
    constexpr int kRow = SkinnySm90Plan::kF32RowBytes;
    const uint32_t staged = memory.out + (16 * kComputeWarps<kRows> * group + 16 * warp) * kRow;
    __syncwarp();  // what was there is stored
#pragma unroll
    for (int t = kFrom; t < kTo; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(staged + (8 * i + lane / 4) * kRow +
                                                              32 * (t - kFrom) + lane % 4 * 8),
                     "f"(acc[0][t][2 * i]), "f"(acc[0][t][2 * i + 1])
                     : "memory");
    __syncwarp();
#pragma unroll 1
    for (int item = lane; item < 16 * kVectors; item += 32) {
      const int in_warp = item / kVectors, vector = item % kVectors, row = 16 * warp + in_warp;
      const int col = kStripRows * (tile * kTiles + kFrom) + 4 * vector;
      if (!is_mine(row, col)) continue;
      float* out = static_cast<float*>(p.a.out) + place_of(row, col);
      const uint4 bits = load_shared(staged + in_warp * kRow + 16 * vector);
      if (p.vectors && col + 4 <= p.n) {
        *reinterpret_cast<uint4*>(out) = bits;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (col + i < p.n) out[i] = reinterpret_cast<const float*>(&bits)[i];
      }
    }
    if constexpr (kTo < kTiles) store_f32<kTo>(tile, lane);
  }

  template <bool kGated>
  __device__ __forceinline__ void finish(int tile, int lane) const {
    using Elements = Vec<T, kStripRows>;
    constexpr int kStrips = kGated ? kTiles / 2 : kTiles;
#pragma unroll 1
    for (int item = lane; item < 16 * kStrips; item += 32) {
      const int row = 16 * warp + item / kStrips, strip = item % kStrips;
      const int col = kStripRows * (tile * kStrips + strip);
      if (!is_mine(row, col)) continue;
      T* out = static_cast<T*>(p.a.out) + place_of(row, col);
      // The gate's strip stands before the other half's.
      const uint32_t from = staged(row, kGated ? 2 * strip : strip);
      uint4 bits = load_shared(from);
      Elements& e = reinterpret_cast<Elements&>(bits);
      if constexpr (kGated) {
        const uint4 other_bits = load_shared(from + 16);
        const Elements& other = reinterpret_cast<const Elements&>(other_bits);
        if (p.a.act == Activation::silu) {
#pragma unroll
          for (int i = 0; i < kStripRows; ++i)
            e.v[i] =
                from_float<T>(activate<Activation::silu>(as_float(e.v[i])) * as_float(other.v[i]));
        } else {
#pragma unroll 1
          for (int i = 0; i < 2 * kStripRows; i += 2)
            store_one(from + i, gated(load_one(from + i), load_one(from + 16 + i)));
          bits = load_shared(from);
        }
      }
      const bool is_vector = p.vectors && col + kStripRows <= p.n;
      if (!kGated && p.a.accumulate) {
        Elements old{};
        if (is_vector) old = *reinterpret_cast<const Elements*>(out);
#pragma unroll
        for (int i = 0; i < kStripRows; ++i) {
          if (!is_vector && col + i < p.n) old.v[i] = out[i];
          e.v[i] = add_linear(e.v[i], old.v[i]);
        }
      }
      if (is_vector) {
        *reinterpret_cast<Elements*>(out) = e;
      } else {
#pragma unroll
        for (int i = 0; i < kStripRows; ++i)
          if (col + i < p.n) out[i] = e.v[i];
      }
    }
  }

  __device__ __forceinline__ void store(int tile, int lane) {
    if constexpr (kWide) {
      store_wide(tile, lane);
    } else {
      store_narrow(tile, lane);
    }
  }
};

#endif

template <typename T, typename Out, int kRows, int kShape>
__global__ void __launch_bounds__(
    32 * ((kRows <= 16 ? kNormWarps : kGroups<Out, kRows> * kComputeWarps<kRows>)+1), 1)
    linear_skinny_sm90_kernel(const __grid_constant__ Params p,
                              const __grid_constant__ CUtensorMap w_map,
                              const __grid_constant__ CUtensorMap x_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char smem[];
  const Memory memory(static_cast<uint32_t>(__cvta_generic_to_shared(smem)), p.plan);
  const bool with_norm = kRows <= 16 && p.a.norm.weight != nullptr;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.plan.stages; ++i) {
      init_barrier(memory.full(i), 1);
      init_barrier(memory.empty(i), kComputeWarps<kRows>);
    }
    init_barrier(memory.x_full(), with_norm && !p.plan.held ? 2 : 1);  // its weights, and x
    if (kGroups<Out, kRows> > 1)
      for (int i = 0; i < 2; ++i) init_barrier(memory.turn(i), kComputeWarps<kRows>);
    fence_async_proxy();
  }
  __syncthreads();
  const int warp = uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;
  if (warp == static_cast<int>(blockDim.x) / 32 - 1) {
    if (lane == 0) copy(p, memory, &w_map, &x_map);
    return;
  }
  if (static_cast<int>(blockIdx.x) >= p.num_tiles) return;
  if (with_norm) {
    if (p.plan.held) {
      normalise_held<T>(p, memory);
    } else {
      normalise<T>(p, memory);
    }
    if (warp >= kGroups<Out, kRows> * kComputeWarps<kRows>) return;
  }
  constexpr int kTurns = kGroups<Out, kRows>;
  const int group = kTurns > 1 && warp >= kComputeWarps<kRows> ? 1 : 0;
  Tile<T, Out, kRows, kShape> tile(p, memory, group, warp - group * kComputeWarps<kRows>, lane);
  uint32_t phase = group ^ 1;  // the first one's turn it is
  for (int i = blockIdx.x + group * gridDim.x; i < p.num_tiles; i += kTurns * gridDim.x) {
    if (kTurns > 1) wait(memory.turn(group), phase);
    phase ^= 1;
    tile.run(i, lane);
    tile.store(i, lane);
    if (kTurns > 1) tile.skip();
  }
#endif
}

template <typename T, typename Out, int kRows, int kShape>
void launch_sm90(const Params& p, cudaStream_t stream) {
  const SkinnyArgs& a = p.a;
  // Of W and x the columns are cut into atoms, so that a box brings several, one after the other;
  // of gated weights the rows into eights, one of the gate before one of the others.
  const int64_t atoms = a.in_features / kAtom;
  const CUtensorMap w_map =
      a.gated ? make_tensor_map(
                    "linear", a.dtype, a.w, {kAtom, kStripRows, 2, p.n / kStripRows, atoms},
                    {2 * a.w_stride, 2 * a.w_stride * p.n, 2 * kStripRows * a.w_stride, 2 * kAtom},
                    {kAtom, kStripRows, 2, p.plan.tile / 2, p.plan.atoms})
              : make_tensor_map("linear", a.dtype, a.w, {kAtom, a.out_features, atoms},
                                {2 * a.w_stride, 2 * kAtom},
                                {kAtom, kStripRows * p.plan.tile, p.plan.atoms});
  const CUtensorMap x_map =
      p.plan.whole
          ? make_tensor_map("linear", a.dtype, a.x, {kAtom, a.rows, atoms},
                            {2 * a.x_stride, 2 * kAtom},
                            {kAtom, a.rows, p.num_stages * p.plan.atoms})
          : make_tensor_map("linear", a.dtype, a.x, {kAtom, a.rows, atoms},
                            {2 * a.x_stride, 2 * kAtom}, {kAtom, p.plan.rows, p.plan.atoms});
  const auto kernel = linear_skinny_sm90_kernel<T, Out, kRows, kShape>;
  allow_smem(kernel, static_cast<size_t>(p.plan.smem), "linear_skinny");
  const dim3 grid(static_cast<unsigned>(p.plan.ctas),
                  static_cast<unsigned>((a.rows + p.plan.rows - 1) / p.plan.rows));
  constexpr int computing = kGroups<Out, kRows> * kComputeWarps<kRows>;
  const int warps = (a.norm.weight != nullptr ? std::max(computing, kNormWarps) : computing) + 1;
  launch(kernel, grid, static_cast<unsigned>(32 * warps), static_cast<size_t>(p.plan.smem), stream,
         "linear_skinny", p, w_map, x_map);
}

template <typename T, int kRows>
void launch_narrow(const Params& p, cudaStream_t stream) {
  if (p.a.out_dtype == DType::f32) return launch_sm90<T, float, kRows, 2>(p, stream);
  return p.plan.tile <= 64 / kStripRows ? launch_sm90<T, T, kRows, 1>(p, stream)
                                        : launch_sm90<T, T, kRows, 2>(p, stream);
}

template <typename T, int kRows>
void launch_wide(const Params& p, cudaStream_t stream) {
  if (p.a.out_dtype == DType::f32)
    return launch_sm90<T, float, kRows, SkinnySm90Plan::kF32Tile>(p, stream);
  [&]<size_t... i>(std::index_sequence<i...>) {
    const auto launch_if = [&](auto tile) {
      if constexpr (SkinnySm90Plan::is_wide(tile(), kRows))
        if (p.plan.tile == tile()) launch_sm90<T, T, kRows, tile()>(p, stream);
    };
    (launch_if(std::integral_constant<int, SkinnySm90Plan::kWideTiles[i]>{}), ...);
  }(std::make_index_sequence<std::size(SkinnySm90Plan::kWideTiles)>{});
}

}  // namespace

void linear_skinny_sm90(const SkinnyArgs& a, const Card& card, cudaStream_t stream) {
  const bool norm = a.norm.weight != nullptr;
  const SkinnySm90Plan plan =
      plan_skinny_sm90(a.rows, a.out_features, a.in_features, norm, a.gated, card.num_sms,
                       card.max_smem, card.smem_per_sm, a.out_dtype == DType::f32);
  check_invariant(plan.stages >= SkinnySm90Plan::kMinStages &&
                      (a.rows <= 16 || SkinnySm90Plan::is_wide(plan.tile, plan.rows)),
                  "linear_skinny: no kernel has this plan");
  const auto num_tiles = static_cast<int>(plan.tiles(a.out_features));
  const auto num_stages =
      static_cast<int>((a.in_features + kAtom * plan.atoms - 1) / (kAtom * plan.atoms));
  const Params p{a,
                 plan,
                 static_cast<int>(a.gated ? a.out_features / 2 : a.out_features),
                 static_cast<int>(a.in_features),
                 num_tiles,
                 num_stages,
                 is_vector_aligned(a.out, a.out_stride),
                 {num_stages % plan.stages, static_cast<uint32_t>(num_stages / plan.stages % 2)}};
  dispatch_16bit(a.dtype, "linear", [&](auto type) {
    using T = decltype(type);
    switch (skinny_sm90_rows(plan.rows)) {
      case 8:
        return launch_narrow<T, 8>(p, stream);
      case 16:
        return launch_narrow<T, 16>(p, stream);
      case 64:
        return launch_wide<T, 64>(p, stream);
      case 128:
        return launch_wide<T, 128>(p, stream);
      case 192:
        return launch_wide<T, 192>(p, stream);
      default:
        return launch_wide<T, 256>(p, stream);
    }
  });
}

}  // namespace ni::cuda
