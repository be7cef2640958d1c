// Every operator of a backend on memory that somebody else owns (torch tensors): addresses, shapes
// and strides in elements, on the caller's stream. nano_inference/ops.py gives it a face and checks
// types and shapes there; here is what the operators need beside their tensors.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <optional>

#include "backend/registry.h"
#include "bindings.h"
#include "core/attn_items.h"

namespace ni::python {
namespace {

// (address, shape, strides, torch's name of the type)
struct Array {
  char* data = nullptr;
  std::vector<int64_t> shape, strides;
  DType dtype = DType::f32;

  explicit Array(const py::tuple& t)
      : data(reinterpret_cast<char*>(py::cast<uintptr_t>(t[0]))),
        shape(py::cast<std::vector<int64_t>>(t[1])),
        strides(py::cast<std::vector<int64_t>>(t[2])) {
    static const std::map<std::string, DType> types{
        {"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float8_e4m3fn", DType::fp8_e4m3},
        {"float16", DType::f16}, {"int32", DType::i32},     {"int64", DType::i64}};
    const auto name = py::cast<std::string>(t[3]);
    const auto it = types.find(name);
    check_arg(it != types.end(), "tensors of type ", name, " are not supported");
    dtype = it->second;
  }
  int64_t size() const {
    int64_t n = 1;
    for (const int64_t s : shape) n *= s;
    return n;
  }
  // Dimensions after the first are dense.
  Tensor rows() const {
    Tensor t(data, dtype, {shape.at(0), shape.at(0) > 0 ? size() / shape[0] : shape.back()});
    t.row_stride = strides.at(0);
    return t;
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

using MaybeArray = std::optional<py::tuple>;

float* floats(const MaybeArray& a) {
  return a ? Array(*a).as<float>() : nullptr;
}

Activation activation_of(const std::string& name) {
  static const std::map<std::string, Activation> known{{"silu", Activation::silu},
                                                       {"gelu_tanh", Activation::gelu_tanh},
                                                       {"gelu", Activation::gelu},
                                                       {"relu", Activation::relu}};
  const auto it = known.find(name);
  check_arg(it != known.end(), "kind '", name,
            "' is unknown; known are gelu, gelu_tanh, relu, silu");
  return it->second;
}

// The arrays of one call's StepInputs in the backend's memory. A few blocks take turns, so that a
// call need not wait until the last one's are copied; what the card still reads is overwritten in
// the order of its stream.
class StepBlocks {
 public:
  explicit StepBlocks(Backend& backend) : backend_(backend) {}

  // Starts a block; add() what goes into it, then place(), then upload().
  void begin() { image_.assign(round_up(sizeof(StepInputs)), 0); }
  template <typename T>
  size_t add(const T* from, int64_t n) {
    const size_t begin = image_.size(), bytes = static_cast<size_t>(n) * sizeof(T);
    image_.resize(begin + round_up(bytes));
    if (bytes > 0) std::memcpy(image_.data() + begin, from, bytes);
    return begin;
  }
  void place() {
    Block& block = blocks_[++turn_ % blocks_.size()];
    if (block.mark) backend_.wait(*block.mark);
    if (block.host.bytes() < image_.size()) {
      block = {};
      block.host = backend_.alloc_host(2 * image_.size());
      block.device = backend_.alloc(2 * image_.size());
    }
  }
  template <typename T>
  T* at(size_t offset) {
    return reinterpret_cast<T*>(current().device.data() + offset);
  }
  void upload(StepInputs& in) {
    in.device = at<StepInputs>(0);
    std::memcpy(image_.data(), &in, sizeof(in));
    std::memcpy(current().host.data(), image_.data(), image_.size());
    backend_.upload(current().host.data(), current().device.data(), image_.size());
    current().mark = backend_.mark();
  }

 private:
  struct Block {
    Buffer host, device;
    std::optional<uint64_t> mark;
  };
  static size_t round_up(size_t n) { return (n + 63) / 64 * 64; }
  Block& current() { return blocks_[turn_ % blocks_.size()]; }

  Backend& backend_;
  std::vector<char> image_;
  std::array<Block, 4> blocks_;
  size_t turn_ = 0;
};

class TensorOps {
 public:
  TensorOps(const std::string& device, int index, const std::string& dtype) {
    BackendOptions options;
    // A guest's products are planned without timing and comparing, so bits may depend on the rows.
    options.batch_invariant = false;
    options.device_index = index;
    if (device == "cuda") options.activation_dtype = parse_dtype(dtype);
    backend_ = make_backend(device, options);
    blocks_ = std::make_unique<StepBlocks>(*backend_);
  }

  // What follows runs on this stream (a cudaStream_t). Working memory is shared between calls, so
  // the work on another stream has to end first.
  void set_stream(uintptr_t stream) {
    if (stream_ == stream) return;
    if (stream_) backend_->synchronize();
    ni::set_stream(*backend_, reinterpret_cast<void*>(stream));
    stream_ = stream;
  }

  int k_tile() const { return backend_->info().k_tile; }

  void norm(const py::tuple& x, const MaybeArray& residual, const py::tuple& weight,
            const MaybeArray& bias, const std::string& kind, float eps, const py::tuple& out) {
    const NormWeight w{Array(weight).as<float>(), floats(bias)};
    const NormArgs args{kind == "rms" ? NormKind::rms : NormKind::layer, eps};
    if (residual) {
      backend_->add_norm(Array(x).rows(), Array(*residual).rows(), w, args, Array(out).rows());
    } else {
      backend_->norm(Array(x).rows(), w, args, Array(out).rows());
    }
  }

  void linear(const py::tuple& x, const py::tuple& weight, const MaybeArray& bias,
              const py::tuple& out) {
    with_weight(weight, bias, [&](const LinearWeight& w) {
      backend_->linear(Array(x).rows(), w, {}, Array(out).rows());
    });
  }

  void embedding(const py::tuple& token_ids, const py::tuple& weight, float scale,
                 const py::tuple& out) {
    const Array ids(token_ids);
    StepInputs in;
    in.num_tokens = static_cast<int32_t>(ids.size());
    in.token_ids = ids.as<int32_t>();
    with_weight(weight, {}, [&](const LinearWeight& w) {
      backend_->embed(in, w, {scale, nullptr}, Array(out).rows());
    });
  }

  void activation(const py::tuple& x, const std::string& kind, bool gated, const py::tuple& out) {
    backend_->activation(Array(x).rows(), activation_of(kind), gated, Array(out).rows());
  }

  void gather_rows(const py::tuple& x, const py::tuple& rows, const py::tuple& out) {
    const Array wanted(rows);
    backend_->gather_rows(Array(x).rows(), wanted.as<int32_t>(), wanted.size(), Array(out).rows());
  }

  void rope_kv_write(const py::tuple& qkv, const py::tuple& positions, const py::tuple& slots,
                     const py::tuple& k_cache, const py::tuple& v_cache, const MaybeArray& cos,
                     const MaybeArray& sin, const MaybeArray& q_norm, const MaybeArray& k_norm,
                     float eps, float k_scale, float v_scale) {
    const Tensor t = Array(qkv).rows();
    RopeArgs args;
    args.norm_eps = eps;
    args.cos = floats(cos);
    args.sin = floats(sin);
    if (cos) args.rotary_dim = static_cast<int32_t>(2 * Array(*cos).shape.at(1));
    args.q_norm.weight = floats(q_norm);
    args.k_norm.weight = floats(k_norm);
    StepInputs in;
    in.num_tokens = static_cast<int32_t>(t.rows());
    in.positions = Array(positions).as<int32_t>();
    in.slot_mapping = Array(slots).as<int64_t>();
    backend_->rope_kv_write(t, in, args, cache_view(k_cache, v_cache, k_scale, v_scale));
  }

  // cu_seqlens_q and context_lens lie in host memory, all else where the backend computes.
  void attention(const py::tuple& q, const py::tuple& k_cache, const py::tuple& v_cache,
                 const py::tuple& block_tables, const py::tuple& context_lens,
                 const py::tuple& cu_seqlens_q, float scale, int window, float softcap,
                 float k_scale, float v_scale, const py::tuple& out) {
    const Array queries(q), tables(block_tables);
    const KvView kv = cache_view(k_cache, v_cache, k_scale, v_scale);
    const AttnArgs args{static_cast<int32_t>(queries.shape.at(1)), scale, window, softcap};
    const auto* starts = Array(cu_seqlens_q).as<int32_t>();
    const auto* contexts = Array(context_lens).as<int32_t>();
    StepInputs in;
    in.num_tokens = static_cast<int32_t>(queries.shape[0]);
    in.num_seqs = static_cast<int32_t>(tables.shape.at(0));
    in.block_tables = tables.as<int32_t>();
    in.block_table_stride = static_cast<int32_t>(tables.strides.at(0));
    const std::vector<int32_t> positions =
        check_sequences(in, starts, contexts, tables.shape.at(1) * kv.block_size);
    const AttnTiling& tiling = backend_->info().tiling;
    if (tiling.kv_chunk > 0) build_attn_items(starts, contexts, in.num_seqs, tiling, lists_, in);

    blocks_->begin();
    const size_t starts_at = blocks_->add(starts, in.num_seqs + 1);
    const size_t contexts_at = blocks_->add(contexts, in.num_seqs);
    const size_t positions_at = blocks_->add(positions.data(), in.num_tokens);
    const auto list_at = [&](const auto& v) { return blocks_->add(v.data(), std::ssize(v)); };
    const size_t decode_at = list_at(lists_.decode), prefill_at = list_at(lists_.prefill);
    const size_t cuts_at = list_at(lists_.cuts);
    blocks_->place();
    in.cu_seqlens_q = blocks_->at<int32_t>(starts_at);
    in.context_lens = blocks_->at<int32_t>(contexts_at);
    in.positions = blocks_->at<int32_t>(positions_at);
    in.decode_items = blocks_->at<AttnItem>(decode_at);
    in.prefill_items = blocks_->at<AttnItem>(prefill_at);
    in.decode_cuts = blocks_->at<DecodeCut>(cuts_at);
    blocks_->upload(in);
    // The operator takes rows of q, k and v; it reads only q.
    Tensor qkv = queries.rows();
    qkv.shape[1] += 2 * kv.num_kv_heads * kv.head_dim;
    backend_->attention(qkv, in, args, kv, Array(out).rows());
  }

  // pairs: [n, 2] in host memory.
  void copy_blocks(const py::tuple& k_cache, const py::tuple& v_cache, const py::tuple& pairs) {
    const KvView kv = cache_view(k_cache, v_cache, 1, 1);
    const Array list(pairs);
    const auto* copies = list.as<BlockCopy>();
    StepInputs in;
    in.num_copies = static_cast<int32_t>(list.shape.at(0));
    for (int32_t i = 0; i < in.num_copies; ++i) {
      const auto [src, dst] = copies[i];
      check_arg(std::min(src, dst) >= 0 && std::max(src, dst) < kv.num_blocks && src != dst,
                "pairs: (", src, ", ", dst, ") cannot be copied in a cache of ", kv.num_blocks,
                " blocks");
    }
    if (in.num_copies == 0) return;
    blocks_->begin();
    const size_t copies_at = blocks_->add(copies, in.num_copies);
    blocks_->place();
    in.copies = blocks_->at<BlockCopy>(copies_at);
    blocks_->upload(in);
    backend_->copy_blocks(in, kv);
  }

  // Overwrites the logits. The parameters: [rows] each, in host memory.
  void sample(const py::tuple& logits, const py::tuple& temperature, const py::tuple& top_k,
              const py::tuple& top_p, const py::tuple& min_p, const py::tuple& seeds,
              const py::tuple& positions, const py::tuple& out) {
    const Tensor t = Array(logits).rows();
    if (t.rows() == 0) return;
    std::vector<SamplingRow> rows(static_cast<size_t>(t.rows()));
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i].temperature = Array(temperature).as<float>()[i];
      rows[i].top_k = Array(top_k).as<int32_t>()[i];
      rows[i].top_p = Array(top_p).as<float>()[i];
      rows[i].min_p = Array(min_p).as<float>()[i];
      rows[i].seed = static_cast<uint64_t>(Array(seeds).as<int64_t>()[i]);
      rows[i].position = Array(positions).as<int32_t>()[i];
    }
    StepInputs in;
    in.num_logits = static_cast<int32_t>(rows.size());
    blocks_->begin();
    const size_t rows_at = blocks_->add(rows.data(), in.num_logits);
    blocks_->place();
    in.sampling = blocks_->at<SamplingRow>(rows_at);
    blocks_->upload(in);
    SampleOutputs results;
    results.token_ids = Array(out).as<int32_t>();
    backend_->sample(t, in, 0, results);
  }

