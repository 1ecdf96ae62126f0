// JAX_DSV4_HD: a function that is compiled for the processor and, by nvcc and hipcc, for the GPU too.
#ifndef JAX_DSV4_COMMON_HOST_DEVICE_H_
#define JAX_DSV4_COMMON_HOST_DEVICE_H_

#if defined(__CUDACC__) || defined(__HIP__)
#define JAX_DSV4_HD __host__ __device__ inline
#else
#define JAX_DSV4_HD inline
#endif

#endif  // JAX_DSV4_COMMON_HOST_DEVICE_H_
