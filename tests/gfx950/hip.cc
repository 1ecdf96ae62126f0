// A stand-in for libamdhip64.so: one software MI355X, or several (gfx950), with everything done when it is asked for.
//
// Streams have no asynchrony to offer, so what they check is discipline: under capture, every call that HIP forbids
// there fails with HIP's error code and, as on HIP, invalidates the capture. A captured graph keeps the addresses and
// values it was captured with, and replays them against whatever memory holds by then.
//
// Environment: GFX950_UNITS (compute units, 256), GFX950_DEVICES (1), GFX950_ARCHITECTURE (what it says it is),
// GFX950_HAZARDS=1 and GFX950_EXACT_LGKM=1 (machine.h).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <tuple>
#include <utility>

#include "runtime.h"

using namespace gfx950;

struct ihipEvent_t {
  bool recorded = false;
  std::weak_ptr<Capture> capture;
  Stream stream = nullptr;
  bool captured = false;
};

namespace gfx950 {

// Never destroyed: XLA's threads may outlive static destruction.
Runtime& runtime() {
  static Runtime* r = new Runtime;
  return *r;
}

namespace {

thread_local int current_device = 0;
thread_local Error last_error = kSuccess;

int environment(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}
int units() { return environment("GFX950_UNITS", 256); }

}  // namespace

int devices() { return environment("GFX950_DEVICES", 1); }

Error failed(Error e) {
  if (e != kSuccess) last_error = e;
  return e;
}

Capture* capture_of(Stream s) { return s ? s->capture.get() : nullptr; }

Error refuse(Capture& c, Error e) {
  c.invalidated = true;
  runtime().calls_refused_under_capture++;
  return failed(e);
}

// Calls that may synchronise or allocate are refused while a capture is under way that is not relaxed: on any thread if
// it is global, on the capturing thread otherwise.
Error check_unsafe_call() {
  for (auto& c : runtime().captures) {
    if (c->mode == kCaptureModeRelaxed) continue;
    if (c->mode == kCaptureModeGlobal || c->thread == std::this_thread::get_id())
      return refuse(*c, kErrorStreamCaptureUnsupported);
  }
  return kSuccess;
}

// Work on a stream: recorded under capture, done at once otherwise. The legacy stream waits for every blocking stream,
// so using it while one of them captures is an implicit dependency on the capture.
Error enqueue(Stream s, Work work) {
  if (!s) {
    for (auto& c : runtime().captures)
      for (Stream t : c->streams)
        if (t->blocking) return refuse(*c, kErrorStreamCaptureImplicit);
  } else if (!runtime().streams.count(s)) {
    return failed(kErrorInvalidHandle);
  }
  if (Capture* c = capture_of(s)) {
    if (c->invalidated) return failed(kErrorStreamCaptureInvalidated);
    c->work.push_back(std::move(work));
    if (s != c->origin) c->unjoined.insert(s);
    return kSuccess;
  }
  return failed(work());
}

namespace {

bool live(const void* p, size_t bytes) {
  return bytes == 0 || runtime().memory.find(reinterpret_cast<uint64_t>(p), bytes);
}

Error refuse_memory(const char* call, const void* p, size_t bytes) {
  char text[160];
  snprintf(text, sizeof text, "%s: [%p, +%zu) is not live: ", call, p, bytes);
  runtime().message = text + runtime().memory.describe(reinterpret_cast<uint64_t>(p));
  return kErrorIllegalAddress;
}

Error launch_now(const ihipModuleSymbol_t& f, dim3 grid, dim3 block, unsigned shared,
                 const std::vector<uint8_t>& kernarg) {
  Runtime& r = runtime();
  Launch launch;
  launch.program = f.program.get(), launch.kernel = f.kernel;
  std::copy_n(&grid.x, 3, launch.grid);
  std::copy_n(&block.x, 3, launch.block);
  launch.dynamic_lds_bytes = static_cast<int>(shared);
  launch.kernarg = kernarg, launch.memory = &r.memory, launch.options = r.options;
  Error error = kSuccess;
  try {
    run(launch);
  } catch (const Fault& fault) {
    r.message = fault.what();
    fprintf(stderr, "%s\n", fault.what());
    error = kErrorIllegalAddress;
  }
  KernelCost& cost = r.by_kernel[f.kernel->name];
  for (Counters* sum : {&r.counters, &cost.counters}) *sum += launch.counters;
  const auto& work = launch.instructions_by_workgroup;
  if (!work.empty()) cost.if_all_were_the_busiest += work.size() * *std::max_element(work.begin(), work.end());
  for (auto& [text, times] : launch.hazards) r.hazards[f.kernel->name + ": " + text] += times;
  return error;
}

template <class T>
Error set(Stream s, void* to, T value, size_t count) {
  Lock lock(runtime().mutex);
  return enqueue(s, setting(to, value, sizeof(T), count));
}

}  // namespace

Work setting(void* to, uint32_t value, size_t bytes, size_t count) {
  return [=] {
    if (!live(to, count * bytes)) return refuse_memory("memset", to, count * bytes);
    for (size_t k = 0; k < count; ++k) memcpy(static_cast<char*>(to) + k * bytes, &value, bytes);
    return kSuccess;
  };
}

Work copying(void* to, const void* from, size_t bytes, int kind) {
  return [=] {
    if (kind != kMemcpyHostToDevice && kind != kMemcpyDefault && !live(from, bytes))
      return refuse_memory("memcpy from", from, bytes);
    if (kind != kMemcpyDeviceToHost && kind != kMemcpyDefault && !live(to, bytes))
      return refuse_memory("memcpy to", to, bytes);
    memmove(to, from, bytes);
    return kSuccess;
  };
}

Error copy(Stream s, void* to, const void* from, size_t bytes, int kind) {
  Lock lock(runtime().mutex);
  Capture* c = capture_of(s);
  // Host and device share an address space here, so what is not live is the host's. A captured copy from or to pageable
  // host memory would run at every replay against memory that may be gone: taken as an error.
  const bool touches_host =
      kind == kMemcpyHostToDevice || kind == kMemcpyDeviceToHost || !live(to, bytes) || !live(from, bytes);
  if (c && touches_host) return refuse(*c, kErrorStreamCaptureUnsupported);
  return enqueue(s, copying(to, from, bytes, kind));
}

namespace {

Error synchronous_copy(void* to, const void* from, size_t bytes, int kind) {
  Lock lock(runtime().mutex);
  if (Error e = check_unsafe_call()) return e;
  return copy(nullptr, to, from, bytes, kind);
}

Error check_not_capturing(Stream s) {
  if (Capture* c = capture_of(s)) return refuse(*c, kErrorStreamCaptureUnsupported);
  return check_unsafe_call();
}

}  // namespace
}  // namespace gfx950