 private:
  // A weight in the backend's layout. A card's is rows padded to 64 elements, as ops.py gives them,
  // so they are used where they lie; a CPU's has to be packed.
  template <typename F>
  void with_weight(const py::tuple& rows, const MaybeArray& bias, const F& f) {
    const Tensor src = Array(rows).rows();
    LinearWeight w;
    w.spec = {src.rows(), src.cols(), src.dtype, bias.has_value()};
    w.bias = floats(bias);
    if (backend_->info().device != "cpu") {
      check_arg(src.row_stride == (src.cols() + 63) / 64 * 64, "weight: rows are ", src.row_stride,
                " elements apart, must be padded to a multiple of 64");
      w.data = src.data;
      return f(w);
    }
    const Buffer packed = backend_->alloc(backend_->weight_bytes(w.spec));
    w.data = packed.data();
    backend_->load_rows(w, 0, src);
    f(w);
  }

  // Caches [num_blocks, num_kv_heads, block_size, head_dim], dense within a block.
  KvView cache_view(const py::tuple& k_cache, const py::tuple& v_cache, float k_scale,
                    float v_scale) const {
    const Array k(k_cache), v(v_cache);
    KvView kv;
    kv.k = k.data;
    kv.v = v.data;
    kv.dtype = k.dtype;
    kv.num_blocks = static_cast<int32_t>(k.shape.at(0));
    kv.num_kv_heads = static_cast<int32_t>(k.shape.at(1));
    kv.block_size = static_cast<int32_t>(k.shape.at(2));
    kv.head_dim = static_cast<int32_t>(k.shape.at(3));
    kv.block_stride = k.strides.at(0);
    kv.k_tile = backend_->info().k_tile;
    kv.k_scale = k_scale;
    kv.v_scale = v_scale;
    return kv;
  }

