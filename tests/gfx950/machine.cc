// Runs a launch: workgroups one after another, the waves of each in lockstep, memory operations landing late.
//
// Lockstep and latency are not decoration. A wave that runs alone to its barrier, or a load that lands at once, gives
// wrong results with AITER's kernels: they share LDS and overwrite registers on the assumption that waves keep pace and
// that a load takes its time.
#include "machine.h"

#include <xmmintrin.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace gfx950 {
namespace {

std::string hex(uint64_t x) {
  char text[32];
  snprintf(text, sizeof text, "0x%llX", static_cast<unsigned long long>(x));
  return text;
}

void report(Wave& w, const std::string& text) { w.group->launch->hazards[text]++; }

void land(Wave& w, const Pending& op) {
  switch (op.target) {
    case Pending::kNothing:
      break;
    case Pending::kSgprs:
      for (int k = 0; k < op.count; ++k) w.set_scalar(op.reg + k, op.scalars[k]);
      break;
    case Pending::kVgprs:
      for (int k = 0; k < op.count; ++k) {
        Lanes& to = w.v[op.reg + k];
        for (int l = 0; l < kLanes; ++l)
          if (op.lanes >> l & 1) to[l] = (to[l] & op.keep) | (op.data[k][l] & ~op.keep);
      }
      break;
    case Pending::kLds:
      for (int l = 0; l < kLanes; ++l)
        if (op.lanes >> l & 1)
          for (int k = 0; k < op.count; ++k) memcpy(&w.group->lds[op.where[l] + 4 * k], &op.data[k][l], 4);
      break;
  }
}

// "the wait lgkmcnt(4) at 0x3AB8 would have to be lgkmcnt(2)", if there was a wait at all.
std::string needed_wait(const Wait& wait, Counter counter, uint64_t sequence) {
  const std::string name = counter == Counter::kVm ? "vmcnt" : "lgkmcnt";
  if (wait.last_value < 0 || wait.last_issued < sequence) return "no " + name + " wait lies between";
  return "the wait " + name + "(" + std::to_string(wait.last_value) + ") at " + hex(wait.last_address) +
         " would have to be " + name + "(" + std::to_string(wait.last_issued - sequence) + ")";
}

void report_register(Wave& w, const Instruction& i, Counter counter, uint64_t sequence, const std::string& name) {
  const int c = static_cast<int>(counter);
  report(w, name + " used at " + hex(i.address) + " (" + i.text + ") is still being loaded by " +
                hex(w.issue_address[c][sequence]) + "; " + needed_wait(w.wait[c], counter, sequence));
}

std::string register_name(int reg) {
  return reg < kAccum ? "v" + std::to_string(reg) : "a" + std::to_string(reg - kAccum);
}

}  // namespace

[[noreturn]] void fault(const Wave& wave, const Instruction& i, const std::string& what) {
  throw Fault("software gfx950: " + what + "; kernel " + wave.group->launch->kernel->name + ", wave " +
              std::to_string(wave.id) + ", at " + hex(i.address) + ": " + i.text);
}

void Wave::set_exec(uint64_t mask) {
  s[kExec] = static_cast<uint32_t>(mask), s[kExec + 1] = static_cast<uint32_t>(mask >> 32);
  exec_full = mask == ~uint64_t{0};
  for (int l = 0; l < kLanes; ++l) exec_lanes[l] = mask >> l & 1 ? ~0u : 0;
}

void Wave::set_scalar(int reg, uint32_t value) {
  s[reg] = value;
  if (reg == kExec || reg == kExec + 1) set_exec(exec());
}

uint8_t* locate(Wave& w, const Instruction& i, uint64_t address, uint32_t bytes, bool writes) {
  Launch& launch = *w.group->launch;
  const Memory::Range* range = launch.recent;
  if (!range || address < range->begin || address + bytes > range->end)
    range = launch.recent = launch.memory->find(address, bytes);
  if (!range)
    fault(w, i,
          std::string(writes ? "write to " : "read of ") + hex(address) + " (" + std::to_string(bytes) +
              " bytes), which is not live: " + launch.memory->describe(address));
  if (writes && !range->writable) fault(w, i, "write to read-only " + hex(address));
  (writes ? launch.counters.bytes_written : launch.counters.bytes_read) += bytes;
  return reinterpret_cast<uint8_t*>(address);
}

// ---- Memory operations under way.

