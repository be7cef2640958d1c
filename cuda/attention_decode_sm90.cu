// attention_decode() on Hopper, in the arithmetic of attention.cuh: out = softmax(q K^T scale) V
// for few query rows of each sequence. What work is: attention_decode.cuh.
//
// Layouts: q, out [T, heads * d]; K, V [block][kv head][slot][d], blocks of any multiple of 16
// slots. Persistent CTAs, two a multiprocessor where they fit, of six warps:
// - One copies, and nothing else: K and V in tiles of 64 tokens, pieces of 16 slots by TMA, through
//   one ring that does not stop (of a chunk: K of its tiles, then V), and q and a description of
//   each piece of work (with kRope the first q is fetched by who computes). Tiles that were there
//   before this step come before the wait for the kernel before.
// - Four compute, a chunk of 256 tokens at a time. A warp has the scores of one tile; with the row
//   maxima of all four it knows those that a walk through the tiles would have seen, so its P has
//   the same bits. In P V, a warp has all tokens and a part of the dimensions. Two barriers a
//   chunk.
// - One counts the chunks that are done of a result in which several CTAs have a part: fences and
//   atomics take longer than tiles. The last one's computing warps merge, a piece of work later;
//   large merges are shared by those that have nothing else to do.
// A CTA has a range of neighbouring chunks, so few results are shared.
// With kRope the warp that counts does what rope_kv.cu does, to the bit, ahead of those that
// compute (which do so for the first unit): q's rows where they lie, k and v into the cache; and
// who computes, since the tile that the engine brings has not seen them, into that tile. So nothing
// of the cache waits for the kernel before. Moves tokens * kv_heads * 2 d elements of the cache and
// about 3% of that for partial sums; bound by memory bandwidth, by latency where the batch is
// small.
#include "cuda/attention_decode.cuh"
#include "cuda/rope.cuh"
#include "cuda/sm90.cuh"
#include "cuda/tensor_map.h"

namespace ni::cuda {
namespace {

template <typename C, int D>
constexpr DecodePlan kPlan = plan_decode_sm90(D, static_cast<int>(sizeof(C)));

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr int kComputeThreads = 32 * kDecodeWarps, kLogThreads = 7;
static_assert(kComputeThreads == 1 << kLogThreads);
constexpr int kManyChunks = 24;  // for merge_many(): with 16 it is slower, with 50 faster
constexpr uint32_t kAll = 0xffffffffu;

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

// -- The warp that copies -------------------------------------------------------------------------

// The chunks of this work have the sequence's last token, of which attention with kRope makes k, v.
__device__ __forceinline__ bool has_new_token(const Work& w) {
  return w.context > 0 && w.tile_end * kTile >= w.context;
}

template <typename C, int D, bool kRope>
class Copier {
 public:
  __device__ Copier(const DecodeParams& p, const Memory<C, D>& memory, const CUtensorMap* k_map,
                    const CUtensorMap* v_map)
      : p_(p), memory_(memory), k_map_(k_map), v_map_(v_map) {}

  // A range of as many units as any other CTA, or, where a CTA has several, of as much work
  // (chunks at the ends of sequences are short); or every so many-th unit. They are looked up 32 at
  // a time, a lane each: the chain of loads is as long for one. Here and below everything stands
  // once: the less code, the sooner it is there (docs/kernels.md). And few divisions: each takes
  // a tenth of a microsecond.
  __device__ void run() {
    const int units = num_units(p_), ctas = num_ctas(p_), stride = gridDim.x;
    const bool ranges = has_ranges(p_) && units > 0;
    int unit = blockIdx.x, end = units;
    if (ranges && ctas < stride) {  // one unit, or a pair
      const int each = ctas == units ? 1 : 2;
      unit *= each;
      end = min(unit + each, units);
    } else if (ranges) {
      const StepInputs& in = *p_.attn.step;
      const int of_cta = in.num_decode_ranges / stride;
      if (of_cta > 0 && of_cta * stride == in.num_decode_ranges && ctas < units) {
        const DecodeCut* cut = in.decode_cuts + blockIdx.x * of_cta;
        const int tiles = static_cast<int>(p_.tiles.by);
        unit = first_unit(cut[0], tiles);
        end = first_unit(cut[of_cta], tiles);
      } else {
        unit = static_cast<int>(int64_t{blockIdx.x} * units / ctas);
        end = static_cast<int>((int64_t{blockIdx.x} + 1) * units / ctas);
      }
    }
    Work mine{};
    uint32_t todo = 0;
    for (bool has_more = true; has_more;) {
      if (todo == 0 && unit < end) {
        mine = {};
        const int my_unit = unit + lane_ * (ranges ? 1 : stride);
        const bool has_work = my_unit < end && find_unit(my_unit, ranges, mine);
        const int chunk = mine.item - mine.first_item;
        // Of a result, the first chunk of a range takes the others.
        todo = __ballot_sync(kAll, has_work && (!ranges || lane_ == 0 || chunk == 0));
        unit += 32 * (ranges ? 1 : stride);
        if (ranges) {
          int last = unit;
          if (mine.is_whole == 0) {
            const int chunks = min(mine.num_chunks - chunk, end - my_unit);
            mine.tile_end = min((chunk + chunks) * kChunkTiles, (mine.context + kTile - 1) / kTile);
            last = max(last, my_unit + chunks);
          }
          if (todo != 0) unit = __shfl_sync(kAll, last, 31 - __clz(todo));
        }
        continue;
      }
      has_more = todo != 0;
      Work w = broadcast(mine, has_more ? __ffs(todo) - 1 : 0);
      if (!has_more) {
        w.item = -1;
        w.tile_begin = w.tile_end = 0;
      }
      todo &= todo - 1;
      const bool is_last = unit >= end && todo == 0;
      w.is_last = is_last && !w.is_part() ? 1 : 0;
      // Where each thread has one piece of few chunks, others would not be sooner.
      w.joins = is_last && ranges && w.is_part() &&
                        (w.num_chunks > kManyChunks ||
                         w.rows_of_tile(p_.group) * (D / 4) > kComputeThreads)
                    ? 1
                    : 0;
      copy(w);
      has_more = has_more && w.is_last == 0;
    }
  }

