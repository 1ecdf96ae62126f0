// The attending role: scores, softmax and values of the same tile, for few heads.
#ifndef JAX_DSV4_CUDA_ATTEND_H_
#define JAX_DSV4_CUDA_ATTEND_H_

#include <cstdint>
#include <type_traits>

#include "cuda/cluster.h"
#include "cuda/few_heads.h"
#include "cuda/softmax.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {

template <typename Work, int kHeads>
using AttendShared = std::conditional_t<Work::kCluster, ClusterShared<kHeads>, FewHeadsShared<kHeads>>;

// The largest score of each of this thread's columns of S^T, whose sums end up in s[0].
template <typename Memory, int kSums, int kValues>
__device__ __forceinline__ void column_maxima(Memory& shared, int attending, int warp, int lane, const bool (&valid)[2],
                                              float (&s)[kSums][kValues], float (&top)[kValues / 2]) {
  constexpr int kColumns = kValues / 2;
  // Before anything else the keys nobody attends to: what they have in store may be NaN.
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
#pragma unroll
    for (int j = 1; j < kSums; ++j) s[0][i] += s[j][i];
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
  named_barrier_sync(1 + attending, kWarpgroup);  // also: no warp's products still read the P before
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 other = *reinterpret_cast<const float2*>(&shared.tops[attending][w][4 * i + 2 * (lane % 4)]);
      top[i] = fmaxf(top[i], other.x);
      top[i + 1] = fmaxf(top[i + 1], other.y);
    }
  }
}

// S^T to P^T, in place, with each column's base and sum, and the factor of what was summed up before. Scores are in
// base 2 from here on.
template <int kHeads>
__device__ __forceinline__ void softmax(float scale_log2, const float (&top)[kHeads / 4], float (&s)[kHeads / 2],
                                        Base (&bases)[kHeads / 4], float (&sum)[kHeads / 4],
                                        float (&factor)[kHeads / 4]) {
#pragma unroll
  for (int i = 0; i < kHeads / 4; ++i) {
    factor[i] = bases[i].turn(top[i] * scale_log2);
    const float origin = bases[i].origin();
    float added = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float& x = s[i / 2 * 4 + i % 2 + 2 * r];
      x = exp2_approx(fmaf(x, scale_log2, -origin));
      added += x;
    }
    sum[i] = fmaf(sum[i], factor[i], added);
  }
}

// S^T of a tile, and which of this thread's two keys a token attends to.
template <typename Memory, int kSums, int kValues>
__device__ __forceinline__ void score_tile(const Memory& shared, int buffer, int warp, int lane,
                                           float (&s)[kSums][kValues], bool (&valid)[2]) {
  multiply_scores(shared, buffer, s);
  // Read by the lane that will tell this group's producers that the tile is free.
  constexpr int kWarpsPerGroup = kWarps / kGroups;
  uint2 words = {};
  if (lane == warp / kWarpsPerGroup) words = *reinterpret_cast<const uint2*>(&shared.valid[buffer][2 * warp]);
  words.x = __shfl_sync(~0u, words.x, warp / kWarpsPerGroup);
  words.y = __shfl_sync(~0u, words.y, warp / kWarpsPerGroup);
  valid[0] = is_valid(words.x, lane / 4);
  valid[1] = is_valid(words.y, lane / 4);
  wgmma_wait<0>();
}

// P^T to P in shared memory. Its rows are heads; this warp has the 16-byte units 2 * warp and the next.
template <int kValues>
__device__ __forceinline__ void put_weights(uint8_t* to, int warp, int lane, const float (&p)[kValues]) {
  uint32_t pairs[kValues / 2];
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) pairs[i] = pack_bf16x2(p[2 * i], p[2 * i + 1]);
  const uint32_t at = smem_address(to) + lane % 8 * kRowBytes + 16 * ((2 * warp + lane / 8 % 2) ^ lane % 8);
  if constexpr (kValues == 4) {
    store_transposed(at, pairs[0], pairs[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kValues / 2; i += 4) {
      store_transposed(at + (4 * i + lane / 16 * 8) * kRowBytes, pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]);
    }
  }
  fence_proxy_async();
}

// What a warpgroup has of an item.
template <int kHeads>
struct Attended {
  static constexpr int kColumns = kHeads / 4;  // a thread's: 8 * (i / 2) + 2 * (lane % 4) + i % 2
  Base bases[kColumns];
  float sum[kColumns], o[kPlanes][kHeads / 2];  // the former of P over this thread's rows

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] = 0.f;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < kHeads / 2; ++i) o[plane][i] = 0.f;
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[kColumns]) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < kHeads / 2; ++i) o[plane][i] *= factor[i / 4 * 2 + i % 2];
    }
  }

  template <typename Memory>
  __device__ __forceinline__ void put_softmax(Memory& shared, int attending, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] = column_sum(sum[i]);
    if (lane >= 4) return;
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      const int column = 4 * i + 2 * lane;
      *reinterpret_cast<float2*>(&shared.sums[attending][warp][column]) = {sum[i], sum[i + 1]};
      if (warp == 0) *reinterpret_cast<float2*>(&shared.bases[attending][column]) = {bases[i].base, bases[i + 1].base};
    }
  }
};

