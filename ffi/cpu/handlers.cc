// XLA FFI handlers on CPU: bind, check, hand to the launchers on XLA's own threads. Stateless.
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <utility>

#include "common/bind.h"
#include "cpu/choose.h"
#include "cpu/launch.h"

namespace jax_dsv4::cpu {
namespace {

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

using Clock = std::chrono::steady_clock;

// Between two looks at what another thread writes.
inline void pause() {
#if defined(__x86_64__)
  for (int i = 0; i < 8; ++i) __builtin_ia32_pause();
#endif
}

// The CPUs that a call's lanes run on. Linux often wakes a thread on the CPU of the one that woke it, and moves it only
// after milliseconds, though another CPU is idle: two lanes of a call would then take turns.
class Cpus {
 public:
  // For as long as it lives, the calling thread has a CPU that no other lane was on when it began, if it is allowed
  // one.
  class Lane {
   public:
#if defined(__linux__)
    explicit Lane(Cpus& cpus) {
      if (cpus.take(sched_getcpu()) || sched_getaffinity(0, sizeof before_, &before_) != 0) return;
      cpu_set_t free;
      CPU_ZERO(&free);
      for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &before_) && !cpus.taken(cpu)) CPU_SET(cpu, &free);
      }
      moved_ = CPU_COUNT(&free) > 0 && sched_setaffinity(0, sizeof free, &free) == 0;
      if (moved_) cpus.take(sched_getcpu());
    }
    ~Lane() {
      if (moved_) sched_setaffinity(0, sizeof before_, &before_);
    }

   private:
    cpu_set_t before_;
    bool moved_ = false;
#else
    explicit Lane(Cpus&) {}
#endif
  };

 private:
  static constexpr int kMost = 1024;

  // False: it is taken already.
  bool take(int cpu) {
    if (cpu < 0 || cpu >= kMost) return true;
    const uint64_t bit = uint64_t{1} << cpu % 64;
    return (taken_[cpu / 64].fetch_or(bit, std::memory_order_relaxed) & bit) == 0;
  }
  bool taken(int cpu) const { return taken_[cpu / 64].load(std::memory_order_relaxed) >> cpu % 64 & 1; }

  std::atomic<uint64_t> taken_[kMost / 64] = {};
};

// What the lanes of one call share. It is on the heap because XLA's pool may start a lane after the call has completed:
// such a lane finds no task left and touches no buffer.
template <typename Body>
struct Call {
  Call(int64_t tasks, Body body) : tasks(tasks), body(std::move(body)), unfinished(tasks), running(tasks) {}
  const int64_t tasks;
  const Body body;
  std::atomic<int64_t> next{0};
  ffi::CountDownPromise unfinished;
  std::atomic<int64_t> running;
  Cpus cpus;

  void run_lane(int64_t lane) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(i, lane);
      unfinished.CountDown();
      running.fetch_sub(1, std::memory_order_relaxed);
    }
  }

  // Looks for the others' last tasks: for as long as this thread has worked, and not for long. Who sleeps takes tens of
  // microseconds to wake up, more than a short call itself.
  void linger(Clock::duration worked) const {
    constexpr std::chrono::microseconds kLongest{500};
    const Clock::time_point until = Clock::now() + (worked < kLongest ? worked : kLongest);
    while (running.load(std::memory_order_relaxed) > 0 && Clock::now() < until) pause();
  }
};

// Runs body(task, lane) for all tasks on up to `max_lanes` threads: the caller's and XLA's. The result completes with
// the last task, whether the caller is still here or not.
template <typename Body>
ffi::Future parallel(ffi::ThreadPool pool, int64_t tasks, int64_t max_lanes, Body body) {
  if (tasks == 0) return done(ffi::Error::Success());
  auto call = std::make_shared<Call<Body>>(tasks, std::move(body));
  ffi::Future future(call->unfinished);
  int64_t lanes = pool.num_threads() < max_lanes ? pool.num_threads() : max_lanes;
  if (lanes > tasks) lanes = tasks;
  const Cpus::Lane here(call->cpus);  // before there are others: one that wakes up on this CPU is to leave it
  for (int64_t lane = 1; lane < lanes; ++lane) {
    pool.Schedule([call, lane] {
      if (call->next.load(std::memory_order_relaxed) >= call->tasks) return;
      const Cpus::Lane here(call->cpus);
      call->run_lane(lane);
    });
  }
  const Clock::time_point begin = Clock::now();
  call->run_lane(0);
  call->linger(Clock::now() - begin);
  return future;
}

