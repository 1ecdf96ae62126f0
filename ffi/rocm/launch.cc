#include "rocm/launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace jax_dsv4::rocm {
namespace {

constexpr int kWave = 64;

enum Own : int {
  kPlan,
  kMetadataInputs,
  kMetadataFinish,
  kAmax,
  kPackQ,
  kPackSlots,
  kCheckItems,
  kCombine,
  kAppend,
  kCountSlots,
  kGatherSlots,
  kCombineSplits,
  kAppendPacked,
  kOwnCount
};
constexpr const char* kOwnNames[kOwnCount] = {
    "dsv4_plan",         "dsv4_metadata_inputs", "dsv4_metadata_finish", "dsv4_amax",   "dsv4_pack_q",
    "dsv4_pack_slots",   "dsv4_check_items",     "dsv4_combine",         "dsv4_append", "dsv4_count_slots",
    "dsv4_gather_slots", "dsv4_combine_splits",  "dsv4_append_packed"};

struct Device {
  hip::Function own[kOwnCount] = {};
  std::map<std::string, hip::Function> aiter;  // by file
};

// Never destroyed: XLA's threads may outlive static destruction, and modules live as long as the process.
struct Modules {
  std::mutex mutex;
  std::string own_directory;
  std::map<int, Device> devices;
  std::string builders_directory;
  std::map<int, decltype(&dsv4_aiter_metadata)> metadata;  // by device, once it has the builder's code
};
Modules& modules() {
  static Modules* m = new Modules;
  return *m;
}

std::string failure(const char* call, hip::Error error) {
  std::string unused;
  return std::string(call) + " failed: " + hip::api(&unused)->GetErrorString(error) + " (" + std::to_string(error) +
         ")";
}

std::string load_file(const std::string& path, const Mend* mend, hip::Module* module) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return "cannot read " + path;
  std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>()), reason;
  if (mend && !apply(*mend, &bytes)) return path + " has changed since it was found";
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

std::string load_locked(const hip::Api& api, int device, const KernelFile* kernel) {
  Device& d = modules().devices[device];
  const Current current(api, device);
  std::string error;
  if (!d.own[kPlan]) {
    const std::string architecture = architecture_of(device, &error);
    if (architecture.empty()) return error;
    hip::Module module;
    error = load_file(modules().own_directory + "/dsv4_" + architecture + ".co", nullptr, &module);
    hip::Function own[kOwnCount];
    for (int k = 0; k < kOwnCount && error.empty(); ++k) error = load_function(module, kOwnNames[k], &own[k]);
    if (!error.empty()) return error;
    std::copy(own, own + kOwnCount, d.own);
  }
  if (kernel && !d.aiter.count(kernel->file)) {
    hip::Module module;
    hip::Function function;
    error = load_file(kernel->file, kernel->mend, &module);
    if (error.empty()) error = load_function(module, kernel->symbol.c_str(), &function);
    if (!error.empty()) return error;
    d.aiter[kernel->file] = function;
  }
  return "";
}

// The functions of a device, copied out under the lock.
std::string loaded(int device, const KernelFile* kernel, std::vector<hip::Function>* own, hip::Function* aiter) {
  const std::lock_guard<std::mutex> lock(modules().mutex);
  const auto it = modules().devices.find(device);
  if (it == modules().devices.end() || !it->second.own[kPlan])
    return "its kernels were not loaded on device " + std::to_string(device);
  own->assign(it->second.own, it->second.own + kOwnCount);
  if (!kernel) return "";
  const auto found = it->second.aiter.find(kernel->file);
  if (found == it->second.aiter.end()) return kernel->file + " was not loaded on device " + std::to_string(device);
  *aiter = found->second;
  return "";
}

struct Grid {
  int64_t x;
  int y = 1, z = 1;
};

