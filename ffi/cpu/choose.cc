#include "cpu/choose.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jax_dsv4::cpu {
namespace {

constexpr uint32_t bit(Isa isa) { return uint32_t{1} << isa; }

// Whether bf16 products run at twice the rate of fp32 ones. Kernels with weights in two bf16 terms need that: at half
// of it, as on Intel's processors, they take twice as long as the fp32 kernels. Known of AMD's since Zen 4, its first
// with them.
bool has_fast_bf16(const Processor& processor) { return std::strcmp(processor.vendor, "AuthenticAMD") == 0; }

const char* reason(const Processor& processor, Isa isa) {
#if defined(JAX_DSV4_AMX_MODEL)
  if (isa == kAmx) return "a model of AMX in C++, for tests";
#endif
  if (processor.amx_refused) return "the operating system does not permit AMX";
  if (isa == kAvx512Bf16) return "bf16 products have their full rate on this processor";
  if (isa == kAvx512 && (processor.isas & bit(kAvx512Bf16)) != 0 && !has_fast_bf16(processor)) {
    return std::strcmp(processor.vendor, "GenuineIntel") == 0
               ? "this processor's bf16 products are slower than fp32"
               : "bf16 products were not measured on processors of this vendor";
  }
  return "this processor's best";
}

#if defined(__x86_64__)
const char* vendor() {
  static char name[13] = {};
  unsigned highest, words[3];
  if (__get_cpuid(0, &highest, &words[0], &words[2], &words[1])) std::memcpy(name, words, sizeof words);
  return name;
}

Processor this_processor() {
  uint32_t isas = bit(kGeneric);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas |= bit(kAvx2);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    isas |= bit(kAvx512);
    if (__builtin_cpu_supports("avx512bf16")) isas |= bit(kAvx512Bf16);
  }
  return {vendor(), isas, false};
}

#if defined(JAX_DSV4_AMX_MODEL)
bool has_amx() { return __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512bw"); }
bool permit_amx() { return true; }
#else
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned a, b, c, features = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &features) && (features & kBf16) != 0 && (features & kTile) != 0 &&
         __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512bw");
}

// Linux wants to be asked, once in a process, before it keeps the tiles' 8 KB for its threads. It refuses if a signal
// stack is too small for them, or if it knows no AMX.
bool permit_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif
#else
Processor this_processor() { return {"", bit(kGeneric), false}; }
bool has_amx() { return false; }
bool permit_amx() { return false; }
#endif

std::atomic<int> named_isa{-1};

}  // namespace

Choice choose(const Processor& processor, int named) {
  const bool is_named = named >= 0 && named < kIsas;
  if (is_named && (processor.isas & bit(static_cast<Isa>(named))) != 0) {
    return {static_cast<Isa>(named), "JAX_DSV4_CPU_ISA names them"};
  }
  for (int i = is_named ? named : kIsas - 1; i > kGeneric; --i) {
    const Isa isa = static_cast<Isa>(i);
    const bool is_fast = isa != kAvx512Bf16 || has_fast_bf16(processor);
    if ((processor.isas & bit(isa)) != 0 && is_fast) return {isa, reason(processor, isa)};
  }
  return {kGeneric, reason(processor, kGeneric)};
}

Choice choice() {
  // Once: a virtual machine's CPUID takes some microseconds.
  static const Processor without_amx = this_processor();
  static const bool amx = has_amx();
  Processor processor = without_amx;
  const int named = named_isa.load(std::memory_order_relaxed);
  // Who names other kernels is not to have the process's signal stacks restricted.
  if ((named < 0 || named == kAmx) && amx) {
    static const bool permitted = permit_amx();
    if (permitted) processor.isas |= bit(kAmx);
    processor.amx_refused = !permitted;
  }
  return choose(processor, named);
}

void name_isa(int isa) { named_isa.store(isa, std::memory_order_relaxed); }

}  // namespace jax_dsv4::cpu
