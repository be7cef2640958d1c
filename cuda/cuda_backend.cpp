#include "cuda/cuda_backend.h"

#include <algorithm>
#include <cstdlib>

#include "core/check.h"
#include "cuda/attention_plan.h"
#include "cuda/build_target.h"
#include "cuda/check_cuda.h"

namespace ni::cuda {
namespace {

double gib(size_t bytes) {
  return static_cast<double>(bytes) / (1 << 30);
}

// Copies from and to other host memory may or may not have happened when they return: where the
// card reads pageable memory itself, they have not.
bool is_pinned(const void* host) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, host) == cudaSuccess)
    return attributes.type == cudaMemoryTypeHost;
  cudaGetLastError();
  return false;
}

}  // namespace

// -- Memory and running
// -----------------------------------------------------------------------------

CudaBackend::CudaBackend(const BackendOptions& options)
    : device_(options.device_index), graphs_(options.enable_graphs) {
  check_arg(options.activation_dtype == DType::bf16 || options.activation_dtype == DType::f16,
            "the CUDA backend runs models in bfloat16 or float16, not in ",
            dtype_name(options.activation_dtype));
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "looking for CUDA devices");
  check_arg(device_ >= 0 && device_ < count, "there is no CUDA device ", device_, ": ", count,
            " found");
  use_device();
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties");
  card_.arch = 10 * properties.major + properties.minor;
  card_.num_sms = properties.multiProcessorCount;
  card_.max_smem = static_cast<int>(properties.sharedMemPerBlockOptin);
  card_.smem_per_sm = static_cast<int>(properties.sharedMemPerMultiprocessor);
  const std::string why =
      why_not_usable(properties.name, properties.major, properties.minor, NI_CUDA_TARGETS);
  check_arg(why.empty(), why);

  info_.device = "cuda";
  info_.name = properties.name;
  info_.activation_dtype = options.activation_dtype;
  info_.memory_total = properties.totalGlobalMem;
  info_.k_tile = 1;
  info_.tiling = attention_tiling(card_);
  info_.has_graphs = graphs_;
  info_.is_batch_invariant = options.batch_invariant;

  check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  own_stream_.reset(stream_);
  cudaStream_t ahead = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&ahead, cudaStreamNonBlocking), "creating a stream");
  ahead_.reset(ahead);
  const auto create = [](Event& to) {
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    to.reset(event);
  };
  create(uploaded_);
  for (Event& mark : marks_) create(mark);
  Linear::Options linear;
  linear.dtype = options.activation_dtype;
  linear.batch_invariant = options.batch_invariant;
  linear.plan_cache = options.plan_cache;
  linear_ = std::make_unique<Linear>(card_, linear, stream_);
}

CudaBackend::~CudaBackend() {
  cudaSetDevice(device_);
  cudaDeviceSynchronize();  // members may still be in use
}

// The current device is a thread's; whoever calls first on a thread sets it.
void CudaBackend::use_device() const {
  check(cudaSetDevice(device_), "cudaSetDevice");
}

void CudaBackend::check(cudaError_t error, const char* what) const {
  if (error == cudaSuccess) [[likely]]
    return;
  // After a fault in a kernel every call fails, and no later one will succeed.
  if (error != cudaErrorMemoryAllocation && cudaDeviceSynchronize() != cudaSuccess)
    healthy_ = false;
  check_cuda(error, what);
}

size_t CudaBackend::memory_available() const {
  use_device();
  size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
  return available;
}

Buffer CudaBackend::alloc(size_t bytes) {
  if (bytes == 0) return {};
  use_device();
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is told here, and not to the next who asks
    throw std::runtime_error(concat("out of memory on ", info_.name, ": ", bytes, " bytes (",
                                    gib(bytes), " GiB) asked for, ", gib(memory_available()),
                                    " GiB available"));
  }
  check(error, "cudaMalloc");
  Buffer buffer(data, bytes, [](void* p, size_t) { cudaFree(p); });
  check(cudaMemsetAsync(data, 0, bytes, own_stream_.get()), "cudaMemset");
  check(cudaStreamSynchronize(own_stream_.get()), "cudaMemset");
  return buffer;
}

Buffer CudaBackend::alloc_host(size_t bytes) {
  if (bytes == 0) return {};
  use_device();
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocDefault);
  if (error == cudaErrorMemoryAllocation) cudaGetLastError();
  check_runtime(error == cudaSuccess, "cannot allocate ", bytes,
                " bytes of pinned host memory: ", cudaGetErrorString(error));
  return {data, bytes, [](void* p, size_t) { cudaFreeHost(p); }};
}

