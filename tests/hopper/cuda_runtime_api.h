// Of CUDA's runtime what ffi/cuda/ uses, over machine.h.
#ifndef TESTS_HOPPER_CUDA_RUNTIME_API_H_
#define TESTS_HOPPER_CUDA_RUNTIME_API_H_

#include <cstddef>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801
};
using cudaStream_t = void*;

#endif  // TESTS_HOPPER_CUDA_RUNTIME_API_H_
