// Attention of a few query rows over one tile of up to 64 cached tokens.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels_linear.h"
#include "cpu/simd.h"

namespace ni {
namespace {

// With few rows, memory is the limit, and a block of the cache is too short for the hardware to see
// where it goes: V is fetched while scores are computed, the next tile's K while V is summed. Into
// the L2 cache: the L1 has too few outstanding misses to reach the memory's bandwidth.
constexpr int kPrefetchRows = 8;
template <typename E>
NI_INLINE void prefetch(const E* p, int elements) {
  for (int i = 0; i < elements; i += 64 / static_cast<int>(sizeof(E)))
    __builtin_prefetch(p + i, 0, 2);
}

constexpr int kSubVecs = kSubTile / kWidth;
constexpr int kTileVecs = kAttnTile / kWidth;

// scores[r][16 * s ...] = q_r . k for the tokens of sub-tiles s .. s + S - 1
template <int R, int S, typename E>
NI_INLINE void score_sub_tiles(const AttnTile& t, int s, float (*scores)[kAttnTile]) {
  constexpr int NV = S * kSubVecs;
  const E* k[S];
#pragma GCC unroll 4
  for (int i = 0; i < S; ++i) k[i] = static_cast<const E*>(t.k[s + i]);
  Vec acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[r][v] = v_set(0);
  const float* q = t.q;
  for (int d = 0; d < t.head_dim; ++d, q += R) {
    Vec kv[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v)
      kv[v] = v_load(k[v / kSubVecs] + d * kSubTile + v % kSubVecs * kWidth);
    multiply_add<R, NV>(acc, q, kv);
    if constexpr (R <= kPrefetchRows) {
      for (int i = 0; i < S; ++i)
        prefetch(static_cast<const E*>(t.v[s + i]) + d * kSubTile, kSubTile);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) v_store(scores[r] + s * kSubTile + v * kWidth, acc[r][v]);
}

// Scores become exp(score - m); the running maximum and sum move on. Returns the factor by which
// earlier sums shrink: exactly 1 where this tile is fully masked, so that skipping it changes
// nothing.
NI_INLINE float softmax_row(const AttnTile& t, int r, float* scores) {
  const float inf = __builtin_inff();
  for (int i = 0; i < t.begin[r]; ++i) scores[i] = -inf;
  for (int i = t.end[r] > t.begin[r] ? t.end[r] : t.begin[r]; i < kAttnTile; ++i) scores[i] = -inf;
  Vec s[kTileVecs], top = v_set(t.m[r]);
#pragma GCC unroll 16
  for (int v = 0; v < kTileVecs; ++v) {
    s[v] = v_load(scores + v * kWidth);
    top = v_max(s[v], top);
  }
  const float m = v_max_lane(top);
  const Vec shift = v_set(m == -inf ? 0.0f : m);
  Vec sum = v_set(0);
#pragma GCC unroll 16
  for (int v = 0; v < kTileVecs; ++v) {
    s[v] = v_exp(v_sub(s[v], shift));
    sum = v_add(sum, s[v]);
    v_store(scores + v * kWidth, s[v]);
  }
  float shrink[kWidth];
  v_store(shrink, v_exp(v_sub(v_set(t.m[r]), shift)));
  t.l[r] = t.l[r] * shrink[0] + v_sum(sum);
  t.m[r] = m;
  return shrink[0];
}

// o[r][NV vectors from column c] = o * shrink + p V
template <int R, int NV, typename E>
NI_INLINE void add_values(const AttnTile& t, int c, const float (*p)[kAttnTile],
                          const float* shrink) {
  Vec acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v)
      acc[r][v] = v_mul(v_load(t.o + r * t.v_dim + c + v * kWidth), v_set(shrink[r]));
  for (int i = t.first; i < t.last; ++i) {
    const E* row = static_cast<const E*>(t.v[i / kSubTile]) + i % kSubTile * t.v_dim + c;
    Vec vv[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) vv[v] = v_load(row + v * kWidth);
    multiply_add<R, NV, kAttnTile>(acc, p[0] + i, vv);
    if constexpr (R <= kPrefetchRows)
      prefetch(static_cast<const E*>(t.next_k[i / kSubTile]) + i % kSubTile * t.v_dim + c,
               NV * kWidth);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) v_store(t.o + r * t.v_dim + c + v * kWidth, acc[r][v]);
}

template <int R, typename E>
void attention_rows(const AttnTile& t) {
  float scores[R][kAttnTile];
  constexpr int S = vectors_for(R, 2 * kSubVecs) >= 2 * kSubVecs ? 2 : 1;
  const int end = (t.last + kSubTile - 1) / kSubTile;
  int s = t.first / kSubTile;
  for (; s + S <= end; s += S) score_sub_tiles<R, S, E>(t, s, scores);
  for (; s < end; ++s) score_sub_tiles<R, 1, E>(t, s, scores);

  float shrink[R];
  for (int r = 0; r < R; ++r) shrink[r] = softmax_row(t, r, scores[r]);

  constexpr int NV = vectors_for(R, 8);
  int c = 0;
  for (; c + NV * kWidth <= t.v_dim; c += NV * kWidth) add_values<R, NV, E>(t, c, scores, shrink);
  for (; c < t.v_dim; c += kWidth) add_values<R, 1, E>(t, c, scores, shrink);
}

template <typename E, int R = kBlockRows>
void attention_typed(const AttnTile& t) {
  if (t.rows == R) return attention_rows<R, E>(t);
  if constexpr (R > 1) attention_typed<E, R - 1>(t);
}

void attention(const AttnTile& t) {
  switch (t.dtype) {
    case DType::bf16:
      return attention_typed<bf16>(t);
    case DType::f16:
      return attention_typed<f16>(t);
    default:
      return attention_typed<float>(t);
  }
}

}  // namespace
}  // namespace ni
