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

// NaN is passed over.
float largest(const float* tile, int numbers) {
  float amax = 0;
  for (int d = 0; d < numbers; ++d) {
    const float magnitude = __builtin_fabsf(tile[d]);
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

bool has_nan(const float* tile, int numbers) {
  bool nan = false;
  for (int d = 0; d < numbers; ++d) nan |= tile[d] != tile[d];
  return nan;
}

// Returns the scale.
uint8_t write_e4m3(const float* tile, int numbers, uint8_t* data) {
  const uint8_t scale = ue8m0_scale_of(largest(tile, numbers));
  // 2^-k as a product: 2^-127 is subnormal, and XLA's threads take subnormal numbers for zero.
  const bool infinite = scale == 254;
  const float inverse = ue8m0_to_float(static_cast<uint8_t>(infinite ? 1 : 254 - scale)), rest = infinite ? 0.5f : 1;
  for (int d = 0; d < numbers; ++d) data[d] = float_to_e4m3(tile[d] * inverse * rest);
  return scale;
}

void write_bf16(const float* numbers, int count, uint8_t* data) {
  for (int d = 0; d < count; ++d) {
    const uint16_t bits = float_to_bf16(numbers[d]);
    std::memcpy(data + 2 * d, &bits, 2);
  }
}

void write_fp8_ds_mla(const float* row, uint8_t* data, uint8_t* scales) {
  for (int t = 0; t < kScaleTiles; ++t) {
    scales[t] = write_e4m3(row + t * kScaleTile, kScaleTile, data + t * kScaleTile);
  }
  scales[kScaleTiles] = 0;
  write_bf16(row + kNopeDim, kRopeDim, data + kNopeDim);
}

void write_mxfp8(const float* row, uint8_t* data, uint8_t* scales) {
  for (int t = 0; t < kMxfp8ScaleBytes; ++t) {
    const float* tile = row + t * kMxfp8Tile;
    uint8_t* codes = data + t * kMxfp8Tile;
    scales[t] = write_e4m3(tile, kMxfp8Tile, codes);
    if (!has_nan(tile, kMxfp8Tile) && scales[t] != 254) continue;
    scales[t] = 0xff;
    std::memset(codes, 0x7f, kMxfp8Tile);
  }
}

void write_nvfp4(const float* row, uint8_t* data, uint8_t* scales) {
  for (int t = 0; t < kNvfp4ScaleBytes; ++t) {
    const float* tile = row + t * kNvfp4Tile;
    uint8_t* codes = data + t * kNvfp4Tile / 2;
    const bool nan = has_nan(tile, kNvfp4Tile);
    scales[t] = nan ? 0x7f : e4m3_scale_of(largest(tile, kNvfp4Tile));
    const float scale = e4m3_to_float(scales[t]);
    for (int d = 0; d < kNvfp4Tile; d += 2) {
      const int low = nan ? 0 : float_to_e2m1(tile[d], scale), high = nan ? 0 : float_to_e2m1(tile[d + 1], scale);
      codes[d / 2] = static_cast<uint8_t>(low | high << 4);
    }
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
    uint8_t *data = base + cache.row_at(offset), *scales = base + cache.scales_at(offset);
    switch (cache.layout) {
      case Layout::kFp8DsMla:
        write_fp8_ds_mla(row, data, scales);
        break;
      case Layout::kMxfp8:
        write_mxfp8(row, data, scales);
        break;
      case Layout::kNvfp4:
        write_nvfp4(row, data, scales);
        break;
      case Layout::kBf16:
        write_bf16(row, kLatentDim, data);
        break;
      case Layout::kFloat32:
        std::memcpy(data, row, sizeof row);
        break;
      default:
        break;
    }
  }
}

}  // namespace jax_dsv4::cpu
