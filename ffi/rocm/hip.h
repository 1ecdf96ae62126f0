// The part of the HIP runtime's C interface that is used here, declared by ourselves so that the wheel builds without
// ROCm. hip.cc checks each declaration against the real headers where they are installed.
#ifndef JAX_DSV4_ROCM_HIP_H_
#define JAX_DSV4_ROCM_HIP_H_

#include <cstddef>
#include <cstdint>
#include <string>

struct ihipStream_t;
struct ihipModule_t;
struct ihipModuleSymbol_t;

namespace jax_dsv4::hip {

using Stream = ihipStream_t*;
using Module = ihipModule_t*;
using Function = ihipModuleSymbol_t*;

enum Error : int { kSuccess = 0 };  // any other: what GetErrorString says
enum DeviceAttribute : int { kAttributeMultiprocessorCount = 63 };
enum MemcpyKind : int { kMemcpyHostToDevice = 1, kMemcpyDeviceToDevice = 3 };
enum CaptureStatus : int { kCaptureStatusNone = 0, kCaptureStatusActive = 1 };

// Markers in hipModuleLaunchKernel's `extra`: the arguments come as one packed buffer.
inline void* const kLaunchParamBufferPointer = reinterpret_cast<void*>(1);
inline void* const kLaunchParamBufferSize = reinterpret_cast<void*>(2);
inline void* const kLaunchParamEnd = reinterpret_cast<void*>(3);

// hipDeviceProp_tR0600, of which one field matters: the architecture, as in "gfx950:sramecc+:xnack-".
struct DeviceProperties {
  char name[1160];
  char gcn_arch_name[256];
  char rest[56];
};
static_assert(sizeof(DeviceProperties) == 1472, "hipDeviceProp_tR0600");

// The functions that are used, found in the HIP library when first asked for.
struct Api {
  Error (*GetDeviceCount)(int* count);
  Error (*GetDevice)(int* device);
  Error (*SetDevice)(int device);
  Error (*DeviceGetAttribute)(int* value, DeviceAttribute attribute, int device);
  Error (*GetDeviceProperties)(DeviceProperties* properties, int device);
  Error (*Malloc)(void** pointer, size_t bytes);  // these three in the initialize stage only
  Error (*Free)(void* pointer);
  Error (*StreamSynchronize)(Stream stream);
  Error (*ModuleLoadData)(Module* module, const void* image);
  Error (*ModuleGetFunction)(Function* function, Module module, const char* name);
  Error (*ModuleLaunchKernel)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                              unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream,
                              void** parameters, void** extra);
  Error (*MemsetD32Async)(void* to, int value, size_t count, Stream stream);
  Error (*MemcpyAsync)(void* to, const void* from, size_t bytes, MemcpyKind kind, Stream stream);
  Error (*StreamIsCapturing)(Stream stream, CaptureStatus* status);
  const char* (*GetErrorString)(Error error);
  Error (*RuntimeGetVersion)(int* version);
};

// The HIP library: the one that JAX_DSV4_HIP_LIBRARY names, or libamdhip64.so.7, or libamdhip64.so. Null, with the
// reason, if there is none. The same answer for the life of the process.
const Api* api(std::string* reason);

// Where the HIP library is and its version, or why there is none.
std::string describe();

// Lets libraries that are loaded from now on find the HIP library's symbols.
bool expose_globally(std::string* reason);

}  // namespace jax_dsv4::hip

#endif  // JAX_DSV4_ROCM_HIP_H_
