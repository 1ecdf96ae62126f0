// The planner of common/plan.h on the device: one block. Threads turn lengths into blocks of keys, one thread scans
// them, threads write.
#include "common/plan.h"

#include <algorithm>

#include "cuda/launch.h"

namespace jax_dsv4::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kTokensAtOnce = 1024;  // that the scan finds in shared memory

__device__ int64_t sum_of_block(int64_t x) {
  __shared__ int64_t warps[kThreads / 32];
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < kThreads / 32; ++i) x += warps[i];
  return x;
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  __shared__ int32_t lengths[kTokensAtOnce], blocks[kTokensAtOnce];
  __shared__ PlanCursor places[kTokensAtOnce];  // where each token starts
  __shared__ PlanCut cuts[kTokensAtOnce];
  __shared__ int32_t total_items;

  for (int i = threadIdx.x; i < 8 * p.max_items; i += kThreads) p.work_info_set[i] = 0;
  for (int i = threadIdx.x; i < 2 * p.tokens; i += kThreads) p.reduce_final_map[i] = 0;
  for (int i = threadIdx.x; i < p.max_partials; i += kThreads) p.reduce_partial_map[i] = 0;
  int64_t cost = 0;
  for (int t = threadIdx.x; t < p.tokens; t += kThreads) cost += plan_cost(p, plan_blocks(p, plan_length(p, t)));
  const int32_t payload = plan_payload(p, sum_of_block(cost));
  const PlanCursor start{0, payload, 0, 0};

  PlanCursor cursor = start;
  auto scan = [&](int first) {
    const int count = min(kTokensAtOnce, p.tokens - first);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      lengths[i] = plan_length(p, first + i);
      blocks[i] = plan_blocks(p, lengths[i]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < count; ++i) {
        places[i] = cursor;
        cuts[i] = plan_token_place(p, payload, blocks[i], &cursor);
      }
      total_items = cursor.items;
    }
    __syncthreads();
    return count;
  };
  auto write = [&](int first, int count) {
    for (int i = threadIdx.x; i < count; i += kThreads) plan_token_write(p, first + i, lengths[i], places[i], cuts[i]);
  };

  // Workers that are never closed end with the last item, so all items are counted before the first row is written.
  // What one pass over the tokens leaves in shared memory serves for the second as well if it is all of them.
  int count = 0;
  for (int first = 0; first < p.tokens; first += kTokensAtOnce) count = scan(first);
  for (int w = threadIdx.x; w <= p.workers; w += kThreads) p.work_indptr[w] = w == 0 ? 0 : total_items;
  if (threadIdx.x == 0) p.reduce_indptr[0] = 0;
  __syncthreads();
  if (p.tokens <= kTokensAtOnce) {
    write(0, count);
    return;
  }
  cursor = start;
  for (int first = 0; first < p.tokens; first += kTokensAtOnce) {
    count = scan(first);
    write(first, count);
  }
}

}  // namespace

cudaError_t prepare_plan() {
  cudaFuncAttributes attributes;  // asking loads the kernel
  return cudaFuncGetAttributes(&attributes, plan_kernel);
}

cudaError_t launch_plan(const PlanParams& params, cudaStream_t stream) {
  plan_kernel<<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_dsv4::cuda