void complete(Wave& w, Counter counter, int outstanding) {
  auto& queue = w.pending[static_cast<int>(counter)];
  while (static_cast<int>(queue.size()) > outstanding) {
    land(w, *queue.front());
    queue.pop_front();
  }
}

void issue(Wave& w, const Instruction& i, std::unique_ptr<Pending> op) {
  const int c = static_cast<int>(op->counter);
  const int most = op->counter == Counter::kVm ? kMaxVm : kMaxLgkm;
  complete(w, op->counter, most - 1);
  Wait& wait = w.wait[c];
  op->sequence = ++wait.issued;
  if (wait.issued > static_cast<uint64_t>(most)) wait.complete = std::max(wait.complete, wait.issued - most);
  op->address = i.address;
  const Options& options = w.group->launch->options;
  op->due = w.clock + (op->counter == Counter::kVm ? options.vm_latency : options.lds_latency);
  if (w.hazards) {
    w.issue_address[c][op->sequence] = i.address;
    if (op->target == Pending::kVgprs) {
      uses_vgprs(w, i, op->reg, op->count);
      for (int k = 0; k < op->count; ++k)
        (op->counter == Counter::kVm ? w.guard_vm : w.guard_lgkm)[op->reg + k] = op->sequence;
    } else if (op->target == Pending::kSgprs) {
      for (int k = 0; k < op->count; ++k) w.guard_scalar[op->reg + k] = op->sequence;
    } else if (op->target == Pending::kLds) {
      for (int l = 0; l < kLanes; ++l)
        if (op->lanes >> l & 1) writes_lds(w, i, op->where[l], 4 * op->count, Counter::kVm, op->sequence);
    }
  }
  w.pending[c].push_back(std::move(op));
}

void wait_for(Wave& w, const Instruction& i, Counter counter, int outstanding) {
  const bool lgkm = counter == Counter::kLgkm;
  if (outstanding >= (lgkm ? kMaxLgkm : kMaxVm)) return;
  Wait& wait = w.wait[static_cast<int>(counter)];
  if (wait.issued > static_cast<uint64_t>(outstanding))
    wait.complete = std::max(wait.complete, wait.issued - outstanding);
  if (outstanding == 0) wait.scalar_complete = wait.issued;
  wait.last_address = i.address, wait.last_value = outstanding, wait.last_issued = wait.issued;
  // Any wait on LDS drains it unless asked otherwise: AITER's kernels hold waits that are too weak by the letter of the
  // ISA, and hardware, which returns LDS data far sooner than global data, evidently gets away with them.
  complete(w, counter, lgkm && !w.group->launch->options.exact_lgkm ? 0 : outstanding);
}

// ---- Hazard mode.

void uses_vgprs(Wave& w, const Instruction& i, int reg, int count) {
  for (int r = reg; r < reg + count; ++r) {
    if (w.guard_vm[r] > w.wait[0].complete) report_register(w, i, Counter::kVm, w.guard_vm[r], register_name(r));
    if (w.guard_lgkm[r] > w.wait[1].complete) report_register(w, i, Counter::kLgkm, w.guard_lgkm[r], register_name(r));
    w.guard_vm[r] = w.guard_lgkm[r] = 0;  // said once
  }
}

void uses_sgprs(Wave& w, const Instruction& i, int reg, int count) {
  for (int r = reg; r < reg + count; ++r) {
    if (w.guard_scalar[r] > w.wait[1].scalar_complete)
      report_register(w, i, Counter::kLgkm, w.guard_scalar[r], "s" + std::to_string(r));
    w.guard_scalar[r] = 0;
  }
}

void reads_lds(Wave& w, const Instruction& i, uint32_t address, uint32_t bytes) {
  Workgroup& g = *w.group;
  for (uint32_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    LdsWord& state = g.lds_words[word];
    if (state.writer >= 0) {
      const bool own = state.writer == w.id;
      const std::string what =
          "LDS written at " + hex(state.write_address) + " and read at " + hex(i.address) + " (" + i.text + ")";
      if (!own && state.write_epoch == g.epoch) {
        report(w, what + " by another wave without a barrier between");
      } else if (!own || state.counter == Counter::kVm) {  // a wave's own LDS accesses stay in order
        const Wait& wait =
            (own ? w.wait : g.at_barrier[state.writer][g.epoch - 1].data())[static_cast<int>(state.counter)];
        if (state.sequence > wait.complete)
          report(w, what + (own ? ": " : " by another wave: before the barrier, ") +
                        needed_wait(wait, state.counter, state.sequence));
      }
    }
    state.reader = state.read_epoch == g.epoch && state.reader != w.id ? -2 : static_cast<int8_t>(w.id);
    state.read_epoch = g.epoch, state.read_address = i.address;
  }
}

