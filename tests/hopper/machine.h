// The threads, barriers, asynchronous copies and products of a Hopper, in software: what tests/hopper's CUDA headers
// are made of. Every CUDA thread is a fiber of one host thread, so a run is deterministic, given `schedule`.
//
// Under ThreadSanitizer every fiber has a clock of its own, and only what orders memory on the GPU orders it here:
// __syncwarp, bar.sync, mbarriers, the ends of kernels, not a shuffle, a vote or the cluster's barrier, which is a
// relaxed one. The tensor cores read through the async proxy: a second clock of each thread, which takes over what the
// first has seen only at fence.proxy.async, and to which what they read belongs, from the issue of a product to the
// wait for it. Stores to other blocks have a clock too, one of each block that sends, which has seen nothing of it.
#ifndef TESTS_HOPPER_MACHINE_H_
#define TESTS_HOPPER_MACHINE_H_

#include <cstddef>
#include <cstdint>
#include <functional>

namespace hopper {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

}  // namespace hopper

// Of the thread that runs.
extern hopper::Index threadIdx, blockIdx, blockDim, gridDim;

namespace hopper {

// Of its block.
uint8_t* block_memory();                  // dynamic shared memory; garbage at a block's start
uint32_t shared_address(const void* at);  // in the 32-bit window
uint8_t* at_shared_address(uint32_t address, size_t bytes);

// --- launches. Clusters run one after another, each to its end, the blocks of one together. -> whether all did; else
// error() says why not.

constexpr unsigned kMostClusterBlocks = 16;
bool launch(Index grid, Index block, Index cluster, size_t shared_bytes, const std::function<void()>& kernel);
const char* error();
[[noreturn]] void fail(const char* why);  // by a thread of a kernel

struct Options {
  int processors = 132;
  uint32_t schedule = 0;  // 0: threads in turn; else a seed: always another of those that can run
};
Options& options();

// --- warps. All 32 lanes take part; values are bits.

void sync_warp();
uint64_t shuffle(uint64_t value, int from_lane);
void gather(uint64_t value, uint64_t (&all)[32]);

// --- barriers

void sync_block(int id, int threads);  // 0 threads: all of the block
void barrier_init(const uint64_t* barrier, uint32_t arrivals);
void barrier_init_fence();
void barrier_arrive(const uint64_t* barrier);
void barrier_expect(const uint64_t* barrier, uint32_t bytes);
void barrier_wait(const uint64_t* barrier, uint32_t parity);

// --- clusters. Their barrier awaits the threads that have not ended, and orders nothing but initialised mbarriers. A
// store goes to the same place in another block, which is garbage until it lands, late, and reports its bytes there.

int cluster_rank();
int cluster_size();
void cluster_arrive();
void cluster_wait();
void store_cluster(const void* to, const uint64_t* barrier, int rank, const void* value, int bytes);

// --- cp.async: the target is garbage from the issue to the wait

void copy_async(void* to, const void* from, int bytes, int real_bytes);
void commit_copies();
void wait_for_copies(int pending_groups);

// --- wgmma: D is NaN from the issue to the wait

struct Matrix {
  uint64_t descriptor;
  bool transposed;  // the contraction goes from row to row
};
void multiply(float* d, int columns, Matrix a, Matrix b, bool accumulate);
void commit_products();
void wait_for_products(int pending_groups);
void fence_proxy_async();

}  // namespace hopper

#endif  // TESTS_HOPPER_MACHINE_H_
