#include "cuda/linear.h"

#include <cublasLt.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <tuple>

#include "cuda/check_cuda.h"
#include "cuda/linear_plan.h"

namespace ni::cuda {
namespace {

constexpr size_t kWorkspaceBytes = 32 << 20;
constexpr uint32_t kAlignment = 16;  // bytes, of the rows of x, W and out
constexpr int kMaxCandidates = 8;
constexpr int64_t kSmallWeight = 1 << 21;  // elements
constexpr int64_t kSkinnyRows = 64;        // up to so many, our own kernel is a candidate
constexpr int64_t kSkinnyRowsSm90 = 256;   // Hopper's
// Numbers of rows for which a plan is chosen; others take the plan of the next larger one.
constexpr int64_t kBuckets[] = {1,   2,   4,   8,   16,  32,   48,   64,   96,   128,  160,
                                192, 224, 256, 384, 512, 1024, 2048, 4096, 8192, 16384};
// For so many rows the candidates of others are tried, too: what cuBLASLt suggests for one number
// is at times much slower than what it does for another.
constexpr int64_t kOtherRows[] = {32, 64, 128, 192, 256};
constexpr int64_t kFewRows = 32, kMostWithOthers = 256;

void check_cublas(cublasStatus_t status, const char* what) {
  check_runtime(status == CUBLAS_STATUS_SUCCESS, what, ": ", cublasLtGetStatusString(status));
}

int64_t bucket_of(int64_t rows) {
  for (const int64_t bucket : kBuckets)
    if (rows <= bucket) return bucket;
  return std::end(kBuckets)[-1];  // is_valid() asks for the exact number
}

// The fewest rows that take the plan of a bucket.
int64_t least_rows(int64_t bucket) {
  int64_t before = 0;
  for (const int64_t b : kBuckets)
    if (b < bucket) before = b;
  return before + 1;
}

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::bf16 ? CUDA_R_16BF : dtype == DType::f16 ? CUDA_R_16F : CUDA_R_32F;
}

// One product: its sizes and kinds, and the bucket of its rows.
struct Key {
  int64_t n, k, bucket;
  bool f32_out, bias, accumulate;
  bool operator<(const Key& o) const {
    return std::tie(n, k, bucket, f32_out, bias, accumulate) <
           std::tie(o.n, o.k, o.bucket, o.f32_out, o.bias, o.accumulate);
  }
};

// Which of our kernels takes along what stands around a product.
enum class Kernel { none, skinny, large };

struct Plan {
  bool skinny = true;
  cublasLtMatmulAlgo_t algo{};
  // So many are computed, where there is room for them (LinearArgs::spare_rows); 0: those that
  // there are. A tile that ends beyond the last row takes longer than a full one: the copy engine
  // is slow at filling in zeros.
  int64_t rows = 0;
  float microseconds = 0;  // 0: not timed
  // linear_skinny takes a gate along in less time; linear_large takes one, or QK-norm and rotation,
  // in less than that and all else. Of logits: where only their units are asked for, the one makes
  // them in less time than the plan, the other in less than that.
  bool skinny_gates = false, large = false;
};

template <typename T>
T algo_attribute(const cublasLtMatmulAlgo_t& algo, cublasLtMatmulAlgoConfigAttributes_t which) {
  T value{};
  size_t written = 0;
  cublasLtMatmulAlgoConfigGetAttribute(&algo, which, &value, sizeof(value), &written);
  return value;
}

bool splits_the_sum(const cublasLtMatmulAlgo_t& algo) {
  return algo_attribute<int32_t>(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) > 1 ||
         algo_attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) !=
             CUBLASLT_REDUCTION_SCHEME_NONE;
}

// What cuBLASLt wants to know of y = x W^T, column by column: D [n, m] = W' [k, n]^T x' [k, m].
struct Problem {
  cublasLtMatmulDescOpaque_t matmul;
  cublasLtMatrixLayoutOpaque_t w, x, out;

  Problem(const Key& key, int64_t rows, int64_t w_stride, int64_t x_stride, int64_t out_stride,
          DType dtype, const void* bias) {
    const cudaDataType_t in = data_type(dtype), d = key.f32_out ? CUDA_R_32F : in;
    // Weights are zero and x is finite up to a multiple of 8 columns.
    const auto k = static_cast<uint64_t>((key.k + 7) / 8 * 8);
    check_cublas(cublasLtMatmulDescInit(&matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                 "cublasLtMatmulDescInit");
    set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    if (key.bias) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
      set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, in);
    }
    const auto n = static_cast<uint64_t>(key.n), m = static_cast<uint64_t>(rows);
    check_cublas(cublasLtMatrixLayoutInit(&w, in, k, n, w_stride), "cublasLtMatrixLayoutInit");
    check_cublas(cublasLtMatrixLayoutInit(&x, in, k, m, x_stride), "cublasLtMatrixLayoutInit");
    check_cublas(cublasLtMatrixLayoutInit(&out, d, n, m, out_stride), "cublasLtMatrixLayoutInit");
  }
  template <typename T>
  void set(cublasLtMatmulDescAttributes_t which, const T& value) {
    check_cublas(cublasLtMatmulDescSetAttribute(&matmul, which, &value, sizeof(value)),
                 "cublasLtMatmulDescSetAttribute");
  }
};

