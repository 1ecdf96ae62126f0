// The HIP calls of JAX's ROCm plugin that neither our handlers nor AITER's programs make: graphs built node by node and
// updated in place, pinned memory, the driver's names for copies, and questions about the device.
#include <elf.h>

#include <cstdio>
#include <cstring>

#include "runtime.h"

using namespace gfx950;

// ---- Graphs.

struct hipKernelNodeParams {
  dim3 block;
  void** extra;
  void* function;
  dim3 grid;
  void** parameters;
  unsigned shared_bytes;
};
struct hipMemsetParams {
  void* to;
  unsigned element_bytes;
  size_t height, pitch;
  unsigned value;
  size_t width;  // in elements
};

namespace {

Error prepare(const hipKernelNodeParams& p, Work* work) {
  return prepare_launch(static_cast<Function>(p.function), p.grid, p.block, p.shared_bytes, p.parameters, p.extra,
                        work);
}

Error prepare(const hipMemsetParams& p, Work* work) {
  if (p.height != 1) return failed(kErrorInvalidValue);  // rows are not modelled
  return *work = setting(p.to, p.value, p.element_bytes, p.width), kSuccess;
}

Error prepare(Graph child, Work* work) {
  std::vector<Work> steps;
  for (const auto& node : child->nodes) steps.push_back(node->work);
  *work = [steps] {
    for (const Work& step : steps)
      if (Error e = step()) return e;
    return kSuccess;
  };
  return kSuccess;
}

template <class Parameters>
Error add(GraphNode* node, Graph graph, const Parameters& parameters) {
  Lock lock(runtime().mutex);
  Work work;
  if (Error e = prepare(parameters, &work)) return e;
  return *node = add_node(graph, std::move(work)), kSuccess;
}

Error replace(GraphExec exec, GraphNode node, Work work) {
  for (auto& [of, now] : exec->nodes)
    if (of == node) return now = std::move(work), runtime().graph_nodes_updated++, kSuccess;
  return failed(kErrorInvalidValue);
}

template <class Parameters>
Error update(GraphExec exec, GraphNode node, const Parameters& parameters) {
  Lock lock(runtime().mutex);
  Work work;
  if (Error e = prepare(parameters, &work)) return e;
  return replace(exec, node, std::move(work));
}

}  // namespace

// What a capture recorded is a chain: its first node is its one root.
HIP Error hipGraphGetRootNodes(Graph graph, GraphNode*, size_t* count) {
  return *count = graph->nodes.empty() ? 0 : 1, kSuccess;
}
HIP Error hipGraphCreate(Graph* graph, unsigned) { return *graph = new ihipGraph, kSuccess; }
HIP Error hipGraphAddKernelNode(GraphNode* node, Graph graph, const GraphNode*, size_t, const hipKernelNodeParams* p) {
  return add(node, graph, *p);
}
HIP Error hipGraphAddMemsetNode(GraphNode* node, Graph graph, const GraphNode*, size_t, const hipMemsetParams* p) {
  return add(node, graph, *p);
}
HIP Error hipGraphAddChildGraphNode(GraphNode* node, Graph graph, const GraphNode*, size_t, Graph child) {
  return add(node, graph, child);
}
HIP Error hipGraphAddMemcpyNode1D(GraphNode* node, Graph graph, const GraphNode*, size_t, void* to, const void* from,
                                  size_t bytes, int kind) {
  Lock lock(runtime().mutex);
  return *node = add_node(graph, copying(to, from, bytes, kind)), kSuccess;
}
HIP Error hipGraphAddEmptyNode(GraphNode* node, Graph graph, const GraphNode*, size_t) {
  Lock lock(runtime().mutex);
  return *node = add_node(graph, [] { return kSuccess; }), kSuccess;
}
HIP Error hipGraphExecKernelNodeSetParams(GraphExec exec, GraphNode node, const hipKernelNodeParams* p) {
  return update(exec, node, *p);
}
HIP Error hipGraphExecMemsetNodeSetParams(GraphExec exec, GraphNode node, const hipMemsetParams* p) {
  return update(exec, node, *p);
}
HIP Error hipGraphExecChildGraphNodeSetParams(GraphExec exec, GraphNode node, Graph child) {
  return update(exec, node, child);
}
HIP Error hipGraphExecMemcpyNodeSetParams1D(GraphExec exec, GraphNode node, void* to, const void* from, size_t bytes,
                                            int kind) {
  Lock lock(runtime().mutex);
  return replace(exec, node, copying(to, from, bytes, kind));
}

