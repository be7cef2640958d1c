// cuBLASLt's product as linear.cpp asks for it: out = W^T x (+ bias), columns of all three
// contiguous. One algorithm, whose sum is that of the tensor core in groups of 16 ascending k.
#include <cublasLt.h>

#include <algorithm>
#include <cstring>

#include "emulated.h"

namespace {

struct Layout {
  cudaDataType type;
  uint64_t rows, columns;
  int64_t stride;
};
static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t));

struct Problem {
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
};
static_assert(sizeof(Problem) <= sizeof(cublasLtMatmulDescOpaque_t));

float load(const void* from, cudaDataType type, int64_t i) {
  if (type == CUDA_R_32F) return static_cast<const float*>(from)[i];
  return ni::emulated::widen(static_cast<const uint16_t*>(from)[i], type == CUDA_R_16BF);
}
void store(void* to, cudaDataType type, int64_t i, float v) {
  if (type == CUDA_R_32F) {
    static_cast<float*>(to)[i] = v;
  } else {
    static_cast<uint16_t*>(to)[i] = ni::emulated::narrow(v, type == CUDA_R_16BF);
  }
}

}  // namespace

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = nullptr;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t) {
  return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() {
  return 0;
}
const char* cublasLtGetStatusString(cublasStatus_t) {
  return "an error of the emulated cuBLASLt";
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t desc, size_t,
                                               cublasComputeType_t, cudaDataType_t) {
  const Problem none;
  std::memcpy(desc, &none, sizeof(none));
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t which,
                                              const void* value, size_t bytes) {
  auto& p = *reinterpret_cast<Problem*>(desc);
  if (which == CUBLASLT_MATMUL_DESC_EPILOGUE) std::memcpy(&p.epilogue, value, bytes);
  if (which == CUBLASLT_MATMUL_DESC_BIAS_POINTER) std::memcpy(&p.bias, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t,
                                                 cudaDataType type, uint64_t rows, uint64_t columns,
                                                 int64_t stride) {
  const Layout l{type, rows, columns, stride};
  std::memcpy(layout, &l, sizeof(l));
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t,
                                                    const void*, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int* count) {
  results[0] = {};
  results[0].state = CUBLAS_STATUS_SUCCESS;
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t*,
                                                    cublasLtMatmulAlgoConfigAttributes_t,
                                                    void* value, size_t bytes, size_t* written) {
  std::memset(value, 0, bytes);  // the sum is not split
  *written = bytes;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       const cublasLtMatmulAlgo_t*,
                                       cublasLtMatmulHeuristicResult_t* result) {
  *result = {};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void*,
                              const void* w, cublasLtMatrixLayout_t w_layout, const void* x,
                              cublasLtMatrixLayout_t x_layout, const void*, const void*,
                              cublasLtMatrixLayout_t, void* out, cublasLtMatrixLayout_t out_layout,
                              const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
  const auto layout = [](cublasLtMatrixLayout_t l) { return *reinterpret_cast<Layout*>(l); };
  ni::emulated::enqueue([=, p = *reinterpret_cast<Problem*>(desc), of_w = layout(w_layout),
                         of_x = layout(x_layout), of_out = layout(out_layout)] {
    const auto k = static_cast<int64_t>(of_w.rows);
    for (int64_t row = 0; row < static_cast<int64_t>(of_x.columns); ++row)
      for (int64_t column = 0; column < static_cast<int64_t>(of_w.columns); ++column) {
        float sum = 0;
        for (int64_t begin = 0; begin < k; begin += 16) {
          double part = static_cast<double>(sum);
          for (int64_t i = begin; i < std::min(k, begin + 16); ++i)
            part += static_cast<double>(load(w, of_w.type, column * of_w.stride + i)) *
                    static_cast<double>(load(x, of_x.type, row * of_x.stride + i));
          sum = static_cast<float>(part);
        }
        if (p.epilogue == CUBLASLT_EPILOGUE_BIAS) sum += load(p.bias, of_w.type, column);
        store(out, of_out.type, row * of_out.stride + column, sum);
      }
  });
  return CUBLAS_STATUS_SUCCESS;
}
