// Tokens whose keys the blocks of a cluster share: they tell each other the bases and sums of their softmax, and send
// what they have of O, scaled, to the block that adds it up. No partial result leaves the multiprocessors, and no
// kernel follows.
#ifndef JAX_DSV4_CUDA_CLUSTER_H_
#define JAX_DSV4_CUDA_CLUSTER_H_

#include <cstdint>

#include "cuda/few_heads.h"

namespace jax_dsv4::cuda {

// A slice of the output: 8 heads by 64 dimensions of O^T as a warpgroup holds them. A thread has
// x = {O[h, d], O[h + 1, d], O[h, d + 8], O[h + 1, d + 8]}.
template <int kHeads>
constexpr int kSlices = kHeads / 8 * (kLatentDim / 64);

struct OutputSlice {
  int head, dim;

  // `thread` of the warpgroup.
  __device__ OutputSlice(int first_head, int plane, int thread)
      : head(first_head + 2 * (thread % 4)), dim(64 * plane + 16 * (thread / 32) + thread % 32 / 4) {}

  // Lanes exchange numbers, so that each has four dimensions of one head, and four lanes fill a sector: stores cost by
  // the sectors they touch.
  __device__ void store_bf16(const DecodeParams& params, int token, float4 x) const {
    const bool odd = dim & 1, upper = dim & 2;
    const uint32_t words[2] = {pack_bf16x2(x.x, x.z), pack_bf16x2(x.y, x.w)};  // of a head: dimensions d, d + 8
    const uint32_t got = __shfl_xor_sync(~0u, words[!odd], 4);
    const uint32_t even_dims = odd ? got : words[0], odd_dims = odd ? words[1] : got;
    const uint32_t low = join_low(even_dims, odd_dims), high = join_high(even_dims, odd_dims);
    const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, 8);
    if (head + odd >= params.heads) return;
    uint16_t* const out = static_cast<uint16_t*>(params.out) + at(params, token, head + odd, (dim & ~3) + 8 * upper);
    *reinterpret_cast<uint2*>(out) = upper ? uint2{other, high} : uint2{low, other};
  }

  __device__ void store_float32(const DecodeParams& params, int token, float4 x) const {
    float* const out = static_cast<float*>(params.out);
    if (head < params.heads) {
      out[at(params, token, head, dim)] = x.x;
      out[at(params, token, head, dim + 8)] = x.z;
    }
    if (head + 1 < params.heads) {
      out[at(params, token, head + 1, dim)] = x.y;
      out[at(params, token, head + 1, dim + 8)] = x.w;
    }
  }

 private:
  __device__ static uint32_t join_low(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
  __device__ static uint32_t join_high(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }
  __device__ static int64_t at(const DecodeParams& params, int token, int h, int d) {
    return (static_cast<int64_t>(token) * params.heads + h) * kLatentDim + d;
  }
};

template <int kHeads>
struct __align__(1024) ClusterShared : FewHeadsShared<kHeads> {
  static_assert(kSlices<kHeads> <= kMostClusterBlocks);

