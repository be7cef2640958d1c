// Promise 12: the trace of a known workload is the schedule that follows from the rules, and the
// block tables can be replayed from it. Promise 5: bounds on decode stall, read from the trace.
#include "engine/trace.h"

#include <gtest/gtest.h>

#include <random>

#include "engine_helpers.h"

namespace ni {
namespace {

// A record in words: "id.choice:rows>context" of each entry, D for decodes, * with samples.
std::string describe(const StepRecord& r) {
  std::string out;
  const auto events = [&out](const char* what, const std::vector<StepPlan::Event>& list) {
    for (const auto& e : list) out += concat(what, e.request_id, ".", e.choice, " ");
  };
  events("admit ", r.admitted);
  events("resume ", r.resumed);
  events("preempt ", r.preempted);
  out += "|";
  for (const StepRecord::Entry& e : r.entries)
    out += concat(" ", e.is_decode ? "D" : "", e.request_id, ".", e.choice, ":", e.num_query, ">",
                  e.context_len, e.num_samples > 0 ? "*" : "",
                  e.num_samples > 1 ? std::to_string(e.num_samples) : "");
  for (const BlockCopy& c : r.copies) out += concat(" copy ", c.src, ">", c.dst);
  for (const auto& f : r.finished)
    out += concat(" end ", f.request_id, ".", f.choice, "=", finish_reason_name(f.reason));
  return out;
}

EngineConfig trace_config() {
  EngineConfig c = tiny_config();
  c.block_size = 4;
  c.num_blocks = 100;
  c.max_num_seqs = 4;
  c.max_num_batched_tokens = 10;
  return c;
}

TEST(Trace, OfAKnownWorkloadIsTheExpectedSchedule) {
  const std::unique_ptr<Engine> engine = make_engine(trace_config());
  engine->submit(make_request(1, random_prompt(1, 6), 6));
  Request forked = make_request(2, random_prompt(2, 9), 3);
  forked.params.n = 2;
  engine->submit(forked);
  engine->submit(make_request(3, random_prompt(3, 12), 9));
  for (int i = 0; i < 4; ++i) engine->step();
  engine->submit(make_request(4, random_prompt(4, 3), 2));
  engine->abort(3, -1, FinishReason::abort);
  run_all(*engine);

  std::vector<std::string> lines;
  for (const StepRecord& r : engine->trace(0)) lines.push_back(describe(r));
  // Ten rows a step, decodes first, then prompts in order of arrival. Request 2 takes two seats.
  const std::vector<std::string> expected = {
      "admit 1.0 admit 2.0 | 1.0:6>6* 2.0:4>4",
      // Request 3 has its seat (1 + 2 + 1) but only four rows are left.
      "admit 3.0 | D1.0:1>7* 2.0:5>9*2 3.0:4>4",
      // Both choices of request 2 write into the block that holds its ninth token: one copies.
      "| D1.0:1>8* D2.0:1>10* D2.1:1>10* 3.0:7>11 copy 4>6",
      "| D1.0:1>9* D2.0:1>11* D2.1:1>11* 3.0:1>12* end 2.0=length end 2.1=length",
      // The abort came between two steps.
      "admit 4.0 | D1.0:1>10* 4.0:3>3* end 3.0=abort",
      "| D1.0:1>11* D4.0:1>4* end 1.0=length end 4.0=length"};
  ASSERT_EQ(lines.size(), expected.size());
  for (size_t i = 0; i < lines.size(); ++i) {
    // Which blocks are copied is the block manager's business.
    const auto cut = [](std::string line) {
      const size_t at = line.find(" copy ");
      if (at == std::string::npos) return line;
      const size_t end = line.find(" end", at);
      return line.substr(0, at + 5) + (end == std::string::npos ? "" : line.substr(end));
    };
    EXPECT_EQ(cut(lines[i]), cut(expected[i])) << "step " << i + 1;
  }
  const std::vector<StepRecord> records = engine->trace(0);
  for (size_t i = 0; i < records.size(); ++i) {
    const StepRecord& r = records[i];
    EXPECT_EQ(r.step, i + 1);
    EXPECT_FALSE(r.failed);
    EXPECT_LE(r.start_time, r.end_time);
    if (i > 0) {
      EXPECT_LE(records[i - 1].end_time, r.start_time);
    }
    int rows = 0, decodes = 0;
    for (const StepRecord::Entry& e : r.entries) {
      rows += e.num_query;
      decodes += e.is_decode;
    }
    EXPECT_EQ(r.num_tokens, rows);
    EXPECT_EQ(r.num_decodes, decodes);
    EXPECT_EQ(r.blocks_free + r.blocks_cached + r.blocks_used, 100);
  }
  EXPECT_EQ(records[3].num_running, 2);  // 1 and 3
  EXPECT_EQ(records.back().num_running, 0);
  EXPECT_EQ(records.back().blocks_used, 0);
}

TEST(Trace, ShowsPreemptionAndResumption) {
  EngineConfig config = trace_config();
  config.num_blocks = 6;  // 24 slots
  config.enable_prefix_caching = false;
  const std::unique_ptr<Engine> engine = make_engine(config);
  engine->submit(make_request(1, random_prompt(1, 7), 9));
  engine->submit(make_request(2, random_prompt(2, 3), 12));
  run_all(*engine);
  std::vector<std::string> lines;
  for (const StepRecord& r : engine->trace(0)) lines.push_back(describe(r));
  // Sequence 1 needs 4 blocks from its 13th slot on, sequence 2 needs 3 from its 9th on: together
  // 7 in step 7 and more than there are. 2 is newer and gives way until 1 has ended.
  const std::vector<std::string> expected = {"admit 1.0 admit 2.0 | 1.0:7>7* 2.0:3>3*",
                                             "| D1.0:1>8* D2.0:1>4*",
                                             "| D1.0:1>9* D2.0:1>5*",
                                             "| D1.0:1>10* D2.0:1>6*",
                                             "| D1.0:1>11* D2.0:1>7*",
                                             "| D1.0:1>12* D2.0:1>8*",
                                             "preempt 2.0 | D1.0:1>13*",
                                             "| D1.0:1>14*",
                                             "| D1.0:1>15* end 1.0=length",
                                             "resume 2.0 | 2.0:9>9*",
                                             "| D2.0:1>10*",
                                             "| D2.0:1>11*",
                                             "| D2.0:1>12*",
                                             "| D2.0:1>13*",
                                             "| D2.0:1>14* end 2.0=length"};
  EXPECT_EQ(lines, expected);
}

// What a reader of the trace does: block tables from the records alone.
class Replay {
 public:
  void apply(const StepRecord& r) {
    for (const StepPlan::Event& e : r.preempted) tables_.erase({e.request_id, e.choice});
    for (const StepRecord::Entry& e : r.entries) {
      if (e.in_vain) continue;
      std::vector<int32_t>& table = tables_[{e.request_id, e.choice}];
      ASSERT_LE(static_cast<size_t>(e.first_block), table.size()) << "a gap in the table";
      table.resize(static_cast<size_t>(e.first_block));
      const auto blocks = r.blocks_of(e);
      table.insert(table.end(), blocks.begin(), blocks.end());
    }
    for (const auto& f : r.finished) tables_.erase({f.request_id, f.choice});
  }
  const std::map<std::pair<uint64_t, int>, std::vector<int32_t>>& tables() const { return tables_; }

