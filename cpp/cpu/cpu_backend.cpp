#include "cpu/cpu_backend.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <limits>

#include "core/check.h"

namespace ni {
namespace {

constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();

// Value of a "name value" line (any unit suffix ignored), or `missing`.
size_t field(const std::string& path, const std::string& name, size_t missing) {
  std::ifstream file(path);
  std::string key;
  for (size_t value; file >> key;) {
    if (!(file >> value)) return missing;
    if (key == name) return value;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return missing;
}

size_t number(const std::string& path, size_t missing) {
  std::ifstream file(path);
  size_t value = 0;
  return file >> value ? value : missing;  // "max" is no number
}

struct Memory {
  size_t total, available;
};

void apply_cgroup(Memory& m, const std::string& dir, const char* limit_file, const char* usage_file,
                  const char* cache_field) {
  const size_t limit = number(dir + limit_file, kUnlimited);
  if (limit >= m.total) return;
  const size_t usage = number(dir + usage_file, 0);
  const size_t cache = field(dir + "/memory.stat", cache_field, 0);  // the kernel gives it back
  const size_t used = usage > cache ? usage - cache : 0;
  m.total = limit;
  m.available = std::min(m.available, limit > used ? limit - used : 0);
}

// The machine's memory, bounded by the limit of this process's cgroup (v2 or v1; inside a container
// the group is usually mounted as the root).
Memory query_memory() {
  const std::string meminfo = "/proc/meminfo";
  Memory m{field(meminfo, "MemTotal:", 0) * 1024, field(meminfo, "MemAvailable:", 0) * 1024};
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t a = line.find(':'), b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = line.substr(a + 1, b - a - 1), path = line.substr(b + 1);
    for (const std::string& group : {path, std::string()}) {
      if (controllers.empty())
        apply_cgroup(m, "/sys/fs/cgroup" + group, "/memory.max", "/memory.current",
                     "inactive_file");
      else if (controllers == "memory")
        apply_cgroup(m, "/sys/fs/cgroup/memory" + group, "/memory.limit_in_bytes",
                     "/memory.usage_in_bytes", "total_inactive_file");
    }
  }
  return m;
}

void unmap(void* data, size_t bytes) {
  munmap(data, bytes);
}

}  // namespace

void check_matrix(const Tensor& t, int64_t rows, int64_t cols, const char* what) {
  check_arg(t.rank >= 1 && t.rows() == rows && t.cols() == cols && t.dtype == DType::f32, what,
            ": expected float32 [", rows, ", ", cols, "], got ", dtype_name(t.dtype), " [",
            t.rank >= 1 ? t.rows() : 0, ", ", t.rank >= 1 ? t.cols() : 0, "]");
  check_arg(t.data != nullptr || rows * cols == 0, what, ": no data");
}

void check_kv(const KvView& kv) {
  const int32_t bs = kv.block_size;
  check_arg(bs > 0 && (bs % 16 == 0 || (bs < 16 && (bs & (bs - 1)) == 0)), "KV cache: block_size ",
            bs, " is neither a multiple of 16 nor a power of two below");
  check_arg(kv.num_blocks > 0 && kv.num_kv_heads > 0 && kv.head_dim > 0 && kv.head_dim % 2 == 0,
            "KV cache: num_blocks ", kv.num_blocks, ", num_kv_heads ", kv.num_kv_heads,
            " and head_dim ", kv.head_dim, " must be positive, head_dim even");
  check_arg(kv.dtype == DType::f32 || kv.dtype == DType::bf16 || kv.dtype == DType::f16,
            "KV cache: ", dtype_name(kv.dtype), " is not supported");
  check_arg(kv.k_tile == 16, "KV cache: tiles of ", kv.k_tile, " slots");
  check_arg(kv.k != nullptr && kv.v != nullptr, "KV cache: no data");
}

CpuBackend::CpuBackend(const BackendOptions& options)
    : kernels_(select_kernels(options.isa)), pool_(options.num_threads) {
  info_.device = "cpu";
  info_.name = concat(kernels_.isa, ", ", pool_.size(), pool_.size() == 1 ? " thread" : " threads");
  info_.memory_total = query_memory().total;
}

size_t CpuBackend::memory_available() const {
  return query_memory().available;
}

Buffer CpuBackend::alloc(size_t bytes) {
  if (bytes == 0) return {};
  const size_t available = memory_available();
  const auto gib = [](size_t n) { return static_cast<double>(n) / (1 << 30); };
  check_runtime(bytes <= available, "out of memory: ", bytes, " bytes (", gib(bytes),
                " GiB) asked for, ", gib(available), " GiB available");
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check_runtime(data != MAP_FAILED, "out of memory: cannot map ", bytes, " bytes");
  madvise(data, bytes, MADV_HUGEPAGE);  // a wish: fewer TLB misses while streaming weights
  return {data, bytes, unmap};
}

void CpuBackend::check_model(DType /*weights*/, int32_t /*num_heads*/,
                             const std::vector<int32_t>& /*rotary_dims*/, const KvView& kv) const {
  check_arg(kv.dtype != DType::fp8_e4m3,
            "an fp8 KV cache is not supported on CPUs; float32, "
            "bfloat16 and float16 are");
}

void CpuBackend::upload(const void* host, void* device, size_t bytes) {
  std::memcpy(device, host, bytes);
}

void CpuBackend::download(const void* device, void* host, size_t bytes) {
  std::memcpy(host, device, bytes);
}

char* CpuBackend::scratch(size_t bytes) {
  if (bytes > scratch_.bytes()) {
    scratch_ = Buffer();
    scratch_ = alloc(bytes);
  }
  return scratch_.data();
}

void CpuBackend::norm(Tensor x, const NormWeight& w, const NormArgs& a, Tensor out) {
  const int64_t n = x.cols();
  check_matrix(x, x.rows(), n, "norm: x");
  check_matrix(out, x.rows(), n, "norm: out");
  check_arg(w.weight != nullptr, "norm: no weight");
  pool_.parallel_for(x.rows(), row_grain(n), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      kernels_.norm(x.as<float>() + r * x.row_stride, nullptr, n, w, a,
                    out.as<float>() + r * out.row_stride);
  });
}

