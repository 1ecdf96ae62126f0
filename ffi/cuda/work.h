// Which keys of which tokens a block attends to: the plan's work items, in the order in which every role walks them.
#ifndef JAX_DSV4_CUDA_WORK_H_
#define JAX_DSV4_CUDA_WORK_H_

#include <cstdint>

#include "common/params.h"

namespace jax_dsv4::cuda {

__device__ __forceinline__ int clamped_length(const Scope& scope, int token) {
  return scope.topk > 0 ? max(0, min(scope.lengths[token], scope.topk)) : 0;
}

// A work item with its keys counted from the token's first, or none.
struct Item {
  int token, partial, begin, end, swa_length;
};

// The items of this block's worker, in order, without those that make no sense: a plan made for other lengths, or for
// another call, must not lead anywhere outside the buffers.
class Work {
 public:
  __device__ explicit Work(const DecodeParams& params) : params_(params) {
    const Plan& plan = params.plan;
    // The last block takes the workers for which there is none: a plan for this device has given them nothing.
    const int end = blockIdx.y + 1 < gridDim.y ? blockIdx.y + 1 : plan.workers;
    next_ = max(0, plan.work_indptr[blockIdx.y]);
    end_ = min(plan.max_items, plan.work_indptr[end]);
  }

  __device__ bool next(Item* item) {
    while (next_ < end_) {
      const int4* row = reinterpret_cast<const int4*>(params_.plan.work_info_set) + 2 * next_++;
      const int4 head = row[0],
                 tail = row[1];  // {batch_idx, partial_qo_loc, qo_start, qo_end}, {kv_start, kv_end, ...}
      const int token = head.x;
      if (token < 0 || token >= params_.tokens || head.y < -1 || head.y >= params_.plan.max_partials) continue;
      const int swa = clamped_length(params_.scopes[0], token), extra = clamped_length(params_.scopes[1], token);
      if (params_.plan.kv_lengths[token] != swa + extra) continue;
      const int64_t first = static_cast<int64_t>(token) * (params_.scopes[0].topk + params_.scopes[1].topk);
      const int64_t begin = tail.x - first, end = tail.y - first;
      if (begin < 0 || begin >= end || end > swa + extra) continue;
      *item = {token, head.y, static_cast<int>(begin), static_cast<int>(end), swa};
      return true;
    }
    return false;
  }

 private:
  const DecodeParams& params_;
  int next_, end_;
};

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_WORK_H_
