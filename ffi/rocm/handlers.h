// What the files of ROCm handlers share.
#ifndef JAX_DSV4_ROCM_HANDLERS_H_
#define JAX_DSV4_ROCM_HANDLERS_H_

#include <string>

#include "common/check.h"
#include "rocm/hip.h"

namespace jax_dsv4::rocm {

inline ffi::Error status(const char* op, const std::string& error) {
  return error.empty() ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInternal, std::string(op) + ": " + error);
}

using Stream = ffi::PlatformStream<hip::Stream>;
inline auto on_stream() { return ffi::Ffi::Bind().Ctx<Stream>().Ctx<ffi::DeviceOrdinal>(); }
constexpr ffi::Traits kCapturable = ffi::Traits::kCmdBufferCompatible;

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_HANDLERS_H_
