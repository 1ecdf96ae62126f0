// The part of the HIP runtime's C interface that is used here, declared by ourselves so that the wheel builds without
// ROCm. hip.cc checks each declaration against the real headers where they are installed.
#ifndef JAX_DSV4_ROCM_HIP_H_
#define JAX_DSV4_ROCM_HIP_H_

#include <cstddef>
#include <cstdint>

struct ihipStream_t;
struct ihipModule_t;
struct ihipModuleSymbol_t;
struct ihipEvent_t;
struct ihipGraph;
struct hipGraphExec;

namespace jax_dsv4::hip {

using Stream = ihipStream_t*;
using Module = ihipModule_t*;
using Function = ihipModuleSymbol_t*;
using Event = ihipEvent_t*;
using Graph = ihipGraph*;
using GraphExec = hipGraphExec*;

enum Error : int {
  kSuccess = 0,
  kErrorInvalidValue = 1,
  kErrorOutOfMemory = 2,
  kErrorInvalidConfiguration = 9,
  kErrorInvalidDevice = 101,
  kErrorInvalidImage = 200,
  kErrorNoBinaryForGpu = 209,
  kErrorInvalidHandle = 400,
  kErrorIllegalState = 401,
  kErrorNotFound = 500,
  kErrorIllegalAddress = 700,
  kErrorLaunchFailure = 719,
  kErrorStreamCaptureUnsupported = 900,
  kErrorStreamCaptureInvalidated = 901,
  kErrorStreamCaptureMerge = 902,
  kErrorStreamCaptureUnmatched = 903,
  kErrorStreamCaptureUnjoined = 904,
  kErrorStreamCaptureImplicit = 906,
  kErrorCapturedEvent = 907,
  kErrorStreamCaptureWrongThread = 908,
};

enum DeviceAttribute : int { kAttributeMultiprocessorCount = 63 };
enum MemcpyKind : int { kMemcpyHostToDevice = 1, kMemcpyDeviceToHost = 2, kMemcpyDeviceToDevice = 3, kMemcpyDefault = 4 };
enum CaptureMode : int { kCaptureModeGlobal = 0, kCaptureModeThreadLocal = 1, kCaptureModeRelaxed = 2 };
enum CaptureStatus : int { kCaptureStatusNone = 0, kCaptureStatusActive = 1, kCaptureStatusInvalidated = 2 };

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

}  // namespace jax_dsv4::hip

#endif  // JAX_DSV4_ROCM_HIP_H_
