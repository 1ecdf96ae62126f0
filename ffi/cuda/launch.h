// What the kernels of this directory offer. Launchers take plain structs and a stream, enqueue, and return the launch's
// status: no allocation, no synchronisation, nothing read back. prepare() comes before them, once per device and
// outside graph capture.
#ifndef JAX_DSV4_CUDA_LAUNCH_H_
#define JAX_DSV4_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "common/params.h"
#include "common/plan.h"

namespace jax_dsv4::cuda {

// jax_dsv4/_implementations/cuda.py states these too.
constexpr int kHeadsPerBlock = 64;    // that one thread block attends with; a token with more has neighbouring blocks
constexpr int kFewHeads = 32;         // up to which a block of the kernels for few heads has them all
constexpr int kMostProcessors = 132;  // multiprocessors of the largest Hopper
// Keys that pass through the tensor cores at a time. Splits at multiples of it waste nothing.
constexpr int kKeyTile = 64;
// Partial outputs are stored for heads in groups of so many. The last group may reach past DecodeParams.heads:
// `max_partials` must be the rows that fit with heads rounded up.
constexpr int kPartialHeads = 8;

// Loads the kernels onto the current device and sets their attributes.
cudaError_t prepare_plan();
cudaError_t prepare_decode();
cudaError_t prepare_append();

cudaError_t launch_plan(const PlanParams& params, cudaStream_t stream);
// cudaErrorNotSupported: a layout or dtype that the kernels do not read.
cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream);
cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_LAUNCH_H_
