// What follows linear_large()'s product when that is qkv: QK-norm, rotation and cache, as
// rope_kv_write() (rope_kv.cu) does them, to the bit.
//
// Sums of squares are taken where the products lie, in the order of normalise_head(): of a row a
// lane has the pairs of columns 8 t + lane % 4 * 2, t = 0, 1, …: of a head of 128 those of lane l
// of rope.cuh, l = 4 t + lane % 4 for t = 0 … 7, of one of 64 likewise half of them. All else is
// done from shared memory, where 16 lanes have a row, each four columns of the lower half of a head
// and those that rotate with them: angles come and results leave as whole lines. While one group of
// warps does this the tensor core is the other's, so it must take no longer than a tile's products:
// a warp is alone on its scheduler, so instructions count. (So do lines that loads and stores move:
// the tensor core reads its operands through the same pipe. docs/kernels.md has figures.)
#pragma once

#include "cuda/linear_skinny.cuh"
#include "cuda/rope.cuh"

namespace ni::cuda {

struct QkvArgs {
  const int32_t* positions = nullptr;
  const int64_t* slot_mapping = nullptr;
  RopeArgs rope;
  KvView kv;
  int num_heads = 0;
};

// Heads of 64 or 128. A warp has 16 rows of a tile of 128 columns and 16 that are 64 behind them.
template <typename T, int kDim>
class QkvRows {
 public:
  static constexpr int kColumns = 128, kBlocks = 2, kBlockRows = 16;
  static constexpr int kStagedBytes = kBlockRows * kColumns * 2;  // a warp

  // staged: the warp's, in shared memory.
  __device__ QkvRows(const SkinnyArgs& a, const QkvArgs& qkv, uint32_t staged, int lane)
      : a_(a), qkv_(qkv), staged_(staged), lane_(lane), head_lane_(lane % kHeadLanes) {}

  // What memory has for the tile is on its way while its products are made.
  __device__ __forceinline__ void look_up(int first_row, int column_tile) {
    first_head_ = column_tile * kHeads;
    head_ = first_head_ + lane_ % 16 / kHeadLanes;
    first_row_ = first_row + lane_ / 16;
    const int row = first_row + lane_ / 16 * 64 + lane_ % 16;
    if (turns() && qkv_.rope.cos != nullptr) {
      position_ = qkv_.positions[row];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load_angles(i);
    }
    const NormWeight& norm = head_ < qkv_.num_heads ? qkv_.rope.q_norm : qkv_.rope.k_norm;
    if (turns() && norm.weight != nullptr) {
      const float* of_lane = norm.weight + 4 * head_lane_;
      weight_[0] = *reinterpret_cast<const float4*>(of_lane);
      weight_[1] = *reinterpret_cast<const float4*>(of_lane + kDim / 2);
    }
    if (first_head_ + kHeads > qkv_.num_heads) {
      // In rows of a head from the cache's begin: a layer's blocks lie as far apart as those of all
      // layers, so elements do not fit 32 bits.
      const KvView& kv = qkv_.kv;
      const auto slot = static_cast<int32_t>(qkv_.slot_mapping[row]);
      const int32_t block = slot / kv.block_size;
      const int64_t at = kv.v_offset(block, 0, slot - block * kv.block_size, 0);
      place_ = slot < 0 ? kNowhere : static_cast<int32_t>(at / kDim);
    }
  }

  __device__ __forceinline__ void store(const float (&sums)[kBlocks][kColumns / 8][4]) {
    if (!turns() || qkv_.rope.cos == nullptr) return finish<false, false>(sums);
    if (qkv_.rope.q_norm.weight == nullptr) return finish<true, false>(sums);
    finish<true, true>(sums);
  }

 private:
  static constexpr int kHeads = kColumns / kDim;  // of a tile
  static constexpr int kHeadLanes = kDim / 8;     // of a row
  static constexpr int kPairs = kBlockRows / 2;   // of rows: half of the lanes have one each
  static constexpr int kAhead = 2;                // pairs whose angles are under way
  static constexpr int32_t kNowhere = -1;         // a padding row, which is not written