// ---- Devices.

HIP Error hipInit(unsigned) { return kSuccess; }
HIP Error hipDriverGetVersion(int* version) { return *version = 70125424, kSuccess; }
HIP Error hipRuntimeGetVersion(int* version) { return *version = 70125424, kSuccess; }
HIP Error hipGetDeviceCount(int* count) { return *count = devices(), kSuccess; }
HIP Error hipGetDevice(int* device) { return *device = current_device, kSuccess; }
HIP Error hipSetDevice(int device) {
  if (device < 0 || device >= devices()) return failed(kErrorInvalidDevice);
  return current_device = device, kSuccess;
}
HIP Error hipDeviceGetAttribute(int* value, int attribute, int device) {
  if (device < 0 || device >= devices()) return failed(kErrorInvalidDevice);
  const std::map<int, int> values = {{kAttributeMultiprocessorCount, units()},
                                     {0, 1},                 // EccEnabled
                                     {5, 2400000},           // ClockRate, in kHz
                                     {19, 4 << 20},          // L2CacheSize
                                     {23, 9},                // ComputeCapabilityMajor
                                     {25, 2},                // MaxBlocksPerMultiProcessor
                                     {26, 1024},             // MaxBlockDimX
                                     {27, 1024},             // ...Y
                                     {28, 1024},             // ...Z
                                     {29, 2147483647},       // MaxGridDimX
                                     {30, 65536},            // ...Y
                                     {31, 65536},            // ...Z
                                     {56, 1024},             // MaxThreadsPerBlock
                                     {57, 2048},             // MaxThreadsPerMultiProcessor
                                     {59, 8192},             // MemoryBusWidth
                                     {60, 2000000},          // MemoryClockRate, in kHz
                                     {61, 5},                // ComputeCapabilityMinor
                                     {71, 131072},           // MaxRegistersPerBlock
                                     {72, 131072},           // MaxRegistersPerMultiprocessor
                                     {74, lds_bytes()},      // MaxSharedMemoryPerBlock
                                     {75, lds_bytes()},      // SharedMemPerBlockOptin
                                     {76, lds_bytes()},      // SharedMemPerMultiprocessor
                                     {87, kLanes},           // WarpSize
                                     {10002, lds_bytes()}};  // MaxSharedMemoryPerMultiprocessor
  const auto found = values.find(attribute);
  if (found == values.end()) return failed(kErrorInvalidValue);
  return *value = found->second, kSuccess;
}
HIP Error hipGetDevicePropertiesR0600(DeviceProperties* p, int device) {
  if (device < 0 || device >= devices()) return failed(kErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, 256, "%s", kDeviceName);
  snprintf(p->gcn_arch_name, sizeof p->gcn_arch_name, "%s:sramecc+:xnack-", architecture().c_str());
  const auto put = [&](size_t offset, auto value) {
    memcpy(reinterpret_cast<char*>(p) + offset, &value, sizeof value);
  };
  put(288, kMemoryBytes);                       // totalGlobalMem
  put(296, static_cast<size_t>(lds_bytes()));   // sharedMemPerBlock
  put(308, kLanes);                             // warpSize
  put(320, 1024);                               // maxThreadsPerBlock
  put(360, 9), put(364, 5);                     // major, minor
  put(388, units());                            // multiProcessorCount
  put(640, static_cast<size_t>(lds_bytes()));   // sharedMemPerMultiprocessor
  put(1416, static_cast<size_t>(lds_bytes()));  // maxSharedMemoryPerMultiProcessor
  return kSuccess;
}
HIP Error hipDeviceSynchronize() {
  Lock lock(runtime().mutex);
  return check_unsafe_call();
}
HIP Error hipGetLastError() { return std::exchange(last_error, kSuccess); }
HIP Error hipPeekAtLastError() { return last_error; }
HIP const char* hipGetErrorName(Error e) {
  static const std::pair<Error, const char*> names[] = {
      {kSuccess, "hipSuccess"},
      {kErrorInvalidValue, "hipErrorInvalidValue"},
      {kErrorOutOfMemory, "hipErrorOutOfMemory"},
      {kErrorInvalidConfiguration, "hipErrorInvalidConfiguration"},
      {kErrorInvalidDevice, "hipErrorInvalidDevice"},
      {kErrorInvalidImage, "hipErrorInvalidImage"},
      {kErrorNoBinaryForGpu, "hipErrorNoBinaryForGpu"},
      {kErrorInvalidHandle, "hipErrorInvalidHandle"},
      {kErrorIllegalState, "hipErrorIllegalState"},
      {kErrorNotFound, "hipErrorNotFound"},
      {kErrorIllegalAddress, "hipErrorIllegalAddress"},
      {kErrorLaunchFailure, "hipErrorLaunchFailure"},
      {kErrorStreamCaptureUnsupported, "hipErrorStreamCaptureUnsupported"},
      {kErrorStreamCaptureInvalidated, "hipErrorStreamCaptureInvalidated"},
      {kErrorStreamCaptureMerge, "hipErrorStreamCaptureMerge"},
      {kErrorStreamCaptureUnmatched, "hipErrorStreamCaptureUnmatched"},
      {kErrorStreamCaptureUnjoined, "hipErrorStreamCaptureUnjoined"},
      {kErrorStreamCaptureIsolation, "hipErrorStreamCaptureIsolation"},
      {kErrorStreamCaptureImplicit, "hipErrorStreamCaptureImplicit"},
      {kErrorCapturedEvent, "hipErrorCapturedEvent"},
      {kErrorStreamCaptureWrongThread, "hipErrorStreamCaptureWrongThread"}};
  for (const auto& [error, name] : names)
    if (e == error) return name;
  return "hipErrorUnknown";
}
HIP const char* hipGetErrorString(Error e) {
  return e == kErrorIllegalAddress || e == kErrorInvalidImage ? runtime().message.c_str() : hipGetErrorName(e);
}

