// RoPE, the KV cache, and attention over it.
//
// Attention walks the cache in tiles of 64 tokens at fixed absolute positions with an online
// softmax, for prefill and decode alike; K and V come from the cache also for the present chunk. A
// work item is a block of queries of one sequence and one KV head: the heads that share it are rows
// of the item, so a tile is read once for all of them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "core/check.h"
#include "cpu/cpu_backend.h"

namespace ni {
namespace {

constexpr int64_t kItemRows = 96;  // query rows of an item, unless one token alone has more

int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

void check_slots(const StepInputs& in, const KvView& kv) {
  const int64_t slots = static_cast<int64_t>(kv.num_blocks) * kv.block_size;
  for (int32_t t = 0; t < in.num_tokens; ++t)
    check_arg(in.slot_mapping[t] >= -1 && in.slot_mapping[t] < slots, "slot_mapping[", t,
              "] = ", in.slot_mapping[t], " is not in [-1, ", slots, ")");
}

// Each sequence's rows lie in the step, its visible blocks in the cache.
void check_sequences(const StepInputs& in, const AttnArgs& a, const KvView& kv) {
  check_arg(in.num_seqs == 0 || in.cu_seqlens_q[0] >= 0, "attention: cu_seqlens_q starts below 0");
  for (int32_t s = 0; s < in.num_seqs; ++s) {
    const int32_t len = in.cu_seqlens_q[s + 1] - in.cu_seqlens_q[s], context = in.context_lens[s];
    if (len == 0 || context == 0) continue;  // a padding row has no context
    check_arg(len > 0 && in.cu_seqlens_q[s + 1] <= in.num_tokens && context >= len,
              "attention: sequence ", s, " has query rows [", in.cu_seqlens_q[s], ", ",
              in.cu_seqlens_q[s + 1], ") of ", in.num_tokens, " and ", context, " tokens");
    const int32_t last = (context - 1) / kv.block_size;
    check_arg(last < in.block_table_stride, "attention: sequence ", s, " needs ", last + 1,
              " blocks, its table has ", in.block_table_stride);
    const int32_t seen = a.window > 0 ? std::max(0, context - len - a.window + 1) : 0;
    const int32_t* table = in.block_tables + static_cast<int64_t>(s) * in.block_table_stride;
    for (int32_t b = seen / kv.block_size; b <= last; ++b)
      check_arg(table[b] >= 0 && table[b] < kv.num_blocks, "attention: block ", table[b],
                " of sequence ", s, " is not in [0, ", kv.num_blocks, ")");
  }
}

// Rounds n floats and stores them `stride` elements apart.
void store_strided(const KernelTable& kernels, const float* from, int64_t n, DType dtype,
                   int64_t stride, char* to) {
  constexpr int64_t kPart = 64;
  alignas(64) char part[kPart * 4];
  for (int64_t begin = 0; begin < n; begin += kPart) {
    const int64_t count = std::min(kPart, n - begin);
    kernels.store_floats(from + begin, count, dtype, part);
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == DType::f32)
        std::memcpy(to + (begin + i) * stride * 4, part + i * 4, 4);
      else
        std::memcpy(to + (begin + i) * stride * 2, part + i * 2, 2);
    }
  }
}

// A thread's working memory for one item.
struct Workspace {
  float* q;        // packed queries
  float* o;        // [rows][v_dim]
  float* m;        // [rows]
  float* l;        // [rows]
  int32_t* begin;  // [rows] range of the present tile that a row sees
  int32_t* end;    // [rows]
  float* k_tile;   // [kAttnTile / kSubTile][head_dim][kSubTile], where tiles must be gathered
  float* v_tile;   // [kAttnTile][v_dim]

  static int64_t floats(int64_t rows, int64_t head_dim, int64_t v_dim) {
    return round_up(rows * (head_dim + v_dim + 4) + kAttnTile * (head_dim + v_dim), 16);
  }
  Workspace(char* data, int64_t rows, int64_t head_dim, int64_t v_dim) {
    auto* next = reinterpret_cast<float*>(data);
    const auto take = [&next](int64_t n) { return std::exchange(next, next + n); };
    k_tile = take(kAttnTile * head_dim);
    v_tile = take(kAttnTile * v_dim);
    o = take(rows * v_dim);
    q = take(rows * head_dim);
    m = take(rows);
    l = take(rows);
    begin = reinterpret_cast<int32_t*>(take(rows));
    end = reinterpret_cast<int32_t*>(take(rows));
  }
};

