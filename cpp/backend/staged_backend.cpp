#include "backend/staged_backend.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/attn_items.h"
#include "core/check.h"

namespace ni {
namespace {

constexpr size_t kAlignment = 128;  // bytes, of rows and arrays in the block
constexpr float kGuard = 1024.0f;   // exact in every type, and finite: products may read it

size_t round_up(size_t n) {
  return (n + kAlignment - 1) / kAlignment * kAlignment;
}

void store(float v, DType dtype, char* to) {
  if (dtype == DType::bf16) {
    const bf16 h = to_bf16(v);
    std::memcpy(to, &h, sizeof(h));
  } else if (dtype == DType::f16) {
    const f16 h = to_f16(v);
    std::memcpy(to, &h, sizeof(h));
  } else {
    std::memcpy(to, &v, sizeof(v));
  }
}

float load(const char* from, DType dtype) {
  if (dtype == DType::bf16) {
    bf16 h;
    std::memcpy(&h, from, sizeof(h));
    return to_float(h);
  }
  if (dtype == DType::f16) {
    f16 h;
    std::memcpy(&h, from, sizeof(h));
    return to_float(h);
  }
  float v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename T>
void check_range(const T* values, int64_t n, int64_t lowest, int64_t limit, const char* what) {
  for (int64_t i = 0; i < n; ++i)
    check_arg(values[i] >= lowest && values[i] < limit, what, " ", values[i], " at ", i,
              " is not in [", lowest, ", ", limit, ")");
}

void check_host(const Tensor& t, const char* what) {
  check_arg(t.rank >= 1 && t.dtype == DType::f32, what, ": expected float32, got ",
            dtype_name(t.dtype));
  check_arg(t.data != nullptr || t.numel() == 0, what, ": no data");
}

void check_sequences(const StepInputs& in, const KvView& kv) {
  check_arg(in.cu_seqlens_q[0] == 0 && in.cu_seqlens_q[in.num_seqs] == in.num_tokens,
            "attention: cu_seqlens_q must go from 0 to ", in.num_tokens);
  for (int32_t s = 0; s < in.num_seqs; ++s) {
    const int32_t rows = in.cu_seqlens_q[s + 1] - in.cu_seqlens_q[s];
    const int32_t context = in.context_lens[s];
    if (rows == 0 || (rows > 0 && context == 0)) continue;  // a padding row has no context
    check_arg(rows >= 0 && context >= rows, "attention: sequence ", s, " has ", rows,
              " rows and a context of ", context);
    const int32_t blocks = (context + kv.block_size - 1) / kv.block_size;
    check_arg(blocks <= in.block_table_stride, "attention: sequence ", s, ": a context of ",
              context, " does not fit its block table");
    check_range(in.block_tables + int64_t{s} * in.block_table_stride, blocks, 0, kv.num_blocks,
                "attention: block");
  }
}

}  // namespace

// One operator call: lay out (the functions that return a slot), place(), run, finish().
class StagedBackend::Call {
 public:
  Call(StagedBackend& owner, const char* what)
      : owner_(owner), what_(what), dtype_(owner.inner_->info().activation_dtype) {
    header_ = reserve(sizeof(StepInputs));
  }

