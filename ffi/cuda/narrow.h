// Few heads to a block: the attending role, its shared memory and geometry. Heads are the columns of the products
// rather than the rows, of which wgmma has no fewer than 64:
//
//   S^T[64 keys, heads] = K . Q^T,   O^T[512, heads] += V^T . P^T,   A being the very same tile of K both times
//
// So a tile costs what reading it costs, and one warpgroup attends to it all the way: the softmax runs over its rows.
// Warpgroups take an item's tiles in turn, each with a running maximum, sum and O^T of its own, and add up at its end.
#ifndef JAX_DSV4_CUDA_NARROW_H_
#define JAX_DSV4_CUDA_NARROW_H_

#include <cstdint>

#include "cuda/output.h"
#include "cuda/producer.h"
#include "cuda/shared.h"
#include "cuda/softmax.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {

// For up to kHeads heads, 8, 16 or 32; of a token with more, block x has those from x * kHeads on.
template <int kHeads>
struct __align__(1024) NarrowShared {
  static constexpr int kTiles = 2;
  static constexpr int kProducers = 2;          // warpgroups, one to each group of a tile
  static constexpr int kPiecesAhead = kPieces;  // copies that a producing lane has on their way
  static constexpr int kPiecesAtOnce = 3;
  static constexpr int kAttending = 2;  // warpgroups
  // Products that add to the same registers wait for each other.
  static constexpr int kScoreSums = kHeads <= 16 ? 2 : 1;
  static_assert(kAttending <= kTiles, "an item's last tiles are all held until its end");

  // Planes of 64 dimensions: [rows][64] bf16, swizzled, as wgmma reads them.
  uint8_t q[kPlanes][kHeads * kRowBytes];
  // Also, at an item's end, where a warpgroup puts its O^T: float32, [heads][dimensions], see output_word().
  uint8_t k[kTiles][kPlanes][kPlaneBytes];
  uint8_t p[kAttending][kHeads * kRowBytes];  // [heads][64 keys]
  // Packed bytes on their way, a ring of pieces per producing warp; a lane reads only what it copied.
  uint4 packed[kProducers * kWarps][kPiecesAhead][32];
  uint2 scales[kProducers * kWarps][2][kKeysPerWarp];
  uint32_t valid[kTiles][kKeyTile / kKeysPerWarp];  // bit i of word j: key 8 j + i of the tile is attended to
  float tops[kAttending][kWarps][kHeads];           // the largest scores of a tile, per warp of keys
  float sums[kAttending][kWarps][kHeads];           // of P over an item
  float maxima[kAttending][kHeads];                 // that P and O^T are relative to
  uint64_t full[kTiles][kGroups], free[kTiles][kGroups];
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
__device__ __forceinline__ void copy_narrow_q(const DecodeParams& params, NarrowShared<kHeads>& shared, int token) {
  constexpr int kThreads = NarrowShared<kHeads>::kAttending * kWarpgroup;
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
__device__ __forceinline__ void multiply_narrow_scores(const NarrowShared<kHeads>& shared, int buffer,
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
__device__ __forceinline__ void accumulate_narrow_values(const NarrowShared<kHeads>& shared, int attending, int buffer,
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

// Adds up the warpgroups' O^T of an item of so many tiles, normalises and stores: a warp has 8 heads of some parts.
template <int kHeads>
__device__ __forceinline__ void store_narrow(const DecodeParams& params, const NarrowShared<kHeads>& shared,
                                             const Item& item, int warp, int first_tile, int tiles) {
  using Memory = NarrowShared<kHeads>;
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
    factor[i] = i < tiles ? shared.maxima[i][block_head] : -INFINITY;
    maximum = fmaxf(maximum, factor[i]);
  }
  const bool empty = maximum == -INFINITY;
#pragma unroll
  for (int i = 0; i < kAttending; ++i) {
    factor[i] = exp2_approx(factor[i] - (empty ? 0.f : maximum));
    if (i >= tiles) continue;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total = fmaf(shared.sums[i][w][block_head], factor[i], total);
  }
  const float denominator =
      head < params.heads ? finish_head(params, item, head, maximum, total, first_part == 0 && lane % 4 == 0) : 1.f;
#pragma unroll
  for (int i = 0; i < kAttending; ++i) factor[i] = empty ? 0.f : factor[i] / denominator;

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

// The attending warpgroup number `attending`.
template <int kHeads>
__device__ __forceinline__ void attend(const DecodeParams& params, NarrowShared<kHeads>& shared, int attending) {
  using Memory = NarrowShared<kHeads>;
  constexpr int kTiles = Memory::kTiles, kAttending = Memory::kAttending;
  constexpr int kColumns = kHeads / 4;  // a thread's: 8 * (i / 2) + 2 * (lane % 4) + i % 2
  const int warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  const int barrier = 1 + attending, barrier_of_all = 1 + kAttending;
  const float scale_log2 = params.scale * kLog2e;

  Work work(params);
  Item item;
  bool more = work.next(&item);
  if (more) copy_narrow_q(params, shared, item.token);
  int before = 0;  // tiles of the items before
  int held = -1;   // the tile that has this warpgroup's O^T
  while (more) {
    copy_async_wait_all();
    fence_proxy_async();
    named_barrier_sync(barrier_of_all, kAttending * kWarpgroup);  // Q has come, and the item before is stored
    if (held >= 0 && lane < kGroups) barrier_arrive(&shared.free[held][lane]);
    held = -1;
    const Item now = item;
    more = work.next(&item);
    const int tiles = (now.end - now.begin + kKeyTile - 1) / kKeyTile;

    // Base-2 scores: the maximum that P is relative to, and the sum of P over this thread's rows.
    float maximum[kColumns], sum[kColumns], o[kPlanes][kHeads / 2];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      maximum[i] = -INFINITY;
      sum[i] = 0.f;
    }
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < kHeads / 2; ++i) o[plane][i] = 0.f;
    }
    for (int tile = attending; tile < tiles; tile += kAttending) {
      const int buffer = (before + tile) % kTiles;
      for (int g = 0; g < kGroups; ++g) barrier_wait(&shared.full[buffer][g], (before + tile) / kTiles % 2);
      float s[Memory::kScoreSums][kHeads / 2];
      multiply_narrow_scores(shared, buffer, s);
      bool valid[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) valid[r] = shared.valid[buffer][2 * warp + r] >> (lane / 4) & 1;
      wgmma_wait<0>();

      // Before anything else the keys nobody attends to: what they have in store may be NaN.
      float top[kColumns];
#pragma unroll
      for (int i = 0; i < kHeads / 2; ++i) {
#pragma unroll
        for (int j = 1; j < Memory::kScoreSums; ++j) s[0][i] += s[j][i];
        if (!valid[i / 2 % 2]) s[0][i] = -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int at = i / 2 * 4 + i % 2;
        top[i] = column_max(fmaxf(s[0][at], s[0][at + 2]));
      }
      if (lane < 4) {
#pragma unroll
        for (int i = 0; i < kColumns; i += 2) {
          *reinterpret_cast<float2*>(&shared.tops[attending][warp][4 * i + 2 * lane]) = {top[i], top[i + 1]};
        }
      }
      named_barrier_sync(barrier, kWarpgroup);  // also: no warp's products still read the P before
#pragma unroll
      for (int i = 0; i < kColumns; i += 2) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 other = *reinterpret_cast<const float2*>(&shared.tops[attending][w][4 * i + 2 * (lane % 4)]);
          top[i] = fmaxf(top[i], other.x);
          top[i + 1] = fmaxf(top[i + 1], other.y);
        }
      }

      // All threads of a column decide alike.
      float factor[kColumns];
      bool rescale = false;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        top[i] *= scale_log2;
        const float old = maximum[i];
        if (top[i] > old + kRescaleThresholdLog2 || old == -INFINITY) maximum[i] = top[i];
        factor[i] = old == maximum[i] ? 1.f : exp2_approx(old - maximum[i]);
        rescale |= factor[i] != 1.f;
        const float base = maximum[i] == -INFINITY ? 0.f : maximum[i];
        float added = 0.f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& x = s[0][i / 2 * 4 + i % 2 + 2 * r];
          x = exp2_approx(fmaf(x, scale_log2, -base));
          added += x;
        }
        sum[i] = fmaf(sum[i], factor[i], added);
      }

      // Rows of P are heads; this warp has the 16-byte units 2 * warp and the next.
      uint32_t pairs[kHeads / 4];
