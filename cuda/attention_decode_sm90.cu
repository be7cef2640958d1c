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
// of the cache waits for the kernel before.
// Moves tokens * kv_heads * 2 d elements of the cache and about 3% of that for partial sums; bound
// by memory bandwidth, by latency where the batch is small.
#include "cuda/attention_decode_copier.cuh"
#include "cuda/attention_decode_counter.cuh"
#include "cuda/tensor_map.h"

namespace ni::cuda {
namespace {

using namespace decode;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

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