  // A matrix with guards around its rows. Values: of the first `cols` columns of `from`; the
  // others, and all without `from`, are NaN.
  size_t matrix(int64_t rows, int64_t cols, DType dtype, const Tensor* from, int64_t from_cols) {
    const size_t size = dtype_size(dtype);
    Matrix m;
    m.stride = static_cast<int64_t>(round_up((static_cast<size_t>(cols) + 1) * size) / size);
    const size_t begin = reserve(static_cast<size_t>((rows + 2) * m.stride) * size);
    for (int64_t i = 0; i < (rows + 2) * m.stride; ++i)
      store(kGuard, dtype, at(begin + static_cast<size_t>(i) * size));
    m.begin = begin + static_cast<size_t>(m.stride) * size;
    m.rows = rows;
    m.cols = cols;
    m.dtype = dtype;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c)
        store(c < from_cols ? from->as<float>()[r * from->row_stride + c]
                            : std::numeric_limits<float>::quiet_NaN(),
              dtype, element(m, r, c));
    matrices_.push_back(m);
    return matrices_.size() - 1;
  }
  size_t input(const Tensor& x, const char* name) {
    check_host(x, name);
    return matrix(x.rows(), x.cols(), dtype_, &x, x.cols());
  }
  // `keep`: starts with what the caller has there.
  size_t output(const Tensor& out, const char* name, bool keep = false) {
    check_host(out, name);
    const size_t m = matrix(out.rows(), out.cols(), dtype_, &out, keep ? out.cols() : 0);
    matrices_[m].result = out;
    return m;
  }

  // A plain array; null stays null.
  template <typename T>
  size_t array(const T* from, int64_t n) {
    return bytes(from, static_cast<size_t>(n) * sizeof(T), nullptr);
  }
  // … that the operator writes.
  template <typename T>
  size_t results(T* to, int64_t n) {
    return bytes(to, static_cast<size_t>(n) * sizeof(T), to);
  }

  // From here on there are addresses.
  void place() { base_ = owner_.device_memory(image_.size()); }
  Tensor tensor(size_t slot) const {
    const Matrix& m = matrices_[slot];
    Tensor t(base_ + m.begin, m.dtype, {m.rows, m.cols});
    t.row_stride = m.stride;
    return t;
  }
  template <typename T>
  T* pointer(size_t slot) const {
    return arrays_[slot].is_null ? nullptr : reinterpret_cast<T*>(base_ + arrays_[slot].begin);
  }
  // Puts `in`, which holds device pointers, where its `device` points.
  void set_header(StepInputs& in) {
    in.device = reinterpret_cast<const StepInputs*>(base_ + header_);
    std::memcpy(at(header_), &in, sizeof(in));
  }

  // Copies the block there, runs, copies it back, gives the results to the caller.
  template <typename F>
  void run(const F& f) {
    Backend& inner = *owner_.inner_;
    inner.upload(image_.data(), base_, image_.size());
    f(inner);
    inner.synchronize();
    std::vector<char> after(image_.size());
    inner.download(base_, after.data(), after.size());
    for (const Matrix& m : matrices_)
      for (int64_t r = 0; m.result.data != nullptr && r < m.rows; ++r) take_row(m, r, after);
    for (const Array& a : arrays_) {
      if (a.result == nullptr) continue;
      std::memcpy(a.result, after.data() + a.begin, a.size);
      std::memcpy(at(a.begin), after.data() + a.begin, a.size);
    }
    if (image_ == after) return;
    const auto where = std::mismatch(image_.begin(), image_.end(), after.begin()).first;
    throw std::logic_error(concat(what_, " wrote beside its results, at byte ",
                                  where - image_.begin(), " of its block of ", image_.size()));
  }
  // Lets the operator overwrite a matrix without giving it to anybody.
  void allow_changes(size_t slot) {
    matrices_[slot].result = Tensor(&ignored_, DType::f32, {0, 0});
  }

 private:
  struct Matrix {
    size_t begin = 0;  // of the first row, in the block
    int64_t rows = 0, cols = 0, stride = 0;
    DType dtype = DType::f32;
    Tensor result;  // no data: an input
  };
  struct Array {
    size_t begin = 0, size = 0;
    void* result = nullptr;
    bool is_null = false;
  };