#pragma unroll
      for (int i = 0; i < kHeads / 4; ++i) pairs[i] = pack_bf16x2(s[0][2 * i], s[0][2 * i + 1]);
      const uint32_t p =
          smem_address(shared.p[attending]) + lane % 8 * kRowBytes + 16 * ((2 * warp + lane / 8 % 2) ^ lane % 8);
      if constexpr (kHeads == 8) {
        store_transposed(p, pairs[0], pairs[1]);
      } else {
#pragma unroll
        for (int i = 0; i < kHeads / 4; i += 4) {
          store_transposed(p + (4 * i + lane / 16 * 8) * kRowBytes, pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]);
        }
      }
      fence_proxy_async();
      const bool first = tile == attending, last = tile + kAttending >= tiles;
      if (!first && __any_sync(~0u, rescale)) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
          for (int i = 0; i < kHeads / 2; ++i) o[plane][i] *= factor[i / 4 * 2 + i % 2];
        }
      }
      named_barrier_sync(barrier, kWarpgroup);
      accumulate_narrow_values(shared, attending, buffer, o);
      wgmma_wait<0>();
      if (last) {
        held = buffer;
      } else if (lane < kGroups) {
        barrier_arrive(&shared.free[buffer][lane]);
      }
    }

    // O^T to where the warpgroup's last tile was, turned over on the way.
    if (held >= 0) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[i] = column_sum(sum[i]);
      if (lane < 4) {
#pragma unroll
        for (int i = 0; i < kColumns; i += 2) {
          const int column = 4 * i + 2 * lane;
          *reinterpret_cast<float2*>(&shared.sums[attending][warp][column]) = {sum[i], sum[i + 1]};
          if (warp == 0) *reinterpret_cast<float2*>(&shared.maxima[attending][column]) = {maximum[i], maximum[i + 1]};
        }
      }
      float* const to = reinterpret_cast<float*>(shared.k[held]);
      named_barrier_sync(barrier, kWarpgroup);  // no warp's products still read the tile
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* const column = to + output_word(2 * (lane % 4) + c, 16 * warp + 8 * r + lane / 4);
#pragma unroll
          for (int j = 0; j < kHeads / 8; ++j) {
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane) {
              column[8 * j * kLatentDim + 64 * plane] = o[plane][4 * j + 2 * r + c];
            }
          }
        }
      }
    }
    named_barrier_sync(barrier_of_all, kAttending * kWarpgroup);  // also: nobody reads this item's Q any more
    if (more) copy_narrow_q(params, shared, item.token);
    store_narrow(params, shared, now, attending * kWarps + warp, before, tiles);
    before += tiles;
  }
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_NARROW_H_