 private:
  using Layout = typename Memory<C, D>::Layout;
  static constexpr int kStages = Memory<C, D>::kStages;

  __device__ const RopeArgs& rope() const { return p_.attn.rope; }

  // Ranges have the items in another order: sequences ascending; of each all chunks for the first
  // kv head and row tile, then for the next. So a range has few results that others work at, too.
  __device__ __forceinline__ bool find_unit(int unit, bool ranges, Work& w) const {
    const StepInputs& in = *p_.attn.step;
    const int tiles = static_cast<int>(p_.tiles.by);
    const int some = p_.tiles.quotient(unit);  // item of the sequence
    int tile = unit - some * tiles;
    AttnItem item = in.decode_items[some];
    w.item = some;
    if (ranges && item.index >= 0) {
      const int chunks = (in.context_lens[item.seq] + kKvChunk - 1) / kKvChunk;
      if (chunks > 1) {
        const int first = some - item.index, in_seq = unit - first * tiles;
        tile = in_seq / chunks;
        item.index = in_seq - tile * chunks;
        w.item = first + item.index;
      }
    }
    w.kv_head = kRope ? tile : tile / p_.row_tiles;
    w.row_tile = kRope ? 0 : tile % p_.row_tiles;
    return find_work(p_, item, w);
  }

  // fetches_q: or who computes does, sooner than the copy engine.
  __device__ __forceinline__ void announce(const Work& w, int slot, bool fetches_q) {
    wait(memory_.unit_empty(unit_.stage), unit_.phase ^ 1);
    const int rows = w.item < 0 ? 0 : w.rows_of_tile(p_.group);
    const uint32_t full = memory_.unit_full(unit_.stage);
    const int heads = !fetches_q ? 0 : kRope && rows > 0 && has_new_token(w) ? rows + 2 : rows;
    const int angle_bytes = kRope && rows > 0 && rope().cos != nullptr ? 2 * rope().rotary_dim : 0;
    if (lane_ == 0) {
      memory_.work(unit_.stage) = w;
      memory_.work(unit_.stage).slot = slot;
      arrive_expecting(full, heads * 2 * D + 2 * angle_bytes);
    }
    __syncwarp();
    const uint32_t to = memory_.q(unit_.stage) + lane_ * Memory<C, D>::kQRow;
    if (lane_ < heads) {
      copy_bytes(to, q_row<uint16_t, kRope>(p_, w, lane_), 2 * D, full);
    } else if (const int angle = lane_ - rows - 2; angle_bytes > 0 && (angle == 0 || angle == 1)) {
      copy_bytes(to,
                 (angle == 0 ? rope().cos : rope().sin) +
                     static_cast<int64_t>(max(w.context - 1, 0)) * (rope().rotary_dim / 2),
                 angle_bytes, full);
    }
    unit_.advance(kDecodeUnits);
  }

  // Of a chunk, K of its tiles, then V. No work (an item below 0) ends the others' loops, too.
  __device__ __forceinline__ void copy(const Work& w) {
    // With kRope tiles need nothing of this step.
    const int old_tiles = kRope ? w.tile_end : (w.context - w.query_len) / kTile;
    const int32_t* table =
        p_.attn.step->block_tables + static_cast<int64_t>(w.seq) * p_.attn.step->block_table_stride;
    int new_slot = -1;
    if (kRope && w.item >= 0)
      new_slot = static_cast<int>(p_.attn.step->slot_mapping[w.query_begin]);
    bool is_announced = false, has_piece = false, is_v = false;
    int block = 0, slot = 0, begin = w.tile_begin, end = begin, tile = begin;
    for (;; place_.advance(kStages), ++copied_) {
      if (tile == end && is_v) {
        is_v = false;
        begin = tile;
      } else if (tile == end) {
        is_v = tile > begin;
        tile = begin;
      }
      const bool is_done = !is_v && begin == w.tile_end;
      if (!is_done && !is_v && tile == begin) {  // lanes 0 to 15 have a piece of 16 tokens each
        const int chunk = begin / kChunkTiles, token = chunk * kKvChunk + 16 * lane_;
        end = min(w.tile_end, (chunk + 1) * kChunkTiles);
        has_piece = lane_ < kKvChunk / 16 && token < w.context;
        const int index = p_.block_size.quotient(token);
        slot = token - index * p_.attn.kv.block_size;
        block = has_piece ? table[index] : 0;
      }
      // q and this step's K and V come from the kernel before; with kRope who computes waits for
      // the first q.
      if (kRope && !is_announced) announce(w, new_slot, has_q_), is_announced = true;
      const bool must_wait = is_done || tile >= old_tiles || copied_ >= kStages;
      if (kRope ? !has_q_ && must_wait : !is_announced && (has_q_ || must_wait)) {
        if (!has_q_) {
          // What has no room in the ring yet comes into L2.
          const int mine = begin / kChunkTiles * kChunkTiles + lane_ / 4;
          if (has_piece && mine >= begin && mine < end) {
            if (!is_v && mine >= tile) prefetch_box(k_map_, 0, slot, 0, w.kv_head, block);
            if (!is_v || mine >= tile) prefetch_box(v_map_, 0, slot, 0, w.kv_head, block);
          }
          wait_for_previous();
        }
        if (!kRope) announce(w, new_slot, true), is_announced = true;
        // What the next kernel fetches comes behind what this one waits for. (Where there is much
        // to do the next has no room beside it anyway.)
        if (!has_q_) let_next_start();
        has_q_ = true;
      }
      if (is_done) break;
      const int valid = min(kTile, w.context - tile * kTile);
      wait(memory_.empty(place_.stage), place_.phase ^ 1);
      const uint32_t full = memory_.full(place_.stage);
      if (lane_ == 0) arrive_expecting(full, (valid + 15) / 16 * Layout::kPieceBytes);
      __syncwarp();
      if (has_piece && lane_ / 4 == tile % kChunkTiles)
        copy_box(memory_.tile(place_.stage) + lane_ % 4 * Layout::kPieceBytes,
                 is_v ? v_map_ : k_map_, 0, slot, 0, w.kv_head, block, full, evict_first());
      ++tile;
    }
  }

