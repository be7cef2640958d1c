// What the kernels for decode_items share: units of work, the sums of one, and how sums become
// results, at once or from the parts that several CTAs leave.
//
// Work is cut into (item, kv head, row tile): an item is a chunk of 256 tokens or a whole sequence,
// the 16 rows of a tile are (query row, head of the group) pairs, so that K and V are read once for
// a group. Where a CTA does not have all chunks of a result, each leaves (m, l, O) in the
// workspace; the CTA that arrives last merges them in ascending order, on Hopper perhaps with
// others. Four warps compute: in P V, each has a part of the dimensions.
#pragma once

#include "cuda/attention.cuh"

namespace ni::cuda {

using DecodeCounter = unsigned long long;

struct DecodeParams {
  AttnParams attn;
  ScoreScale scale;
  int group;          // heads of a kv head
  int max_query_len;  // query rows of a sequence
  int row_tiles;      // of 16 rows, for the longest query
  Divisor tiles;      // row tiles of all kv heads
  Divisor block_size;
  int partial_rows;  // decode_partial_rows()
  int stages;        // of decode_sm80's ring
  // [max_seqs][kMaxAttentionHeads], of which [max_seqs][num_heads] are used: of a (sequence, kv
  // head, row tile), in the lower half chunks that are done, in the upper one what Hopper's kernel
  // has there.
  DecodeCounter* counters;
  // Of an item: (m, l) [partial_rows], then O [partial_rows][d]; row: partial_row().
  float* partials;

  __device__ float* partial(int item) const {
    return partials + static_cast<int64_t>(item) * partial_rows * (attn.kv.head_dim + 2);
  }
};

// The kernels behind attention_decode(). The first returns false where it does not apply.
bool decode_sm90(const DecodeParams& p, const Card& card, cudaStream_t stream);
void decode_sm80(DecodeParams p, const Card& card, cudaStream_t stream);

// -- Work -----------------------------------------------------------------------------------------

// One or more consecutive chunks of a sequence, for a kv head and a row tile.
struct alignas(16) Work {
  int item, kv_head, row_tile;  // item: of the first chunk
  int seq, query_begin, query_len, context;
  int tile_begin, tile_end;     // tiles of 64 tokens; at least one
  int first_chunk, num_chunks;  // that some query row of the sequence sees
  int first_item;               // that of chunk 0
  int is_whole;                 // the item is the whole sequence
  int slot;                     // with_rope: of the last token in the cache; below 0: none
  int is_last;                  // of the CTA's, and whole, so that nothing is left to do
  int joins;                    // the last of the CTA's, a part, whose merge several CTAs share

  __device__ int rows(int group) const { return query_len * group; }
  __device__ int rows_of_tile(int group) const {
    return min(kMmaRows, rows(group) - row_tile * kMmaRows);
  }
  __device__ int chunks() const {
    return (tile_end + kChunkTiles - 1) / kChunkTiles - tile_begin / kChunkTiles;
  }
  // Others work at the same result.
  __device__ bool is_part() const { return chunks() < num_chunks; }
};

// Fills in all of an item's work but item, kv_head and row_tile; `item`: what the list has there.
// False: there is nothing to do, for the chunk lies before the window or the row tile after the
// last row.
__device__ __forceinline__ bool find_work(const DecodeParams& p, const AttnItem& item, Work& w) {
  const StepInputs& in = *p.attn.step;
  w.seq = item.seq;
  w.query_begin = in.cu_seqlens_q[w.seq];
  w.query_len = in.cu_seqlens_q[w.seq + 1] - w.query_begin;
  w.context = in.context_lens[w.seq];
  const int first = first_visible(w.context - w.query_len, p.attn.args.window);
  w.first_chunk = first / kKvChunk;
  w.num_chunks = max(1, (w.context + kKvChunk - 1) / kKvChunk - w.first_chunk);
  w.first_item = w.item - max(item.index, 0);
  w.is_whole = item.index < 0 ? 1 : 0;
  w.tile_begin = first / kTile;
  w.tile_end = max(w.tile_begin + 1, (w.context + kTile - 1) / kTile);
  if (w.is_whole == 0) {
    w.tile_begin = max(w.tile_begin, item.index * kChunkTiles);
    w.tile_end = min(w.tile_end, (item.index + 1) * kChunkTiles);
  }
  return w.row_tile * kMmaRows < w.rows(p.group) && w.tile_begin < w.tile_end;
}

// Units of one item each.
__device__ __forceinline__ int num_units(const DecodeParams& p) {
  return p.attn.step->num_decode_items * p.attn.kv.num_kv_heads * p.row_tiles;
}
__device__ __forceinline__ bool find_unit(const DecodeParams& p, int unit, Work& w) {
  w.row_tile = unit % p.row_tiles;
  unit /= p.row_tiles;
  w.kv_head = unit % p.attn.kv.num_kv_heads;
  w.item = unit / p.attn.kv.num_kv_heads;
  return find_work(p, p.attn.step->decode_items[w.item], w);
}

__device__ __forceinline__ DecodeCounter* counter_of(const DecodeParams& p, const Work& w) {
  return p.counters + static_cast<int64_t>(w.seq) * p.attn.args.num_heads +
         w.kv_head * p.row_tiles + w.row_tile;
}
__device__ __forceinline__ int chunks_done(DecodeCounter all) {
  return static_cast<int>(all);
}
// Counts the chunks of a part that has been written, and what else is in `more`; what is there
// then. Are all chunks done, they can be read. For one thread, barriers to and from which order the
// accesses of the others. Better not for every chunk of many: a release waits for accesses that are
// on their way (docs/kernels.md).
__device__ __forceinline__ DecodeCounter count_chunks(DecodeCounter* counter, const Work& w,
                                                      DecodeCounter more) {
  const DecodeCounter mine = static_cast<DecodeCounter>(w.chunks()) + more;
  DecodeCounter before;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(counter), "l"(mine)
               : "memory");
  return before + mine;
}

