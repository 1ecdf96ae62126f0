// What the softmax needs that every kernel here runs over pieces of a token's keys.
#ifndef JAX_DSV4_CUDA_SOFTMAX_H_
#define JAX_DSV4_CUDA_SOFTMAX_H_

#include <cstdint>

#include "common/params.h"
#include "cuda/sm90.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {

using namespace sm90;

// A row's P of a tile is relative to 2^base, the base being the tile's largest score, so that the weight that counts
// most is 1, which bf16 has exactly. But it is not far below the largest score so far, for what has been added up must
// stay in fp32's range.
constexpr float kFarBelowLog2 = 4.f;

struct Base {
  float largest = -INFINITY, base = -INFINITY;

  // Turns to a tile. -> what has been added up is multiplied by it.
  __device__ __forceinline__ float turn(float top) {
    const float before = base;
    largest = fmaxf(largest, top);
    base = fmaxf(top, largest - kFarBelowLog2);
    return before == base ? 1.f : exp2_approx(before - base);
  }
  // What scores are relative to.
  __device__ __forceinline__ float origin() const { return base == -INFINITY ? 0.f : base; }
};

// Of a head: loaded long before an item's end, which would wait for it, and not looked at before.
__device__ __forceinline__ float load_sink(const DecodeParams& params, int head) {
  return params.sink && head < params.heads ? params.sink[head] : -INFINITY;
}

// One head at an item's end, `total` being the sum of 2^(score - base) over the item's keys: stores its lse if
// `stores`. -> what the sum of P . V is multiplied by. The sink enters where the item is the whole token. All of it is
// approximate to a unit in the last place or two, and few instructions: code that runs once costs what fetching it
// costs.
__device__ __forceinline__ float finish_head(const DecodeParams& params, const Item& item, int head, float sink,
                                             float base, float total, bool stores) {
  // Not by the base, which passes over scores that are NaN.
  const bool empty = total == 0.f, whole = item.partial < 0;
  if (stores) {
    const float lse = empty ? -INFINITY : (base + log2_approx(total)) * kLn2;
    float* const to = whole ? params.lse : params.partial_lse;
    to[static_cast<int64_t>(whole ? item.token : item.partial) * params.heads + head] = lse;
  }
  return empty ? 0.f : reciprocal_approx(whole ? total + exp2_approx(fmaf(sink, kLog2e, -base)) : total);
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_SOFTMAX_H_
