// JAX_DSV4_HD: a function that is compiled for the processor and, by nvcc and hipcc, for the GPU too. Static, because
// the CPU kernels' files are compiled for different instruction sets: of an inline function with linkage the linker
// would keep one copy for all. JAX_DSV4_HD_MEMBER: likewise of a class, inlined wherever it is called.
#ifndef JAX_DSV4_COMMON_HOST_DEVICE_H_
#define JAX_DSV4_COMMON_HOST_DEVICE_H_

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIP__)
#define JAX_DSV4_HD __host__ __device__ static inline
#define JAX_DSV4_HD_MEMBER __host__ __device__ __attribute__((always_inline))
#else
#define JAX_DSV4_HD static inline
#define JAX_DSV4_HD_MEMBER __attribute__((always_inline))
#endif

namespace jax_dsv4 {

JAX_DSV4_HD int32_t min_int(int32_t a, int32_t b) { return a < b ? a : b; }
JAX_DSV4_HD int32_t max_int(int32_t a, int32_t b) { return a > b ? a : b; }

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_HOST_DEVICE_H_