ffi::Error plan(const PlanOperands& o) {
  PlanParams p;
  const ffi::Error error = fill_plan_params(o, &p);
  if (!error.success()) return error;
  std::memset(p.work_info_set, 0, o.plan.work_info_set.size_bytes());
  std::memset(p.reduce_final_map, 0, o.plan.reduce_final_map.size_bytes());
  std::memset(p.reduce_partial_map, 0, o.plan.reduce_partial_map.size_bytes());
  plan_serial(p);
  return ffi::Error::Success();
}

struct CpuDecodeOperands : DecodeOperands {
  Buffer workspace;
};

ffi::Future decode(const CpuDecodeOperands& o, ffi::ThreadPool pool) {
  DecodeParams p;
  const ffi::Error error = fill_decode_params(o, kTokenCounters, kPartialNumbers, &p);
  if (!error.success()) return done(error);
  // Rows are given to a token by its segments: those that the plan names are only looked at.
  const int32_t partial_rows = static_cast<int32_t>(o.partial_out.dimensions()[0]);
  p.plan.max_partials = static_cast<int32_t>(o.plan.reduce_partial_map.dimensions()[0]);
  Checker check("sparse_mla_decode");
  check.buffer(o.workspace, "workspace", ffi::DataType::U8, "(lanes, lane_bytes)", {-1, -1});
  if (!check.ok()) return done(check.error());
  const int64_t stride = o.workspace.dimensions()[1], lanes = o.workspace.dimensions()[0];
  // Where lanes have no room for all heads, tasks have fewer.
  const int64_t least = static_cast<int64_t>(lane_bytes(group_heads(p.heads, kMaxHeadGroups))) + 64;
  check.require(lanes > 0 && stride >= least, "workspace", Text("have lanes of at least ") + least + " bytes", stride);
  if (!check.ok()) return done(check.error());
  uint8_t* scratch = data_of<uint8_t>(o.workspace);

  const Kernels& kernels = select_kernels(p);
  int32_t groups = choose_head_groups(count_tasks(p, kernels.tile_keys), p.heads, pool.num_threads());
  while (static_cast<int64_t>(lane_bytes(group_heads(p.heads, groups))) + 64 > stride) groups *= 2;
  const int32_t items = prepare_tokens(p, kernels.tile_keys, partial_rows, groups);
  return parallel(pool, static_cast<int64_t>(items) * groups, lanes,
                  [p, &kernels, groups, scratch, stride](int64_t task, int64_t lane) {
                    const uintptr_t at = reinterpret_cast<uintptr_t>(scratch + lane * stride);
                    run_task(p, kernels, groups, task, reinterpret_cast<uint8_t*>((at + 63) & ~uintptr_t{63}));
                  });
}

ffi::Future append_rows(const AppendOperands& o, ffi::ThreadPool pool) {
  AppendParams p;
  const ffi::Error error = fill_append_params(o, &p);
  if (!error.success()) return done(error);
  if (p.data_out != p.cache.data) std::memcpy(p.data_out, p.cache.data, o.cache.size_bytes());
  // Shards own slots, not rows, so that equal slots are written in order whatever the number of threads.
  constexpr int64_t kRowsPerShard = 64;
  const int64_t wanted = (p.count + kRowsPerShard - 1) / kRowsPerShard, threads = pool.num_threads();
  const int32_t shards = static_cast<int32_t>(wanted < threads ? wanted : threads);
  return parallel(pool, shards, shards,
                  [p, shards](int64_t shard, int64_t) { append(p, static_cast<int32_t>(shard), shards); });
}

auto with_threads() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace

JAX_DSV4_TARGET(dsv4_plan, taking_struct(plan), plan_binding(ffi::Ffi::Bind()))
JAX_DSV4_TARGET(dsv4_decode, taking_struct(decode), decode_binding(with_threads()).Ret<Buffer>())
JAX_DSV4_TARGET(dsv4_append, taking_struct(append_rows), append_binding(with_threads()))

// The instruction set that a bf16 call uses here, and in *why the reason.
JAX_DSV4_EXPORT int dsv4_cpu_isa(const char** why) {
  const Choice chosen = choice();
  *why = chosen.why;
  return chosen.isa;
}

JAX_DSV4_EXPORT void dsv4_cpu_name_isa(int isa) { name_isa(isa); }

// How many tasks share the heads of each of `items`.
JAX_DSV4_EXPORT int dsv4_cpu_head_groups(int items, int heads, int threads) {
  return choose_head_groups(items, heads, threads);
}

// The rule itself, of any processor.
JAX_DSV4_EXPORT int dsv4_cpu_choose(const char* vendor, uint32_t isas, bool amx_refused, int named, const char** why) {
  const Choice chosen = choose({vendor, isas, amx_refused}, named);
  *why = chosen.why;
  return chosen.isa;
}

}  // namespace jax_dsv4::cpu