  size_t reserve(size_t size) {
    const size_t begin = image_.size();
    image_.resize(begin + round_up(std::max<size_t>(size, 1)));
    return begin;
  }
  size_t bytes(const void* from, size_t size, void* result) {
    Array a{reserve(size), size, result, from == nullptr};
    if (from == nullptr) a.size = 0;
    if (a.size > 0) std::memcpy(at(a.begin), from, a.size);
    arrays_.push_back(a);
    return arrays_.size() - 1;
  }
  char* at(size_t offset) { return image_.data() + offset; }
  static size_t offset(const Matrix& m, int64_t r, int64_t c) {
    return m.begin + static_cast<size_t>(r * m.stride + c) * dtype_size(m.dtype);
  }
  char* element(const Matrix& m, int64_t r, int64_t c) { return at(offset(m, r, c)); }
  // The row's results go to the caller and, so that only stray writes differ, into the image.
  void take_row(const Matrix& m, int64_t r, const std::vector<char>& after) {
    std::memcpy(element(m, r, 0), after.data() + offset(m, r, 0),
                static_cast<size_t>(m.cols) * dtype_size(m.dtype));
    for (int64_t c = 0; r < m.result.rows() && c < m.cols; ++c)
      m.result.as<float>()[r * m.result.row_stride + c] =
          load(after.data() + offset(m, r, c), m.dtype);
  }

  StagedBackend& owner_;
  const char* what_;
  const DType dtype_;
  std::vector<char> image_;  // the block on the host
  char* base_ = nullptr;     // and in the inner backend's memory
  size_t header_ = 0;
  std::vector<Matrix> matrices_;
  std::vector<Array> arrays_;
  float ignored_ = 0;
};

StagedBackend::StagedBackend(std::unique_ptr<Backend> inner)
    : inner_(std::move(inner)), info_(inner_->info()) {
  info_.activation_dtype = DType::f32;
  info_.tiling = {};
  info_.has_graphs = false;
}

char* StagedBackend::device_memory(size_t bytes) {
  if (bytes > memory_.bytes()) {
    memory_ = Buffer();
    memory_ = inner_->alloc(bytes + bytes / 2);
  }
  return memory_.data();
}

void StagedBackend::upload(const void* host, void* device, size_t bytes) {
  inner_->upload(host, device, bytes);
}

void StagedBackend::download(const void* device, void* host, size_t bytes) {
  inner_->download(device, host, bytes);
}

void StagedBackend::check_model(DType weights, int32_t num_heads,
                                const std::vector<int32_t>& rotary_dims, const KvView& kv) const {
  inner_->check_model(weights, num_heads, rotary_dims, kv);
}

void StagedBackend::load_rows(const LinearWeight& w, int64_t first_row, Tensor src) {
  inner_->load_rows(w, first_row, src);
}

void StagedBackend::embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a,
                          Tensor out) {
  const int64_t tokens = in.num_tokens;
  int32_t sampled = 0;  // tokens of the step before that are asked for
  for (int64_t t = 0; t < tokens; ++t) sampled = std::max(sampled, -in.token_ids[t]);
  if (in.sampled_ids == nullptr) sampled = 0;
  check_range(in.token_ids, tokens, -sampled, w.spec.out_features, "embed: token");
  check_range(in.sampled_ids, sampled, 0, w.spec.out_features, "embed: token");
  if (a.positions != nullptr)
    check_range(in.positions, tokens, 0, a.positions->spec.out_features, "embed: position");
  Call call(*this, "embed");
  const size_t ids = call.array(in.token_ids, tokens);
  const size_t sampled_ids = call.array(in.sampled_ids, sampled);
  const size_t positions = call.array(a.positions != nullptr ? in.positions : nullptr, tokens);
  const size_t to = call.output(out, "embed: out");
  call.place();
  StepInputs there = in;
  there.token_ids = call.pointer<int32_t>(ids);
  there.sampled_ids = call.pointer<int32_t>(sampled_ids);
  there.positions = call.pointer<int32_t>(positions);
  call.set_header(there);
  call.run([&](Backend& inner) { inner.embed(there, w, a, call.tensor(to)); });
}

