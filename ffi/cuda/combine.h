// Partial outputs to outputs.
#ifndef JAX_DSV4_CUDA_COMBINE_H_
#define JAX_DSV4_CUDA_COMBINE_H_

#include <cuda_runtime_api.h>

#include "cuda/work.h"

namespace jax_dsv4::cuda {

// A launch that may begin before the kernel before it has ended: it calls cudaGridDependencySynchronize().
cudaLaunchAttribute overlapping();

cudaError_t prepare_combine();
// Follows a decoding kernel on the stream, which had so many workers.
cudaError_t launch_combine(const DecodeArgs& args, int workers, cudaStream_t stream);

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_COMBINE_H_
