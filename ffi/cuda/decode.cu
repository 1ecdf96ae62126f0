// Sparse MLA decode on Hopper. One persistent block per multiprocessor follows the plan's work items. Its warpgroups
// have one task each, a loop over the keys of the items, and hand shared memory on through barriers. In all kernels
//
//   produce (2)  slots to addresses, packed rows by cp.async, e4m3 to bf16; each a group of 32 keys     -> full
//
// and then, in decode_kernel, for 33 heads and more:
//
//   score        S[64 heads, 64 keys] = Q . K^T, softmax against a running maximum, P                  -> p_full
//   value (2)    O[64 heads, 256 of 512] += P . V, V being the very tile that was K; output            -> p_free, free
//
// or, in narrow_kernel, for up to 8, 16 or 32 heads, which would pay for 64 in the other, and where there is so little
// to do that more heads than that fill the device only if spread over more blocks:
//
//   attend (2)   S^T[64 keys, heads] = K . Q^T, softmax, P, O^T[512, heads] += V^T . P^T, each of every other tile;
//                at an item's end the sum of both, output                                              -> free
//
// So tensor cores, conversion and memory are busy with different keys at the same time. Heads beyond 64 are further
// blocks that walk the same items at the same time and find the rows in L2. A token cut into several items leaves
// partials that a second, small kernel combines in key order; that kernel also answers tokens that have no item.
//
// Where all blocks run at once even if each token (and each 8 or 16 of its heads) has several, narrow_kernel does
// without the plan, the partials and the second kernel: the blocks of a token are a cluster, share its keys evenly, and
// add up what they have of O through each other's shared memory (cluster.h). There every instruction counts: most run
// once, and cost what fetching them costs.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/attend.h"
#include "cuda/cluster.h"
#include "cuda/combine.h"
#include "cuda/launch.h"
#include "cuda/narrow.h"
#include "cuda/producer.h"
#include "cuda/scores.h"
#include "cuda/shared.h"
#include "cuda/values.h"

namespace jax_dsv4::cuda {
namespace {

// What a thread has of the multiprocessor's registers when a block of so many is launched.
constexpr int launch_registers(int threads) { return 65536 / threads / 8 * 8; }

// setmaxnreg takes multiples of 8; together what the block was launched with.
constexpr int kThreads = (Shared::kProducers + 1 + 2) * kWarpgroup;
constexpr int kLaunchRegisters = launch_registers(kThreads);
constexpr int kProducerRegisters = 40;
constexpr int kScoresRegisters = 80;
constexpr int kValuesRegisters = 160;  // 128 of them accumulators
static_assert(Shared::kProducers * kProducerRegisters + kScoresRegisters + 2 * kValuesRegisters ==
              kLaunchRegisters * (kThreads / kWarpgroup));

// So that the compiler knows warps to be of one role.
__device__ __forceinline__ int role_of_warp() { return __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0); }

template <int kAlign>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kTiles; ++i) {
      for (int g = 0; g < kGroups; ++g) {
        barrier_init(&shared.full[i][g], kWarps);
        barrier_init(&shared.free[i][g], 2 * kWarps);  // the warps of both halves of the values
      }
    }
    // Whole warps arrive here, for every lane has ordinary data to hand on.
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.p_full[i], kWarpgroup);
      barrier_init(&shared.p_free[i], 2 * kWarpgroup);
    }
    barrier_init_fence();
  }
  __syncthreads();
  // The combining kernel may take the multiprocessors that this one leaves; it waits for all of this one before it
  // reads.
  cudaTriggerProgrammaticLaunchCompletion();

  const int role = role_of_warp();
  if (role < Shared::kProducers) {
    registers_change<kLaunchRegisters, kProducerRegisters>();
    produce<PlannedWork, kAlign>(args, shared, role);
  } else if (role == Shared::kProducers) {
    registers_change<kLaunchRegisters, kScoresRegisters>();
    score(args, shared);
  } else {
    registers_change<kLaunchRegisters, kValuesRegisters>();
    value(args, shared, role - Shared::kProducers - 1);
  }
}

template <typename Work, int kHeads>
struct NarrowRoles {
  using Memory = AttendShared<Work, kHeads>;
  static constexpr int kWarpgroups = Memory::kProducers + Memory::kAttending, kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kLaunchRegisters = launch_registers(kThreads);
  static constexpr int kAttendingRegisters = kHeads <= 16 ? 128 : 208;  // 4 * kHeads of them accumulators
  static constexpr int kProducerRegisters =
      (kWarpgroups * kLaunchRegisters - Memory::kAttending * kAttendingRegisters) / Memory::kProducers / 8 * 8;
};

