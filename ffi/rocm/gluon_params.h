// What the kernels of gluon-inl.h are handed, by value.
#ifndef JAX_DSV4_ROCM_GLUON_PARAMS_H_
#define JAX_DSV4_ROCM_GLUON_PARAMS_H_

#include <cstdint>

#include "common/params.h"

namespace jax_dsv4::rocm {

// A scope, and its valid slots as AITER's kernel reads them: those of a token follow those of the token before.
struct GluonScope {
  Scope scope;
  // Workspaces, all uninitialised.
  int32_t* counts;  // [tokens] valid slots
  int32_t* indptr;  // [tokens + 1] where a token's begin in `slots`
  int32_t* slots;   // [tokens * topk]
};

// One call. The kernel cuts each scope of a token into equal parts, and leaves of every split what it saw of both:
// the largest score in base 2, the sum of powers relative to it, and the output not yet divided by that sum.
struct GluonDecodeParams {
  const void* q;         // bf16 [tokens, heads, 512]
  GluonScope scopes[2];  // the second has topk 0 where there is none
  const float* sink;     // [heads], or null
  void* out;             // [tokens, heads, 512] of out_dtype
  float* lse;            // [tokens, heads]
  // Workspaces, all uninitialised.
  float* partial_max;  // [tokens, splits, heads]
  float* partial_sum;  // [tokens, splits, heads]
  float* partial_out;  // [tokens, splits, heads, 512]
  int32_t tokens;
  int32_t heads;
  int32_t splits;
  Dtype out_dtype;
};

JAX_DSV4_HD int32_t scopes_of(const GluonDecodeParams& p) { return p.scopes[1].scope.topk > 0 ? 2 : 1; }

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_GLUON_PARAMS_H_
