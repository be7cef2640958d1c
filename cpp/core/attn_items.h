// Cuts attention into the work lists of StepInputs, for backends that ask for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/step_inputs.h"

namespace ni {

// Marks, by the index -1, sequences that are not to be cut: the shortest, so that no chunk waits
// for long. items: one a sequence, in `index` how many chunks it has; so many as in the end are
// listed.
inline void leave_short_ones_whole(std::vector<AttnItem>& items, int32_t max_items) {
  std::sort(items.begin(), items.end(), [](const AttnItem& a, const AttnItem& b) {
    return a.index != b.index ? a.index > b.index : a.seq < b.seq;
  });
  int64_t room = max_items - static_cast<int64_t>(items.size());  // beyond one item a sequence
  for (AttnItem& item : items) {
    if (item.index - 1 <= room) {
      room -= item.index - 1;
    } else {
      item.index = -1;
    }
  }
  std::sort(items.begin(), items.end(),
            [](const AttnItem& a, const AttnItem& b) { return a.seq < b.seq; });
}

struct AttnLists {
  std::vector<AttnItem> decode, prefill;
  std::vector<DecodeCut> cuts;
};

// Where tiling.decode_ranges ranges of the items begin, and the last one ends: each has the same
// share of the work. items: as build_attn_items() lists them, none of them a whole sequence.
inline void cut_decode_items(const std::vector<AttnItem>& items, const int32_t* context_lens,
                             const AttnTiling& tiling, std::vector<DecodeCut>& cuts) {
  const auto work = [&](int32_t seq) {
    const int64_t context = context_lens[seq];
    return context + (context + tiling.kv_chunk - 1) / tiling.kv_chunk * tiling.item_cost;
  };
  const int64_t count = tiling.decode_ranges;
  int64_t total = 0, before = 0;  // of all and of earlier sequences
  for (const AttnItem& item : items) total += item.index == 0 ? work(item.seq) : 0;
  size_t first = 0;  // item of the present sequence
  for (int64_t range = 0; range < count; ++range) {
    const int64_t begin = total * range;  // and all below times `count`
    while ((before + work(items[first].seq)) * count <= begin) {
      before += work(items[first].seq);
      do ++first;
      while (items[first].index != 0);
    }
    // Rounded up: not into the chunk before.
    const int64_t whole = work(items[first].seq) * count;
    const int64_t part = (((begin - before * count) << 32) + whole - 1) / whole;
    cuts.push_back({static_cast<int32_t>(first), context_lens[items[first].seq],
                    static_cast<uint32_t>(std::min<int64_t>(part, UINT32_MAX))});
  }
  cuts.push_back({static_cast<int32_t>(items.size()), 1, 0});
}

// Refills the lists (they keep their capacity, nothing else is allocated), and in `in` what
// StepInputs says of them but their addresses. The tiling's kv_chunk is above 0.
//
// decode: for each sequence of 1 to decode_rows query rows, one item a chunk of its context,
// ascending. Where these would be more than most_items(), the longest sequences are cut that can be
// with room for one item, of index -1, of each of the others.
// prefill: tiles of q_tile query rows of the others; the tile that sees the latest position first,
// ties in the order of sequences and tiles.
// cuts: see StepInputs.
inline void build_attn_items(const int32_t* cu_seqlens_q, const int32_t* context_lens,
                             int32_t num_seqs, const AttnTiling& tiling, AttnLists& lists,
                             StepInputs& in) {
  auto& [decode, prefill, cuts] = lists;
  decode.clear();
  prefill.clear();
  cuts.clear();
  const auto query_len = [&](int32_t s) { return cu_seqlens_q[s + 1] - cu_seqlens_q[s]; };
  int64_t chunks = 0;
  in.max_decode_query_len = in.max_decode_chunks = 0;
  for (int32_t s = 0; s < num_seqs; ++s) {
    if (query_len(s) <= 0 || context_lens[s] <= 0) continue;
    if (query_len(s) <= tiling.decode_rows) {
      in.max_decode_query_len = std::max(in.max_decode_query_len, query_len(s));
      decode.push_back({s, (context_lens[s] + tiling.kv_chunk - 1) / tiling.kv_chunk});
      chunks += decode.back().index;
      in.max_decode_chunks = std::max(in.max_decode_chunks, decode.back().index);
    } else {
      for (int32_t i = 0; i * tiling.q_tile < query_len(s); ++i) prefill.push_back({s, i});
    }
  }
  const int32_t most = tiling.most_items(in.max_decode_query_len);
  if (chunks > most) leave_short_ones_whole(decode, most);
  in.num_whole_items = static_cast<int32_t>(std::count_if(
      decode.begin(), decode.end(), [](const AttnItem& item) { return item.index < 0; }));
  // From an item a sequence to an item a chunk, in place and so from the end.
  size_t from = decode.size(), to = 0;
  for (const AttnItem& item : decode) to += static_cast<size_t>(std::max(item.index, 1));
  decode.resize(to);
  while (from > 0) {
    const AttnItem item = decode[--from];
    for (int32_t i = item.index; i > 1; --i) decode[--to] = {item.seq, i - 1};
    decode[--to] = {item.seq, std::min(item.index, 0)};
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
  in.num_decode_items = static_cast<int32_t>(decode.size());
  in.num_prefill_items = static_cast<int32_t>(prefill.size());
  in.num_decode_ranges = 0;
  if (tiling.decode_ranges > 0 && in.num_whole_items == 0 && !decode.empty()) {
    in.num_decode_ranges = tiling.decode_ranges;
    cut_decode_items(decode, context_lens, tiling, cuts);
  }
}

}  // namespace ni