// Scores, softmax and values of a tile that is full; `last` of this warpgroup's in the item.
template <typename Work, int kHeads>
__device__ __forceinline__ void attend_tile(float scale_log2, AttendShared<Work, kHeads>& shared, int attending,
                                            int buffer, bool first, bool last, Attended<kHeads>& a) {
  using Memory = AttendShared<Work, kHeads>;
  constexpr int kColumns = Attended<kHeads>::kColumns;
  const int warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  float s[Memory::kScoreSums][kHeads / 2], top[kColumns], factor[kColumns];
  bool valid[2];
  score_tile(shared, buffer, warp, lane, s, valid);
  column_maxima(shared, attending, warp, lane, valid, s, top);
  softmax<kHeads>(scale_log2, top, s[0], a.bases, a.sum, factor);
  put_weights(shared.p[attending], warp, lane, s[0]);
  if (Work::kCluster && last) a.put_softmax(shared, attending, warp, lane);  // that is sent while the products run
  if (!first) a.rescale(factor);
  named_barrier_sync(1 + attending, kWarpgroup);
  accumulate_values(shared, attending, buffer, a.o);
  if constexpr (Work::kCluster) {
    if (last) send_softmax(shared, attending, true);
  }
  wgmma_wait<0>();
}

// Warpgroup number `attending` of two that take an item's tiles in turn, each with bases, sums and O^T of
// its own, and add up at its end.
template <typename Work, int kHeads>
__device__ __forceinline__ void attend(const DecodeArgs& args, AttendShared<Work, kHeads>& shared, int attending) {
  const DecodeParams& params = args.params;
  using Memory = AttendShared<Work, kHeads>;
  constexpr int kTiles = Memory::kTiles, kAttending = Memory::kAttending;
  static_assert(kAttending == 2 && kAttending <= kTiles, "an item's last tiles are all held until its end");
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32;
  // An mbarrier: racecheck reports hazards across a named one of these threads.
  uint32_t phase = 0;
  auto all_attending_sync = [&] {
    barrier_arrive(&shared.together);
    barrier_wait(&shared.together, phase);
    phase ^= 1;
  };
  const float scale_log2 = params.scale * kLog2e;

  Work work(args);
  Item item;
  bool more = work.next(&item);
  if (more) {
    copy_q(params, shared, item.token);
    if (attending == 0 && thread < kHeads) shared.sink[thread] = load_sink(params, blockIdx.x * kHeads + thread);
    if constexpr (Work::kCluster) {
      if (attending == 0 && thread == 0) expect_share(shared);
    }
  }
  int before = 0;  // tiles of the items before
  int held = -1;   // the tile that has this warpgroup's O^T
  while (more) {
    copy_async_wait_all();
    fence_proxy_async();
    all_attending_sync();  // Q has come, and the item before is stored
    if (held >= 0 && lane < kGroups) barrier_arrive(&shared.free[held][lane]);
    held = -1;
    const Item now = item;
    more = work.next(&item);
    const int tiles = (now.end - now.begin + kKeyTile - 1) / kKeyTile;

    Attended<kHeads> attended;
    attended.clear();
    if constexpr (Work::kCluster) {
      if (attending >= tiles) send_softmax(shared, attending, false);
    }
    for (int tile = attending; tile < tiles; tile += kAttending) {
      const bool last = tile + kAttending >= tiles;
      const int buffer = (before + tile) % kTiles;
      for (int g = 0; g < kGroups; ++g) barrier_wait(&shared.full[buffer][g], (before + tile) / kTiles % 2);
      fence_proxy_async();  // of what producers have stored
      attend_tile<Work, kHeads>(scale_log2, shared, attending, buffer, tile == attending, last, attended);
      if (last) {
        held = buffer;
      } else if (lane < kGroups) {
        barrier_arrive(&shared.free[buffer][lane]);
      }
    }

    if constexpr (Work::kCluster) {
      share_token(params, shared, work, now, attending, tiles, attended.bases, attended.o);
      return;
    } else {
      if (held >= 0) {
        attended.put_softmax(shared, attending, warp, lane);
        named_barrier_sync(1 + attending, kWarpgroup);  // no warp's products still read the tile
        put_output(attended.o, reinterpret_cast<float*>(shared.k[held]));
      }
      all_attending_sync();  // also: nobody reads this item's Q any more
      if (more) copy_q(params, shared, item.token);
      store_item(params, shared, now, attending * kWarps + warp, before, tiles);
      before += tiles;
    }
  }
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_ATTEND_H_
