// Quantise and scatter: a warp per row, two numbers of every 64 to a lane. The bytes are those of ffi/cpu/append.cc.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/fp8.h"
#include "cuda/launch.h"
#include "cuda/sm90.h"

namespace jax_dsv4::cuda {

using namespace sm90;

namespace {

constexpr int kRows = 8;  // of a block, a warp for each
constexpr int kTiles = kLatentDim / 64;

// Which of a block's rows have a later row that goes to the same slot: of equal slots the last row wins, whatever the
// order in which blocks run. Every lane of the block compares one of its rows with a share of all later rows, four to
// a load.
__device__ uint32_t superseded(const AppendParams& p, int64_t first_row) {
  __shared__ uint32_t rows;
  constexpr int kShares = 32;  // kRows warps, 32 / kRows in each
  const int lane = threadIdx.x % 32, row = lane % kRows, share = threadIdx.x / kRows;
  if (threadIdx.x == 0) rows = 0;
  __syncthreads();
  const int32_t slot = first_row + row < p.count ? p.slots[first_row + row] : -1;
  bool found = (__match_any_sync(~0u, slot) & ((1u << kRows) - 1)) >> row > 1;
  const int64_t fours = p.count / 4 * 4;
#pragma unroll 4
  for (int64_t at = first_row + kRows + 4 * share; at < fours; at += 4 * kShares) {
    const int4 others = *reinterpret_cast<const int4*>(p.slots + at);
    found |= (others.x == slot) | (others.y == slot) | (others.z == slot) | (others.w == slot);
  }
  for (int64_t at = max(first_row + kRows, fours); at < p.count; ++at) found |= p.slots[at] == slot;
  if (found) atomicOr(&rows, 1u << row);
  __syncthreads();
  return rows;
}

__device__ float2 load_pair(const AppendParams& p, int64_t row, int dim) {
  if (p.dtype == Dtype::kFloat32) {
    return *reinterpret_cast<const float2*>(static_cast<const float*>(p.latents) + row * kLatentDim + dim);
  }
  return __bfloat1622float2(
      *reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(p.latents) + row * kLatentDim + dim));
}

constexpr uint32_t kInfinity = 0x7f800000;  // as bits, by which magnitudes are ordered, and NaN comes after

// The bits of the largest magnitude of neighbouring lanes, so many.
template <int kLanes>
__device__ uint32_t largest(uint32_t a, uint32_t b) {
  uint32_t most = max(a, b);
  if constexpr (kLanes == 32) {
    return __reduce_max_sync(~0u, most);
  } else {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
    return most;
  }
}

// A block need not be aligned to more than a byte.
__device__ void store16(uint8_t* at, uint16_t bits) {
  if (reinterpret_cast<uint64_t>(at) % 2 == 0) {
    *reinterpret_cast<uint16_t*>(at) = bits;
  } else {
    at[0] = bits & 0xff;
    at[1] = bits >> 8;
  }
}

// Of e4m3, with the inverse of a scale 2^k: exactly, subnormal included.
__device__ uint16_t scaled_e4m3x2(float2 x, uint8_t scale) {
  const float inverse = ue8m0_to_float(static_cast<uint8_t>(254 - scale));
  return to_e4m3x2(x.x * inverse, x.y * inverse);
}

__device__ void write_fp8_ds_mla(const float2 (&x)[kTiles], int lane, uint8_t* data, uint8_t* scales) {
  uint8_t scale_of_lane = 0;  // the eighth is padding
#pragma unroll
  for (int tile = 0; tile < kScaleTiles; ++tile) {
    const uint32_t a = float_to_bits(fabsf(x[tile].x)), b = float_to_bits(fabsf(x[tile].y));
    // NaN is passed over: it stays one below.
    const uint8_t scale = ue8m0_scale_of(bits_to_float(largest<32>(a > kInfinity ? 0 : a, b > kInfinity ? 0 : b)));
    store16(data + tile * kScaleTile + 2 * lane, scaled_e4m3x2(x[tile], scale));
    if (lane == tile) scale_of_lane = scale;
  }
  if (lane < kPackedScaleBytes) scales[lane] = scale_of_lane;
  store16(data + kNopeDim + 4 * lane, float_to_bf16(x[kScaleTiles].x));
  store16(data + kNopeDim + 4 * lane + 2, float_to_bf16(x[kScaleTiles].y));
}

__device__ void write_mxfp8(const float2 (&x)[kTiles], int lane, uint8_t* data, uint8_t* scales) {
  constexpr int kLanes = kMxfp8Tile / 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint32_t amax = largest<kLanes>(float_to_bits(fabsf(x[tile].x)), float_to_bits(fabsf(x[tile].y)));
    const bool finite = amax < kInfinity;
    const uint8_t scale = finite ? ue8m0_scale_of(bits_to_float(amax)) : 0xff;
    store16(data + 64 * tile + 2 * lane, finite ? scaled_e4m3x2(x[tile], scale) : 0x7f7f);
    if (lane % kLanes == 0) scales[32 / kLanes * tile + lane / kLanes] = scale;
  }
}