void CudaBackend::upload(const void* host, void* device, size_t bytes) {
  if (bytes == 0) return;
  use_device();
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_), "upload");
  if (!is_pinned(host)) synchronize();
}

void CudaBackend::upload_ahead(const void* host, void* device, size_t bytes) {
  if (bytes == 0) return;
  use_device();
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, ahead_.get()), "upload");
  check(cudaEventRecord(uploaded_.get(), ahead_.get()), "cudaEventRecord");
  check(cudaStreamWaitEvent(stream_, uploaded_.get(), 0), "cudaStreamWaitEvent");
  if (!is_pinned(host)) synchronize();
}

void CudaBackend::download(const void* device, void* host, size_t bytes) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), "download");
  if (!is_pinned(host)) synchronize();
}

void CudaBackend::synchronize() {
  use_device();
  check(cudaStreamSynchronize(stream_), "a step on the card");
}

uint64_t CudaBackend::mark() {
  check(cudaEventRecord(marks_[num_marks_ % kMarks].get(), stream_), "cudaEventRecord");
  return num_marks_++;
}

void CudaBackend::wait(uint64_t mark) {
  check_invariant(mark < num_marks_ && num_marks_ - mark <= kMarks, "a mark too far back");
  check(cudaEventSynchronize(marks_[mark % kMarks].get()), "a step on the card");
}

void CudaBackend::run_step(GraphKey key, const std::function<void()>& step) {
  use_device();
  if (key.rows == 0 || !graphs_) {
    step();
    return;
  }
  Graph& graph = captured_[key];
  if (graph == nullptr) {
    // The first one of so many rows as it is, so that everything it needs is loaded.
    const bool is_first = !ran_.contains(key.rows);
    if (is_first) step();
    graph = capture(step);
    ran_.insert(key.rows);
    if (is_first) return;
  }
  check(cudaGraphLaunch(graph.get(), stream_), "cudaGraphLaunch");
}

CudaBackend::Graph CudaBackend::capture(const std::function<void()>& step) {
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
  capturing_ = true;
  cudaGraph_t captured = nullptr;
  std::exception_ptr failure;
  try {
    step();
  } catch (...) {
    failure = std::current_exception();
  }
  capturing_ = false;
  const cudaError_t ended = cudaStreamEndCapture(stream_, &captured);
  if (failure != nullptr) {
    if (captured != nullptr) cudaGraphDestroy(captured);
    cudaGetLastError();
    std::rethrow_exception(failure);
  }
  check(ended, "cudaStreamEndCapture");
  // Not cudaGraphUpload(): kernels of a graph that came so start later, one after the other.
  cudaGraphExec_t executable = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&executable, captured, 0);
  cudaGraphDestroy(captured);
  check(made, "cudaGraphInstantiate");
  return Graph(executable);
}

void* CudaBackend::reserve(Workspace& workspace, size_t bytes) {
  if (workspace.buffers.empty() || workspace.buffers.back().bytes() < bytes) {
    check_invariant(!capturing_, "working memory grows while a step is captured");
    workspace.buffers.push_back(alloc(bytes));
  }
  return workspace.data();
}

// -- Weights
// ----------------------------------------------------------------------------------------

void CudaBackend::check_model(DType weights, int32_t num_heads,
                              const std::vector<int32_t>& rotary_dims, const KvView& kv) const {
  check_arg(weights == DType::bf16 || weights == DType::f16, "weights of ", dtype_name(weights),
            " are not supported on CUDA; bfloat16 and float16 are");
  check_arg(weights == info_.activation_dtype, "weights of ", dtype_name(weights),
            " on a backend of ", dtype_name(info_.activation_dtype));
  check_arg(is_attention_head_dim(kv.head_dim), "head_dim ", kv.head_dim,
            " is not supported on CUDA; supported are ", kAttentionHeadDims);
  check_arg(kv.dtype == weights || kv.dtype == DType::fp8_e4m3, "a KV cache of ",
            dtype_name(kv.dtype), " is not supported on CUDA with a model in ", dtype_name(weights),
            "; ", dtype_name(weights), " and fp8_e4m3 are");
  check_arg(kv.block_size % 16 == 0, "block_size must be a multiple of 16 on CUDA, got ",
            kv.block_size);
  check_arg(kv.num_kv_heads > 0 && num_heads % kv.num_kv_heads == 0, num_heads, " heads over ",
            kv.num_kv_heads, " KV heads");
  check_arg(num_heads <= kMaxAttentionHeads, "num_heads ", num_heads,
            " is not supported on CUDA; at most ", kMaxAttentionHeads, " are");
  for (const int32_t rotary_dim : rotary_dims)
    check_arg(rotary_dim % 4 == 0, "rotary_dim ", rotary_dim,
              " is not supported on CUDA; it must be a multiple of 4");
}

