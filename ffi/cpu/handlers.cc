// XLA FFI handlers on CPU: bind, check, hand to the launchers on XLA's own threads. Stateless, and nothing here waits.
#include <atomic>
#include <cstring>
#include <memory>
#include <utility>

#include "common/bind.h"
#include "cpu/launch.h"

#define JAX_DSV4_EXPORT __attribute__((visibility("default")))

namespace jax_dsv4::cpu {
namespace {

using Out = ffi::Result<Buffer>;

ffi::Future done(const ffi::Error& error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  if (error.success()) {
    promise.SetAvailable();
  } else {
    promise.SetError(error);
  }
  return future;
}

// What the lanes of one call share. It is on the heap because XLA's pool may start a lane after the call has completed:
// such a lane finds no task left and touches no buffer.
template <typename Body>
struct Call {
  Call(int64_t tasks, Body body) : tasks(tasks), body(std::move(body)), unfinished(tasks) {}
  const int64_t tasks;
  const Body body;
  std::atomic<int64_t> next{0};
  ffi::CountDownPromise unfinished;

  void run_lane(int64_t lane) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(i, lane);
      unfinished.CountDown();
    }
  }
};

// Runs body(task, lane) for all tasks on up to `max_lanes` threads: the caller's and XLA's. The caller never waits for
// another lane: the result completes with the last task.
template <typename Body>
ffi::Future parallel(ffi::ThreadPool pool, int64_t tasks, int64_t max_lanes, Body body) {
  if (tasks == 0) return done(ffi::Error::Success());
  auto call = std::make_shared<Call<Body>>(tasks, std::move(body));
  ffi::Future future(call->unfinished);
  int64_t lanes = pool.num_threads() < max_lanes ? pool.num_threads() : max_lanes;
  if (lanes > tasks) lanes = tasks;
  for (int64_t lane = 1; lane < lanes; ++lane) {
    pool.Schedule([call, lane] { call->run_lane(lane); });
  }
  call->run_lane(0);
  return future;
}

ffi::Error plan(Buffer swa_lengths, Buffer extra_lengths, Out kv_lengths, Out work_indptr, Out work_info_set,
                Out reduce_indptr, Out reduce_final_map, Out reduce_partial_map, int32_t swa_topk, int32_t extra_topk,
                int32_t active_workers, int32_t granularity, int32_t overhead, int32_t cut_cost) {
  PlanParams p;
  ffi::Error error = bind_plan_params(
      {swa_lengths, extra_lengths, *kv_lengths, *work_indptr, *work_info_set, *reduce_indptr, *reduce_final_map,
       *reduce_partial_map, swa_topk, extra_topk, active_workers, granularity, overhead, cut_cost},
      &p);
  if (!error.success()) return error;
  std::memset(p.work_info_set, 0, work_info_set->size_bytes());
  std::memset(p.reduce_final_map, 0, reduce_final_map->size_bytes());
  std::memset(p.reduce_partial_map, 0, reduce_partial_map->size_bytes());
  plan_serial(p);
  return ffi::Error::Success();
}

// A call is cut into items * head groups. More groups than 1 dequantise the same keys again, so only as many as keep
// the threads busy.
int32_t choose_head_groups(int32_t items, int32_t heads, int64_t threads) {
  int32_t groups = 1;
  while (groups < kMaxHeadGroups && static_cast<int64_t>(items) * groups < 2 * threads && heads / (2 * groups) >= 16) {
    groups *= 2;
  }
  return groups;
}

