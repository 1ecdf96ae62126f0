// Of CUDA C++ what ffi/cuda/ uses, as C++ over machine.h. software_hopper.py turns launches and dynamic shared memory,
// which have a syntax of their own, into calls.
#ifndef TESTS_HOPPER_CUDA_RUNTIME_H_
#define TESTS_HOPPER_CUDA_RUNTIME_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"
#include "machine.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Blocks run one after another, except those of a cluster: a kernel that is launched in clusters must not have any,
// only dynamic shared memory, which every block has its own of.
#define __shared__ static

// --- vectors

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};

// --- arithmetic

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __vcmpgtu4(uint32_t a, uint32_t b) {
  uint32_t all = 0;
  for (int i = 0; i < 32; i += 8) all |= (a >> i & 0xff) > (b >> i & 0xff) ? uint32_t{0xff} << i : 0;
  return all;
}

// --- warps: all lanes take part, whatever the mask

inline void __syncwarp() { ::hopper::sync_warp(); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof value);
  bits = static_cast<uint32_t>(::hopper::shuffle(bits, lane));
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane < lanes ? lane : lane - lanes);
}
inline uint32_t __ballot_sync(unsigned, bool vote) {
  uint64_t all[32];
  ::hopper::gather(vote, all);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i]) << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline uint32_t __match_any_sync(unsigned, int value) {
  uint64_t all[32];
  ::hopper::gather(static_cast<uint32_t>(value), all);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t{all[i] == static_cast<uint32_t>(value)} << i;
  return bits;
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
  uint64_t all[32];
  ::hopper::gather(static_cast<uint32_t>(value), all);
  uint32_t sum = 0;
  for (uint64_t x : all) sum += static_cast<uint32_t>(x);
  return static_cast<T>(sum);
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  uint64_t all[32];
  ::hopper::gather(static_cast<uint32_t>(value), all);
  for (uint64_t x : all) value = max(value, static_cast<T>(x));
  return value;
}

// --- blocks

inline void __syncthreads() { ::hopper::sync_block(0, 0); }
inline uint32_t atomicOr(uint32_t* at, uint32_t bits) { return __atomic_fetch_or(at, bits, __ATOMIC_RELAXED); }

// --- launches: kernels run to their end, one after another

struct dim3 : ::hopper::Index {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Index{x, y, z} {}
};

namespace hopper {
inline cudaError_t last_error = cudaSuccess;

template <typename Kernel>
void launch_kernel(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const Kernel& kernel, dim3 cluster = {}) {
  last_error = launch(grid, block, cluster, shared_bytes, kernel) ? cudaSuccess : cudaErrorLaunchFailure;
}
}  // namespace hopper

inline cudaError_t cudaGetLastError() { return ::hopper::last_error; }

inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() {}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace hopper {
inline dim3 cluster_of(const cudaLaunchConfig_t& config) {
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
  }
  return cluster;
}
}  // namespace hopper

template <typename Kernel, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel* kernel, const Arguments&... arguments) {
  ::hopper::launch_kernel(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, [&] { kernel(arguments...); },
      ::hopper::cluster_of(*config));
  return cudaGetLastError();
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = ::hopper::options().processors;
  return cudaSuccess;
}

// As if any processors could form a cluster, each held one block, and there were enough for one.
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  const dim3 cluster = ::hopper::cluster_of(*config);
  const uint64_t blocks = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (blocks == 0 || blocks > ::hopper::kMostClusterBlocks) return cudaErrorInvalidValue;
  *clusters = max(1, ::hopper::options().processors / static_cast<int>(blocks));
  return cudaSuccess;
}

#endif  // TESTS_HOPPER_CUDA_RUNTIME_H_
