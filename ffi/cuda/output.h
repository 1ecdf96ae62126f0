// Outputs and partial outputs, from registers in the order of wgmma's accumulators.
#ifndef JAX_DSV4_CUDA_OUTPUT_H_
#define JAX_DSV4_CUDA_OUTPUT_H_

#include <cstdint>

#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/sm90.h"

namespace jax_dsv4::cuda {

using namespace sm90;

// A part: 8 heads by 32 dimensions as one warp holds them in wgmma's accumulators: of head l / 4, lane l has columns
// 8 j + 2 * (l % 4) and the next in x[j], j = 0..3.
constexpr int kPartHeads = kPartialHeads;
constexpr int kPartDims = 32;
constexpr int kParts = kLatentDim / kPartDims;

__device__ __forceinline__ int64_t out_offset(const DecodeParams& params, int token, int head, int part) {
  return (static_cast<int64_t>(token) * params.heads + head) * kLatentDim + part * kPartDims;
}

__device__ __forceinline__ void store_float32(const DecodeParams& params, int token, int first_head, int part, int lane,
                                              const float2 (&x)[4]) {
  const int head = first_head + lane / 4;
  if (head >= params.heads) return;
  float2* out =
      reinterpret_cast<float2*>(static_cast<float*>(params.out) + out_offset(params, token, head, part)) + lane % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) out[4 * j] = x[j];
}

// The four lanes of a head transpose their pairs, so that each stores 16 bytes rather than 4 bytes in 4 places: stores
// cost by the lines they touch.
__device__ __forceinline__ void store_bf16(const DecodeParams& params, int token, int first_head, int part, int lane,
                                           const float2 (&x)[4]) {
  uint32_t w[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) w[j] = pack_bf16x2(x[j].x, x[j].y);
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {  // transposes blocks of one word, then of two by two
    const bool upper = lane & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? w[j] : w[j + step], step);
      w[j] = upper ? other : w[j];
      w[j + step] = upper ? w[j + step] : other;
    }
  }
  const int head = first_head + lane / 4;
  if (head >= params.heads) return;
  uint16_t* out = static_cast<uint16_t*>(params.out) + out_offset(params, token, head, part);
  *reinterpret_cast<uint4*>(out + 8 * (lane % 4)) = {w[0], w[1], w[2], w[3]};
}

// Partial outputs lie in the order in which warps hold them, so that a warp writes and reads them in one piece:
// [row][heads / 8][part][2][lane][4]. -> this lane's x[0], x[1]; x[2], x[3] follow 32 further on.
__device__ __forceinline__ float4* partial_part(const DecodeParams& params, int row, int first_head, int part,
                                                int lane) {
  const int64_t heads = (params.heads + kPartHeads - 1) / kPartHeads * kPartHeads;
  return reinterpret_cast<float4*>(params.partial_out + (row * heads + first_head) * kLatentDim +
                                   part * (kPartHeads * kPartDims)) +
         lane;
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_OUTPUT_H_
