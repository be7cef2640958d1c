// The instructions that kernels use as inline PTX (emulated.h; PTX ISA).
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/types.h"
#include "emulated.h"
#include "tensor_map.h"

namespace ni::emulated {
namespace {

struct Call {
  std::string_view text;
  const Operand* operands;
  size_t count;

  template <typename T>
  T value(size_t i) const {
    const Operand& o = operands[i];
    if (o.to == nullptr) return from_bits<T>(o.bits);
    T v;
    std::memcpy(&v, o.to, sizeof(T));
    return v;
  }
  template <typename T>
  void set(size_t i, T v) const {
    std::memcpy(operands[i].to, &v, sizeof(T));
  }
  uint32_t word(size_t i) const { return value<uint32_t>(i); }
  unsigned char* shared(size_t i) const { return dynamic_shared() + static_cast<int32_t>(word(i)); }
  bool has(std::string_view part) const { return text.find(part) != text.npos; }
  // Numbers in the text, %i being operand i.
  std::vector<int> numbers(std::string_view after) const {
    std::vector<int> found;
    size_t i = text.find(after) + after.size();
    while (i < text.size()) {
      const bool is_operand = text[i] == '%';
      if (is_operand) ++i;
      if (std::isdigit(static_cast<unsigned char>(text[i])) == 0) {
        ++i;
        continue;
      }
      int n = 0;
      for (; i < text.size() && std::isdigit(static_cast<unsigned char>(text[i])) != 0; ++i)
        n = 10 * n + (text[i] - '0');
      found.push_back(is_operand ? static_cast<int>(word(static_cast<size_t>(n))) : n);
    }
    return found;
  }
};

// -- Arithmetic -----------------------------------------------------------------------------------

void convert(const Call& c) {  // two floats, the first one into the upper half
  const bool is_bf16 = c.has("bf16x2"), saturates = c.has("satfinite");
  const auto one = [&](float v) -> uint32_t {
    if (saturates && std::abs(v) > 65504.0f) v = std::copysign(65504.0f, v);
    return narrow(v, is_bf16);
  };
  if (c.has("e4m3x2")) {  // of two fp8, the lower one stays there
    const auto two = c.value<uint16_t>(1);
    const auto float_of = [](int byte) { return to_float(fp8{static_cast<uint8_t>(byte)}); };
    return c.set(0, one(float_of(two >> 8)) << 16 | one(float_of(two & 0xff)));
  }
  c.set(0, one(c.value<float>(1)) << 16 | one(c.value<float>(2)));
}

// The operands of a warp's product of 16 x 8 x 16. A lane has of A the rows g = lane / 4 and g + 8,
// of B the column g; of each the k 2 t, 2 t + 1 (t = lane % 4) and those 8 further.
struct Matrices {
  double a[16][16], b[8][16];