  // From each block: the slices that this block adds up, relative to the larger base of the block; and per warpgroup of
  // the block and head its softmax's base and sum.
  float4 slices[kMostClusterBlocks][kWarpgroup];
  float2 softmax[kMostClusterBlocks][FewHeadsShared<kHeads>::kAttending][kHeads];
  uint64_t slices_sent, softmax_sent, added;
};

// Who adds up which slices of a cluster's token: block i, of the first `owners`, those from i << slices_log2 on. That
// `blocks` times so many slices fit ClusterShared::slices is best_cluster_shape()'s to see to.
template <int kHeads>
struct SliceOwners {
  int slices_log2, owners;
  __device__ explicit SliceOwners(int blocks) {
    slices_log2 = max(0, __clz(blocks) - __clz(kSlices<kHeads>));
    owners = kSlices<kHeads> >> slices_log2;
  }
};

// By one thread: what this block will be sent.
template <int kHeads>
__device__ __forceinline__ void expect_share(ClusterShared<kHeads>& shared) {
  const int blocks = cluster_size();
  const SliceOwners<kHeads> has(blocks);
  if (cluster_rank() >= has.owners) return;
  barrier_expect(&shared.softmax_sent, blocks * sizeof(shared.softmax[0]));
  barrier_expect(&shared.slices_sent, (blocks << has.slices_log2) * sizeof(shared.slices[0]));
}

// By a warpgroup: its bases and sums, which lie in shared memory if it has had any keys, to all that have slices.
template <int kHeads>
__device__ __forceinline__ void send_softmax(ClusterShared<kHeads>& shared, int attending, bool any) {
  cluster_wait();  // the other blocks' barriers are there
  const int thread = threadIdx.x % kWarpgroup, head = thread % kHeads,
            owners = SliceOwners<kHeads>(cluster_size()).owners;
  float2 x = {-INFINITY, 0.f};
  if (any) {
    x.x = shared.bases[attending][head];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x.y += shared.sums[attending][w][head];
  }
#pragma unroll 1
  for (int to = thread / kHeads; to < owners; to += kWarpgroup / kHeads) {
    store_cluster(&shared.softmax[cluster_rank()][attending][head], &shared.softmax_sent, to, x);
  }
}

// By both attending warpgroups: adds up the slices that this block has, and stores them.
template <int kHeads>
__device__ __forceinline__ void store_share(const DecodeParams& params, ClusterShared<kHeads>& shared,
                                            const ClusterWork& work, const Item& item, int attending) {
  const int rank = cluster_rank(), thread = threadIdx.x % kWarpgroup, lane = thread % 32, blocks = cluster_size();
  const SliceOwners<kHeads> has(blocks);
  if (rank >= has.owners) return;
  barrier_wait(&shared.softmax_sent, 0);
#pragma unroll 1
  for (int i = attending; i < 1 << has.slices_log2; i += 2) {
    const int number = (rank << has.slices_log2) + i, plane = number / (kHeads / 8);
    const int column = number % (kHeads / 8) * 8, head = blockIdx.x * kHeads + column + 2 * (lane % 4);
    // Of two heads. A lane looks at the blocks lane / 4 and lane / 4 + 8; the lanes of a head make one of it.
    constexpr int kEach = kMostClusterBlocks / 8;
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f}, weight[kEach][2];
    float4 x[kEach][2];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const int from = lane / 4 + 8 * j;
        x[j][w] = {-INFINITY, 0.f, -INFINITY, 0.f};
        if (from < blocks) {
          x[j][w] = *reinterpret_cast<const float4*>(&shared.softmax[from][w][column + 2 * (lane % 4)]);
        }
      }
      weight[j][0] = fmaxf(x[j][0].x, x[j][1].x);  // what the block's slices are relative to
      weight[j][1] = fmaxf(x[j][0].z, x[j][1].z);
      top[0] = fmaxf(top[0], weight[j][0]);
      top[1] = fmaxf(top[1], weight[j][1]);
    }
    float factor[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      top[c] = column_max(top[c]);
      const float base = top[c] == -INFINITY ? 0.f : top[c];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const float4& y = x[j][w];
          total[c] = fmaf(c == 0 ? y.y : y.w, exp2_approx((c == 0 ? y.x : y.z) - base), total[c]);
        }
        weight[j][c] = exp2_approx(weight[j][c] - base);
      }
      const bool stores = plane == 0 && thread < 4 && head + c < params.heads;
      const float sink = shared.sink[column + 2 * (lane % 4) + c];
      factor[c] = finish_head(params, item, head + c, sink, top[c], column_sum(total[c]), stores);
      if (!work.plan_fits()) {
        factor[c] = __int_as_float(0x7fc00000);
        if (stores) params.lse[static_cast<int64_t>(item.token) * params.heads + head + c] = factor[c];
      }
    }
    if (i < 2) barrier_wait(&shared.slices_sent, 0);
    float4 sum = {};
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
#pragma unroll 4
      for (int from = 8 * j; from < min(blocks, 8 * j + 8); ++from) {
        const float4 y = shared.slices[(from << has.slices_log2) + i][thread];
        const int lane_of_it = from % 8 * 4 + lane % 4;
        const float w[2] = {__shfl_sync(~0u, weight[j][0], lane_of_it), __shfl_sync(~0u, weight[j][1], lane_of_it)};
        sum = {fmaf(y.x, w[0], sum.x), fmaf(y.y, w[1], sum.y), fmaf(y.z, w[0], sum.z), fmaf(y.w, w[1], sum.w)};
      }
    }
    sum = {sum.x * factor[0], sum.y * factor[1], sum.z * factor[0], sum.w * factor[1]};
    const OutputSlice slice(blockIdx.x * kHeads + column, plane, thread);
    if (params.out_dtype == Dtype::kBf16) {
      slice.store_bf16(params, item.token, sum);
    } else {
      slice.store_float32(params, item.token, sum);
    }
  }
}

