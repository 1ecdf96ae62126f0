// The accumulating role: O = P . V, V being the very tile that was K; output.
#ifndef JAX_DSV4_CUDA_VALUES_H_
#define JAX_DSV4_CUDA_VALUES_H_

#include <cstdint>

#include "cuda/output.h"
#include "cuda/shared.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {

__device__ __forceinline__ void accumulate_values(const ManyHeadsShared& shared, int p_buffer, int buffer, int group,
                                                  int half, bool accumulate, float (&o)[128]) {
  const uint64_t p = matrix_descriptor(smem_address(shared.p[p_buffer]), 0, 8 * kRowBytes);
  const uint64_t v = matrix_descriptor(smem_address(shared.k[buffer][half * kPlanes / 2]), kPlaneBytes, 8 * kRowBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kGroupKeys / 16; ++step) {
    const uint64_t a = advanced(p, group * (2 * kGroupKeys) + step * 32);
    const uint32_t b = group * (kGroupKeys * kRowBytes) + step * 16 * kRowBytes;
    wgmma_m64n128k16<0>(o, a, advanced(v, b), accumulate || step > 0);
    wgmma_m64n128k16<64>(o, a, advanced(v, b + 2 * kPlaneBytes), accumulate || step > 0);
  }
  wgmma_commit();
}

// `half` of the dimensions.
__device__ __forceinline__ void value(const DecodeArgs& args, ManyHeadsShared& shared, int half) {
  const DecodeParams& params = args.params;
  const int warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  const int first_head = blockIdx.x * kHeadsPerBlock;
  const int rows[2] = {16 * warp + lane / 4, 16 * warp + lane / 4 + 8};
  PlannedWork work(args);
  Item item;
  RingCursor<ManyHeadsShared::kTiles> tile;
  RingCursor<2> handoff;
  while (work.next(&item)) {
    float o[128];
    for (int begin = item.begin; begin < item.end; begin += kKeyTile) {
      const int buffer = tile.place(), from = handoff.place();
      const bool first = begin == item.begin;
      barrier_wait(&shared.factor_full[from], handoff.filled());
      if (!first) {
        const float factor[2] = {shared.factor[from][rows[0]], shared.factor[from][rows[1]]};
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] *= factor[i / 2 % 2];
      }
      barrier_wait(&shared.p_full[from], handoff.filled());
      tile.next();
      handoff.next();

      // O[h, d] += sum_k P[h, k] V[k, d]
      accumulate_values(shared, from, buffer, 0, half, !first, o);
      accumulate_values(shared, from, buffer, 1, half, true, o);
      wgmma_wait<1>();
      if (lane == 0) barrier_arrive(&shared.free[buffer][0]);
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(&shared.free[buffer][1]);
      barrier_arrive(&shared.p_free[from]);
    }

    const int from = handoff.place();
    barrier_wait(&shared.factor_full[from], handoff.filled());
    barrier_wait(&shared.p_full[from], handoff.filled());
    handoff.next();
    const float factor[2] = {shared.factor[from][rows[0]], shared.factor[from][rows[1]]};
    __syncwarp();
    barrier_arrive(&shared.p_free[from]);

    // A row without a valid key has P = 0, and V has no NaN from keys nobody attends to: its sums are zeros.
    auto for_each_part = [&](auto store) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int head = first_head + 16 * warp + 8 * r;
        if (head >= params.heads) break;
#pragma unroll
        for (int i = 0; i < kParts / 2; ++i) {
          float2 x[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int at = 16 * i + 4 * j + 2 * r;
            x[j] = {o[at] * factor[r], o[at + 1] * factor[r]};
          }
          store(head, half * kParts / 2 + i, x);
        }
      }
    };
    // Each way in a piece of its own: code that runs once per item costs what fetching it costs.
    if (item.partial >= 0) {
      for_each_part([&](int head, int part, const float2(&x)[4]) {
        float4* partial = partial_part(params, item.partial, head, part, lane);
        partial[0] = {x[0].x, x[0].y, x[1].x, x[1].y};
        partial[32] = {x[2].x, x[2].y, x[3].x, x[3].y};
      });
    } else if (params.out_dtype == Dtype::kBf16) {
      for_each_part(
          [&](int head, int part, const float2(&x)[4]) { store_bf16(params, item.token, head, part, lane, x); });
    } else {
      for_each_part(
          [&](int head, int part, const float2(&x)[4]) { store_float32(params, item.token, head, part, lane, x); });
    }
  }
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_VALUES_H_