// -- Sums -----------------------------------------------------------------------------------------

// What a lane holds of a row tile, as in the fragments of mma.sync: rows g and g + 8. Every warp
// has all rows' m and l and its own columns of O, units warp, warp + 4, … of 16.
template <int D>
struct Sums {
  static constexpr int kUnits = (D / 16 + kDecodeWarps - 1) / kDecodeWarps;
  float m[2];
  float l[4];  // an accumulator all of whose columns are equal
  Unit o[kUnits];

  static __device__ __forceinline__ bool has_unit(int unit) {
    return D / 16 % kDecodeWarps == 0 || unit < D / 16;
  }
  __device__ __forceinline__ void clear() {
    m[0] = m[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i) o[u][i / 4][i % 4] = 0;
  }
  // Multiplies rows g, g + 8.
  __device__ __forceinline__ void scale(const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = __fmul_rn(l[i], alpha[i / 2]);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        o[u][i / 4][i % 4] = __fmul_rn(o[u][i / 4][i % 4], alpha[i % 4 / 2]);
  }
  // Into nothing, with the bits of a merge: -0 becomes 0.
  __device__ __forceinline__ void take(const Sums& chunk) {
    *this = chunk;
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i) o[u][i / 4][i % 4] = __fadd_rn(o[u][i / 4][i % 4], 0.0f);
  }
  __device__ __forceinline__ void merge(const Sums& chunk, float c) {
    const MergeFactors f[2] = {merge_max(m[0], chunk.m[0], c), merge_max(m[1], chunk.m[1], c)};
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = merge_sum(l[i], chunk.l[i], f[i / 2]);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        o[u][i / 4][i % 4] = merge_sum(o[u][i / 4][i % 4], chunk.o[u][i / 4][i % 4], f[i % 4 / 2]);
  }
  // l += P 1 and O += P V for 64 tokens, P of type T; `p`: address of this lane's row and half in P
  // [16][64] as ldmatrix takes it, for 16 tokens k at p(k).
  template <typename T, typename C, typename Layout, typename P>
  __device__ __forceinline__ void add_values(const P& p, uint32_t v, int warp, int lane) {
#pragma unroll
    for (int k2 = 0; k2 < kTile / 32; ++k2) {
      uint32_t a[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        ldmatrix_x4(a[k], p(2 * k2 + k));
        mma<T>(l, a[k], kOnes2<T>, kOnes2<T>);
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int unit = warp + u * kDecodeWarps;
        if (!has_unit(unit)) break;
        Fragments b;
        load_v<C, Layout>(b, v, 32 * k2, unit, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma<T>(o[u][i % 2], a[i / 2], b[i / 2][i % 2][0], b[i / 2][i % 2][1]);
      }
    }
  }
  // Calls f(half, packed row, unit of 16 columns, accumulator) for what this lane has.
  template <typename F>
  __device__ __forceinline__ void for_each_unit(const Work& w, int rows, const F& f) const {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = threadIdx.x % 32 / 4 + 8 * r;
      if (row >= rows) continue;
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        if (has_unit(warp + u * kDecodeWarps))
          f(r, w.row_tile * kMmaRows + row, warp + u * kDecodeWarps, o[u]);
    }
  }
};

// -- Results --------------------------------------------------------------------------------------

// Where the result of a packed row lies. kOneQuery: every sequence has one.
template <typename T, bool kOneQuery = false>
__device__ __forceinline__ T* out_row(const DecodeParams& p, const Work& w, int row) {
  const int query = kOneQuery ? 0 : row / p.group;
  const int head = w.kv_head * p.group + row - query * p.group;
  return static_cast<T*>(p.attn.out) + (w.query_begin + query) * p.attn.out_stride +
         static_cast<int64_t>(head) * p.attn.kv.head_dim;
}