// ---- Memory.

HIP Error hipMalloc(void** p, size_t bytes) {
  Lock lock(runtime().mutex);
  if (Error e = check_unsafe_call()) return e;
  *p = bytes ? aligned_alloc(256, (bytes + 255) / 256 * 256) : nullptr;
  if (bytes && !*p) return failed(kErrorOutOfMemory);
  // Uninitialised memory reads as NaN in fp32, bf16 and fp8 alike.
  if (bytes) memset(*p, 0xff, bytes), runtime().memory.add(reinterpret_cast<uint64_t>(*p), bytes, true, true);
  return kSuccess;
}
HIP Error hipFree(void* p) {
  Lock lock(runtime().mutex);
  if (Error e = check_unsafe_call()) return e;
  if (!p) return kSuccess;
  const Memory::Range* range = runtime().memory.owned_at(reinterpret_cast<uint64_t>(p));
  if (!range) return failed(kErrorInvalidValue);
  runtime().memory.remove(range->begin, range->end - range->begin);
  free(p);
  return kSuccess;
}
HIP Error hipMemcpy(void* to, const void* from, size_t bytes, int kind) {
  return synchronous_copy(to, from, bytes, kind);
}
HIP Error hipMemcpyAsync(void* to, const void* from, size_t bytes, int kind, Stream s) {
  return copy(s, to, from, bytes, kind);
}
HIP Error hipMemset(void* to, int value, size_t bytes) {
  Lock lock(runtime().mutex);
  if (Error e = check_unsafe_call()) return e;
  return set(nullptr, to, static_cast<uint8_t>(value), bytes);
}
HIP Error hipMemsetAsync(void* to, int value, size_t bytes, Stream s) {
  return set(s, to, static_cast<uint8_t>(value), bytes);
}
HIP Error hipMemsetD8Async(void* to, unsigned char value, size_t count, Stream s) { return set(s, to, value, count); }
HIP Error hipMemsetD32Async(void* to, int value, size_t count, Stream s) { return set(s, to, value, count); }

