// attention_decode() before Hopper: persistent CTAs of 4 warps walk the units of work
// (attention_decode.cuh). Tiles of 64 tokens come through a ring of cp.async copies that does not
// stop between units. Scores: a warp has 16 of the 64 tokens; P V: a warp has a part of the
// dimensions. Moves tokens * kv_heads * 2 d elements of the cache, a small part of that for partial
// sums; bound by memory bandwidth, by latency where the batch is small.
#include <climits>

#include "cuda/attention_decode.cuh"

namespace ni::cuda {
namespace {

static_assert(kDecodeThreads == 32 * kDecodeWarps && kTile == 16 * kDecodeWarps);

// Copies the tiles of this CTA's units into the ring, one after the other, V one tile behind K: the
// buffer of V is free later. Each warp copies its 16 tokens; the table entry of the next tile is
// fetched a tile ahead.
template <typename C, int D>
class Loader {
 public:
  static constexpr int kRowBytes = D * sizeof(C);
  using Layout = RowLayout<kRowBytes>;
  static constexpr int kTileBytes = kTile * kRowBytes;

  __device__ Loader(const DecodeParams& p, uint32_t ring)
      : p_(p), ring_(ring), unit_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {
    advance();
  }
  __device__ uint32_t k_tile(int stage) const { return ring_ + stage * 2 * kTileBytes; }
  __device__ uint32_t v_tile(int stage) const { return k_tile(stage) + kTileBytes; }

  // Whether what issue() copies next was in the cache before this step.
  __device__ bool next_is_old() const {
    return p_.attn.settled && (tile_ + 1) * kTile <= old_tokens_;
  }

  // Two groups of copies: V of the tile that the last call gave K of, then K of the next.
  __device__ __forceinline__ void issue() {
    copy(p_.attn.kv.v, v_tile(stage_ == 0 ? p_.stages - 1 : stage_ - 1));
    offset_ = p_.attn.kv.v_offset(block_, kv_head_, slot_, 0);
    valid_ = next_valid_;
    copy(p_.attn.kv.k, k_tile(stage_));
    if (++stage_ == p_.stages) stage_ = 0;
    advance();
  }

 private:
  static constexpr int kNone = INT_MIN;

  // This warp's 16 rows at offset_.
  __device__ __forceinline__ void copy(const void* cache, uint32_t tile) {
    if (valid_ != kNone)
      copy_rows<16, kRowBytes, kRowBytes>(tile, 16 * (threadIdx.x / 32),
                                          static_cast<const C*>(cache) + offset_, valid_);
    cp_async_commit();
  }

  __device__ __forceinline__ void advance() {
    if (++tile_ >= tile_end_ && !next_unit()) {
      next_valid_ = kNone;
      return;
    }
    const int token = tile_ * kTile + 16 * static_cast<int>(threadIdx.x / 32);
    next_valid_ = context_ - token;
    if (next_valid_ <= 0) return;  // table entries beyond the context are garbage; nothing is read
    const int index = token / p_.attn.kv.block_size;
    slot_ = token - index * p_.attn.kv.block_size;
    block_ = table_[index];
  }

  __device__ __forceinline__ bool next_unit() {
    const int units = num_units(p_);
    Work w;
    do {
      unit_ += gridDim.x;
      if (unit_ >= units) {
        unit_ -= gridDim.x;  // asked again, the answer is the same
        tile_ = tile_end_ = 0;
        return false;
      }
    } while (!find_unit(p_, unit_, w));
    const StepInputs& in = *p_.attn.step;
    table_ = in.block_tables + static_cast<int64_t>(w.seq) * in.block_table_stride;
    tile_ = w.tile_begin;
    tile_end_ = w.tile_end;
    context_ = w.context;
    old_tokens_ = w.context - w.query_len;
    kv_head_ = w.kv_head;
    return true;
  }

