// The step trace: what every step did and why, in a ring of bounded size. The engine thread writes,
// anybody reads. Records of a run can be replayed: with `blocks` of each entry the block tables at
// any step follow.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "engine/scheduler.h"

namespace ni {

struct StepRecord {
  struct Entry {
    uint64_t request_id = 0;
    int choice = 0;
    int num_query = 0;    // rows of this step
    int context_len = 0;  // tokens in the cache after it
    int num_samples = 0;
    bool is_decode = false;
    int first_block = 0;  // index in its block table of blocks[0]
    std::vector<int32_t>
        blocks;  // all when it was admitted, resumed or forked; else those written to
  };
  struct Finished {
    uint64_t request_id = 0;
    int choice = 0;
    FinishReason reason = FinishReason::none;
  };
  uint64_t step = 0;                        // counts from 1
  double start_time = 0.0, end_time = 0.0;  // seconds, steady clock
  bool failed = false;
  int num_tokens = 0, num_decodes = 0;
  int num_running = 0, num_waiting = 0;  // sequences, after the step
  int blocks_free = 0, blocks_cached = 0, blocks_used = 0;
  std::vector<Entry> entries;
  std::vector<StepPlan::Event> admitted, resumed, preempted;
  std::vector<BlockCopy> copies;
  std::vector<Finished> finished;  // by this step, or aborted since the record before
};

class Trace {
 public:
  explicit Trace(size_t capacity) : ring_(capacity) {}
  bool enabled() const { return !ring_.empty(); }

  // The record that the next push() stores; its vectors keep their capacity.
  StepRecord& scratch() { return scratch_; }
  void push();
  // Records with step >= since, oldest first.
  std::vector<StepRecord> read(uint64_t since) const;

 private:
  mutable std::mutex mutex_;
  std::vector<StepRecord> ring_;
  StepRecord scratch_;
  size_t next_ = 0;
  size_t size_ = 0;
};

}  // namespace ni
