// Tensor: a non-owning view of up to four dimensions. Buffer: the owner of a piece of backend
// memory.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "core/check.h"
#include "core/types.h"

namespace ni {

// Rows are `row_stride` elements apart (dimension 0); the dimensions after the first are dense.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<int64_t, 4> shape{};
  int64_t row_stride = 0;

  Tensor() = default;
  Tensor(void* data_, DType dtype_, std::initializer_list<int64_t> shape_)
      : data(data_), dtype(dtype_), rank(static_cast<int>(shape_.size())) {
    check_invariant(rank >= 1 && rank <= 4, "a tensor has 1 to 4 dimensions");
    int i = 0;
    for (int64_t s : shape_) shape[static_cast<size_t>(i++)] = s;
    row_stride = 1;
    for (int d = 1; d < rank; ++d) row_stride *= shape[static_cast<size_t>(d)];
  }

  int64_t rows() const { return shape[0]; }
  // Elements of one row.
  int64_t cols() const {
    int64_t n = 1;
    for (int d = 1; d < rank; ++d) n *= shape[static_cast<size_t>(d)];
    return n;
  }
  int64_t numel() const { return rows() * cols(); }
  bool empty() const { return data == nullptr; }

  // The first n rows, or n rows from `first`.
  Tensor rows(int64_t first, int64_t n) const {
    Tensor t = *this;
    t.data =
        static_cast<char*>(data) + first * row_stride * static_cast<int64_t>(dtype_size(dtype));
    t.shape[0] = n;
    return t;
  }
  Tensor rows(int64_t n) const { return rows(0, n); }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Move-only owner of backend memory; `release` gives it back.
class Buffer {
 public:
  using Release = void (*)(void* data, size_t bytes);
  Buffer() = default;
  Buffer(void* data, size_t bytes, Release release)
      : data_(data), bytes_(bytes), release_(release) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer(std::move(other)).swap(*this);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data_ != nullptr) release_(data_, bytes_);
  }

  char* data() const { return static_cast<char*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(release_, other.release_);
  }
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Release release_ = nullptr;
};

}  // namespace ni
