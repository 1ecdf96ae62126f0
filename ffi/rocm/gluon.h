// AITER's Gluon kernel pa_decode_sparse, as `python -m jax_dsv4.build_aiter` compiles it: which variants there are, and
// how they are called.
#ifndef JAX_DSV4_ROCM_GLUON_H_
#define JAX_DSV4_ROCM_GLUON_H_

#include <cstdint>
#include <string>
#include <vector>

#include "rocm/code_object.h"
#include "rocm/gluon_params.h"

namespace jax_dsv4::rocm {

// The kernel addresses what it writes, and caches unless compiled otherwise, in 31 bits.
constexpr int64_t kGluonBytes = INT64_C(0x7fffffff);

struct GluonKernel : KernelFile {
  int lds_bytes = 0;  // local memory that a launch must ask for
};

// Where the variants are. Set once, when the library is loaded.
void set_gluon_directory(const std::string& path);

// The name of the variant for a call: all that is compiled in. jax_dsv4/_gluon.py makes the same.
std::string gluon_variant(const GluonDecodeParams& p, float scale);

// A variant that was compiled. Null, with the reason, if it was not.
const GluonKernel* find_gluon_kernel(const std::string& variant, std::string* reason);

// Heads are computed 16 at a time.
inline int gluon_head_blocks(int heads) { return (heads + 15) / 16; }

// The arguments of a launch whose first token is `first`.
std::vector<uint8_t> pack_arguments(const GluonDecodeParams& p, int32_t first);

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_GLUON_H_
