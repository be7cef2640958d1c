#include "cuda/weight_loader.h"

#include <algorithm>
#include <cstring>

#include "cuda/check_cuda.h"
#include "cuda/kernels.h"

namespace ni::cuda {

// Two pinned buffers, each with its copy on the card for rows that must be converted there.
struct WeightLoader::Lane {
  struct Half {
    char* pinned = nullptr;
    char* device = nullptr;
    cudaEvent_t done = nullptr;
  };
  Half halves[2];
  cudaStream_t stream = nullptr;

  Lane() {
    try {
      check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream for weights");
      for (Half& half : halves) {
        check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&half.pinned), kBufferBytes,
                                 cudaHostAllocDefault),
                   "a pinned buffer for weights");
        check_cuda(cudaMalloc(reinterpret_cast<void**>(&half.device), kBufferBytes),
                   "a buffer for weights");
        check_cuda(cudaEventCreateWithFlags(&half.done, cudaEventDisableTiming),
                   "an event for weights");
      }
    } catch (...) {
      release();
      throw;
    }
  }
  Lane(const Lane&) = delete;
  ~Lane() { release(); }
  void release() noexcept {
    for (Half& half : halves) {
      if (half.done != nullptr) cudaEventDestroy(half.done);
      cudaFree(half.device);
      cudaFreeHost(half.pinned);
    }
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
};

WeightLoader::WeightLoader(int device) : device_(device) {}

WeightLoader::~WeightLoader() {
  cudaSetDevice(device_);
  lanes_.clear();
}

WeightLoader::Lane* WeightLoader::take() {
  std::unique_lock lock(mutex_);
  if (free_.empty() && lanes_.size() < kMaxLanes) {
    lanes_.push_back(std::make_unique<Lane>());
    return lanes_.back().get();
  }
  free_changed_.wait(lock, [this] { return !free_.empty(); });
  Lane* lane = free_.back();
  free_.pop_back();
  return lane;
}

void WeightLoader::give_back(Lane* lane) {
  {
    const std::lock_guard lock(mutex_);
    free_.push_back(lane);
  }
  free_changed_.notify_one();
}

void WeightLoader::load(const Tensor& src, void* dst, DType dst_dtype, int64_t dst_stride) {
  if (src.numel() == 0) return;
  check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  const auto src_size = static_cast<int64_t>(dtype_size(src.dtype));
  const auto dst_size = static_cast<int64_t>(dtype_size(dst_dtype));
  const int64_t cols = src.cols(), row_bytes = cols * src_size;
  // Rows that do not fit into a buffer go in pieces of columns.
  const int64_t piece = std::min(cols, static_cast<int64_t>(kBufferBytes) / src_size);
  const int64_t part =
      std::max<int64_t>(1, static_cast<int64_t>(kBufferBytes) / (piece * src_size));

  struct Loan {
    WeightLoader* loader;
    Lane* lane;
    ~Loan() {
      cudaStreamSynchronize(lane->stream);  // its buffers may be written again
      loader->give_back(lane);
    }
  } loan{this, take()};
  Lane& lane = *loan.lane;
  int turn = 0;
  for (int64_t first = 0; first < src.rows(); first += part) {
    const int64_t rows = std::min(part, src.rows() - first);
    for (int64_t col = 0; col < cols; col += piece) {
      const int64_t width = std::min(piece, cols - col), width_bytes = width * src_size;
      Lane::Half& half = lane.halves[turn ^= 1];
      check_cuda(cudaEventSynchronize(half.done), "copying weights");
      const char* from = src.as<char>() + (first * src.row_stride + col) * src_size;
      const int64_t stride_bytes = src.row_stride * src_size;
      if (stride_bytes == row_bytes && width == cols) {
        std::memcpy(half.pinned, from, static_cast<size_t>(rows * row_bytes));
      } else {
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(half.pinned + r * width_bytes, from + r * stride_bytes,
                      static_cast<size_t>(width_bytes));
      }
      char* to = static_cast<char*>(dst) + (first * dst_stride + col) * dst_size;
      if (src.dtype == dst_dtype) {
        check_cuda(
            cudaMemcpy2DAsync(to, static_cast<size_t>(dst_stride * dst_size), half.pinned,
                              static_cast<size_t>(width_bytes), static_cast<size_t>(width_bytes),
                              static_cast<size_t>(rows), cudaMemcpyHostToDevice, lane.stream),
            "copying weights");
      } else {
        check_cuda(
            cudaMemcpyAsync(half.device, half.pinned, static_cast<size_t>(rows * width_bytes),
                            cudaMemcpyHostToDevice, lane.stream),
            "copying weights");
        convert_rows(half.device, src.dtype, width, rows, width, to, dst_dtype, dst_stride,
                     lane.stream);
      }
      check_cuda(cudaEventRecord(half.done, lane.stream), "copying weights");
    }
  }
  check_cuda(cudaStreamSynchronize(lane.stream), "copying weights");
}

}  // namespace ni::cuda