void StagedBackend::norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) {
  check_host(x, "norm: x");
  check_arg(w.weight != nullptr, "norm: no weight");
  Call call(*this, "norm");
  const size_t from = call.input(x, "norm: x"), to = call.output(out, "norm: out");
  const size_t weight = call.array(w.weight, x.cols()), bias = call.array(w.bias, x.cols());
  call.place();
  const NormWeight there{call.pointer<float>(weight), call.pointer<float>(bias)};
  call.run([&](Backend& inner) { inner.norm(call.tensor(from), there, a, call.tensor(to)); });
}

void StagedBackend::add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                             Tensor out) {
  check_host(x, "add_norm: x");
  check_arg(w.weight != nullptr, "add_norm: no weight");
  Call call(*this, "add_norm");
  const size_t from = call.input(x, "add_norm: x"), to = call.output(out, "add_norm: out");
  const size_t sum = call.output(residual, "add_norm: residual", true);
  const size_t weight = call.array(w.weight, x.cols()), bias = call.array(w.bias, x.cols());
  call.place();
  const NormWeight there{call.pointer<float>(weight), call.pointer<float>(bias)};
  call.run([&](Backend& inner) {
    inner.add_norm(call.tensor(from), call.tensor(sum), there, a, call.tensor(to));
  });
}

bool StagedBackend::fuses(const LinearWeight& w, const LinearArgs& a, int64_t rows) const {
  return a.rope == nullptr && inner_->fuses(w, a, rows);
}

void StagedBackend::linear(Tensor x, const LinearWeight& w, const LinearArgs& a, Tensor out) {
  check_host(x, "linear: x");
  check_arg(x.cols() == w.spec.in_features && out.rank >= 1 && out.rows() == x.rows() &&
                out.cols() == w.spec.out_features / (a.gated ? 2 : 1),
            "linear: x or out does not fit a weight [", w.spec.out_features, ", ",
            w.spec.in_features, "]");
  Call call(*this, "linear");
  const size_t from = call.input(x, "linear: x");
  const size_t to = call.output(out, "linear: out", a.accumulate);
  const size_t bias = call.array(w.bias, w.spec.out_features);
  const NormWeight none;
  const NormWeight& norm = a.norm != nullptr ? *a.norm : none;
  const size_t norm_weight = call.array(norm.weight, x.cols());
  const size_t norm_bias = call.array(norm.bias, x.cols());
  call.place();
  LinearWeight there = w;
  there.bias = call.pointer<float>(bias);
  const NormWeight norm_there{call.pointer<float>(norm_weight), call.pointer<float>(norm_bias)};
  LinearArgs args = a;
  args.spare_rows = 0;     // there are none here
  args.sampled = nullptr;  // sample() stages the logits anew
  if (a.norm != nullptr) args.norm = &norm_there;
  call.run([&](Backend& inner) { inner.linear(call.tensor(from), there, args, call.tensor(to)); });
}

void StagedBackend::rope_kv_write(Tensor qkv, const StepInputs& in, const RopeArgs& a,
                                  const KvView& kv) {
  const int64_t tokens = in.num_tokens, slots = int64_t{kv.num_blocks} * kv.block_size;
  check_range(in.slot_mapping, tokens, -1, slots, "rope_kv_write: slot");
  check_range(in.positions, tokens, 0, std::numeric_limits<int32_t>::max(),
              "rope_kv_write: position");
  int64_t known = 0;  // positions that the tables must hold
  for (int64_t t = 0; t < tokens; ++t) known = std::max(known, int64_t{in.positions[t]} + 1);
  const int64_t angles = known * (a.rotary_dim / 2);
  Call call(*this, "rope_kv_write");
  const size_t rows = call.output(qkv, "rope_kv_write: qkv", true);
  const size_t positions = call.array(in.positions, tokens);
  const size_t slot_mapping = call.array(in.slot_mapping, tokens);
  const size_t cos = call.array(a.cos, angles), sin = call.array(a.sin, angles);
  const size_t q_norm = call.array(a.q_norm.weight, kv.head_dim);
  const size_t k_norm = call.array(a.k_norm.weight, kv.head_dim);
  call.place();
  StepInputs there = in;
  there.positions = call.pointer<int32_t>(positions);
  there.slot_mapping = call.pointer<int64_t>(slot_mapping);
  call.set_header(there);
  RopeArgs args = a;
  args.cos = call.pointer<float>(cos);
  args.sin = call.pointer<float>(sin);
  args.q_norm.weight = call.pointer<float>(q_norm);
  args.k_norm.weight = call.pointer<float>(k_norm);
  call.run([&](Backend& inner) { inner.rope_kv_write(call.tensor(rows), there, args, kv); });
}

