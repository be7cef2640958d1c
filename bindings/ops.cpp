// Every operator of a backend on numpy arrays: for kernel tests, study and benchmarks.
//
// Activations are float32 [rows, features] with contiguous rows (any row stride); outputs are
// written into arrays that the caller gives. bf16 data come and go as their bits in uint16. On CUDA
// a StagedBackend copies and converts them.
#include <algorithm>
#include <limits>
#include <map>
#include <optional>

#include "backend/registry.h"
#include "backend/staged_backend.h"
#include "bindings.h"
#include "model/rope.h"

namespace ni::python {
namespace {

using Floats = py::array_t<float>;
// No forced casts: an id that does not fit must not turn into another one.
using Ints = py::array_t<int32_t, py::array::c_style>;
using Slots = py::array_t<int64_t, py::array::c_style>;
using Bools = py::array_t<bool, py::array::c_style>;

Tensor matrix(const py::array& a, DType dtype, const char* name) {
  const auto item = static_cast<py::ssize_t>(dtype_size(dtype));
  check_arg(a.ndim() == 2, name, " must have 2 dimensions, got ", a.ndim());
  check_arg(a.itemsize() == item, name, ": elements of ", dtype_name(dtype), " have ", item,
            " bytes, got ", a.itemsize());
  check_arg(a.strides(1) == item || a.shape(1) <= 1 || a.shape(0) == 0, name,
            " must have contiguous rows");
  check_arg(a.strides(0) % item == 0 && reinterpret_cast<uintptr_t>(a.data()) % item == 0, name,
            " must be aligned to its elements");
  Tensor t(const_cast<void*>(a.data()), dtype, {a.shape(0), a.shape(1)});
  t.row_stride = a.strides(0) / item;
  return t;
}

Tensor input(const Floats& a, const char* name) {
  return matrix(a, DType::f32, name);
}

Tensor output(const Floats& a, const char* name, int64_t rows, int64_t cols) {
  check_arg(a.writeable(), name, " must be writeable");
  const Tensor t = matrix(a, DType::f32, name);
  check_arg(t.rows() == rows && t.cols() == cols, name, " must be [", rows, ", ", cols, "], got [",
            t.rows(), ", ", t.cols(), "]");
  return t;
}

float* floats(std::optional<Floats>& a, const char* name, int64_t size) {
  if (!a) return nullptr;
  check_arg(a->ndim() == 1 && a->shape(0) == size && a->strides(0) == sizeof(float), name,
            " must be a contiguous vector of ", size, " float32");
  return const_cast<float*>(a->data());
}

void check_range(const Ints& a, int64_t limit, const char* name) {
  for (py::ssize_t i = 0; i < a.size(); ++i)
    check_arg(a.data()[i] >= 0 && a.data()[i] < limit, name, " holds ", a.data()[i], " at ", i,
              ", the limit is ", limit);
}

NormWeight norm_weight(std::optional<Floats>& weight, std::optional<Floats>& bias, int64_t size) {
  check_arg(weight.has_value(), "weight must be given");
  return {floats(weight, "weight", size), floats(bias, "bias", size)};
}

// Whether the array's elements are floating-point numbers of this type, or 16 bits that stand for
// one.
void check_kind(const py::array& a, DType dtype, const char* name) {
  const char kind = a.dtype().kind();
  const bool bits = kind == 'u' || (kind == 'V' && dtype == DType::bf16);
  check_arg((kind == 'f' && dtype != DType::bf16) || (bits && dtype != DType::f32), name,
            " holds no ", dtype_name(dtype), " (bfloat16 comes as its bits in uint16)");
}

// A weight matrix in the backend's layout; the bias stays with the caller's arrays, in host memory.
struct Weight {
  LinearWeight w;
  Buffer data;
  std::vector<float> bias;
};

// One layer of a paged cache.
struct Cache {
  KvView view;
  Buffer data;
  Backend* backend = nullptr;

