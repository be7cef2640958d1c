// Scheduler and block manager on their own: for study, tests and benchmarks without a model.
#include "engine/scheduler.h"

#include <algorithm>
#include <map>

#include "bindings.h"

namespace ni::python {
namespace {

void bind_sampling_params(py::module_& m) {
  py::class_<SamplingParams> c(m, "SamplingParams");
  c.def_readwrite("n", &SamplingParams::n)
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("max_tokens", &SamplingParams::max_tokens)
      .def_readwrite("min_tokens", &SamplingParams::min_tokens)
      .def_readwrite("ignore_eos", &SamplingParams::ignore_eos)
      .def_readwrite("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_readwrite("bad_words", &SamplingParams::bad_words)
      .def_readwrite("allowed_token_ids", &SamplingParams::allowed_token_ids)
      .def_readwrite("logprobs", &SamplingParams::logprobs)
      .def_readwrite("prompt_logprobs", &SamplingParams::prompt_logprobs)
      .def_property(
          "logit_bias",
          [](const SamplingParams& p) {
            py::dict d;
            for (const TokenBias& b : p.logit_bias) d[py::int_(b.token)] = b.bias;
            return d;
          },
          [](SamplingParams& p, const std::map<int32_t, float>& biases) {
            p.logit_bias.clear();
            for (const auto& [token, bias] : biases) p.logit_bias.push_back({token, bias});
          });
  def_keyword_init<SamplingParams>(c);
}

// Python may change a sequence, or bring one that another manager knows: whatever is used as an
// index is checked before the manager sees it.
Sequence& checked(const BlockManager& blocks, Sequence& seq) {
  const auto held = static_cast<int64_t>(seq.block_table.size());
  const int64_t most = std::min<int64_t>(seq.num_tokens(), held * blocks.block_size());
  check_arg(seq.num_computed >= 0 && seq.num_computed <= most, "num_computed must be in [0, ", most,
            "] (tokens that have a slot), got ", seq.num_computed);
  check_arg(seq.num_committed_blocks <= held, "the sequence has committed blocks that it lost");
  for (const int32_t b : seq.block_table)
    check_arg(b < blocks.num_blocks() && blocks.ref_count(b) > 0, "the sequence holds block ", b,
              ", which this manager did not give to it");
  return seq;
}

int not_negative(int num_tokens) {
  check_arg(num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
  return num_tokens;
}

void bind_block_manager(py::module_& m) {
  py::class_<Sequence>(m, "Sequence")
      .def(py::init([](std::vector<int32_t> tokens, const std::string& cache_salt) {
             auto request = std::make_shared<Request>();
             request->prompt = tokens;
             request->cache_salt = cache_salt;
             auto seq = std::make_unique<Sequence>();
             seq->request = request;
             seq->num_prompt = static_cast<int>(tokens.size());
             seq->tokens = std::move(tokens);
             return seq;
           }),
           py::arg("tokens"), py::arg("cache_salt") = "")
      .def_readwrite("tokens", &Sequence::tokens)
      .def_readwrite("num_computed", &Sequence::num_computed)
      .def_readonly("block_table", &Sequence::block_table)
      .def_readonly("num_cached", &Sequence::num_cached);

  py::class_<BlockManager>(m, "BlockManager")
      .def(py::init([](int num_blocks, int block_size, bool enable_prefix_caching) {
             BlockManagerConfig config;
             config.num_blocks = num_blocks;
             config.block_size = block_size;
             config.enable_prefix_caching = enable_prefix_caching;
             return std::make_unique<BlockManager>(config);
           }),
           py::arg("num_blocks"), py::arg("block_size") = 16,
           py::arg("enable_prefix_caching") = true)
      .def_property_readonly("block_size", &BlockManager::block_size)
      .def_property_readonly("num_blocks", &BlockManager::num_blocks)
      .def_property_readonly("num_available", &BlockManager::num_available)
      .def("lookup_prefix", &BlockManager::lookup_prefix, py::arg("seq"))
      .def(
          "take_prefix",
          [](BlockManager& self, Sequence& seq) { return self.take_prefix(checked(self, seq)); },
          py::arg("seq"))
      .def(
          "blocks_needed",
          [](const BlockManager& self, Sequence& seq, int num_tokens) {
            return self.blocks_needed(checked(self, seq), not_negative(num_tokens));
          },
          py::arg("seq"), py::arg("num_tokens"))
      .def(
          "grow",
          [](BlockManager& self, Sequence& seq, int num_tokens) -> py::object {
            std::vector<BlockCopy> copies;
            if (!self.grow(checked(self, seq), not_negative(num_tokens), copies)) return py::none();
            py::list out;
            for (const BlockCopy& c : copies) out.append(py::make_tuple(c.src, c.dst));
            return out;
          },
          py::arg("seq"), py::arg("num_tokens"))
      .def(
          "fork",
          [](BlockManager& self, Sequence& parent, Sequence& child) {
            self.fork(checked(self, parent), checked(self, child));
          },
          py::arg("parent"), py::arg("child"))
      .def(
          "commit", [](BlockManager& self, Sequence& seq) { self.commit(checked(self, seq)); },
          py::arg("seq"))
      .def(
          "shrink",
          [](BlockManager& self, Sequence& seq, int num_tokens) {
            self.shrink(checked(self, seq), not_negative(num_tokens));
          },
          py::arg("seq"), py::arg("num_tokens"))
      .def(
          "free", [](BlockManager& self, Sequence& seq) { self.free(checked(self, seq)); },
          py::arg("seq"))
      .def("reset_prefix_cache", &BlockManager::reset_prefix_cache)
      .def("stats",
           [](const BlockManager& self) {
             const BlockManagerStats s = self.stats();
             py::dict d;
             d["blocks_total"] = s.num_blocks;
             d["blocks_free"] = s.num_free;
             d["blocks_cached"] = s.num_cached;
             d["blocks_used"] = s.num_used;
             d["prefix_queries"] = s.prefix_queries;
             d["prefix_hits"] = s.prefix_hits;
             d["evictions"] = s.evictions;
             d["copies"] = s.copies;
             return d;
           })
      .def("check_invariants", &BlockManager::check_invariants, py::arg("sequences"));
}

py::dict plan_dict(const StepPlan& plan) {
  py::list items, copies;
  for (const ScheduledSequence& item : plan.items) {
    py::dict d;
    d["request_id"] = item.seq->request->id;
    d["choice"] = item.seq->choice;
    d["num_computed"] = item.seq->num_computed;
    d["num_query"] = item.num_query;
    d["num_samples"] = item.num_samples;
    d["is_decode"] = item.is_decode;
    d["block_table"] = item.seq->block_table;
    items.append(d);
  }
  for (const BlockCopy& c : plan.copies) copies.append(py::make_tuple(c.src, c.dst));
  const auto events = [](const std::vector<StepPlan::Event>& list) {
    py::list out;
    for (const StepPlan::Event& e : list) out.append(py::make_tuple(e.request_id, e.choice));
    return out;
  };
  py::dict out;
  out["items"] = items;
  out["copies"] = copies;
  out["num_tokens"] = plan.num_tokens;
  out["num_decodes"] = plan.num_decodes;
  out["num_samples"] = plan.num_samples;
  out["admitted"] = events(plan.admitted);
  out["resumed"] = events(plan.resumed);
  out["preempted"] = events(plan.preempted);
  return out;
}

py::list update_list(const std::vector<SequenceUpdate>& updates) {
  py::list out;
  for (const SequenceUpdate& u : updates) {
    py::dict d;
    d["request_id"] = u.request_id;
    d["choice"] = u.choice;
    d["num_new_tokens"] = u.num_new_tokens;
    d["num_cached"] = u.num_cached;
    d["finish_reason"] = finish_reason_name(u.finish_reason);
    d["request_done"] = u.request_done;
    out.append(d);
  }
  return out;
}

// The scheduler with the plan that it last made: update() needs to know how many samples to expect.
struct StudyScheduler {
  StudyScheduler(const SchedulerConfig& config, BlockManager& blocks)
      : scheduler(config, blocks), vocab_size(config.vocab_size) {}
  Scheduler scheduler;
  int vocab_size;
  int num_samples = 0;
};

}  // namespace

void bind_scheduler(py::module_& m) {
  bind_sampling_params(m);
  bind_block_manager(m);

  py::class_<SchedulerConfig> c(m, "SchedulerConfig");
  c.def_readwrite("max_num_seqs", &SchedulerConfig::max_num_seqs)
      .def_readwrite("max_num_batched_tokens", &SchedulerConfig::max_num_batched_tokens)
      .def_readwrite("max_model_len", &SchedulerConfig::max_model_len)
      .def_readwrite("max_waiting", &SchedulerConfig::max_waiting)
      .def_readwrite("vocab_size", &SchedulerConfig::vocab_size)
      .def_readwrite("max_logprobs", &SchedulerConfig::max_logprobs)
      .def_readwrite("enable_chunked_prefill", &SchedulerConfig::enable_chunked_prefill)
      .def_readwrite("static_batching", &SchedulerConfig::static_batching)
      .def_readwrite("eos_token_ids", &SchedulerConfig::eos_token_ids);
  def_enum(c, "policy", &SchedulerConfig::policy,
           std::array<std::pair<const char*, SchedulingPolicy>, 2>{
               {{"fcfs", SchedulingPolicy::fcfs}, {"priority", SchedulingPolicy::priority}}});
  def_keyword_init<SchedulerConfig>(c);

  py::class_<StudyScheduler>(m, "Scheduler")
      .def(py::init<const SchedulerConfig&, BlockManager&>(), py::arg("config"), py::arg("blocks"),
           py::keep_alive<1, 3>())
      .def(
          "add",
          [](StudyScheduler& self, uint64_t id, std::vector<int32_t> prompt,
             const SamplingParams& params, int priority, const std::string& salt) {
            self.scheduler.add(std::make_shared<const Request>(
                Request{id, std::move(prompt), params, priority, salt}));
          },
          py::arg("request_id"), py::arg("prompt_token_ids"), py::arg("params"),
          py::arg("priority") = 0, py::arg("cache_salt") = "")
      .def(
          "abort",
          [](StudyScheduler& self, uint64_t id, int choice) {
            std::vector<SequenceUpdate> updates;
            self.scheduler.abort(id, choice, FinishReason::abort, updates);
            return update_list(updates);
          },
          py::arg("request_id"), py::arg("choice") = -1)
      .def("has_work", [](const StudyScheduler& self) { return self.scheduler.has_work(); })
      .def("schedule",
           [](StudyScheduler& self) {
             const StepPlan& plan = self.scheduler.schedule();
             self.num_samples = plan.num_samples;
             return plan_dict(plan);
           })
      .def(
          "update",
          [](StudyScheduler& self, const std::vector<int32_t>& samples) {
            check_arg(static_cast<int>(samples.size()) == self.num_samples, "the step samples ",
                      self.num_samples, " tokens, got ", samples.size());
            for (const int32_t token : samples)
              check_arg(token >= 0 && token < self.vocab_size, "token ", token,
                        " is not in the vocabulary of ", self.vocab_size);
            std::vector<SequenceUpdate> updates;
            self.scheduler.update(samples.data(), updates);
            return update_list(updates);
          },
          py::arg("samples"))
      .def("fail",
           [](StudyScheduler& self) {
             std::vector<SequenceUpdate> updates;
             self.scheduler.fail(updates);
             return update_list(updates);
           })
      .def("stats",
           [](const StudyScheduler& self) {
             const SchedulerStats s = self.scheduler.stats();
             py::dict d;
             d["running"] = s.num_running;
             d["waiting"] = s.num_waiting;
             d["running_requests"] = s.num_running_requests;
             d["waiting_requests"] = s.num_waiting_requests;
             d["preemptions"] = s.preemptions;
             return d;
           })
      .def("check_invariants",
           [](const StudyScheduler& self) { self.scheduler.check_invariants(); });
}

}  // namespace ni::python