 private:
  std::map<std::pair<uint64_t, int>, std::vector<int32_t>> tables_;
};

TEST(Trace, BlockTablesFollowFromTheRecords) {
  EngineConfig config = trace_config();
  config.num_blocks = 22;
  config.max_model_len = 60;
  const std::unique_ptr<Engine> engine = make_engine(config);
  std::mt19937_64 random(4);
  Replay replay;
  uint64_t seen = 0, id = 0;
  size_t compared = 0, preempted = 0, copies = 0, hits = 0;
  for (int step = 0; step < 400; ++step) {
    if (step < 350 && random() % 4 == 0) {
      Request r =
          make_request(++id, random_prompt(random() % 3, 1 + static_cast<int>(random() % 30)),
                       1 + static_cast<int>(random() % 25));
      r.params.n = 1 + static_cast<int>(random() % 2);
      r.params.temperature = 1.0f;
      engine->submit(r);
    }
    if (random() % 16 == 0) engine->abort(1 + random() % (id + 1), -1, FinishReason::abort);
    engine->step();
    const std::vector<StepRecord> records = engine->trace(seen + 1);
    for (const StepRecord& r : records) {
      replay.apply(r);
      if (HasFatalFailure()) return;
      seen = r.step;
      preempted += r.preempted.size();
      copies += r.copies.size();
    }
    if (records.empty()) continue;  // only an abort
    for (const StepRecord::Entry& e : records.back().entries) {
      const Sequence* seq = engine->scheduler().find(e.request_id, e.choice);
      const auto found = replay.tables().find({e.request_id, e.choice});
      if (seq == nullptr) {
        EXPECT_EQ(found, replay.tables().end());
        continue;
      }
      ASSERT_NE(found, replay.tables().end());
      EXPECT_EQ(found->second, seq->block_table) << "step " << seen;
      ++compared;
      hits += seq->num_cached > 0;
    }
  }
  run_all(*engine);
  for (const StepRecord& r : engine->trace(seen + 1)) replay.apply(r);
  EXPECT_TRUE(replay.tables().empty());
  EXPECT_GT(compared, 300u);
  EXPECT_GT(preempted, 5u);
  EXPECT_GT(copies, 5u);
  EXPECT_GT(hits, 5u);
}

// With overlap, too: one record a step, in order, whose rows in vain are marked. The tables are
// those of the step, and the engine may be one step ahead: compared are the blocks that were full.
TEST(Trace, CanBeReplayedWithOverlap) {
  EngineConfig config = trace_config();
  config.num_blocks = 22;
  config.max_model_len = 60;
  config.overlap = true;
  config.eos_token_ids = {0, 7, 9, 12, 33, 90};
  const std::unique_ptr<Engine> engine = make_engine(config);
  std::mt19937_64 random(4);
  Replay replay;
  uint64_t seen = 0, id = 0;
  size_t compared = 0, preempted = 0, in_vain = 0;
  const auto replay_new = [&] {
    std::vector<StepRecord> records = engine->trace(seen + 1);
    for (const StepRecord& r : records) {
      replay.apply(r);
      EXPECT_EQ(r.step, seen + 1);
      EXPECT_LE(r.start_time, r.end_time);
      seen = r.step;
      preempted += r.preempted.size();
      for (const StepRecord::Entry& e : r.entries) in_vain += e.in_vain;
    }
    return records;
  };
  for (int step = 0; step < 400; ++step) {
    if (step < 350 && random() % 4 == 0) {
      Request r =
          make_request(++id, random_prompt(random() % 3, 1 + static_cast<int>(random() % 30)),
                       1 + static_cast<int>(random() % 25));
      r.params.n = 1 + static_cast<int>(random() % 8 == 0);
      r.params.temperature = 1.0f;
      r.params.ignore_eos = false;
      r.params.seed = id;
      engine->submit(r);
    }
    if (random() % 16 == 0) engine->abort(1 + random() % (id + 1), -1, FinishReason::abort);
    engine->step();
    const std::vector<StepRecord> records = replay_new();
    if (HasFatalFailure()) return;
    if (records.empty()) continue;
    for (const StepRecord::Entry& e : records.back().entries) {
      const Sequence* seq = engine->scheduler().find(e.request_id, e.choice);
      if (seq == nullptr || seq->status != SequenceStatus::running || e.in_vain) continue;
      const auto full = static_cast<ptrdiff_t>(e.context_len / 4);
      const std::vector<int32_t>& table = replay.tables().at({e.request_id, e.choice});
      ASSERT_GE(static_cast<ptrdiff_t>(table.size()), full);
      EXPECT_TRUE(std::equal(table.begin(), table.begin() + full, seq->block_table.begin()));
      ++compared;
    }
  }
  run_all(*engine);
  replay_new();
  EXPECT_TRUE(replay.tables().empty());
  EXPECT_EQ(seen, engine->stats().steps);
  EXPECT_GT(compared, 200u);
  EXPECT_GT(preempted, 3u);
  EXPECT_GT(in_vain, 5u);
}

TEST(Trace, IsARingOfBoundedSize) {
  EngineConfig config = trace_config();
  config.trace_capacity = 5;
  const std::unique_ptr<Engine> engine = make_engine(config);
  engine->submit(make_request(1, random_prompt(1, 8), 20));
  run_all(*engine);
  std::vector<uint64_t> steps;
  for (const StepRecord& r : engine->trace(0)) steps.push_back(r.step);
  EXPECT_EQ(steps, (std::vector<uint64_t>{16, 17, 18, 19, 20}));
  EXPECT_EQ(engine->trace(19).size(), 2u);
  EXPECT_TRUE(engine->trace(21).empty());
  config.trace_capacity = 0;
  const std::unique_ptr<Engine> silent = make_engine(config);
  silent->submit(make_request(1, random_prompt(1, 8), 3));
  run_all(*silent);
  EXPECT_TRUE(silent->trace(0).empty());
}

TEST(Trace, MarksAStepThatFailed) {
  int calls = 0;
  const std::unique_ptr<Engine> engine =
      make_engine(trace_config(), std::make_unique<HookedBackend>([&](std::string_view op) {
                    if (op == "embed" && ++calls == 2) throw std::runtime_error("broken");
                  }));
  engine->submit(make_request(1, random_prompt(1, 8), 3));
  run_all(*engine);
  const std::vector<StepRecord> records = engine->trace(0);
  ASSERT_EQ(records.size(), 2u);
  EXPECT_FALSE(records[0].failed);
  EXPECT_TRUE(records[1].failed);
  EXPECT_EQ(describe(records[1]), "| D1.0:1>9* end 1.0=error");
  EXPECT_EQ(records[1].blocks_used, 0);
}

// -- Promise 5 --------------------------------------------------------------------------------

// Steps from one token of each sequence to its next, the largest.
std::map<uint64_t, uint64_t> largest_gaps(const std::vector<StepRecord>& records) {
  std::map<uint64_t, uint64_t> last, gaps;
  for (const StepRecord& r : records)
    for (const StepRecord::Entry& e : r.entries) {
      if (e.num_samples == 0) continue;
      const auto found = last.find(e.request_id);
      if (found != last.end())
        gaps[e.request_id] = std::max(gaps[e.request_id], r.step - found->second);
      last[e.request_id] = r.step;
    }
  return gaps;
}

class DecodeStall : public ::testing::TestWithParam<bool> {};  // with overlap

TEST_P(DecodeStall, ARunningSequenceGetsATokenInEveryStepWhateverArrives) {
  EngineConfig config = tiny_config();
  config.max_num_seqs = 8;
  config.max_num_batched_tokens = 16;
  config.overlap = GetParam();
  const std::unique_ptr<Engine> engine = make_engine(config);
  engine->submit(make_request(1, random_prompt(1, 10), 100));
  engine->submit(make_request(2, random_prompt(2, 30), 80));
  uint64_t id = 2;
  const auto arrive = [&](int step) {
    if (step % 2 == 0 || step > 90) return;
    ++id;
    engine->submit(make_request(id, random_prompt(id, 200), 3));
  };
  run_all(*engine, arrive);
  const std::vector<StepRecord> records = engine->trace(0);
  for (const auto& [request, gap] : largest_gaps(records)) EXPECT_EQ(gap, 1u) << request;
  // And a step is never longer than its budget; while prompts wait it is used up.
  for (const StepRecord& r : records) EXPECT_LE(r.num_tokens, 16);
  for (size_t i = 10; i < 80; ++i) EXPECT_EQ(records[i].num_tokens, 16) << i;
}

// The bound of scheduler.h for preempted sequences under fcfs.
TEST_P(DecodeStall, WithPreemptionTheDocumentedBoundHolds) {
  EngineConfig config = tiny_config();
  config.overlap = GetParam();
  config.block_size = 4;
  config.num_blocks = 40;
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 12;
  config.enable_prefix_caching = false;
  const std::unique_ptr<Engine> engine = make_engine(config);
  const int rows = 12 - 4 + 1;
  std::map<uint64_t, int> before;  // the bound without the sequence's own tokens
  std::mt19937_64 random(1);
  int sum = 0;
  for (uint64_t id = 1; id <= 24; ++id) {
    const int prompt = 1 + static_cast<int>(random() % 60),
              out = 20 + static_cast<int>(random() % 60);
    before[id] = sum;
    sum += (prompt + out + rows - 1) / rows + out + GetParam();
    engine->submit(make_request(id, random_prompt(id, prompt), out));
  }
  run_all(*engine);
  EXPECT_GT(engine->stats().preemptions, 10u);
  const auto gaps = largest_gaps(engine->trace(0));
  uint64_t largest = 0;
  for (const auto& [id, gap] : gaps) {
    EXPECT_LE(gap, static_cast<uint64_t>(before[id] + (140 + rows - 1) / rows)) << id;
    largest = std::max(largest, gap);
  }
  EXPECT_GT(largest, 1u);     // somebody did wait
  EXPECT_EQ(gaps.at(1), 1u);  // but never the first
}

INSTANTIATE_TEST_SUITE_P(Overlap, DecodeStall, ::testing::Bool());

}  // namespace
}  // namespace ni
