// The kernel for many heads: one role scores, two accumulate values.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/any_layout.h"
#include "cuda/decode_kernels.h"
#include "cuda/producer.h"
#include "cuda/scores.h"
#include "cuda/shared.h"
#include "cuda/values.h"

namespace jax_dsv4::cuda {
namespace {

// setmaxnreg takes multiples of 8; together what the block was launched with.
constexpr int kThreads = (ManyHeadsShared::kProducers + 1 + 2) * kWarpgroup;
constexpr int kLaunchRegisters = launch_registers(kThreads);
constexpr int kValuesRegisters = 160;  // 128 of them accumulators

template <template <int, typename> typename Copies, int kAlign>
__global__ void __launch_bounds__(kThreads, 1) many_heads_kernel(const __grid_constant__ DecodeArgs args) {
  if (leaves(args, false)) return;
  extern __shared__ __align__(1024) uint8_t memory[];
  ManyHeadsShared& shared = *reinterpret_cast<ManyHeadsShared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < ManyHeadsShared::kTiles; ++i) {
      for (int g = 0; g < kGroups; ++g) {
        barrier_init(&shared.full[i][g], kWarps);
        barrier_init(&shared.free[i][g], 2 * kWarps);  // the warps of both halves of the values
      }
    }
    // Whole warps arrive here, for every lane has ordinary data to hand on.
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.factor_full[i], kWarpgroup);
      barrier_init(&shared.p_full[i], kWarpgroup);
      barrier_init(&shared.p_free[i], 2 * kWarpgroup);
    }
    barrier_init_fence();
  }
  __syncthreads();
  // The combining kernel may take the multiprocessors that this one leaves; it waits for all of this one before it
  // reads.
  cudaTriggerProgrammaticLaunchCompletion();

  constexpr int kProducerRegisters = Copies<kAlign, ManyHeadsShared>::kRegisters;
  constexpr int kScoresRegisters = kLaunchRegisters * (kThreads / kWarpgroup) - 2 * kValuesRegisters -
                                   ManyHeadsShared::kProducers * kProducerRegisters;
  const int role = role_of_warp();
  if (role < ManyHeadsShared::kProducers) {
    registers_change<kLaunchRegisters, kProducerRegisters>();
    produce<PlannedWork, Copies<kAlign, ManyHeadsShared>>(args, shared, role);
  } else if (role == ManyHeadsShared::kProducers) {
    registers_change<kLaunchRegisters, kScoresRegisters>();
    score(args, shared);
  } else {
    registers_change<kLaunchRegisters, kValuesRegisters>();
    value(args, shared, role - ManyHeadsShared::kProducers - 1);
  }
}

}  // namespace

DecodeKernel many_heads() {
  return {{many_heads_kernel<Fp8DsMlaCopies, 16>, many_heads_kernel<Fp8DsMlaCopies, 4>,
           many_heads_kernel<Fp8DsMlaCopies, 1>},
          many_heads_kernel<V41Copies, 16>,
          many_heads_kernel<Bf16Copies, 16>,
          {many_heads_kernel<AnyLayoutCopies, 16>, many_heads_kernel<AnyLayoutCopies, 1>},
          kThreads,
          sizeof(ManyHeadsShared)};
}

}  // namespace jax_dsv4::cuda
