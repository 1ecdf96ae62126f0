// Runs the ROCm handlers that we ship, unmodified, inside XLA on platform cpu: test only.
//
// A handler sees XLA through the function table of its call frame. Here it gets that table with two entries replaced:
// the stream and the device ordinal come from the software GPU. Its buffers are the CPU client's, declared live for the
// time of the call. And as XLA does with command buffers, execute is never let loose on a plain stream: it is captured
// into a graph, so that whatever is forbidden under capture fails, and the graph is launched. With replay on, a graph
// is kept by its buffers' addresses, and a call with the same addresses replays it without calling the handler.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "hip_codes.h"
#include "xla/ffi/api/c_api.h"

namespace {

namespace hip = jax_dsv4::hip;
using Handler = XLA_FFI_Error* (*)(XLA_FFI_CallFrame*);

struct Target {
  Handler initialize, execute;
};

struct Bridge {
  std::mutex mutex;
  void* gpu = nullptr;
  std::map<std::string, Target> targets;
  hip::Stream stream = nullptr;
  bool replay = false;
  int64_t replayed = 0;
  std::map<std::vector<uint64_t>, hip::GraphExec> graphs;
};
Bridge& bridge() {
  static Bridge* b = new Bridge;
  return *b;
}

template <class F>
F* gpu(const char* name) {
  return reinterpret_cast<F*>(dlsym(bridge().gpu, name));
}

XLA_FFI_Error* get_stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = bridge().stream;
  return nullptr;
}
XLA_FFI_Error* get_device(XLA_FFI_DeviceOrdinal_Get_Args* args) {
  args->device_ordinal = 0;
  return nullptr;
}

XLA_FFI_Error* fail(const XLA_FFI_Api* api, const std::string& message) {
  XLA_FFI_Error_Create_Args args{};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message.c_str();
  args.errc = XLA_FFI_Error_Code_INTERNAL;
  return api->XLA_FFI_Error_Create(&args);
}

std::string message(const char* call, hip::Error error) {
  return std::string(call) + ": " + gpu<const char*(hip::Error)>("hipGetErrorString")(error);
}

size_t element_bytes(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_U8:
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_PRED:
      return 1;
    case XLA_FFI_DataType_BF16:
    case XLA_FFI_DataType_F16:
      return 2;
    default:
      return 4;
  }
}

size_t buffer_bytes(const XLA_FFI_Buffer* b) {
  size_t bytes = element_bytes(b->dtype);
  for (int64_t d = 0; d < b->rank; ++d) bytes *= static_cast<size_t>(b->dims[d]);
  return bytes;
}

// The call's buffers, live for as long as this lives.
class Live {
 public:
  explicit Live(const XLA_FFI_CallFrame& frame) {
    for (int64_t i = 0; i < frame.args.size; ++i) add(static_cast<XLA_FFI_Buffer*>(frame.args.args[i]), false);
    for (int64_t i = 0; i < frame.rets.size; ++i) add(static_cast<XLA_FFI_Buffer*>(frame.rets.rets[i]), true);
  }
  ~Live() {
    for (const XLA_FFI_Buffer* b : buffers_)
      gpu<int(const void*, size_t)>("gfx950_unregister")(b->data, buffer_bytes(b));
  }
  std::vector<uint64_t> addresses() const {
    std::vector<uint64_t> out;
    for (const XLA_FFI_Buffer* b : buffers_)
      out.push_back(reinterpret_cast<uint64_t>(b->data)), out.push_back(buffer_bytes(b));
    return out;
  }

 private:
  void add(const XLA_FFI_Buffer* b, bool writable) {
    gpu<void(const void*, size_t, int)>("gfx950_register")(b->data, buffer_bytes(b), writable);
    buffers_.push_back(b);
  }
  std::vector<const XLA_FFI_Buffer*> buffers_;
};

// What is in a call's attributes, as far as two calls on the same buffers may differ in it.
void add_attributes(const XLA_FFI_CallFrame& frame, std::vector<uint64_t>* key) {
  for (int64_t i = 0; i < frame.attrs.size; ++i) {
    if (frame.attrs.types[i] != XLA_FFI_AttrType_SCALAR) continue;
    const auto* scalar = static_cast<const XLA_FFI_Scalar*>(frame.attrs.attrs[i]);
    uint64_t bits = 0;
    std::memcpy(&bits, scalar->value, element_bytes(scalar->dtype));
    key->push_back(bits);
  }
}