  // [2, num_kv_heads, num_slots, head_dim] float32, K then V, whatever the layout in memory.
  py::array_t<float> read() const {
    std::vector<char> bytes(data.bytes());
    backend->synchronize();
    backend->download(data.data(), bytes.data(), bytes.size());
    const char *k = bytes.data(), *v = bytes.data() + bytes.size() / 2;
    const int64_t slots = static_cast<int64_t>(view.num_blocks) * view.block_size;
    py::array_t<float> out({int64_t{2}, static_cast<int64_t>(view.num_kv_heads), slots,
                            static_cast<int64_t>(view.head_dim)});
    auto o = out.mutable_unchecked<4>();
    for (int32_t h = 0; h < view.num_kv_heads; ++h) {
      for (int64_t s = 0; s < slots; ++s) {
        const int64_t block = s / view.block_size;
        const auto slot = static_cast<int32_t>(s % view.block_size);
        for (int32_t d = 0; d < view.head_dim; ++d) {
          o(0, h, s, d) = element(k, view.k_offset(block, h, slot, d)) * view.k_scale;
          o(1, h, s, d) = element(v, view.v_offset(block, h, slot, d)) * view.v_scale;
        }
      }
    }
    return out;
  }
  float element(const char* base, int64_t i) const {
    switch (view.dtype) {
      case DType::bf16:
        return to_float(reinterpret_cast<const bf16*>(base)[i]);
      case DType::f16:
        return to_float(reinterpret_cast<const f16*>(base)[i]);
      case DType::fp8_e4m3:
        return to_float(reinterpret_cast<const fp8*>(base)[i]);
      default:
        return reinterpret_cast<const float*>(base)[i];
    }
  }
};

const std::map<std::string, Activation> kActivations{{"silu", Activation::silu},
                                                     {"gelu_tanh", Activation::gelu_tanh},
                                                     {"gelu", Activation::gelu},
                                                     {"relu", Activation::relu}};

class Ops {
 public:
  // "staged_cpu": the CPU behind the copies that a card needs, for tests.
  Ops(const std::string& device, const std::string& isa, int num_threads,
      const std::string& activation_dtype) {
    BackendOptions options;
    options.isa = isa;
    options.num_threads = num_threads;
    if (!activation_dtype.empty()) options.activation_dtype = parse_dtype(activation_dtype);
    check_arg(device != "cuda" || isa.empty(), "isa is for CPUs, got '", isa, "' with cuda");
    backend_ = make_backend(device == "staged_cpu" ? "cpu" : device, options);
    activation_dtype_ = backend_->info().activation_dtype;
    check_arg(activation_dtype.empty() || activation_dtype == dtype_name(activation_dtype_),
              "activation_dtype: this device computes in ", dtype_name(activation_dtype_), ", not ",
              activation_dtype);
    if (device != "cpu") backend_ = std::make_unique<StagedBackend>(std::move(backend_));
  }

  std::string activation_dtype() const { return dtype_name(activation_dtype_); }
  std::string name() const { return backend_->info().name; }

  std::unique_ptr<Weight> weight(const py::array& rows, const std::string& source_dtype,
                                 const std::string& dtype, std::optional<Floats> bias) {
    const Tensor src = matrix(rows, parse_dtype(source_dtype), "weight");
    check_kind(rows, src.dtype, "weight");
    check_arg(src.rows() > 0 && src.cols() > 0, "weight must not be empty");
    auto out = std::make_unique<Weight>();
    out->w.spec = {src.rows(), src.cols(), parse_dtype(dtype), bias.has_value()};
    check_arg(activation_dtype_ == DType::f32 || out->w.spec.dtype == activation_dtype_,
              "weights of type ", dtype, " are not supported here; ", activation_dtype(),
              ", the type of activations, is");
    out->data = backend_->alloc(backend_->weight_bytes(out->w.spec));
    out->w.data = out->data.data();
    if (bias) {
      const float* values = floats(bias, "bias", src.rows());
      out->bias.assign(values, values + src.rows());
      out->w.bias = out->bias.data();
    }
    backend_->load_rows(out->w, 0, src);
    return out;
  }

