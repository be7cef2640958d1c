// Attention of many query rows over the paged cache on mma.sync, in the arithmetic of attention.cuh
// (after FlashAttention-2: Dao, 2023); on Hopper for what the wgmma kernel does not take.
//   out[t, h] = softmax(q[t, h] K^T scale) V    over the tokens that row t sees
// Layouts: q, out [T, heads * d]; K, V [block][kv head][slot][d]. An item is 128 query rows of a
// sequence; a CTA has `rows` of them (128; 64 where shared memory is scarce) of one head, 16 a
// warp, and walks tiles of 64 tokens, double-buffered by cp.async, up to the diagonal. Scores, P
// and the sums of a chunk and in total stay in registers; head_dim 256 is shared by two CTAs, each
// with half of the output's columns. Does 4 rows * context * d flops a head (half of that under the
// diagonal); bound by the tensor core and by the exponentials between its products.
#include <cstdlib>
#include <string_view>

#include "cuda/attention.cuh"

namespace ni::cuda {
namespace {

constexpr int kMaxThreads = kPrefillRows * 2;

struct PrefillParams {
  AttnParams attn;
  ScoreScale scale;
  int group;  // heads of a kv head
  int rows;   // of a CTA
  int stages;
};

// A CTA's part: rows [row, row + num_rows) of q and out, at positions from `position` on.
struct Work {
  int seq, head, out_part;
  int row, num_rows, position, context;
  int tile_begin, tile_end;
};

// False: the item has no rows here.
__device__ __forceinline__ bool find_work(const PrefillParams& p, int out_parts, Work& w) {
  const StepInputs& in = *p.attn.step;
  int unit = static_cast<int>(blockIdx.x);
  w.head = unit % p.attn.args.num_heads;
  unit /= p.attn.args.num_heads;
  w.out_part = unit % out_parts;
  unit /= out_parts;
  const int parts = kPrefillRows / p.rows;
  const AttnItem item = in.prefill_items[unit / parts];
  w.seq = item.seq;
  const int begin = in.cu_seqlens_q[w.seq];
  const int query_len = in.cu_seqlens_q[w.seq + 1] - begin;
  const int first = item.index * kPrefillRows + unit % parts * p.rows;
  w.row = begin + first;
  w.num_rows = min(p.rows, query_len - first);
  w.context = in.context_lens[w.seq];
  w.position = w.context - query_len + first;
  w.tile_begin = first_visible(w.position, p.attn.args.window) / kTile;
  w.tile_end = (w.position + w.num_rows - 1) / kTile + 1;
  return w.num_rows > 0;
}

// q to shared memory, rows beyond the last one as zeros.
template <typename T, typename C, int D>
__device__ __forceinline__ void load_q(const PrefillParams& p, const Work& w, unsigned char* tile) {
  for (int i = threadIdx.x; i < p.rows * (D / 16); i += blockDim.x) {
    const int r = i / (D / 16), unit = i % (D / 16);
    uint4 v[2] = {};
    if (r < w.num_rows) {
      const uint16_t* from = static_cast<const uint16_t*>(p.attn.q) +
                             (w.row + r) * p.attn.q_stride + static_cast<int64_t>(w.head) * D +
                             16 * unit;
      v[0] = *reinterpret_cast<const uint4*>(from);
      v[1] = *reinterpret_cast<const uint4*>(from + 8);
    }
    as_operands<T, C>(v);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<uint4*>(tile + segment_offset<2 * D>(r, 2 * unit + h)) = v[h];
  }
}

// Copies tiles of K and of this CTA's columns of V, one after the other; each warp takes pieces of
// 8 tokens. The table entries of the next tile are fetched a tile ahead.
template <typename C, int D, int kOut>
class Loader {
 public:
  static constexpr int kKBytes = D * sizeof(C), kVBytes = kOut * sizeof(C);  // of a row

  __device__ Loader(const PrefillParams& p, const Work& w, uint32_t ring)
      : p_(p),
        table_(p.attn.step->block_tables +
               static_cast<int64_t>(w.seq) * p.attn.step->block_table_stride),
        ring_(ring),
        tile_(w.tile_begin),
        tile_end_(w.tile_end),
        context_(w.context),
        kv_head_(w.head / p.group),
        out_column_(w.out_part * kOut) {
    look_up();
  }
  __device__ uint32_t k_tile(int stage) const {
    return ring_ + stage * (kTile * (kKBytes + kVBytes));
  }
  __device__ uint32_t v_tile(int stage) const { return k_tile(stage) + kTile * kKBytes; }

  // Starts to copy the next tile, if there is one.
  __device__ __forceinline__ void issue(int stage) {
    if (tile_ < tile_end_) {
#pragma unroll
      for (int i = 0; i < kMaxPieces; ++i) {
        if (piece(i) >= kPieces) break;
        const int token = first_token(i), valid = context_ - token;
        const int64_t from = valid <= 0 ? 0
                                        : p_.attn.kv.v_offset(blocks_[i], kv_head_,
                                                              token % p_.attn.kv.block_size, 0);
        copy_rows<8, kKBytes, kKBytes>(k_tile(stage), 8 * piece(i),
                                       static_cast<const C*>(p_.attn.kv.k) + from, valid);
        copy_rows<8, kVBytes, kKBytes>(v_tile(stage), 8 * piece(i),
                                       static_cast<const C*>(p_.attn.kv.v) + from + out_column_,
                                       valid);
      }
      ++tile_;
      look_up();
    }
    cp_async_commit();
  }