  const DecodeParams& p_;
  const Memory<C, D>& memory_;
  const CUtensorMap *k_map_, *v_map_;
  const int lane_ = threadIdx.x % 32;
  Place place_, unit_;
  int copied_ = 0;
  bool has_q_ = !p_.attn.settled;  // then all have waited already
};

// -- With kRope: QK-norm and rotation of a unit, pairs of elements as rope.cuh has them
// ------------

template <typename T, typename C, int D>
class Rotator {
 public:
  __device__ Rotator(const DecodeParams& p, const Memory<C, D>& memory, int unit)
      : p_(p), memory_(memory), unit_(unit) {}

  // The unit's q, and k and v of its new token, rows first, first + step, …; the latter go into the
  // cache, too. has_q: they are in shared memory. A row a warp.
  __device__ __forceinline__ void run(const Work& w, bool has_q, int first, int step) const {
    const RopeArgs& rope = p_.attn.rope;
    const int group = p_.group, rows = has_new_token(w) ? group + 2 : group;
    for (int row = first; row < rows; row += step) {
      const bool is_k = row == group, is_v = row > group;
      T* x = memory_.template row<T>(unit_, row);
      const T* from = has_q ? x : q_row<T, true>(p_, w, row);
      const float* weight = (is_k ? rope.k_norm : rope.q_norm).weight;
      float2 v[kPairs], norm[kPairs] = {};
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        v[k] = {0, 0};
        if (!has_pair(k)) continue;
        if (weight != nullptr)
          norm[k] = __ldg(reinterpret_cast<const float2*>(weight + 2 * lane_ + 64 * k));
        const Vec<T, 2> e = *reinterpret_cast<const Vec<T, 2>*>(from + 2 * lane_ + 64 * k);
        v[k] = {as_float(e.v[0]), as_float(e.v[1])};
      }
      if (!is_v && weight != nullptr) normalise_head(v, norm, lane_, D, rope.norm_eps);
      if (!is_v && rope.cos != nullptr) turn(v, group);
      __syncwarp();  // all lanes have read
      const float inverse = 1.0f / (is_v ? p_.attn.kv.v_scale : p_.attn.kv.k_scale);
      C* const cached = is_k || is_v ? in_cache(w, is_v) : nullptr;
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const int i = 2 * lane_ + 64 * k;
        if (!has_pair(k)) continue;
        if (row < group) {
          if constexpr (std::is_same_v<T, Type>) {
            store_pair(x + i, v[k], 1.0f);
          } else {
            *reinterpret_cast<uint32_t*>(x + i) = f16_of_bf16(pack2<T>(v[k].x, v[k].y));
          }
        } else {  // as the cache has them
          store_pair(reinterpret_cast<C*>(x) + i, v[k], inverse);
          if (cached != nullptr) store_pair(cached + i, v[k], inverse);
        }
      }
    }
  }

 private:
  using Type = Operand<T, C>;
  static constexpr int kPairs = (D + 63) / 64;

  __device__ bool has_pair(int k) const { return D % 64 == 0 || 2 * lane_ + 64 * k < D; }