  const DecodeParams& p_;
  uint32_t ring_;
  int stage_ = 0;
  // The tile that issue() gives K of next.
  int unit_, tile_ = 0, tile_end_ = 0, context_ = 0, old_tokens_ = 0, kv_head_ = 0;
  int block_ = 0, slot_ = 0, next_valid_ = kNone;
  const int32_t* table_ = nullptr;
  // The tile that issue() gives V of next; how many of the warp's rows exist.
  int64_t offset_ = 0;
  int valid_ = kNone;
};

// All but the last 2 * stages - 2 groups have arrived.
__device__ __forceinline__ void wait_for_tiles(int stages) {
  switch (stages) {
    case 1:
      return cp_async_wait<0>();
    case 2:
      return cp_async_wait<2>();
    case 3:
      return cp_async_wait<4>();
    default:
      return cp_async_wait<6>();
  }
}

// The 16 rows of q to shared memory; zeros where there is none.
template <typename T, typename C, int D>
__device__ __forceinline__ void load_q(const DecodeParams& p, const Work& w, unsigned char* tile) {
  for (int i = threadIdx.x; i < kMmaRows * (D / 16); i += kDecodeThreads) {
    const int r = i / (D / 16), unit = i % (D / 16);
    const int row = w.row_tile * kMmaRows + r;
    uint4 v[2] = {};
    if (row < w.rows(p.group)) {
      const int query = row / p.group, head = w.kv_head * p.group + row % p.group;
      const uint16_t* from = static_cast<const uint16_t*>(p.attn.q) +
                             (w.query_begin + query) * p.attn.q_stride +
                             static_cast<int64_t>(head) * D + 16 * unit;
      v[0] = *reinterpret_cast<const uint4*>(from);
      v[1] = *reinterpret_cast<const uint4*>(from + 8);
    }
    as_operands<T, C>(v);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<uint4*>(tile + segment_offset<2 * D>(r, 2 * unit + h)) = v[h];
  }
}

template <typename T, typename C, int D>
class Decoder {
 public:
  using Tiles = Loader<C, D>;
  using Type = Operand<T, C>;

  __device__ Decoder(const DecodeParams& p, unsigned char* smem)
      : p_(p),
        p_tile_(reinterpret_cast<uint16_t*>(smem)),
        top_(reinterpret_cast<float*>(smem + kMmaRows * kDecodePStride * 2)),
        is_last_(reinterpret_cast<int*>(top_ + kDecodeWarps * kMmaRows)),
        q_(smem + kDecodeExtraSmem),
        q_address_(smem_address(q_)),
        tiles_(p, q_address_ + kMmaRows * D * 2) {}

  __device__ void run() {
    // This step's K and V, and q, come from the kernel before; all else may have come already.
    int issued = 0;
    for (; issued < p_.stages && tiles_.next_is_old(); ++issued) tiles_.issue();
    wait_for_previous();
    let_next_start();
    for (; issued < p_.stages; ++issued) tiles_.issue();
    const int units = num_units(p_);
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      Work w;
      if (!find_unit(p_, unit, w)) continue;
      Sums<D> total;
      attend(w, total);
      find_unit(p_, unit, w);  // again, so that it takes no registers meanwhile
      if (!w.is_part()) {
        write_out<T, C, D>(p_, w, total);
      } else {
        write_partial<C, D>(p_, w, w.item, total);
        if (arrive_last(w)) merge_partials<T, D, 8>(p_, w, 0, w.rows_of_tile(p_.group) * (D / 4));
      }
    }
    cp_async_wait<0>();
  }

 private:
  static __device__ uint32_t smem_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
  }
  __device__ __forceinline__ int row(int half) const { return lane_ / 4 + 8 * half; }
  __device__ __forceinline__ int packed_row(const Work& w, int half) const {
    return w.row_tile * kMmaRows + row(half);
  }