// ---- Modules and launches.

HIP Error hipModuleLoadData(Module* module, const void* image) {
  Lock lock(runtime().mutex);
  if (Error e = check_unsafe_call()) return e;
  try {
    // The size is in the file itself: the section headers are its end.
    const auto* bytes = static_cast<const uint8_t*>(image);
    uint64_t section_headers;
    uint16_t entry, count;
    memcpy(&section_headers, bytes + 40, 8);
    memcpy(&entry, bytes + 58, 2);
    memcpy(&count, bytes + 60, 2);
    const std::string content(static_cast<const char*>(image), section_headers + entry * count);
    std::shared_ptr<Program>& program = runtime().programs[architecture() + content];
    if (!program) program = load_program(content.data(), content.size(), runtime().memory);
    *module = new ihipModule_t{program, {}};
    return kSuccess;
  } catch (const Fault& fault) {
    runtime().message = fault.what();
    fprintf(stderr, "%s\n", fault.what());
    return failed(strstr(fault.what(), "not for gfx") ? kErrorNoBinaryForGpu : kErrorInvalidImage);
  }
}
HIP Error hipModuleUnload(Module module) {
  Lock lock(runtime().mutex);
  if (Error e = check_unsafe_call()) return e;
  delete module;
  return kSuccess;
}
HIP Error hipModuleGetFunction(Function* function, Module module, const char* name) {
  Lock lock(runtime().mutex);
  auto it = module->program->kernels.find(name);
  if (it == module->program->kernels.end()) return failed(kErrorNotFound);
  auto& f = module->functions[name];
  if (!f) f = std::make_unique<ihipModuleSymbol_t>(ihipModuleSymbol_t{module->program, &it->second});
  return *function = f.get(), kSuccess;
}
Error gfx950::prepare_launch(Function f, dim3 grid, dim3 block, unsigned shared, void** parameters, void** extra,
                             Work* work) {
  if (!f || !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return failed(kErrorInvalidValue);
  const Kernel& k = *f->kernel;
  if (block.x * block.y * block.z > static_cast<unsigned>(k.max_workgroup)) return failed(kErrorInvalidConfiguration);
  const unsigned sizes[3] = {block.x, block.y, block.z};
  for (int d = 0; d < 3; ++d)
    if (k.required_workgroup[d] && sizes[d] != static_cast<unsigned>(k.required_workgroup[d]))
      return failed(kErrorInvalidConfiguration);
  if (k.lds_bytes + shared > static_cast<unsigned>(lds_bytes())) return failed(kErrorInvalidValue);
  std::vector<uint8_t> kernarg(k.kernarg_bytes);
  if (extra) {
    const void* data = nullptr;
    size_t size = 0;
    for (int n = 0; extra[n] != kLaunchParamEnd; n += 2) {
      if (extra[n] == kLaunchParamBufferPointer)
        data = extra[n + 1];
      else if (extra[n] == kLaunchParamBufferSize)
        size = *static_cast<size_t*>(extra[n + 1]);
      else
        return failed(kErrorInvalidValue);
    }
    int explicit_bytes = 0;
    for (const jax_dsv4::rocm::KernelArgument& a : k.arguments)
      if (a.kind.rfind("hidden_", 0) != 0) explicit_bytes = std::max(explicit_bytes, a.offset + a.size);
    if (!data || static_cast<int>(size) < explicit_bytes || size > kernarg.size()) {
      runtime().message = k.name + ": argument buffer of " + std::to_string(size) + " bytes, the kernel takes " +
                          std::to_string(explicit_bytes);
      return failed(kErrorInvalidValue);
    }
    memcpy(kernarg.data(), data, size);
  } else if (parameters) {
    int n = 0;
    for (const jax_dsv4::rocm::KernelArgument& a : k.arguments)
      if (a.kind.rfind("hidden_", 0) != 0) memcpy(&kernarg[a.offset], parameters[n++], a.size);
  } else if (!k.arguments.empty()) {
    return failed(kErrorInvalidValue);
  }
  *work = [f = *f, grid, block, shared, kernarg] { return launch_now(f, grid, block, shared, kernarg); };
  return kSuccess;
}
HIP Error hipModuleLaunchKernel(Function f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                unsigned bz, unsigned shared, Stream s, void** parameters, void** extra) {
  Lock lock(runtime().mutex);
  Work work;
  if (Error e = prepare_launch(f, {gx, gy, gz}, {bx, by, bz}, shared, parameters, extra, &work)) return e;
  if (capture_of(s)) runtime().launches_under_capture++;
  return enqueue(s, std::move(work));
}

// ---- What a compiler puts into a host program for kernels that are launched with <<<>>>.

namespace {

struct FatBinary {
  const uint8_t* bundle = nullptr;
  Module module = nullptr;  // loaded at the first launch, as HIP does
};
struct LaunchedFunction {
  FatBinary* binary;
  std::string name;
};
std::map<const void*, LaunchedFunction>& launched_functions() {
  static auto* functions = new std::map<const void*, LaunchedFunction>;
  return *functions;
}
thread_local std::vector<std::tuple<dim3, dim3, size_t, Stream>> call_configurations;

// The entry for gfx950 of a clang offload bundle: a magic word, a count, and (offset, size, target name) each.
const uint8_t* gfx950_entry(const uint8_t* bundle) {
  const auto number = [&](const uint8_t* at) {
    uint64_t n;
    memcpy(&n, at, 8);
    return n;
  };
  if (memcmp(bundle, "__CLANG_OFFLOAD_BUNDLE__", 24) != 0) return nullptr;
  const uint8_t* at = bundle + 32;
  for (uint64_t k = 0; k < number(bundle + 24); ++k) {
    const std::string target(reinterpret_cast<const char*>(at + 24), number(at + 16));
    if (target.find(architecture()) != std::string::npos) return bundle + number(at);
    at += 24 + target.size();
  }
  return nullptr;
}

}  // namespace

HIP void** __hipRegisterFatBinary(const void* wrapper) {
  auto* binary = new FatBinary;
  memcpy(&binary->bundle, static_cast<const char*>(wrapper) + 8, sizeof binary->bundle);
  return reinterpret_cast<void**>(binary);
}
HIP void __hipRegisterFunction(void** binary, const void* host, char*, const char* name, unsigned, void*, void*, void*,
                               void*, int*) {
  Lock lock(runtime().mutex);
  launched_functions()[host] = {reinterpret_cast<FatBinary*>(binary), name};
}
HIP void __hipRegisterVar(void**, void*, char*, char*, int, size_t, int, int) {}
HIP void __hipUnregisterFatBinary(void**) {}
HIP Error __hipPushCallConfiguration(dim3 grid, dim3 block, size_t shared, Stream s) {
  return call_configurations.emplace_back(grid, block, shared, s), kSuccess;
}
HIP Error __hipPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, Stream* s) {
  std::tie(*grid, *block, *shared, *s) = call_configurations.back();
  return call_configurations.pop_back(), kSuccess;
}
Error gfx950::registered_function(const void* host, Function* function) {
  auto found = launched_functions().find(host);
  if (found == launched_functions().end()) return failed(kErrorInvalidValue);
  FatBinary& binary = *found->second.binary;
  if (!binary.module) {
    const uint8_t* image = gfx950_entry(binary.bundle);
    if (!image) return failed(kErrorNoBinaryForGpu);
    if (Error e = hipModuleLoadData(&binary.module, image)) return e;  // which a capture refuses
  }
  return hipModuleGetFunction(function, binary.module, found->second.name.c_str());
}
HIP Error hipLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, Stream s) {
  Lock lock(runtime().mutex);
  Function f;
  if (Error e = registered_function(host, &f)) return e;
  return hipModuleLaunchKernel(f, grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<unsigned>(shared), s,
                               arguments, nullptr);
}