void add_fusion(SkinnyArgs& args, const LinearArgs& a) {
  args.accumulate = a.accumulate;
  if (a.norm != nullptr) args.norm = *a.norm;
  args.norm_eps = a.norm_args.eps;
  args.gated = a.gated;
  args.act = a.act;
}

std::string to_hex(const cublasLtMatmulAlgo_t& algo) {
  std::string text;
  char digits[3];
  for (size_t i = 0; i < sizeof(algo); ++i) {
    std::snprintf(digits, sizeof(digits), "%02x", reinterpret_cast<const uint8_t*>(&algo)[i]);
    text += digits;
  }
  return text;
}

bool from_hex(const std::string& text, cublasLtMatmulAlgo_t& algo) {
  if (text.size() != 2 * sizeof(algo)) return false;
  for (size_t i = 0; i < sizeof(algo); ++i) {
    const std::string digits = text.substr(2 * i, 2);
    if (digits.find_first_not_of("0123456789abcdef") != std::string::npos) return false;
    reinterpret_cast<uint8_t*>(&algo)[i] = static_cast<uint8_t>(std::stoi(digits, nullptr, 16));
  }
  return true;
}

}  // namespace

struct Linear::Impl {
  Card card;
  Options options;
  cudaStream_t stream;
  cublasLtHandle_t handle = nullptr;
  void* workspace = nullptr;
  void* biases = nullptr;
  std::map<const float*, const void*> bias16;  // of a weight's fp32 bias
  std::map<Key, Plan> plans;
  // Whether a plan runs an exact number of rows, and the strides of x and out.
  std::map<std::tuple<Key, int64_t, int64_t, int64_t>, bool> valid;
  int num_timed = 0;
  LogitUnits timed_units;  // while plans are timed

  Impl(const Card& c, const Options& o, cudaStream_t s) : card(c), options(o), stream(s) {}
  Impl(const Impl&) = delete;
  ~Impl() {
    cudaFree(biases);
    cudaFree(workspace);
    if (handle != nullptr) cublasLtDestroy(handle);
  }

  Key key_of(const LinearWeight& w, const LinearArgs& a, int64_t rows, bool f32_out) const {
    return {w.spec.out_features, w.spec.in_features, bucket_of(rows), f32_out,
            w.bias != nullptr,   a.accumulate};
  }

  SkinnyArgs skinny_args(const Tensor& x, const LinearWeight& w, const Tensor& out) const {
    SkinnyArgs a;
    a.x = x.data;
    a.x_stride = x.row_stride;
    a.rows = x.rows();
    a.w = w.data;
    a.w_stride = weight_stride(w.spec.in_features);
    a.in_features = w.spec.in_features;
    a.out_features = w.spec.out_features;
    a.bias = w.bias;
    a.dtype = options.dtype;
    a.out = out.data;
    a.out_dtype = out.dtype;
    a.out_stride = out.row_stride;
    return a;
  }

  // units: are made where has_units() says so; `only` these where they are.
  cublasStatus_t multiply(const Plan& plan, const Tensor& x, const LinearWeight& w, const Key& key,
                          const Tensor& out, cudaStream_t on, bool settled = true,
                          const LogitUnits& units = {}) {
    if (plan.skinny) {
      SkinnyArgs args = skinny_args(x, w, out);
      args.accumulate = key.accumulate;
      args.settled = settled;
      if (has_units(plan, x, w, out)) args.units = units;
      linear_skinny(args, card, on);
      return CUBLAS_STATUS_SUCCESS;
    }
    Problem problem = describe(x, w, key, out);
    const float one = 1, zero = 0;
    return cublasLtMatmul(handle, &problem.matmul, &one, w.data, &problem.w, x.data, &problem.x,
                          &zero, out.data, &problem.out, out.data, &problem.out, &plan.algo,
                          workspace, kWorkspaceBytes, on);
  }

  bool has_units(const Plan& plan, const Tensor& x, const LinearWeight& w,
                 const Tensor& out) const {
    return plan.skinny && makes_units(skinny_args(x, w, out), card);
  }

  Problem describe(const Tensor& x, const LinearWeight& w, const Key& key,
                   const Tensor& out) const {
    const auto bias = bias16.find(w.bias);
    return Problem(key, x.rows(), weight_stride(w.spec.in_features), x.row_stride, out.row_stride,
                   options.dtype, bias == bias16.end() ? nullptr : bias->second);
  }

  void create() {
    check_cublas(cublasLtCreate(&handle), "cublasLtCreate");
    check_cuda(cudaMalloc(&workspace, kWorkspaceBytes + sizeof(int)), "memory for cuBLASLt");
  }
  // Behind what cuBLASLt has: the count of count_differences().
  int* differences() const {
    return reinterpret_cast<int*>(static_cast<char*>(workspace) + kWorkspaceBytes);
  }

