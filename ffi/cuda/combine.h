// Partial outputs to outputs.
#ifndef JAX_DSV4_CUDA_COMBINE_H_
#define JAX_DSV4_CUDA_COMBINE_H_

#include <cuda_runtime_api.h>

#include "common/params.h"

namespace jax_dsv4::cuda {

cudaError_t prepare_combine();
// Follows a decoding kernel on the stream, which had so many workers.
cudaError_t launch_combine(const DecodeParams& params, int workers, cudaStream_t stream);

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_COMBINE_H_