ffi::Future decode(ffi::ThreadPool pool, Buffer q, Buffer sink, Buffer swa_cache, Buffer swa_indices,
                   Buffer swa_lengths, Buffer extra_cache, Buffer extra_indices, Buffer extra_lengths,
                   Buffer kv_lengths, Buffer work_indptr, Buffer work_info_set, Buffer reduce_indptr,
                   Buffer reduce_final_map, Buffer reduce_partial_map, Out out, Out lse, Out partial_out,
                   Out partial_lse, Out counters, Out workspace, float scale, bool has_sink, int32_t swa_block_size,
                   int32_t swa_layout, int32_t extra_block_size, int32_t extra_layout) {
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
                                 kTokenCounters, &p, kPartialNumbers);
  if (!error.success()) return done(error);
  // Rows are given to a token by its segments: those that the plan names are only looked at.
  const int32_t partial_rows = static_cast<int32_t>(partial_out->dimensions()[0]);
  p.plan.max_partials = static_cast<int32_t>(reduce_partial_map.dimensions()[0]);
  Checker check("sparse_mla_decode");
  check.dtype(*workspace, "workspace", ffi::DataType::U8);
  check.shape(*workspace, "workspace", "(lanes, lane_bytes)", {-1, -1});
  if (!check.ok()) return done(check.error());
  const int64_t stride = workspace->dimensions()[1], lanes = workspace->dimensions()[0];
  check.require(lanes > 0 && stride >= static_cast<int64_t>(lane_bytes(p.heads)) + 64, "workspace",
                "have lanes of at least " + std::to_string(lane_bytes(p.heads) + 64) + " bytes",
                std::to_string(stride));
  if (!check.ok()) return done(check.error());
  uint8_t* scratch = data_of<uint8_t>(*workspace);

  const Kernels& kernels = select_kernels(p);
  const int32_t count = p.plan.work_indptr[p.plan.workers];
  const int32_t groups = choose_head_groups(count < 0 ? 0 : count, p.heads, pool.num_threads());
  const int32_t items = prepare_tokens(p, partial_rows, groups);
  return parallel(pool, static_cast<int64_t>(items) * groups, lanes,
                  [p, &kernels, groups, scratch, stride](int64_t task, int64_t lane) {
                    const uintptr_t at = reinterpret_cast<uintptr_t>(scratch + lane * stride);
                    run_task(p, kernels, groups, task, reinterpret_cast<uint8_t*>((at + 63) & ~uintptr_t{63}));
                  });
}

ffi::Future append_rows(ffi::ThreadPool pool, Buffer cache, Buffer latents, Buffer slots, Out updated,
                        int32_t block_size, int32_t layout) {
  AppendParams p;
  ffi::Error error = bind_append(cache, latents, slots, *updated, block_size, layout, &p);
  if (!error.success()) return done(error);
  if (p.data_out != p.cache.data) std::memcpy(p.data_out, p.cache.data, cache.size_bytes());
  // Shards own slots, not rows, so that equal slots are written in order whatever the number of threads.
  constexpr int64_t kRowsPerShard = 64;
  const int64_t wanted = (p.count + kRowsPerShard - 1) / kRowsPerShard, threads = pool.num_threads();
  const int32_t shards = static_cast<int32_t>(wanted < threads ? wanted : threads);
  return parallel(pool, shards, shards,
                  [p, shards](int64_t shard, int64_t) { append(p, static_cast<int32_t>(shard), shards); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(kPlan, plan,
                       ffi::Ffi::Bind()
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
                           .Attr<int32_t>("cut_cost"));

XLA_FFI_DEFINE_HANDLER(kDecode, decode,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
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
                           .Ret<Buffer>()  // workspace
                           .Attr<float>("scale")
                           .Attr<bool>("has_sink")
                           .Attr<int32_t>("swa_block_size")
                           .Attr<int32_t>("swa_layout")
                           .Attr<int32_t>("extra_block_size")
                           .Attr<int32_t>("extra_layout"));

XLA_FFI_DEFINE_HANDLER(kAppend, append_rows,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Buffer>()  // cache
                           .Arg<Buffer>()  // latents
                           .Arg<Buffer>()  // slots
                           .Ret<Buffer>()  // updated cache
                           .Attr<int32_t>("block_size")
                           .Attr<int32_t>("layout"));

}  // namespace jax_dsv4::cpu

// Found by jax_dsv4/_ffi.py through ctypes.
extern "C" {
JAX_DSV4_EXPORT XLA_FFI_Error* dsv4_plan(XLA_FFI_CallFrame* frame) { return jax_dsv4::cpu::kPlan(frame); }
JAX_DSV4_EXPORT XLA_FFI_Error* dsv4_decode(XLA_FFI_CallFrame* frame) { return jax_dsv4::cpu::kDecode(frame); }
JAX_DSV4_EXPORT XLA_FFI_Error* dsv4_append(XLA_FFI_CallFrame* frame) { return jax_dsv4::cpu::kAppend(frame); }

// The instruction set that a bf16 call on packed caches uses here.
JAX_DSV4_EXPORT const char* dsv4_cpu_isa() {
  jax_dsv4::DecodeParams p{};
  return jax_dsv4::cpu::select_kernels(p).name;
}
JAX_DSV4_EXPORT void dsv4_cpu_limit_isa(int highest) { jax_dsv4::cpu::limit_isa(highest); }
}
