// AITER's plan builder behind a C interface without torch. Compiled by `python -m jax_dsv4.build_aiter` against an
// AITER source tree of August 2026 or later (before, its entry points were typed on torch::Tensor); nothing of AITER is
// kept here.
#include <unordered_map>  // aiter_hip_common.h uses it without including it
//
#include "metadata.cu"
#include "rocm/aiter_metadata.h"

namespace {

aiter_tensor_t tensor(const void* data, AiterDtype dtype, int device, int64_t rows, int64_t columns = 0) {
  aiter_tensor_t t{};
  t.ptr = const_cast<void*>(data);
  t.dtype_ = dtype;
  t.device_id = device;
  t.ndim = columns ? 2 : 1;
  t.shape[0] = rows, t.shape[1] = columns;
  t.strides[0] = columns ? columns : 1, t.strides[1] = 1;
  t.numel_ = static_cast<size_t>(rows * (columns ? columns : 1));
  return t;
}

}  // namespace

#define JAX_DSV4_EXPORT extern "C" __attribute__((visibility("default")))

JAX_DSV4_EXPORT int32_t dsv4_aiter_metadata_abi() { return kAiterMetadataAbi; }

JAX_DSV4_EXPORT const char* dsv4_aiter_metadata_architecture() { return JAX_DSV4_ARCHITECTURE; }

JAX_DSV4_EXPORT int dsv4_aiter_metadata(const AiterMetadata* a, void* stream, char* error, size_t error_bytes) {
  const auto ints = [&](const void* data, int64_t rows, int64_t columns = 0) {
    return tensor(data, AITER_DTYPE_i32, a->device, rows, columns);
  };
  const int64_t tokens = a->tokens;
  const aiter_tensor_t qo = ints(a->qo_indptr, tokens + 1), kv = ints(a->kv_indptr, tokens + 1),
                       last = ints(a->last_page_lens, tokens);
  aiter_tensor_t pointers = tensor(a->work_pointers, AITER_DTYPE_u64, a->device, 2);
  aiter_tensor_t info = ints(a->work_info_set, a->max_items, 8), indptr = ints(a->work_indptr, a->units + 1);
  aiter_tensor_t reduce = ints(a->reduce_indptr, tokens + 1), final_map = ints(a->reduce_final_map, tokens, 2);
  aiter_tensor_t partial_map = ints(a->reduce_partial_map, a->max_partials);
  // Its checks abort the process unless they are told that they may throw; its stream is a thread's, the legacy one by
  // default.
  const bool could_throw = aiter_detail::g_aiter_can_throw;
  const hipStream_t before = aiter::getCurrentHIPStream();
  aiter_detail::g_aiter_can_throw = true;
  aiter::setCurrentHIPStream(static_cast<hipStream_t>(stream));
  int failed = 0;
  try {
    // The header names work_info and work_indptr in the opposite order of the definition; the definition's is meant.
    get_mla_metadata_v1(qo, kv, last, a->heads, /*num_heads_k=*/1, /*is_causal=*/true, pointers, info, indptr, reduce,
                        final_map, partial_map, /*page_size=*/1, a->granularity, /*max_seqlen_qo=*/1,
                        /*uni_seqlen_qo=*/1,
                        /*fast_mode=*/true, a->topk, /*max_split_per_batch=*/-1, /*intra_batch_mode=*/false,
                        /*is_cp_round_robin=*/false, /*mla_version=*/0, AITER_DTYPE_fp8, AITER_DTYPE_fp8,
                        AITER_DTYPE_fp8, AITER_DTYPE_fp8);
  } catch (const std::exception& e) {
    failed = 1;
    if (error_bytes) std::strncpy(error, e.what(), error_bytes - 1)[error_bytes - 1] = '\0';
  }
  aiter_detail::g_aiter_can_throw = could_throw;
  aiter::setCurrentHIPStream(before);
  return failed;
}
