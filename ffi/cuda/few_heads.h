// Few heads to a block: shared memory, products, output. Heads are the columns of the products rather than the rows, of
// which wgmma has no fewer than 64:
//
//   S^T[64 keys, heads] = K . Q^T,   O^T[512, heads] += V^T . P^T,   A being the very same tile of K both times
//
// So a tile costs what reading it costs, and one warpgroup attends to it all the way: the softmax runs over its rows.
#ifndef JAX_DSV4_CUDA_FEW_HEADS_H_
#define JAX_DSV4_CUDA_FEW_HEADS_H_

#include <cstdint>

#include "cuda/output.h"
#include "cuda/producer.h"
#include "cuda/shared.h"
#include "cuda/softmax.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {

// For up to kHeads heads, 8, 16 or 32; of a token with more, block x has those from x * kHeads on.
template <int kHeads>
struct __align__(1024) FewHeadsShared {
  static constexpr int kTiles = 2;
  static constexpr int kProducers = 2;          // warpgroups, one to each group of a tile
  static constexpr int kPiecesAhead = kPieces;  // copies that a producing lane has on their way
  static constexpr int kPiecesAtOnce = 3;
  static constexpr int kAttending = 2;  // warpgroups
  // Products that add to the same registers wait for each other.
  static constexpr int kScoreSums = kHeads <= 16 ? 2 : 1;

  // Planes of 64 dimensions: [rows][64] bf16, swizzled, as wgmma reads them.
  uint8_t q[kPlanes][kHeads * kRowBytes];
  // Also, at an item's end, where a warpgroup puts its O^T.
  uint8_t k[kTiles][kPlanes][kPlaneBytes];
  uint8_t p[kAttending][kHeads * kRowBytes];  // [heads][64 keys]
  // Packed bytes on their way, a ring of pieces per producing warp; a lane reads only what it copied.
  uint4 packed[kProducers * kWarps][kPiecesAhead][32];
  uint2 scales[kProducers * kWarps][4][kKeysPerWarp];
  uint32_t valid[kTiles][kKeyTile / kKeysPerWarp];  // see is_valid()
  float tops[kAttending][kWarps][kHeads];           // the largest scores of a tile, per warp of keys
  float sums[kAttending][kWarps][kHeads];           // of P over an item
  float bases[kAttending][kHeads];                  // that P and O^T are relative to
  float sink[kHeads];                               // see load_sink()
  uint64_t full[kTiles][kGroups], free[kTiles][kGroups];
  uint64_t together;  // all attending threads
};

// Where O[head, dim] lies. Four heads of equal parity, or four neighbours, fall into different banks.
__device__ __forceinline__ int output_word(int head, int dim) {
  return head * kLatentDim + (dim ^ 8 * ((head / 2 ^ head * 2) & 3));
}

// Over the lanes that hold the same columns.
__device__ __forceinline__ float column_max(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// By all attending threads: asks for Q of a token, rows past the number of heads being zeros.
template <int kHeads>
__device__ __forceinline__ void copy_q(const DecodeParams& params, FewHeadsShared<kHeads>& shared, int token) {
  constexpr int kThreads = FewHeadsShared<kHeads>::kAttending * kWarpgroup;
  constexpr int kUnits = 2 * kLatentDim / 16;  // per row
  const int thread = threadIdx.x % kThreads;   // in any order
  const int block_head = blockIdx.x * kHeads;
  const uint8_t* q = static_cast<const uint8_t*>(params.q) +
                     (static_cast<int64_t>(token) * params.heads + block_head) * (2 * kLatentDim);
#pragma unroll 4
  for (int i = thread; i < kHeads * kUnits; i += kThreads) {
    const int head = i / kUnits, unit = i % kUnits;
    const bool real = block_head + head < params.heads;
    copy_async<16>(&shared.q[unit / 8][head * kRowBytes + 16 * (unit % 8 ^ head % 8)], real ? q + 16 * i : q,
                   real ? 16 : 0);
  }
}

// S^T[k, h] = sum_d K[k, d] Q[h, d] as kSums sums, each of every kSums-th step.
template <int kHeads, int kSums>
__device__ __forceinline__ void multiply_scores(const FewHeadsShared<kHeads>& shared, int buffer,
                                                float (&s)[kSums][kHeads / 2]) {
  const uint64_t q = matrix_descriptor(smem_address(shared.q), 0, 8 * kRowBytes);
  const uint64_t k = matrix_descriptor(smem_address(shared.k[buffer]), 0, 8 * kRowBytes);
  wgmma_fence();
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma_m64k16<0>(s[step % kSums], advanced(k, plane * kPlaneBytes + step * 32),
                      advanced(q, plane * (kHeads * kRowBytes) + step * 32), plane > 0 || step >= kSums);
    }
  }
  wgmma_commit();
}