  // Pairs that rotate together are the rotated dimensions' half apart, mostly in other lanes.
  __device__ __forceinline__ void turn(float2 (&v)[kPairs], int group) const {
    const int half = p_.attn.rope.rotary_dim / 2;
    const float* cos = memory_.template row<float>(unit_, group + 2);
    const float* sin = memory_.template row<float>(unit_, group + 3);
    float2 turned[kPairs];
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = 2 * lane_ + 64 * k;
      const bool upper = i >= half;
      const int j = upper ? i - half : i + half;
      float2 other{};
#pragma unroll
      for (int from = 0; from < kPairs; ++from) {
        const float2 theirs = {__shfl_sync(kAll, v[from].x, j / 2 % 32),
                               __shfl_sync(kAll, v[from].y, j / 2 % 32)};
        if (j / 64 == from) other = theirs;
      }
      turned[k] = v[k];
      if (i >= 2 * half) continue;
      const int angle = upper ? i - half : i;
      turned[k] = rotate_pair(v[k], other, *reinterpret_cast<const float2*>(cos + angle),
                              *reinterpret_cast<const float2*>(sin + angle), upper);
    }
#pragma unroll
    for (int k = 0; k < kPairs; ++k) v[k] = turned[k];
  }

  // Where the new token's k or v lies; null: a padding row writes nothing.
  __device__ __forceinline__ C* in_cache(const Work& w, bool is_v) const {
    if (w.slot < 0) return nullptr;
    const KvView& kv = p_.attn.kv;
    const int block = p_.block_size.quotient(w.slot);
    return static_cast<C*>(is_v ? kv.v : kv.k) +
           kv.v_offset(block, w.kv_head, w.slot - block * kv.block_size, 0);
  }

  const DecodeParams& p_;
  const Memory<C, D>& memory_;
  const int unit_, lane_ = threadIdx.x % 32;
};

// -- The warp that counts -------------------------------------------------------------------------

// Of a counter, beside the chunks that are done: CTAs that have joined the merge, of which those
// that have left the counter alone, and whether the last CTA to count merges alone.
constexpr DecodeCounter kJoined = 1ull << 32, kLeft = 1ull << 48, kAlone = 1ull << 63;
__device__ __forceinline__ int joined(DecodeCounter all) {
  return static_cast<int>(all >> 32 & 0xffff);
}
__device__ __forceinline__ int left(DecodeCounter all) {
  return static_cast<int>(all >> 48 & 0x7fff);
}

// Counts a part, and finds out which share of the merge is this CTA's. One whose part is its last
// piece of work joins with it, and waits for the others' chunks: from then on who has joined stays
// the same, and each has a share. Where none has joined, the last CTA to count has all.
//
// Nobody waits for long: who waits has counted all its parts, so others wait for nothing that it
// has still to do, and all CTAs of the grid fit onto the card at once. If they do not, for a
// neighbour has its room or its shared memory, those that wait may be what the others wait for: so
// who has waited for milliseconds says (before the last chunk is counted, or not at all) that the
// last CTA to count merges alone, and all others go.
//
// The counter becomes zero, as it was found, when nobody will look at it who must find more than
// that there is nothing to do.
template <int D>
__device__ __forceinline__ void count_part(const DecodeParams& p, const Work& w, Share& share,
                                           uint32_t counted) {
  constexpr int kPatience = 4096;  // looks, of 0.6 us or more
  constexpr int kOfLine = 8;       // pieces: 128 bytes
  DecodeCounter* const counter = counter_of(p, w);
  DecodeCounter all = count_chunks(counter, w, w.joins != 0 ? kJoined : 0);
  const bool was_last = chunks_done(all) == w.num_chunks;
  const int index = joined(all) - 1;
  const int lines = w.rows_of_tile(p.group) * (D / 4 / kOfLine);
  static_cast<Work&>(share) = w;
  for (int looks = 0; w.joins != 0 && (all & kAlone) == 0 && chunks_done(all) != 0 &&
                      chunks_done(all) != w.num_chunks;
       ++looks) {
    if (looks < kPatience) {
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(all) : "l"(counter) : "memory");
    } else {  // what was there before; next time round, with this if it came in between
      asm volatile("atom.cas.acq_rel.gpu.global.b64 %0, [%1], %2, %3;"
                   : "=l"(all)
                   : "l"(counter), "l"(all), "l"(all | kAlone)
                   : "memory");
    }
  }
  const bool is_shared = joined(all) > 0 && (all & kAlone) == 0;
  const bool merges = is_shared ? w.joins != 0 : was_last;
  // Shares are as many as the largest power of two among those who have joined, for divisions are
  // slow; the others have none.
  const int log_shares = is_shared ? 31 - __clz(joined(all)) : 0, i = is_shared ? index : 0;
  share.begin = kOfLine * min(lines, lines * i >> log_shares);
  share.end = merges ? kOfLine * min(lines, lines * (i + 1) >> log_shares) : share.begin;
  arrive(counted);
  if (!merges) return;
  if (!is_shared || left(atomicAdd(counter, kLeft)) + 1 == joined(all)) *counter = 0;
}

// With kRope it rotates, too: a unit ahead of those that compute, all but the CTA's first. A part
// is counted when what comes next is rotated.
template <typename T, typename C, int D, bool kRope>
__device__ void count_parts(const DecodeParams& p, const Memory<C, D>& memory) {
  const int lane = threadIdx.x % 32;
  uint32_t phase = 0;
  bool is_first = true;
  Work before{};
  for (Place unit;; unit.advance(kDecodeUnits)) {
    wait(memory.unit_full(unit.stage), unit.phase);
    const Work w = memory.work(unit.stage);
    if (kRope && !is_first && w.item >= 0)
      Rotator<T, C, D>(p, memory, unit.stage).run(w, true, 0, 1);
    __syncwarp();
    if (lane == 0) {
      if (kRope) arrive(memory.unit_rotated(unit.stage));
      arrive(memory.unit_empty(unit.stage));
      if (!is_first && before.is_part()) {
        wait(memory.part_written(), phase);
        count_part<D>(p, before, memory.share(), memory.part_counted());
      }
    }
    __syncwarp();
    if (!is_first && before.is_part()) phase ^= 1;
    if (w.item < 0 || w.is_last != 0) return;
    before = w;
    is_first = false;
  }
}

