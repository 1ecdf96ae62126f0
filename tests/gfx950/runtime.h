// The state of the stand-in HIP runtime, and what its files share: hip.cc has the calls that our handlers and AITER's
// programs make, hip_for_xla.cc those that only XLA makes.
#ifndef JAX_DSV4_TESTS_GFX950_RUNTIME_H_
#define JAX_DSV4_TESTS_GFX950_RUNTIME_H_

#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "hip_codes.h"
#include "machine.h"

struct dim3 {
  uint32_t x, y, z;
};

#define HIP extern "C" __attribute__((visibility("default")))

HIP jax_dsv4::hip::Error hipMalloc(void** p, size_t bytes);
HIP jax_dsv4::hip::Error hipFree(void* p);
HIP jax_dsv4::hip::Error hipMemcpy(void* to, const void* from, size_t bytes, int kind);
HIP jax_dsv4::hip::Error hipStreamCreateWithFlags(jax_dsv4::hip::Stream* s, unsigned flags);

namespace gfx950 {

using namespace jax_dsv4::hip;
using Work = std::function<Error()>;

struct Capture {
  CaptureMode mode;
  std::thread::id thread;
  Stream origin = nullptr;
  bool invalidated = false;
  std::set<Stream> streams;   // the origin and those that joined through an event
  std::set<Stream> unjoined;  // joined ones whose work the origin has not waited for
  std::vector<Work> work;     // in order of capture, which respects every dependency
};

// All launches of a kernel together.
struct KernelCost {
  Counters counters;
  // Instructions, had every workgroup of a launch taken as many as its busiest: over `instructions`, the imbalance.
  uint64_t if_all_were_the_busiest = 0;
};

struct Runtime {
  std::recursive_mutex mutex;
  Memory memory;
  Counters counters;
  std::map<std::string, KernelCost> by_kernel;
  std::map<std::string, uint64_t> hazards;
  std::string message;  // of the last fault
  std::map<std::string, std::shared_ptr<Program>>
      programs;  // by device and content: a code object is disassembled once
  std::set<Stream> streams;
  std::vector<std::shared_ptr<Capture>> captures;
  Options options{getenv("GFX950_HAZARDS") != nullptr, getenv("GFX950_EXACT_LGKM") != nullptr, kLdsLatency, kVmLatency};
  uint64_t launches_under_capture = 0, calls_refused_under_capture = 0, graph_launches = 0, graph_nodes_updated = 0;
};

constexpr const char* kDeviceName = "AMD Instinct MI355X (software)";
constexpr size_t kMemoryBytes = size_t{288} << 30;  // what it claims to have

Runtime& runtime();
using Lock = std::lock_guard<std::recursive_mutex>;

Error failed(Error e);  // remembers it for hipGetLastError
int devices();
Capture* capture_of(Stream s);
Error refuse(Capture& c, Error e);
Error check_unsafe_call();
Error enqueue(Stream s, Work work);
Error copy(Stream s, void* to, const void* from, size_t bytes, int kind);
Work copying(void* to, const void* from, size_t bytes, int kind);
Work setting(void* to, uint32_t value, size_t bytes, size_t count);  // `count` elements of `bytes`

// A launch with its arguments copied, ready to run.
Error prepare_launch(Function f, dim3 grid, dim3 block, unsigned shared, void** parameters, void** extra, Work* work);

// The kernel that a compiler registered for a function of the host, its code loaded if this is its first use.
Error registered_function(const void* host, Function* function);

GraphNode add_node(Graph graph, Work work);

}  // namespace gfx950

struct ihipStream_t {
  int device = 0;
  bool blocking = true;  // waits for the legacy default stream
  std::shared_ptr<gfx950::Capture> capture;
};
struct ihipModuleSymbol_t {
  std::shared_ptr<gfx950::Program> program;
  const gfx950::Kernel* kernel = nullptr;
};
struct ihipModule_t {
  std::shared_ptr<gfx950::Program> program;
  std::map<std::string, std::unique_ptr<ihipModuleSymbol_t>> functions;
};
struct hipGraphNode {
  gfx950::Work work;
};
struct ihipGraph {
  std::vector<std::unique_ptr<hipGraphNode>> nodes;  // as they were added, which respects every dependency
};
struct hipGraphExec {
  std::vector<std::pair<const hipGraphNode*, gfx950::Work>> nodes;  // whose node it is, and what it does by now
};

#endif  // JAX_DSV4_TESTS_GFX950_RUNTIME_H_
