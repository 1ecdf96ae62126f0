#include "cuda/few_heads_kernel.h"

template jax_dsv4::cuda::DecodeKernel jax_dsv4::cuda::few_heads<jax_dsv4::cuda::PlannedWork, 8>();