  __device__ __forceinline__ int num_turning() const {
    return qkv_.num_heads + qkv_.kv.num_kv_heads;
  }
  __device__ __forceinline__ bool turns() const { return first_head_ < num_turning(); }

  // Of what each lane has for row `lane`.
  __device__ __forceinline__ int32_t of_pair(int32_t of_row, int pair) const {
    return __shfl_sync(0xffffffffu, of_row, 2 * pair + lane_ / 16);
  }
  __device__ __forceinline__ void load_angles(int pair) {
    const int64_t at = int64_t{of_pair(position_, pair)} * (kDim / 2) + 4 * head_lane_;
    cos_[pair % kAhead] = *reinterpret_cast<const float4*>(qkv_.rope.cos + at);
    sin_[pair % kAhead] = *reinterpret_cast<const float4*>(qkv_.rope.sin + at);
  }

  // -- Shared memory: rows of 16-byte chunks, which change places within 128 bytes --

  __device__ __forceinline__ uint32_t staged(int row, int chunk) const {
    return staged_ + row * (2 * kColumns) + 16 * (chunk ^ row % 8);
  }
  template <bool kTurns>
  __device__ __forceinline__ void stage(const float (&sums)[kColumns / 8][4]) const {
#pragma unroll
    for (int t = 0; t < kColumns / 8; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = sums[t][2 * i], high = sums[t][2 * i + 1];
        const bool is_result = !kTurns || first_head_ + t / kHeadLanes >= num_turning();
        const uint32_t two = is_result ? rounded_pair<T>(low, high) : bits_of_pair<T>(low, high);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(staged(lane_ / 4 + 8 * i, t) + lane_ % 4 * 4),
                     "r"(two)
                     : "memory");
      }
  }
  // Four columns of row `pair`'s, of the lower or the upper half of the lane's head.
  __device__ __forceinline__ uint2 load_staged(int pair, int half) const {
    const int column = lane_ % 16 / kHeadLanes * kDim + half * (kDim / 2) + 4 * head_lane_;
    uint2 bits;  // no clobber: loads of all pairs may come first
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(bits.x), "=r"(bits.y)
                 : "r"(staged(2 * pair + lane_ / 16, column / 8) + column % 8 * 2));
    return bits;
  }

  // -- Norm and rotation --

  // Of row lane / 4 (i = 0) or lane / 4 + 8.
  __device__ __forceinline__ float factor_of(const float (&sums)[kColumns / 8][4], int head,
                                             int i) const {
    constexpr int kStrips = kDim / 8;
    float part[8];
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      part[t] = 0;
#pragma unroll
      for (int at = t; at < kStrips; at += 8) {
        const float* v = &sums[head * kStrips + at][2 * i];
        const float2 two = pair_of_bits<T>(bits_of_pair<T>(v[0], v[1]));
        part[t] = __fmaf_rn(two.y, two.y, __fmaf_rn(two.x, two.x, part[t]));
      }
    }
#pragma unroll
    for (int apart = 4; apart > 0; apart /= 2)
#pragma unroll
      for (int t = 0; t < apart; ++t) part[t] = __fadd_rn(part[t], part[t + apart]);
