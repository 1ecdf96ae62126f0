// The kernel for few heads: two roles attend, each to every other tile. Instantiated by few_heads_*.cu and
// cluster_*.cu.
#ifndef JAX_DSV4_CUDA_FEW_HEADS_KERNEL_H_
#define JAX_DSV4_CUDA_FEW_HEADS_KERNEL_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/any_layout.h"
#include "cuda/attend.h"
#include "cuda/decode_kernels.h"
#include "cuda/producer.h"
#include "cuda/shared.h"

namespace jax_dsv4::cuda {

template <typename Work, int kHeads>
struct FewHeadsRoles {
  using Memory = AttendShared<Work, kHeads>;
  static constexpr int kWarpgroups = Memory::kProducers + Memory::kAttending, kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kLaunchRegisters = launch_registers(kThreads);
  static constexpr int kAttendingRegisters = kHeads <= 16 ? 128 : 208;  // 4 * kHeads of them accumulators
  static constexpr int kProducerRegisters =
      (kWarpgroups * kLaunchRegisters - Memory::kAttending * kAttendingRegisters) / Memory::kProducers / 8 * 8;
};

template <typename Work, template <int, typename> typename Copies, int kAlign, int kHeads>
__global__ void __launch_bounds__(FewHeadsRoles<Work, kHeads>::kThreads, 1)
    few_heads_kernel(const __grid_constant__ DecodeArgs args) {
  using Roles = FewHeadsRoles<Work, kHeads>;
  using Memory = typename Roles::Memory;
  static_assert(sizeof(Memory) <= kMostSharedBytes);
  if (leaves(args, Work::kCluster)) return;
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
      barrier_init(&shared.slices_sent, 1);
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
    produce<Work, Copies<kAlign, Memory>>(args, shared, role);
  } else {
    registers_change<Roles::kLaunchRegisters, Roles::kAttendingRegisters>();
    attend<Work, kHeads>(args, shared, role - Memory::kProducers);
  }
}

template <typename Work, int kHeads>
DecodeKernel few_heads() {
  using Roles = FewHeadsRoles<Work, kHeads>;
  return {{few_heads_kernel<Work, Fp8DsMlaCopies, 16, kHeads>, few_heads_kernel<Work, Fp8DsMlaCopies, 4, kHeads>,
           few_heads_kernel<Work, Fp8DsMlaCopies, 1, kHeads>},
          few_heads_kernel<Work, V41Copies, 16, kHeads>,
          few_heads_kernel<Work, Bf16Copies, 16, kHeads>,
          {few_heads_kernel<Work, AnyLayoutCopies, 16, kHeads>, few_heads_kernel<Work, AnyLayoutCopies, 1, kHeads>},
          Roles::kThreads,
          sizeof(typename Roles::Memory)};
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_FEW_HEADS_KERNEL_H_
