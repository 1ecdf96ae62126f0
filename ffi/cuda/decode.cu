// Sparse MLA decode on Hopper. One persistent block per multiprocessor follows the plan's work items. Its warpgroups
// have one task each, a loop over the keys of the items, and hand shared memory on through barriers. In all kernels
//
//   produce (2)  slots to addresses, packed rows by cp.async, e4m3 to bf16; each a group of 32 keys     -> full
//
// and then, in many_heads_kernel, for 33 heads and more:
//
//   score        S[64 heads, 64 keys] = Q . K^T, softmax, P                  -> p_full
//   value (2)    O[64 heads, 256 of 512] += P . V, V being the very tile that was K; output            -> p_free, free
//
// or, in few_heads_kernel, for up to 8, 16 or 32 heads, which would pay for 64 in the other:
//
//   attend (2)   S^T[64 keys, heads] = K . Q^T, softmax, P, O^T[512, heads] += V^T . P^T, each of every other tile;
//                at an item's end the sum of both, output                                              -> free
//
// So tensor cores, conversion and memory are busy with different keys at the same time. Heads beyond 64 are further
// blocks that walk the same items at the same time and find the rows in L2. A token cut into several items leaves
// partials that a second, small kernel combines in key order; that kernel also answers tokens that have no item.
//
// Where all blocks run at once even if each token (and each 8 or 16 of its heads) has several, few_heads_kernel can do
// without the plan, the partials and the second kernel: the blocks of a token are a cluster, share its keys evenly, and
// add up what they have of O through each other's shared memory (cluster.h). There every instruction counts: most run
// once, and cost what fetching them costs. Which way is faster depends on the lengths, which the host does not know: if
// either may be, kernels of both are launched, and look (clusters_chosen).
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/combine.h"
#include "cuda/decode_kernels.h"
#include "cuda/launch.h"

