// What the warps of Hopper's decode attention (attention_decode_sm90.cu) share: memory, barriers,
// and which work is whose.
#pragma once

#include "cuda/attention_decode.cuh"
#include "cuda/sm90.cuh"

namespace ni::cuda::decode {

template <typename C, int D>
constexpr DecodePlan kPlan = plan_decode_sm90(D, static_cast<int>(sizeof(C)));

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // elsewhere the kernel is empty

inline constexpr int kComputeThreads = 32 * kDecodeWarps, kLogThreads = 7;
static_assert(kComputeThreads == 1 << kLogThreads);
inline constexpr int kManyChunks = 24;  // for merge_many(): with 16 it is slower, with 50 faster
inline constexpr uint32_t kAll = 0xffffffffu;

// Of a result that is merged: pieces of four columns, row by row; none: it is others'.
struct Share : Work {
  int begin, end;
};

template <typename C, int D>
struct Memory {
  using Layout = BoxLayout<D* static_cast<int>(sizeof(C))>;
  static constexpr int kStages = kPlan<C, D>.stages;
  static constexpr int kTileBytes = kTile * Layout::kRowBytes;
  static constexpr int kPBytes = kMmaRows * kTile * 2;  // of a tile
  static constexpr int kQRow = 2 * D + 16;              // in different banks for ldmatrix

  unsigned char* base;
  uint32_t address;
  __device__ explicit Memory(unsigned char* at)
      : base(at), address(static_cast<uint32_t>(__cvta_generic_to_shared(at))) {}

  static constexpr int kP = kStages * kTileBytes;
  static constexpr int kQ = kP + kDecodeWarps * kPBytes;
  static constexpr int kTops = kQ + kDecodeUnits * kMmaRows * kQRow;
  static constexpr int kWork = kTops + kMmaRows * kDecodeWarps * 4;
  static constexpr int kMerge = kWork + kDecodeUnits * static_cast<int>(sizeof(Work));
  static constexpr int kBarriers = kMerge + static_cast<int>(sizeof(Share));
  static constexpr int kNumBarriers = 2 * kStages + 3 * kDecodeUnits + 2;
  static_assert(kBarriers + 8 * kNumBarriers <= kPlan<C, D>.smem);

  __device__ uint32_t tile(int stage) const { return address + stage * kTileBytes; }
  __device__ uint32_t p(int tile) const { return address + kP + tile * kPBytes; }
  // Of chunks that are merged: a piece of each for every thread in the ring's place, factors in
  // that of P.
  static constexpr int kMergedChunks = kStages * kTileBytes / (16 * kComputeThreads) / 8 * 8;
  static constexpr int kLogFactors = 9, kFactors = 1 << kLogFactors;
  static_assert(kMergedChunks > 0 && 16 * kFactors == kDecodeWarps * kPBytes);
  __device__ float4* factors() const { return reinterpret_cast<float4*>(base + kP); }
  // Rows of a unit: q; with kRope, behind those of the group: k, v, cosines and sines of the token.
  __device__ uint32_t q(int unit) const { return address + kQ + unit * kMmaRows * kQRow; }
  template <typename Element>
  __device__ Element* row(int unit, int row) const {
    return reinterpret_cast<Element*>(base + kQ + (unit * kMmaRows + row) * kQRow);
  }
  // Row maxima of the four tiles, [row].
  __device__ float4* tops() const { return reinterpret_cast<float4*>(base + kTops); }
  __device__ Work& work(int unit) const { return reinterpret_cast<Work*>(base + kWork)[unit]; }
  // What is to be merged of the result of the part that was counted last.
  __device__ Share& share() const { return *reinterpret_cast<Share*>(base + kMerge); }

  __device__ uint32_t barrier(int i) const { return address + kBarriers + 8 * i; }
  __device__ uint32_t full(int stage) const { return barrier(stage); }
  __device__ uint32_t empty(int stage) const { return barrier(kStages + stage); }
  __device__ uint32_t unit_full(int unit) const { return barrier(2 * kStages + unit); }
  __device__ uint32_t unit_empty(int unit) const {
    return barrier(2 * kStages + kDecodeUnits + unit);
  }
  // With kRope: its q (and k, v) are rotated.
  __device__ uint32_t unit_rotated(int unit) const {
    return barrier(2 * kStages + 2 * kDecodeUnits + unit);
  }
  __device__ uint32_t part_written() const { return barrier(kNumBarriers - 2); }
  __device__ uint32_t part_counted() const { return barrier(kNumBarriers - 1); }

  __device__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full(i), 1);
      init_barrier(empty(i), kDecodeWarps);
    }
    for (int i = 0; i < kDecodeUnits; ++i) {
      init_barrier(unit_full(i), 1);
      init_barrier(unit_empty(i), kDecodeWarps + 1);
      init_barrier(unit_rotated(i), 1);
    }
    init_barrier(part_written(), kDecodeWarps);
    init_barrier(part_counted(), 1);
  }
};

__device__ __forceinline__ Work broadcast(const Work& w, int lane) {
  const auto get = [&](int v) { return __shfl_sync(kAll, v, lane); };
  return {get(w.item),
          get(w.kv_head),
          get(w.row_tile),
          get(w.seq),
          get(w.query_begin),
          get(w.query_len),
          get(w.context),
          get(w.tile_begin),
          get(w.tile_end),
          get(w.first_chunk),
          get(w.num_chunks),
          get(w.first_item),
          get(w.is_whole),
          -1,
          0,
          0};
}

// With a window ranges would be unequal, for many chunks lie before it; with whole sequences, for
// those are longer. Then units are dealt out one by one.
__device__ __forceinline__ bool has_ranges(const DecodeParams& p) {
  return p.attn.args.window == 0 && p.attn.step->num_whole_items == 0;
}
// Where a range of equal work begins.
__device__ __forceinline__ int first_unit(const DecodeCut& cut, int tiles) {
  const int chunks = max(1, (cut.context + kKvChunk - 1) / kKvChunk);
  const uint32_t tokens = __umulhi(cut.part * static_cast<uint32_t>(tiles), cut.context);
  return cut.item * tiles + static_cast<int>(__umulhi(cut.part, tiles)) * chunks +
         static_cast<int>(tokens + kKvChunk - 1) / kKvChunk;
}
// CTAs that have work. Two chunks a sequence: where CTAs would be idle, one takes both sooner than
// two merge.
__device__ __forceinline__ int num_ctas(const DecodeParams& p) {
  const int units = num_units(p);
  const bool pairs = has_ranges(p) && p.attn.step->max_decode_chunks == 2;
  return min(static_cast<int>(gridDim.x), pairs ? (units + 1) / 2 : units);
}

// A row of the unit's: of q; with kRope behind those of the group k and v, which lie behind all q.
template <typename T, bool kRope>
__device__ __forceinline__ const T* q_row(const DecodeParams& p, const Work& w, int row) {
  const int all = w.row_tile * kMmaRows + row, query = kRope ? 0 : all / p.group;
  int head = w.kv_head * p.group + all - query * p.group;
  if (kRope && row >= p.group)
    head = p.attn.args.num_heads + (row - p.group) * p.attn.kv.num_kv_heads + w.kv_head;
  return static_cast<const T*>(p.attn.q) + (w.query_begin + query) * p.attn.q_stride +
         static_cast<int64_t>(head) * p.attn.kv.head_dim;
}

// The chunks of this work have the sequence's last token, of which attention with kRope makes k, v.
__device__ __forceinline__ bool has_new_token(const Work& w) {
  return w.context > 0 && w.tile_end * kTile >= w.context;
}

#endif

}  // namespace ni::cuda::decode