size_t CudaBackend::weight_bytes(const WeightSpec& spec) const {
  return static_cast<size_t>(spec.out_features * Linear::weight_stride(spec.in_features)) *
         dtype_size(spec.dtype);
}

void CudaBackend::load_rows(const LinearWeight& w, int64_t first_row, Tensor src) {
  const WeightSpec& s = w.spec;
  check_arg(s.dtype == info_.activation_dtype, "weights of ", dtype_name(s.dtype),
            " on a backend of ", dtype_name(info_.activation_dtype));
  check_arg(src.dtype == DType::f32 || src.dtype == DType::bf16 || src.dtype == DType::f16,
            "load_rows: ", dtype_name(src.dtype), " is not supported");
  check_arg(
      src.cols() == s.in_features && first_row >= 0 && first_row + src.rows() <= s.out_features,
      "load_rows: rows [", first_row, ", ", first_row + src.rows(), ") of ", src.cols(),
      " elements do not lie in a weight [", s.out_features, ", ", s.in_features, "]");
  WeightLoader* loader = nullptr;
  {
    const std::lock_guard lock(loader_mutex_);
    if (loader_ == nullptr) loader_ = std::make_unique<WeightLoader>(device_);
    loader = loader_.get();
  }
  const int64_t stride = Linear::weight_stride(s.in_features);
  char* to =
      static_cast<char*>(w.data) + first_row * stride * static_cast<int64_t>(dtype_size(s.dtype));
  loader->load(src, to, s.dtype, stride);
}

void CudaBackend::prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows) {
  use_device();
  synchronize();    // biases and norms have been uploaded
  loader_.reset();  // gives its buffers back
  linear_->prepare(weights, max_rows);
}

// -- Operators
// --------------------------------------------------------------------------------------

void CudaBackend::check_activations(const Tensor& t, int64_t rows, int64_t cols,
                                    const char* what) const {
  check_arg(
      t.rank >= 1 && t.rows() == rows && t.cols() == cols && t.dtype == info_.activation_dtype,
      what, ": expected ", dtype_name(info_.activation_dtype), " [", rows, ", ", cols, "], got ",
      dtype_name(t.dtype), " [", t.rank >= 1 ? t.rows() : 0, ", ", t.rank >= 1 ? t.cols() : 0, "]");
  check_arg(t.data != nullptr || rows * cols == 0, what, ": no data");
}

void CudaBackend::check_kv(const KvView& kv, const char* what) const {
  check_arg(kv.num_blocks > 0 && kv.num_kv_heads > 0 && kv.k != nullptr && kv.v != nullptr, what,
            ": the KV cache is empty");
  check_arg(kv.block_size > 0 && kv.block_size % 16 == 0, what, ": block_size ", kv.block_size,
            " is not a multiple of 16");
  check_arg(is_attention_head_dim(kv.head_dim), what, ": head_dim ", kv.head_dim,
            " is not supported on CUDA; supported are ", kAttentionHeadDims);
  check_arg(kv.k_tile == 1, what, ": K must be plain rows on CUDA");
  check_arg(kv.dtype == info_.activation_dtype || kv.dtype == DType::fp8_e4m3, what,
            ": a KV cache of ", dtype_name(kv.dtype), " is not supported on CUDA; ",
            dtype_name(info_.activation_dtype), " and fp8_e4m3 are");
  check_arg(kv.k_scale > 0 && kv.v_scale > 0, what, ": the scales of the KV cache, ", kv.k_scale,
            " and ", kv.v_scale, ", must be positive");
}

void CudaBackend::embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a,
                        Tensor out) {
  const int64_t n = w.spec.in_features;
  check_activations(out, in.num_tokens, n, "embed: out");
  if (a.positions != nullptr)
    check_arg(a.positions->spec.in_features == n, "embed: positions have ",
              a.positions->spec.in_features, " columns, tokens ", n);
  cuda::embed(in.token_ids, in.sampled_ids, in.positions, in.num_tokens, w.data,
              a.positions != nullptr ? a.positions->data : nullptr, Linear::weight_stride(n), n,
              a.scale, out.dtype, out.data, out.row_stride, stream_);
}

