// The planner of common/plan.h on the device: one block. Where all tokens are whole and alike, where each one goes is
// known; else the scan over tokens, which decides where each is cut, is run in pieces: threads find the room that each
// piece of the tokens leaves for every room that it may begin with; a piece's beginning then follows from a few
// look-ups, and each of its parts' from one more. All parts are scanned again at the same time, for the room before
// each token.
#include "common/plan.h"

#include "cuda/launch.h"

namespace jax_dsv4::cuda {
namespace {

constexpr int kMaxPieces = 16;  // finding where the last one begins takes as many dependent look-ups
constexpr int kMinPiece = 8;    // tokens: shorter ones cost more to chain than to scan
constexpr int kPieceParts = 4;  // of a piece
constexpr int kPadding = kMaxPieces * kPieceParts;  // parts, of equal length, may reach past the tokens so far

// Over this lane's and all lanes below.
__device__ PlanSums sums_of_warp(PlanSums x) {
#pragma unroll 1
  for (int step = 1; step < 32; step *= 2) {
    const PlanSums below{__shfl_up_sync(~0u, x.load, step), __shfl_up_sync(~0u, x.items, step),
                         __shfl_up_sync(~0u, x.partials, step)};
    if (threadIdx.x % 32 >= step) x = plan_add(x, below);
  }
  return x;
}

// Over all threads below; moves `all` past all threads.
template <int kWarps>
__device__ __forceinline__ PlanSums sums_before(PlanSums mine, PlanSums (&of_warps)[kWarps], PlanSums* all) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const PlanSums sums = sums_of_warp(mine);
  if (lane == 31) of_warps[warp] = sums;
  __syncthreads();
  PlanSums at = *all;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) at = *all;
    *all = plan_add(*all, of_warps[i]);
  }
  return {at.load + sums.load - mine.load, at.items + sums.items - mine.items,
          at.partials + sums.partials - mine.partials};
}

__device__ PlanTotals totals_of_warp(PlanTotals x) {
  return {__reduce_add_sync(~0u, x.cost), __reduce_max_sync(~0u, x.largest), __reduce_add_sync(~0u, x.tokens)};
}

// The room before each of so many tokens, and after the last, whose steps are there, from the room before the first.
template <int kThreads>
__device__ __forceinline__ void scan_rooms(PlanShare share, int32_t num_rooms, int32_t first_room, int count,
                                           const PlanStep* steps, int32_t (*ends)[kThreads], int32_t* rooms) {
  const int thread = threadIdx.x;
  // n / num_rooms for n <= kThreads, where num_rooms <= kThreads, is n * reciprocal >> 20.
  const int reciprocal = ((1 << 20) + num_rooms - 1) / num_rooms;
  int pieces = min(min(kMaxPieces, count / kMinPiece), num_rooms <= kThreads ? kThreads * reciprocal >> 20 : 0);
  int parts = kPieceParts;
  if (pieces < 2) pieces = parts = 1;
  const int scanners = pieces * parts, size = (count + scanners - 1) / scanners;  // a part's
  if (pieces > 1) {
    const int piece = thread * reciprocal >> 20;
    if (piece < pieces) {
      const PlanStep* step = steps + piece * kPieceParts * size;
      int32_t r = thread - piece * num_rooms;
#pragma unroll 1
      for (int part = 0; part < kPieceParts; ++part, step += size) {
#pragma unroll 4
        for (int i = 0; i < size; ++i) r = plan_room_after(step[i], share, r);
        ends[part][thread] = r;
      }
    }
    __syncthreads();
  }
  if (thread < scanners) {
    const int piece = thread / kPieceParts, part = thread % kPieceParts;
    int32_t r = first_room;
#pragma unroll 1
    for (int i = 0; i < piece; ++i) r = ends[kPieceParts - 1][i * num_rooms + r];
    if (part > 0) r = ends[part - 1][piece * num_rooms + r];
    const int begin = thread * size, end = begin + size;
#pragma unroll 4
    for (int i = begin; i < end; ++i) {
      rooms[i] = r;
      r = plan_room_after(steps[i], share, r);
    }
    if (thread == scanners - 1) rooms[end] = r;
  }
}

