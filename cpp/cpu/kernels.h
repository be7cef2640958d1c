// The functions that are compiled once per instruction set. A table works on one row or one tile;
// the files linear.cpp, attention.cpp, … cut an operator into tiles and spread them over threads.
//
// Every output element has one chain of fused multiply-adds in ascending order of its summation
// index, whatever the number of rows in the tile: that is promise 1 at its root.
#pragma once

#include <cstdint>

#include "backend/op_args.h"
#include "core/types.h"

namespace ni {

// Weights lie in panels of kPanel output features, zero-padded:
//   bf16 [panel][ceil(K / 2)][kPanel][2]: a 32-bit element is two neighbouring k, as the bf16 dot
//        product wants it; f32 and f16 [panel][K][kPanel].
inline constexpr int kPanel = 32;

// Tokens that attention takes per softmax step, and the width of the K cache's transposed tiles.
inline constexpr int kAttnTile = 64;
inline constexpr int kSubTile = 16;
inline constexpr int kSubTiles = kAttnTile / kSubTile;

// A block of `rows` rows times one panel.
struct LinearTile {
  const void* x;  // packed by pack_rows
  const void* w;  // the panel
  DType dtype;    // of w
  int rows;       // <= KernelTable::block_rows
  int cols;       // outputs that exist, <= kPanel
  int64_t k;
  const float* bias;  // [cols] or null
  bool accumulate;
  float* out;  // [rows, cols]
  int64_t out_stride;
};

// `rows` query rows against up to kAttnTile cached tokens, online softmax state carried in m, l, o.
struct AttnTile {
  const float* q;  // [head_dim][rows], scaled
  int rows;        // <= KernelTable::block_rows
  int head_dim;
  int v_dim;                      // head_dim rounded up to 16: elements of a row of V and of o
  DType dtype;                    // of k and v
  const void* k[kSubTiles];       // [head_dim][kSubTile] each
  const void* v[kSubTiles];       // [kSubTile][v_dim] each
  const void* next_k[kSubTiles];  // to fetch ahead: K of the next tile, else the same as k
  const int32_t* begin;           // [rows] tokens [begin, end) of the tile that the row sees;
  const int32_t* end;             //        begin == end: none
  int first, last;                // tokens that some row sees; sub-tiles outside may be null
  float* m;                       // [rows] running maximum
  float* l;                       // [rows] running sum of exp(score - m)
  float* o;                       // [rows][v_dim] running sum of exp(score - m) * v
};

struct KernelTable {
  const char* isa;
  int block_rows;  // most rows of a tile
  bool bf16_dot;   // beside bf16 weights x is rounded to bf16 (at every number of rows)

  // x [rows, k] -> [k padded to even][rows] fp32 or, for a bf16 dot product, [ceil(k / 2)][rows][2]
  // bf16
  void (*pack_rows)(const float* x, int64_t stride, int rows, int64_t k, bool to_bf16, void* out);
  void (*linear)(const LinearTile& t);
  void (*attention)(const AttnTile& t);

  // out = norm(x) over n elements; `add`, where given, is added to x first and the sum kept there.
  void (*norm)(float* x, const float* add, int64_t n, const NormWeight& w, const NormArgs& a,
               float* out);
  // x = rotate(x): pairs (i, i + half)
  void (*rotate)(float* x, int half, const float* cos, const float* sin);
  // out = act(x), times `up` where given
  void (*activation)(const float* x, const float* up, int64_t n, Activation act, float* out);
  // x *= factor
  void (*scale)(float* x, int64_t n, float factor);

  void (*load_floats)(const void* src, DType dtype, int64_t n, float* dst);
  void (*store_floats)(const float* src, int64_t n, DType dtype, void* dst);

  // Sampler; NaN counts as -infinity.
  float (*max)(const float* x, int64_t n);
  // p[i] = exp((x[i] - max) * factor), returns their sum; p may be null.
  double (*exp_sum)(const float* x, int64_t n, float max, float factor, float* p);
};

}  // namespace ni
