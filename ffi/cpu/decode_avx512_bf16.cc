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

}  // namespace

const Kernels avx512_bf16_kernels{"avx512_bf16", true, kTileKeys, attend, combine};

}  // namespace jax_dsv4::cpu

#endif  // __x86_64__
