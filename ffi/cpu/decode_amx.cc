// AMX tiles beside AVX-512 (with GFNI). Compiled with the flags of the latter; called only where the processor and the
// operating system have both.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "common/fp8.h"
#include "cpu/launch.h"

namespace jax_dsv4::cpu {
namespace {

#include "cpu/simd_avx512-inl.h"
#if defined(JAX_DSV4_AMX_MODEL)
#include "cpu/tiles_model-inl.h"
#else
#include "cpu/tiles_amx-inl.h"
#endif
// bf16 products in tiles.
#include "cpu/products_amx-inl.h"
// decode-inl.h builds on all of them.
#include "cpu/decode-inl.h"

// The threads are XLA's: they keep nothing of it.
void attend_in_tiles(const DecodeParams& p, const Task& task, uint8_t* scratch) {
  Tiles::configure();
  attend(p, task, scratch);
  Tiles::release();
}

}  // namespace

const Kernels amx_kernels{"amx", true, kTileKeys, attend_in_tiles, combine};

}  // namespace jax_dsv4::cpu

#endif  // __x86_64__
