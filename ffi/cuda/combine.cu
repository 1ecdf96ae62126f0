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

// out = sum_i exp(lse_i - lse) out_i over a token's partials in key order, a warp per part; and the answer for tokens
// that have no item (empty: zeros, -inf) or whose plan was made for other lengths or other buffers (NaN).
// kPartialsAtOnce are in flight per warp: many hide latency where a token is cut into many, few leave room for more
// blocks where most tokens are not cut.
template <int kPartialsAtOnce>
__global__ void __launch_bounds__(32 * kCombineWarps, kPartialsAtOnce > 4 ? 2 : 3)
    combine_kernel(const __grid_constant__ DecodeParams params) {
  // The plan and the lengths were there before the decoding kernel: they are looked up while it works.
  const int token = blockIdx.x, lane = threadIdx.x % 32;
  const Plan& plan = params.plan;
  const int length = clamped_length(params.scopes[0], token) + clamped_length(params.scopes[1], token);
  const int begin = plan.reduce_indptr[token];
  const int end = length > 0 ? plan.reduce_indptr[token + 1] : begin;
  bool plan_fits = plan.kv_lengths[token] == length && begin >= 0 && end <= plan.max_partials;
  // A lane looks up one of the next 32 partials.
  auto look_up = [&](int first) { return plan.reduce_partial_map[first + min(lane, min(32, end - first) - 1)]; };
  const int first_rows = plan_fits && begin < end ? look_up(begin) : 0;
  cudaGridDependencySynchronize();
  if (plan_fits && length > 0 && begin >= end) return;  // one item wrote the output

  const int units = (params.heads + kPartHeads - 1) / kPartHeads * kParts;
  for (int unit = blockIdx.y * kCombineWarps + threadIdx.x / 32; unit < units; unit += gridDim.y * kCombineWarps) {
    const int part = unit % kParts, first_head = unit / kParts * kPartHeads;
    const int head = min(first_head + lane / 4, params.heads - 1);
    float2 o[4] = {};
    float maximum = -INFINITY, sum = 0.f;  // `sum` and `o` are relative to exp(maximum)
    for (int first = begin; plan_fits && first < end; first += 32) {
      const int count = min(32, end - first);
      const int row_of_lane = first == begin ? first_rows : look_up(first);
      plan_fits = __all_sync(~0u, row_of_lane >= 0 && row_of_lane < plan.max_partials);
      for (int i = 0; plan_fits && i < count; i += kPartialsAtOnce) {
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
          const float top = fmaxf(maximum, lse[k]), base = top == -INFINITY ? 0.f : top;
          const float shrink = expf(maximum - base), weight = expf(lse[k] - base);
          maximum = top;
          sum = fmaf(sum, shrink, weight);
          auto add = [&](float2& to, float a, float b) {
            to = {fmaf(weight, a, to.x * shrink), fmaf(weight, b, to.y * shrink)};
          };
          add(o[0], x[k][0].x, x[k][0].y);
          add(o[1], x[k][0].z, x[k][0].w);
          add(o[2], x[k][1].x, x[k][1].y);
          add(o[3], x[k][1].z, x[k][1].w);
        }
      }
    }

    const bool empty = maximum == -INFINITY && sum == 0.f;
    float lse = empty ? -INFINITY : maximum + logf(sum);
    float factor = empty ? 0.f : 1.f / (sum + (params.sink ? expf(params.sink[head] - maximum) : 0.f));
    if (!plan_fits) lse = factor = __int_as_float(0x7fc00000);
#pragma unroll
    for (int j = 0; j < 4; ++j) o[j] = {o[j].x * factor, o[j].y * factor};
    if (params.out_dtype == Dtype::kBf16) {
      store_bf16(params, token, first_head, part, lane, o);
    } else {
      store_float32(params, token, first_head, part, lane, o);
    }
    if (part == 0 && lane % 4 == 0 && first_head + lane / 4 < params.heads) {
      params.lse[static_cast<int64_t>(token) * params.heads + head] = lse;
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

cudaError_t launch_combine(const DecodeParams& params, int workers, cudaStream_t stream) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  // Enough blocks to fill the device when few tokens are split many times, not so many that leaving costs time.
  const int units = (params.heads + kPartHeads - 1) / kPartHeads * kParts;
  const int blocks_of_token = std::min(units / kCombineWarps, std::max(1, kCombineBlocks / params.tokens));
  config.gridDim = dim3(params.tokens, blocks_of_token);
  config.blockDim = dim3(32 * kCombineWarps);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  const bool many = workers >= kManyPartials * params.tokens;  // a token's partials are about workers / tokens
  return cudaLaunchKernelEx(&config, many ? combine_kernel<kManyPartials> : combine_kernel<kFewPartials>, params);
}

}  // namespace jax_dsv4::cuda