// By both attending warpgroups, at the end of the token. The one with the block's last tile adds the other's O^T to its
// own and sends that; then both add up and store what this block has been sent.
template <int kHeads>
__device__ __forceinline__ void share_token(const DecodeParams& params, ClusterShared<kHeads>& shared,
                                            const ClusterWork& work, const Item& item, int attending, int tiles,
                                            const Base (&bases)[kHeads / 4], const float (&o)[kPlanes][kHeads / 2]) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const bool both = tiles > 1, adds = (tiles > 0 ? tiles - 1 : 0) % 2 == attending;
  float4* const other = reinterpret_cast<float4*>(shared.k[tiles % 2]);  // where the last tile but one was
  auto for_each_slice = [&](auto use) {
#pragma unroll
    for (int i = 0; i < kSlices<kHeads>; ++i) {
      const float (&x)[kHeads / 2] = o[i / (kHeads / 8)];
      const int at = 4 * (i % (kHeads / 8));
      use(i, float4{x[at], x[at + 1], x[at + 2], x[at + 3]});
    }
  };
  if (both && !adds) {
    named_barrier_sync(1 + attending, kWarpgroup);  // no warp's products still read that tile
    for_each_slice([&](int i, float4 x) { other[i * kWarpgroup + thread] = x; });
    barrier_arrive(&shared.added);
  }
  if (adds) {
    if (both) barrier_wait(&shared.added, 0);
    // What a column of this warpgroup's and of the other's is multiplied by.
    float mine[kHeads / 4], theirs[kHeads / 4];
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) {
      const float others = both ? shared.bases[1 - attending][i / 2 * 8 + 2 * (lane % 4) + i % 2] : -INFINITY;
      const float top = fmaxf(bases[i].base, others), base = top == -INFINITY ? 0.f : top;
      mine[i] = exp2_approx(bases[i].base - base);
      theirs[i] = exp2_approx(others - base);
    }
    const SliceOwners<kHeads> has(cluster_size());
    for_each_slice([&](int i, float4 x) {
      const int c = 2 * (i % (kHeads / 8));
      x = {x.x * mine[c], x.y * mine[c + 1], x.z * mine[c], x.w * mine[c + 1]};
      if (both) {
        const float4 y = other[i * kWarpgroup + thread];
        x = {fmaf(y.x, theirs[c], x.x), fmaf(y.y, theirs[c + 1], x.y), fmaf(y.z, theirs[c], x.z),
             fmaf(y.w, theirs[c + 1], x.w)};
      }
      const int place = (cluster_rank() << has.slices_log2) + (i & ((1 << has.slices_log2) - 1));
      store_cluster(&shared.slices[place][thread], &shared.slices_sent, i >> has.slices_log2, x);
    });
  }
  store_share(params, shared, work, item, attending);
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_CLUSTER_H_