// -- The warps that compute -----------------------------------------------------------------------

// (m, l) of a row's next chunks, a few neighbours a lane, so that one round of loads is enough for
// most rows.
struct Tops {
  static constexpr int kOfLane = 2, kChunks = 32 * kOfLane;
  float2 ml[kOfLane];

  __device__ __forceinline__ void load(const float* from, int stride, int count, int lane) {
    from += int64_t{kOfLane * lane} * stride;
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      ml[k] = {-INFINITY, 0};
      if (kOfLane * lane + k < count) ml[k] = __ldcg(reinterpret_cast<const float2*>(from));
      from += stride;
    }
  }
  // What the chunks before are worth under the maximum that a chunk may move, what it is, and its l
  // under that; behind the last one, what changes nothing. The maximum is `top` before and returned
  // after.
  __device__ __forceinline__ float make_factors(float top, int count, int padded, float4* to,
                                                float c, int lane) const {
    float all = ml[0].x;
#pragma unroll
    for (int k = 1; k < kOfLane; ++k) all = fmaxf(all, ml[k].x);
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
      const float theirs = __shfl_up_sync(kAll, all, apart);
      if (lane >= apart) all = fmaxf(all, theirs);
    }
    const float others = __shfl_up_sync(kAll, all, 1);
    float before = lane == 0 ? top : fmaxf(top, others);
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      const int chunk = kOfLane * lane + k;
      const float now = fmaxf(before, ml[k].x), safe = safe_max(now);
      const float factor = chunk < count ? rescale(ml[k].x, safe, c) : -0.0f;  // x + -0 is x
      if (chunk < padded)
        to[chunk] = {rescale(before, safe, c), factor, __fmul_rn(ml[k].y, factor), 0};
      before = now;
    }
    return fmaxf(top, __shfl_sync(kAll, all, 31));
  }
};

template <typename T, typename C, int D, bool kRope>
class Computer {
 public:
  __device__ Computer(const DecodeParams& p, const Memory<C, D>& memory) : p_(p), memory_(memory) {}

  __device__ void run() {
    bool has_part = false, has_q = !kRope || !p_.attn.settled, is_first = true;
    for (Place unit;; unit.advance(kDecodeUnits)) {
      wait(memory_.unit_full(unit.stage), unit.phase);
      const Work& w = memory_.work(unit.stage);  // read where it is needed: registers are few
      const bool is_done = w.item < 0;
      if (!is_done) {
        unit_ = unit.stage;
        if (!has_q) wait_for_previous();
        if constexpr (kRope) {
          if (is_first) {
            Rotator<T, C, D>(p_, memory_, unit_).run(w, has_q, warp_, kDecodeWarps);
            sync();
          } else {
            wait(memory_.unit_rotated(unit.stage), unit.phase);
          }
        } else if constexpr (!std::is_same_v<T, Type>) {
          convert_q(w);
        }
        has_q = true;
        is_first = false;
        attend(w);
      }
      const bool is_end = is_done || w.is_last != 0;
      if (has_part) finish_part(is_end);
      if (is_end) break;
      has_part = w.is_part();
      __syncwarp();
      if (lane_ == 0) {
        if (has_part) arrive(memory_.part_written());
        arrive(memory_.unit_empty(unit.stage));
      }
      __syncwarp();
    }
  }

 private:
  using Layout = typename Memory<C, D>::Layout;
  using Type = Operand<T, C>;
  static constexpr int kStages = Memory<C, D>::kStages;