__device__ void write_nvfp4(const float2 (&x)[kTiles], int lane, uint8_t* data, uint8_t* scales) {
  constexpr int kLanes = kNvfp4Tile / 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint32_t amax = largest<kLanes>(float_to_bits(fabsf(x[tile].x)), float_to_bits(fabsf(x[tile].y)));
    const bool nan = amax > kInfinity;
    const uint8_t code = nan ? 0x7f : e4m3_scale_of(bits_to_float(amax));
    const float scale = e4m3_to_float(code);
    const int low = float_to_e2m1(x[tile].x, scale), high = float_to_e2m1(x[tile].y, scale);
    data[32 * tile + lane] = nan ? 0 : static_cast<uint8_t>(low | high << 4);
    if (lane % kLanes == 0) scales[32 / kLanes * tile + lane / kLanes] = code;
  }
}

__device__ void write_bf16(const float2 (&x)[kTiles], int lane, uint8_t* data) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    reinterpret_cast<uint32_t*>(data)[32 * tile + lane] = float_to_bf16(x[tile].x) | uint32_t{float_to_bf16(x[tile].y)}
                                                                                         << 16;
  }
}

__global__ void __launch_bounds__(32 * kRows) append_kernel(const __grid_constant__ AppendParams p) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows, row = first_row + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float2 x[kTiles] = {};  // on their way while slots are compared
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (row < p.count) x[tile] = load_pair(p, row, tile * kScaleTile + 2 * lane);
  }
  const bool lost = superseded(p, first_row) >> (threadIdx.x / 32) & 1;
  if (lost || row >= p.count) return;
  const int32_t slot = p.slots[row];
  const Cache& cache = p.cache;
  if (slot < 0 || slot / cache.block_size >= cache.num_blocks) return;
  const int64_t offset = slot % cache.block_size;
  uint8_t* block = p.data_out + slot / cache.block_size * cache.block_stride_bytes;
  uint8_t *const data = block + cache.row_at(offset), *const scales = block + cache.scales_at(offset);
  switch (cache.layout) {
    case Layout::kFp8DsMla:
      return write_fp8_ds_mla(x, lane, data, scales);
    case Layout::kMxfp8:
      return write_mxfp8(x, lane, data, scales);
    case Layout::kNvfp4:
      return write_nvfp4(x, lane, data, scales);
    default:
      return write_bf16(x, lane, data);
  }
}

}  // namespace

cudaError_t prepare_append() {
  cudaFuncAttributes attributes;  // asking loads the kernel
  return cudaFuncGetAttributes(&attributes, append_kernel);
}

cudaError_t launch_append(const AppendParams& params, cudaStream_t stream) {
  if (params.count == 0) return cudaSuccess;
  if (params.cache.layout == Layout::kFloat32) return cudaErrorNotSupported;
  append_kernel<<<static_cast<unsigned>((params.count + kRows - 1) / kRows), 32 * kRows, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_dsv4::cuda