// ---- Memory.

HIP Error hipHostMalloc(void** p, size_t bytes, unsigned) { return hipMalloc(p, bytes); }
HIP Error hipHostFree(void* p) { return hipFree(p); }
HIP Error hipMemGetInfo(size_t* available, size_t* total) { return *available = *total = kMemoryBytes, kSuccess; }
HIP Error hipDeviceTotalMem(size_t* bytes, int) { return *bytes = kMemoryBytes, kSuccess; }
HIP Error hipMemcpyDtoH(void* to, void* from, size_t bytes) { return hipMemcpy(to, from, bytes, kMemcpyDeviceToHost); }
HIP Error hipMemcpyHtoD(void* to, void* from, size_t bytes) { return hipMemcpy(to, from, bytes, kMemcpyHostToDevice); }
HIP Error hipMemcpyDtoHAsync(void* to, void* from, size_t bytes, Stream s) {
  return copy(s, to, from, bytes, kMemcpyDeviceToHost);
}
HIP Error hipMemcpyHtoDAsync(void* to, const void* from, size_t bytes, Stream s) {
  return copy(s, to, from, bytes, kMemcpyHostToDevice);
}
HIP Error hipMemcpyDtoDAsync(void* to, void* from, size_t bytes, Stream s) {
  return copy(s, to, from, bytes, kMemcpyDeviceToDevice);
}
HIP Error hipMemcpyWithStream(void* to, const void* from, size_t bytes, int kind, Stream s) {
  return copy(s, to, from, bytes, kind);
}
HIP Error hipPointerGetAttribute(void* data, int attribute, void* p) {
  Lock lock(runtime().mutex);
  const bool live = runtime().memory.find(reinterpret_cast<uint64_t>(p), 1);
  constexpr int kMemoryType = 2, kDeviceOrdinal = 9, kHost = 1, kDevice = 2;
  if (attribute == kMemoryType) return *static_cast<int*>(data) = live ? kDevice : kHost, kSuccess;
  if (attribute == kDeviceOrdinal && live) return *static_cast<int*>(data) = 0, kSuccess;
  return failed(kErrorInvalidValue);
}

// ---- Devices and streams.

HIP Error hipDeviceGet(int* device, int ordinal) { return *device = ordinal, kSuccess; }
HIP Error hipDeviceGetName(char* name, int bytes, int) { return snprintf(name, bytes, "%s", kDeviceName), kSuccess; }
HIP Error hipDeviceGetPCIBusId(char* id, int bytes, int device) {
  return snprintf(id, bytes, "0000:%02x:00.0", device), kSuccess;
}
HIP Error hipDeviceCanAccessPeer(int* can, int, int) { return *can = 1, kSuccess; }
HIP Error hipDeviceEnablePeerAccess(int, unsigned) { return kSuccess; }
HIP Error hipDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -1, kSuccess; }
HIP Error hipStreamCreateWithPriority(Stream* s, unsigned flags, int) { return hipStreamCreateWithFlags(s, flags); }
HIP int hipGetStreamDeviceId(Stream s) { return s ? s->device : 0; }
HIP Error hipLaunchHostFunc(Stream s, void (*function)(void*), void* data) {
  {
    Lock lock(runtime().mutex);
    if (capture_of(s)) return enqueue(s, [=] { return function(data), kSuccess; });
  }
  return function(data), kSuccess;  // it may take locks of its own
}

// ---- Kernels and modules.

HIP Error hipGetFuncBySymbol(Function* function, const void* symbol) {
  Lock lock(runtime().mutex);
  return registered_function(symbol, function);
}
HIP Error hipFuncGetAttribute(int* value, int attribute, Function f) {
  const int values[] = {f->kernel->max_workgroup, static_cast<int>(f->kernel->lds_bytes)};
  if (attribute < 0 || attribute > 1) return *value = 0, kSuccess;
  return *value = values[attribute], kSuccess;
}
HIP Error hipFuncSetAttribute(const void*, int, int) { return kSuccess; }
HIP Error hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function, int, size_t) {
  return *blocks = 1, kSuccess;
}
HIP Error hipModuleGetGlobal(void** p, size_t* bytes, Module module, const char* name) {
  Lock lock(runtime().mutex);
  const auto found = module->program->objects.find(name);
  if (found == module->program->objects.end()) return failed(kErrorNotFound);
  *p = module->program->image.get() + found->second.offset;
  if (bytes) *bytes = found->second.bytes;
  return kSuccess;
}
