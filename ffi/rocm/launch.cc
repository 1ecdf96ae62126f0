#include "rocm/launch.h"

#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace jax_dsv4::rocm {
namespace {

enum Own : int { kPlan, kAmax, kPackQ, kPackSlots, kCheckItems, kCombine, kAppend, kOwnCount };
constexpr const char* kOwnNames[kOwnCount] = {"dsv4_plan",        "dsv4_amax",    "dsv4_pack_q",    "dsv4_pack_slots",
                                              "dsv4_check_items", "dsv4_combine", "dsv4_append_fp8"};

struct Device {
  std::string architecture;
  hip::Function own[kOwnCount] = {};
  std::map<std::string, hip::Function> aiter;  // by symbol
};

// Never destroyed: XLA's threads may outlive static destruction, and modules live as long as the process.
struct Modules {
  std::mutex mutex;
  std::string own_directory;
  std::map<int, Device> devices;
};
Modules& modules() {
  static Modules* m = new Modules;
  return *m;
}

std::string failure(const char* call, hip::Error error) {
  std::string unused;
  return std::string(call) + " failed: " + hip::api(&unused)->GetErrorString(error) + " (" + std::to_string(error) + ")";
}

std::string load_file(const std::string& path, hip::Module* module) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return "cannot read " + path;
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  std::string reason;
  const hip::Error error = hip::api(&reason)->ModuleLoadData(module, bytes.data());
  return error ? path + ": " + failure("hipModuleLoadData", error) : "";
}

std::string load_function(hip::Module module, const char* name, hip::Function* function) {
  std::string reason;
  const hip::Error error = hip::api(&reason)->ModuleGetFunction(function, module, name);
  return error ? failure("hipModuleGetFunction", error) + " for " + name : "";
}

// Makes a device current for as long as it lives.
class Current {
 public:
  Current(const hip::Api& api, int device) : api_(api) {
    api_.GetDevice(&before_);
    api_.SetDevice(device);
  }
  ~Current() { api_.SetDevice(before_); }

 private:
  const hip::Api& api_;
  int before_ = 0;
};

std::string load_locked(const hip::Api& api, int device, const AiterKernel* kernel) {
  Device& d = modules().devices[device];
  const Current current(api, device);
  std::string error;
  if (!d.own[kPlan]) {
    d.architecture = architecture_of(device, &error);
    if (d.architecture.empty()) return error;
    hip::Module module;
    error = load_file(modules().own_directory + "/dsv4_" + d.architecture + ".co", &module);
    hip::Function own[kOwnCount];
    for (int k = 0; k < kOwnCount && error.empty(); ++k) error = load_function(module, kOwnNames[k], &own[k]);
    if (!error.empty()) return error;
    std::copy(own, own + kOwnCount, d.own);
  }
  if (kernel && !d.aiter.count(kernel->symbol)) {
    hip::Module module;
    hip::Function function;
    error = load_file(kernel->file, &module);
    if (error.empty()) error = load_function(module, kernel->symbol.c_str(), &function);
    if (!error.empty()) return error;
    d.aiter[kernel->symbol] = function;
  }
  return "";
}

// The functions of a device, copied out under the lock.
std::string loaded(int device, const AiterKernel* kernel, std::vector<hip::Function>* own, hip::Function* aiter) {
  const std::lock_guard<std::mutex> lock(modules().mutex);
  const auto it = modules().devices.find(device);
  if (it == modules().devices.end() || !it->second.own[kPlan]) return "its kernels were not loaded on device " + std::to_string(device);
  own->assign(it->second.own, it->second.own + kOwnCount);
  if (!kernel) return "";
  const auto found = it->second.aiter.find(kernel->symbol);
  if (found == it->second.aiter.end()) return kernel->symbol + " was not loaded on device " + std::to_string(device);
  *aiter = found->second;
  return "";
}

