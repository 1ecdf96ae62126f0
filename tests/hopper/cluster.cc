// What clusters do, without a kernel that needs them: every thread sends its number to the next block.
#include "cuda/sm90.h"

using namespace jax_dsv4;

namespace {

// Bits, as in software_hopper.py.
enum Mistake : unsigned { kNoFence = 1, kNoClusterWait = 2, kNoWait = 4, kPlain = 8 };

constexpr unsigned kThreads = 64;

struct Shared {
  float2 came[kThreads];
  uint64_t all_came;
};

// An ordinary store beside each of the cluster's: kPlain reads it rather than what was sent.
float plain[::hopper::kMostClusterBlocks][kThreads];

void neighbours(unsigned mistakes, float* out) {
  Shared& shared = *reinterpret_cast<Shared*>(::hopper::block_memory());
  const unsigned at = blockIdx.x * kThreads + threadIdx.x;
  const int rank = sm90::cluster_rank(), next = (rank + 1) % sm90::cluster_size();
  if (threadIdx.x == 0) {
    sm90::barrier_init(&shared.all_came, 1);
    if (!(mistakes & kNoFence)) sm90::barrier_init_fence();
  }
  __syncthreads();
  sm90::cluster_arrive();
  if (threadIdx.x == 0) sm90::barrier_expect(&shared.all_came, sizeof shared.came);
  if (!(mistakes & kNoClusterWait)) sm90::cluster_wait();
  const auto number = static_cast<float>(at);
  plain[next][threadIdx.x] = number;
  sm90::store_cluster(&shared.came[threadIdx.x], &shared.all_came, next, float2{number, 0.f});
  if (!(mistakes & kNoWait)) sm90::barrier_wait(&shared.all_came, 0);
  out[at] = mistakes & kPlain ? plain[rank][threadIdx.x] : shared.came[threadIdx.x].x;
}

}  // namespace

// out: [clusters, blocks, kThreads]
extern "C" __attribute__((visibility("default"))) int hopper_neighbours(unsigned mistakes, unsigned clusters,
                                                                        unsigned blocks, float* out) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {blocks, 1, 1};
  const cudaLaunchConfig_t config = {clusters * blocks, kThreads, 1024, nullptr, &attribute, 1};
  return cudaLaunchKernelEx(&config, neighbours, mistakes, out);
}