  std::unique_ptr<Cache> cache(int num_blocks, int block_size, int num_kv_heads, int head_dim,
                               const std::string& dtype, float k_scale, float v_scale) {
    check_arg(num_blocks > 0 && num_kv_heads > 0 && head_dim > 0,
              "num_blocks, num_kv_heads and head_dim must be positive");
    check_arg(block_size > 0 && (block_size % 16 == 0 || 16 % block_size == 0),
              "block_size must be 1, 2, 4, 8 or a multiple of 16, got ", block_size);
    auto out = std::make_unique<Cache>();
    out->backend = backend_.get();
    out->view.dtype = dtype == "fp8_e4m3" ? DType::fp8_e4m3 : parse_dtype(dtype);
    out->view.k_tile = backend_->info().k_tile;
    check_arg(k_scale > 0 && v_scale > 0, "k_scale and v_scale must be positive");
    check_arg(out->view.dtype == DType::fp8_e4m3 || (k_scale == 1 && v_scale == 1),
              "k_scale and v_scale are for caches of fp8_e4m3, not of ", dtype);
    out->view.k_scale = k_scale;
    out->view.v_scale = v_scale;
    out->view.num_blocks = num_blocks;
    out->view.block_size = block_size;
    out->view.num_kv_heads = num_kv_heads;
    out->view.head_dim = head_dim;
    const double slots = static_cast<double>(num_blocks) * block_size;
    check_arg(slots < 0x1p31 && slots * num_kv_heads * head_dim < 0x1p40, "a cache of ", slots,
              " slots is too large");
    backend_->check_model(activation_dtype_, num_kv_heads, {}, out->view);
    const auto bytes =
        static_cast<size_t>(out->view.block_bytes()) * static_cast<size_t>(num_blocks);
    out->data = backend_->alloc(bytes);
    out->view.k = out->data.data();
    out->view.v = out->data.data() + bytes / 2;
    return out;
  }

  void embed(const Ints& token_ids, const Ints& positions, const Weight& w, const Floats& out,
             const Weight* position_table, float scale) {
    check_range(token_ids, w.w.spec.out_features, "token_ids");
    check_arg(positions.size() == token_ids.size(), "one position a token");
    EmbedArgs args;
    args.scale = scale;
    if (position_table != nullptr) {
      check_range(positions, position_table->w.spec.out_features, "positions");
      check_arg(position_table->w.spec.in_features == w.w.spec.in_features, "position_table has ",
                position_table->w.spec.in_features, " features, the weight ", w.w.spec.in_features);
      args.positions = &position_table->w;
    }
    StepInputs in;
    in.num_tokens = static_cast<int32_t>(token_ids.size());
    in.token_ids = token_ids.data();
    in.positions = positions.data();
    backend_->embed(in, w.w, args, output(out, "out", in.num_tokens, w.w.spec.in_features));
  }

  NormArgs norm_args(const std::string& kind, float eps) const {
    check_arg(kind == "rms" || kind == "layer", "kind must be 'rms' or 'layer', got '", kind, "'");
    return {kind == "rms" ? NormKind::rms : NormKind::layer, eps};
  }

  void norm(const Floats& x, std::optional<Floats> weight, const Floats& out,
            std::optional<Floats> bias, const std::string& kind, float eps) {
    const Tensor t = input(x, "x");
    const NormWeight w = norm_weight(weight, bias, t.cols());
    backend_->norm(t, w, norm_args(kind, eps), output(out, "out", t.rows(), t.cols()));
  }

  void add_norm(const Floats& x, const Floats& residual, std::optional<Floats> weight,
                const Floats& out, std::optional<Floats> bias, const std::string& kind, float eps) {
    const Tensor t = input(x, "x");
    const NormWeight w = norm_weight(weight, bias, t.cols());
    backend_->add_norm(t, output(residual, "residual", t.rows(), t.cols()), w, norm_args(kind, eps),
                       output(out, "out", t.rows(), t.cols()));
  }

  void linear(const Floats& x, const Weight& w, const Floats& out, bool accumulate) {
    const Tensor t = input(x, "x");
    check_arg(t.cols() == w.w.spec.in_features, "x has ", t.cols(), " features, the weight takes ",
              w.w.spec.in_features);
    LinearArgs args;
    args.accumulate = accumulate;
    backend_->linear(t, w.w, args, output(out, "out", t.rows(), w.w.spec.out_features));
  }

