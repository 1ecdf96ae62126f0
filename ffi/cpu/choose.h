// Which kernels run on this processor.
#ifndef JAX_DSV4_CPU_CHOOSE_H_
#define JAX_DSV4_CPU_CHOOSE_H_

#include <cstdint>

namespace jax_dsv4::cpu {

// The instruction sets that kernels are compiled for, in ascending order. jax_dsv4/_ffi.py: CPU_ISAS.
enum Isa : int { kGeneric, kAvx2, kAvx512, kAvx512Bf16, kAmx, kIsas };

// What a processor says of itself.
struct Processor {
  const char* vendor;  // CPUID's, such as "AuthenticAMD"
  uint32_t isas;       // bit i: it has instruction set i
  bool amx_refused;    // it has AMX too, but the operating system does not permit it
};

struct Choice {
  Isa isa;
  const char* why;  // completes "these kernels, because"
};

// The instruction set that is named, if the processor has it; otherwise the fastest of those below it. None is named:
// the fastest of all. A processor that nobody measured gets the safe choice.
Choice choose(const Processor& processor, int named);

// That of this process: name_isa(-1) names none.
Choice choice();
void name_isa(int isa);

}  // namespace jax_dsv4::cpu

#endif  // JAX_DSV4_CPU_CHOOSE_H_
