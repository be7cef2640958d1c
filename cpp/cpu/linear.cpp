// Matrix products: weights in panels of 32 outputs (see kernels.h), rows in blocks of a few. A
// thread takes a run of panels; a panel is read from memory once for up to kChunkRows rows and met
// by every block of rows while it lies in the cache. K is never split.
#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "cpu/cpu_backend.h"

namespace ni {
namespace {

constexpr int64_t kChunkRows = 1008;        // rows whose packed copy is held at once
constexpr int64_t kGroupBytes = 384 << 10;  // panels that stay in the L2 cache together

int64_t panel_elements(const WeightSpec& s) {
  const int64_t k = s.dtype == DType::bf16 ? s.in_features + s.in_features % 2 : s.in_features;
  return k * kPanel;
}
int64_t panel_bytes(const WeightSpec& s) {
  return panel_elements(s) * static_cast<int64_t>(dtype_size(s.dtype));
}
int64_t num_panels(const WeightSpec& s) {
  return (s.out_features + kPanel - 1) / kPanel;
}

// Element (row n, column k) inside a panel.
int64_t panel_index(DType dtype, int64_t n, int64_t k) {
  return dtype == DType::bf16 ? ((k / 2) * kPanel + n) * 2 + k % 2 : k * kPanel + n;
}

void check_weight(const LinearWeight& w, const char* what) {
  check_arg(w.spec.out_features > 0 && w.spec.in_features > 0, what, ": weight of shape [",
            w.spec.out_features, ", ", w.spec.in_features, "]");
  check_arg(w.spec.dtype == DType::f32 || w.spec.dtype == DType::bf16 || w.spec.dtype == DType::f16,
            what, ": weights of type ", dtype_name(w.spec.dtype), " are not supported");
  check_arg(w.data != nullptr, what, ": weight without data");
}

bf16 narrow(float v, bf16) {
  return to_bf16(v);
}
f16 narrow(float v, f16) {
  return to_f16(v);
}
float narrow(float v, float) {
  return v;
}

// Source rows may be unaligned (memory-mapped files).
template <typename T>
T load_unaligned(const char* p) {
  T v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Rows [begin, end) of one panel; src points at row `begin`.
template <typename Src, typename Dst>
void pack_panel(const char* src, int64_t src_stride, int64_t begin, int64_t end, int64_t k,
                DType dtype, Dst* panel) {
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t n = begin; n < end; ++n) {
      const auto v = load_unaligned<Src>(src + ((n - begin) * src_stride + i) * sizeof(Src));
      Dst& out = panel[panel_index(dtype, n, i)];
      if constexpr (std::is_same_v<Src, Dst>)
        out = v;
      else
        out = narrow(to_float(v), Dst{});
    }
  }
}

template <typename Fn>
void with_type(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::bf16:
      return fn(bf16{});
    case DType::f16:
      return fn(f16{});
    default:
      return fn(float{});
  }
}

}  // namespace

size_t CpuBackend::weight_bytes(const WeightSpec& spec) const {
  return static_cast<size_t>(num_panels(spec) * panel_bytes(spec));
}

void CpuBackend::load_rows(const LinearWeight& w, int64_t first_row, Tensor src) {
  const WeightSpec& s = w.spec;
  check_weight(w, "load_rows");
  check_arg(src.rank >= 1 && src.cols() == s.in_features && first_row >= 0 &&
                first_row + src.rows() <= s.out_features,
            "load_rows: rows [", first_row, ", ", first_row + src.rows(), ") of ", src.cols(),
            " columns do not fit a weight [", s.out_features, ", ", s.in_features, "]");
  check_arg(src.dtype == DType::f32 || src.dtype == DType::bf16 || src.dtype == DType::f16,
            "load_rows: ", dtype_name(src.dtype), " is not supported");
  const int64_t first_panel = first_row / kPanel, last_row = first_row + src.rows();
  const int64_t panels = (last_row + kPanel - 1) / kPanel - first_panel;
  pool_.parallel_for(src.rows() > 0 ? panels : 0, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = first_panel + begin; p < first_panel + end; ++p) {
      const int64_t row = std::max(p * kPanel, first_row);
      const int64_t stop = std::min((p + 1) * kPanel, last_row);
      const char* from =
          static_cast<const char*>(src.data) +
          (row - first_row) * src.row_stride * static_cast<int64_t>(dtype_size(src.dtype));
      char* panel = static_cast<char*>(w.data) + p * panel_bytes(s);
      with_type(src.dtype, [&](auto source) {
        with_type(s.dtype, [&](auto target) {
          pack_panel<decltype(source)>(from, src.row_stride, row - p * kPanel, stop - p * kPanel,
                                       s.in_features, s.dtype,
                                       reinterpret_cast<decltype(target)*>(panel));
        });
      });
    }
  });
}

