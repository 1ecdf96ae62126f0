#include "rocm/hip.h"

#include <dlfcn.h>

#include <cstdlib>

// Where the real headers are, our declarations must agree with them.
#if __has_include(<hip/hip_runtime_api.h>)
#ifndef __HIP_PLATFORM_AMD__
#define __HIP_PLATFORM_AMD__ 1
#endif
#include <hip/hip_runtime_api.h>

#include <type_traits>

namespace jax_dsv4::hip {
#define SAME(ours, theirs) static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #theirs)
SAME(kSuccess, ::hipSuccess);
SAME(kAttributeMultiprocessorCount, ::hipDeviceAttributeMultiprocessorCount);
SAME(kMemcpyHostToDevice, ::hipMemcpyHostToDevice);
SAME(kMemcpyDeviceToDevice, ::hipMemcpyDeviceToDevice);
SAME(kCaptureStatusNone, ::hipStreamCaptureStatusNone);
SAME(kCaptureStatusActive, ::hipStreamCaptureStatusActive);
#undef SAME
static_assert(std::is_same_v<Stream, ::hipStream_t> && std::is_same_v<Module, ::hipModule_t> &&
              std::is_same_v<Function, ::hipFunction_t>);
static_assert(sizeof(DeviceProperties) == sizeof(::hipDeviceProp_tR0600) &&
              offsetof(DeviceProperties, gcn_arch_name) == offsetof(::hipDeviceProp_tR0600, gcnArchName));
// The signatures, as far as enumerations passed as int allow.
static_assert(std::is_same_v<decltype(::hipModuleLaunchKernel),
                             ::hipError_t(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                          unsigned, Stream, void**, void**)>);
static_assert(std::is_same_v<decltype(::hipMemsetD32Async), ::hipError_t(void*, int, size_t, Stream)>);
}  // namespace jax_dsv4::hip
#endif

namespace jax_dsv4::hip {
namespace {

struct Found {
  Api api{};
  std::string reason;  // why there is none
  std::string name;    // of the library
};

template <typename F>
bool resolve(void* library, const char* name, F* function, std::string* reason) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  if (*function) return true;
  *reason = std::string("the HIP library has no ") + name;
  return false;
}

Found find() {
  Found found;
  const char* named = std::getenv("JAX_DSV4_HIP_LIBRARY");
  void* library = nullptr;
  if (named) {
    library = dlopen(named, RTLD_NOW | RTLD_LOCAL);
    found.name = named;
  } else {
    for (const char* name : {"libamdhip64.so.7", "libamdhip64.so"}) {
      if (library) break;
      library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      found.name = name;
    }
  }
  if (!library) {
    found.reason =
        std::string("no HIP library: ") + dlerror() + " (install ROCm, or name libamdhip64.so in JAX_DSV4_HIP_LIBRARY)";
    return found;
  }
  Api& a = found.api;
  std::string* r = &found.reason;
  (void)(resolve(library, "hipGetDeviceCount", &a.GetDeviceCount, r) &&
         resolve(library, "hipGetDevice", &a.GetDevice, r) && resolve(library, "hipSetDevice", &a.SetDevice, r) &&
         resolve(library, "hipDeviceGetAttribute", &a.DeviceGetAttribute, r) &&
         resolve(library, "hipGetDevicePropertiesR0600", &a.GetDeviceProperties, r) &&
         resolve(library, "hipMalloc", &a.Malloc, r) && resolve(library, "hipFree", &a.Free, r) &&
         resolve(library, "hipStreamSynchronize", &a.StreamSynchronize, r) &&
         resolve(library, "hipModuleLoadData", &a.ModuleLoadData, r) &&
         resolve(library, "hipModuleGetFunction", &a.ModuleGetFunction, r) &&
         resolve(library, "hipModuleLaunchKernel", &a.ModuleLaunchKernel, r) &&
         resolve(library, "hipMemsetD32Async", &a.MemsetD32Async, r) &&
         resolve(library, "hipMemcpyAsync", &a.MemcpyAsync, r) &&
         resolve(library, "hipStreamIsCapturing", &a.StreamIsCapturing, r) &&
         resolve(library, "hipGetErrorString", &a.GetErrorString, r) &&
         resolve(library, "hipRuntimeGetVersion", &a.RuntimeGetVersion, r));
  return found;
}

const Found& the_library() {
  static const Found* found = new Found(find());
  return *found;
}

}  // namespace

const Api* api(std::string* reason) {
  const Found& found = the_library();
  if (found.reason.empty()) return &found.api;
  *reason = found.reason;
  return nullptr;
}

std::string describe() {
  std::string reason;
  const Api* a = api(&reason);
  if (!a) return reason;
  Dl_info where{};
  int version = 0;
  const bool found = dladdr(reinterpret_cast<void*>(a->Malloc), &where) != 0;
  a->RuntimeGetVersion(&version);
  return std::string(found ? where.dli_fname : the_library().name.c_str()) + ", version " + std::to_string(version);
}

bool expose_globally(std::string* reason) {
  if (!api(reason)) return false;
  if (dlopen(the_library().name.c_str(), RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL)) return true;
  *reason = dlerror();
  return false;
}

}  // namespace jax_dsv4::hip