std::string launch_bytes(hip::Function function, const char* name, int64_t grid, hip::Stream stream, void* arguments, size_t size) {
  if (grid == 0) return "";
  void* extra[] = {hip::kLaunchParamBufferPointer, arguments, hip::kLaunchParamBufferSize, &size, hip::kLaunchParamEnd};
  std::string reason;
  const hip::Error error = hip::api(&reason)->ModuleLaunchKernel(function, static_cast<unsigned>(grid), 1, 1, kThreads, 1, 1, 0, stream, nullptr, extra);
  return error ? failure("hipModuleLaunchKernel", error) + " for " + name : "";
}

template <typename Params>
std::string launch(const std::vector<hip::Function>& own, Own which, int64_t grid, hip::Stream stream, Params params) {
  return launch_bytes(own[which], kOwnNames[which], grid, stream, &params, sizeof params);
}

std::string clear(void* to, int64_t words, hip::Stream stream) {
  if (words == 0) return "";
  std::string reason;
  const hip::Error error = hip::api(&reason)->MemsetD32Async(to, 0, static_cast<size_t>(words), stream);
  return error ? failure("hipMemsetD32Async", error) : "";
}

}  // namespace

void set_kernel_directory(const std::string& path) { modules().own_directory = path; }

std::string architecture_of(int device, std::string* reason) {
  const hip::Api* api = hip::api(reason);
  if (!api) return "";
  hip::DeviceProperties properties;
  if (const hip::Error error = api->GetDeviceProperties(&properties, device)) {
    *reason = failure("hipGetDeviceProperties", error);
    return "";
  }
  const std::string name = properties.gcn_arch_name;  // "gfx950:sramecc+:xnack-"
  return name.substr(0, name.find(':'));
}

std::string load_modules(int device, const AiterKernel* kernel) {
  std::string reason;
  const hip::Api* api = hip::api(&reason);
  if (!api) return reason;
  const std::lock_guard<std::mutex> lock(modules().mutex);
  return load_locked(*api, device, kernel);
}

std::string enqueue_plan(int device, hip::Stream stream, const PlanParams& p) {
  std::vector<hip::Function> own;
  std::string error = loaded(device, nullptr, &own, nullptr);
  if (error.empty()) error = clear(p.work_info_set, 8ll * p.max_items, stream);
  if (error.empty()) error = clear(p.reduce_final_map, 2ll * p.tokens, stream);
  if (error.empty()) error = clear(p.reduce_partial_map, p.max_partials, stream);
  if (error.empty()) error = launch(own, kPlan, 1, stream, p);
  return error;
}

std::string enqueue_decode(int device, hip::Stream stream, const AiterKernel& kernel, const DecodeScopeParams& p) {
  std::vector<hip::Function> own;
  hip::Function aiter;
  std::string error = loaded(device, &kernel, &own, &aiter);
  if (!error.empty() || p.tokens == 0) return error;
  constexpr int kWavesPerBlock = kThreads / 64;
  error = launch(own, kAmax, kAmaxBlocks, stream, p);
  if (error.empty()) error = launch(own, kPackQ, static_cast<int64_t>(p.tokens) * p.folds * p.kernel_heads, stream, p);
  if (error.empty()) error = launch(own, kPackSlots, (p.tokens + kWavesPerBlock - 1) / kWavesPerBlock, stream, p);
  if (error.empty()) error = launch(own, kCheckItems, 1, stream, p);
  if (error.empty()) {
    std::vector<uint8_t> arguments = pack_arguments(kernel, p);
    error = launch_bytes(aiter, kernel.symbol.c_str(), static_cast<int64_t>(p.folds) * p.workers, stream, arguments.data(), arguments.size());
  }
  if (error.empty()) error = launch(own, kCombine, static_cast<int64_t>(p.tokens) * p.heads, stream, p);
  return error;
}

std::string enqueue_append(int device, hip::Stream stream, const AppendFp8Params& p) {
  std::vector<hip::Function> own;
  const std::string error = loaded(device, nullptr, &own, nullptr);
  if (!error.empty()) return error;
  constexpr int kWavesPerBlock = kThreads / 64;
  return launch(own, kAppend, (p.count + kWavesPerBlock - 1) / kWavesPerBlock, stream, p);
}

}  // namespace jax_dsv4::rocm