namespace jax_dsv4::cuda {
namespace {

// Which of DecodeKernel::aligned reads the cache.
int alignment(const Cache& cache) {
  const uint64_t bits = reinterpret_cast<uint64_t>(cache.data) | static_cast<uint64_t>(cache.block_stride_bytes);
  return bits % 16 == 0 ? 0 : bits % 4 == 0 ? 1 : 2;
}

// The kernel that reads both scopes' caches; none if there is none.
DecodeKernel::Function reader(const DecodeKernel& kernel, const Scope (&scopes)[2]) {
  int align = 0;
  bool fp8 = true, v41 = true, bf16 = true;  // what all caches may be called
  for (const Scope& scope : scopes) {
    if (scope.topk == 0) continue;
    const Layout layout = scope.cache.layout;
    if (layout == Layout::kFloat32) return nullptr;
    fp8 &= layout == Layout::kFp8DsMla;
    v41 &= layout == Layout::kMxfp8 || layout == Layout::kNvfp4;
    bf16 &= layout == Layout::kBf16;
    align = std::max(align, alignment(scope.cache));
  }
  if (fp8) return kernel.aligned[align];
  if (align > 0) return kernel.any_layout[1];
  return v41 ? kernel.v41 : bf16 ? kernel.bf16 : kernel.any_layout[0];
}

DecodeKernel kernel_for(int heads_per_block, bool cluster) {
  switch (heads_per_block) {
    case 8:
      return cluster ? few_heads<ClusterWork, 8>() : few_heads<PlannedWork, 8>();
    case 16:
      return cluster ? few_heads<ClusterWork, 16>() : few_heads<PlannedWork, 16>();
    case 32:
      return few_heads<PlannedWork, 32>();
    default:
      return many_heads();
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
struct ClusterShape {
  int heads, blocks;
  float start, tile;  // see Times
};

// What a choice must be worth, at most: kernels that leave at once take some microseconds too.
constexpr float kChoice = 10.f;
constexpr float kUsualTiles = 18.f;  // of a token: a window of 128 and 1024 compressed entries

// The shape that takes least for tokens of usual lengths, in microseconds on an H100, measured: a start and an end, the
// tiles that a block has to attend to in turn, and the pairs of slices that it adds up. Not for topk, of which most
// tokens may have a small part.
ClusterShape best_cluster_shape(int64_t tokens, int heads, int device, int processors) {
  ClusterShape best = {0, 0, INFINITY, 0.f};
  for (int n : {8, 16}) {
    const int slices = kLatentDim / 64 * n / 8;
    const int64_t clusters = tokens * ceil_div(heads, n);
    for (int blocks = 2; blocks <= kMostClusterBlocks && clusters * blocks <= processors; ++blocks) {
      int own = slices;  // of a block that has any; `blocks` halved until one is left
      for (int b = blocks; b > 1 && own > 1; b /= 2) own /= 2;
      if (own * blocks > kMostClusterBlocks || clusters > clusters_of(device).at_once[n / 16][blocks]) continue;
      const float start = (n == 8 ? 5.6f : 6.5f) + 0.5f * (ceil_div(own, 2) - 1) + 0.04f * blocks;
      const float tile = n == 8 ? 1.8f : 2.1f;
      auto usual = [](float start, float tile, int blocks) {
        return start + tile * std::max(0.f, kUsualTiles / blocks - 1);
      };
      if (best.blocks == 0 || usual(start, tile, blocks) < usual(best.start, best.tile, best.blocks)) {
        best = {n, blocks, start, tile};
      }
    }
  }
  return best;
}

Times times_of(const ClusterShape& shape, int heads, int processors) {
  const float start = heads <= 16 ? 8.9f : heads <= kFewHeads ? 11.5f : 12.3f;
  const float tile = heads <= 16 ? 2.2f : heads <= kFewHeads ? 2.4f : 4.2f;
  return {shape.start, shape.tile, start, tile * ceil_div(heads, kHeadsPerBlock) / processors, shape.blocks};
}

// A cluster has block x of the grid's x, all of y, and token z.
cudaLaunchConfig_t cluster_config(const DecodeKernel& decode, dim3 grid, cudaStream_t stream,
                                  cudaLaunchAttribute* cluster) {
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

int heads_per_block(int heads) {
  for (int n : {8, 16, kFewHeads}) {
    if (heads <= n) return n;
  }
  return kHeadsPerBlock;
}

}  // namespace

cudaError_t prepare_decode() {
  for (int heads : {8, 16, 32, kHeadsPerBlock}) {
    for (bool cluster : {false, true}) {
      const DecodeKernel decode = kernel_for(heads, cluster);
      for (auto kernel : {decode.aligned[0], decode.aligned[1], decode.aligned[2], decode.v41, decode.bf16,
                          decode.any_layout[0], decode.any_layout[1]}) {
        cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(decode.shared_bytes));
        if (status == cudaSuccess && cluster) {
          status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
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
      const DecodeKernel decode = kernel_for(heads, true);
      cudaLaunchAttribute cluster;
      const cudaLaunchConfig_t config = cluster_config(decode, dim3(1, blocks), nullptr, &cluster);
      int* const at_once = &clusters_of(device).at_once[heads / 16][blocks];
      if (cudaOccupancyMaxActiveClusters(at_once, decode.aligned[0], &config) != cudaSuccess) {
        *at_once = 0;
        cudaGetLastError();  // a size that this device does not have is no error
      }
    }
  }
  return prepare_combine();
}

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  if (params.q_dtype != Dtype::kBf16) return cudaErrorNotSupported;
  if (reader(many_heads(), params.scopes) == nullptr) return cudaErrorNotSupported;
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  // Who does the work follows from tokens, heads and lengths, never from topk. But nothing else need be launched where
  // clusters are the better choice if all tokens are as long as can be, and not much worse if one is.
  const ClusterShape shape = best_cluster_shape(params.tokens, params.heads, device, processors);
  const bool clusters = shape.blocks > 0 && !params.batch_invariant;
  const Times times = times_of(shape, params.heads, processors);
  Times lenient = times;
  lenient.planned_start += kChoice;
  const int most = ceil_div(params.scopes[0].topk + int64_t{params.scopes[1].topk}, kKeyTile);
  const bool open =
      clusters && !(prefers_clusters(times, params.tokens * most, most) && prefers_clusters(lenient, most, most));
  auto divisor = [](const Scope& scope) { return Divisor(scope.topk > 0 ? scope.cache.block_size : 1); };
  const DecodeArgs args = {
      params, {divisor(params.scopes[0]), divisor(params.scopes[1])}, Divisor(std::max(1, shape.blocks)), times, open};
  if (clusters) {
    const DecodeKernel decode = kernel_for(shape.heads, true);
    cudaLaunchAttribute cluster;
    const dim3 grid(ceil_div(params.heads, shape.heads), shape.blocks, params.tokens);
    const cudaLaunchConfig_t config = cluster_config(decode, grid, stream, &cluster);
    status = cudaLaunchKernelEx(&config, reader(decode, params.scopes), args);
    if (status != cudaSuccess || !open) return status;
  }

  const int heads = heads_per_block(params.heads), blocks = ceil_div(params.heads, heads);
  const int workers = std::max(1, std::min(params.plan.workers, processors / blocks));
  const DecodeKernel decode = kernel_for(heads, false);
  cudaLaunchAttribute overlap = overlapping();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, workers);
  config.blockDim = dim3(decode.threads);
  config.dynamicSmemBytes = decode.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = open;  // beside the clusters, should these leave at once
  status = cudaLaunchKernelEx(&config, reader(decode, params.scopes), args);
  return status == cudaSuccess ? launch_combine(args, workers, stream) : status;
}

}  // namespace jax_dsv4::cuda
