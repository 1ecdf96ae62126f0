// XLA FFI handlers on CUDA: bind, check, enqueue. All of them may be captured into a graph: kernels are loaded at the
// initialize stage, buffers are XLA's, and nothing waits or reads back.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "common/bind.h"
#include "cuda/launch.h"

#define JAX_DSV4_EXPORT __attribute__((visibility("default")))

namespace jax_dsv4::cuda {
namespace {

using Out = ffi::Result<Buffer>;
using Stream = ffi::PlatformStream<cudaStream_t>;

// Multiprocessors of the largest Hopper; jax_dsv4/implementations/native.py: multiprocessors.
constexpr int kMostProcessors = 132;

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

ffi::Error plan(cudaStream_t stream, Buffer swa_lengths, Buffer extra_lengths, Out kv_lengths, Out work_indptr,
                Out work_info_set, Out reduce_indptr, Out reduce_final_map, Out reduce_partial_map, int32_t swa_topk,
                int32_t extra_topk, int32_t active_workers, int32_t granularity, int32_t overhead, int32_t cut_cost) {
  count_call(stream);
  PlanParams p;
  ffi::Error error = bind_plan_params(
      {swa_lengths, extra_lengths, *kv_lengths, *work_indptr, *work_info_set, *reduce_indptr, *reduce_final_map,
       *reduce_partial_map, swa_topk, extra_topk, active_workers, granularity, overhead, cut_cost},
      &p);
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

ffi::Error decode(cudaStream_t stream, Buffer q, Buffer sink, Buffer swa_cache, Buffer swa_indices, Buffer swa_lengths,
                  Buffer extra_cache, Buffer extra_indices, Buffer extra_lengths, Buffer kv_lengths, Buffer work_indptr,
                  Buffer work_info_set, Buffer reduce_indptr, Buffer reduce_final_map, Buffer reduce_partial_map,
                  Out out, Out lse, Out partial_out, Out partial_lse, Out counters, float scale, bool has_sink,
                  int32_t swa_block_size, int32_t swa_layout, int32_t extra_block_size, int32_t extra_layout) {
  count_call(stream);
  DecodeParams p;
  ffi::Error error = bind_decode({q,
                                  sink,
                                  swa_cache,
                                  swa_indices,
                                  swa_lengths,
                                  extra_cache,
                                  extra_indices,
                                  extra_lengths,
                                  kv_lengths,
                                  work_indptr,
                                  work_info_set,
                                  reduce_indptr,
                                  reduce_final_map,
                                  reduce_partial_map,
                                  *out,
                                  *lse,
                                  *partial_out,
                                  *partial_lse,
                                  *counters,
                                  scale,
                                  has_sink,
                                  swa_block_size,
                                  swa_layout,
                                  extra_block_size,
                                  extra_layout},
                                 /*counters_per_token=*/0, &p);
  if (!error.success()) return error;
  const int32_t stored_heads = (p.heads + kPartialHeads - 1) / kPartialHeads * kPartialHeads;
  const int64_t rows = partial_out->dimensions()[0] * p.heads / stored_heads;
  if (rows < p.plan.max_partials) p.plan.max_partials = static_cast<int32_t>(rows);
  return status_of("sparse_mla_decode", launch_decode(p, stream));
}

ffi::Error append_rows(cudaStream_t stream, Buffer cache, Buffer latents, Buffer slots, Out updated, int32_t block_size,
                       int32_t layout) {
  count_call(stream);
  AppendParams p;
  ffi::Error error = bind_append(cache, latents, slots, *updated, block_size, layout, &p);
  if (!error.success()) return error;
  cudaError_t status = cudaSuccess;
  if (p.data_out != p.cache.data) {
    status = cudaMemcpyAsync(p.data_out, p.cache.data, cache.size_bytes(), cudaMemcpyDeviceToDevice, stream);
  }
  if (status == cudaSuccess) status = launch_append(p, stream);
  return status_of("append", status);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(kInitialize, initialize,
                       ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER(kPlan, plan,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<Buffer>()  // swa_lengths
                           .Arg<Buffer>()  // extra_lengths
                           .Ret<Buffer>()  // kv_lengths
                           .Ret<Buffer>()  // work_indptr
                           .Ret<Buffer>()  // work_info_set
                           .Ret<Buffer>()  // reduce_indptr
                           .Ret<Buffer>()  // reduce_final_map
                           .Ret<Buffer>()  // reduce_partial_map
                           .Attr<int32_t>("swa_topk")
                           .Attr<int32_t>("extra_topk")
                           .Attr<int32_t>("active_workers")
                           .Attr<int32_t>("granularity")
                           .Attr<int32_t>("overhead")
                           .Attr<int32_t>("cut_cost"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kDecode, decode,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<Buffer>()  // q
                           .Arg<Buffer>()  // attn_sink
                           .Arg<Buffer>()  // swa.cache
                           .Arg<Buffer>()  // swa.indices
                           .Arg<Buffer>()  // swa.lengths
                           .Arg<Buffer>()  // extra.cache
                           .Arg<Buffer>()  // extra.indices
                           .Arg<Buffer>()  // extra.lengths
                           .Arg<Buffer>()  // plan.kv_lengths
                           .Arg<Buffer>()  // plan.work_indptr
                           .Arg<Buffer>()  // plan.work_info_set
                           .Arg<Buffer>()  // plan.reduce_indptr
                           .Arg<Buffer>()  // plan.reduce_final_map
                           .Arg<Buffer>()  // plan.reduce_partial_map
                           .Ret<Buffer>()  // out
                           .Ret<Buffer>()  // lse
                           .Ret<Buffer>()  // partial_out
                           .Ret<Buffer>()  // partial_lse
                           .Ret<Buffer>()  // counters
                           .Attr<float>("scale")
                           .Attr<bool>("has_sink")
                           .Attr<int32_t>("swa_block_size")
                           .Attr<int32_t>("swa_layout")
                           .Attr<int32_t>("extra_block_size")
                           .Attr<int32_t>("extra_layout"),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kAppend, append_rows,
                       ffi::Ffi::Bind()
                           .Ctx<Stream>()
                           .Arg<Buffer>()  // cache
                           .Arg<Buffer>()  // latents
                           .Arg<Buffer>()  // slots
                           .Ret<Buffer>()  // updated cache
                           .Attr<int32_t>("block_size")
                           .Attr<int32_t>("layout"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_dsv4::cuda

// Found by jax_dsv4/_ffi.py through ctypes.
extern "C" {
JAX_DSV4_EXPORT XLA_FFI_Error* dsv4_initialize(XLA_FFI_CallFrame* frame) { return jax_dsv4::cuda::kInitialize(frame); }
JAX_DSV4_EXPORT XLA_FFI_Error* dsv4_plan(XLA_FFI_CallFrame* frame) { return jax_dsv4::cuda::kPlan(frame); }
JAX_DSV4_EXPORT XLA_FFI_Error* dsv4_decode(XLA_FFI_CallFrame* frame) { return jax_dsv4::cuda::kDecode(frame); }
JAX_DSV4_EXPORT XLA_FFI_Error* dsv4_append(XLA_FFI_CallFrame* frame) { return jax_dsv4::cuda::kAppend(frame); }

// Handler calls since the library was loaded, and those made while a graph was being captured.
JAX_DSV4_EXPORT void dsv4_cuda_calls(int64_t* all, int64_t* captured) {
  *all = jax_dsv4::cuda::calls.load();
  *captured = jax_dsv4::cuda::captured_calls.load();
}
}