  // Fills in the longest ones and returns each row's position. most: tokens that a table holds.
  static std::vector<int32_t> check_sequences(StepInputs& in, const int32_t* starts,
                                              const int32_t* contexts, int64_t most) {
    check_arg(starts[0] == 0 && starts[in.num_seqs] == in.num_tokens,
              "cu_seqlens_q must go from 0 to the ", in.num_tokens, " rows of q");
    std::vector<int32_t> positions(static_cast<size_t>(in.num_tokens));
    for (int32_t s = 0; s < in.num_seqs; ++s) {
      const int32_t rows = starts[s + 1] - starts[s];
      check_arg(rows >= 0 && starts[s + 1] <= in.num_tokens, "cu_seqlens_q must ascend");
      check_arg(contexts[s] >= rows && contexts[s] <= most, "context_lens: sequence ", s, " has ",
                rows, " rows, a context of ", contexts[s], " and blocks for ", most, " tokens");
      in.max_query_len = std::max(in.max_query_len, rows);
      in.max_context_len = std::max(in.max_context_len, contexts[s]);
      for (int32_t r = 0; r < rows; ++r)
        positions[static_cast<size_t>(starts[s] + r)] = contexts[s] - rows + r;
    }
    return positions;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<StepBlocks> blocks_;
  std::optional<uintptr_t> stream_;
  AttnLists lists_;
};

}  // namespace

void bind_torch_ops(py::module_& m) {
  py::class_<TensorOps>(m, "TensorOps")
      .def(py::init<const std::string&, int, const std::string&>(), py::arg("device"),
           py::arg("index"), py::arg("dtype"))
      .def_property_readonly("k_tile", &TensorOps::k_tile)
      .def("set_stream", &TensorOps::set_stream, py::arg("stream"))
      .def("norm", &TensorOps::norm, py::arg("x"), py::arg("residual"), py::arg("weight"),
           py::arg("bias"), py::arg("kind"), py::arg("eps"), py::arg("out"))
      .def("linear", &TensorOps::linear, py::arg("x"), py::arg("weight"), py::arg("bias"),
           py::arg("out"))
      .def("embedding", &TensorOps::embedding, py::arg("token_ids"), py::arg("weight"),
           py::arg("scale"), py::arg("out"))
      .def("activation", &TensorOps::activation, py::arg("x"), py::arg("kind"), py::arg("gated"),
           py::arg("out"))
      .def("gather_rows", &TensorOps::gather_rows, py::arg("x"), py::arg("rows"), py::arg("out"))
      .def("rope_kv_write", &TensorOps::rope_kv_write, py::arg("qkv"), py::arg("positions"),
           py::arg("slots"), py::arg("k_cache"), py::arg("v_cache"), py::arg("cos"), py::arg("sin"),
           py::arg("q_norm"), py::arg("k_norm"), py::arg("eps"), py::arg("k_scale"),
           py::arg("v_scale"))
      .def("attention", &TensorOps::attention, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
           py::arg("block_tables"), py::arg("context_lens"), py::arg("cu_seqlens_q"),
           py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("k_scale"),
           py::arg("v_scale"), py::arg("out"))
      .def("copy_blocks", &TensorOps::copy_blocks, py::arg("k_cache"), py::arg("v_cache"),
           py::arg("pairs"))
      .def("sample", &TensorOps::sample, py::arg("logits"), py::arg("temperature"),
           py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seeds"),
           py::arg("positions"), py::arg("out"));
}

}  // namespace ni::python