std::string launch_bytes(hip::Function function, const char* name, Grid grid, hip::Stream stream, void* arguments,
                         size_t size, int lds_bytes = 0) {
  if (grid.x == 0) return "";
  void* extra[] = {hip::kLaunchParamBufferPointer, arguments, hip::kLaunchParamBufferSize, &size, hip::kLaunchParamEnd};
  std::string reason;
  const hip::Error error = hip::api(&reason)->ModuleLaunchKernel(
      function, static_cast<unsigned>(grid.x), grid.y, grid.z, kThreads, 1, 1, lds_bytes, stream, nullptr, extra);
  return error ? failure("hipModuleLaunchKernel", error) + " for " + name : "";
}

template <typename Params>
std::string launch(const std::vector<hip::Function>& own, Own which, int64_t grid, hip::Stream stream, Params params) {
  return launch_bytes(own[which], kOwnNames[which], {grid}, stream, &params, sizeof params);
}

// Workgroups for so many rows of so many threads each.
int64_t blocks_of(int64_t rows, int threads_per_row) {
  const int rows_per_block = kThreads / threads_per_row;
  return (rows + rows_per_block - 1) / rows_per_block;
}

std::string clear(void* to, int64_t words, hip::Stream stream) {
  if (words == 0) return "";
  std::string reason;
  const hip::Error error = hip::api(&reason)->MemsetD32Async(to, 0, static_cast<size_t>(words), stream);
  return error ? failure("hipMemsetD32Async", error) : "";
}

// AITER's plan builder for an architecture ("": `reason` says why).
bool open_builder(const std::string& architecture, decltype(&dsv4_aiter_metadata)* metadata, std::string* reason) {
  // It was linked against no HIP library: it finds the symbols of ours.
  if (architecture.empty() || !hip::expose_globally(reason)) return false;
  const std::string path = modules().builders_directory + "/aiter-" + architecture + "/libaiter_metadata.so";
  const std::string remedy = "run python -m jax_dsv4.build_aiter --architecture " + architecture;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return *reason = path + " cannot be loaded (" + dlerror() + "); " + remedy, false;
  const auto abi = reinterpret_cast<decltype(&dsv4_aiter_metadata_abi)>(dlsym(library, "dsv4_aiter_metadata_abi"));
  const auto compiled_for =
      reinterpret_cast<decltype(&dsv4_aiter_metadata_architecture)>(dlsym(library, "dsv4_aiter_metadata_architecture"));
  if (!abi || abi() != kAiterMetadataAbi || !compiled_for) {
    *reason = path + " is of another version; " + remedy;
  } else if (architecture != compiled_for()) {
    *reason = path + " was compiled for " + compiled_for() + "; " + remedy;
  } else {
    *metadata = reinterpret_cast<decltype(&dsv4_aiter_metadata)>(dlsym(library, "dsv4_aiter_metadata"));
    return true;
  }
  dlclose(library);  // so that the next call finds what has been built since
  return false;
}

std::atomic<int64_t> g_calls{0}, g_captured{0};

void count_decode(hip::Stream stream) {
  std::string reason;
  const hip::Api* api = hip::api(&reason);
  hip::CaptureStatus capture = hip::kCaptureStatusNone;
  g_calls++;
  if (api && !api->StreamIsCapturing(stream, &capture) && capture == hip::kCaptureStatusActive) g_captured++;
}

}  // namespace

void decode_calls(int64_t* calls) { calls[0] = g_calls, calls[1] = g_captured; }

void set_kernel_directory(const std::string& path) { modules().own_directory = path; }

std::string architecture_of(int device, std::string* reason) {
  // Asked in every execution, and slow to ask of HIP.
  static std::mutex* mutex = new std::mutex;
  static auto* known = new std::map<int, std::string>;
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto found = known->find(device);
  if (found != known->end()) return found->second;
  const hip::Api* api = hip::api(reason);
  if (!api) return "";
  hip::DeviceProperties properties;
  if (const hip::Error error = api->GetDeviceProperties(&properties, device)) {
    *reason = failure("hipGetDeviceProperties", error);
    return "";
  }
  const std::string name = properties.gcn_arch_name;  // "gfx950:sramecc+:xnack-"
  return (*known)[device] = name.substr(0, name.find(':'));
}

