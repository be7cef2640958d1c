// One choice of one request while the engine works on it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/sampling_params.h"

namespace ni {

enum class SequenceStatus : uint8_t { waiting, running, finished };
enum class FinishReason : uint8_t { none, stop, length, abort, error };

inline const char* finish_reason_name(FinishReason r) {
  constexpr const char* kNames[] = {"", "stop", "length", "abort", "error"};
  return kNames[static_cast<size_t>(r)];
}

struct Sequence {
  std::shared_ptr<const Request> request;
  int choice = 0;
  uint64_t arrival = 0;  // order of arrival, kept over preemption
  SequenceStatus status = SequenceStatus::waiting;
  FinishReason finish_reason = FinishReason::none;
  int32_t stop_token = -1;  // the stop token that ended it; -1: none or end-of-sequence

  std::vector<int32_t> tokens;  // prompt, then output
  int num_prompt = 0;
  int num_computed = 0;       // leading tokens whose K and V are in the cache
  int num_cached = 0;         // of these, found in the prefix cache at first admission
  int max_tokens = 0;         // output limit after clamping
  int num_prompt_scored = 0;  // prompt tokens whose log-probabilities were delivered
  int preemptions = 0;
  int traced_run = -1;  // value of `preemptions` when the trace last took its whole block table
  bool forks = false;   // leader of n > 1 choices, before its prompt is computed

  // Guesses for the next tokens (speculation). The step verifies them: it computes their rows too,
  // keeps the longest prefix that equals what is sampled and drops the other slots again. Because a
  // draw is keyed by (seed, choice, position), the output is the same with and without drafts.
  std::vector<int32_t> draft_tokens;

  // Owned by the BlockManager.
  std::vector<int32_t> block_table;
  int num_committed_blocks = 0;  // leading blocks whose contents the prefix cache knows
  uint64_t committed_id = 0;     // identity of the last of them (0: none)
  uint64_t committed_hash = 0;   // its chained hash

  int num_tokens() const { return static_cast<int>(tokens.size()); }
  int num_output() const { return num_tokens() - num_prompt; }
  // Tokens not yet in the cache; 1 while decoding.
  int num_pending() const { return num_tokens() - num_computed; }
};

}  // namespace ni