  static __device__ __forceinline__ void sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(kComputeThreads) : "memory");
  }

  // The part that was written before is counted by now; what this CTA has of the merge is done.
  // is_end: no more tiles come, so that the ring is free.
  __device__ __forceinline__ void finish_part(bool is_end) {
    wait(memory_.part_counted(), counted_phase_);
    counted_phase_ ^= 1;
    const Share& w = memory_.share();
    if (is_end && w.num_chunks > kManyChunks) {
#pragma unroll 1
      for (int from = w.begin; from < w.end; from += kComputeThreads) merge_many(w, from);
    } else {
      merge_partials<T, D, 8>(p_, w, w.begin, w.end);
    }
  }

  // All chunks, ascending, of the share's pieces from `from` on, one a thread: as merge_partials(),
  // with the bits of it. Sums come where the ring was, as many chunks at a time as have room there.
  // Meanwhile a warp a row makes the factors (Tops), which go where P was; so a chunk takes the
  // thread of a piece nine operations. In powers of two, for divisions are slow.
  __device__ __forceinline__ void merge_many(const Share& w, int from) {
    using M = Memory<C, D>;
    constexpr int kUnroll = 8, kVectors = D / 4;
    const int chunks = w.num_chunks;  // or it is read again and again
    const int pieces = min(w.end - from, kComputeThreads), row = from / kVectors;
    const int rows = (from + pieces - 1) / kVectors - row + 1;
    const int log_width = 32 - __clz(pieces - 1), log_rows = 32 - __clz(rows - 1);
    const int room = min(M::kMergedChunks << (kLogThreads - log_width), M::kFactors >> log_rows);
    const int lane = opaque_lane(), i = 32 * warp_ + lane;
    const int step = kComputeThreads >> log_width;
    const int of_step = i >> log_width, copied = i - (of_step << log_width);
    const int stride = p_.partial_rows * (D + 2);  // from chunk to chunk; in a chunk:
    const int tile_row = static_cast<int>(partial_row(p_, w, w.row_tile * kMmaRows));
    const int ml_at = 2 * (tile_row + row);
    const int sums_at = 2 * p_.partial_rows + tile_row * D + 4 * (from + copied);
    float l = 0, a[4] = {};
#pragma unroll 1
    for (int base = 0; base < chunks; base += room) {
      const int count = min(room, chunks - base);
      const int padded = (count + kUnroll - 1) / kUnroll * kUnroll;  // with zeros
      sync();  // all are done with what lies there
      const float* const begin = p_.partial(w.first_item + w.first_chunk + base);
      // A warp's row, and the first of the chunks that its lanes have. What the factors are made of
      // comes before the sums, but only the first of it.
#pragma unroll 1
      for (int r = warp_, first = 0, is_copied = 0;;) {
        Tops tops;
        if (r < rows)
          tops.load(begin + int64_t{first} * stride + ml_at + 2 * r, stride, count - first, lane);
        if (is_copied == 0) {
          const float* sums = begin + int64_t{of_step} * stride + sums_at;
          uint32_t to = memory_.tile(0) + 16 * i;
#pragma unroll 4
          for (int j = of_step; j < padded; j += step) {
            if (copied < pieces) cp_async16(to, sums, j < count);
            sums += int64_t{step} * stride;
            to += 16 * kComputeThreads;
          }
          cp_async_commit();
          is_copied = 1;
        }
        if (r >= rows) break;
        float& top = reinterpret_cast<float*>(memory_.tops())[r];
        const float before = base + first == 0 ? -INFINITY : top;
        const float moved = tops.make_factors(
            before, count - first, padded - first,
            memory_.factors() + (r << (M::kLogFactors - log_rows)) + first, p_.scale.c, lane);
        __syncwarp();  // all have read it
        if (lane == 0) top = moved;
        __syncwarp();
        first += Tops::kChunks;
        if (first >= padded) {
          first = 0;
          r += kDecodeWarps;
        }
      }
      cp_async_wait<0>();
      sync();
      if (i >= pieces) continue;
      const float4* f =
          memory_.factors() + (((from + i) / kVectors - row) << (M::kLogFactors - log_rows));
      const float4* s = reinterpret_cast<const float4*>(memory_.base) + i;
#pragma unroll 1
      for (int j = 0; j < padded; j += kUnroll)
#pragma unroll
        for (int k = 0; k < kUnroll; ++k, ++f, s += 1 << log_width) {
          const float o[4] = {s->x, s->y, s->z, s->w};
          l = __fmaf_rn(l, f->x, f->z);
#pragma unroll
          for (int e = 0; e < 4; ++e) a[e] = merge_sum(a[e], o[e], {f->x, f->y});
        }
    }
    if (i >= pieces) return;
    const int merged = (from + i) / kVectors, vector = from + i - merged * kVectors;
    write_merged(p_, out_row<T>(p_, w, w.row_tile * kMmaRows + merged) + 4 * vector, l, a);
  }

  // The unit's q, as it came, becomes what it is multiplied as.
  __device__ __forceinline__ void convert_q(const Work& w) const {
    const int rows = w.rows_of_tile(p_.group);
    for (int row = warp_; row < rows; row += kDecodeWarps)
      for (int i = lane_; i < D / 2; i += 32) {
        uint32_t& two = memory_.template row<uint32_t>(unit_, row)[i];
        two = f16_of_bf16(two);
      }
    sync();
  }

  // A segment of 16 bytes of the new token's k or v, into row `to` of the tile.
  __device__ __forceinline__ void insert(uint32_t tile, int to, bool is_v, int segment) const {
    const uint32_t from = memory_.q(unit_) + (p_.group + (is_v ? 1 : 0)) * Memory<C, D>::kQRow;
    uint32_t v[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from + 16 * segment)
                 : "memory");
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(tile + Layout::at(to, segment)),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  }

  // Fragments of the 16 rows and 16 dimensions k; those of rows that do not exist are what lay
  // there.
  __device__ __forceinline__ void load_q(uint32_t (&q)[4], uint32_t at, int k) const {
    constexpr int kRow = Memory<C, D>::kQRow;
    if constexpr (kIsFp8<C>) {  // in the order in which load_k's lanes hold the dimensions
#pragma unroll
      for (int r = 0; r < 2; ++r)
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(q[r]), "=r"(q[2 + r])
                     : "r"(at + (lane_ / 4 + 8 * r) * kRow + k * 32 + lane_ % 4 * 8)
                     : "memory");
    } else {
      ldmatrix_x4(q, at + lane_ % 16 * kRow + (2 * k + lane_ / 16) * 16);
    }
  }

  __device__ __forceinline__ void attend(const Work& w) {
    rows_ = w.rows_of_tile(p_.group);
    context_ = w.context;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      position_[r] = w.context - w.query_len +
                     (kRope ? 0 : (w.row_tile * kMmaRows + lane_ / 4 + 8 * r) / p_.group);
    Sums<D> total;
    int item = w.item;
#pragma unroll 1
    for (int begin = w.tile_begin; begin < w.tile_end; ++item) {
      const int end = min(w.tile_end, (begin / kChunkTiles + 1) * kChunkTiles);
      Sums<D> chunk;
      chunk.clear();
      add_chunk(begin, end, chunk);
      if (w.is_part()) {
        write_partial<C, D>(p_, w, item, chunk);
      } else {
        if (begin == w.tile_begin) {
          total.take(chunk);
        } else {
          total.merge(chunk, p_.scale.c);
        }
      }
      begin = end;
    }
    if (!w.is_part()) write_out<T, C, D, kRope>(p_, w, total);
  }

  // Tiles [begin, end) of a chunk.
  __device__ __forceinline__ void add_chunk(int begin, int end, Sums<D>& chunk) {
    const int mine = begin / kChunkTiles * kChunkTiles + warp_;
    Scores s;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile, place_.advance(kStages)) {
      if (tile != mine) continue;
      wait(memory_.full(place_.stage), place_.phase);
      if (const int valid = context_ - tile * kTile;
          kRope && valid > 0 && valid <= kTile) {  // the last tile
        constexpr int kSegments = D * static_cast<int>(sizeof(C)) / 16;
        static_assert(kSegments <= 32);
        if (lane_ < kSegments) insert(memory_.tile(place_.stage), valid - 1, false, lane_);
        __syncwarp();
      }
      multiply_keys(s, memory_.tile(place_.stage));
      release(kDecodeWarps);
    }
    const bool has_tile = begin <= mine && mine < end;
    if (has_tile) cap_and_mask(s, mine);
    share_maxima(s, has_tile);
    sync();  // maxima are there; all are done with the P before
    float4 tops[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!has_row(r)) continue;
      tops[r] = memory_.tops()[lane_ / 4 + 8 * r];
      if (has_tile) softmax(s, r, tops[r]);
    }
    sync();
    // Not all four beside each other: what runs once a launch takes longer to fetch than to run.
