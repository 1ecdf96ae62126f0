// What the kernels of kernels.hip are handed, by value: plain structs, the same for host and device compilers.
#ifndef JAX_DSV4_ROCM_PARAMS_H_
#define JAX_DSV4_ROCM_PARAMS_H_

#include <cstdint>

#include "common/params.h"
#include "common/plan.h"

namespace jax_dsv4::rocm {

// A row of the cache and of a packed query head: 512 numbers, 64 zeros. AITER's kernels compute scores over 576 numbers
// and take the first 512 as the value. The numbers are e4m3fn in layout aiter_fp8, e4m3fnuz in aiter_fp8_fnuz, bfloat16
// in aiter_bf16.
constexpr int kRowNumbers = 576;
JAX_DSV4_HD bool is_fp8(Layout layout) { return layout == Layout::kAiterFp8 || layout == Layout::kAiterFp8Fnuz; }
JAX_DSV4_HD int row_bytes(Layout layout) { return is_fp8(layout) ? kRowNumbers : 2 * kRowNumbers; }
// The kernels' padding lanes read row 0 of the pool, so block 0 is zeros and belongs to no slot: slot s is row
// s + block_size.
constexpr int kZeroBlocks = 1;
// Largest finite number of an fp8 layout.
JAX_DSV4_HD float largest_of(Layout layout) { return layout == Layout::kAiterFp8 ? 448.0f : 240.0f; }
// Workgroups that look for the largest |q|; each leaves one number.
constexpr int kAmaxBlocks = 64;
constexpr int kThreads = 256;
// Compute units of an MI350X and an MI355X, and of an MI300X and an MI325X, for programs that are made elsewhere.
constexpr int kUnitsOfGfx950 = 256;
constexpr int kUnitsOfGfx942 = 304;

// What is known of a token's keys once its slots are packed.
struct TokenState {
  int32_t valid;    // slots that name a row of the cache
  int32_t length;   // keys that the plan must cover; -1: the plan is not for this call, the answer is NaN
  int32_t covered;  // keys that its items cover
};

// One scope of one call. Heads are padded to head_passes * kernel_heads; the kernel passes over a token once for every
// kernel_heads of them: pass i of token t is its token t * head_passes + i. Rows of the partial buffers: the plan's
// own, then one per token (an unsplit item whose kernel cannot report its lse), then one that nobody reads.
struct DecodeScopeParams {
  const void* q;           // [tokens, heads, 512] of q_dtype
  const uint8_t* pool;     // [rows, row_bytes]
  const int32_t* indices;  // [tokens, topk]
  const int32_t* lengths;  // [tokens]
  Plan plan;
  void* out;   // [tokens, heads, 512] of out_dtype
  float* lse;  // [tokens, heads]
  // Workspaces, all uninitialised.
  uint8_t* q_packed;        // [tokens, head_passes * kernel_heads, row_bytes]
  int32_t* rows;            // [tokens, row_stride] rows of the pool, valid ones first
  TokenState* state;        // [tokens]
  int32_t* work_indptr;     // [head_passes * workers + 1]
  WorkInfo* work_info_set;  // [head_passes * plan.max_items]
  int32_t* qo_indptr;       // [tokens * head_passes + 1] 0, 1, 2, ...
  uint64_t* work_pointers;  // [2] where work_indptr and work_info_set are
  float* scales;            // [2] of q and of the cache; fp8
  float* amax;              // [kAmaxBlocks]; fp8
  float* partial_out;       // [max_partials + tokens + 1, head_passes * kernel_heads, 512]
  float* partial_lse;       // [max_partials + tokens + 1, head_passes * kernel_heads]
  int64_t num_slots;
  int32_t block_size;
  int32_t tokens;
  int32_t heads;
  int32_t kernel_heads;
  int32_t head_passes;
  int32_t topk;
  int32_t row_stride;  // max(topk, 1)
  int32_t workers;     // of the plan that get work
  int32_t direct;      // whether an unsplit item writes out and lse itself
  float scale;
  float cache_scale;
  Layout layout;
  Dtype q_dtype, out_dtype;
};

// What surrounds AITER's plan builder: its inputs before, what it leaves open after.
struct MetadataParams {
  PlanParams plan;          // granularity and overhead are the builder's own business
  int32_t* qo_indptr;       // [tokens + 1] 0, 1, 2, ...
  int32_t* kv_indptr;       // [tokens + 1] sums of the clamped lengths
  int32_t* last_page_lens;  // [tokens] ones
};

struct PoolAppendParams {
  const void* latents;   // [count, 512] of dtype
  const int32_t* slots;  // [count]
  uint8_t* pool;         // [rows, row_bytes]
  int64_t count;
  int64_t num_slots;
  int32_t block_size;
  float cache_scale;
  Layout layout;
  Dtype dtype;
};

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_PARAMS_H_