// What lies past the plan, which ends with so many items and partials and with worker `end.load`.
template <int kThreads>
__device__ __forceinline__ void write_rest(const PlanParams& p, PlanSums end) {
  const int thread = threadIdx.x;
  // Rows past those in use are zeros; workers that no token came to end where the last one does.
#pragma unroll 1
  for (int i = end.items * 2 + thread; i < 2 * p.max_items; i += kThreads) {
    reinterpret_cast<int4*>(p.work_info_set)[i] = {};
  }
#pragma unroll 1
  for (int i = end.partials + thread; i < p.max_partials; i += kThreads) p.reduce_partial_map[i] = 0;
#pragma unroll 1
  for (int w = end.load + 1 + thread; w <= p.workers; w += kThreads) p.work_indptr[w] = end.items;
  if (thread == 0) p.reduce_indptr[0] = 0;
}

template <int kThreads>
struct PlanShared {
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32 && (kThreads & (kThreads - 1)) == 0);
  PlanTotals warp_totals[kWarps];
  int32_t warp_tokens[kWarps];
  PlanSums warp_sums[kWarps];
  PlanStep steps[kThreads + kPadding];
  int32_t ends[kPieceParts][kThreads];  // [part][piece, room at the piece's begin] the room at the part's end
  int32_t rooms[kThreads + kPadding + 1];
  int32_t lengths[kThreads];
  PlanCursor places[kThreads];
  PlanCut cuts[kThreads];
};

// A thread's token of those at hand.
struct PlanLength {
  int32_t keys, blocks;
};

template <int kThreads>
__device__ __forceinline__ PlanLength length_at(const PlanParams& p, int first) {
  const int token = first + threadIdx.x;
  const int32_t keys = token < p.tokens ? plan_length(p, token) : 0;
  return {keys, plan_blocks(p, keys)};
}

// The sums over all tokens, backwards, so that the first tokens are at hand in the end. They fit 32 bits:
// common/bind.h sees to that.
template <int kThreads>
__device__ __forceinline__ PlanTotals sums_of_all(const PlanParams& p, PlanShared<kThreads>& shared,
                                                  PlanLength* length) {
  constexpr int kWarps = kThreads / 32;
  const int thread = threadIdx.x, lane = thread % 32;
  PlanTotals totals{};
#pragma unroll 1
  for (int first = (p.tokens - 1) / kThreads * kThreads; first >= 0; first -= kThreads) {
    *length = length_at<kThreads>(p, first);
    totals = plan_add(totals, plan_totals(plan_cost(p, length->blocks)));
  }
  totals = totals_of_warp(totals);
  if (lane == 0) shared.warp_totals[thread / 32] = totals;
  if (thread < kPadding) shared.steps[kThreads + thread] = {};
  __syncthreads();
  return totals_of_warp(lane < kWarps ? shared.warp_totals[lane] : PlanTotals{});
}

// The room before this thread's token where all are whole and of one cost, from its rank among those not empty.
template <int kThreads>
__device__ __forceinline__ int32_t room_by_rank(PlanShared<kThreads>& shared, int32_t payload, int32_t cost,
                                                int32_t blocks, int32_t* tokens_before) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t some = __ballot_sync(~0u, blocks > 0);
  if (lane == 0) shared.warp_tokens[warp] = __popc(some);
  __syncthreads();
  int32_t rank = *tokens_before + __popc(some & ((1u << lane) - 1));
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) rank += shared.warp_tokens[i];
    *tokens_before += shared.warp_tokens[i];
  }
  const int32_t of_worker = static_cast<uint32_t>(rank) % static_cast<uint32_t>(payload / cost);
  return of_worker == 0 ? 0 : payload - of_worker * cost;
}

// The items of the tokens at hand, by as many threads to a token as there are.
template <int kThreads>
__device__ __forceinline__ void write_items(const PlanParams& p, const PlanShared<kThreads>& shared, int first,
                                            int count) {
  const int thread = threadIdx.x;
  const int group_log2 = __clz(count - 1) + __ffs(kThreads) - 33, token = thread >> group_log2;
  if (token >= count) return;
#pragma unroll 1
  for (int i = thread & ((1 << group_log2) - 1); i < shared.cuts[token].items; i += 1 << group_log2) {
    plan_item(p, first + token, shared.lengths[token], shared.places[token], shared.cuts[token], i);
  }
}