// ---- Streams and events.

HIP Error hipStreamCreateWithFlags(Stream* s, unsigned flags) {
  Lock lock(runtime().mutex);
  if (Error e = check_unsafe_call()) return e;
  *s = new ihipStream_t{current_device, (flags & 1) == 0, nullptr};
  runtime().streams.insert(*s);
  return kSuccess;
}
HIP Error hipStreamCreate(Stream* s) { return hipStreamCreateWithFlags(s, 0); }
HIP Error hipStreamDestroy(Stream s) {
  Lock lock(runtime().mutex);
  if (!runtime().streams.count(s)) return failed(kErrorInvalidHandle);
  if (Error e = check_not_capturing(s)) return e;
  runtime().streams.erase(s);
  delete s;
  return kSuccess;
}
HIP Error hipStreamSynchronize(Stream s) {
  Lock lock(runtime().mutex);
  return check_not_capturing(s);
}
HIP Error hipStreamQuery(Stream s) {
  Lock lock(runtime().mutex);
  return check_not_capturing(s);
}
HIP Error hipStreamWaitEvent(Stream s, Event e, unsigned) {
  Lock lock(runtime().mutex);
  if (!e) return failed(kErrorInvalidHandle);
  std::shared_ptr<Capture> from = e->captured ? e->capture.lock() : nullptr;
  if (e->captured && !from) return failed(kErrorCapturedEvent);
  Capture* mine = capture_of(s);
  if (!from)
    return mine ? refuse(*mine, kErrorStreamCaptureIsolation) : kSuccess;  // a capture may not wait for work outside it
  if (!s) return refuse(*from, kErrorStreamCaptureImplicit);
  if (mine && mine != from.get()) return refuse(*mine, kErrorStreamCaptureMerge);
  s->capture = from;
  from->streams.insert(s);
  if (s == from->origin) from->unjoined.erase(e->stream);
  return kSuccess;
}
HIP Error hipEventCreateWithFlags(Event* e, unsigned) { return *e = new ihipEvent_t, kSuccess; }
HIP Error hipEventCreate(Event* e) { return hipEventCreateWithFlags(e, 0); }
HIP Error hipEventDestroy(Event e) { return delete e, kSuccess; }
HIP Error hipEventRecord(Event e, Stream s) {
  Lock lock(runtime().mutex);
  if (!e) return failed(kErrorInvalidHandle);
  e->captured = capture_of(s) != nullptr;
  if (e->captured) e->capture = s->capture;
  e->stream = s, e->recorded = true;
  return kSuccess;
}
HIP Error hipEventSynchronize(Event e) {
  Lock lock(runtime().mutex);
  if (e->captured) {
    if (auto c = e->capture.lock()) return refuse(*c, kErrorCapturedEvent);
    return failed(kErrorCapturedEvent);
  }
  return check_unsafe_call();
}
HIP Error hipEventQuery(Event e) { return hipEventSynchronize(e); }
HIP Error hipEventElapsedTime(float* ms, Event a, Event b) {
  if (!a->recorded || !b->recorded) return failed(kErrorInvalidHandle);
  return *ms = 0.0f, kSuccess;  // there is no time here
}