XLA_FFI_Error* run(const char* name, XLA_FFI_CallFrame* frame) {
  Bridge& b = bridge();
  const std::lock_guard<std::mutex> lock(b.mutex);
  const Target& target = b.targets[name];
  // XLA asks for metadata through the same entry.
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata)
    return target.execute(frame);
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return nullptr;

  // What the function table of a newer jaxlib has beyond ours is not used by handlers built here.
  XLA_FFI_Api api = *frame->api;
  api.XLA_FFI_Stream_Get = get_stream;
  api.XLA_FFI_DeviceOrdinal_Get = get_device;
  const Live live(*frame);
  std::vector<uint64_t> key = live.addresses();
  key.push_back(reinterpret_cast<uint64_t>(target.execute));
  add_attributes(*frame, &key);

  auto found = b.replay ? b.graphs.find(key) : b.graphs.end();
  if (found != b.graphs.end()) {
    b.replayed++;
  } else {
    XLA_FFI_CallFrame call = *frame;
    call.api = &api;
    call.stage = XLA_FFI_ExecutionStage_INITIALIZE;
    if (XLA_FFI_Error* error = target.initialize(&call)) return error;
    call.stage = XLA_FFI_ExecutionStage_EXECUTE;
    hip::Graph graph = nullptr;
    hip::GraphExec exec = nullptr;
    gpu<hip::Error(hip::Stream, hip::CaptureMode)>("hipStreamBeginCapture")(b.stream, hip::kCaptureModeThreadLocal);
    XLA_FFI_Error* error = target.execute(&call);
    const hip::Error ended = gpu<hip::Error(hip::Stream, hip::Graph*)>("hipStreamEndCapture")(b.stream, &graph);
    if (error) return error;
    if (ended) return fail(frame->api, message("hipStreamEndCapture", ended));
    gpu<hip::Error(hip::GraphExec*, hip::Graph, void*, char*, size_t)>("hipGraphInstantiate")(&exec, graph, nullptr,
                                                                                              nullptr, 0);
    gpu<hip::Error(hip::Graph)>("hipGraphDestroy")(graph);
    found = b.graphs.insert_or_assign(key, exec).first;
  }
  const hip::Error launched = gpu<hip::Error(hip::GraphExec, hip::Stream)>("hipGraphLaunch")(found->second, b.stream);
  if (!b.replay) {
    gpu<hip::Error(hip::GraphExec)>("hipGraphExecDestroy")(found->second);
    b.graphs.erase(found);
  }
  return launched ? fail(frame->api, message("hipGraphLaunch", launched)) : nullptr;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

#define TARGETS(each)                                                                                       \
  each(aiter_plan) each(aiter_metadata_plan) each(aiter_decode) each(aiter_append) each(aiter_gluon_decode) \
      each(packed_append)
#define ON_CPU(name) \
  EXPORT XLA_FFI_Error* on_cpu_##name(XLA_FFI_CallFrame* frame) { return run(#name, frame); }
TARGETS(ON_CPU)

// Connects the library of handlers to the stand-in libamdhip64.so; both by path. Returns why it failed, or null.
EXPORT const char* bridge_connect(const char* handlers, const char* gpu_library) {
  Bridge& b = bridge();
  void* library = dlopen(handlers, RTLD_NOW);
  if (library) b.gpu = dlopen(gpu_library, RTLD_NOW);
  if (!library || !b.gpu) return dlerror();
#define NAME(name) #name,
  for (const char* name : {TARGETS(NAME)}) {
    const std::string symbol = std::string("dsv4_") + name;
    b.targets[name] = {reinterpret_cast<Handler>(dlsym(library, (symbol + "_initialize").c_str())),
                       reinterpret_cast<Handler>(dlsym(library, symbol.c_str()))};
    if (!b.targets[name].initialize || !b.targets[name].execute) return dlerror();
  }
  if (!b.stream) gpu<hip::Error(hip::Stream*)>("hipStreamCreate")(&b.stream);
  return nullptr;
}

EXPORT void bridge_replay(int on) {
  const std::lock_guard<std::mutex> lock(bridge().mutex);
  bridge().replay = on != 0;
  bridge().graphs.clear();
  bridge().replayed = 0;
}
EXPORT int64_t bridge_replayed() { return bridge().replayed; }
