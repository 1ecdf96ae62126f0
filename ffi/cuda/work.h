// Which keys of which tokens a block attends to: the plan's work items, in the order in which every role walks them, or
// its share of a token that a cluster of blocks has.
#ifndef JAX_DSV4_CUDA_WORK_H_
#define JAX_DSV4_CUDA_WORK_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/sm90.h"

namespace jax_dsv4::cuda {

using namespace sm90;

// n / d for 0 <= n < 2^31 as (n + high word of n * multiplier) >> shift.
struct Divisor {
  uint32_t multiplier, shift;
  explicit Divisor(uint32_t d) : multiplier(0), shift(0) {
    while (uint64_t{1} << shift < d) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  __device__ uint32_t divide(uint32_t n) const { return (n + __umulhi(n, multiplier)) >> shift; }
};

// Microseconds that a call takes with clusters and with a plan: where both could run, the lengths decide which does.
struct Times {
  float cluster_start, cluster_tile;  // the latter for each further tile of the block that has most
  float planned_start, planned_tile;  // the latter for each tile that there is
  int cluster_blocks;
};

JAX_DSV4_HD bool prefers_clusters(const Times& times, int tiles, int longest) {
  const int most = max_int(1, (longest + times.cluster_blocks - 1) / times.cluster_blocks);
  return times.cluster_start + times.cluster_tile * (most - 1) <= times.planned_start + times.planned_tile * tiles;
}

// What a decoding kernel is launched with.
struct DecodeArgs {
  DecodeParams params;
  Divisor block_size[2];
  Divisor cluster_blocks;
  Times times;
  bool open;  // kernels of both kinds are launched, and those that the lengths do not choose leave at once
};

// By whole warps.
__device__ __forceinline__ bool clusters_chosen(const DecodeArgs& args) {
  const DecodeParams& params = args.params;
  const int topk = params.scopes[0].topk + params.scopes[1].topk;
  int sum = 0, longest = 0;
#pragma unroll 1
  for (int token = threadIdx.x % 32; token < params.tokens; token += 32) {
    const int tiles = (clamp_length(params.plan.kv_lengths[token], topk) + kKeyTile - 1) / kKeyTile;
    sum += tiles;
    longest = max(longest, tiles);
  }
  return prefers_clusters(args.times, __reduce_add_sync(~0u, sum), __reduce_max_sync(~0u, longest));
}

// Whether this kernel, of one kind or the other, has nothing to do. The one that follows the plan may begin while the
// clusters are still there: one thread waits for these, so that whoever waits for it has waited for both.
__device__ __forceinline__ bool leaves(const DecodeArgs& args, bool cluster) {
  if (!args.open) return false;
  cudaTriggerProgrammaticLaunchCompletion();
  if (!cluster && blockIdx.x == 0 && blockIdx.y == 0) cudaGridDependencySynchronize();
  return clusters_chosen(args) != cluster;
}

// A work item: keys begin <= k < end of the token's, of which the first swa_length are the first scope's.
struct Item {
  int token, partial, begin, end, swa_length;
};

// The plan's items of this block's worker, in order, without those that make no sense: a plan made for other lengths,
// or for another call, must not lead anywhere outside the buffers.
class PlannedWork {
 public:
  static constexpr bool kCluster = false;

  __device__ explicit PlannedWork(const DecodeArgs& args) : params_(args.params) {
    const Plan& plan = params_.plan;
    // The last block takes the workers for which there is none: a plan for this device has given them nothing.
    const int end = blockIdx.y + 1 < gridDim.y ? blockIdx.y + 1 : plan.workers;
    next_ = max(0, plan.work_indptr[blockIdx.y]);
    end_ = min(plan.max_items, plan.work_indptr[end]);
  }

  // What the first item mostly is: the worker's number, and full lengths. Known before either is.
  __device__ Item guess() const {
    const int topk = params_.scopes[0].topk;
    if (static_cast<int>(blockIdx.y) >= params_.plan.max_items) return {};
    const int4* row = reinterpret_cast<const int4*>(params_.plan.work_info_set) + 2 * blockIdx.y;
    const int token = row[0].x;
    const int64_t first = static_cast<int64_t>(token) * (topk + params_.scopes[1].topk);
    const int64_t begin = row[1].x - first, end = row[1].y - first;
    const bool in_bounds = token >= 0 && token < params_.tokens && begin >= 0 && begin < end;
    if (!in_bounds || end > topk + params_.scopes[1].topk) return {};
    return {token, -1, static_cast<int>(begin), static_cast<int>(end), topk};
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

constexpr int kMostClusterBlocks = 16;

// One item: this block's even share of the keys of a token that a cluster has, block z of the grid. Maybe none.
class ClusterWork {
 public:
  static constexpr bool kCluster = true;

  __device__ explicit ClusterWork(const DecodeArgs& args) : args_(args) {}

  __device__ bool next(Item* item) {
    if (done_) return false;
    done_ = true;
    const int token = blockIdx.z;
    const int swa = clamped_length(args_.params.scopes[0], token),
              extra = clamped_length(args_.params.scopes[1], token);
    plan_fits_ = args_.params.plan.kv_lengths[token] == swa + extra;
    *item = share(swa, extra);
    return true;
  }

  // What the item is if the token has as many keys as fit: known before its lengths are.
  __device__ Item guess() const { return share(args_.params.scopes[0].topk, args_.params.scopes[1].topk); }
  // Whether the plan, which is not followed, is of these lengths.
  __device__ bool plan_fits() const { return plan_fits_; }

 private:
  __device__ Item share(int swa, int extra) const {
    const int keys = swa + extra, blocks = cluster_size(), rank = cluster_rank();
    const int each = args_.cluster_blocks.divide(keys), more = keys - each * blocks;
    const int begin = rank * each + min(rank, more);
    return {static_cast<int>(blockIdx.z), -1, begin, begin + each + (rank < more), swa};
  }

  const DecodeArgs& args_;
  bool done_ = false, plan_fits_ = false;
};

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_WORK_H_