void StagedBackend::attention(Tensor qkv, const StepInputs& in, const AttnArgs& a, const KvView& kv,
                              Tensor out) {
  check_host(qkv, "attention: qkv");
  check_sequences(in, kv);
  const int64_t q_cols = int64_t{a.num_heads} * kv.head_dim;
  check_arg(qkv.rows() == in.num_tokens && qkv.cols() >= q_cols, "attention: qkv is [", qkv.rows(),
            ", ", qkv.cols(), "], wants [", in.num_tokens, ", at least ", q_cols, "]");
  StepInputs there = in;
  AttnLists lists;
  const AttnTiling& tiling = inner_->info().tiling;
  if (tiling.kv_chunk > 0)
    build_attn_items(in.cu_seqlens_q, in.context_lens, in.num_seqs, tiling, lists, there);
  Call call(*this, "attention");
  // Only q may be read: k and v of the rows are NaN.
  const size_t q =
      call.matrix(qkv.rows(), qkv.cols(), inner_->info().activation_dtype, &qkv, q_cols);
  const size_t to = call.output(out, "attention: out");
  const size_t starts = call.array(in.cu_seqlens_q, int64_t{in.num_seqs} + 1);
  const size_t contexts = call.array(in.context_lens, in.num_seqs);
  const size_t tables = call.array(in.block_tables, int64_t{in.num_seqs} * in.block_table_stride);
  const size_t positions = call.array(in.positions, in.num_tokens);
  const auto list = [&](const auto& v) {
    return call.array(v.data(), static_cast<int64_t>(v.size()));
  };
  const size_t decode_items = list(lists.decode), prefill_items = list(lists.prefill);
  const size_t decode_cuts = list(lists.cuts);
  call.place();
  there.cu_seqlens_q = call.pointer<int32_t>(starts);
  there.context_lens = call.pointer<int32_t>(contexts);
  there.block_tables = call.pointer<int32_t>(tables);
  there.positions = call.pointer<int32_t>(positions);
  there.decode_items = call.pointer<AttnItem>(decode_items);
  there.prefill_items = call.pointer<AttnItem>(prefill_items);
  there.decode_cuts = call.pointer<DecodeCut>(decode_cuts);
  there.max_query_len = there.max_context_len = 0;
  for (int32_t s = 0; s < in.num_seqs; ++s) {
    there.max_query_len =
        std::max(there.max_query_len, in.cu_seqlens_q[s + 1] - in.cu_seqlens_q[s]);
    there.max_context_len = std::max(there.max_context_len, in.context_lens[s]);
  }
  call.set_header(there);
  call.run([&](Backend& inner) { inner.attention(call.tensor(q), there, a, kv, call.tensor(to)); });
}

void StagedBackend::activation(Tensor x, Activation act, bool gated, Tensor out) {
  Call call(*this, "activation");
  const size_t from = call.input(x, "activation: x"), to = call.output(out, "activation: out");
  call.place();
  call.run(
      [&](Backend& inner) { inner.activation(call.tensor(from), act, gated, call.tensor(to)); });
}

void StagedBackend::gather_rows(Tensor x, const int32_t* rows, int64_t count, Tensor out) {
  check_host(x, "gather_rows: x");
  check_range(rows, count, 0, x.rows(), "gather_rows: row");
  Call call(*this, "gather_rows");
  const size_t from = call.input(x, "gather_rows: x"), to = call.output(out, "gather_rows: out");
  const size_t wanted = call.array(rows, count);
  call.place();
  call.run([&](Backend& inner) {
    inner.gather_rows(call.tensor(from), call.pointer<int32_t>(wanted), count, call.tensor(to));
  });
}