  static Matrices& of_warp() {  // others may still read those of the product before
    static Matrices all[kMaxResident][32][2];
    static bool turn[kMaxResident][32][32];
    const unsigned warp = (threadIdx.x + blockDim.x * threadIdx.y) / 32;
    bool& mine = turn[resident()][warp][lane()];
    mine = !mine;
    return all[resident()][warp][mine ? 1 : 0];
  }
  void set_a(const Call& c, size_t first, bool is_bf16) {
    for (int i = 0; i < 8; ++i)
      a[lane() / 4 + i / 2 % 2 * 8][lane() % 4 * 2 + i % 2 + i / 4 * 8] =
          half_of(c.word(first + static_cast<size_t>(i) / 2), i % 2, is_bf16);
  }
  void set_b(const Call& c, size_t first, bool is_bf16) {
    for (int i = 0; i < 4; ++i)
      b[lane() / 4][lane() % 4 * 2 + i % 2 + i / 2 * 8] =
          half_of(c.word(first + static_cast<size_t>(i) / 2), i % 2, is_bf16);
  }
  static double half_of(uint32_t word, int half, bool is_bf16) {
    return static_cast<double>(widen(static_cast<uint16_t>(word >> 16 * half), is_bf16));
  }
};

float multiply_add(float c, const double (&a)[16], const double (&b)[16]) {
  double sums[4] = {};
  for (int k = 0; k < 16; ++k) sums[k % 4] += a[k] * b[k];
  return static_cast<float>(static_cast<double>(c) + (sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// D = A B + C of 16 x 8 x 16.
template <bool kIsBf16>
void multiply(const Call& c) {
  Matrices& m = Matrices::of_warp();
  m.set_a(c, 4, kIsBf16);
  m.set_b(c, 8, kIsBf16);
  exchange(0);
  for (int i = 0; i < 4; ++i) {
    const auto at = static_cast<size_t>(i);
    c.set(at, multiply_add(c.value<float>(at), m.a[lane() / 4 + i / 2 * 8],
                           m.b[lane() % 4 * 2 + i % 2]));
  }
}

// D (+)= A B of 64 x n x 16 by four warps, 16 rows each. A in registers, B in shared memory with
// the 128-byte swizzle: rows of 64 k, or with the last number 1 rows of 64 columns. Or both there,
// with rows of 64 k, named by the descriptor's lower half.
void multiply_group(const Call& c) {
  const auto n = static_cast<size_t>(c.numbers("m64n").front());
  const size_t sums = n / 2;
  const bool a_is_shared = c.has("1, 1, 0, 0;");
  const size_t b_at = sums + (a_is_shared ? 1 : 4);
  const bool is_bf16 = std::string_view(c.value<const char*>(b_at + 2)) == "bf16";
  const bool rows_are_k = c.has("1, 1, 1;"), adds = c.word(b_at + 1) != 0;
  constexpr uint64_t dense = uint64_t{1024 >> 4} << 32;  // rows after one another
  const uint64_t b = a_is_shared ? dense | c.word(b_at) : c.value<uint64_t>(b_at);
  const auto element = [&](uint64_t m, uint32_t row, uint32_t k, bool is_transposed) {
    const auto across = static_cast<uint32_t>(m >> 16 & 0x3fff) << 4;
    const auto down = static_cast<uint32_t>(m >> 32 & 0x3fff) << 4;
    uint32_t at = static_cast<uint32_t>(m & 0x3fff) << 4;
    at += is_transposed ? row / 64 * across + k / 8 * down + k % 8 * 128 + row % 64 * 2
                        : row / 8 * down + row % 8 * 128 + 2 * k;
    at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, dynamic_shared() + at, 2);
    return static_cast<double>(widen(bits, is_bf16));
  };
  const auto lane_row = static_cast<uint32_t>(lane()) / 4;
  double rows[2][16];
  Matrices& m = Matrices::of_warp();
  if (!a_is_shared) m.set_a(c, sums, is_bf16);
  exchange(0);
  for (uint32_t row = 0; row < 2; ++row)
    for (uint32_t k = 0; k < 16; ++k)
      rows[row][k] = a_is_shared ? element(dense | c.word(sums),
                                           threadIdx.x / 32 % 4 * 16 + lane_row + 8 * row, k, false)
                                 : m.a[lane_row + 8 * row][k];
  for (uint32_t i = 0; i < sums; ++i) {
    if (i % 4 > 1) continue;
    const uint32_t column = i / 4 * 8 + 2 * static_cast<uint32_t>(lane() % 4) + i % 2;
    double of_column[16];
    for (uint32_t k = 0; k < 16; ++k) of_column[k] = element(b, column, k, rows_are_k);
    for (uint32_t row = 0; row < 2; ++row)
      c.set(i + 2 * row,
            multiply_add(adds ? c.value<float>(i + 2 * row) : 0, rows[row], of_column));
  }
}

// -- Shared memory --------------------------------------------------------------------------------

// Four matrices of 8 x 8; lane i names row i % 8 of matrix i / 8 and gets two elements of each.
template <bool kTransposed>
void load_matrices(const Call& c) {
  const uint64_t* all = exchange(bits_of(c.shared(4)));
  const int row = lane() / 4, column = lane() % 4 * 2;
  uint32_t result[4];
  for (int m = 0; m < 4; ++m) {
    const auto at = [&](int r, int e) {
      uint16_t v;
      std::memcpy(&v, from_bits<unsigned char*>(all[8 * m + r]) + 2 * e, 2);
      return static_cast<uint32_t>(v);
    };
    result[m] = kTransposed ? at(column, row) | at(column + 1, row) << 16
                            : at(row, column) | at(row, column + 1) << 16;
  }
  exchange(0);
  for (size_t m = 0; m < 4; ++m) c.set(m, result[m]);
}

void store_matrices(const Call& c) {  // from where load_matrices<false> puts them
  const uint64_t* all = exchange(bits_of(c.shared(0)));
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (size_t m = 0; m < 4; ++m) {
    const uint32_t two = c.word(1 + m);
    std::memcpy(from_bits<unsigned char*>(all[8 * m + static_cast<size_t>(row)]) + 2 * column, &two,
                4);
  }
  exchange(0);
}

void load_words(const Call& c) {  // results, then the address
  if (c.has(".b16")) {
    uint16_t v;
    std::memcpy(&v, c.shared(1), 2);
    return c.set(0, v);
  }
  for (size_t i = 0; i + 1 < c.count; ++i) {
    uint32_t v;
    std::memcpy(&v, c.shared(c.count - 1) + 4 * i, 4);
    c.set(i, v);
  }
}
void store_words(const Call& c) {
  if (c.has(".b16")) {
    const auto v = c.value<uint16_t>(1);
    std::memcpy(c.shared(0), &v, 2);
    return;
  }
  const size_t words = c.has(".v4") ? 4 : c.has(".v2") ? 2 : 1;
  for (size_t i = 0; i < words; ++i) {
    const uint32_t v = c.word(c.count > 2 ? 1 + i : 1);  // or one value for all
    std::memcpy(c.shared(0) + 4 * i, &v, 4);
  }
}
void store_words_globally(const Call& c) {  // the address, then values
  for (size_t i = 1; i < c.count; ++i) {
    const uint32_t v = c.word(i);
    std::memcpy(c.value<char*>(0) + 4 * (i - 1), &v, 4);
  }
}

void copy16(const Call& c) {
  const auto valid = static_cast<size_t>(c.word(2));
  std::memset(c.shared(0), 0, 16);
  std::memcpy(c.shared(0), c.value<const void*>(1), valid);
}

// -- Barriers that count bytes, and the copy engine -----------------------------------------------

struct CountingBarrier {
  int32_t bytes;  // that were said to come and have not
  int16_t missing;
  uint16_t arrivals : 15, phase : 1;

  void pass_if_done() {
    if (missing > 0 || bytes != 0) return;
    missing = static_cast<int16_t>(arrivals);
    phase ^= 1;
  }
};
static_assert(sizeof(CountingBarrier) == 8);

void use_barrier(const Call& c) {
  if (c.has("try_wait")) {
    auto& b = *reinterpret_cast<CountingBarrier*>(c.shared(1));
    const bool done = b.phase != c.word(2);
    if (!done) yield();
    return c.set(0, static_cast<uint32_t>(done));
  }
  auto& b = *reinterpret_cast<CountingBarrier*>(c.shared(0));
  if (c.has("init")) {
    b = {};
    b.arrivals = static_cast<uint16_t>(c.word(1));
    b.missing = static_cast<int16_t>(b.arrivals);
    return;
  }
  int times = 1;
  if (c.has("expect_tx")) {
    b.bytes += static_cast<int32_t>(c.word(1));
  } else if (c.count == 2) {
    times = static_cast<int>(c.word(1));
  }
  b.missing = static_cast<int16_t>(b.missing - times);
  if (b.missing < 0) {
    std::fprintf(stderr, "more arrivals at a barrier than it expects\n");
    std::abort();
  }
  b.pass_if_done();
}

void count_bytes(unsigned char* barrier, int bytes) {
  auto& b = *reinterpret_cast<CountingBarrier*>(barrier);
  b.bytes -= bytes;
  b.pass_if_done();
}

void copy_box(const Call& c) {  // to, map, coordinates, barrier, perhaps a policy
  const auto& map = *c.value<const TensorMap*>(1);
  const auto rank = static_cast<size_t>(map.rank);
  const int64_t row_bytes = int64_t{map.boxes[0]} * map.element_bytes;
  // 16-byte chunks change places by the number of their row of 128 bytes.
  const auto mask = static_cast<uint32_t>(row_bytes / 16 - 1);
  int64_t rows = 1;
  for (size_t d = 1; d < rank; ++d) rows *= map.boxes[d];
  for (int64_t row = 0; row < rows; ++row) {
    bool is_inside = true;
    const unsigned char* from = map.data;
    int64_t rest = row;
    for (size_t d = 1; d < rank; ++d) {
      const int64_t at = static_cast<int32_t>(c.word(2 + d)) + rest % map.boxes[d];
      rest /= map.boxes[d];
      is_inside = is_inside && at >= 0 && at < map.sizes[d];
      from += at * map.strides[d - 1];
    }
    for (int64_t i = 0; i < map.boxes[0]; ++i) {
      const int64_t at = static_cast<int32_t>(c.word(2)) + i;
      uint32_t to = c.word(0) + static_cast<uint32_t>(row * row_bytes + i * map.element_bytes);
      to ^= (to >> 7 & mask) << 4;
      for (int64_t b = 0; b < map.element_bytes; ++b)
        dynamic_shared()[to + b] = is_inside && at >= 0 && at < map.sizes[0]
                                       ? from[at * map.element_bytes + b]
                                       : static_cast<unsigned char>(0);
    }
  }
  count_bytes(c.shared(static_cast<int>(2 + rank)), static_cast<int>(rows * row_bytes));
}

void copy_bytes(const Call& c) {
  std::memcpy(c.shared(0), c.value<const void*>(1), c.word(2));
  count_bytes(c.shared(3), static_cast<int>(c.word(2)));
}

void copy_bytes_out(const Call& c) {
  std::memcpy(c.value<void*>(0), c.shared(1), c.word(2));
}

// -- All of them ----------------------------------------------------------------------------------

void add_atomically(const Call& c) {
  yield_to_blocks();
  auto* at = c.value<uint64_t*>(1);
  c.set(0, *at);
  *at += c.value<uint64_t>(2);
}
void compare_and_swap(const Call& c) {
  auto* at = c.value<uint64_t*>(1);
  const uint64_t before = *at;
  if (before == c.value<uint64_t>(2)) *at = c.value<uint64_t>(3);
  c.set(0, before);
}
void load_what_others_write(const Call& c) {
  yield_to_blocks();
  c.set(0, *c.value<const uint64_t*>(1));
}

using Instruction = void (*)(const Call&);

Instruction find(std::string_view text) {
  static const std::pair<const char*, Instruction> kAll[] = {
      {"ex2.approx", [](const Call& c) { c.set(0, std::exp2(c.value<float>(1))); }},
      {"rcp.approx", [](const Call& c) { c.set(0, 1 / c.value<float>(1)); }},
      {"cvt.rn.", convert},
      {"mma.sync.aligned.m16n8k16.row.col.f32.bf16", multiply<true>},
      {"mma.sync.aligned.m16n8k16.row.col.f32.f16", multiply<false>},
      {"ldmatrix.sync.aligned.m8n8.x4.trans", load_matrices<true>},
      {"ldmatrix.sync.aligned.m8n8.x4.shared", load_matrices<false>},
      {"stmatrix.sync.aligned.m8n8.x4.shared", store_matrices},
      {"ld.shared", load_words},
      {"st.shared", store_words},
      {"st.global", store_words_globally},
      {"cp.async.cg", copy16},
      {"cp.async.commit_group", [](const Call&) {}},
      {"cp.async.wait_group", [](const Call&) {}},
      {"add.s64", [](const Call& c) { c.set(0, c.value<int64_t>(0) + c.value<int64_t>(1)); }},
      {"atom.add.acq_rel.gpu.global.u64", add_atomically},
      {"atom.cas.acq_rel.gpu.global.b64", compare_and_swap},
      {"ld.acquire.gpu.global.u64", load_what_others_write},
      {"fence.", [](const Call&) {}},
      {"mbarrier.", use_barrier},
      {"createpolicy.", [](const Call& c) { c.set(0, uint64_t{0}); }},
      {"prefetch.tensormap", [](const Call&) {}},
      {"cp.async.bulk.prefetch", [](const Call&) {}},
      {"cp.async.bulk.tensor", copy_box},
      {"cp.async.bulk.shared", copy_bytes},
      {"cp.async.bulk.global", copy_bytes_out},
      {"cp.async.bulk.commit_group", [](const Call&) {}},
      {"cp.async.bulk.wait_group", [](const Call&) {}},
      {"bar.sync",
       [](const Call& c) {
         const auto n = c.numbers("bar.sync");
         synchronise(n[0], n[1]);
       }},
      {"bar.arrive",
       [](const Call& c) {
         const auto n = c.numbers("bar.arrive");
         arrive(n[0], n[1]);
       }},
      {"wgmma.mma_async", multiply_group},
      {"wgmma.", [](const Call&) { exchange(0); }},  // by a whole warp
      {"setmaxnreg", [](const Call&) {}},
  };
  if (text.empty()) return [](const Call&) {};
  if (text[0] == '{') {  // registers and predicates around it
    for (const char* inner : {"mbarrier.try_wait", "wgmma.mma_async"})
      if (text.find(inner) != text.npos) return find(text.substr(text.find(inner)));
  }
  for (const auto& [name, instruction] : kAll)
    if (text.starts_with(name)) return instruction;
  std::fprintf(stderr, "this instruction is not emulated: %.*s\n", static_cast<int>(text.size()),
               text.data());
  std::abort();
}

}  // namespace

void ptx(const char* text, std::initializer_list<Operand> operands) {
  static std::unordered_map<const void*, Instruction> known;
  static const void* last = nullptr;
  static Instruction instruction = nullptr;
  if (last != text) {
    Instruction& found = known[text];
    if (found == nullptr) found = find(text);
    last = text;
    instruction = found;
  }
  const Instruction run = instruction;  // it may switch threads
  run({text, operands.begin(), operands.size()});
}

}  // namespace ni::emulated