// Code that runs once costs what fetching it costs: no loop is unrolled that rarely runs twice, and few numbers are
// divided.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  __shared__ PlanShared<kThreads> shared;
  const int thread = threadIdx.x;
  PlanLength length{};
  const PlanTotals totals = sums_of_all(p, shared, &length);
  const PlanShare share = plan_share(p, totals);
  const int32_t num_rooms = plan_rooms(p, share);
  // Whole tokens of one cost: as many to every worker, and nothing to scan.
  const bool alike = !share.cuts && totals.tokens > 0 && totals.cost == totals.tokens * totals.largest;

  PlanSums before{kPlanStart.worker, 0, 0};
  int32_t first_room = kPlanStart.room, tokens_before = 0;  // that are not empty
#pragma unroll 1
  for (int first = 0; first < p.tokens; first += kThreads) {
    const int count = min(kThreads, p.tokens - first);
    if (first > 0) {
      __syncthreads();  // what the items before are written from is no longer needed
      length = length_at<kThreads>(p, first);
    }
    shared.lengths[thread] = length.keys;
    int32_t room;
    if (alike) {
      room = room_by_rank(shared, share.payload, totals.largest, length.blocks, &tokens_before);
    } else {
      shared.steps[thread] = plan_step(p, share, length.blocks);
      __syncthreads();
      scan_rooms<kThreads>(share, num_rooms, first_room, count, shared.steps, shared.ends, shared.rooms);
      __syncthreads();
      room = thread < count ? shared.rooms[thread] : 0;
    }
    const PlanCut cut = plan_cut(share, length.blocks, room);
    const PlanSums mine{plan_fresh(cut), cut.items, cut.items > 1 ? cut.items : 0};
    const PlanSums at = sums_before(mine, shared.warp_sums, &before);
    const PlanCursor place{at.load, 0, at.items, at.partials};
    shared.places[thread] = place;
    shared.cuts[thread] = cut;
    if (thread < count) plan_token(p, first + thread, length.keys, place, cut);
    first_room = alike ? 0 : shared.rooms[count];
    __syncthreads();
    write_items(p, shared, first, count);
  }
  write_rest<kThreads>(p, before);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) segments_kernel(const __grid_constant__ PlanParams p) {
  __shared__ PlanSums of_warps[kThreads / 32];
  __shared__ int32_t costs[kThreads / 32];
  const int thread = threadIdx.x;
  int32_t cost = 0;
  for (int token = thread; token < p.tokens; token += kThreads) {
    cost += plan_sums(p, plan_blocks(p, plan_length(p, token))).load;
  }
  cost = __reduce_add_sync(~0u, cost);
  if (thread % 32 == 0) costs[thread / 32] = cost;
  __syncthreads();
  cost = __reduce_add_sync(~0u, thread % 32 < kThreads / 32 ? costs[thread % 32] : 0);
  const int32_t payload = max(1, plan_ceil_div(cost, p.active_workers));
  PlanSums all{};
#pragma unroll 1
  for (int first = 0; first < p.tokens; first += kThreads) {
    const int token = first + thread;
    const int32_t length = token < p.tokens ? plan_length(p, token) : 0;
    const PlanSums own = plan_sums(p, plan_blocks(p, length));
    const PlanSums before = sums_before(own, of_warps, &all);
    if (token < p.tokens) plan_token_row(p, token, length, before.partials, own.items);
#pragma unroll 1
    for (int i = 0; i < own.items; ++i) plan_segment(p, payload, token, length, before, own, i);
    __syncthreads();
  }
  if (thread == 0) p.work_indptr[0] = 0;
  write_rest<kThreads>(p, {cost / payload, all.items, all.partials});
}

constexpr int kFewThreads = 256, kManyThreads = 512;
constexpr int kFewTokens = 128;

}  // namespace

cudaError_t prepare_plan() {
  for (auto kernel : {plan_kernel<kFewThreads>, plan_kernel<kManyThreads>, segments_kernel<kManyThreads>}) {
    cudaFuncAttributes attributes;  // asking loads the kernel
    const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t launch_plan(const PlanParams& params, cudaStream_t stream) {
  if (params.segment > 0) {
    segments_kernel<kManyThreads><<<1, kManyThreads, 0, stream>>>(params);
  } else if (params.tokens <= kFewTokens) {
    plan_kernel<kFewThreads><<<1, kFewThreads, 0, stream>>>(params);
  } else {
    plan_kernel<kManyThreads><<<1, kManyThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace jax_dsv4::cuda