template <typename Work, int kAlign, int kHeads>
__global__ void __launch_bounds__(NarrowRoles<Work, kHeads>::kThreads, 1)
    narrow_kernel(const __grid_constant__ DecodeArgs args) {
  using Roles = NarrowRoles<Work, kHeads>;
  using Memory = typename Roles::Memory;
  static_assert(sizeof(Memory) <= kMostSharedBytes);
  extern __shared__ __align__(1024) uint8_t memory[];
  Memory& shared = *reinterpret_cast<Memory*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Memory::kTiles; ++i) {
      for (int g = 0; g < kGroups; ++g) {
        barrier_init(&shared.full[i][g], kWarps);
        barrier_init(&shared.free[i][g], kWarps);  // of the warpgroup that attends to the tile
      }
    }
    barrier_init(&shared.together, Memory::kAttending * kWarpgroup);
    if constexpr (Work::kCluster) {
      barrier_init(&shared.added, kWarpgroup);
      barrier_init(&shared.slabs_sent, 1);
      barrier_init(&shared.softmax_sent, 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (Work::kCluster) {
    cluster_arrive();
  } else {
    cudaTriggerProgrammaticLaunchCompletion();
  }

  const int role = role_of_warp();
  if (role < Memory::kProducers) {
    registers_change<Roles::kLaunchRegisters, Roles::kProducerRegisters>();
    produce<Work, kAlign>(args, shared, role);
  } else {
    registers_change<Roles::kLaunchRegisters, Roles::kAttendingRegisters>();
    attend<Work, kHeads>(args, shared, role - Memory::kProducers);
  }
}

// The largest of 16, 4 and 1 that divides every address of a row.
int alignment(const Cache& cache) {
  const uint64_t bits = reinterpret_cast<uint64_t>(cache.data) | static_cast<uint64_t>(cache.block_stride_bytes);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
}

constexpr int kFewPartials = 4, kManyPartials = 8;
using CombineKernel = void (*)(DecodeParams);
using DecodeKernel = void (*)(DecodeArgs);

// A kernel with what it is launched with.
struct Decode {
  DecodeKernel kernel;
  int threads;
  size_t shared_bytes;
};

template <typename Work, int kAlign, int kHeads>
Decode narrow() {
  using Roles = NarrowRoles<Work, kHeads>;
  return {narrow_kernel<Work, kAlign, kHeads>, Roles::kThreads, sizeof(typename Roles::Memory)};
}

template <int kAlign>
Decode decode_for(int heads_per_block, bool cluster) {
  switch (heads_per_block) {
    case 8:
      return cluster ? narrow<ClusterWork, kAlign, 8>() : narrow<PlannedWork, kAlign, 8>();
    case 16:
      return cluster ? narrow<ClusterWork, kAlign, 16>() : narrow<PlannedWork, kAlign, 16>();
    case 32:
      return narrow<PlannedWork, kAlign, 32>();
    default:
      return {decode_kernel<kAlign>, kThreads, sizeof(Shared)};
  }
}

Decode decode_for(int heads_per_block, int alignment, bool cluster) {
  switch (alignment) {
    case 16:
      return decode_for<16>(heads_per_block, cluster);
    case 4:
      return decode_for<4>(heads_per_block, cluster);
    default:
      return decode_for<1>(heads_per_block, cluster);
  }
}

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// How many clusters of so many blocks run at once, per device; of 8 and of 16 heads to a block. Asked by
// prepare_decode(): multiprocessors that share a cluster are neighbours, of which chips have uneven numbers.
struct Clusters {
  int at_once[2][kMostClusterBlocks + 1];
};
Clusters& clusters_of(int device) {
  static Clusters all[64];
  return all[device % 64];
}

// A cluster per token and group of heads, or no blocks at all: then the plan is followed.
struct Spread {
  int heads, blocks;
};

// What takes least, in microseconds on an H100, measured: with clusters a start and an end, the tiles that a block has
// to attend to in turn, and the pairs of slabs that it adds up; with a plan the tiles that there are per
// multiprocessor.
Spread best_spread(int64_t tokens, int heads, int64_t keys, int device, int processors) {
  const double planned_tiles =
      static_cast<double>(tokens) * ceil_div(keys, kKeyTile) * ceil_div(heads, kHeadsPerBlock) / processors;
  double least = heads <= 16   ? 8.9 + 2.2 * planned_tiles
                 : heads <= 32 ? 11.5 + 2.4 * planned_tiles
                               : 12.3 + 4.2 * planned_tiles;
  Spread best = {0, 0};
  for (int n : {8, 16}) {
    const int slabs = kLatentDim / 64 * n / 8;
    const int64_t clusters = tokens * ceil_div(heads, n);
    for (int blocks = 2; blocks <= kMostClusterBlocks && clusters * blocks <= processors; ++blocks) {
      const int tiles = ceil_div(ceil_div(keys, blocks), kKeyTile);
      int own = slabs;  // of a block that has any; `blocks` halved until one is left
      for (int b = blocks; b > 1 && own > 1; b /= 2) own /= 2;
      if (own * blocks > kMostClusterBlocks) continue;
      const double time =
          (n == 8 ? 5.6 + 1.8 * (tiles - 1) : 6.5 + 2.1 * (tiles - 1)) + 0.5 * (ceil_div(own, 2) - 1) + 0.04 * blocks;
      if (time < least && clusters <= clusters_of(device).at_once[n / 16][blocks]) {
        least = time;
        best = {n, blocks};
      }
    }
  }
  return best;
}

// A cluster has block x of the grid's x, all of y, and token z.
cudaLaunchConfig_t cluster_config(const Decode& decode, dim3 grid, cudaStream_t stream, cudaLaunchAttribute* cluster) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = 1;
  cluster->val.clusterDim.y = grid.y;
  cluster->val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(decode.threads);
  config.dynamicSmemBytes = decode.shared_bytes;
  config.stream = stream;
  config.attrs = cluster;
  config.numAttrs = 1;
  return config;
}