#pragma unroll(kIsFp8<C> ? 2 : 1)
    for (int i = 0; i < kChunkTiles; ++i) {
      const int tile = begin / kChunkTiles * kChunkTiles + i;
      if (tile < begin || tile >= end) continue;
      float alpha[2];  // what sums are worth under this tile's maximum
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float moved = fmaxf(chunk.m[r], top_of(tops[r], i));
        alpha[r] = rescale(chunk.m[r], safe_max(moved), p_.scale.c);
        chunk.m[r] = moved;
      }
      chunk.scale(alpha);  // of nothing: it stays
      const uint32_t v = memory_.tile(place_.stage);
      wait(memory_.full(place_.stage), place_.phase);
      if (const int valid = context_ - tile * kTile; valid <= kTile) finish_values(v, valid);
      const uint32_t p = memory_.p(i);
      chunk.template add_values<Type, C, Layout>(
          [&](int k) { return p + segment_offset<128>(lane_ % 16, 2 * k + lane_ / 16); }, v, warp_,
          lane_);
      release(1);
      place_.advance(kStages);
    }
  }

  // This warp is done with the tile; `times`: for so many warps.
  __device__ __forceinline__ void release(int times) const {
    fence_async_proxy();  // the next copy writes after all that was read (q, too) or cleared here
    __syncwarp();
    if (lane_ == 0) arrive(memory_.empty(place_.stage), times);
  }

  // Rows g + 8 are mostly none: a decode has as many as the group.
  __device__ __forceinline__ bool has_row(int r) const { return r == 0 || rows_ > 8; }

  __device__ __forceinline__ void multiply_keys(Scores& s, uint32_t k_tile) const {
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0;
#pragma unroll 2
    for (int k2 = 0; k2 < D / 32; ++k2) {
      uint32_t q[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) load_q(q[k], memory_.q(unit_), 2 * k2 + k);
#pragma unroll
      for (int n2 = 0; n2 < kTile / 16; ++n2) {
        Fragments b;
        load_k<C, Layout>(b, k_tile, 16 * n2, k2, lane_);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma<Type>(s[2 * n2 + i % 2], q[i / 2], b[i / 2][i % 2][0], b[i / 2][i % 2][1]);
      }
    }
  }

  __device__ __forceinline__ void cap_and_mask(Scores& s, int tile) const {
    if (p_.scale.cap > 0) cap_scores(s, p_.scale);
    const int window = p_.attn.args.window, begin = tile * kTile;
    const bool sees_all =
        begin + kTile - 1 <= position_[0] && begin >= first_visible(position_[1], window);
    if (__all_sync(kAll, sees_all)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (has_row(r)) mask_row(s, r, begin, position_[r], window);
  }

  __device__ __forceinline__ void share_maxima(const Scores& s, bool has_tile) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!has_row(r)) continue;
      float top = -INFINITY;
      if (has_tile) {
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAll, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAll, top, 2));
      }
      if (lane_ % 4 == 0) reinterpret_cast<float*>(memory_.tops() + lane_ / 4 + 8 * r)[warp_] = top;
    }
  }

  static __device__ __forceinline__ float top_of(const float4& tops, int tile) {
    return tile == 0 ? tops.x : tile == 1 ? tops.y : tile == 2 ? tops.z : tops.w;
  }

  // This warp's part of P, rows g + 8 r, goes to shared memory. The maximum is that of a walk
  // through the tiles up to this one.
  __device__ __forceinline__ void softmax(const Scores& s, int r, const float4& tops) const {
    float m = tops.x;
#pragma unroll
    for (int i = 1; i < kChunkTiles; ++i)
      if (i <= warp_) m = fmaxf(m, top_of(tops, i));
    const float minus_mc = -__fmul_rn(safe_max(m), p_.scale.c);
    const uint32_t p = memory_.p(warp_);
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(p + segment_offset<128>(lane_ / 4 + 8 * r, n) +
                                                   lane_ % 4 * 4),
                   "r"(pack2<Type>(probability(s[n][2 * r], p_.scale.c, minus_mc),
                                   probability(s[n][2 * r + 1], p_.scale.c, minus_mc)))
                   : "memory");
  }

  // The last tile, this warp's columns: slots beyond the context may hold NaN, and 0 * NaN would
  // spread, so they become zero; with kRope the new token's v comes in.
  __device__ __forceinline__ void finish_values(uint32_t v, int valid) const {
    constexpr int kOfUnit = static_cast<int>(sizeof(C));  // segments of 16 columns
    constexpr int kSegments = kOfUnit * Sums<D>::kUnits;
    static_assert(32 % kSegments == 0);
    const int lane = opaque_lane(), i = lane % kSegments;
    const int unit = warp_ + i / kOfUnit * kDecodeWarps, segment = kOfUnit * unit + i % kOfUnit;
    if (Sums<D>::has_unit(unit)) {
#pragma unroll 1
      for (int row = valid + lane / kSegments; row < kTile; row += 32 / kSegments)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v + Layout::at(row, segment)),
                     "r"(0)
                     : "memory");
      if (kRope && valid > 0 && lane < kSegments) insert(v, valid - 1, true, segment);
    }
    __syncwarp();
  }

  const DecodeParams& p_;
  const Memory<C, D>& memory_;
  const int lane_ = threadIdx.x % 32, warp_ = uniform(threadIdx.x / 32);
  Place place_;
  uint32_t counted_phase_ = 0;
  int position_[2], rows_ = 0, context_ = 0;
  int unit_ = 0;
};

