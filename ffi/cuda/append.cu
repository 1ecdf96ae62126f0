// Quantise and scatter: a warp per row, two numbers of every 64 to a lane. The bytes are those of ffi/cpu/append.cc.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/fp8.h"
#include "cuda/launch.h"

namespace jax_dsv4::cuda {
namespace {

constexpr int kWarps = 4;

// Whether a later row goes to the same slot: of equal slots the last row wins, whatever the order in which warps run.
__device__ bool superseded(const AppendParams& p, int64_t row, int32_t slot, int lane) {
  for (int64_t first = row + 1; first < p.count; first += 32) {
    const int64_t other = first + lane;
    if (__any_sync(~0u, other < p.count && p.slots[other] == slot)) return true;
  }
  return false;
}

__device__ float2 load_pair(const AppendParams& p, int64_t row, int dim) {
  if (p.dtype == Dtype::kFloat32) {
    return *reinterpret_cast<const float2*>(static_cast<const float*>(p.latents) + row * kLatentDim + dim);
  }
  return __bfloat1622float2(
      *reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(p.latents) + row * kLatentDim + dim));
}

__global__ void __launch_bounds__(32 * kWarps) append_kernel(const __grid_constant__ AppendParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= p.count) return;
  const int32_t slot = p.slots[row];
  const Cache& cache = p.cache;
  if (slot < 0 || slot / cache.block_size >= cache.num_blocks || superseded(p, row, slot, lane)) return;
  const int64_t offset = slot % cache.block_size;
  uint8_t* block = p.data_out + slot / cache.block_size * cache.block_stride_bytes;
  // A block need not be aligned to more than a byte.
  auto store16 = [](uint8_t* at, uint16_t bits) {
    at[0] = bits & 0xff;
    at[1] = bits >> 8;
  };

  uint8_t* data = block + offset * kPackedRowBytes;
  uint8_t* scales = block + static_cast<int64_t>(cache.block_size) * kPackedRowBytes + offset * kPackedScaleBytes;
  for (int tile = 0; tile < kScaleTiles; ++tile) {
    const float2 x = load_pair(p, row, tile * kScaleTile + 2 * lane);
    float amax = fmaxf(fabsf(x.x), fabsf(x.y));  // passes NaN over; it stays one below
    for (int i = 16; i > 0; i /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, i));
    const uint8_t scale = ue8m0_scale_of(isnan(amax) ? 0.f : amax);
    const float inverse = ue8m0_to_float(static_cast<uint8_t>(254 - scale));  // 2^-k exactly, subnormal included
    data[tile * kScaleTile + 2 * lane] = float_to_e4m3(x.x * inverse);
    data[tile * kScaleTile + 2 * lane + 1] = float_to_e4m3(x.y * inverse);
    if (lane == 0) scales[tile] = scale;
  }
  if (lane == 0) scales[kScaleTiles] = 0;
  const float2 x = load_pair(p, row, kNopeDim + 2 * lane);
  store16(data + kNopeDim + 4 * lane, float_to_bf16(x.x));
  store16(data + kNopeDim + 4 * lane + 2, float_to_bf16(x.y));
}

}  // namespace

cudaError_t prepare_append() {
  cudaFuncAttributes attributes;  // asking loads the kernel
  return cudaFuncGetAttributes(&attributes, append_kernel);
}

cudaError_t launch_append(const AppendParams& params, cudaStream_t stream) {
  if (params.count == 0) return cudaSuccess;
  if (params.cache.layout != Layout::kFp8DsMla) return cudaErrorNotSupported;
  append_kernel<<<static_cast<unsigned>((params.count + kWarps - 1) / kWarps), 32 * kWarps, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_dsv4::cuda
