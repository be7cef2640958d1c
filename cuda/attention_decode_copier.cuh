// The warp of Hopper's decode attention (attention_decode_sm90.cu) that copies.
#pragma once

#include "cuda/attention_decode_sm90.cuh"
#include "cuda/tensor_map.h"

namespace ni::cuda::decode {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // elsewhere the kernel is empty

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

#endif

}  // namespace ni::cuda::decode