  // What would not be the same in every plan: an accumulation, which cuBLASLt rounds twice, and a
  // bias that is added to fp32 or that prepare() has not seen.
  bool only_skinny(const LinearWeight& w, const Key& key) const {
    return key.accumulate || (key.bias && (key.f32_out || bias16.find(w.bias) == bias16.end()));
  }

  // Plans are asked for with, and were compared on, outputs whose rows are 16-byte aligned.
  bool fits_plans(const Tensor& out) const {
    const int64_t row_bytes = out.row_stride * static_cast<int64_t>(dtype_size(out.dtype));
    return reinterpret_cast<uintptr_t>(out.data) % kAlignment == 0 &&
           (!options.batch_invariant || row_bytes % kAlignment == 0);
  }

  std::vector<cublasLtMatmulAlgo_t> candidates(const Tensor& x, const LinearWeight& w,
                                               const Key& key, const Tensor& out) {
    Problem problem = describe(x, w, key, out);
    cublasLtMatmulPreferenceOpaque_t preference;
    check_cublas(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t which, const auto& value) {
      check_cublas(cublasLtMatmulPreferenceSetAttribute(&preference, which, &value, sizeof(value)),
                   "cublasLtMatmulPreferenceSetAttribute");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    for (const auto operand :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      set(operand, kAlignment);  // 256 unless told
    if (options.batch_invariant)
      set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
    // Where a product takes no time, neither shall its choice: loading a kernel takes a
    // millisecond.
    const int wanted = key.n * key.k < kSmallWeight ? 2 : kMaxCandidates;
    cublasLtMatmulHeuristicResult_t found[kMaxCandidates];
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, &problem.matmul, &problem.w, &problem.x, &problem.out, &problem.out, &preference,
        wanted, found, &count);
    std::vector<cublasLtMatmulAlgo_t> out_algos;
    if (status != CUBLAS_STATUS_SUCCESS) return out_algos;
    for (int i = 0; i < count; ++i) {
      if (found[i].state != CUBLAS_STATUS_SUCCESS) continue;
      if (options.batch_invariant && splits_the_sum(found[i].algo)) continue;
      out_algos.push_back(found[i].algo);
    }
    return out_algos;
  }

  // What is suggested for the rows of x and for others, to be run on as many or on those of x: on
  // no more than max_rows, and on none but these where `pads` is false. x is not read.
  std::vector<Plan> suggestions(const Tensor& x, const LinearWeight& w, const Key& key,
                                const Tensor& out, bool pads, int64_t max_rows) {
    std::vector<Plan> all;
    const int64_t own = pads ? x.rows() : 0;
    const auto add = [&](const cublasLtMatmulAlgo_t& algo, int64_t rows) {
      const bool is_known = std::any_of(all.begin(), all.end(), [&](const Plan& p) {
        return p.rows == rows && std::memcmp(&p.algo, &algo, sizeof(algo)) == 0;
      });
      if (!is_known) all.push_back({false, algo, rows});
    };
    for (const cublasLtMatmulAlgo_t& algo : candidates(x, w, key, out)) add(algo, own);
    if (x.rows() <= kFewRows || x.rows() > kMostWithOthers) return all;
    for (const int64_t rows : kOtherRows)
      for (const cublasLtMatmulAlgo_t& algo : candidates(x.rows(rows), w, key, out.rows(rows))) {
        if (pads && rows > x.rows() && rows <= max_rows) add(algo, rows);
        if (runs({false, algo}, x, w, key, out)) add(algo, own);
      }
    return all;
  }

  int64_t skinny_rows(const Key& key) const {
    return card.arch == 90 && key.k % 64 == 0 ? kSkinnyRowsSm90 : kSkinnyRows;
  }

  Kernel kernel_of(const LinearWeight& w, const SkinnyArgs& a, const RopeKvWrite* rope) const {
    const bool skinny = rope == nullptr && fuses_skinny(a, card);
    if (a.rows <= kSkinnyMaxGateRows) return skinny ? Kernel::skinny : Kernel::none;
    const auto found = plans.find(key_of(w, {}, a.rows, false));
    if (found == plans.end()) return Kernel::none;
    if (found->second.large && fuses_large(a, rope, card)) return Kernel::large;
    return skinny && found->second.skinny_gates ? Kernel::skinny : Kernel::none;
  }

  // A plan without timing, for what prepare() did not see. Not every kernel of cuBLASLt that splits
  // nothing gives the canonical bits (K = 135 has been seen to differ), and nothing is compared
  // here.
  Plan plan_untimed(const Tensor& x, const LinearWeight& w, const Key& key, const Tensor& out) {
    Plan plan;
    if (options.batch_invariant || x.rows() <= skinny_rows(key)) return plan;
    const auto algos = candidates(x, w, key, out);
    if (!algos.empty()) {
      plan.skinny = false;
      plan.algo = algos.front();
    }
    return plan;
  }

  // Whether cuBLASLt runs the plan, with what workspace there is.
  bool runs(const Plan& plan, const Tensor& x, const LinearWeight& w, const Key& key,
            const Tensor& out) const {
    if (plan.skinny) return true;
    Problem problem = describe(x, w, key, out);
    cublasLtMatmulHeuristicResult_t result{};
    return cublasLtMatmulAlgoCheck(handle, &problem.matmul, &problem.w, &problem.x, &problem.out,
                                   &problem.out, &plan.algo, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= kWorkspaceBytes;
  }
  // The same of the plan that was chosen, remembered.
  bool is_valid(const Plan& chosen, const Tensor& x, const LinearWeight& w, const Key& key,
                const Tensor& out) {
    const auto [it, fresh] =
        valid.try_emplace({key, x.rows(), x.row_stride, out.row_stride}, false);
    if (fresh) it->second = runs(chosen, x, w, key, out);
    return it->second;
  }

  // -- Timing -------------------------------------------------------------------------------------

  void convert_biases(const std::vector<const LinearWeight*>& weights) {
    cudaFree(biases);
    biases = nullptr;
    bias16.clear();
    size_t bytes = 0;
    const auto aligned = [](int64_t n) { return (static_cast<size_t>(n) * 2 + 255) / 256 * 256; };
    for (const LinearWeight* w : weights)
      if (w->bias != nullptr) bytes += aligned(w->spec.out_features);
    if (bytes == 0) return;
    check_cuda(cudaMalloc(&biases, bytes), "memory for biases");
    char* next = static_cast<char*>(biases);
    for (const LinearWeight* w : weights) {
      if (w->bias == nullptr || !bias16.emplace(w->bias, next).second) continue;
      const int64_t n = w->spec.out_features;
      convert_rows(w->bias, DType::f32, n, 1, n, next, options.dtype, n, stream);
      next += aligned(n);
    }
  }

  // Milliseconds of multiply_by(weight) over weights in turn, so that small ones do not stay in the
  // cache; 0: it fails. Gives up on what is far from `best`. Short products are timed as a graph:
  // else it would be the launches that are timed.
  template <typename F>
  float time(const std::vector<const LinearWeight*>& weights, int64_t rows, float best,
             const F& multiply_by) {
    constexpr float kShort = 0.05f;
    ++num_timed;
    const auto run = [&](int repeats) {
      for (int i = 0; i < repeats; ++i)
        if (!multiply_by(*weights[static_cast<size_t>(i) % weights.size()])) return false;
      return true;
    };
    if (!run(1)) return 0;  // the first loads the kernel
    float ms = between_events([&] { return run(2); }) / 2;
    if (ms <= 0 || (best > 0 && ms > kShort && ms > 1.5f * best)) return ms;
    if (ms > kShort) {
      const int repeats = rows > 1024 ? 2 : 6;
      return between_events([&] { return run(repeats); }) / static_cast<float>(repeats);
    }
    constexpr int kRepeats = 30;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "timing plans");
    const bool good = run(kRepeats);
    if (cudaStreamEndCapture(stream, &graph) == cudaSuccess && good &&
        cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess) {
      cudaGraphLaunch(exec, stream);
      ms = between_events([&] { return cudaGraphLaunch(exec, stream) == cudaSuccess; }) / kRepeats;
    }
    if (exec != nullptr) cudaGraphExecDestroy(exec);
    if (graph != nullptr) cudaGraphDestroy(graph);
    return ms;
  }
  float time(const Plan& plan, const Tensor& x, const std::vector<const LinearWeight*>& weights,
             const Key& key, const Tensor& out, float best) {
    const int64_t rows = std::max(plan.rows, x.rows());
    return time(weights, rows, best, [&](const LinearWeight& w) {
      const Tensor result = out.rows(rows);
      const bool good = multiply(plan, x.rows(rows), w, key, result, stream, true, timed_units) ==
                        CUBLAS_STATUS_SUCCESS;
      // What ours may spare the sampler.
      if (key.f32_out && !has_units(plan, x, w, result))
        sum_up_logits(result.as<float>(), result.row_stride, rows, key.n, timed_units, stream);
      return good;
    });
  }
  // Microseconds of linear_large with a gate, if it takes no longer than the plan and an
  // activation; else 0. For all weights that might have a gate, or, as qkv, something that costs as
  // much; which have one is not known here.
  float large_gate(const Plan& plan, const Tensor& x,
                   const std::vector<const LinearWeight*>& weights, const Key& key,
                   const Tensor& out) {
    const auto args = [&](const LinearWeight& w) {
      SkinnyArgs a = skinny_args(x, w, out);
      a.gated = true;
      return a;
    };
    const int64_t rows = x.rows(), half = key.n / 2;
    if (key.f32_out || key.n <= key.k || !fuses_large(args(*weights[0]), nullptr, card)) return 0;
    const int64_t computed = std::max(plan.rows, rows);
    const float apart = time(weights, rows, 0, [&](const LinearWeight& w) {
      const bool good = multiply(plan, x.rows(computed), w, key, out.rows(computed), stream) ==
                        CUBLAS_STATUS_SUCCESS;
      activation(out.data, out.row_stride, rows, half, Activation::silu, true, out.dtype, out.data,
                 out.row_stride, stream);  // in place: an element is read before it is written
      return good;
    });
    const float together = time(weights, rows, apart, [&](const LinearWeight& w) {
      linear_large_sm90(args(w), nullptr, card, stream);
      return true;
    });
    return together <= apart ? 1000 * together : 0;
  }

  // Of logits that nobody reads: which of our kernels makes units alone in less time than the plan
  // makes logits and units.
  void choose_for_units(Plan& plan, const Tensor& x,
                        const std::vector<const LinearWeight*>& weights, const Key& key,
                        const Tensor& out) {
    LogitUnits alone = timed_units;
    alone.only = true;
    const auto args = [&](const LinearWeight& w) {
      SkinnyArgs a = skinny_args(x, w, out);
      a.units = alone;
      return a;
    };
    const SkinnyArgs first = args(*weights[0]);
    if (plan.skinny && !makes_units_large(first, card)) return;  // it leaves out logits by itself
    float best = plan.microseconds / 1000;
    const auto is_best = [&](const auto& make) {
      bool is_less = false;
      for (int i = 0; i < 2; ++i) {
        const float ms = time(weights, x.rows(), best, make);
        if (ms > 0 && ms < best) best = ms, is_less = true;
      }
      return is_less;
    };
    plan.skinny_gates = x.rows() <= skinny_rows(key) && makes_units(first, card) &&
                        is_best([&](const LinearWeight& w) {
                          linear_skinny(args(w), card, stream);
                          return true;
                        });
    plan.large = makes_units_large(first, card) && is_best([&](const LinearWeight& w) {
                   linear_large_sm90(args(w), nullptr, card, stream);
                   return true;
                 });
  }

  // Milliseconds that f takes on the stream; 0 if it fails.
  template <typename F>
  float between_events(const F& f) {
    cudaEvent_t begin = nullptr, end = nullptr;
    check_cuda(cudaEventCreate(&begin), "an event");
    check_cuda(cudaEventCreate(&end), "an event");
    cudaEventRecord(begin, stream);
    const bool good = f();
    cudaEventRecord(end, stream);
    float ms = 0;
    if (cudaEventSynchronize(end) != cudaSuccess || !good ||
        cudaEventElapsedTime(&ms, begin, end) != cudaSuccess)
      ms = 0;
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return ms;
  }

  // Whether the plan gives the canonical bits, those of linear_skinny: at the most, the middle and
  // the least number of rows that take it, since a kernel might cut what its last wave leaves over.
  bool is_canonical(const Plan& plan, const Tensor& x, const LinearWeight& w, const Key& key,
                    const Tensor& out, const Tensor& other) {
    if (plan.skinny) return true;
    check_cuda(cudaMemsetAsync(differences(), 0, sizeof(int), stream), "comparing plans");
    const int64_t least = least_rows(key.bucket);
    for (const int64_t few : {key.bucket, (least + key.bucket) / 2, least}) {
      if (plan.rows > 0 && few < key.bucket) continue;  // so many are never computed
      const int64_t rows = std::max(few, plan.rows);
      const Tensor these = x.rows(rows), result = out.rows(rows);
      if (!runs(plan, these, w, key, result)) continue;  // run() would not take it
      if (multiply(plan, these, w, key, result, stream) != CUBLAS_STATUS_SUCCESS) return false;
      const int64_t count = std::min<int64_t>(rows, 16);
      for (const int64_t first : {int64_t{0}, rows / 3, rows - rows / 3 - count, rows - count}) {
        if (first < 0 || first + count > rows) continue;
        multiply(Plan{}, these.rows(first, count), w, key, other.rows(count), stream);
        count_differences(result.rows(first, count), other.rows(count), differences(), stream);
      }
    }
    int found = 0;
    check_cuda(cudaMemcpyAsync(&found, differences(), sizeof(int), cudaMemcpyDeviceToHost, stream),
               "comparing plans");
    check_cuda(cudaStreamSynchronize(stream), "comparing plans");
    return found == 0;
  }

  // x and out have room for max_rows.
  Plan choose(const Tensor& x, const std::vector<const LinearWeight*>& weights, const Key& key,
              const Tensor& out, const Tensor& other, int64_t max_rows) {
    const bool pads = !key.f32_out && x.rows() > kSkinnyRows && x.rows() <= kMostWithOthers &&
                      x.rows() <= max_rows;
    std::vector<Plan> all = suggestions(x, *weights[0], key, out, pads, max_rows);
    if (x.rows() <= skinny_rows(key)) all.push_back({});
    float best = 0;
    for (Plan& plan : all) {
      plan.microseconds = 1000 * time(plan, x, weights, key, out, best / 1000);
      if (plan.microseconds > 0 && (best == 0 || plan.microseconds < best))
        best = plan.microseconds;
    }
    // What is close is measured again, in turn: one measurement differs from the next by some
    // percent.
    constexpr float kClose = 1.06f;
    const int again = key.n * key.k < kSmallWeight ? 0 : x.rows() <= kMostWithOthers ? 2 : 1;
    for (int i = 0; i < again; ++i)
      for (Plan& plan : all) {
        if (plan.microseconds <= 0 || plan.microseconds > kClose * best) continue;
        const float us = 1000 * time(plan, x, weights, key, out, 0);
        if (us > 0) plan.microseconds = std::min(plan.microseconds, us);
      }
    std::erase_if(all, [](const Plan& p) { return p.microseconds <= 0; });
    // Our own kernel starts while the one before ends, and lets the next one do so, above all where
    // it leaves room; behind lm_head comes little.
    const float overlap_us = key.f32_out ? 0.0f : key.bucket <= kSkinnyRows ? 2.5f : 1.0f;
    const auto cost = [&](const Plan& p) { return p.microseconds - (p.skinny ? overlap_us : 0); };
    std::sort(all.begin(), all.end(),
              [&](const Plan& a, const Plan& b) { return cost(a) < cost(b); });
    // With a gate ours spares an activation. But where arithmetic binds, it takes as much longer in
    // a step than alone (8B, 256 rows of gate_up, H100: 109 us, and 102 with 5 for the activation,
    // but 11.36 ms a step instead of 11.11).
    const auto skinny =
        std::find_if(all.begin(), all.end(), [](const Plan& p) { return p.skinny; });
    for (Plan& plan : all)
      if (!options.batch_invariant || is_canonical(plan, x, *weights[0], key, out, other)) {
        if (key.f32_out) {
          choose_for_units(plan, x, weights, key, out);
          return plan;
        }
        const float large = large_gate(plan, x, weights, key, out);
        plan.skinny_gates = skinny != all.end() && cost(*skinny) <= plan.microseconds;
        plan.large = large > 0 && !(plan.skinny_gates && skinny->microseconds < large);
        return plan;
      }
    return {};
  }

  // -- The cache file -----------------------------------------------------------------------------

  std::string machine() const {
    cudaDeviceProp p{};
    int device = 0, driver = 0;
    cudaGetDevice(&device);
    cudaGetDeviceProperties(&p, device);
    cudaDriverGetVersion(&driver);
    std::string name = p.name;
    std::replace(name.begin(), name.end(), ' ', '_');
    return concat(name, "/", p.multiProcessorCount, "/driver", driver, "/cublaslt",
                  cublasLtGetVersion(), "/", dtype_name(options.dtype),
                  options.batch_invariant ? "/invariant" : "/fastest", "/format12");
  }
  static std::string text_of(const Key& k) {
    return concat(k.n, " ", k.k, " ", k.bucket, " ", k.f32_out, " ", k.bias, " ", k.accumulate);
  }

  // Lines "machine n k bucket f32_out bias accumulate skinny rows skinny_gates large microseconds
  // algo"; what does not read well is skipped.
  std::map<Key, Plan> read_cache(const std::string& mine) const {
    std::map<Key, Plan> found;
    if (options.plan_cache.empty()) return found;
    std::ifstream file(options.plan_cache);
    for (std::string line; std::getline(file, line);) {
      std::istringstream in(line);
      std::string whose, algo;
      Key k{};
      Plan plan;
      if (!(in >> whose >> k.n >> k.k >> k.bucket >> k.f32_out >> k.bias >> k.accumulate >>
            plan.skinny >> plan.rows >> plan.skinny_gates >> plan.large >> plan.microseconds >>
            algo) ||
          whose != mine)
        continue;
      if (plan.skinny || from_hex(algo, plan.algo)) found[k] = plan;
    }
    return found;
  }

  // The file with our lines added or replaced. What cannot be written is not worth an error.
  void write_cache(const std::string& mine) const {
    if (options.plan_cache.empty()) return;
    std::error_code ignored;
    const std::filesystem::path path(options.plan_cache);
    std::filesystem::create_directories(path.parent_path(), ignored);
    std::map<std::string, std::string> lines;  // by machine and key
    std::ifstream before(path);
    for (std::string line; std::getline(before, line);) {
      std::istringstream in(line);
      std::string word, id;
      for (int i = 0; i < 7 && in >> word; ++i) id += word + " ";
      lines[id] = line;
    }
    for (const auto& [key, plan] : plans) {
      if (plan.microseconds <= 0) continue;  // nothing could be timed: next time, perhaps
      const std::string id = mine + " " + text_of(key) + " ";
      lines[id] = concat(id, plan.skinny, " ", plan.rows, " ", plan.skinny_gates, " ", plan.large,
                         " ", plan.microseconds, " ", plan.skinny ? "-" : to_hex(plan.algo));
    }
    const std::string temporary = concat(path.string(), ".", std::random_device{}());
    {
      std::ofstream file(temporary);
      for (const auto& [id, line] : lines) file << line << "\n";
      if (!file.flush()) {
        std::filesystem::remove(temporary, ignored);
        return;
      }
    }
    std::filesystem::rename(temporary, path, ignored);
    if (ignored) std::filesystem::remove(temporary, ignored);
  }

  void prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows);
  void fill_random(void* data, int64_t elements);
};