  void rope_kv_write(const Floats& qkv, const Ints& positions, const Slots& slots, Cache& cache,
                     std::optional<Floats> cos, std::optional<Floats> sin,
                     std::optional<Floats> q_norm, std::optional<Floats> k_norm, float eps) {
    const Tensor t = input(qkv, "qkv");
    check_arg(qkv.writeable(), "qkv must be writeable");
    const KvView& kv = cache.view;
    check_arg(t.cols() % kv.head_dim == 0 && t.cols() > 2 * kv.num_kv_heads * kv.head_dim,
              "qkv has ", t.cols(), " columns: not (heads + 2 kv_heads) * head_dim");
    check_arg(positions.size() == t.rows() && slots.size() == t.rows(),
              "one position and one slot a row");
    const int64_t num_slots = static_cast<int64_t>(kv.num_blocks) * kv.block_size;
    for (py::ssize_t i = 0; i < slots.size(); ++i)
      check_arg(slots.data()[i] >= -1 && slots.data()[i] < num_slots, "slot ", slots.data()[i],
                " is out of range");
    RopeArgs args;
    args.norm_eps = eps;
    check_arg(cos.has_value() == sin.has_value(), "cos and sin come together");
    if (cos) {
      const Tensor c = input(*cos, "cos"), s = input(*sin, "sin");
      check_arg(c.row_stride == c.cols() && s.row_stride == s.cols() && c.shape == s.shape,
                "cos and sin must be contiguous and of one shape");
      check_range(positions, c.rows(), "positions");
      args.cos = cos->data();
      args.sin = sin->data();
      args.rotary_dim = static_cast<int32_t>(2 * c.cols());
      check_arg(args.rotary_dim > 0 && args.rotary_dim <= kv.head_dim, "cos and sin rotate ",
                args.rotary_dim, " dimensions of a head of ", kv.head_dim);
    }
    args.q_norm.weight = floats(q_norm, "q_norm", kv.head_dim);
    args.k_norm.weight = floats(k_norm, "k_norm", kv.head_dim);
    StepInputs in;
    in.num_tokens = static_cast<int32_t>(t.rows());
    in.positions = positions.data();
    in.slot_mapping = slots.data();
    backend_->rope_kv_write(t, in, args, kv);
  }

  // cos and sin as the engine fills them, [num_positions, rotary_dim / 2] each.
  py::tuple rope_tables(const RopeConfig& rope, int num_positions) {
    check_arg(num_positions > 0 && !rope.inv_freq.empty(),
              "num_positions and inv_freq must not be empty");
    ModelConfig config;
    config.ropes = {rope};
    const RopeTables tables(config, num_positions, *backend_);
    const RopeArgs args = tables.args(0);
    const auto copy = [&](const float* from) {
      py::array_t<float> to({int64_t{num_positions}, int64_t{args.rotary_dim / 2}});
      backend_->download(from, to.mutable_data(), static_cast<size_t>(to.nbytes()));
      return to;
    };
    return py::make_tuple(copy(args.cos), copy(args.sin));
  }

  // q: [T, heads * head_dim]; sequence s has the rows [cu_seqlens_q[s], cu_seqlens_q[s + 1]).
  void attention(const Floats& q, const Ints& cu_seqlens_q, const Ints& context_lens,
                 const Ints& block_tables, const Cache& cache, const Floats& out, float scale,
                 int window, float softcap) {
    const Tensor t = input(q, "q");
    const KvView& kv = cache.view;
    const py::ssize_t seqs = context_lens.size();
    check_arg(cu_seqlens_q.size() == seqs + 1 && block_tables.ndim() == 2 &&
                  block_tables.shape(0) == seqs,
              "cu_seqlens_q has one entry more than context_lens, block_tables as many rows");
    check_arg(cu_seqlens_q.data()[0] == 0 && cu_seqlens_q.data()[seqs] == t.rows(),
              "cu_seqlens_q must go from 0 to the number of rows");
    check_range(block_tables, kv.num_blocks, "block_tables");
    check_arg(t.cols() % kv.head_dim == 0, "q has ", t.cols(), " columns: not heads * head_dim");
    StepInputs in;
    in.num_tokens = static_cast<int32_t>(t.rows());
    in.num_seqs = static_cast<int32_t>(seqs);
    in.cu_seqlens_q = cu_seqlens_q.data();
    in.context_lens = context_lens.data();
    in.block_tables = block_tables.data();
    in.block_table_stride = static_cast<int32_t>(block_tables.shape(1));
    std::vector<int32_t> positions(static_cast<size_t>(t.rows()));
    for (py::ssize_t s = 0; s < seqs; ++s) {
      const int32_t begin = cu_seqlens_q.data()[s], end = cu_seqlens_q.data()[s + 1];
      const int32_t context = context_lens.data()[s];
      check_arg(end >= begin && end <= t.rows(), "cu_seqlens_q must ascend from 0 to ", t.rows());
      check_arg(context >= end - begin, "sequence ", s, " has ", end - begin,
                " rows and a context of ", context);
      check_arg(context <= int64_t{in.block_table_stride} * kv.block_size, "sequence ", s,
                ": a context of ", context, " does not fit its block table");
      in.max_query_len = std::max(in.max_query_len, end - begin);
      in.max_context_len = std::max(in.max_context_len, context);
      for (int32_t r = begin; r < end; ++r) positions[static_cast<size_t>(r)] = context - (end - r);
    }
    in.positions = positions.data();
    AttnArgs args;
    args.num_heads = static_cast<int32_t>(t.cols() / kv.head_dim);
    args.scale = scale;
    args.window = window;
    args.softcap = softcap;
    check_arg(softcap >= 0, "softcap must not be negative, got ", softcap);
    check_arg(window >= 0, "window must not be negative, got ", window);
    check_arg(args.num_heads % kv.num_kv_heads == 0, "heads must be a multiple of num_kv_heads");
    const Tensor o = output(out, "out", t.rows(), t.cols());
    // The backend takes rows of q, k and v; it reads only q.
    Tensor qkv = t;
    qkv.shape[1] += 2 * kv.num_kv_heads * kv.head_dim;
    backend_->attention(qkv, in, args, kv, o);
  }