void CpuBackend::add_norm(Tensor x, Tensor residual, const NormWeight& w, const NormArgs& a,
                          Tensor out) {
  const int64_t n = x.cols();
  check_matrix(x, x.rows(), n, "add_norm: x");
  check_matrix(residual, x.rows(), n, "add_norm: residual");
  check_matrix(out, x.rows(), n, "add_norm: out");
  check_arg(w.weight != nullptr, "add_norm: no weight");
  pool_.parallel_for(x.rows(), row_grain(n), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      kernels_.norm(residual.as<float>() + r * residual.row_stride,
                    x.as<float>() + r * x.row_stride, n, w, a,
                    out.as<float>() + r * out.row_stride);
  });
}

void CpuBackend::activation(Tensor x, Activation act, bool gated, Tensor out) {
  const int64_t n = out.cols();
  check_matrix(out, x.rows(), n, "activation: out");
  check_matrix(x, x.rows(), gated ? 2 * n : n, "activation: x");
  pool_.parallel_for(x.rows(), row_grain(8 * n), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = x.as<float>() + r * x.row_stride;
      kernels_.activation(row, gated ? row + n : nullptr, n, act,
                          out.as<float>() + r * out.row_stride);
    }
  });
}

void CpuBackend::gather_rows(Tensor x, const int32_t* rows, int64_t count, Tensor out) {
  check_matrix(x, x.rows(), x.cols(), "gather_rows: x");
  check_matrix(out, count, x.cols(), "gather_rows: out");
  for (int64_t i = 0; i < count; ++i) {
    check_arg(rows[i] >= 0 && rows[i] < x.rows(), "gather_rows: row ", rows[i], " of ", x.rows());
    std::memcpy(out.as<float>() + i * out.row_stride, x.as<float>() + rows[i] * x.row_stride,
                static_cast<size_t>(x.cols()) * sizeof(float));
  }
}

}  // namespace ni
