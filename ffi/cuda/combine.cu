// Partial outputs to outputs, by a kernel that follows the decoding one.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/combine.h"
#include "cuda/output.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {
namespace {

constexpr int kCombineWarps = 8;
constexpr int kCombineBlocks = 4 * kMostProcessors;  // about what runs at once
constexpr int kFewPartials = 4, kManyPartials = 8;
// So many partials of a part are shared among the warps of a block, where there are blocks for all parts.
constexpr int kSharedPartials = 16;

// What has been added up of some partials: a lane's numbers of a part, relative to exp(maximum).
struct Sums {
  float maximum, total;
  float2 o[4];

  __device__ __forceinline__ void clear() {
    maximum = -INFINITY;
    total = 0.f;
#pragma unroll
    for (int j = 0; j < 4; ++j) o[j] = {0.f, 0.f};
  }

  __device__ __forceinline__ void add(float other_maximum, float other_total, const float2 (&x)[4]) {
    const float top = fmaxf(maximum, other_maximum), base = top == -INFINITY ? 0.f : top;
    const float shrink = expf(maximum - base), weight = expf(other_maximum - base);
    maximum = top;
    total = fmaf(total, shrink, other_total * weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      o[j] = {fmaf(weight, x[j].x, o[j].x * shrink), fmaf(weight, x[j].y, o[j].y * shrink)};
    }
  }
};

// A token that is answered here: cut into partials begin <= i < end, or without any item (empty: zeros, -inf), or of a
// plan for other lengths or other buffers (NaN).
struct Token {
  int number, begin, end;
  bool plan_fits;
};

// A lane looks up one of a range's first 32 rows.
__device__ __forceinline__ int look_up(const Plan& plan, int begin, int end) {
  const int lane = threadIdx.x % 32;
  return begin < end ? plan.reduce_partial_map[min(begin + lane, end - 1)] : 0;
}

// In key order. NaN where there is no such row. kPartialsAtOnce are in flight: many hide latency where a token is cut
// into many, few leave room for more blocks where most tokens are not cut.
template <int kPartialsAtOnce>
__device__ __forceinline__ void add_partials(const DecodeParams& params, int begin, int end, int first_rows,
                                             int first_head, int part, Sums& sums) {
  const int lane = threadIdx.x % 32, head = min(first_head + lane / 4, params.heads - 1);
  bool fits = true;
  for (int first = begin; fits && first < end; first += 32) {
    const int count = min(32, end - first);
    const int row_of_lane = first == begin ? first_rows : look_up(params.plan, first, end);
    fits = __all_sync(~0u, row_of_lane >= 0 && row_of_lane < params.plan.max_partials);
    for (int i = 0; fits && i < count; i += kPartialsAtOnce) {
      float lse[kPartialsAtOnce];
      float4 x[kPartialsAtOnce][2];
#pragma unroll
      for (int k = 0; k < kPartialsAtOnce; ++k) {
        const int row = __shfl_sync(~0u, row_of_lane, i + k);
        lse[k] = -INFINITY;
        x[k][0] = x[k][1] = {};
        if (i + k < count) {
          lse[k] = params.partial_lse[static_cast<int64_t>(row) * params.heads + head];
          const float4* in = partial_part(params, row, first_head, part, lane);
          x[k][0] = in[0];
          x[k][1] = in[32];
        }
      }
#pragma unroll
      for (int k = 0; k < kPartialsAtOnce; ++k) {
        const float4 &a = x[k][0], &b = x[k][1];
        sums.add(lse[k], 1.f, {{a.x, a.y}, {a.z, a.w}, {b.x, b.y}, {b.z, b.w}});
      }
    }
  }
  if (!fits) sums.total = __int_as_float(0x7fc00000);
}

__device__ __forceinline__ void store_sums(const DecodeParams& params, int token, int first_head, int part,
                                           Sums& sums) {
  const int lane = threadIdx.x % 32, head = min(first_head + lane / 4, params.heads - 1);
  const bool empty = sums.maximum == -INFINITY && sums.total == 0.f;
  const float lse = empty ? -INFINITY : sums.maximum + logf(sums.total);
  const float sink = params.sink ? expf(params.sink[head] - sums.maximum) : 0.f;
  const float factor = empty ? 0.f : 1.f / (sums.total + sink);
#pragma unroll
  for (int j = 0; j < 4; ++j) sums.o[j] = {sums.o[j].x * factor, sums.o[j].y * factor};
  if (params.out_dtype == Dtype::kBf16) {
    store_bf16(params, token, first_head, part, lane, sums.o);
  } else {
    store_float32(params, token, first_head, part, lane, sums.o);
  }
  if (part == 0 && lane % 4 == 0 && first_head + lane / 4 < params.heads) {
    params.lse[static_cast<int64_t>(token) * params.heads + head] = lse;
  }
}

// Adds up what the warps of a block have of one part, in order, for the first of them.
__device__ __forceinline__ void add_warps(Sums& sums) {
  __shared__ Sums of_warps[kCombineWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  of_warps[warp][lane] = sums;
  __syncthreads();
  if (warp == 0) {
#pragma unroll 1
    for (int w = 1; w < kCombineWarps; ++w) {
      const Sums& other = of_warps[w][lane];
      sums.add(other.maximum, other.total, other.o);
    }
  }
  __syncthreads();
}

// By a block: this block's parts of a token, out = sum_i exp(lse_i - lse) out_i. Each warp has a part, or (`together`)
// all have a stretch of one part's partials.
template <int kPartialsAtOnce>
__device__ __forceinline__ void combine_token(const DecodeParams& params, const Token& token, int begin, int end,
                                              int first_rows, bool together) {
  const int warp = threadIdx.x / 32;
  const int units = (params.heads + kPartHeads - 1) / kPartHeads * kParts, each = together ? 1 : kCombineWarps;
  for (int unit = blockIdx.y * each + (together ? 0 : warp); unit < units; unit += gridDim.y * each) {
    const int part = unit % kParts, first_head = unit / kParts * kPartHeads;
    Sums sums;
    sums.clear();
    if (token.plan_fits) {
      add_partials<kPartialsAtOnce>(params, begin, end, first_rows, first_head, part, sums);
    } else {
      sums.total = __int_as_float(0x7fc00000);
    }
    if constexpr (kPartialsAtOnce == kManyPartials) {
      if (together) add_warps(sums);
    }
    if (!together || warp == 0) store_sums(params, token.number, first_head, part, sums);
  }
}

// Each block looks through a stretch of so many tokens for those that are answered here.
template <int kPartialsAtOnce>
__global__ void __launch_bounds__(32 * kCombineWarps, kPartialsAtOnce > 4 ? 2 : 3)
    combine_kernel(const __grid_constant__ DecodeArgs args, int stretch) {
  const DecodeParams& params = args.params;
  const Plan& plan = params.plan;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_token = blockIdx.x * stretch, end_token = min(first_token + stretch, params.tokens);
#pragma unroll 1
  for (int base = first_token; base < end_token; base += 32) {
    Token mine = {min(base + lane, end_token - 1), 0, 0, true};
    const int length = clamped_length(params.scopes[0], mine.number) + clamped_length(params.scopes[1], mine.number);
    mine.begin = plan.reduce_indptr[mine.number];
    mine.end = length > 0 ? plan.reduce_indptr[mine.number + 1] : mine.begin;
    mine.plan_fits = plan.kv_lengths[mine.number] == length && mine.begin >= 0 && mine.end <= plan.max_partials;
    const bool stored = mine.plan_fits && length > 0 && mine.begin >= mine.end;  // one item wrote the output
    uint32_t found = __ballot_sync(~0u, base + lane < end_token && !stored);
    bool first = base == first_token;
#pragma unroll 1
    while (found != 0 || first) {
      const int from = found ? __ffs(found) - 1 : 0;
      const Token token = {base + from, __shfl_sync(~0u, mine.begin, from), __shfl_sync(~0u, mine.end, from),
                           __shfl_sync(~0u, static_cast<int>(mine.plan_fits), from) != 0};
      const int count = token.end - token.begin, each = (count + kCombineWarps - 1) / kCombineWarps;
      const bool room = kPartialsAtOnce == kManyPartials && 2 * gridDim.y >= params.heads / kPartHeads * kParts;
      const bool together = room && token.plan_fits && count >= kSharedPartials;
      const int begin = together ? min(token.begin + warp * each, token.end) : token.begin;
      const int end = together ? min(begin + each, token.end) : token.end;
      const int first_rows = found && token.plan_fits ? look_up(plan, begin, end) : 0;
      if (first) {
        // The plan and the lengths were there before the decoding kernel: they are looked up while it works.
        cudaGridDependencySynchronize();
        if (args.open && clusters_chosen(args)) return;
        first = false;
      }
      if (found) combine_token<kPartialsAtOnce>(params, token, begin, end, first_rows, together);
      found &= found - 1;
    }
  }
}

}  // namespace

cudaError_t prepare_combine() {
  // The same split of L1 and shared memory for all kernels: changing it takes time. Setting it loads the kernel as
  // well.
  for (auto combine : {combine_kernel<kFewPartials>, combine_kernel<kManyPartials>}) {
    const cudaError_t status =
        cudaFuncSetAttribute(combine, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaLaunchAttribute overlapping() {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  return overlap;
}

cudaError_t launch_combine(const DecodeArgs& args, int workers, cudaStream_t stream) {
  const DecodeParams& params = args.params;
  cudaLaunchAttribute overlap = overlapping();
  cudaLaunchConfig_t config = {};
  const int units = (params.heads + kPartHeads - 1) / kPartHeads * kParts;
  const bool many = workers >= kManyPartials * params.tokens;  // a token's partials are about workers / tokens
  // Enough blocks to fill the device when few tokens are split many times, not so many that leaving costs time.
  const int stretch = (params.tokens + kCombineBlocks - 1) / kCombineBlocks;
  const int stretches = (params.tokens + stretch - 1) / stretch;
  const int blocks = std::min(many ? units : units / kCombineWarps, std::max(1, kCombineBlocks / stretches));
  config.gridDim = dim3(stretches, blocks);
  config.blockDim = dim3(32 * kCombineWarps);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, many ? combine_kernel<kManyPartials> : combine_kernel<kFewPartials>, args,
                            stretch);
}

}  // namespace jax_dsv4::cuda