#endif

template <typename T, typename C, int D, bool kRope>
__global__ void __launch_bounds__(kDecodeSm90Threads, (kPlan<C, D>.ctas_per_sm))
    decode_sm90_kernel(const __grid_constant__ DecodeParams p,
                       const __grid_constant__ CUtensorMap k_map,
                       const __grid_constant__ CUtensorMap v_map) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char smem[];
  if (!p.attn.settled) {
    wait_for_previous();
    let_next_start();
  }
  // Who has nothing to do makes room at once. Leaving counts as let_next_start(), so one block
  // waits for the kernel before in any case.
  if (blockIdx.x > 0 && static_cast<int>(blockIdx.x) >= num_ctas(p)) return;
  const Memory<C, D> memory(smem);
  if (threadIdx.x == 0) {
    memory.init_barriers();
    fence_async_proxy();
  }
  __syncthreads();
  const int warp = uniform(threadIdx.x / 32);
  if (warp < kDecodeWarps) {
    Computer<T, C, D, kRope>(p, memory).run();
  } else if (warp == kDecodeWarps) {
    Copier<C, D, kRope>(p, memory, &k_map, &v_map).run();
  } else {
    count_parts<T, C, D, kRope>(p, memory);
  }
#endif
}

// A [blocks][kv heads][slots][d] cache, copied in boxes of 16 slots of one head, a row as parts of
// up to 128 bytes (the third dimension, whose stride is less than the second's: that is allowed).
template <typename C, int D>
CUtensorMap cache_map(const void* data, const KvView& kv) {
  constexpr int kBytes = static_cast<int>(sizeof(C));
  using Layout = BoxLayout<D * kBytes>;
  const int64_t block = kv.block_stride > 0 ? kv.block_stride : kv.block_elements();
  return make_tensor_map(
      "attention_decode", kv.dtype, data,
      {Layout::kPart / kBytes, kv.block_size, Layout::kParts, kv.num_kv_heads, kv.num_blocks},
      {Layout::kRowBytes, Layout::kPart, kBytes * kv.head_elements(), kBytes * block},
      {Layout::kPart / kBytes, 16, Layout::kParts, 1, 1});
}

}  // namespace

bool decode_sm90(const DecodeParams& p, const Card& card, cudaStream_t stream) {
  if (card.arch != 90) return false;
  const KvView& kv = p.attn.kv;
  dispatch_attention(p.attn, "attention_decode", [&](auto type, auto cache, auto head_dim) {
    using C = decltype(cache);
    constexpr int kDim = head_dim();
    constexpr DecodePlan kThisPlan = kPlan<C, kDim>;
    const auto kernel = p.attn.with_rope ? decode_sm90_kernel<decltype(type), C, kDim, true>
                                         : decode_sm90_kernel<decltype(type), C, kDim, false>;
    allow_smem(kernel, static_cast<size_t>(kThisPlan.smem), "attention_decode");
    launch(kernel, static_cast<unsigned>(card.num_sms * kThisPlan.ctas_per_sm), kDecodeSm90Threads,
           static_cast<size_t>(kThisPlan.smem), stream, "attention_decode", p,
           cache_map<C, kDim>(kv.k, kv), cache_map<C, kDim>(kv.v, kv));
  });
  return true;
}

}  // namespace ni::cuda
