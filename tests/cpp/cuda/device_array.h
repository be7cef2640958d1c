// Device memory for kernel tests: surrounded by guards, poisoned until it is filled, so that a
// stray write and an element that was never written both show.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "core/types.h"
#include "cuda/kernels.h"

namespace ni::test {

inline void check_device(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

inline cuda::Card this_card() {
  cudaDeviceProp p{};
  check_device(cudaGetDeviceProperties(&p, 0));
  cuda::Card c;
  c.arch = 10 * p.major + p.minor;
  c.num_sms = p.multiProcessorCount;
  c.max_smem = static_cast<int>(p.sharedMemPerBlockOptin);
  c.smem_per_sm = static_cast<int>(p.sharedMemPerMultiprocessor);
  return c;
}

// Raw bytes; every byte is 0xff at first, which is NaN in every floating-point type.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t bytes) : bytes_(bytes) {
    check_device(cudaMalloc(&base_, bytes + 2 * kGuard));
    check_device(cudaMemset(base_, 0xa5, bytes + 2 * kGuard));
    check_device(cudaMemset(base_ + kGuard, 0xff, bytes));
  }
  DeviceBytes(const DeviceBytes&) = delete;
  ~DeviceBytes() { cudaFree(base_); }

  void* data() const { return base_ + kGuard; }
  size_t bytes() const { return bytes_; }
  void upload(const void* from, size_t bytes) {
    check_device(cudaMemcpy(data(), from, bytes, cudaMemcpyHostToDevice));
  }
  void download(void* to, size_t bytes) const {
    check_device(cudaDeviceSynchronize());
    check_device(cudaMemcpy(to, data(), bytes, cudaMemcpyDeviceToHost));
  }
  void zero() { check_device(cudaMemset(data(), 0, bytes_)); }
  void poison() { check_device(cudaMemset(data(), 0xff, bytes_)); }
  // Nothing was written around it.
  bool intact() const {
    check_device(cudaDeviceSynchronize());
    std::vector<unsigned char> guard(kGuard);
    for (const char* at : {base_, base_ + kGuard + bytes_}) {
      check_device(cudaMemcpy(guard.data(), at, kGuard, cudaMemcpyDeviceToHost));
      for (const unsigned char c : guard)
        if (c != 0xa5) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 4096;
  char* base_ = nullptr;
  size_t bytes_;
};

template <typename T>
class DeviceArray : public DeviceBytes {
 public:
  explicit DeviceArray(size_t n) : DeviceBytes(n * sizeof(T)), n_(n) {}
  explicit DeviceArray(const std::vector<T>& v) : DeviceArray(v.size()) {
    if (n_ > 0) upload(v.data(), bytes());
  }
  T* data() const { return static_cast<T*>(DeviceBytes::data()); }
  std::vector<T> read() const {
    std::vector<T> v(n_);
    if (n_ > 0) download(v.data(), bytes());
    return v;
  }

 private:
  size_t n_;
};

// Floats in an activation type (bf16, f16, f32), converted on the host.
inline std::vector<char> encode_floats(const std::vector<float>& v, DType dtype) {
  std::vector<char> out(v.size() * dtype_size(dtype));
  for (size_t i = 0; i < v.size(); ++i) {
    if (dtype == DType::bf16) {
      const bf16 h = to_bf16(v[i]);
      std::memcpy(&out[2 * i], &h, 2);
    } else if (dtype == DType::f16) {
      const f16 h = to_f16(v[i]);
      std::memcpy(&out[2 * i], &h, 2);
    } else {
      std::memcpy(&out[4 * i], &v[i], 4);
    }
  }
  return out;
}

inline std::vector<float> decode_floats(const std::vector<char>& bytes, DType dtype) {
  std::vector<float> out(bytes.size() / dtype_size(dtype));
  for (size_t i = 0; i < out.size(); ++i) {
    if (dtype == DType::bf16) {
      bf16 h;
      std::memcpy(&h, &bytes[2 * i], 2);
      out[i] = to_float(h);
    } else if (dtype == DType::f16) {
      f16 h;
      std::memcpy(&h, &bytes[2 * i], 2);
      out[i] = to_float(h);
    } else {
      std::memcpy(&out[i], &bytes[4 * i], 4);
    }
  }
  return out;
}

// A matrix of activations on the device.
class DeviceMatrix : public DeviceBytes {
 public:
  DeviceMatrix(int64_t rows, int64_t stride, DType dtype)
      : DeviceBytes(static_cast<size_t>(rows * stride) * dtype_size(dtype)), dtype_(dtype) {}
  void fill(const std::vector<float>& v) {
    const std::vector<char> raw = encode_floats(v, dtype_);
    upload(raw.data(), raw.size());
  }
  std::vector<float> read() const {
    std::vector<char> raw(bytes());
    download(raw.data(), raw.size());
    return decode_floats(raw, dtype_);
  }

 private:
  DType dtype_;
};

inline std::vector<float> normal_floats(size_t n, uint32_t seed, float scale = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = normal(rng);
  return v;
}

}  // namespace ni::test