void CpuBackend::embed(const StepInputs& in, const LinearWeight& w, const EmbedArgs& a,
                       Tensor out) {
  const int64_t n = w.spec.in_features;
  check_weight(w, "embed");
  check_matrix(out, in.num_tokens, n, "embed: out");
  if (a.positions != nullptr) {
    check_weight(*a.positions, "embed: positions");
    check_arg(a.positions->spec.in_features == n, "embed: positions have ",
              a.positions->spec.in_features, " columns, tokens ", n);
  }
  const auto add_row = [n](const LinearWeight& table, int64_t row, float scale, bool add,
                           float* to) {
    check_arg(row >= 0 && row < table.spec.out_features, "embed: id ", row, " is not in [0, ",
              table.spec.out_features, ")");
    const char* panel =
        static_cast<const char*>(table.data) + row / kPanel * panel_bytes(table.spec);
    with_type(table.spec.dtype, [&](auto element) {
      const auto* data = reinterpret_cast<const decltype(element)*>(panel);
      for (int64_t k = 0; k < n; ++k) {
        const float v = to_float(data[panel_index(table.spec.dtype, row % kPanel, k)]) * scale;
        to[k] = add ? to[k] + v : v;
      }
    });
  };
  pool_.parallel_for(in.num_tokens, row_grain(8 * n), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = out.as<float>() + t * out.row_stride;
      int32_t id = in.token_ids[t];
      if (id < 0 && in.sampled_ids != nullptr) id = in.sampled_ids[-1 - id];
      add_row(w, id, a.scale, false, row);
      if (a.positions != nullptr) add_row(*a.positions, in.positions[t], 1.0f, true, row);
    }
  });
}

void CpuBackend::linear(Tensor x, const LinearWeight& w, const LinearArgs& a, Tensor out) {
  const WeightSpec& s = w.spec;
  check_weight(w, "linear");
  check_arg(a.norm == nullptr && !a.gated, "linear: the CPU backend fuses no norm and no gate");
  check_matrix(x, x.rows(), s.in_features, "linear: x");
  check_matrix(out, x.rows(), s.out_features, "linear: out");
  check_arg(w.bias != nullptr || !s.has_bias, "linear: the bias is missing");
  const bool dot = kernels_.bf16_dot && s.dtype == DType::bf16;
  const int64_t padded = s.in_features + s.in_features % 2;
  const int64_t row_bytes = padded * (dot ? 2 : 4);
  const int64_t panels = num_panels(s);
  const int64_t group = std::max<int64_t>(1, kGroupBytes / panel_bytes(s));

  for (int64_t first = 0; first < x.rows(); first += kChunkRows) {
    const int64_t rows = std::min(kChunkRows, x.rows() - first);
    const int64_t blocks = (rows + kernels_.block_rows - 1) / kernels_.block_rows;
    char* packed = scratch(static_cast<size_t>(rows * row_bytes));
    const auto block_begin = [&](int64_t b) { return rows * b / blocks; };  // blocks of even size
    pool_.parallel_for(blocks, row_grain(rows * padded / blocks), [&](int64_t b, int64_t end, int) {
      for (; b < end; ++b) {
        const int64_t row = block_begin(b);
        kernels_.pack_rows(x.as<float>() + (first + row) * x.row_stride, x.row_stride,
                           static_cast<int>(block_begin(b + 1) - row), s.in_features, dot,
                           packed + row * row_bytes);
      }
    });

    const auto multiply = [&](int64_t panel, int64_t block) {
      const int64_t row = block_begin(block), col = panel * kPanel;
      LinearTile t;
      t.x = packed + row * row_bytes;
      t.w = static_cast<const char*>(w.data) + panel * panel_bytes(s);
      t.dtype = s.dtype;
      t.rows = static_cast<int>(block_begin(block + 1) - row);
      t.cols = static_cast<int>(std::min<int64_t>(kPanel, s.out_features - col));
      t.k = s.in_features;
      t.bias = w.bias != nullptr ? w.bias + col : nullptr;
      t.accumulate = a.accumulate;
      t.out = out.as<float>() + (first + row) * out.row_stride + col;
      t.out_stride = out.row_stride;
      kernels_.linear(t);
    };
    const int64_t grain = row_grain(rows * s.in_features * kPanel / 16);
    pool_.parallel_for(panels, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t g = begin; g < end; g += group)
        for (int64_t b = 0; b < blocks; ++b)
          for (int64_t p = g; p < std::min(g + group, end); ++p) multiply(p, b);
    });
  }
}

}  // namespace ni