 private:
  static constexpr int kPieces = kTile / 8, kMaxPieces = 2;  // of at least 4 warps

  __device__ __forceinline__ int piece(int i) const {
    return static_cast<int>(threadIdx.x / 32 + i * (blockDim.x / 32));
  }
  __device__ __forceinline__ int first_token(int i) const { return tile_ * kTile + 8 * piece(i); }

  __device__ __forceinline__ void look_up() {
    if (tile_ >= tile_end_) return;
#pragma unroll
    for (int i = 0; i < kMaxPieces; ++i)  // table entries beyond the context are garbage
      if (piece(i) < kPieces && first_token(i) < context_)
        blocks_[i] = table_[first_token(i) / p_.attn.kv.block_size];
  }

  const PrefillParams& p_;
  const int32_t* table_;
  uint32_t ring_;
  int tile_, tile_end_, context_, kv_head_, out_column_;
  int blocks_[kMaxPieces] = {};
};

// Of a warp's 16 rows: rows g and g + 8 in a lane.
template <int kOut>
struct Sums {
  float m[2];
  float l[4];  // an accumulator all of whose columns are equal
  Unit o[kOut / 16];

  __device__ __forceinline__ void clear() {
    m[0] = m[1] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = 0;
#pragma unroll
    for (int u = 0; u < kOut / 16; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i) o[u][i / 4][i % 4] = 0;
  }
  __device__ __forceinline__ void scale(const float (&alpha)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = __fmul_rn(l[i], alpha[i / 2]);
#pragma unroll
    for (int u = 0; u < kOut / 16; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        o[u][i / 4][i % 4] = __fmul_rn(o[u][i / 4][i % 4], alpha[i % 4 / 2]);
  }
  __device__ __forceinline__ void merge(const Sums& chunk, float c) {
    const MergeFactors f[2] = {merge_max(m[0], chunk.m[0], c), merge_max(m[1], chunk.m[1], c)};
#pragma unroll
    for (int i = 0; i < 4; ++i) l[i] = merge_sum(l[i], chunk.l[i], f[i / 2]);
#pragma unroll
    for (int u = 0; u < kOut / 16; ++u)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        o[u][i / 4][i % 4] = merge_sum(o[u][i / 4][i % 4], chunk.o[u][i / 4][i % 4], f[i % 4 / 2]);
  }
};

template <typename T, typename C, int D>
class Prefill {
 public:
  static constexpr int kOut = prefill_out_cols(D), kOutParts = D / kOut;
  using Tiles = Loader<C, D, kOut>;
  using Type = Operand<T, C>;

  __device__ Prefill(const PrefillParams& p, const Work& w, unsigned char* smem)
      : p_(p),
        q_(static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + warp_ * 16 * 2 * D),
        position_(w.position + 16 * warp_),
        tiles_(p, w, static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + p.rows * 2 * D) {}

  __device__ __forceinline__ void run(const Work& w, unsigned char* smem) {
    tiles_.issue(0);
    load_q<T, C, D>(p_, w, smem);
    total_.clear();
    Sums<kOut> chunk;
    chunk.clear();
    const int window = p_.attn.args.window;
    const int begin = first_visible(position_, window) / kTile;  // what this warp's rows see
    const int end = min(w.tile_end, (position_ + 15) / kTile + 1);
    for (int tile = w.tile_begin, stage = 0; tile < w.tile_end; ++tile) {
      cp_async_wait<0>();
      __syncthreads();  // this tile is there; all are done with the one before
      if (p_.stages > 1) tiles_.issue(stage ^ 1);
      if (tile >= begin && tile < end) {
        step(tile, stage, chunk);
        if ((tile + 1) % (kKvChunk / kTile) == 0 || tile + 1 == end) {
          total_.merge(chunk, p_.scale.c);  // into nothing: as it is
          chunk.clear();
        }
      }
      if (p_.stages > 1) {
        stage ^= 1;
      } else {
        __syncthreads();
        tiles_.issue(0);
      }
    }
    write_out(w);
  }

 private:
  __device__ __forceinline__ void step(int tile, int stage, Sums<kOut>& chunk) {
    Scores s;
    multiply_qk(s, tiles_.k_tile(stage));
    if (p_.scale.cap > 0) cap_scores(s, p_.scale);
    const int window = p_.attn.args.window;
    if (tile * kTile + kTile - 1 > position_ ||
        tile * kTile < first_visible(position_ + 15, window)) {
      const int g = threadIdx.x % 32 / 4;
      mask_scores(s, tile * kTile, {position_ + g, position_ + g + 8}, window);
    }
    float alpha[2];
    uint32_t probabilities[kTile / 16][4];
    softmax_tile<Type>(s, chunk.m, alpha, probabilities, p_.scale.c);
    chunk.scale(alpha);
    add_values(probabilities, tiles_.v_tile(stage), chunk);
  }