// Random activations: the same 1 M values over and over.
void Linear::Impl::fill_random(void* data, int64_t elements) {
  constexpr int64_t kPool = 1 << 20;
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  std::vector<float> pool(kPool);
  for (float& v : pool) v = normal(rng);
  void* staged = nullptr;
  check_cuda(cudaMalloc(&staged, kPool * sizeof(float)), "memory for timing");
  cudaMemcpy(staged, pool.data(), kPool * sizeof(float), cudaMemcpyHostToDevice);
  for (int64_t at = 0; at < elements; at += kPool)
    convert_rows(staged, DType::f32, kPool, 1, std::min(kPool, elements - at),
                 static_cast<char*>(data) + at * 2, options.dtype, kPool, stream);
  check_cuda(cudaStreamSynchronize(stream), "filling memory for timing");
  cudaFree(staged);
}

void Linear::Impl::prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows) {
  if (weights.empty()) return;
  convert_biases(weights);
  // Weights of one shape share plans. The last is lm_head, whose output is fp32.
  std::map<Key, std::vector<const LinearWeight*>> shapes;
  int64_t widest_in = 0, widest_out = 0;
  for (const LinearWeight* w : weights) {
    const bool is_lm_head = w == weights.back();
    Key key = key_of(*w, {}, 1, is_lm_head);
    key.bucket = 0;
    if (only_skinny(*w, key)) continue;
    shapes[key].push_back(w);
    widest_in = std::max(widest_in, weight_stride(key.k));
    if (!is_lm_head) widest_out = std::max(widest_out, weight_stride(key.n));
  }
  const std::string mine = machine();
  const std::map<Key, Plan> known = read_cache(mine);
  bool all_known = true;
  const auto for_each_plan = [&](const auto& visit) {
    for (const auto& [shape, same] : shapes) {
      for (const int64_t bucket : kBuckets) {
        const int64_t most = shape.f32_out ? std::min<int64_t>(max_rows, 512) : max_rows;
        if (bucket > bucket_of(most)) break;
        Key key = shape;
        key.bucket = bucket;
        visit(key, same);
      }
    }
  };
  for_each_plan([&](const Key& key, const auto&) {
    const auto it = known.find(key);
    if (it == known.end() || it->second.rows > max_rows) {
      all_known = false;
    } else {
      plans[key] = it->second;
    }
  });
  if (all_known) return;

  const auto padded = [](int64_t n) { return (n + 63) / 64 * 64; };
  const int64_t rows = bucket_of(max_rows), logits = std::min<int64_t>(rows, 512);
  const int64_t vocab = padded(weights.back()->spec.out_features);
  const int64_t out_bytes = std::max(rows * widest_out * 2, logits * vocab * 4);
  struct Memory {
    void* data = nullptr;
    explicit Memory(int64_t bytes) {
      check_cuda(cudaMalloc(&data, static_cast<size_t>(bytes)), "memory for timing");
    }
    Memory(const Memory&) = delete;
    ~Memory() { cudaFree(data); }
  };
  const Memory x_memory(rows * widest_in * 2), out_memory(out_bytes),
      other_memory(16 * std::max(widest_out, vocab) * 4);
  fill_random(x_memory.data, rows * widest_in);
  // For lm_head: rows that are drawn with temperature 1.
  const std::vector<SamplingRow> sampled(static_cast<size_t>(logits));
  const auto sampled_bytes = static_cast<int64_t>(sampled.size() * sizeof(SamplingRow));
  const Memory units(logits * logit_units(vocab) * static_cast<int64_t>(sizeof(LogitUnit))),
      sampling(sampled_bytes), step(sizeof(StepInputs));
  StepInputs inputs;
  inputs.num_logits = static_cast<int32_t>(logits);
  inputs.sampling = static_cast<const SamplingRow*>(sampling.data);
  const auto upload = [&](void* to, const void* from, size_t bytes) {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "timing plans");
    check_cuda(cudaStreamSynchronize(stream), "timing plans");
  };
  upload(sampling.data, sampled.data(), sampled.size() * sizeof(SamplingRow));
  upload(step.data, &inputs, sizeof(inputs));
  timed_units = {static_cast<LogitUnit*>(units.data), static_cast<const StepInputs*>(step.data), 0};
  for_each_plan([&](const Key& key, const std::vector<const LinearWeight*>& same) {
    if (plans.find(key) != plans.end()) return;
    const DType out_type = key.f32_out ? DType::f32 : options.dtype;
    const int64_t out_stride = padded(key.n);
    const auto matrix = [&](void* data, DType dtype, int64_t cols, int64_t stride) {
      Tensor t(data, dtype, {key.bucket, cols});
      t.row_stride = stride;
      return t;
    };
    plans[key] = choose(matrix(x_memory.data, options.dtype, key.k, weight_stride(key.k)), same,
                        key, matrix(out_memory.data, out_type, key.n, out_stride),
                        matrix(other_memory.data, out_type, key.n, out_stride), max_rows);
  });
  check_cuda(cudaStreamSynchronize(stream), "timing plans");
  timed_units = {};
  write_cache(mine);
}