// One query block of one sequence and KV head.
class AttentionItem {
 public:
  AttentionItem(const KernelTable& kernels, Tensor qkv, const StepInputs& in, const AttnArgs& a,
                const KvView& kv, Tensor out)
      : kernels_(kernels),
        qkv_(qkv),
        in_(in),
        a_(a),
        kv_(kv),
        out_(out),
        group_(a.num_heads / kv.num_kv_heads),
        v_dim_(static_cast<int>(round_up(kv.head_dim, 16))),
        direct_(kv.block_size % kSubTile == 0 && kv.head_dim % kSubTile == 0) {}

  // Queries [first, first + count) of sequence `seq`.
  void run(int32_t seq, int32_t head, int32_t first, int32_t count, Workspace& ws) const {
    const int32_t row0 = in_.cu_seqlens_q[seq];
    const int32_t start = in_.context_lens[seq] - (in_.cu_seqlens_q[seq + 1] - row0) + first;
    const int rows = count * group_;
    const int blocks = (rows + kernels_.block_rows - 1) / kernels_.block_rows;
    const auto block_begin = [&](int b) { return rows * b / blocks; };

    for (int b = 0; b < blocks; ++b)
      pack_queries(row0 + first, head, block_begin(b), block_begin(b + 1), ws.q);
    std::fill_n(ws.m, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(ws.l, rows, 0.0f);
    std::fill_n(ws.o, rows * v_dim_, 0.0f);

    const int32_t* table = in_.block_tables + static_cast<int64_t>(seq) * in_.block_table_stride;
    const int32_t context_end = start + count;
    for (int32_t tile = seen_from(start) / kAttnTile * kAttnTile; tile < context_end;
         tile += kAttnTile) {
      AttnTile t;
      find_tile(table, head, tile, std::max(seen_from(start), tile), context_end, ws, t);
      for (int b = 0; b < blocks; ++b)
        run_block(t, tile, start, block_begin(b), block_begin(b + 1), ws);
    }
    store(row0 + first, head, rows, ws);
  }

 private:
  // The first position that a query at `position` sees.
  int32_t seen_from(int32_t position) const {
    return a_.window > 0 ? std::max(0, position - a_.window + 1) : 0;
  }

  // Row r of an item is head r % group of token r / group. Packed [head_dim][rows], scaled.
  void pack_queries(int32_t token, int32_t head, int begin, int end, float* q) const {
    float* packed = q + static_cast<int64_t>(begin) * kv_.head_dim;
    const int rows = end - begin;
    for (int r = 0; r < rows; ++r) {
      const int row = begin + r;
      const float* from = qkv_.as<float>() + (token + row / group_) * qkv_.row_stride +
                          static_cast<int64_t>(head * group_ + row % group_) * kv_.head_dim;
      for (int d = 0; d < kv_.head_dim; ++d) packed[d * rows + r] = from[d] * a_.scale;
    }
  }

  // Where the tile's positions [begin, end) lie in the cache; copied as fp32 where a block is
  // smaller than a sub-tile or rows of V are not whole vectors.
  void find_tile(const int32_t* table, int32_t head, int32_t tile, int32_t begin,
                 int32_t context_end, Workspace& ws, AttnTile& t) const {
    const int32_t end = std::min(context_end, tile + kAttnTile);
    const auto bytes = static_cast<int64_t>(dtype_size(kv_.dtype));
    const auto* k = static_cast<const char*>(kv_.k);
    const auto* v = static_cast<const char*>(kv_.v);
    t.dtype = direct_ ? kv_.dtype : DType::f32;
    for (int s = 0; s < kSubTiles; ++s) {
      const int32_t from = tile + s * kSubTile;
      if (from >= end || from + kSubTile <= begin) {
        t.k[s] = t.v[s] = nullptr;
      } else if (direct_) {
        const int32_t block = table[from / kv_.block_size], slot = from % kv_.block_size;
        t.k[s] = k + kv_.k_offset(block, head, slot, 0) * bytes;
        t.v[s] = v + kv_.v_offset(block, head, slot, 0) * bytes;
        t.next_k[s] = t.k[s];
        if (const int32_t next = from + kAttnTile; next < context_end)
          t.next_k[s] =
              k +
              kv_.k_offset(table[next / kv_.block_size], head, next % kv_.block_size, 0) * bytes;
      } else {
        float* to_k = ws.k_tile + s * kSubTile * kv_.head_dim;
        float* to_v = ws.v_tile + s * kSubTile * v_dim_;
        for (int i = 0; i < kSubTile; ++i) {
          const int32_t p = from + i;
          if (p >= begin && p < end)
            gather_token(table[p / kv_.block_size], head, p % kv_.block_size, to_k + i,
                         to_v + i * v_dim_);
        }
        t.k[s] = t.next_k[s] = to_k;
        t.v[s] = to_v;
      }
    }
  }

  void gather_token(int32_t block, int32_t head, int32_t slot, float* to_k, float* to_v) const {
    const auto bytes = static_cast<int64_t>(dtype_size(kv_.dtype));
    const char* k = static_cast<const char*>(kv_.k) + kv_.k_offset(block, head, slot, 0) * bytes;
    const char* v = static_cast<const char*>(kv_.v) + kv_.v_offset(block, head, slot, 0) * bytes;
    for (int d = 0; d < kv_.head_dim; ++d)
      kernels_.load_floats(k + d * kv_.tile() * bytes, kv_.dtype, 1, to_k + d * kSubTile);
    kernels_.load_floats(v, kv_.dtype, kv_.head_dim, to_v);
    std::fill(to_v + kv_.head_dim, to_v + v_dim_, 0.0f);
  }

  // Rows [begin, end) of the item against the tile.
  void run_block(AttnTile& t, int32_t tile, int32_t start, int begin, int end,
                 Workspace& ws) const {
    t.first = kAttnTile;
    t.last = 0;
    for (int r = begin; r < end; ++r) {
      const int32_t position = start + r / group_;
      ws.begin[r] = std::max(seen_from(position) - tile, 0);
      ws.end[r] = std::max(std::min(position + 1 - tile, kAttnTile), 0);
      if (ws.begin[r] >= ws.end[r]) {
        ws.begin[r] = ws.end[r] = 0;
        continue;
      }
      t.first = std::min(t.first, static_cast<int>(ws.begin[r]));
      t.last = std::max(t.last, static_cast<int>(ws.end[r]));
    }
    if (t.first >= t.last) return;
    t.q = ws.q + static_cast<int64_t>(begin) * kv_.head_dim;
    t.rows = end - begin;
    t.head_dim = kv_.head_dim;
    t.v_dim = v_dim_;
    t.begin = ws.begin + begin;
    t.end = ws.end + begin;
    t.m = ws.m + begin;
    t.l = ws.l + begin;
    t.o = ws.o + static_cast<int64_t>(begin) * v_dim_;
    kernels_.attention(t);
  }

  void store(int32_t token, int32_t head, int rows, Workspace& ws) const {
    for (int r = 0; r < rows; ++r) {
      float* o = ws.o + static_cast<int64_t>(r) * v_dim_;
      kernels_.scale(o, kv_.head_dim, 1.0f / ws.l[r]);
      std::memcpy(out_.as<float>() + (token + r / group_) * out_.row_stride +
                      static_cast<int64_t>(head * group_ + r % group_) * kv_.head_dim,
                  o, static_cast<size_t>(kv_.head_dim) * sizeof(float));
    }
  }

  const KernelTable& kernels_;
  const Tensor qkv_;
  const StepInputs& in_;
  const AttnArgs& a_;
  const KvView& kv_;
  const Tensor out_;
  const int group_;
  const int v_dim_;
  const bool direct_;  // kernels read the cache where it lies
};

}  // namespace

