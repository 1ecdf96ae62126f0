// XLA FFI handlers on CUDA: bind, check, enqueue. All of them may be captured into a graph: kernels are loaded at the
// initialize stage, buffers are XLA's, and nothing waits or reads back.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "common/bind.h"
#include "cuda/launch.h"

namespace jax_dsv4::cuda {
namespace {

// Proof of capture (docs/hopper.md): a captured program calls its handlers while XLA records the graph and not when it
// runs.
std::atomic<int64_t> calls{0}, captured_calls{0};

void count_call(cudaStream_t stream) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capturing);
  calls.fetch_add(1, std::memory_order_relaxed);
  if (capturing == cudaStreamCaptureStatusActive) captured_calls.fetch_add(1, std::memory_order_relaxed);
}

ffi::Error status_of(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  const auto code = status == cudaErrorNotSupported ? ffi::ErrorCode::kUnimplemented : ffi::ErrorCode::kInternal;
  return ffi::Error(code, std::string(op) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

// Once per device: XLA runs this stage before every execution, outside capture.
ffi::Error initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  constexpr int kMaxDevices = 64;
  static std::atomic<bool> ready[kMaxDevices];
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess && device < kMaxDevices && ready[device].load(std::memory_order_acquire))
    return ffi::Error::Success();
  if (status == cudaSuccess) status = prepare_plan();
  if (status == cudaSuccess) status = prepare_decode();
  if (status == cudaSuccess) status = prepare_append();
  if (status == cudaSuccess && device < kMaxDevices) ready[device].store(true, std::memory_order_release);
  return status_of("jax_dsv4", status);
}

ffi::Error plan(const PlanOperands& o, cudaStream_t stream) {
  count_call(stream);
  PlanParams p;
  const ffi::Error error = fill_plan_params(o, &p);
  if (!error.success()) return error;
  // A program may have been lowered where this device was not known, so it asks for the workers that a device of
  // kMostProcessors should have; a smaller one has room for as many fewer.
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status_of("plan_decode", status);
  const int64_t workers = static_cast<int64_t>(p.active_workers) * std::min(processors, kMostProcessors);
  p.active_workers = std::max(1, static_cast<int>(workers / kMostProcessors));
  return status_of("plan_decode", launch_plan(p, stream));
}

ffi::Error decode(const DecodeOperands& o, cudaStream_t stream) {
  count_call(stream);
  DecodeParams p;
  const ffi::Error error = fill_decode_params(o, /*counters_per_token=*/0, /*partial_numbers=*/1, &p);
  if (!error.success()) return error;
  const int32_t stored_heads = (p.heads + kPartialHeads - 1) / kPartialHeads * kPartialHeads;
  const int64_t rows = o.partial_out.dimensions()[0] * p.heads / stored_heads;
  if (rows < p.plan.max_partials) p.plan.max_partials = static_cast<int32_t>(rows);
  return status_of("sparse_mla_decode", launch_decode(p, stream));
}

ffi::Error append_rows(const AppendOperands& o, cudaStream_t stream) {
  count_call(stream);
  AppendParams p;
  const ffi::Error error = fill_append_params(o, &p);
  if (!error.success()) return error;
  cudaError_t status = cudaSuccess;
  if (p.data_out != p.cache.data) {
    status = cudaMemcpyAsync(p.data_out, p.cache.data, o.cache.size_bytes(), cudaMemcpyDeviceToDevice, stream);
  }
  if (status == cudaSuccess) status = launch_append(p, stream);
  return status_of("append", status);
}

auto on_stream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }
constexpr ffi::Traits kCapturable = ffi::Traits::kCmdBufferCompatible;

}  // namespace

JAX_DSV4_TARGET(dsv4_initialize, initialize, ffi::Ffi::BindInitialize().RemainingArgs().RemainingRets().Attrs())
JAX_DSV4_TARGET(dsv4_plan, taking_struct(plan), plan_binding(on_stream()), {kCapturable})
JAX_DSV4_TARGET(dsv4_decode, taking_struct(decode), decode_binding(on_stream()), {kCapturable})
JAX_DSV4_TARGET(dsv4_append, taking_struct(append_rows), append_binding(on_stream()), {kCapturable})

// Handler calls since the library was loaded, and those made while a graph was being captured.
JAX_DSV4_EXPORT void dsv4_cuda_calls(int64_t* all, int64_t* captured) {
  *all = calls.load();
  *captured = captured_calls.load();
}

}  // namespace jax_dsv4::cuda