void writes_lds(Wave& w, const Instruction& i, uint32_t address, uint32_t bytes, Counter counter, uint64_t sequence) {
  Workgroup& g = *w.group;
  for (uint32_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    LdsWord& state = g.lds_words[word];
    if (state.read_epoch == g.epoch && state.reader != w.id)
      report(w, "LDS read at " + hex(state.read_address) + " by another wave is overwritten at " + hex(i.address) +
                    " (" + i.text + ") without a barrier between");
    state.writer = static_cast<int8_t>(w.id), state.write_epoch = g.epoch, state.write_address = i.address;
    state.counter = counter, state.sequence = sequence;
  }
}

// ---- Scheduling.

namespace {

void step(Wave& w, Launch& launch) {
  ++w.clock;
  for (auto& queue : w.pending)
    while (!queue.empty() && queue.front()->due <= w.clock) {
      land(w, *queue.front());
      queue.pop_front();
    }
  const Instruction& i = launch.program->instructions[w.pc++];
  launch.counters.by_class[static_cast<int>(i.kind)]++;
  w.group->instructions++;
  i.execute(w, i);
}

void put(std::vector<uint8_t>& kernarg, int offset, uint64_t value, int bytes) {
  if (offset + bytes <= static_cast<int>(kernarg.size())) memcpy(&kernarg[offset], &value, bytes);
}

// What the compiler's hidden arguments ask of the launcher. Those not named (host calls, heaps) stay null.
void fill_hidden(Launch& launch) {
  for (const jax_dsv4::rocm::KernelArgument& a : launch.kernel->arguments) {
    for (int d = 0; d < 3; ++d) {
      const std::string axis(1, static_cast<char>('x' + d));
      if (a.kind == "hidden_block_count_" + axis) put(launch.kernarg, a.offset, launch.grid[d], 4);
      if (a.kind == "hidden_group_size_" + axis) put(launch.kernarg, a.offset, launch.block[d], 2);
    }
    if (a.kind == "hidden_dynamic_lds_size") put(launch.kernarg, a.offset, launch.dynamic_lds_bytes, 4);
    if (a.kind == "hidden_grid_dims")
      put(launch.kernarg, a.offset,
          launch.grid[2] * launch.block[2] > 1   ? 3
          : launch.grid[1] * launch.block[1] > 1 ? 2
                                                 : 1,
          2);
  }
}

// User SGPRs in the order of the descriptor's enable bits, then the workgroup's coordinates.
void set_scalars(Wave& w, const Launch& launch, const uint32_t at[3], const std::vector<uint8_t>& dispatch) {
  const Kernel& k = *launch.kernel;
  int next = 0;
  const auto pair = [&](uint64_t value) {
    w.s[next++] = static_cast<uint32_t>(value);
    w.s[next++] = static_cast<uint32_t>(value >> 32);
  };
  const auto enabled = [&](int bit) { return (k.properties >> bit & 1) != 0; };
  if (enabled(0)) throw Fault("software gfx950: kernel " + k.name + " wants a buffer for scratch; gfx950 has none");
  if (enabled(1)) pair(reinterpret_cast<uint64_t>(dispatch.data()));
  if (enabled(2)) pair(0);
  if (enabled(3)) pair(reinterpret_cast<uint64_t>(launch.kernarg.data()));
  if (enabled(4)) pair(0);
  if (enabled(5)) throw Fault("software gfx950: kernel " + k.name + " wants to set up scratch; gfx950 does it itself");
  if (enabled(6)) w.s[next++] = k.scratch_bytes;
  const int preload = k.preload & 0x7f, first = k.preload >> 7;
  for (int d = 0; d < preload; ++d) memcpy(&w.s[next++], &launch.kernarg[4 * (first + d)], 4);
  next = std::max(next, static_cast<int>(k.rsrc2 >> 1 & 0x1f));
  for (int d = 0; d < 3; ++d)
    if (k.rsrc2 >> (7 + d) & 1) w.s[next++] = at[d];
}

void run_workgroup(Launch& launch, const uint32_t at[3], const std::vector<uint8_t>& dispatch) {
  Workgroup g;
  g.launch = &launch;
  // LDS and registers start as garbage on hardware: 0x7FC1 reads as NaN in fp32 and bf16, so reliance on zeros shows.
  g.lds.assign(launch.kernel->lds_bytes + launch.dynamic_lds_bytes, 0x7f);
  std::fill(launch.scratch.begin(), launch.scratch.end(), 0x7f);
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  const int waves = static_cast<int>((threads + kLanes - 1) / kLanes);
  if (launch.options.hazards) {
    g.lds_words.resize(g.lds.size() / 4 + 1);
    g.at_barrier.resize(waves);
  }
  for (int k = 0; k < waves; ++k) {
    auto w = std::make_unique<Wave>();
    w->id = k, w->group = &g, w->hazards = launch.options.hazards, w->pc = launch.kernel->entry;
    for (Lanes& reg : w->v) reg.fill(0x7fc17fc1);
    uint64_t mask = 0;
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t id = k * kLanes + l;
      if (id >= threads) break;
      mask |= uint64_t{1} << l;
      w->v[0][l] = id % launch.block[0] | id / launch.block[0] % launch.block[1] << 10 |
                   id / (launch.block[0] * launch.block[1]) << 20;
    }
    w->set_exec(mask);
    set_scalars(*w, launch, at, dispatch);
    g.waves.push_back(std::move(w));
  }
  for (int alive = waves; alive;) {
    int waiting = 0;
    alive = 0;
    for (auto& w : g.waves) {
      if (!w->done && !w->at_barrier) step(*w, launch);
      alive += !w->done, waiting += w->at_barrier;
    }
    if (!alive || waiting < alive) continue;
    for (auto& w : g.waves) {
      w->at_barrier = false;
      if (launch.options.hazards) g.at_barrier[w->id].push_back({w->wait[0], w->wait[1]});
    }
    g.epoch++;
  }
  launch.counters.instructions += g.instructions;
  launch.counters.workgroups++;
  launch.instructions_by_workgroup.push_back(g.instructions);
}

