// AVX-512 with bf16 products. Compiled with those flags; called only where the processor has them.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "common/fp8.h"
#include "cpu/launch.h"

namespace jax_dsv4::cpu {
namespace {

#include "cpu/simd_avx512-inl.h"
// bf16 products.
#include "cpu/products_bf16-inl.h"
// decode-inl.h builds on both.
#include "cpu/decode-inl.h"

constexpr Kernels kKernels{"avx512_bf16", attend, combine};

bool is_bf16(const Scope& scope) {
  return scope.topk == 0 || scope.cache.layout == Layout::kFp8DsMla || scope.cache.layout == Layout::kBf16;
}

}  // namespace

const Kernels* avx512_bf16_kernels(const DecodeParams& p) {
  const bool usable = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool exact = p.q_dtype == Dtype::kBf16 && is_bf16(p.scopes[0]) && is_bf16(p.scopes[1]);
  return usable && exact ? &kKernels : nullptr;
}

}  // namespace jax_dsv4::cpu

#endif  // __x86_64__
