// Sparse MLA decode on Hopper. One persistent block per multiprocessor follows the plan's work items. Its warpgroups
// have one task each, a loop over the keys of the items, and hand shared memory on through barriers. In both kernels
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
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

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
    produce<kAlign>(args, shared, role);
  } else if (role == Shared::kProducers) {
    registers_change<kLaunchRegisters, kScoresRegisters>();
    score(args.params, shared);
  } else {
    registers_change<kLaunchRegisters, kValuesRegisters>();
    value(args.params, shared, role - Shared::kProducers - 1);
  }
}

template <int kHeads>
struct NarrowRoles {
  using Memory = NarrowShared<kHeads>;
  static constexpr int kWarpgroups = Memory::kProducers + Memory::kAttending, kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kLaunchRegisters = launch_registers(kThreads);
  static constexpr int kAttendingRegisters = kHeads <= 16 ? 128 : 208;  // 4 * kHeads of them accumulators
  static constexpr int kProducerRegisters =
      (kWarpgroups * kLaunchRegisters - Memory::kAttending * kAttendingRegisters) / Memory::kProducers / 8 * 8;
};

template <int kAlign, int kHeads>
__global__ void __launch_bounds__(NarrowRoles<kHeads>::kThreads, 1)
    narrow_kernel(const __grid_constant__ DecodeArgs args) {
  using Memory = NarrowShared<kHeads>;
  using Roles = NarrowRoles<kHeads>;
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
    barrier_init_fence();
  }
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion();

  const int role = role_of_warp();
  if (role < Memory::kProducers) {
    registers_change<Roles::kLaunchRegisters, Roles::kProducerRegisters>();
    produce<kAlign>(args, shared, role);
  } else {
    registers_change<Roles::kLaunchRegisters, Roles::kAttendingRegisters>();
    attend(args.params, shared, role - Memory::kProducers);
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

template <int kAlign>
Decode decode_for(int heads_per_block) {
  switch (heads_per_block) {
    case 8:
      return {narrow_kernel<kAlign, 8>, NarrowRoles<8>::kThreads, sizeof(NarrowShared<8>)};
    case 16:
      return {narrow_kernel<kAlign, 16>, NarrowRoles<16>::kThreads, sizeof(NarrowShared<16>)};
    case 32:
      return {narrow_kernel<kAlign, 32>, NarrowRoles<32>::kThreads, sizeof(NarrowShared<32>)};
    default:
      return {decode_kernel<kAlign>, kThreads, sizeof(Shared)};
  }
}

Decode decode_for(int heads_per_block, int alignment) {
  switch (alignment) {
    case 16:
      return decode_for<16>(heads_per_block);
    case 4:
      return decode_for<4>(heads_per_block);
    default:
      return decode_for<1>(heads_per_block);
  }
}

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

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
      const Decode decode = decode_for(heads, align);
      const cudaError_t status = cudaFuncSetAttribute(decode.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      static_cast<int>(decode.shared_bytes));
      if (status != cudaSuccess) return status;
    }
  }
  // The same split of L1 and shared memory for all kernels: changing it takes time. Setting it loads the kernel as
  // well.
  for (CombineKernel combine : {combine_kernel<kFewPartials>, combine_kernel<kManyPartials>}) {
    const cudaError_t status =
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
  // Items are no shorter than a tile, but for a token's last.
  const int64_t tiles =
      params.tokens * int64_t{ceil_div(params.scopes[0].topk + int64_t{params.scopes[1].topk}, kKeyTile)};
  int workers = static_cast<int>(std::min<int64_t>(params.plan.workers, std::max<int64_t>(1, tiles)));
  const int heads = heads_per_block(params.heads, workers, processors), blocks = ceil_div(params.heads, heads);
  workers = std::max(1, std::min(workers, processors / blocks));
  auto divisor = [](const Scope& scope) { return Divisor(scope.topk > 0 ? scope.cache.block_size : 1); };
  const DecodeArgs args = {params, {divisor(params.scopes[0]), divisor(params.scopes[1])}};
  const Decode decode = decode_for(heads, align);
  decode.kernel<<<dim3(blocks, workers), decode.threads, decode.shared_bytes, stream>>>(args);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;

  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  // Enough blocks to fill the device when few tokens are split many times, not so many that leaving costs time.
  const int units = (params.heads + kPartHeads - 1) / kPartHeads * kParts;
  const int spread = std::min(units / kCombineWarps, std::max(1, kCombineBlocks / params.tokens));
  config.gridDim = dim3(params.tokens, spread);
  config.blockDim = dim3(32 * kCombineWarps);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  const bool many = workers >= kManyPartials * params.tokens;  // a token's partials are about workers / tokens
  return cudaLaunchKernelEx(&config, many ? combine_kernel<kManyPartials> : combine_kernel<kFewPartials>, params);
}

}  // namespace jax_dsv4::cuda
