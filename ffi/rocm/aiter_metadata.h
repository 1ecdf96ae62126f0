// The C interface of the library that `python -m jax_dsv4.build_aiter` makes of AITER's plan builder
// (aiter_metadata.hip).
#ifndef JAX_DSV4_ROCM_AITER_METADATA_H_
#define JAX_DSV4_ROCM_AITER_METADATA_H_

#include <cstddef>
#include <cstdint>

extern "C" {

// Changes with the struct below.
constexpr int32_t kAiterMetadataAbi = 2;

struct AiterMetadata {
  const int32_t* qo_indptr;       // [tokens + 1] 0, 1, 2, ...
  const int32_t* kv_indptr;       // [tokens + 1] sums of the lengths
  const int32_t* last_page_lens;  // [tokens] not read at page size 1
  uint64_t* work_pointers;        // [2]
  int32_t* work_indptr;           // [units + 1]
  int32_t* work_info_set;         // [max_items, 8]
  int32_t* reduce_indptr;         // [tokens + 1]
  int32_t* reduce_final_map;      // [tokens, 2]
  int32_t* reduce_partial_map;    // [max_partials]
  int32_t tokens, heads, topk, granularity, units, max_items, max_partials;
  int32_t device;
};

int32_t dsv4_aiter_metadata_abi();
// What its device code was compiled for, such as "gfx950".
const char* dsv4_aiter_metadata_architecture();
// Enqueues get_mla_metadata_v1 on a hipStream_t. 0, or 1 with what went wrong in `error`.
int dsv4_aiter_metadata(const AiterMetadata* arguments, void* stream, char* error, size_t error_bytes);

}  // extern "C"

#endif  // JAX_DSV4_ROCM_AITER_METADATA_H_
