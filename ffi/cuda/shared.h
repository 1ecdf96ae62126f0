// What the roles of a decoding block share: the geometry, and the shared memory that they hand on through barriers.
#ifndef JAX_DSV4_CUDA_SHARED_H_
#define JAX_DSV4_CUDA_SHARED_H_

#include <cstdint>

#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/sm90.h"

namespace jax_dsv4::cuda {

using namespace sm90;

constexpr int kGroupKeys = 32;  // a tile is filled, and freed, in halves
constexpr int kGroups = kKeyTile / kGroupKeys;
constexpr int kRowBytes = 128;  // of a plane: 64 bf16, what the 128-byte swizzle spans
constexpr int kPlanes = kLatentDim / 64;
constexpr int kPlaneBytes = kKeyTile * kRowBytes;

constexpr int kWarpgroup = 128;
constexpr int kWarps = kWarpgroup / 32;
constexpr int kKeysPerWarp = kGroupKeys / kWarps;
static_assert(kKeysPerWarp == 8, "a row of swizzled units, and a word of `valid`");

// What a thread has of the multiprocessor's registers when a block of so many is launched.
constexpr int launch_registers(int threads) { return 65536 / threads / 8 * 8; }

// Of 8 keys of a tile, whether key i is attended to, by their word of `valid`: the votes of the lanes that copied them.
constexpr int kLanesPerKey = 32 / kKeysPerWarp;
constexpr uint32_t kAllValid = ~0u;
__device__ __forceinline__ bool is_valid(uint32_t word, int i) { return word >> (kLanesPerKey * i) & 1; }

// So that the compiler knows warps to be of one role.
__device__ __forceinline__ int role_of_warp() { return __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0); }

struct __align__(1024) ManyHeadsShared {
  static constexpr int kTiles = 2;
  static constexpr int kProducers = 2;     // warpgroups, one to each group of a tile
  static constexpr int kPiecesAhead = 4;   // copies that a producing lane has on their way, in this group or the next
  static constexpr int kPiecesAtOnce = 1;  // that a lane waits for and converts

  // Planes of 64 dimensions: [rows][64] bf16, swizzled, as wgmma reads them.
  uint8_t q[kPlanes][kHeadsPerBlock * kRowBytes];
  uint8_t k[kTiles][kPlanes][kPlaneBytes];
  uint8_t p[2][kHeadsPerBlock * kRowBytes];  // [heads][64 keys]; one is written while the other is read
  // Packed bytes on their way, a ring of pieces per producing warp; a lane reads only what it copied.
  uint4 packed[kProducers * kWarps][kPiecesAhead][32];
  uint2 scales[kProducers * kWarps][4][kKeysPerWarp];
  uint32_t valid[kTiles][kKeyTile / kKeysPerWarp];  // see is_valid()
  float factor[2][kHeadsPerBlock];  // rescales the accumulators before P is added; an item's last one normalises
  uint64_t full[kTiles][kGroups], free[kTiles][kGroups];
  uint64_t factor_full[2], p_full[2], p_free[2];
};
constexpr size_t kMostSharedBytes = 227 * 1024;  // of a block on Hopper
static_assert(sizeof(ManyHeadsShared) <= kMostSharedBytes);

// Where a role is in a ring of `kSize` places. A place's barriers complete a phase per use.
template <int kSize>
struct RingCursor {
  int count = 0;
  __device__ int place() const { return count % kSize; }
  __device__ uint32_t filled() const { return count / kSize % 2; }     // parity to wait for before reading
  __device__ uint32_t freed() const { return count / kSize % 2 ^ 1; }  // and before writing
  __device__ void next() { ++count; }
};

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_SHARED_H_
