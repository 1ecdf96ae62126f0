// AVX-512 (F, BW, DQ, VL). Compiled with those flags; called only where the processor has them.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "common/fp8.h"
#include "cpu/launch.h"

namespace jax_dsv4::cpu {
namespace {

#include "cpu/simd_avx512-inl.h"
// fp32 products.
#include "cpu/products_f32-inl.h"
// The order of these matters: each builds on the one before.
#include "cpu/decode-inl.h"

constexpr Kernels kKernels{"avx512", attend, combine};

}  // namespace

const Kernels* avx512_kernels(const DecodeParams&) {
  const bool usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return usable ? &kKernels : nullptr;
}

}  // namespace jax_dsv4::cpu

#endif  // __x86_64__