void CudaBackend::norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) {
  check_activations(x, x.rows(), x.cols(), "norm: x");
  check_activations(out, x.rows(), x.cols(), "norm: out");
  check_arg(w.weight != nullptr, "norm: no weight");
  cuda::norm(x.data, x.row_stride, nullptr, 0, x.rows(), x.cols(), w, a, x.dtype, out.data,
             out.row_stride, !is_guest(), stream_);
}

void CudaBackend::add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                           Tensor out) {
  check_activations(x, x.rows(), x.cols(), "add_norm: x");
  check_activations(residual, x.rows(), x.cols(), "add_norm: residual");
  check_activations(out, x.rows(), x.cols(), "add_norm: out");
  check_arg(w.weight != nullptr, "add_norm: no weight");
  cuda::norm(x.data, x.row_stride, residual.data, residual.row_stride, x.rows(), x.cols(), w, a,
             x.dtype, out.data, out.row_stride, !is_guest(), stream_);
}

bool CudaBackend::fuses(const LinearWeight& w, const LinearArgs& a, int64_t rows) const {
  return !(a.rope != nullptr && is_guest()) && linear_->fuses(w, a, rows);
}

// What a prefill writes other kernels than that of decodes read, and what a copy brings must not be
// read ahead of it. A captured step is one of decodes.
bool CudaBackend::fuses(const StepInputs& in, const AttnArgs& a, const KvView& kv) const {
  return !is_guest() && in.num_prefill_items == 0 && in.num_copies == 0 &&
         cuda::fuses_rope(a, *a.rope, kv, in.max_decode_query_len, card_);
}

void CudaBackend::linear(Tensor x, const LinearWeight& w, const LinearArgs& a, Tensor out) {
  check_activations(x, x.rows(), w.spec.in_features, "linear: x");
  const int64_t n = a.gated ? w.spec.out_features / 2 : w.spec.out_features;
  check_arg(out.rows() == x.rows() && out.cols() == n &&
                (out.dtype == x.dtype || (out.dtype == DType::f32 && !a.accumulate)),
            "linear: expected ", dtype_name(x.dtype), " or float32 [", x.rows(), ", ", n,
            "] for out, got ", dtype_name(out.dtype), " [", out.rows(), ", ", out.cols(), "]",
            a.accumulate ? ", and float32 cannot accumulate" : "");
  if (x.rows() == 0) return;
  if (a.rope != nullptr) {
    check_kv(a.rope->kv, "linear");
    check_arg(!is_guest(), "linear: rotates in an engine only; fuses() says so");
    check_arg(a.rope->in->num_tokens == x.rows(), "linear: ", x.rows(), " rows, but a step of ",
              a.rope->in->num_tokens);
    written_slots_ = a.rope->in->slot_mapping;
  }
  summed_up_ = {};
  unwritten_ = false;
  LogitUnits units;
  if (a.sampled != nullptr && out.dtype == DType::f32 && !is_guest()) {
    check_arg(a.sampled->device != nullptr, "linear: the step's inputs are not in device memory");
    void* workspace = reserve(sample_, sample_workspace_bytes(out.rows(), out.cols()));
    units = {sample_units(workspace), a.sampled->device, a.first_sampled,
             a.sampled->plain_sampling};
  }
  const bool made = linear_->run(x, w, a, out, stream_, !is_guest(), units);
  if (made) summed_up_ = {out.data, out.rows(), out.cols(), units.step, units.first};
  unwritten_ = made && units.only;
}

void CudaBackend::rope_kv_write(Tensor qkv, const StepInputs& in, const RopeArgs& a,
                                const KvView& kv) {
  check_kv(kv, "rope_kv_write");
  const int64_t heads = qkv.cols() / kv.head_dim - 2 * kv.num_kv_heads;
  check_activations(qkv, in.num_tokens, (heads + 2 * kv.num_kv_heads) * kv.head_dim,
                    "rope_kv_write: qkv");
  check_arg(heads > 0, "rope_kv_write: qkv has no columns for q");
  written_slots_ = in.slot_mapping;
  cuda::rope_kv_write(qkv.data, qkv.row_stride, in.num_tokens, static_cast<int32_t>(heads),
                      in.positions, in.slot_mapping, a, kv, qkv.dtype, !is_guest(), stream_);
}

