#ifndef TESTS_HOPPER_CUDA_BF16_H_
#define TESTS_HOPPER_CUDA_BF16_H_

#include "common/fp8.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {jax_dsv4::bf16_to_float(pair.x.bits), jax_dsv4::bf16_to_float(pair.y.bits)};
}

#endif  // TESTS_HOPPER_CUDA_BF16_H_
