// The planner of common/plan.h on the device: one block. The scan over tokens, which decides where each token is cut,
// is run in pieces: threads find the room that each piece of the tokens leaves for every room that it may begin with,
// and a piece's beginning then follows from a few look-ups.
#include "common/plan.h"

#include "cuda/launch.h"

namespace jax_dsv4::cuda {
namespace {

constexpr int kMaxPieces = 16;  // finding where the last one begins takes as many dependent look-ups
constexpr int kMinPiece = 8;    // tokens: shorter ones cost more to chain than to scan

// Exclusive sums over the block's threads of a worker, an item and a partial count, and their totals.
struct Counts {
  int32_t worker, items, partials;
};

__device__ Counts add(Counts a, Counts b) { return {a.worker + b.worker, a.items + b.items, a.partials + b.partials}; }

__device__ Counts shuffle_up(Counts x, int distance) {
  return {__shfl_up_sync(~0u, x.worker, distance), __shfl_up_sync(~0u, x.items, distance),
          __shfl_up_sync(~0u, x.partials, distance)};
}

__device__ Counts shuffle(Counts x, int lane) {
  return {__shfl_sync(~0u, x.worker, lane), __shfl_sync(~0u, x.items, lane), __shfl_sync(~0u, x.partials, lane)};
}

__device__ Counts sums_of_warp(Counts x) {
  for (int step = 1; step < 32; step *= 2) {
    const Counts below = shuffle_up(x, step);
    if (threadIdx.x % 32 >= step) x = add(x, below);
  }
  return x;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32 && kMaxPieces <= 32);
  __shared__ int32_t warp_costs[kWarps];
  __shared__ Counts warp_counts[kWarps];
  __shared__ PlanStep steps[kThreads];
  __shared__ int32_t ends[kThreads];  // [piece][room] the room that a piece leaves
  __shared__ int32_t rooms[kThreads + 1];
  __shared__ int32_t lengths[kThreads], blocks[kThreads];
  __shared__ PlanCursor places[kThreads];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  // The sum of all costs fits 32 bits: common/bind.h sees to that.
  int32_t cost = 0, length = 0;
  for (int token = thread; token < p.tokens; token += kThreads) {
    const int32_t n = plan_length(p, token);
    if (token == thread) length = n;
    cost += plan_cost(p, plan_blocks(p, n));
  }
  cost = __reduce_add_sync(~0u, cost);
  if (lane == 0) warp_costs[warp] = cost;
  __syncthreads();
  cost = __reduce_add_sync(~0u, lane < kWarps ? warp_costs[lane] : 0);
  const int32_t payload = plan_payload(p, cost), num_rooms = plan_rooms(p, payload);

  PlanCursor start = kPlanStart;
  for (int first = 0; first < p.tokens; first += kThreads) {
    const int count = min(kThreads, p.tokens - first);
    if (first > 0) {
      __syncthreads();  // what the items before are written from is no longer needed
      if (thread < count) length = plan_length(p, first + thread);
    }
    lengths[thread] = length;
    blocks[thread] = thread < count ? plan_blocks(p, length) : 0;
    steps[thread] = plan_step(p, payload, blocks[thread]);
    __syncthreads();

    // All pieces but the last are tried from every room.
    const int pieces = max(1, min(min(kMaxPieces, 1 + kThreads / num_rooms), (count + kMinPiece - 1) / kMinPiece));
    const int piece = (count + pieces - 1) / pieces;
    if (thread < (pieces - 1) * num_rooms) {
      const PlanStep* step = steps + thread / num_rooms * piece;
      int32_t room = thread % num_rooms;
#pragma unroll 4
      for (int i = 0; i < piece; ++i) room = plan_room_after(step[i], payload, room);
      ends[thread] = room;
    }
    __syncthreads();
    if (thread < pieces) {
      int32_t room = start.room;
      for (int i = 0; i < thread; ++i) room = ends[i * num_rooms + room];
      const int begin = min(count, thread * piece), end = min(count, begin + piece);
#pragma unroll 4
      for (int i = begin; i < end; ++i) {
        rooms[i] = room;
        room = plan_room_after(steps[i], payload, room);
      }
      if (thread == pieces - 1) rooms[count] = room;
    }
    __syncthreads();

    const PlanCut cut = plan_cut(payload, blocks[thread], thread < count ? rooms[thread] : 0);
    const Counts mine{cut.fresh, cut.items, cut.items > 1 ? cut.items : 0}, sums = sums_of_warp(mine);
    if (lane == 31) warp_counts[warp] = sums;
    __syncthreads();
    const Counts warps = sums_of_warp(lane < kWarps ? warp_counts[lane] : Counts{});
    const Counts before = shuffle(warps, max(0, warp - 1)), all = shuffle(warps, 31);
    const Counts at = add(warp > 0 ? before : Counts{}, sums);
    places[thread] = {start.worker + at.worker - mine.worker, rooms[min(thread, count)],
                      start.items + at.items - mine.items, start.partials + at.partials - mine.partials};
    if (thread < count) plan_token(p, first + thread, length, places[thread], cut);
    start = {start.worker + all.worker, rooms[count], start.items + all.items, start.partials + all.partials};
    __syncthreads();

    // As many threads to a token as there are.
    const int group = kThreads / count, token = thread / group;
    if (token < count) {
      const PlanCut cut = plan_cut(payload, blocks[token], places[token].room);
      for (int i = thread % group; i < cut.items; i += group) {
        plan_item(p, first + token, lengths[token], places[token], cut, i);
      }
    }
  }

  // Rows past those in use are zeros; workers that no token came to end where the last one does.
  for (int i = start.items * 2 + thread; i < 2 * p.max_items; i += kThreads) {
    reinterpret_cast<int4*>(p.work_info_set)[i] = {};
  }
  for (int i = start.partials + thread; i < p.max_partials; i += kThreads) p.reduce_partial_map[i] = 0;
  for (int w = start.worker + 1 + thread; w <= p.workers; w += kThreads) p.work_indptr[w] = start.items;
  if (thread == 0) p.reduce_indptr[0] = 0;
}

constexpr int kFewThreads = 512, kManyThreads = 1024;

}  // namespace

cudaError_t prepare_plan() {
  cudaFuncAttributes attributes;  // asking loads the kernel
  const cudaError_t status = cudaFuncGetAttributes(&attributes, plan_kernel<kFewThreads>);
  return status == cudaSuccess ? cudaFuncGetAttributes(&attributes, plan_kernel<kManyThreads>) : status;
}

cudaError_t launch_plan(const PlanParams& params, cudaStream_t stream) {
  if (params.tokens <= kFewThreads) {
    plan_kernel<kFewThreads><<<1, kFewThreads, 0, stream>>>(params);
  } else {
    plan_kernel<kManyThreads><<<1, kManyThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace jax_dsv4::cuda
