// AITER's persistent MLA decode kernels: which ones are installed, what they can do, and how they are called.
#ifndef JAX_DSV4_ROCM_AITER_H_
#define JAX_DSV4_ROCM_AITER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "rocm/code_object.h"
#include "rocm/params.h"

namespace jax_dsv4::rocm {

// A kernel that was found. What its file does not say is from executing it (docs/amd.md).
struct AiterKernel : KernelFile {
  int heads = 0;               // query heads that one work item computes
  int tile = 0;                // keys that it works on at a time: the granularity that plans should have
  bool reports_lse = false;    // writes the lse of an unsplit row
  bool wraps_at_4gib = false;  // computes 32-bit offsets into the pool
  int kernarg_bytes = 0;
};

// Where AITER's code objects are: the directory that holds gfx950/mla. Set once, when the library is loaded.
void set_aiter_directory(const std::string& hsa);

// The kernel for a call with this many heads on a pool of this size, for an architecture. Null, with the reason, if
// there is none. The same answer for the life of the process.
const AiterKernel* choose_kernel(const std::string& architecture, int heads, int64_t pool_bytes, std::string* reason);

// How many times a kernel runs over a token to cover its heads.
inline int head_passes(const AiterKernel& kernel, int heads) { return (heads + kernel.heads - 1) / kernel.heads; }

// The arguments as the kernel wants them, kernel.kernarg_bytes of them.
std::vector<uint8_t> pack_arguments(const AiterKernel& kernel, const DecodeScopeParams& p);

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_AITER_H_
