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
  Layout layout{};             // of the caches that it reads
  int heads = 0;               // query heads that one work item computes at most
  bool any_heads = false;      // computes fewer as well
  int fewest = 0, most = 0;    // heads of a call that it is taken for
  int tile = 0;                // keys that it works on at a time: the granularity that plans should have
  bool reports_lse = false;    // writes the lse of an unsplit row, rightly
  bool wraps_at_4gib = false;  // computes 32-bit offsets into the pool
  int kernarg_bytes = 0;
};

// Where AITER's code objects are: the directory that holds gfx950/mla. Set once, when the library is loaded.
void set_aiter_directory(const std::string& hsa);

// The kernel for a call with this many heads on a pool of this layout and size, for an architecture. Null, with the
// reason, if there is none. The same answer for the life of the process.
const AiterKernel* choose_kernel(const std::string& architecture, Layout layout, int heads, int64_t pool_bytes,
                                 std::string* reason);

// Of a call's heads, how many a kernel computes at a time.
inline int heads_at_a_time(const AiterKernel& kernel, int heads) {
  return kernel.any_heads && heads < kernel.heads ? heads : kernel.heads;
}

// The arguments as the kernel wants them, kernel.kernarg_bytes of them.
std::vector<uint8_t> pack_arguments(const AiterKernel& kernel, const DecodeScopeParams& p);

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_AITER_H_
