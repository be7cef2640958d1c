// What a request asks of the sampler. Names and meanings follow vLLM's SamplingParams. Stop strings
// are text and therefore Python's business.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/step_inputs.h"

namespace ni {

struct SamplingParams {
  int n = 1;                        // choices; they share the prompt's blocks
  float temperature = 1.0f;         // 0: greedy
  float top_p = 1.0f;               // (0, 1]
  int top_k = 0;                    // 0 or -1: off
  float min_p = 0.0f;               // [0, 1]
  float repetition_penalty = 1.0f;  // > 0
  float presence_penalty = 0.0f;    // [-2, 2]
  float frequency_penalty = 0.0f;   // [-2, 2]
  uint64_t seed = 0;
  int max_tokens = -1;  // -1: as many as fit (max_model_len and the cache)
  int min_tokens = 0;   // no end-of-sequence or stop token before
  bool ignore_eos = false;
  std::vector<int32_t> stop_token_ids;
  std::vector<TokenBias> logit_bias;
  std::vector<std::vector<int32_t>> bad_words;  // token sequences that must not be completed
  std::vector<int32_t> allowed_token_ids;       // empty: all
  int logprobs = -1;         // -1: none; 0: of the chosen token; n: and of the n most likely
  int prompt_logprobs = -1;  // the same for the prompt's tokens (the first has none)
};

struct Request {
  uint64_t id = 0;
  std::vector<int32_t> prompt;
  SamplingParams params;
  int priority = 0;        // smaller runs earlier, under the priority policy
  std::string cache_salt;  // requests with different salts never share cached blocks
};

}  // namespace ni
