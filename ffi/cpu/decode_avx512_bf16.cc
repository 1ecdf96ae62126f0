#include "cpu/launch.h"
namespace jax_dsv4::cpu {
const Kernels* avx512_bf16_kernels(const DecodeParams&) { return nullptr; }
}  // namespace jax_dsv4::cpu
