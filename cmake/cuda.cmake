# Decides whether the CUDA plug-in is built. The core never links CUDA; AUTO builds the plug-in only
# where nvcc and the cuBLASLt headers are both found, and says what was missing.
if(NI_CUDA STREQUAL "OFF")
  message(STATUS "nano-inference: CUDA backend off (NI_CUDA=OFF)")
  return()
elseif(NOT NI_CUDA MATCHES "^(AUTO|ON)$")
  message(FATAL_ERROR "NI_CUDA must be AUTO, ON or OFF, not '${NI_CUDA}'")
endif()

# pip's nvidia packages put headers in site-packages/nvidia/<library>/include (nvidia/cu13/include
# since CUDA 13) and nvcc in the bin folder beside it.
find_package(Python 3.10 QUIET COMPONENTS Interpreter)
set(ni_pip_nvidia)
if(Python_SITELIB)
  file(GLOB ni_pip_nvidia ${Python_SITELIB}/nvidia/*)
endif()
find_program(NI_NVCC nvcc
  HINTS ${CUDAToolkit_ROOT} ENV CUDA_HOME ENV CUDA_PATH
  PATHS /usr/local/cuda ${ni_pip_nvidia}
  PATH_SUFFIXES bin)
set(ni_toolkit_root)
if(NI_NVCC)
  get_filename_component(ni_toolkit_root ${NI_NVCC} REALPATH)
  get_filename_component(ni_toolkit_root ${ni_toolkit_root}/../.. ABSOLUTE)
endif()
find_path(NI_CUBLASLT_INCLUDE cublasLt.h
  HINTS ${ni_toolkit_root} ${CUDAToolkit_ROOT} ENV CUDA_HOME ENV CUDA_PATH
  PATHS /usr/local/cuda ${ni_pip_nvidia}
  PATH_SUFFIXES include targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include)

set(ni_cuda_missing)
if(NOT NI_NVCC)
  list(APPEND ni_cuda_missing "nvcc (PATH, CUDA_HOME, /usr/local/cuda, pip's nvidia folders)")
endif()
if(NOT NI_CUBLASLT_INCLUDE)
  list(APPEND ni_cuda_missing "cublasLt.h (beside nvcc, CUDA_HOME, /usr/local/cuda, pip's nvidia folders)")
endif()

if(NOT ni_cuda_missing)
  message(STATUS "nano-inference: CUDA backend on: ${NI_NVCC}, ${NI_CUBLASLT_INCLUDE}/cublasLt.h")
  add_subdirectory(${PROJECT_SOURCE_DIR}/cuda)
  return()
endif()
list(JOIN ni_cuda_missing "; " ni_cuda_missing)
if(NI_CUDA STREQUAL "ON")
  message(FATAL_ERROR "NI_CUDA=ON, but the CUDA backend cannot be built. Missing: ${ni_cuda_missing}")
endif()
message(STATUS "nano-inference: CUDA backend not built. Missing: ${ni_cuda_missing}")