// ---- Capture and graphs.

GraphNode gfx950::add_node(Graph graph, Work work) {
  return graph->nodes.emplace_back(new hipGraphNode{std::move(work)}).get();
}

HIP Error hipStreamBeginCapture(Stream s, CaptureMode mode) {
  Lock lock(runtime().mutex);
  if (!s) return failed(kErrorStreamCaptureUnsupported);  // the legacy stream cannot be captured
  if (s->capture) return failed(kErrorIllegalState);
  auto c = std::make_shared<Capture>();
  c->mode = mode, c->thread = std::this_thread::get_id(), c->origin = s;
  c->streams.insert(s);
  s->capture = c;
  runtime().captures.push_back(c);
  return kSuccess;
}
HIP Error hipStreamEndCapture(Stream s, Graph* graph) {
  Lock lock(runtime().mutex);
  *graph = nullptr;
  if (!s || !s->capture) return failed(kErrorIllegalState);
  std::shared_ptr<Capture> c = s->capture;
  if (c->origin != s) return refuse(*c, kErrorStreamCaptureUnmatched);
  if (c->mode != kCaptureModeRelaxed && c->thread != std::this_thread::get_id())
    return failed(kErrorStreamCaptureWrongThread);
  for (Stream t : c->streams) t->capture = nullptr;
  std::erase(runtime().captures, c);
  if (c->invalidated) return failed(kErrorStreamCaptureInvalidated);
  if (!c->unjoined.empty()) return failed(kErrorStreamCaptureUnjoined);
  *graph = new ihipGraph;
  for (Work& work : c->work) add_node(*graph, std::move(work));
  return kSuccess;
}
HIP Error hipStreamIsCapturing(Stream s, CaptureStatus* status) {
  Lock lock(runtime().mutex);
  Capture* c = capture_of(s);
  *status = !c ? kCaptureStatusNone : c->invalidated ? kCaptureStatusInvalidated : kCaptureStatusActive;
  return kSuccess;
}
HIP Error hipGraphGetNodes(Graph graph, void*, size_t* count) { return *count = graph->nodes.size(), kSuccess; }
HIP Error hipGraphInstantiate(GraphExec* exec, Graph graph, void*, char*, size_t) {
  Lock lock(runtime().mutex);
  *exec = new hipGraphExec;
  for (auto& node : graph->nodes) (*exec)->nodes.emplace_back(node.get(), node->work);
  return kSuccess;
}
HIP Error hipGraphLaunch(GraphExec exec, Stream s) {
  Lock lock(runtime().mutex);
  if (Capture* c = capture_of(s)) return refuse(*c, kErrorStreamCaptureUnsupported);
  runtime().graph_launches++;
  return enqueue(s, [exec] {
    for (auto& [node, work] : exec->nodes)
      if (Error e = work()) return e;
    return kSuccess;
  });
}
HIP Error hipGraphExecDestroy(GraphExec exec) { return delete exec, kSuccess; }
HIP Error hipGraphDestroy(Graph graph) { return delete graph, kSuccess; }

