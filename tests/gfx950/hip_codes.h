// Of HIP's C interface what the software GPU has beyond ffi/rocm/hip.h.
#ifndef TESTS_GFX950_HIP_CODES_H_
#define TESTS_GFX950_HIP_CODES_H_

#include "rocm/hip.h"

struct ihipEvent_t;
struct ihipGraph;
struct hipGraphNode;
struct hipGraphExec;

namespace jax_dsv4::hip {

using Event = ihipEvent_t*;
using Graph = ihipGraph*;
using GraphNode = hipGraphNode*;
using GraphExec = hipGraphExec*;

constexpr Error kErrorInvalidValue{1};
constexpr Error kErrorOutOfMemory{2};
constexpr Error kErrorInvalidConfiguration{9};
constexpr Error kErrorInvalidDevice{101};
constexpr Error kErrorInvalidImage{200};
constexpr Error kErrorNoBinaryForGpu{209};
constexpr Error kErrorInvalidHandle{400};
constexpr Error kErrorIllegalState{401};
constexpr Error kErrorNotFound{500};
constexpr Error kErrorIllegalAddress{700};
constexpr Error kErrorLaunchFailure{719};
constexpr Error kErrorStreamCaptureUnsupported{900};
constexpr Error kErrorStreamCaptureInvalidated{901};
constexpr Error kErrorStreamCaptureMerge{902};
constexpr Error kErrorStreamCaptureUnmatched{903};
constexpr Error kErrorStreamCaptureUnjoined{904};
constexpr Error kErrorStreamCaptureIsolation{905};
constexpr Error kErrorStreamCaptureImplicit{906};
constexpr Error kErrorCapturedEvent{907};
constexpr Error kErrorStreamCaptureWrongThread{908};

constexpr MemcpyKind kMemcpyDeviceToHost{2}, kMemcpyDefault{4};
constexpr CaptureStatus kCaptureStatusInvalidated{2};
enum CaptureMode : int { kCaptureModeGlobal = 0, kCaptureModeThreadLocal = 1, kCaptureModeRelaxed = 2 };

}  // namespace jax_dsv4::hip

#endif  // TESTS_GFX950_HIP_CODES_H_