template <typename T, typename C, int D, bool kOneQuery = false>
__device__ __forceinline__ void write_out(const DecodeParams& p, const Work& w,
                                          const Sums<D>& total) {
  const float scale[2] = {final_scale(total.l[0], p.attn.kv.v_scale),
                          final_scale(total.l[2], p.attn.kv.v_scale)};
  total.for_each_unit(
      w, w.rows_of_tile(p.group), [&](int half, int packed, int unit, const Unit& o) {
        store_unit<T, C>(out_row<T, kOneQuery>(p, w, packed) + 16 * unit, o, half, scale[half]);
      });
}

__device__ __forceinline__ int64_t partial_row(const DecodeParams& p, const Work& w, int packed) {
  return static_cast<int64_t>(w.kv_head) * p.max_query_len * p.group + packed;
}

template <typename C, int D>
__device__ __forceinline__ void write_partial(const DecodeParams& p, const Work& w, int item,
                                              const Sums<D>& total) {
  float* partial = p.partial(item);
  float* sums = partial + 2 * p.partial_rows;
  total.for_each_unit(
      w, w.rows_of_tile(p.group), [&](int half, int packed, int unit, const Unit& o) {
        const int64_t row = partial_row(p, w, packed);
        store_unit_f32<C>(sums + row * D + 16 * unit, o, half);
        if (unit == 0 && threadIdx.x % 4 == 0)
          reinterpret_cast<float2*>(partial)[row] = float2{total.m[half], total.l[2 * half]};
      });
}

// Opaque, or the compiler keeps all multiples of the stride in registers.
template <typename Element>
__device__ __forceinline__ const Element* step_pointer(const Element* at, int64_t bytes) {
  asm volatile("add.s64 %0, %0, %1;" : "+l"(at) : "l"(bytes));
  return at;
}

// Opaque, or what is made of it stays in registers from one piece of work to the next.
__device__ __forceinline__ int opaque_thread() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// Four columns of a row, all of whose chunks are in l and a.
template <typename T>
__device__ __forceinline__ void write_merged(const DecodeParams& p, T* to, float l,
                                             const float (&a)[4]) {
  const float scale = final_scale(l, p.attn.kv.v_scale);
  *reinterpret_cast<uint2*>(to) =
      uint2{pack2_out<T>(__fmul_rn(a[0], scale), __fmul_rn(a[1], scale)),
            pack2_out<T>(__fmul_rn(a[2], scale), __fmul_rn(a[3], scale))};
}

// All chunks of pieces [begin, end) of the row tile, ascending; a piece, and a thread's, are 4
// columns of a row, kAhead chunks are asked for at a time. Loads bypass L1, which may hold what lay
// there before.
template <typename T, int D, int kAhead>
__device__ __forceinline__ void merge_partials(const DecodeParams& p, const Work& w, int begin,
                                               int end) {
  constexpr int kVectors = D / 4;
  const int64_t stride = int64_t{p.partial_rows} * (D + 2) * 4;  // bytes from chunk to chunk
  for (int i = begin + opaque_thread(); i < end; i += 32 * kDecodeWarps) {
    const int packed = w.row_tile * kMmaRows + i / kVectors, vector = i % kVectors;
    const float* partial = p.partial(w.first_item + w.first_chunk);
    const float2* ml = reinterpret_cast<const float2*>(partial) + partial_row(p, w, packed);
    const float4* sums = reinterpret_cast<const float4*>(partial + 2 * p.partial_rows) +
                         partial_row(p, w, packed) * kVectors + vector;
    float m = 0, l = 0, a[4];
    for (int base = 0; base < w.num_chunks; base += kAhead) {
      float2 next_ml[kAhead];
      float4 next[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        next_ml[j] = __ldcg(ml);
        next[j] = __ldcg(sums);
        const int64_t step = base + j + 1 < w.num_chunks ? stride : 0;
        ml = step_pointer(ml, step);
        sums = step_pointer(sums, step);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (base + j >= w.num_chunks) continue;
        const float o[4] = {next[j].x, next[j].y, next[j].z, next[j].w};
        const bool is_first = base + j == 0;
        if (is_first) m = next_ml[j].x;
        const MergeFactors f = merge_max(m, next_ml[j].x, p.scale.c);
        l = is_first ? next_ml[j].y : merge_sum(l, next_ml[j].y, f);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          a[e] = is_first ? __fadd_rn(o[e], 0.0f) : merge_sum(a[e], o[e], f);
      }
    }
    write_merged(p, out_row<T>(p, w, packed) + 4 * vector, l, a);
  }
}

}  // namespace ni::cuda
