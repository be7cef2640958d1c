// The warp of Hopper's decode attention (attention_decode_sm90.cu) that counts the parts of
// results, and rotates.
#pragma once

#include "cuda/attention_decode_sm90.cuh"
#include "cuda/rope.cuh"

namespace ni::cuda::decode {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900  // elsewhere the kernel is empty

// -- QK-norm and rotation, pairs of elements as rope.cuh has them ---------------------------------

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

// -- Counting -------------------------------------------------------------------------------------

// Of a counter, beside the chunks that are done: CTAs that have joined the merge, of which those
// that have left the counter alone, and whether the last CTA to count merges alone.
inline constexpr DecodeCounter kJoined = 1ull << 32, kLeft = 1ull << 48, kAlone = 1ull << 63;
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

// With kRope it rotates, too: a unit ahead of those that compute, all but the CTA's first; so a
// part is counted when what comes next is rotated.
template <typename T, typename C, int D, bool kRope>
__device__ void count_parts(const DecodeParams& p, const Memory<C, D>& memory) {
  const int lane = threadIdx.x % 32;
  uint32_t phase = 0;
  bool is_first = true, has_part = false;
  Work part{};
  for (Place unit;; unit.advance(kDecodeUnits)) {
    wait(memory.unit_full(unit.stage), unit.phase);
    const Work w = memory.work(unit.stage);
    const bool is_work = w.item >= 0;
    if constexpr (kRope) {
      if (is_work && !is_first) Rotator<T, C, D>(p, memory, unit.stage).run(w, true, 0, 1);
      is_first = false;
    } else {
      part = w;
      has_part = is_work && w.is_part();
    }
    __syncwarp();
    if (lane == 0) {
      if (kRope) arrive(memory.unit_rotated(unit.stage));
      arrive(memory.unit_empty(unit.stage));
      if (has_part) {
        wait(memory.part_written(), phase);
        count_part<D>(p, part, memory.share(), memory.part_counted());
      }
    }
    __syncwarp();
    if (has_part) phase ^= 1;
    if (!is_work || w.is_last != 0) return;
    if constexpr (kRope) {
      part = w;
      has_part = w.is_part();
    }
  }
}

#endif

}  // namespace ni::cuda::decode
