#include "engine/engine.h"

#include <limits>

#include "backend/registry.h"
#include "bindings.h"

namespace ni::python {
namespace {

// A row-strided host array of 1 or 2 dimensions. bf16 comes as its bits in uint16.
Tensor weight_view(const py::array& a, DType dtype) {
  check_arg(a.ndim() == 1 || a.ndim() == 2, "a weight has 1 or 2 dimensions, got ", a.ndim());
  const auto item = static_cast<py::ssize_t>(dtype_size(dtype));
  check_arg(a.itemsize() == item, "elements of ", dtype_name(dtype), " have ", item, " bytes, got ",
            a.itemsize());
  const bool is_float = a.dtype().kind() == 'f';
  check_arg(is_float == (dtype != DType::bf16) && a.dtype().byteorder() != '>',
            "an array of numpy type ", py::cast<std::string>(py::str(a.dtype())),
            " does not hold elements of ", dtype_name(dtype));
  check_arg(a.strides(0) % item == 0, "the stride of a weight must be whole elements");
  check_arg(a.ndim() == 1 || a.strides(1) == item || a.shape(1) == 1,
            "the rows of a weight must be contiguous");
  Tensor t;
  t.data = const_cast<void*>(a.data());
  t.dtype = dtype;
  t.rank = static_cast<int>(a.ndim());
  for (int d = 0; d < t.rank; ++d) t.shape[static_cast<size_t>(d)] = a.shape(d);
  t.row_stride = a.strides(0) / item;
  return t;
}

// Prompts may be long, and the card waits meanwhile: arrays of int32 and lists of plain ints are
// not converted piece by piece.
std::vector<int32_t> token_ids(const py::object& ids) {
  std::vector<int32_t> out;
  const auto narrow = [&out](int64_t id) {
    check_arg(
        id >= std::numeric_limits<int32_t>::min() && id <= std::numeric_limits<int32_t>::max(),
        "token id ", id, " at index ", out.size(), " is out of range");
    out.push_back(static_cast<int32_t>(id));
  };
  if (py::isinstance<py::array>(ids)) {
    const auto array = py::reinterpret_borrow<py::array>(ids);
    const char kind = array.dtype().kind();
    check_arg(array.ndim() == 1 && (kind == 'i' || kind == 'u'),
              "token ids must be a one-dimensional array of integers");
    if (py::isinstance<py::array_t<int32_t>>(array)) {
      const auto values = py::cast<py::array_t<int32_t, py::array::c_style>>(array);
      out.assign(values.data(), values.data() + values.size());
      return out;
    }
    for (const int64_t id : py::cast<std::vector<int64_t>>(array.attr("tolist")())) narrow(id);
    return out;
  }
  try {
    if (!py::isinstance<py::list>(ids)) {
      for (const int64_t id : py::cast<std::vector<int64_t>>(ids)) narrow(id);
      return out;
    }
    const auto list = py::reinterpret_borrow<py::list>(ids);
    out.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {  // __index__ of an item may change the list
      PyObject* item = PyList_GET_ITEM(list.ptr(), static_cast<py::ssize_t>(i));
      int too_large = PyLong_CheckExact(item) ? 0 : 1;
      const int64_t plain = too_large == 0 ? PyLong_AsLongLongAndOverflow(item, &too_large) : 0;
      narrow(too_large == 0 ? plain : py::cast<int64_t>(py::reinterpret_borrow<py::object>(item)));
    }
  } catch (const py::cast_error&) {
    throw std::invalid_argument("token ids must be a sequence of integers");
  }
  return out;
}

constexpr std::array<std::pair<const char*, DType>, 4> kCacheTypes{
    {kFloatTypes[0], kFloatTypes[1], kFloatTypes[2], {"fp8_e4m3", DType::fp8_e4m3}}};

void bind_engine_config(py::module_& m) {
  py::class_<EngineConfig> c(m, "EngineConfig");
  c.def_readwrite("device", &EngineConfig::device)
      .def_readwrite("device_index", &EngineConfig::device_index)
      .def_readwrite("isa", &EngineConfig::isa)
      .def_readwrite("num_threads", &EngineConfig::num_threads)
      .def_readwrite("batch_invariant", &EngineConfig::batch_invariant)
      .def_readwrite("plan_cache", &EngineConfig::plan_cache)
      .def_readwrite("graph_sizes", &EngineConfig::graph_sizes)
      .def_readwrite("overlap", &EngineConfig::overlap)
      .def_readwrite("block_size", &EngineConfig::block_size)
      .def_readwrite("num_blocks", &EngineConfig::num_blocks)
      .def_readwrite("memory_fraction", &EngineConfig::memory_fraction)
      .def_readwrite("paged", &EngineConfig::paged)
      .def_readwrite("enable_prefix_caching", &EngineConfig::enable_prefix_caching)
      .def_readwrite("enable_chunked_prefill", &EngineConfig::enable_chunked_prefill)
      .def_readwrite("static_batching", &EngineConfig::static_batching)
      .def_readwrite("max_model_len", &EngineConfig::max_model_len)
      .def_readwrite("max_num_seqs", &EngineConfig::max_num_seqs)
      .def_readwrite("max_num_batched_tokens", &EngineConfig::max_num_batched_tokens)
      .def_readwrite("max_waiting", &EngineConfig::max_waiting)
      .def_readwrite("max_logprobs", &EngineConfig::max_logprobs)
      .def_readwrite("eos_token_ids", &EngineConfig::eos_token_ids)
      .def_readwrite("trace_capacity", &EngineConfig::trace_capacity)
      .def_readwrite("check_invariants", &EngineConfig::check_invariants);
  def_enum(c, "dtype", &EngineConfig::dtype, kFloatTypes);
  def_enum(c, "kv_cache_dtype", &EngineConfig::kv_cache_dtype, kCacheTypes);
  def_enum(c, "policy", &EngineConfig::policy,
           std::array<std::pair<const char*, SchedulingPolicy>, 2>{
               {{"fcfs", SchedulingPolicy::fcfs}, {"priority", SchedulingPolicy::priority}}});
  def_keyword_init<EngineConfig>(c);
}

void bind_outputs(py::module_& m) {
  py::class_<TokenLogprobs>(m, "TokenLogprobs")
      .def_readonly("token_id", &TokenLogprobs::token_id)
      .def_readonly("logprob", &TokenLogprobs::logprob)
      .def_readonly("rank", &TokenLogprobs::rank)
      .def_readonly("top_ids", &TokenLogprobs::top_ids)
      .def_readonly("top_logprobs", &TokenLogprobs::top_logprobs);
  py::class_<Output>(m, "Output")
      .def_readonly("request_id", &Output::request_id)
      .def_readonly("choice", &Output::choice)
      .def_readonly("token_ids", &Output::token_ids)
      .def_readonly("logprobs", &Output::logprobs)
      .def_readonly("prompt_logprobs", &Output::prompt_logprobs)
      .def_readonly("num_cached", &Output::num_cached)
      .def_property_readonly("finish_reason",
                             [](const Output& o) { return finish_reason_name(o.finish_reason); })
      .def_readonly("stop_token", &Output::stop_token)
      .def_readonly("request_done", &Output::request_done)
      .def_readonly("error", &Output::error)
      .def_readonly("arrival_time", &Output::arrival_time)
      .def_readonly("first_scheduled_time", &Output::first_scheduled_time)
      .def_readonly("step_time", &Output::step_time);
}

py::dict stats_dict(const Engine& engine) {
  const EngineStats s = engine.stats();
  py::dict d;
  d["received"] = s.received;
  d["finished"] = s.finished;
  d["aborted"] = s.aborted;
  d["rejected"] = s.rejected;
  d["failed"] = s.failed;
  d["running"] = s.running;
  d["waiting"] = s.waiting;
  d["running_seqs"] = s.running_seqs;
  d["waiting_seqs"] = s.waiting_seqs;
  d["steps"] = s.steps;
  d["failed_steps"] = s.failed_steps;
  d["prompt_tokens"] = s.prompt_tokens;
  d["cached_tokens"] = s.cached_tokens;
  d["generated_tokens"] = s.generated_tokens;
  d["preemptions"] = s.preemptions;
  d["blocks_total"] = s.blocks.num_blocks;
  d["blocks_free"] = s.blocks.num_free;
  d["blocks_cached"] = s.blocks.num_cached;
  d["blocks_used"] = s.blocks.num_used;
  d["prefix_queries"] = s.blocks.prefix_queries;
  d["prefix_hits"] = s.blocks.prefix_hits;
  d["evictions"] = s.blocks.evictions;
  d["block_size"] = engine.config().effective_block_size();
  d["last_step_time"] = s.last_step_time;
  d["busy_since"] = s.busy_since;
  d["healthy"] = s.healthy;
  return d;
}

py::list event_list(const std::vector<StepPlan::Event>& events) {
  py::list out;
  for (const StepPlan::Event& e : events) out.append(py::make_tuple(e.request_id, e.choice));
  return out;
}

py::dict record_dict(const StepRecord& r) {
  py::dict d;
  d["step"] = r.step;
  d["start_time"] = r.start_time;
  d["end_time"] = r.end_time;
  d["failed"] = r.failed;
  d["num_tokens"] = r.num_tokens;
  d["num_decodes"] = r.num_decodes;
  d["running"] = r.num_running;
  d["waiting"] = r.num_waiting;
  d["blocks_free"] = r.blocks_free;
  d["blocks_cached"] = r.blocks_cached;
  d["blocks_used"] = r.blocks_used;
  py::list entries;
  for (const StepRecord::Entry& e : r.entries) {
    py::dict entry;
    entry["request_id"] = e.request_id;
    entry["choice"] = e.choice;
    entry["num_query"] = e.num_query;
    entry["context_len"] = e.context_len;
    entry["num_samples"] = e.num_samples;
    entry["is_decode"] = e.is_decode;
    entry["in_vain"] = e.in_vain;
    entry["first_block"] = e.first_block;
    const auto blocks = r.blocks_of(e);
    entry["blocks"] = std::vector<int32_t>(blocks.begin(), blocks.end());
    entries.append(entry);
  }
  d["entries"] = entries;
  d["admitted"] = event_list(r.admitted);
  d["resumed"] = event_list(r.resumed);
  d["preempted"] = event_list(r.preempted);
  py::list copies, finished;
  for (const BlockCopy& c : r.copies) copies.append(py::make_tuple(c.src, c.dst));
  for (const StepRecord::Finished& f : r.finished)
    finished.append(py::make_tuple(f.request_id, f.choice, finish_reason_name(f.reason)));
  d["copies"] = copies;
  d["finished"] = finished;
  return d;
}

py::dict plan_memory(const EngineConfig& config, const ModelConfig& model) {
  BackendOptions options = Engine::backend_options(config);
  options.num_threads = 1;
  const std::unique_ptr<Backend> backend = make_backend(config.device, options);
  const MemoryPlan plan = ModelRunner::plan_memory(*backend, model, Engine::runner_config(config));
  py::dict d;
  d["weights"] = plan.weights;
  d["activations"] = plan.activations;
  d["kv_block"] = plan.kv_block;
  d["reserve"] = plan.reserve;
  d["block_size"] = config.effective_block_size();
  d["memory_available"] = backend->memory_available();
  d["memory_total"] = backend->info().memory_total;
  return d;
}

Request make_request(uint64_t id, const py::object& prompt, const SamplingParams& params,
                     int priority, std::string salt) {
  return Request{id, token_ids(prompt), params, priority, std::move(salt)};
}
// make_request()'s.
using SubmitArgs = std::tuple<uint64_t, py::object, SamplingParams, int, std::string>;

}  // namespace

void bind_engine(py::module_& m) {
  bind_engine_config(m);
  bind_outputs(m);
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<Engine, std::unique_ptr<Engine, ReleaseGil>>(m, "Engine")
      .def(py::init<const EngineConfig&, const ModelConfig&>(), py::arg("engine_config"),
           py::arg("model_config"), NoGil())
      .def_static("plan_memory", &plan_memory, py::arg("engine_config"), py::arg("model_config"))
      .def_static(
          "weight_slots",
          [](const ModelConfig& model) {
            py::dict d;
            for (const auto& [name, shape] : Weights(model, DType::f32).slots())
              d[py::str(name)] = py::tuple(py::cast(shape));
            return d;
          },
          py::arg("model_config"))
      .def(
          "load_weight",
          [](Engine& self, const std::string& slot, const py::array& data,
             const std::string& dtype) {
            const Tensor view = weight_view(data, parse_dtype(dtype));
            const py::gil_scoped_release release;
            self.load_weight(slot, view);
          },
          py::arg("slot"), py::arg("data"), py::arg("dtype"))
      .def("finish_loading", &Engine::finish_loading, NoGil())
      .def("start", &Engine::start)
      .def("shutdown", &Engine::shutdown, NoGil())
      .def(
          "submit",
          [](Engine& self, uint64_t id, const py::object& prompt, const SamplingParams& params,
             int priority, std::string salt) {
            self.submit(make_request(id, prompt, params, priority, std::move(salt)));
          },
          py::arg("request_id"), py::arg("prompt_token_ids"), py::arg("params"),
          py::arg("priority") = 0, py::arg("cache_salt") = "")
      .def(
          "submit_all",
          [](Engine& self, const std::vector<SubmitArgs>& requests) {
            std::vector<Request> all;
            for (const auto& [id, prompt, params, priority, salt] : requests)
              all.push_back(make_request(id, prompt, params, priority, salt));
            self.submit_all(std::move(all));
          },
          py::arg("requests"))
      .def(
          "validate",
          [](const Engine& self, const py::object& prompt, const SamplingParams& params) {
            self.validate(make_request(0, prompt, params, 0, ""));
          },
          py::arg("prompt_token_ids"), py::arg("params"))
      .def(
          "abort",
          [](Engine& self, uint64_t id, int choice, bool stop) {
            self.abort(id, choice, stop ? FinishReason::stop : FinishReason::abort);
          },
          py::arg("request_id"), py::arg("choice") = -1, py::arg("stop") = false)
      .def("wait_outputs", &Engine::wait_outputs, py::arg("timeout") = -1.0, NoGil())
      .def("step", &Engine::step, NoGil())
      .def("stats", &stats_dict)
      .def(
          "trace",
          [](const Engine& self, uint64_t since) {
            std::vector<StepRecord> records;
            {
              const py::gil_scoped_release release;
              records = self.trace(since);
            }
            py::list out;
            for (const StepRecord& record : records) out.append(record_dict(record));
            return out;
          },
          py::arg("since_step") = 0)
      .def("reset_prefix_cache", &Engine::reset_prefix_cache)
      .def(
          "logits",
          [](Engine& self, const py::object& ids) {
            const std::vector<int32_t> tokens = token_ids(ids);
            std::vector<float> values;
            {
              const py::gil_scoped_release release;
              values = self.logits(tokens);
            }
            const auto rows = static_cast<py::ssize_t>(tokens.size());
            py::array_t<float> out(
                {rows, static_cast<py::ssize_t>(self.model_config().vocab_size)});
            std::copy(values.begin(), values.end(), out.mutable_data());
            return out;
          },
          py::arg("token_ids"))
      .def_property_readonly("config", &Engine::config)
      .def_property_readonly("num_blocks", &Engine::num_blocks)
      .def_property_readonly("device_name",
                             [](Engine& self) { return self.runner().backend().info().name; });
}

}  // namespace ni::python