Linear::Linear(const Card& card, const Options& options, cudaStream_t stream)
    : impl_(std::make_unique<Impl>(card, options, stream)) {
  impl_->create();  // if this throws, ~Impl gives back what there is
}

Linear::~Linear() = default;

void Linear::prepare(const std::vector<const LinearWeight*>& weights, int64_t max_rows) {
  impl_->prepare(weights, max_rows);
}

bool Linear::fuses(const LinearWeight& w, const LinearArgs& a, int64_t rows) const {
  if (a.norm != nullptr && a.norm_args.kind != NormKind::rms) return false;
  Tensor x(nullptr, impl_->options.dtype, {rows, w.spec.in_features});
  x.row_stride = weight_stride(w.spec.in_features);
  SkinnyArgs args = impl_->skinny_args(x, w, x);
  add_fusion(args, a);
  return impl_->kernel_of(w, args, a.rope) != Kernel::none;
}

bool Linear::run(const Tensor& x, const LinearWeight& w, const LinearArgs& a, const Tensor& out,
                 cudaStream_t stream, bool settled, const LogitUnits& units) {
  Impl& impl = *impl_;
  const int64_t align = 16 / static_cast<int64_t>(dtype_size(x.dtype));
  check_arg(reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.row_stride % align == 0 &&
                x.row_stride >= (x.cols() + align - 1) / align * align,
            "linear: rows of x must be 16-byte aligned, and as far apart as a multiple of ", align,
            " elements; they are ", x.row_stride, " apart");
  if (a.norm != nullptr || a.gated || a.rope != nullptr) {
    SkinnyArgs args = impl.skinny_args(x, w, out);
    add_fusion(args, a);
    args.settled = settled;
    const bool can_norm = a.norm == nullptr || a.norm_args.kind == NormKind::rms;
    const Kernel kernel = can_norm ? impl.kernel_of(w, args, a.rope) : Kernel::none;
    check_arg(kernel != Kernel::none, "linear: no such norm, gate or rotation with ", x.rows(),
              " rows of ", x.cols(), " on this card");
    if (kernel == Kernel::large) {
      linear_large_sm90(args, a.rope, impl.card, stream);
      return false;
    }
    if (makes_units(args, impl.card)) args.units = units;
    linear_skinny(args, impl.card, stream);
    return args.units.units != nullptr;
  }
  const Key key = impl.key_of(w, a, x.rows(), out.dtype == DType::f32);
  const auto multiply = [&](const Plan& plan, const Tensor& from, const Tensor& to) {
    check_cublas(impl.multiply(plan, from, w, key, to, stream, settled, units), "cublasLtMatmul");
    return units.units != nullptr && impl.has_units(plan, from, w, to);
  };
  if (impl.only_skinny(w, key) || !impl.fits_plans(out)) return multiply(Plan{}, x, out);
  auto it = impl.plans.find(key);
  if (it == impl.plans.end()) it = impl.plans.emplace(key, impl.plan_untimed(x, w, key, out)).first;
  const Plan& plan = it->second;
  if (units.only && plan.large) {
    SkinnyArgs args = impl.skinny_args(x, w, out);
    args.settled = settled;
    args.units = units;
    if (makes_units_large(args, impl.card)) {
      linear_large_sm90(args, nullptr, impl.card, stream);
      return true;
    }
  }
  if (units.only && plan.skinny_gates) return multiply(Plan{}, x, out);
  const bool has_room = plan.rows <= x.rows() + a.spare_rows;
  if (!has_room && impl.options.batch_invariant)  // not compared with so few
    return multiply(Plan{}, x, out);
  const int64_t rows = has_room ? std::max(plan.rows, x.rows()) : x.rows();
  const Tensor from = x.rows(rows), to = out.rows(rows);
  return multiply(impl.is_valid(plan, from, w, key, to) ? plan : Plan{}, from, to);
}

int Linear::num_timed() const {
  return impl_->num_timed;
}

std::vector<std::string> Linear::describe() const {
  std::vector<std::string> lines;
  for (const auto& [key, plan] : impl_->plans) {
    std::string name = "linear_skinny";
    if (!plan.skinny)
      name = concat("cuBLASLt ", algo_attribute<int32_t>(plan.algo, CUBLASLT_ALGO_CONFIG_ID),
                    " tile ", algo_attribute<uint32_t>(plan.algo, CUBLASLT_ALGO_CONFIG_TILE_ID),
                    " split ", algo_attribute<int32_t>(plan.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
                    plan.rows > 0 ? concat(", ", plan.rows, " rows") : "");
    if (key.f32_out && plan.large) name += " (units of logits alone: linear_large)";
    lines.push_back(concat("[", key.bucket, ", ", key.k, "] x [", key.n, ", ", key.k, "]",
                           key.f32_out ? " to float32" : "", key.bias ? " + bias" : "", ": ", name,
                           ", ", plan.microseconds, " us"));
  }
  return lines;
}

}  // namespace ni::cuda