  __device__ __forceinline__ void multiply_qk(Scores& s, uint32_t k_tile) {
    const int lane = opaque_lane();
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0;
#pragma unroll
    for (int k2 = 0; k2 < D / 32; ++k2) {
      uint32_t q[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        ldmatrix_x4(q[k], q_ + segment_offset<2 * D>(lane % 16, 4 * k2 + 2 * k + lane / 16));
#pragma unroll
      for (int n2 = 0; n2 < kTile / 16; ++n2) {
        Fragments b;
        load_k<C, RowLayout<Tiles::kKBytes>>(b, k_tile, 16 * n2, k2, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma<Type>(s[2 * n2 + i % 2], q[i / 2], b[i / 2][i % 2][0], b[i / 2][i % 2][1]);
      }
    }
  }

  __device__ __forceinline__ void add_values(const uint32_t (&a)[kTile / 16][4], uint32_t v_tile,
                                             Sums<kOut>& chunk) {
    const int lane = opaque_lane();
#pragma unroll
    for (int k2 = 0; k2 < kTile / 32; ++k2) {
#pragma unroll
      for (int k = 0; k < 2; ++k) mma<Type>(chunk.l, a[2 * k2 + k], kOnes2<Type>, kOnes2<Type>);
#pragma unroll
      for (int u = 0; u < kOut / 16; ++u) {
        Fragments b;
        load_v<C, RowLayout<Tiles::kVBytes>>(b, v_tile, 32 * k2, u, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma<Type>(chunk.o[u][i % 2], a[2 * k2 + i / 2], b[i / 2][i % 2][0], b[i / 2][i % 2][1]);
      }
    }
  }

  __device__ __forceinline__ void write_out(const Work& w) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp_ + static_cast<int>(threadIdx.x % 32 / 4) + 8 * half;
      if (row >= w.num_rows) continue;
      const float scale = final_scale(total_.l[2 * half], p_.attn.kv.v_scale);
      T* out = static_cast<T*>(p_.attn.out) + (w.row + row) * p_.attn.out_stride +
               static_cast<int64_t>(w.head) * D + w.out_part * kOut;
#pragma unroll
      for (int u = 0; u < kOut / 16; ++u) store_unit<T, C>(out + 16 * u, total_.o[u], half, scale);
    }
  }

  const PrefillParams& p_;
  const int warp_ = threadIdx.x / 32;
  uint32_t q_;    // this warp's rows of q in shared memory
  int position_;  // of its first row
  Tiles tiles_;
  Sums<kOut> total_;
};

template <typename T, typename C, int D>
__global__ void __launch_bounds__(kMaxThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  Work w;
  if (!find_work(p, Prefill<T, C, D>::kOutParts, w)) return;
  Prefill<T, C, D>(p, w, smem).run(w, smem);
}

// For tests: NANO_INFERENCE_ATTENTION=mma keeps Hopper's kernel out.
bool only_mma() {
  static const bool only = [] {
    const char* value = std::getenv("NANO_INFERENCE_ATTENTION");
    return value != nullptr && std::string_view(value) == "mma";
  }();
  return only;
}

}  // namespace

void attention_prefill_mma(const AttnParams& p, int32_t num_items, const Card& card,
                           cudaStream_t stream) {
  if (num_items == 0) return;
  check_attention(p, "attention_prefill");
  const PrefillPlan plan =
      plan_prefill(card.max_smem, p.kv.head_dim, static_cast<int>(dtype_size(p.kv.dtype)));
  check_arg(plan.rows > 0, "attention_prefill: ", card.max_smem,
            " bytes of shared memory are too few for head_dim ", p.kv.head_dim);
  const PrefillParams params{p, score_scale(p.args, p.kv.k_scale),
                             p.args.num_heads / p.kv.num_kv_heads, plan.rows, plan.stages};
  const int64_t ctas = static_cast<int64_t>(num_items) * (kPrefillRows / plan.rows) *
                       (p.kv.head_dim / prefill_out_cols(p.kv.head_dim)) * p.args.num_heads;
  dispatch_attention(p, "attention_prefill", [&](auto type, auto cache, auto head_dim) {
    const auto kernel = prefill_kernel<decltype(type), decltype(cache), head_dim()>;
    allow_smem(kernel, static_cast<size_t>(plan.smem), "attention_prefill");
    kernel<<<static_cast<unsigned>(ctas), 2 * plan.rows, plan.smem, stream>>>(params);
    check_launch("attention_prefill");
  });
}

void attention_prefill(const AttnParams& p, int32_t num_items, const Card& card,
                       cudaStream_t stream) {
  if (!only_mma() && attention_prefill_sm90(p, num_items, card, stream)) return;
  attention_prefill_mma(p, num_items, card, stream);
}

}  // namespace ni::cuda