void StagedBackend::copy_blocks(const StepInputs& in, const KvView& kv) {
  for (int32_t i = 0; i < in.num_copies; ++i) {
    const auto [src, dst] = in.copies[i];
    check_arg(std::min(src, dst) >= 0 && std::max(src, dst) < kv.num_blocks && src != dst,
              "copy_blocks: ", src, " -> ", dst, " with ", kv.num_blocks, " blocks");
  }
  Call call(*this, "copy_blocks");
  const size_t copies = call.array(in.copies, in.num_copies);
  call.place();
  StepInputs there = in;
  there.copies = call.pointer<BlockCopy>(copies);
  call.set_header(there);
  call.run([&](Backend& inner) { inner.copy_blocks(there, kv); });
}

void StagedBackend::sample(Tensor logits, const StepInputs& in, int32_t first,
                           const SampleOutputs& out) {
  check_host(logits, "sample: logits");
  const int64_t vocab = logits.cols(), rows = in.num_logits;
  check_arg(first >= 0 && first + logits.rows() <= rows, "sample: rows [", first, ", ",
            first + logits.rows(), ") of ", rows);
  int64_t num_counts = 0, num_biases = 0, num_masks = 0;
  for (int64_t i = 0; i < rows; ++i) {
    num_counts = std::max(num_counts, int64_t{in.sampling[i].counts_end});
    num_biases = std::max(num_biases, int64_t{in.sampling[i].bias_end});
    num_masks = std::max(num_masks, int64_t{in.sampling[i].mask_row} + 1);
    check_arg(in.sampling[i].target < vocab, "sample: target ", in.sampling[i].target,
              " is not in the vocabulary of ", vocab);
  }
  for (int64_t i = 0; i < num_counts; ++i)
    check_range(&in.token_counts[i].token, 1, 0, vocab, "sample: token");
  for (int64_t i = 0; i < num_biases; ++i)
    check_range(&in.token_biases[i].token, 1, 0, vocab, "sample: token");
  Call call(*this, "sample");
  const size_t from = call.matrix(logits.rows(), vocab, DType::f32, &logits, vocab);
  call.allow_changes(from);
  const size_t sampling = call.array(in.sampling, rows);
  const size_t counts = call.array(in.token_counts, num_counts);
  const size_t biases = call.array(in.token_biases, num_biases);
  const size_t masks = call.array(in.token_masks, num_masks * ((vocab + 31) / 32));
  const int64_t tops = rows * std::max(out.max_logprobs, 0);
  const size_t ids = call.results(out.token_ids, rows), ranks = call.results(out.ranks, rows);
  const size_t logprobs = call.results(out.logprobs, rows);
  const size_t top_ids = call.results(out.top_ids, tops);
  const size_t top_logprobs = call.results(out.top_logprobs, tops);
  call.place();
  StepInputs there = in;
  there.sampling = call.pointer<SamplingRow>(sampling);
  there.token_counts = call.pointer<TokenCount>(counts);
  there.token_biases = call.pointer<TokenBias>(biases);
  there.token_masks = call.pointer<uint32_t>(masks);
  there.host_ids = nullptr;
  call.set_header(there);
  const SampleOutputs to{call.pointer<int32_t>(ids),        call.pointer<float>(logprobs),
                         call.pointer<int32_t>(ranks),      call.pointer<int32_t>(top_ids),
                         call.pointer<float>(top_logprobs), out.max_logprobs};
  call.run([&](Backend& inner) { inner.sample(call.tensor(from), there, first, to); });
  if (in.host_ids != nullptr)
    std::copy_n(out.token_ids + first, logits.rows(), in.host_ids + first);
}

}  // namespace ni