void CudaBackend::attention(Tensor qkv, const StepInputs& in, const AttnArgs& a, const KvView& kv,
                            Tensor out) {
  check_kv(kv, "attention");
  check_arg(a.num_heads > 0 && a.num_heads % kv.num_kv_heads == 0, "attention: ", a.num_heads,
            " heads over ", kv.num_kv_heads, " KV heads");
  check_arg(a.scale > 0 && a.softcap >= 0 && a.window >= 0, "attention: scale ", a.scale,
            " must be positive, softcap ", a.softcap, " and window ", a.window, " not negative");
  check_activations(qkv, in.num_tokens, (a.num_heads + 2 * kv.num_kv_heads) * kv.head_dim,
                    "attention: qkv");
  check_activations(out, in.num_tokens, a.num_heads * kv.head_dim, "attention: out");
  check_arg(in.device != nullptr, "attention: the step's inputs are not in device memory");
  check_arg(in.num_seqs <= info_.tiling.max_items, "attention: ", in.num_seqs,
            " sequences; at most ", info_.tiling.max_items);
  AttnParams p;
  p.q = qkv.data;
  p.q_stride = qkv.row_stride;
  p.out = out.data;
  p.out_stride = out.row_stride;
  p.dtype = qkv.dtype;
  p.kv = kv;
  p.args = a;
  p.step = in.device;
  if (a.rope != nullptr) {  // the kernel before is the product that made qkv
    check_arg(fuses(in, a, kv), "attention: this step's rotation is rope_kv_write()'s");
    p.with_rope = p.settled = true;
    p.rope = *a.rope;
    p.args.rope = nullptr;  // the host's
  } else {
    p.settled = !is_guest() && written_slots_ != nullptr && written_slots_ == in.slot_mapping;
  }
  written_slots_ = nullptr;
  if (in.num_prefill_items > 0) attention_prefill(p, in.num_prefill_items, card_, stream_);
  // A captured step has no prefill and any number of decode items.
  if (in.num_decode_items > 0 || in.num_prefill_items == 0) {
    const int64_t items = info_.tiling.max_items;
    void* workspace =
        reserve(decode_, decode_workspace_bytes(items, items, a.num_heads, kv.head_dim));
    attention_decode(p, in.max_decode_query_len, items, workspace, card_, stream_);
  }
}

void CudaBackend::activation(Tensor x, Activation act, bool gated, Tensor out) {
  const int64_t n = out.cols();
  check_activations(out, x.rows(), n, "activation: out");
  check_activations(x, x.rows(), gated ? 2 * n : n, "activation: x");
  cuda::activation(x.data, x.row_stride, x.rows(), n, act, gated, x.dtype, out.data, out.row_stride,
                   stream_);
}

void CudaBackend::gather_rows(Tensor x, const int32_t* rows, int64_t count, Tensor out) {
  check_activations(x, x.rows(), x.cols(), "gather_rows: x");
  check_activations(out, count, x.cols(), "gather_rows: out");
  cuda::gather_rows(x.data, x.row_stride, rows, count, x.cols(), x.dtype, out.data, out.row_stride,
                    stream_);
}

void CudaBackend::copy_blocks(const StepInputs& in, const KvView& kv) {
  check_kv(kv, "copy_blocks");
  cuda::copy_blocks(in.copies, in.num_copies, kv, stream_);
}

void CudaBackend::sample(Tensor logits, const StepInputs& in, int32_t first,
                         const SampleOutputs& out) {
  check_arg(logits.dtype == DType::f32 && logits.rank == 2 && logits.cols() > 0,
            "sample: logits must be float32 [rows, vocabulary]");
  check_arg(first >= 0 && first + logits.rows() <= in.num_logits, "sample: rows [", first, ", ",
            first + logits.rows(), ") of ", in.num_logits);
  check_arg(in.device != nullptr, "sample: the step's inputs are not in device memory");
  check_arg(out.token_ids != nullptr, "sample: no place for token_ids");
  check_arg(out.max_logprobs <= 0 || (out.top_ids != nullptr && out.top_logprobs != nullptr),
            "sample: no place for the most likely tokens");
  if (logits.rows() == 0) return;
  void* workspace = reserve(sample_, sample_workspace_bytes(logits.rows(), logits.cols()));
  const bool has_units =
      summed_up_ == SummedUp{logits.data, logits.rows(), logits.cols(), in.device, first};
  const bool plain = in.plain_sampling && !is_guest();
  check_invariant(!unwritten_ || (has_units && plain),
                  "sample: the last product made logits for plain rows, which are others");
  unwritten_ = false;
  summed_up_ = {};
  cuda::sample(logits.as<float>(), logits.row_stride, logits.rows(), logits.cols(), in.device,
               first, has_units, plain, out, workspace, stream_);
}

}  // namespace ni::cuda
