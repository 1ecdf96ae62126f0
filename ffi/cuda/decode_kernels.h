// The decoding kernels, for a host that launches them. Each is compiled in a file of its own.
#ifndef JAX_DSV4_CUDA_DECODE_KERNELS_H_
#define JAX_DSV4_CUDA_DECODE_KERNELS_H_

#include <cstddef>

#include "cuda/work.h"

namespace jax_dsv4::cuda {

// A kernel, and what it is launched with.
struct DecodeKernel {
  using Function = void (*)(DecodeArgs);
  Function aligned[3];     // for fp8_ds_mla whose blocks all begin at multiples of 16, of 4, or of 1 byte
  Function v41, bf16;      // for mxfp8 with either of mxfp8 and nvfp4, and for bf16 alone; of 16
  Function any_layout[2];  // for any layouts; of 16, or of 1
  int threads;
  size_t shared_bytes;
};

// kHeadsPerBlock heads to a block (many_heads.cu).
DecodeKernel many_heads();

// kHeads to a block, following the plan (few_heads_*.cu: 8, 16, 32) or in clusters (cluster_*.cu: 8, 16).
template <typename Work, int kHeads>
DecodeKernel few_heads();

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_DECODE_KERNELS_H_