// O^T[d, h] += sum_k V[k, d] P[h, k]
template <int kHeads>
__device__ __forceinline__ void accumulate_values(const FewHeadsShared<kHeads>& shared, int attending, int buffer,
                                                  float (&o)[kPlanes][kHeads / 2]) {
  const uint64_t p = matrix_descriptor(smem_address(shared.p[attending]), 0, 8 * kRowBytes);
  const uint64_t v = matrix_descriptor(smem_address(shared.k[buffer]), kPlaneBytes, 8 * kRowBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kKeyTile / 16; ++step) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      wgmma_m64k16<1>(o[plane], advanced(v, plane * kPlaneBytes + step * (16 * kRowBytes)), advanced(p, step * 32),
                      true);
    }
  }
  wgmma_commit();
}

// A warpgroup's O^T to where its last tile was, turned over on the way.
template <int kValues>
__device__ __forceinline__ void put_output(const float (&o)[kPlanes][kValues], float* to) {
  const int warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* const column = to + output_word(2 * (lane % 4) + c, 16 * warp + 8 * r + lane / 4);
#pragma unroll
      for (int j = 0; j < kValues / 4; ++j) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          column[8 * j * kLatentDim + 64 * plane] = o[plane][4 * j + 2 * r + c];
        }
      }
    }
  }
}

// Adds up the warpgroups' O^T of an item of so many tiles, normalises and stores: a warp has 8 heads of some parts.
template <int kHeads>
__device__ __forceinline__ void store_item(const DecodeParams& params, const FewHeadsShared<kHeads>& shared,
                                           const Item& item, int warp, int first_tile, int tiles) {
  using Memory = FewHeadsShared<kHeads>;
  constexpr int kAttending = Memory::kAttending, kHeadGroups = kHeads / kPartHeads;
  const int lane = threadIdx.x % 32;
  const int group_head = warp % kHeadGroups * kPartHeads, first_part = warp / kHeadGroups;  // of the block's heads
  const int first_head = blockIdx.x * kHeads + group_head;
  if (first_head >= params.heads) return;
  const int block_head = group_head + lane / 4, head = first_head + lane / 4;

  // Warpgroup i has the item's tiles i, i + kAttending, ...
  float maximum = -INFINITY, total = 0.f, factor[kAttending];
  const float* from[kAttending];
#pragma unroll
  for (int i = 0; i < kAttending; ++i) {
    const int last = i + (tiles - 1 - i) / kAttending * kAttending;
    from[i] = reinterpret_cast<const float*>(shared.k[(first_tile + last) % Memory::kTiles]);
    factor[i] = i < tiles ? shared.bases[i][block_head] : -INFINITY;
    maximum = fmaxf(maximum, factor[i]);
  }
#pragma unroll
  for (int i = 0; i < kAttending; ++i) {
    factor[i] = exp2_approx(factor[i] - (maximum == -INFINITY ? 0.f : maximum));
    if (i >= tiles) continue;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total = fmaf(shared.sums[i][w][block_head], factor[i], total);
  }
  const bool stores = first_part == 0 && lane % 4 == 0 && head < params.heads;
  const float all = finish_head(params, item, head, shared.sink[block_head], maximum, total, stores);
#pragma unroll
  for (int i = 0; i < kAttending; ++i) factor[i] *= all;

  // Without a valid key P = 0, and V has no NaN from keys nobody attends to: the sums are zeros.
  auto for_each_part = [&](auto store) {
#pragma unroll 2
    for (int part = first_part; part < kParts; part += kAttending * kWarps / kHeadGroups) {
      float2 x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int word = output_word(block_head, part * kPartDims + 8 * j + 2 * (lane % 4));
        const float2 y = *reinterpret_cast<const float2*>(from[0] + word);
        x[j] = {y.x * factor[0], y.y * factor[0]};
#pragma unroll
        for (int i = 1; i < kAttending; ++i) {
          if (i >= tiles) continue;
          const float2 z = *reinterpret_cast<const float2*>(from[i] + word);
          x[j] = {fmaf(z.x, factor[i], x[j].x), fmaf(z.y, factor[i], x[j].y)};
        }
      }
      store(part, x);
    }
  };
  if (item.partial >= 0) {
    for_each_part([&](int part, const float2(&x)[4]) {
      float4* partial = partial_part(params, item.partial, first_head, part, lane);
      partial[0] = {x[0].x, x[0].y, x[1].x, x[1].y};
      partial[32] = {x[2].x, x[2].y, x[3].x, x[3].y};
    });
  } else if (params.out_dtype == Dtype::kBf16) {
    for_each_part([&](int part, const float2(&x)[4]) { store_bf16(params, item.token, first_head, part, lane, x); });
  } else {
    for_each_part([&](int part, const float2(&x)[4]) { store_float32(params, item.token, first_head, part, lane, x); });
  }
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_FEW_HEADS_H_