// Denormals as the kernel's descriptor asks, for the time of a launch.
class DenormalMode {
 public:
  explicit DenormalMode(bool flush) : before_(_mm_getcsr()) {
    _mm_setcsr(flush ? before_ | 0x8040 : before_ & ~0x8040u);
  }
  ~DenormalMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

}  // namespace

void run(Launch& launch) {
  const Kernel& k = *launch.kernel;
  // AMD allocates arguments in units of 64 bytes, and LLVM reads six dwords at their end as eight.
  launch.kernarg.resize(std::max<size_t>(launch.kernarg.size(), (k.kernarg_bytes + 63) / 64 * 64));
  fill_hidden(launch);
  // hsa_kernel_dispatch_packet_t, as far as compiled code reads it: the sizes of workgroup and grid.
  std::vector<uint8_t> dispatch(64);
  for (int d = 0; d < 3; ++d) {
    put(dispatch, 4 + 2 * d, launch.block[d], 2);
    put(dispatch, 12 + 4 * d, launch.grid[d] * launch.block[d], 4);
  }
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  launch.scratch.resize(size_t{threads + kLanes - 1} / kLanes * kLanes * k.scratch_bytes);
  const uint64_t kernarg = reinterpret_cast<uint64_t>(launch.kernarg.data());
  const uint64_t scratch = reinterpret_cast<uint64_t>(launch.scratch.data());
  const uint64_t packet = reinterpret_cast<uint64_t>(dispatch.data());
  launch.memory->add(kernarg, launch.kernarg.size(), false, false);
  launch.memory->add(packet, dispatch.size(), false, false);
  launch.memory->add(scratch, launch.scratch.size(), true, false);
  struct Withdraw {
    Launch& l;
    uint64_t kernarg, packet, scratch;
    ~Withdraw() {
      l.memory->remove(kernarg, l.kernarg.size());
      l.memory->remove(packet, 64);
      l.memory->remove(scratch, l.scratch.size());
    }
  } withdraw{launch, kernarg, packet, scratch};
  DenormalMode mode((k.rsrc1 >> 16 & 3) == 0);
  launch.counters.launches++;
  uint32_t at[3];
  for (at[2] = 0; at[2] < launch.grid[2]; ++at[2])
    for (at[1] = 0; at[1] < launch.grid[1]; ++at[1])
      for (at[0] = 0; at[0] < launch.grid[0]; ++at[0]) run_workgroup(launch, at, dispatch);
}

}  // namespace gfx950