  void activation(const Floats& x, const std::string& act, bool gated, const Floats& out) {
    const auto it = kActivations.find(act);
    check_arg(it != kActivations.end(), "activation '", act,
              "' is unknown; known are gelu, gelu_tanh, relu, silu");
    const Tensor t = input(x, "x");
    const int64_t n = gated ? t.cols() / 2 : t.cols();
    check_arg(!gated || t.cols() % 2 == 0, "a gated activation takes an even number of columns");
    backend_->activation(t, it->second, gated, output(out, "out", t.rows(), n));
  }

  void gather_rows(const Floats& x, const Ints& rows, const Floats& out) {
    const Tensor t = input(x, "x");
    check_range(rows, t.rows(), "rows");
    backend_->gather_rows(t, rows.data(), rows.size(), output(out, "out", rows.size(), t.cols()));
  }

  void copy_blocks(Cache& cache, const std::vector<std::pair<int32_t, int32_t>>& pairs) {
    std::vector<BlockCopy> copies;
    for (const auto& [src, dst] : pairs) {
      check_arg(std::min(src, dst) >= 0 && std::max(src, dst) < cache.view.num_blocks,
                "block copy (", src, ", ", dst, ") is out of range");
      copies.push_back({src, dst});
    }
    StepInputs in;
    in.num_copies = static_cast<int32_t>(copies.size());
    in.copies = copies.data();
    backend_->copy_blocks(in, cache.view);
  }