// The fewest heads that a block may have for all blocks with work to run at once, each with one item or few: the fewer,
// the sooner it has written them. `workers`: the most that get work.
int heads_per_block(int heads, int workers, int processors) {
  for (int n : {8, 16, 32}) {
    if (heads <= n || ceil_div(heads, n) * workers <= processors) return n;
  }
  return kHeadsPerBlock;
}

}  // namespace

cudaError_t prepare_decode() {
  for (int heads : {8, 16, 32, kHeadsPerBlock}) {
    for (int align : {16, 4, 1}) {
      for (bool cluster : {false, true}) {
        const Decode decode = decode_for(heads, align, cluster);
        cudaError_t status = cudaFuncSetAttribute(decode.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(decode.shared_bytes));
        if (status == cudaSuccess && cluster) {
          status = cudaFuncSetAttribute(decode.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        }
        if (status != cudaSuccess) return status;
      }
    }
  }
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  for (int heads : {8, 16}) {
    for (int blocks = 2; blocks <= kMostClusterBlocks; ++blocks) {
      const Decode decode = decode_for(heads, 16, true);
      cudaLaunchAttribute cluster;
      const cudaLaunchConfig_t config = cluster_config(decode, dim3(1, blocks), nullptr, &cluster);
      int* const at_once = &clusters_of(device).at_once[heads / 16][blocks];
      if (cudaOccupancyMaxActiveClusters(at_once, decode.kernel, &config) != cudaSuccess) {
        *at_once = 0;
        cudaGetLastError();  // a size that this device does not have is no error
      }
    }
  }
  // The same split of L1 and shared memory for all kernels: changing it takes time. Setting it loads the kernel as
  // well.
  for (CombineKernel combine : {combine_kernel<kFewPartials>, combine_kernel<kManyPartials>}) {
    status =
        cudaFuncSetAttribute(combine, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  if (params.q_dtype != Dtype::kBf16) return cudaErrorNotSupported;
  int align = 16;
  for (const Scope& scope : params.scopes) {
    if (scope.topk == 0) continue;
    if (scope.cache.layout != Layout::kFp8DsMla) return cudaErrorNotSupported;
    align = alignment(scope.cache) < align ? alignment(scope.cache) : align;
  }
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t keys = params.scopes[0].topk + int64_t{params.scopes[1].topk};
  const Spread spread = best_spread(params.tokens, params.heads, keys, device, processors);
  auto divisor = [](const Scope& scope) { return Divisor(scope.topk > 0 ? scope.cache.block_size : 1); };
  const DecodeArgs args = {
      params, {divisor(params.scopes[0]), divisor(params.scopes[1])}, Divisor(std::max(1, spread.blocks))};
  if (spread.blocks > 0) {
    const Decode decode = decode_for(spread.heads, align, true);
    cudaLaunchAttribute cluster;
    const dim3 grid(ceil_div(params.heads, spread.heads), spread.blocks, params.tokens);
    const cudaLaunchConfig_t config = cluster_config(decode, grid, stream, &cluster);
    return cudaLaunchKernelEx(&config, decode.kernel, args);
  }

  // Items are no shorter than a tile, but for a token's last.
  const int64_t tiles = params.tokens * int64_t{ceil_div(keys, kKeyTile)};
  int workers = static_cast<int>(std::min<int64_t>(params.plan.workers, std::max<int64_t>(1, tiles)));
  const int heads = heads_per_block(params.heads, workers, processors), blocks = ceil_div(params.heads, heads);
  workers = std::max(1, std::min(workers, processors / blocks));
  const Decode decode = decode_for(heads, align, false);
  decode.kernel<<<dim3(blocks, workers), decode.threads, decode.shared_bytes, stream>>>(args);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;

  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  // Enough blocks to fill the device when few tokens are split many times, not so many that leaving costs time.
  const int units = (params.heads + kPartHeads - 1) / kPartHeads * kParts;
  const int blocks_of_token = std::min(units / kCombineWarps, std::max(1, kCombineBlocks / params.tokens));
  config.gridDim = dim3(params.tokens, blocks_of_token);
  config.blockDim = dim3(32 * kCombineWarps);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  const bool many = workers >= kManyPartials * params.tokens;  // a token's partials are about workers / tokens
  return cudaLaunchKernelEx(&config, many ? combine_kernel<kManyPartials> : combine_kernel<kFewPartials>, params);
}

}  // namespace jax_dsv4::cuda
