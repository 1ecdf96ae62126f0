// Quantise and scatter.
#include <cstring>

#include "common/fp8.h"
#include "cpu/launch.h"

namespace jax_dsv4::cpu {
namespace {

void load_latent(const AppendParams& p, int64_t i, float* row) {
  if (p.dtype == Dtype::kFloat32) {
    std::memcpy(row, static_cast<const float*>(p.latents) + i * kLatentDim, sizeof(float) * kLatentDim);
    return;
  }
  const uint16_t* src = static_cast<const uint16_t*>(p.latents) + i * kLatentDim;
  for (int d = 0; d < kLatentDim; ++d) row[d] = bf16_to_float(src[d]);
}

void write_packed(const float* row, uint8_t* data, uint8_t* scales) {
  for (int t = 0; t < kScaleTiles; ++t) {
    const float* tile = row + t * kScaleTile;
    float amax = 0;
    for (int d = 0; d < kScaleTile; ++d) {
      const float magnitude = __builtin_fabsf(tile[d]);
      amax = magnitude > amax ? magnitude : amax;  // NaN is passed over here and stays one below
    }
    const uint8_t scale = ue8m0_scale_of(amax);
    // 2^-k as a product: 2^-127 is subnormal, and XLA's threads take subnormal numbers for zero.
    const bool infinite = scale == 254;
    const float inverse = ue8m0_to_float(static_cast<uint8_t>(infinite ? 1 : 254 - scale)), rest = infinite ? 0.5f : 1;
    for (int d = 0; d < kScaleTile; ++d) data[t * kScaleTile + d] = float_to_e4m3(tile[d] * inverse * rest);
    scales[t] = scale;
  }
  scales[kScaleTiles] = 0;
  for (int d = 0; d < kRopeDim; ++d) {
    const uint16_t bits = float_to_bf16(row[kNopeDim + d]);
    std::memcpy(data + kNopeDim + 2 * d, &bits, 2);
  }
}

}  // namespace

void append(const AppendParams& p, int32_t shard, int32_t shards) {
  const Cache& cache = p.cache;
  alignas(64) float row[kLatentDim];
  for (int64_t i = 0; i < p.count; ++i) {
    const int32_t slot = p.slots[i];
    if (slot < 0 || slot % shards != shard) continue;
    const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
    if (block >= cache.num_blocks) continue;
    uint8_t* base = p.data_out + block * cache.block_stride_bytes;
    load_latent(p, i, row);
    switch (cache.layout) {
      case Layout::kFp8DsMla:
        write_packed(row, base + offset * kPackedRowBytes,
                     base + static_cast<int64_t>(cache.block_size) * kPackedRowBytes + offset * kPackedScaleBytes);
        break;
      case Layout::kBf16:
        for (int d = 0; d < kLatentDim; ++d) {
          const uint16_t bits = float_to_bf16(row[d]);
          std::memcpy(base + (offset * kLatentDim + d) * 2, &bits, 2);
        }
        break;
      case Layout::kFloat32:
        std::memcpy(base + offset * kLatentDim * 4, row, sizeof row);
        break;
      default:
        break;
    }
  }
}

}  // namespace jax_dsv4::cpu