#pragma unroll
    for (int apart = 2; apart > 0; apart /= 2)
      part[0] = __fadd_rn(part[0], __shfl_xor_sync(0xffffffffu, part[0], apart));
    return head_factor(part[0], kDim, qkv_.rope.norm_eps);
  }
  static __device__ __forceinline__ float2 scaled(float2 v, float factor, float2 weight) {
    return {__fmul_rn(v.x, __fmul_rn(factor, weight.x)),
            __fmul_rn(v.y, __fmul_rn(factor, weight.y))};
  }
  template <bool kNorms>
  __device__ __forceinline__ void turn(uint2& low, uint2& high, float factor, int pair) const {
    const float4 &cos = cos_[pair % kAhead], &sin = sin_[pair % kAhead];
    const auto turn_two = [&](uint32_t& low_bits, uint32_t& high_bits, float2 c, float2 s,
                              float2 low_weight, float2 high_weight) {
      float2 below = pair_of_bits<T>(low_bits), above = pair_of_bits<T>(high_bits);
      if constexpr (kNorms) {
        below = scaled(below, factor, low_weight);
        above = scaled(above, factor, high_weight);
      }
      const float2 v = rotate_pair(below, above, c, s, false);
      const float2 w = rotate_pair(above, below, c, s, true);
      low_bits = rounded_pair<T>(v.x, v.y);
      high_bits = rounded_pair<T>(w.x, w.y);
    };
    const auto &l = weight_[0], &h = weight_[1];
    turn_two(low.x, high.x, {cos.x, cos.y}, {sin.x, sin.y}, {l.x, l.y}, {h.x, h.y});
    turn_two(low.y, high.y, {cos.z, cos.w}, {sin.z, sin.w}, {l.z, l.w}, {h.z, h.w});
  }

  // -- All of it --

  template <bool kTurns, bool kNorms>
  __device__ __forceinline__ void finish(const float (&sums)[kBlocks][kColumns / 8][4]) {
    // Of q the lane's results go to rows of `out`, of k and v to rows of a head of the cache.
    const KvView& kv = qkv_.kv;
    const int kv_head = head_ - qkv_.num_heads;
    const bool is_q = kv_head < 0, is_v = kv_head >= kv.num_kv_heads;
    const bool exists = kv_head < 2 * kv.num_kv_heads;
    T* to = is_q ? static_cast<T*>(a_.out) + head_ * kDim
                 : static_cast<T*>(is_v ? kv.v : kv.k) +
                       kv.head_offset(0, kv_head - (is_v ? kv.num_kv_heads : 0));
    to += 4 * head_lane_;
    const auto apart = static_cast<int32_t>(is_q ? a_.out_stride : kDim);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float factors[2][kHeads];
      if constexpr (kNorms) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll
          for (int i = 0; i < 2; ++i) factors[i][h] = factor_of(sums[b], h, i);
      }
      __syncwarp();  // what was there is stored
      stage<kTurns>(sums[b]);
      __syncwarp();
      uint2 results[kPairs][2];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        results[j][0] = load_staged(j, 0);
        results[j][1] = load_staged(j, 1);
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const int pair = kPairs * b + j;
        uint2 &low = results[j][0], &high = results[j][1];
        if constexpr (kTurns) {
          float factor = 0;
          if constexpr (kNorms) {
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
              const float f =
                  __shfl_sync(0xffffffffu, factors[j / 4][h], 8 * (j % 4) + lane_ / 16 * 4);
              if (h == 0 || lane_ % 16 / kHeadLanes == h) factor = f;
            }
          }
          const uint2 v[2] = {low, high};
          turn<kNorms>(low, high, factor, pair);
          if (kHeads > 1 && is_v) low = v[0], high = v[1];
          if (pair + kAhead < kBlocks * kPairs) load_angles(pair + kAhead);
        }
        const int32_t in_cache = of_pair(place_, pair);
        const int32_t place = is_q ? first_row_ + 64 * b + 2 * j : in_cache;
        if (exists && place != kNowhere) {
          T* at = to + int64_t{place} * apart;
          store_words(at, low);
          store_words(at + kDim / 2, high);
        }
      }
    }
  }
  // One store: of what inline assembly has loaded the compiler makes one of each word.
  static __device__ __forceinline__ void store_words(T* to, const uint2& bits) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(bits.x), "r"(bits.y));
  }

  const SkinnyArgs& a_;
  const QkvArgs& qkv_;
  uint32_t staged_;
  int lane_, head_lane_;  // head_lane: of those of its head
  // Of the tile:
  int first_head_ = 0, head_ = 0;     // head: the lane's
  int first_row_ = 0;                 // the lane's, of the first pair
  int32_t position_ = 0, place_ = 0;  // of the warp's row `lane`
  float4 weight_[2];                  // of QK-norm
  float4 cos_[kAhead], sin_[kAhead];
};

}  // namespace ni::cuda