void CpuBackend::rope_kv_write(Tensor qkv, const StepInputs& in, const RopeArgs& a,
                               const KvView& kv) {
  check_kv(kv);
  const int64_t d = kv.head_dim, heads = qkv.cols() / d - 2 * kv.num_kv_heads;
  check_arg(heads > 0 && qkv.cols() % d == 0, "rope_kv_write: ", qkv.cols(),
            " columns are not (heads + 2 * ", kv.num_kv_heads, ") * ", d);
  check_matrix(qkv, in.num_tokens, qkv.cols(), "rope_kv_write: qkv");
  check_arg(a.cos == nullptr || (a.sin != nullptr && a.rotary_dim > 0 && a.rotary_dim <= d &&
                                 a.rotary_dim % 2 == 0),
            "rope_kv_write: rotary_dim ", a.rotary_dim, " with head_dim ", d);
  check_slots(in, kv);
  const int half = a.rotary_dim / 2;
  const auto bytes = static_cast<int64_t>(dtype_size(kv.dtype));

  const auto prepare = [&](float* head, const NormWeight& w, int64_t position) {
    if (w.weight != nullptr) kernels_.norm(head, nullptr, d, w, {NormKind::rms, a.norm_eps}, head);
    if (a.cos != nullptr)
      kernels_.rotate(head, half, a.cos + position * half, a.sin + position * half);
  };
  pool_.parallel_for(in.num_tokens, row_grain(4 * qkv.cols()), [&](int64_t t, int64_t end, int) {
    for (; t < end; ++t) {
      float* row = qkv.as<float>() + t * qkv.row_stride;
      check_arg(in.positions[t] >= 0, "rope_kv_write: position ", in.positions[t]);
      for (int64_t h = 0; h < heads; ++h) prepare(row + h * d, a.q_norm, in.positions[t]);
      if (in.slot_mapping[t] < 0) continue;
      const int64_t block = in.slot_mapping[t] / kv.block_size;
      const auto slot = static_cast<int32_t>(in.slot_mapping[t] % kv.block_size);
      for (int32_t h = 0; h < kv.num_kv_heads; ++h) {
        float* k = row + (heads + h) * d;
        const float* v = k + kv.num_kv_heads * d;
        prepare(k, a.k_norm, in.positions[t]);
        char* to = static_cast<char*>(kv.k) + kv.k_offset(block, h, slot, 0) * bytes;
        store_strided(kernels_, k, d, kv.dtype, kv.tile(), to);
        kernels_.store_floats(v, d, kv.dtype,
                              static_cast<char*>(kv.v) + kv.v_offset(block, h, slot, 0) * bytes);
      }
    }
  });
}

