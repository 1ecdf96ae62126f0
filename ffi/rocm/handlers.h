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

// What an append begins with where XLA could not alias the cache and the result.
inline std::string copy_unless_aliased(const ffi::AnyBuffer& from, void* to, hip::Stream stream) {
  std::string reason;
  const hip::Api* api = hip::api(&reason);
  if (!api || to == from.untyped_data()) return reason;
  const bool failed = api->MemcpyAsync(to, from.untyped_data(), from.size_bytes(), hip::kMemcpyDeviceToDevice, stream);
  return failed ? "hipMemcpyAsync failed" : "";
}

using Stream = ffi::PlatformStream<hip::Stream>;
inline auto on_stream() { return ffi::Ffi::Bind().Ctx<Stream>().Ctx<ffi::DeviceOrdinal>(); }
constexpr ffi::Traits kCapturable = ffi::Traits::kCmdBufferCompatible;

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_HANDLERS_H_
