// What the softmax needs that every kernel here runs over pieces of a token's keys.
#ifndef JAX_DSV4_CUDA_SOFTMAX_H_
#define JAX_DSV4_CUDA_SOFTMAX_H_

#include <cstdint>

#include "common/params.h"
#include "cuda/sm90.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {

using namespace sm90;

constexpr float kLog2e = 1.4426950408889634f;

// The running maximum is raised only when a score exceeds it by 2^8: P then stays far inside bf16's and fp32's range,
// its relative rounding is the same, and the accumulators are hardly ever rescaled.
constexpr float kRescaleThresholdLog2 = 8.f;

// One head at an item's end, `total` being the sum of 2^(score - maximum) over the item's keys: stores its lse if
// `stores`. -> what divides the sum of P . V. The sink enters where the item is the whole token.
__device__ __forceinline__ float finish_head(const DecodeParams& params, const Item& item, int head, float maximum,
                                             float total, bool stores) {
  const bool empty = maximum == -INFINITY, whole = item.partial < 0;
  if (stores) {
    const float lse = empty ? -INFINITY : (maximum + log2f(total)) / kLog2e;
    float* const to = whole ? params.lse : params.partial_lse;
    to[static_cast<int64_t>(whole ? item.token : item.partial) * params.heads + head] = lse;
  }
  if (!whole || !params.sink) return total;
  return total + exp2f(params.sink[head] * kLog2e - (empty ? 0.f : maximum));
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_SOFTMAX_H_