std::string load_modules(int device, const KernelFile* kernel) {
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
  if (error.empty()) error = clear(p.reduce_partial_map, p.max_partials, stream);
  if (error.empty()) error = launch(own, kPlan, 1, stream, p);
  return error;
}

void set_builders_directory(const std::string& path) { modules().builders_directory = path; }

std::string load_metadata(int device, hip::Stream stream) {
  std::string reason;
  const hip::Api* api = hip::api(&reason);
  if (!api) return reason;
  Modules& m = modules();
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (m.metadata.count(device)) return "";
  decltype(&dsv4_aiter_metadata) metadata = nullptr;
  if (!open_builder(architecture_of(device, &reason), &metadata, &reason)) return reason;
  // HIP loads a program's code at its first launch, which must not happen under capture: so one token is planned here.
  const Current current(*api, device);
  int units = 0;
  api->DeviceGetAttribute(&units, hip::kAttributeMultiprocessorCount, device);
  std::vector<int32_t> inputs = {0, 1, 0, 1, 1};
  const size_t words = 16 + static_cast<size_t>(units) + 1 + 8ull * units + 2 + 2 + 2ull * units + 64;
  void* memory = nullptr;
  if (const hip::Error error = api->Malloc(&memory, 4 * words)) return failure("hipMalloc", error);
  int32_t* at = static_cast<int32_t*>(memory);
  const auto take = [&](size_t count) { return std::exchange(at, at + (count + 1) / 2 * 2); };
  int32_t* in = take(16);
  AiterMetadata a{};
  a.qo_indptr = in, a.kv_indptr = in + 2, a.last_page_lens = in + 4;
  a.work_pointers = reinterpret_cast<uint64_t*>(take(4));
  a.work_indptr = take(units + 1), a.work_info_set = take(8ull * units);
  a.reduce_indptr = take(2), a.reduce_final_map = take(2), a.reduce_partial_map = take(2ull * units);
  a.tokens = 1, a.heads = 16, a.topk = 1, a.granularity = 64, a.units = units, a.max_items = units,
  a.max_partials = 2 * units;
  a.device = device;
  char text[512] = "";
  hip::Error error = api->MemcpyAsync(in, inputs.data(), 4 * inputs.size(), hip::kMemcpyHostToDevice, stream);
  const bool failed = !error && metadata(&a, stream, text, sizeof text);
  if (!error) error = api->StreamSynchronize(stream);
  api->Free(memory);
  if (error) return failure("AITER's plan builder", error);
  if (failed) return std::string("AITER's plan builder: ") + text;
  m.metadata[device] = metadata;
  return "";
}

std::string enqueue_metadata(int device, hip::Stream stream, const MetadataParams& p, int heads,
                             uint64_t* work_pointers) {
  std::vector<hip::Function> own;
  std::string error = loaded(device, nullptr, &own, nullptr);
  decltype(&dsv4_aiter_metadata) metadata = nullptr;
  {
    const std::lock_guard<std::mutex> lock(modules().mutex);
    const auto ready = modules().metadata.find(device);
    if (ready != modules().metadata.end()) metadata = ready->second;
  }
  if (error.empty() && !metadata) error = "AITER's plan builder was not loaded on device " + std::to_string(device);
  if (error.empty()) error = clear(p.plan.work_info_set, 8ll * p.plan.max_items, stream);
  if (error.empty()) error = clear(p.plan.reduce_final_map, 2ll * p.plan.tokens, stream);
  if (error.empty()) error = clear(p.plan.reduce_partial_map, p.plan.max_partials, stream);
  if (error.empty()) error = launch(own, kMetadataInputs, 1, stream, p);
  if (!error.empty()) return error;
  AiterMetadata a{};
  a.qo_indptr = p.qo_indptr, a.kv_indptr = p.kv_indptr, a.last_page_lens = p.last_page_lens;
  a.work_pointers = work_pointers;
  a.work_indptr = p.plan.work_indptr, a.work_info_set = p.plan.work_info_set;
  a.reduce_indptr = p.plan.reduce_indptr, a.reduce_final_map = p.plan.reduce_final_map;
  a.reduce_partial_map = p.plan.reduce_partial_map;
  a.tokens = p.plan.tokens, a.heads = heads, a.topk = p.plan.topk[0] + p.plan.topk[1];
  a.granularity = p.plan.granularity, a.units = p.plan.active_workers;
  a.max_items = p.plan.max_items, a.max_partials = p.plan.max_partials, a.device = device;
  char text[512] = "";
  if (metadata(&a, stream, text, sizeof text)) return std::string("AITER's plan builder: ") + text;
  return launch(own, kMetadataFinish, 1, stream, p);
}

