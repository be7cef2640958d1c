#include "cuda/tensor_map.h"

#include <cudaTypedefs.h>

#include <algorithm>
#include <array>

#include "cuda/check_cuda.h"

namespace ni::cuda {

CUtensorMap make_tensor_map(const char* what, DType dtype, const void* data,
                            std::initializer_list<int64_t> sizes,
                            std::initializer_list<int64_t> strides,
                            std::initializer_list<int64_t> boxes) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    check_runtime(result == cudaDriverEntryPointSuccess,
                  "this driver has no cuTensorMapEncodeTiled; CUDA 12.0 or newer has");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  constexpr size_t kMaxRank = 5;
  std::array<cuuint64_t, kMaxRank> size{}, stride{};
  std::array<cuuint32_t, kMaxRank> box{}, step;
  step.fill(1);
  const auto wide = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  std::transform(sizes.begin(), sizes.end(), size.begin(), wide);
  std::transform(strides.begin(), strides.end(), stride.begin(), wide);
  std::transform(boxes.begin(), boxes.end(), box.begin(),
                 [](int64_t n) { return static_cast<cuuint32_t>(n); });
  const auto row_bytes = static_cast<int64_t>(box[0]) * static_cast<int64_t>(dtype_size(dtype));
  check_arg(row_bytes == 128 || row_bytes == 64 || row_bytes == 32, what, ": boxes of ", row_bytes,
            " bytes; 128, 64 and 32 can be copied");
  CUtensorMap map;
  // Promotion to 256 bytes, twice a box's row, takes 4 to 7% longer from memory (docs/kernels.md).
  const CUresult result =
      encode(&map,
             dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
             : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_UINT8,
             static_cast<cuuint32_t>(sizes.size()), const_cast<void*>(data), size.data(),
             stride.data(), box.data(), step.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
             row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
             : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                               : CU_TENSOR_MAP_SWIZZLE_32B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_runtime(result == CUDA_SUCCESS, what, ": no tensor map (CUDA error ",
                static_cast<int>(result), ")");
  return map;
}

}  // namespace ni::cuda
