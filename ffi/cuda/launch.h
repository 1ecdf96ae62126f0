// What the kernels of this directory offer. Launchers take plain structs and a stream, enqueue, and return the launch's
// status: no allocation, no synchronisation, nothing read back. prepare() is called once per device before any of them.
#ifndef JAX_DSV4_CUDA_LAUNCH_H_
#define JAX_DSV4_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "common/params.h"

namespace jax_dsv4::cuda {

// Heads that one thread block attends with; a token with more is spread over neighbouring blocks.
constexpr int kHeadsPerBlock = 64;
// Keys that are converted, and handed from warp to warp, at a time. Splits at multiples of it waste nothing.
constexpr int kKeyTile = 64;

// Loads the kernels onto the current device and sets their attributes: what is not allowed during graph capture.
cudaError_t prepare();

// Workers that a plan for this device and head count should have: one per multiprocessor and block of heads.
cudaError_t worker_count(int heads, int* workers);

// cudaErrorNotSupported: a layout or dtype that these kernels do not read.
cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream);

cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_LAUNCH_H_
