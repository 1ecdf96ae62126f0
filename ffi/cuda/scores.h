// The scoring role: S = Q . K^T, softmax, P.
#ifndef JAX_DSV4_CUDA_SCORES_H_
#define JAX_DSV4_CUDA_SCORES_H_

#include <cstdint>

#include "cuda/shared.h"
#include "cuda/softmax.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {

// Q of one token: rows at and past the number of heads are zeros.
__device__ __forceinline__ void load_q(const DecodeParams& params, ManyHeadsShared& shared, int token, int first_head) {
  named_barrier_sync(1, kWarpgroup);  // no warp's products still read the previous Q
  const int thread = threadIdx.x % kWarpgroup;
  const int heads = min(kHeadsPerBlock, params.heads - first_head);
  const uint8_t* q = static_cast<const uint8_t*>(params.q) +
                     (static_cast<int64_t>(token) * params.heads + first_head) * (2 * kLatentDim);
  constexpr int kUnits = 2 * kLatentDim / 16;  // per row
  for (int i = thread; i < kHeadsPerBlock * kUnits; i += kWarpgroup) {
    const int head = i / kUnits, unit = i % kUnits;
    uint8_t* dst = &shared.q[unit / 8][head * kRowBytes + 16 * (unit % 8 ^ head % 8)];
    copy_async<16>(dst, head < heads ? q + 16 * i : q, head < heads ? 16 : 0);
  }
  copy_async_wait_all();
  fence_proxy_async();
  named_barrier_sync(1, kWarpgroup);
}

__device__ __forceinline__ void multiply_scores(const ManyHeadsShared& shared, int buffer, float (&s)[32]) {
  const uint64_t q = matrix_descriptor(smem_address(shared.q), 0, 8 * kRowBytes);
  const uint64_t k = matrix_descriptor(smem_address(shared.k[buffer]), 0, 8 * kRowBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kLatentDim / 16; ++step) {
    const int plane = step / 4, offset = step % 4 * 32;
    wgmma_m64n64k16(s, advanced(q, plane * kHeadsPerBlock * kRowBytes + offset),
                    advanced(k, plane * kPlaneBytes + offset), step > 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Turns each row's base to S of a tile. -> the factors of what was summed up before.
__device__ __forceinline__ void turn_bases(float scale_log2, const float (&s)[32], Base (&bases)[2],
                                           float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = s[2 * r];
#pragma unroll
    for (int i = 0; i < 32; i += 4) top = fmaxf(top, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
    factor[r] = bases[r].turn(quad_max(top) * scale_log2);
  }
}

// S to P, in place, and each row's sum.
__device__ __forceinline__ void weigh(float scale_log2, float (&s)[32], const Base (&bases)[2],
                                      const float (&factor)[2], float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float origin = bases[r].origin();
    float added = 0.f;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (i / 2 % 2 != r) continue;
      s[i] = exp2_approx(fmaf(s[i], scale_log2, -origin));
      added += s[i];
    }
    sum[r] = fmaf(sum[r], factor[r], added);
  }
}

// The factors of this thread's rows, for those who accumulate.
__device__ __forceinline__ void put_factors(ManyHeadsShared& shared, int to, const int (&rows)[2],
                                            const float (&factor)[2]) {
  if (threadIdx.x % 4 == 0) {
    shared.factor[to][rows[0]] = factor[0];
    shared.factor[to][rows[1]] = factor[1];
  }
  __syncwarp();
  barrier_arrive(&shared.factor_full[to]);
}

__device__ __forceinline__ void score(const DecodeArgs& args, ManyHeadsShared& shared) {
  const DecodeParams& params = args.params;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_head = blockIdx.x * kHeadsPerBlock;
  const int rows[2] = {16 * warp + lane / 4, 16 * warp + lane / 4 + 8};
  const float scale_log2 = params.scale * kLog2e;

  PlannedWork work(args);
  Item item;
  const float sink[2] = {load_sink(params, first_head + rows[0]), load_sink(params, first_head + rows[1])};
  RingCursor<ManyHeadsShared::kTiles> tile;
  RingCursor<2> handoff;
  while (work.next(&item)) {
    load_q(params, shared, item.token, first_head);
    // Scores are in base 2 from here on. The sum is that of P over this thread's columns.
    Base bases[2];
    float sum[2] = {0.f, 0.f};
    for (int begin = item.begin; begin < item.end; begin += kKeyTile) {
      const int buffer = tile.place();
      for (int g = 0; g < kGroups; ++g) barrier_wait(&shared.full[buffer][g], tile.filled());
      fence_proxy_async();  // of what producers have stored
      tile.next();
      // S[h, k] = sum_d Q[h, d] K[k, d]
      float s[32];
      multiply_scores(shared, buffer, s);
      uint32_t valid[kKeyTile / kKeysPerWarp], all = kAllValid;
#pragma unroll
      for (int j = 0; j < kKeyTile / kKeysPerWarp; ++j) all &= valid[j] = shared.valid[buffer][j];
      wgmma_wait<0>();

      // Before anything else, for what a key nobody attends to has in store may be NaN.
      if (all != kAllValid) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          if (!is_valid(valid[i / 4], 2 * (lane % 4) + i % 2)) s[i] = -INFINITY;
        }
      }

      const int to = handoff.place();
      barrier_wait(&shared.p_free[to], handoff.freed());
      handoff.next();
      float factor[2];
      turn_bases(scale_log2, s, bases, factor);
      put_factors(shared, to, rows, factor);  // what is there is rescaled while P is on its way
      weigh(scale_log2, s, bases, factor, sum);
      const uint32_t p = smem_address(shared.p[to]);
      const int store_row = 16 * warp + lane % 16;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const float* f = s + 4 * j;
        store_matrices(p + store_row * kRowBytes + 16 * ((j + lane / 16) ^ store_row % 8), pack_bf16x2(f[0], f[1]),
                       pack_bf16x2(f[2], f[3]), pack_bf16x2(f[4], f[5]), pack_bf16x2(f[6], f[7]));
      }
      fence_proxy_async();
      __syncwarp();
      barrier_arrive(&shared.p_full[to]);
    }

    // The item's end: one more factor, that normalises.
    const int to = handoff.place();
    barrier_wait(&shared.p_free[to], handoff.freed());
    handoff.next();
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = first_head + rows[r];
      const bool stores = lane % 4 == 0 && head < params.heads;
      factor[r] = finish_head(params, item, head, sink[r], bases[r].base, quad_sum(sum[r]), stores);
    }
    put_factors(shared, to, rows, factor);
    barrier_arrive(&shared.p_full[to]);
  }
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_SCORES_H_