void CpuBackend::attention(Tensor qkv, const StepInputs& in, const AttnArgs& a, const KvView& kv,
                           Tensor out) {
  check_kv(kv);
  check_arg(a.softcap == 0, "attention: no soft cap on CPUs yet");
  const int32_t kv_heads = kv.num_kv_heads;
  check_arg(a.num_heads > 0 && a.num_heads % kv_heads == 0, "attention: ", a.num_heads,
            " heads over ", kv_heads, " KV heads");
  const int64_t d = kv.head_dim, v_dim = round_up(d, 16);
  check_matrix(qkv, in.num_tokens, (a.num_heads + 2 * kv_heads) * d, "attention: qkv");
  check_matrix(out, in.num_tokens, a.num_heads * d, "attention: out");
  check_sequences(in, a, kv);

  const int32_t group = a.num_heads / kv_heads;
  const auto tokens = static_cast<int32_t>(std::max<int64_t>(1, kItemRows / group));
  const int64_t rows = static_cast<int64_t>(tokens) * group;
  int32_t longest = 0;
  for (int32_t s = 0; s < in.num_seqs; ++s)
    longest = std::max(longest, in.cu_seqlens_q[s + 1] - in.cu_seqlens_q[s]);
  const int64_t blocks = (longest + tokens - 1) / tokens;

  const int64_t workspace = Workspace::floats(rows, d, v_dim) * static_cast<int64_t>(sizeof(float));
  char* memory = scratch(static_cast<size_t>(workspace * pool_.size()));
  const AttentionItem item(kernels_, qkv, in, a, kv, out);
  pool_.parallel_items(in.num_seqs * blocks * kv_heads, [&](int64_t i, int worker) {
    const auto head = static_cast<int32_t>(i % kv_heads);
    const auto first = static_cast<int32_t>(i / kv_heads % blocks) * tokens;
    const auto seq = static_cast<int32_t>(i / kv_heads / blocks);
    const int32_t count = std::min(tokens, in.cu_seqlens_q[seq + 1] - in.cu_seqlens_q[seq] - first);
    if (count <= 0 || in.context_lens[seq] == 0) return;
    Workspace ws(memory + worker * workspace, rows, d, v_dim);
    item.run(seq, head, first, count, ws);
  });
}

void CpuBackend::copy_blocks(const StepInputs& in, const KvView& kv) {
  check_kv(kv);
  const size_t element = dtype_size(kv.dtype);
  const size_t bytes = static_cast<size_t>(kv.block_elements()) * element;
  const auto at = [&](void* cache, int32_t block) {
    return static_cast<char*>(cache) + static_cast<size_t>(kv.head_offset(block, 0)) * element;
  };
  for (int32_t i = 0; i < in.num_copies; ++i) {
    const auto [src, dst] = in.copies[i];
    check_arg(src >= 0 && src < kv.num_blocks && dst >= 0 && dst < kv.num_blocks && src != dst,
              "copy_blocks: ", src, " -> ", dst, " with ", kv.num_blocks, " blocks");
    for (void* cache : {kv.k, kv.v}) std::memcpy(at(cache, dst), at(cache, src), bytes);
  }
}

}  // namespace ni