std::string enqueue_decode(int device, hip::Stream stream, const AiterKernel& kernel, const DecodeScopeParams& p) {
  count_decode(stream);
  std::vector<hip::Function> own;
  hip::Function aiter;
  std::string error = loaded(device, &kernel, &own, &aiter);
  if (!error.empty() || p.tokens == 0) return error;
  if (is_fp8(p.layout)) error = launch(own, kAmax, kAmaxBlocks, stream, p);
  if (error.empty())
    error = launch(own, kPackQ, blocks_of(int64_t{p.tokens} * p.head_passes * p.kernel_heads, kWave), stream, p);
  if (error.empty()) error = launch(own, kPackSlots, blocks_of(p.tokens, kWave), stream, p);
  if (error.empty()) error = launch(own, kCheckItems, 1, stream, p);
  if (error.empty()) {
    std::vector<uint8_t> arguments = pack_arguments(kernel, p);
    error = launch_bytes(aiter, kernel.symbol.c_str(), {static_cast<int64_t>(p.head_passes) * p.workers}, stream,
                         arguments.data(), arguments.size());
  }
  if (error.empty()) error = launch(own, kCombine, blocks_of(int64_t{p.tokens} * p.heads, kLatentDim / 4), stream, p);
  return error;
}

std::string enqueue_append(int device, hip::Stream stream, const PoolAppendParams& p) {
  std::vector<hip::Function> own;
  const std::string error = loaded(device, nullptr, &own, nullptr);
  if (!error.empty()) return error;
  return launch(own, kAppend, blocks_of(p.count, kWave), stream, p);
}

std::string enqueue_packed_append(int device, hip::Stream stream, const AppendParams& p) {
  std::vector<hip::Function> own;
  const std::string error = loaded(device, nullptr, &own, nullptr);
  return error.empty() ? launch(own, kAppendPacked, blocks_of(p.count, kWave), stream, p) : error;
}

std::string enqueue_gluon_decode(int device, hip::Stream stream, const GluonKernel& kernel, const GluonDecodeParams& p,
                                 int32_t tokens_per_launch) {
  count_decode(stream);
  std::vector<hip::Function> own;
  hip::Function aiter;
  std::string error = loaded(device, &kernel, &own, &aiter);
  if (!error.empty() || p.tokens == 0) return error;
  const int64_t rows = int64_t{p.tokens} * scopes_of(p);
  error = launch(own, kCountSlots, blocks_of(rows, kWave), stream, p);
  if (error.empty()) error = launch(own, kGatherSlots, rows, stream, p);
  for (int32_t first = 0; first < p.tokens && error.empty(); first += tokens_per_launch) {
    std::vector<uint8_t> arguments = pack_arguments(p, first);
    const Grid grid{std::min(tokens_per_launch, p.tokens - first), p.splits, gluon_head_blocks(p.heads)};
    error =
        launch_bytes(aiter, kernel.symbol.c_str(), grid, stream, arguments.data(), arguments.size(), kernel.lds_bytes);
  }
  if (error.empty())
    error = launch(own, kCombineSplits, blocks_of(int64_t{p.tokens} * p.heads, kLatentDim / 4), stream, p);
  return error;
}

}  // namespace jax_dsv4::rocm
