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

}  // namespace

const Kernels avx512_kernels{"avx512", false, kTileKeys, attend, combine};

}  // namespace jax_dsv4::cpu

#endif  // __x86_64__