  // The unit's tiles.
  __device__ __forceinline__ void attend(const Work& w, Sums<D>& total) {
    load_q<T, C, D>(p_, w, q_);
    if (!has_tiles_) wait_for_tiles(p_.stages);  // the first ones come beside the first q
    has_tiles_ = true;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r)
      position_[r] = w.context - w.query_len + packed_row(w, r) / p_.group;
    Sums<D> chunk;
    chunk.clear();
    total.clear();
    const int end = w.tile_end;
    for (int tile = w.tile_begin; tile < end; ++tile) {
      step(tile, chunk);
      if ((tile + 1) % kChunkTiles == 0 || tile + 1 == end) {
        total.merge(chunk, p_.scale.c);  // into nothing: as it is
        chunk.clear();
      }
    }
  }

  __device__ __forceinline__ void step(int tile, Sums<D>& chunk) {
    float s[2][4] = {};  // 16 rows, this warp's 16 tokens
    const int lane = opaque_lane();
#pragma unroll
    for (int k2 = 0; k2 < D / 32; ++k2) {
      uint32_t q[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        ldmatrix_x4(q[k],
                    q_address_ + segment_offset<2 * D>(lane % 16, 4 * k2 + 2 * k + lane / 16));
      Fragments b;
      load_k<C, typename Tiles::Layout>(b, tiles_.k_tile(stage_), 16 * warp_, k2, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mma<Type>(s[i % 2], q[i / 2], b[i / 2][i % 2][0], b[i / 2][i % 2][1]);
    }
    cap_and_mask(s, tile);
    share_maxima(s);
    __syncthreads();  // maxima are there; all are done with this K and with the V before
    tiles_.issue();
    softmax(s, chunk);
    wait_for_tiles(p_.stages);
    __syncthreads();  // P, this V and the next K are there
    add_values(chunk);
    if (++stage_ == p_.stages) stage_ = 0;
  }

  __device__ __forceinline__ void cap_and_mask(float (&s)[2][4], int tile) {
    const int token0 = tile * kTile + 16 * warp_ + 2 * (lane_ % 4);
    const int window = p_.attn.args.window;
    const int first[2] = {first_visible(position_[0], window), first_visible(position_[1], window)};
    if (p_.scale.cap > 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i / 4][i % 4] = capped_score(s[i / 4][i % 4], p_.scale);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int token = token0 + i / 4 * 8 + i % 2, r = i % 4 / 2;
      if (token > position_[r] || token < first[r]) s[i / 4][i % 4] = -INFINITY;
    }
  }

  __device__ __forceinline__ void share_maxima(const float (&s)[2][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      if (lane_ % 4 == 0) top_[warp_ * kMmaRows + row(r)] = top;
    }
  }

  // This warp's 16 columns of P to shared memory; sums are rescaled to the new maximum.
  __device__ __forceinline__ void softmax(const float (&s)[2][4], Sums<D>& chunk) {
    float alpha[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = chunk.m[r];
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) top = fmaxf(top, top_[w * kMmaRows + row(r)]);
      const float safe = safe_max(top), minus_mc = -__fmul_rn(safe, p_.scale.c);
      alpha[r] = rescale(chunk.m[r], safe, p_.scale.c);
      chunk.m[r] = top;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t pair = pack2<Type>(probability(s[n][2 * r], p_.scale.c, minus_mc),
                                          probability(s[n][2 * r + 1], p_.scale.c, minus_mc));
        const int column = 16 * warp_ + 8 * n + 2 * (lane_ % 4);
        *reinterpret_cast<uint32_t*>(p_tile_ + row(r) * kDecodePStride + column) = pair;
      }
    }
    chunk.scale(alpha);
  }

  __device__ __forceinline__ void add_values(Sums<D>& chunk) {
    const int lane = opaque_lane();
    const uint32_t from = smem_address(p_tile_ + lane % 16 * kDecodePStride + lane / 16 * 8);
    chunk.template add_values<Type, C, typename Tiles::Layout>([&](int k) { return from + k * 32; },
                                                               tiles_.v_tile(stage_), warp_, lane);
  }

  // True in the CTA that is the last of its sequence, kv head and row tile.
  __device__ __forceinline__ bool arrive_last(const Work& w) {
    __syncthreads();
    if (threadIdx.x == 0) {
      DecodeCounter* const counter = counter_of(p_, w);
      *is_last_ = chunks_done(count_chunks(counter, w, 0)) == w.num_chunks ? 1 : 0;
      if (*is_last_ != 0) *counter = 0;  // as it was found
    }
    __syncthreads();
    return *is_last_;
  }

  const DecodeParams& p_;
  const int lane_ = threadIdx.x % 32, warp_ = threadIdx.x / 32;
  uint16_t* p_tile_;  // P [16][kDecodePStride], 16-bit
  float* top_;        // [warp][16] row maxima
  int* is_last_;
  unsigned char* q_;  // [16][D], 16-bit
  uint32_t q_address_;
  Tiles tiles_;
  int stage_ = 0;
  bool has_tiles_ = false;
  int position_[2];
};

// What fits on Hopper; registers must not be what limits there.
template <typename C, int D>
constexpr int kMinCtas =
    plan_decode(227 * 1024, 228 * 1024, D, static_cast<int>(sizeof(C))).ctas_per_sm;

template <typename T, typename C, int D>
__global__ void __launch_bounds__(kDecodeThreads, (kMinCtas<C, D>))
    decode_sm80_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  if (!p.attn.settled) wait_for_previous();
  Decoder<T, C, D>(p, smem).run();
}

}  // namespace

void decode_sm80(DecodeParams p, const Card& card, cudaStream_t stream) {
  const AttnParams& a = p.attn;
  const DecodePlan plan = plan_decode(card.max_smem, card.smem_per_sm, a.kv.head_dim,
                                      static_cast<int>(dtype_size(a.kv.dtype)));
  check_arg(plan.stages > 0, "attention_decode: ", card.max_smem,
            " bytes of shared memory are too few for head_dim ", a.kv.head_dim);
  p.stages = plan.stages;
  dispatch_attention(a, "attention_decode", [&](auto type, auto cache, auto head_dim) {
    const auto kernel = decode_sm80_kernel<decltype(type), decltype(cache), head_dim()>;
    allow_smem(kernel, static_cast<size_t>(plan.smem), "attention_decode");
    launch(kernel, static_cast<unsigned>(card.num_sms * plan.ctas_per_sm), kDecodeThreads,
           static_cast<size_t>(plan.smem), stream, "attention_decode", p);
  });
}

}  // namespace ni::cuda