  // rows: one dict a row of logits with fields of SamplingRow, and "counts" {token: output count},
  // "bias" {token: bias}, "mask" [vocab] of bool.
  py::dict sample(const Floats& logits, const std::vector<py::dict>& rows, int max_logprobs) {
    const Tensor given = input(logits, "logits");
    const auto n = static_cast<size_t>(given.rows()), vocab = static_cast<size_t>(given.cols());
    check_arg(rows.size() == n, "one dict a row of logits");
    check_arg(vocab > 0, "logits must have columns");
    check_arg(max_logprobs >= 0 && static_cast<size_t>(max_logprobs) <= vocab,
              "max_logprobs is out of range");
    SampleRequest r;
    for (const py::dict& row : rows) r.add(row, vocab, max_logprobs);
    std::vector<float> scratch(n * vocab);  // sample() may overwrite its logits
    for (size_t i = 0; i < n; ++i) {
      const Tensor row = given.rows(static_cast<int64_t>(i), 1);
      std::copy_n(row.as<float>(), vocab, scratch.data() + i * vocab);
    }
    const auto top = static_cast<size_t>(max_logprobs);
    py::array_t<int32_t> ids(static_cast<py::ssize_t>(n)), ranks(static_cast<py::ssize_t>(n));
    py::array_t<float> logprobs(static_cast<py::ssize_t>(n));
    py::array_t<int32_t> top_ids({n, top});
    py::array_t<float> top_logprobs({n, top});
    // What a row does not ask for: NaN, rank 0, token -1.
    std::fill_n(logprobs.mutable_data(), n, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(ranks.mutable_data(), n, 0);
    std::fill_n(top_ids.mutable_data(), n * top, -1);
    std::fill_n(top_logprobs.mutable_data(), n * top, std::numeric_limits<float>::quiet_NaN());
    const SampleOutputs out{ids.mutable_data(),          logprobs.mutable_data(),
                            ranks.mutable_data(),        top_ids.mutable_data(),
                            top_logprobs.mutable_data(), max_logprobs};
    backend_->sample(Tensor(scratch.data(), DType::f32, {given.rows(), given.cols()}), r.inputs(),
                     0, out);
    py::dict d;
    d["token_ids"] = ids;
    d["logprobs"] = logprobs;
    d["ranks"] = ranks;
    d["top_ids"] = top_ids;
    d["top_logprobs"] = top_logprobs;
    return d;
  }

 private:
  struct SampleRequest {
    std::vector<SamplingRow> rows;
    std::vector<TokenCount> counts;
    std::vector<TokenBias> biases;
    std::vector<uint32_t> masks;

    void add(const py::dict& fields, size_t vocab, int max_logprobs) {
      SamplingRow row;
      for (const auto& [key, value] : fields) {
        const auto name = py::cast<std::string>(py::str(key));
        try {
          set_field(row, name, value, vocab);
        } catch (const py::cast_error&) {
          throw std::invalid_argument(
              concat(name, ": cannot take ", py::cast<std::string>(py::repr(value)), " here"));
        }
      }
      check_arg(row.num_logprobs >= -1 && row.num_logprobs <= max_logprobs,
                "num_logprobs must be in [-1, ", max_logprobs, "] (max_logprobs), got ",
                row.num_logprobs);
      rows.push_back(row);
    }

    void set_field(SamplingRow& row, const std::string& name, const py::handle& value,
                   size_t vocab) {
      if (name == "temperature")
        row.temperature = py::cast<float>(value);
      else if (name == "top_p")
        row.top_p = py::cast<float>(value);
      else if (name == "min_p")
        row.min_p = py::cast<float>(value);
      else if (name == "top_k")
        row.top_k = py::cast<int32_t>(value);
      else if (name == "repetition_penalty")
        row.repetition_penalty = py::cast<float>(value);
      else if (name == "presence_penalty")
        row.presence_penalty = py::cast<float>(value);
      else if (name == "frequency_penalty")
        row.frequency_penalty = py::cast<float>(value);
      else if (name == "num_logprobs")
        row.num_logprobs = py::cast<int32_t>(value);
      else if (name == "target")
        row.target = in_vocab(py::cast<int32_t>(value), vocab);
      else if (name == "choice")
        row.choice = py::cast<uint32_t>(value);
      else if (name == "seed")
        row.seed = py::cast<uint64_t>(value);
      else if (name == "position")
        row.position = py::cast<int32_t>(value);
      else if (name == "counts")
        set_counts(row, py::cast<std::map<int32_t, int32_t>>(value), vocab);
      else if (name == "bias")
        set_bias(row, py::cast<std::map<int32_t, float>>(value), vocab);
      else if (name == "mask")
        set_mask(row, py::cast<Bools>(value), vocab);
      else
        throw std::invalid_argument(concat("a sampling row has no field '", name, "'"));
    }

    void set_counts(SamplingRow& row, const std::map<int32_t, int32_t>& values, size_t vocab) {
      row.counts_begin = static_cast<int32_t>(counts.size());
      for (const auto& [token, count] : values) counts.push_back({in_vocab(token, vocab), count});
      row.counts_end = static_cast<int32_t>(counts.size());
    }

    void set_bias(SamplingRow& row, const std::map<int32_t, float>& values, size_t vocab) {
      row.bias_begin = static_cast<int32_t>(biases.size());
      for (const auto& [token, bias] : values) biases.push_back({in_vocab(token, vocab), bias});
      row.bias_end = static_cast<int32_t>(biases.size());
    }

    void set_mask(SamplingRow& row, const Bools& allowed, size_t vocab) {
      check_arg(static_cast<size_t>(allowed.size()) == vocab, "mask must have ", vocab,
                " entries, got ", allowed.size());
      const size_t words = (vocab + 31) / 32, first = masks.size();
      row.mask_row = static_cast<int32_t>(first / words);
      masks.resize(first + words, 0u);
      for (size_t t = 0; t < vocab; ++t)
        if (allowed.data()[t]) masks[first + t / 32] |= 1u << (t % 32);
    }

    static int32_t in_vocab(int32_t token, size_t vocab) {
      check_arg(token >= 0 && static_cast<size_t>(token) < vocab, "token ", token,
                " is not in the vocabulary of ", vocab);
      return token;
    }

    StepInputs inputs() const {
      StepInputs in;
      in.num_logits = static_cast<int32_t>(rows.size());
      in.sampling = rows.data();
      in.token_counts = counts.data();
      in.token_biases = biases.data();
      in.token_masks = masks.data();
      return in;
    }
  };

  std::unique_ptr<Backend> backend_;
  DType activation_dtype_ = DType::f32;  // in which the device computes
};

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<Weight>(m, "Weight").def_property_readonly("bytes", [](const Weight& w) {
    return w.data.bytes();
  });
  py::class_<Cache>(m, "Cache").def("read", &Cache::read);
  const py::object none = py::none();
  py::class_<Ops>(m, "Ops")
      .def(py::init<const std::string&, const std::string&, int, const std::string&>(),
           py::arg("device") = "cpu", py::arg("isa") = "", py::arg("num_threads") = 0,
           py::arg("activation_dtype") = "")
      .def_property_readonly("name", &Ops::name)
      .def_property_readonly("activation_dtype", &Ops::activation_dtype)
      .def("weight", &Ops::weight, py::arg("rows"), py::arg("source_dtype") = "float32",
           py::arg("dtype") = "float32", py::arg("bias") = none, py::keep_alive<0, 1>())
      .def("cache", &Ops::cache, py::arg("num_blocks"), py::arg("block_size"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("dtype") = "float32",
           py::arg("k_scale") = 1.0f, py::arg("v_scale") = 1.0f, py::keep_alive<0, 1>())
      .def("embed", &Ops::embed, py::arg("token_ids"), py::arg("positions"), py::arg("w"),
           py::arg("out").noconvert(), py::arg("position_table") = nullptr, py::arg("scale") = 1.0f)
      .def("norm", &Ops::norm, py::arg("x"), py::arg("weight"), py::arg("out").noconvert(),
           py::arg("bias") = none, py::arg("kind") = "rms", py::arg("eps") = 1e-6f)
      .def("add_norm", &Ops::add_norm, py::arg("x"), py::arg("residual").noconvert(),
           py::arg("weight"), py::arg("out").noconvert(), py::arg("bias") = none,
           py::arg("kind") = "rms", py::arg("eps") = 1e-6f)
      .def("linear", &Ops::linear, py::arg("x"), py::arg("w"), py::arg("out").noconvert(),
           py::arg("accumulate") = false)
      .def("rope_tables", &Ops::rope_tables, py::arg("rope"), py::arg("num_positions"))
      .def("rope_kv_write", &Ops::rope_kv_write, py::arg("qkv").noconvert(), py::arg("positions"),
           py::arg("slots"), py::arg("cache"), py::arg("cos") = none, py::arg("sin") = none,
           py::arg("q_norm") = none, py::arg("k_norm") = none, py::arg("eps") = 1e-6f)
      .def("attention", &Ops::attention, py::arg("q"), py::arg("cu_seqlens_q"),
           py::arg("context_lens"), py::arg("block_tables"), py::arg("cache"),
           py::arg("out").noconvert(), py::arg("scale"), py::arg("window") = 0,
           py::arg("softcap") = 0.0f)
      .def("activation", &Ops::activation, py::arg("x"), py::arg("act"), py::arg("gated"),
           py::arg("out").noconvert())
      .def("gather_rows", &Ops::gather_rows, py::arg("x"), py::arg("rows"),
           py::arg("out").noconvert())
      .def("copy_blocks", &Ops::copy_blocks, py::arg("cache"), py::arg("pairs"))
      .def("sample", &Ops::sample, py::arg("logits"), py::arg("rows"), py::arg("max_logprobs") = 0);
}

}  // namespace ni::python