// ---- What the software GPU offers beyond HIP.

// Declares memory of somebody else's allocator (XLA's on platform cpu) live, and withdraws it.
HIP void gfx950_register(const void* p, size_t bytes, int writable) {
  Lock lock(runtime().mutex);
  if (bytes) runtime().memory.add(reinterpret_cast<uint64_t>(p), bytes, writable != 0, false);
}
HIP int gfx950_unregister(const void* p, size_t bytes) {
  Lock lock(runtime().mutex);
  return bytes == 0 || runtime().memory.remove(reinterpret_cast<uint64_t>(p), bytes);
}
HIP const char* gfx950_message() { return runtime().message.c_str(); }
// hazards: report weak waits. exact_lgkm: honour lgkmcnt(n > 0). Latencies in instructions; negative: the default.
HIP void gfx950_options(int hazards, int exact_lgkm, int lds_latency, int vm_latency) {
  Lock lock(runtime().mutex);
  runtime().options = {hazards != 0, exact_lgkm != 0, lds_latency < 0 ? kLdsLatency : lds_latency,
                       vm_latency < 0 ? kVmLatency : vm_latency};
}
// What a code object holds that is not modelled: one line per instruction that cannot be read, with the reason.
HIP const char* gfx950_not_modelled(const void* image) {
  Lock lock(runtime().mutex);
  static std::string text;
  text.clear();
  Module module;
  if (hipModuleLoadData(&module, image)) return runtime().message.c_str();
  for (const Instruction& i : module->program->instructions)
    if (i.not_modelled) text += i.text + "\n";
  return text.c_str();
}
// One line per counter: "name value". The buffers of these belong to the library, until the next call.
HIP const char* gfx950_counters(int reset) {
  Lock lock(runtime().mutex);
  static std::string text;
  std::ostringstream out;
  Runtime& r = runtime();
  Counters& c = r.counters;
  const char* names[] = {"scalar", "vector", "matrix", "lds", "global", "scalar_memory", "control"};
  out << "launches " << c.launches << "\nworkgroups " << c.workgroups << "\ninstructions " << c.instructions << "\n";
  for (int k = 0; k < static_cast<int>(Class::kCount); ++k) out << names[k] << " " << c.by_class[k] << "\n";
  out << "bytes_read " << c.bytes_read << "\nbytes_written " << c.bytes_written << "\nlds_bytes_read "
      << c.lds_bytes_read << "\nlds_bytes_written " << c.lds_bytes_written << "\nlaunches_under_capture "
      << r.launches_under_capture << "\ncalls_refused_under_capture " << r.calls_refused_under_capture
      << "\ngraph_launches " << r.graph_launches << "\ngraph_nodes_updated " << r.graph_nodes_updated << "\n";
  if (reset) {
    c = Counters();
    r.launches_under_capture = r.calls_refused_under_capture = r.graph_launches = r.graph_nodes_updated = 0;
  }
  text = out.str();
  return text.c_str();
}
// One line per kernel: name, launches, workgroups, instructions, what these would be if each workgroup were the busiest
// of its launch, bytes read, bytes written.
HIP const char* gfx950_kernels(int reset) {
  Lock lock(runtime().mutex);
  static std::string text;
  std::ostringstream out;
  for (auto& [name, cost] : runtime().by_kernel) {
    const Counters& c = cost.counters;
    out << name << " " << c.launches << " " << c.workgroups << " " << c.instructions << " "
        << cost.if_all_were_the_busiest << " " << c.bytes_read << " " << c.bytes_written << "\n";
  }
  if (reset) runtime().by_kernel.clear();
  text = out.str();
  return text.c_str();
}
// One line per hazard found: "times text".
HIP const char* gfx950_hazards(int reset) {
  Lock lock(runtime().mutex);
  static std::string text;
  std::ostringstream out;
  for (auto& [what, times] : runtime().hazards) out << times << " " << what << "\n";
  if (reset) runtime().hazards.clear();
  text = out.str();
  return text.c_str();
}
