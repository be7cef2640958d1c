// Cuts attention into the work lists of StepInputs, for backends that ask for them.
#pragma once

#include <algorithm>
#include <vector>

#include "core/step_inputs.h"

namespace ni {

// Refills both lists (they keep their capacity, nothing else is allocated). The tiling's
// kv_chunk is above 0.
//
// decode: for each sequence of 1 to decode_rows query rows, one item a chunk of its context,
// ascending; or one item of index -1 where listing all its chunks would leave no room, within
// max_items, for one item of each sequence after it.
// prefill: tiles of q_tile query rows of the others; the tile that sees the latest position first,
// ties in the order of sequences and tiles.
inline void build_attn_items(const int32_t* cu_seqlens_q, const int32_t* context_lens,
                             int32_t num_seqs, const AttnTiling& tiling,
                             std::vector<AttnItem>& decode, std::vector<AttnItem>& prefill) {
  decode.clear();
  prefill.clear();
  const auto query_len = [&](int32_t s) { return cu_seqlens_q[s + 1] - cu_seqlens_q[s]; };
  const auto is_decode = [&](int32_t s) {
    return query_len(s) > 0 && query_len(s) <= tiling.decode_rows && context_lens[s] > 0;
  };
  int64_t waiting = 0;  // decode sequences that are not listed yet
  for (int32_t s = 0; s < num_seqs; ++s) waiting += is_decode(s);
  for (int32_t s = 0; s < num_seqs; ++s) {
    if (is_decode(s)) {
      --waiting;
      const int32_t chunks = (context_lens[s] + tiling.kv_chunk - 1) / tiling.kv_chunk;
      if (static_cast<int64_t>(decode.size()) + chunks + waiting > tiling.max_items) {
        decode.push_back({s, -1});
      } else {
        for (int32_t i = 0; i < chunks; ++i) decode.push_back({s, i});
      }
    } else if (query_len(s) > tiling.decode_rows && context_lens[s] > 0) {
      for (int32_t i = 0; i * tiling.q_tile < query_len(s); ++i) prefill.push_back({s, i});
    }
  }
  const auto last_position = [&](const AttnItem& item) {
    const int32_t rows = query_len(item.seq);
    return context_lens[item.seq] - rows + std::min((item.index + 1) * tiling.q_tile, rows) - 1;
  };
  std::sort(prefill.begin(), prefill.end(), [&](const AttnItem& a, const AttnItem& b) {
    const int32_t last_a = last_position(a), last_b = last_position(b);
    if (last_a != last_b) return last_a > last_b;
    return a.seq != b.seq ? a.seq < b.seq : a.index < b.index;
  });
}

}  // namespace ni
