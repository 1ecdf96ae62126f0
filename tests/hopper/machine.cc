#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

// Absent without ThreadSanitizer.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* at);
__attribute__((weak)) void __tsan_release(void* at);
__attribute__((weak)) void __tsan_read_range(void* at, unsigned long bytes);
__attribute__((weak)) void __tsan_write_range(void* at, unsigned long bytes);
}

hopper::Index threadIdx, blockIdx, blockDim, gridDim;

namespace hopper {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kSharedAlign = 1024, kMostSharedBytes = 227 * 1024;
constexpr int kNamedBarriers = 16, kMostBytes = (1 << 20) - 1;  // of an mbarrier

bool watched() { return __tsan_create_fiber != nullptr; }
void switch_clock(void* to) {
  if (watched()) __tsan_switch_to_fiber(to, 1);  // 1: that orders nothing
}

struct Thread;
struct Block;
extern Thread* self;
// The machine's own work has a clock of its own.
void* machine_clock;

// By the machine, on behalf of a thread.
template <typename Work>
void as(void* clock, const Work& work) {
  switch_clock(clock);
  work();
  switch_clock(machine_clock);
}

// What passes through here is ordered: for each of a thread's two clocks, and for two uses that may overlap.
struct Order {
  char at[2][2];
  void release(unsigned use);
  void acquire(unsigned use);
};

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int bytes, real_bytes;
};

struct Product {
  float* d;
  int columns;
  Matrix a, b;
  bool accumulate;
};

struct Accumulator {
  std::vector<float> values;
  int pending;
};

struct Thread {
  ucontext_t context;
  void* stack = nullptr;  // as long as the process
  void *clock = nullptr, *async_clock = nullptr;
  Block* block;
  int number;  // in its block
  bool waits;
  bool arrived;  // at the cluster's barrier, for its `use`, and has not waited since
  bool joined;   // has waited there
  unsigned use;
  std::vector<Copy> copies;  // not committed yet
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  std::map<float*, Accumulator> accumulators;
  char fence;  // an address
};

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  int64_t bytes = 0;    // an mbarrier's: expected, less what has landed
  bool fenced = false;  // an mbarrier's initialisation
  std::vector<Thread*> waiting;
  Order order;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];
  char done[2];  // addresses
};

struct Block {
  Index index;
  unsigned rank;  // in its cluster
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier named[kNamedBarriers];
  std::map<const uint64_t*, std::unique_ptr<Barrier>> barriers;
  std::unique_ptr<uint8_t, decltype(&std::free)> shared{nullptr, &std::free};
  size_t shared_bytes;
  unsigned running;
  char end;  // an address
};

// To a block's shared memory, on its way.
struct Store {
  Block* block;
  uint8_t* to;
  Barrier* barrier;
  void* clock;
  int bytes;
  uint8_t value[16];
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned running;  // threads
  Barrier barrier;
  std::deque<Store> stores;
};

std::vector<std::unique_ptr<Thread>> pool;
void* store_clocks[kMostClusterBlocks];  // of what the block of that rank sends
std::deque<Thread*> ready;
Thread* self = nullptr;
Block* block;  // of self
Cluster* cluster;
ucontext_t scheduler;
const std::function<void()>* body;
char start_of_cluster, end_of_cluster;  // addresses
std::string message;
uint32_t random_state;

// While the machine works for a thread.
struct Inside {
  Inside() { switch_clock(machine_clock); }
  ~Inside() { switch_clock(self->clock); }
};

void release(void* generic, void* async) {
  if (!watched()) return;
  as(self->clock, [&] { __tsan_release(generic); });
  as(self->async_clock, [&] { __tsan_release(async); });
}

void acquire(void* generic, void* async) {
  if (!watched()) return;
  as(self->clock, [&] { __tsan_acquire(generic); });
  as(self->async_clock, [&] { __tsan_acquire(async); });
}

void Order::release(unsigned use) { hopper::release(&at[use % 2][0], &at[use % 2][1]); }
void Order::acquire(unsigned use) { hopper::acquire(&at[use % 2][0], &at[use % 2][1]); }

// Not a call of memcpy, which ThreadSanitizer would see.
template <typename T>
void copy_unseen(T* to, const T* from, int count) {
  for (int i = 0; i < count; ++i) const_cast<volatile T&>(to[i]) = from[i];
}

std::string name_of(const Block& of) {
  return "block (" + std::to_string(of.index.x) + ", " + std::to_string(of.index.y) + ", " +
         std::to_string(of.index.z) + ")";
}

// Said in words when no fiber's stack is used any more, which ThreadSanitizer would see.
struct Failure {
  const char* why = nullptr;
  const Block* block;
  int thread = -1;
};
Failure failure;

[[noreturn]] void stop(const Failure& now) {
  switch_clock(machine_clock);
  failure = now;
  setcontext(&scheduler);
  std::abort();
}

// One of so many, of which 0 is next in turn.
size_t pick(size_t count) {
  if (options().schedule == 0) return 0;
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) % count;
}

void wake(std::vector<Thread*>& list) {
  for (Thread* thread : list) {
    thread->waits = false;
    ready.push_back(thread);
  }
  list.clear();
}

// If all arrivals and bytes have come.
void complete_phase(Barrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.bytes != 0) return;
  barrier.arrived = 0;
  ++barrier.generation;
  wake(barrier.waiting);
}

void land(const Store& store) {
  if (store.block->running == 0) stop({"a store lands in a block whose threads have all ended", store.block});
  copy_unseen(store.to, store.value, store.bytes);
  Barrier& barrier = *store.barrier;
  if (watched()) {
    as(store.clock, [&] {
      __tsan_write_range(store.to, store.bytes);
      __tsan_release(&barrier.order.at[barrier.generation % 2][0]);  // not for the async proxy
      __tsan_release(&end_of_cluster);
    });
  }
  barrier.bytes -= store.bytes;
  complete_phase(barrier);
}

// As late as can be, or, of a schedule, some, in any order.
void land_stores() {
  std::deque<Store>& stores = cluster->stores;
  while (!stores.empty() && (ready.empty() || pick(8) != 0)) {
    std::swap(stores.front(), stores[pick(stores.size())]);
    const Store store = stores.front();
    stores.pop_front();
    land(store);
  }
}

// Leaves this fiber for one that can run, or for the scheduler if there is none.
void leave(ucontext_t* from) {
  land_stores();
  if (ready.empty()) {
    swapcontext(from, &scheduler);
    return;
  }
  std::swap(ready.front(), ready[pick(ready.size())]);
  self = ready.front();
  ready.pop_front();
  block = self->block;
  blockIdx = block->index;
  threadIdx = {static_cast<unsigned>(self->number), 0, 0};
  swapcontext(from, &self->context);
}

void wait_in(std::vector<Thread*>& list) {
  Thread* const thread = self;
  list.push_back(thread);
  thread->waits = true;
  while (thread->waits) leave(&thread->context);
}

// Until so many threads have come, for the same purpose.
void rendezvous(Barrier& barrier, unsigned threads, unsigned purpose) {
  if (barrier.arrived > 0 && barrier.expected != purpose) fail("threads that meet do not do the same");
  barrier.expected = purpose;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    wake(barrier.waiting);
  } else {
    wait_in(barrier.waiting);
  }
}

void meet(Barrier& barrier, unsigned threads) {
  const unsigned use = barrier.generation;
  barrier.order.release(use);
  rendezvous(barrier, threads, threads);
  barrier.order.acquire(use);
}

Barrier& barrier_at(Block& of, const uint64_t* at) {
  const auto found = of.barriers.find(at);
  if (found == of.barriers.end()) fail("a barrier was not initialised");
  return *found->second;
}

Warp& warp_of(const Thread& thread) { return *block->warps[thread.number / 32]; }

// All lanes' values; orders nothing.
const uint64_t* exchange(uint64_t value) {
  constexpr unsigned kExchange = 0;
  Warp& warp = warp_of(*self);
  uint64_t* const values = warp.values[warp.barrier.generation % 2];
  values[self->number % 32] = value;
  rendezvous(warp.barrier, 32, kExchange);
  return values;
}

// If all threads that still run have arrived.
void complete_cluster_barrier() {
  Barrier& barrier = cluster->barrier;
  if (barrier.arrived == 0 || barrier.arrived < cluster->running) return;
  barrier.arrived = 0;
  ++barrier.generation;
  wake(barrier.waiting);
}

// A block's shared memory goes with its last thread: a write, by the clocks, which what other blocks store comes
// before.
void end_thread() {
  if (watched() && cluster->blocks.size() > 1) {
    release(&block->end, &block->end);
    if (block->running == 1 && block->shared_bytes > 0) {
      acquire(&block->end, &block->end);
      as(self->clock, [] { __tsan_write_range(block->shared.get(), block->shared_bytes); });
    }
  }
  release(&end_of_cluster, &end_of_cluster);
  --block->running;
  --cluster->running;
  // No longer awaited, so not counted either.
  if (self->arrived && self->use == cluster->barrier.generation) --cluster->barrier.arrived;
  complete_cluster_barrier();
}

void run_thread() {
  acquire(&start_of_cluster, &start_of_cluster);
  switch_clock(self->clock);
  (*body)();
  switch_clock(machine_clock);
  if (!self->products.empty() || !self->product_groups.empty()) fail("a thread ended without waiting for its products");
  end_thread();
  leave(&self->context);
}

void start_thread(Block& of, unsigned number) {
  const size_t place = of.rank * blockDim.x + number;
  if (pool.size() <= place) {
    pool.push_back(std::make_unique<Thread>());
    // A thread touches little of it.
    void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    pool.back()->stack = stack;
    if (watched()) {
      pool.back()->clock = __tsan_create_fiber(0);
      pool.back()->async_clock = __tsan_create_fiber(0);
    }
  }
  Thread& thread = *pool[place];
  thread.block = &of;
  thread.number = static_cast<int>(number);
  thread.waits = thread.arrived = thread.joined = false;
  thread.copies.clear();
  thread.copy_groups.clear();
  thread.products.clear();
  thread.product_groups.clear();
  thread.accumulators.clear();
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, run_thread, 0);
  ready.push_back(&thread);
}

void start_block(Block& of) {
  for (unsigned i = 0; i < blockDim.x; i += 32) of.warps.push_back(std::make_unique<Warp>());
  of.running = blockDim.x;
  cluster->running += of.running;
  if (of.shared_bytes > 0) {
    // Kernels ask for multiples of the alignment, so AddressSanitizer sees what is past the end.
    of.shared.reset(static_cast<uint8_t*>(
        std::aligned_alloc(kSharedAlign, (of.shared_bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign)));
    std::memset(of.shared.get(), 0xff, of.shared_bytes);  // NaN
  }
  for (unsigned i = 0; i < blockDim.x; ++i) start_thread(of, i);
}

bool run_cluster() {
  ready.clear();
  failure = {};
  for (auto& each : cluster->blocks) start_block(*each);
  if (watched()) __tsan_release(&start_of_cluster);
  leave(&scheduler);
  if (failure.why) {
    const std::string thread = failure.thread < 0 ? "" : "thread " + std::to_string(failure.thread) + " of ";
    message = failure.why + (", " + thread) + name_of(*failure.block);
  } else if (cluster->running > 0) {
    for (const auto& each : cluster->blocks) {
      if (each->running == 0) continue;
      message += (message.empty() ? "" : ", ") + std::to_string(each->running) + " of " + std::to_string(blockDim.x) +
                 " threads of " + name_of(*each);
    }
    message += " wait for ever";
  }
  const bool ended = message.empty();
  if (watched()) {
    // Nor do those that have not ended go on.
    for (size_t i = 0; !ended && i < cluster->blocks.size() * blockDim.x; ++i) {
      as(pool[i]->clock, [] { __tsan_release(&end_of_cluster); });
    }
    __tsan_acquire(&end_of_cluster);
  }
  return ended;
}

// --- wgmma's operands: rows of 128 bytes in groups of 8, 16-byte units of a row exchanged by the row's number.

struct Rows {
  uint32_t base, leading, stride;
  explicit Rows(uint64_t d)
      : base((d & 0x3FFF) << 4), leading((d >> 16 & 0x3FFF) << 4), stride((d >> 32 & 0x3FFF) << 4) {
    if (d >> 62 != 1) fail("only the 128-byte swizzle is modelled");
  }
  const uint8_t* at(int row, int unit_of_64, int byte) const {
    const uint32_t plain = base + row / 8 * stride + row % 8 * 128 + unit_of_64 * leading + byte;
    return at_shared_address(plain ^ (plain >> 7 & 7) << 4, 2);
  }
  // Of an operand with `outer` rows or columns beside the contraction's 16.
  const uint8_t* number(bool transposed, int outer, int inner) const {
    return transposed ? at(inner, outer / 64, outer % 64 * 2) : at(outer, 0, inner * 2);
  }
};

float load_bf16(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// What the tensor cores read of the operands, by this thread's async clock. Units of 16 bytes stay together.
void touch_operands(const Product& product) {
  if (!watched()) return;
  const Rows a(product.a.descriptor), b(product.b.descriptor);
  auto touch_all = [](const Rows& rows, bool transposed, int first, int count) {
    for (int outer = first; outer < first + count; outer += transposed ? 8 : 1) {
      for (int inner = 0; inner < 16; inner += transposed ? 1 : 8) {
        __tsan_read_range(const_cast<uint8_t*>(rows.number(transposed, outer, inner)), 16);
      }
    }
  };
  as(self->async_clock, [&] {
    touch_all(a, product.a.transposed, self->number / 32 % 4 * 16, 16);
    touch_all(b, product.b.transposed, 0, product.columns);
  });
}

// This thread's numbers of D.
void compute(const Product& product, float* d) {
  const Rows a(product.a.descriptor), b(product.b.descriptor);
  const int lane = self->number % 32, row = self->number / 32 % 4 * 16 + lane / 4;
  float x[2][16];
  for (int r = 0; r < 2; ++r) {
    for (int k = 0; k < 16; ++k) x[r][k] = load_bf16(a.number(product.a.transposed, row + 8 * r, k));
  }
  for (int block_of_8 = 0; block_of_8 < product.columns / 8; ++block_of_8) {
    for (int c = 0; c < 2; ++c) {
      float y[16];
      const int column = 8 * block_of_8 + 2 * (lane % 4) + c;
      for (int k = 0; k < 16; ++k) y[k] = load_bf16(b.number(product.b.transposed, column, k));
      for (int r = 0; r < 2; ++r) {
        float& to = d[4 * block_of_8 + 2 * r + c];
        float sum = product.accumulate ? to : 0;
        for (int k = 0; k < 16; ++k) sum = std::fma(x[r][k], y[k], sum);
        to = sum;
      }
    }
  }
}

}  // namespace

uint8_t* block_memory() { return block->shared.get(); }
const char* error() { return message.c_str(); }

Options& options() {
  static Options all;
  return all;
}

void fail(const char* why) { stop({why, block, self->number}); }

uint32_t shared_address(const void* at) {
  const auto offset = static_cast<const uint8_t*>(at) - block->shared.get();
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(block->shared_bytes)) fail("an address is not in shared memory");
  return static_cast<uint32_t>(offset);
}

uint8_t* at_shared_address(uint32_t address, size_t bytes) {
  if (address + bytes > block->shared_bytes) fail("an address is past the block's shared memory");
  return block->shared.get() + address;
}

bool launch(Index grid, Index size, Index by, size_t shared_bytes, const std::function<void()>& kernel) {
  message.clear();
  if (size.y != 1 || size.z != 1 || size.x % 32 != 0 || size.x > 1024 || size.x == 0)
    message = "not a block that is modelled";
  if (shared_bytes > kMostSharedBytes) message = "more shared memory than a block can have";
  const uint64_t blocks = uint64_t{by.x} * by.y * by.z;
  if (blocks == 0 || blocks > kMostClusterBlocks)
    message = "not a cluster that a Hopper has";
  else if (grid.x % by.x != 0 || grid.y % by.y != 0 || grid.z % by.z != 0)
    message = "the grid is not a multiple of the cluster";
  if (!message.empty()) return false;
  if (watched()) machine_clock = __tsan_get_current_fiber();
  random_state = options().schedule;
  body = &kernel;
  gridDim = grid;
  blockDim = size;
  for (unsigned z = 0; z < grid.z; z += by.z) {
    for (unsigned y = 0; y < grid.y; y += by.y) {
      for (unsigned x = 0; x < grid.x; x += by.x) {
        Cluster now{};
        for (unsigned rank = 0; rank < blocks; ++rank) {
          auto& fresh = now.blocks.emplace_back(std::make_unique<Block>());
          fresh->index = {x + rank % by.x, y + rank / by.x % by.y, z + rank / by.x / by.y};
          fresh->rank = rank;
          fresh->shared_bytes = shared_bytes;
        }
        cluster = &now;
        if (!run_cluster()) {
          for (auto& each : now.blocks) each->shared.release();  // their threads have not ended: leaked
          return false;
        }
      }
    }
  }
  return true;
}

void sync_warp() {
  const Inside inside;
  meet(warp_of(*self).barrier, 32);
}

uint64_t shuffle(uint64_t value, int from_lane) {
  const Inside inside;
  return exchange(value)[from_lane % 32];
}

void gather(uint64_t value, uint64_t (&all)[32]) {
  const Inside inside;
  copy_unseen(all, exchange(value), 32);
}

void sync_block(int id, int threads) {
  if (id < 0 || id >= kNamedBarriers || threads % 32 != 0) fail("there is no such barrier");
  const Inside inside;
  meet(block->named[id], threads == 0 ? blockDim.x : static_cast<unsigned>(threads));
}

void barrier_init(const uint64_t* barrier, uint32_t arrivals) {
  const Inside inside;
  if (shared_address(barrier) % 8 != 0) fail("a barrier is not aligned");
  auto& state = block->barriers[barrier];
  if (state) fail("a barrier is initialised twice");
  state = std::make_unique<Barrier>();
  state->expected = arrivals;
}

void barrier_init_fence() {
  const Inside inside;
  for (auto& [at, barrier] : block->barriers) barrier->fenced = true;
}

void barrier_arrive(const uint64_t* barrier) { barrier_expect(barrier, 0); }

void barrier_expect(const uint64_t* barrier, uint32_t bytes) {
  const Inside inside;
  Barrier& state = barrier_at(*block, barrier);
  if (state.arrived == state.expected) fail("more arrive at a barrier than it awaits");
  state.order.release(state.generation);
  state.bytes += bytes;
  if (state.bytes > kMostBytes) fail("a barrier awaits more bytes than it can count");
  ++state.arrived;
  complete_phase(state);
}

void barrier_wait(const uint64_t* barrier, uint32_t parity) {
  const Inside inside;
  Barrier& state = barrier_at(*block, barrier);
  while (state.generation % 2 == parity) wait_in(state.waiting);
  state.order.acquire(parity);
}

int cluster_rank() { return static_cast<int>(block->rank); }
int cluster_size() { return static_cast<int>(cluster->blocks.size()); }

void cluster_arrive() {
  const Inside inside;
  if (self->arrived) fail("a thread arrives twice at the cluster's barrier and does not wait");
  self->arrived = true;
  self->use = cluster->barrier.generation;
  ++cluster->barrier.arrived;
  complete_cluster_barrier();
}

void cluster_wait() {
  const Inside inside;
  if (!self->arrived) fail("a thread waits at the cluster's barrier and has not arrived");
  while (cluster->barrier.generation == self->use) wait_in(cluster->barrier.waiting);
  self->arrived = false;
  self->joined = true;
}

void store_cluster(const void* to, const uint64_t* barrier, int rank, const void* value, int bytes) {
  const Inside inside;
  if (rank < 0 || rank >= cluster_size()) fail("the cluster has no block of that rank");
  Block& other = *cluster->blocks[rank];
  if (&other != block && !self->joined) fail("a thread stores to another block before it has waited for the cluster");
  const uint32_t at = shared_address(to), barrier_offset = shared_address(barrier);
  at_shared_address(at, bytes);
  if (at % bytes != 0) fail("a store to a block's memory is not aligned");
  const auto* const theirs = reinterpret_cast<const uint64_t*>(other.shared.get() + barrier_offset);
  Barrier& state = barrier_at(other, theirs);
  if (&other != block && !state.fenced) fail("no fence shows other blocks that a barrier was initialised");
  void*& clock = store_clocks[block->rank];
  if (watched() && !clock) clock = __tsan_create_fiber(0);
  Store store{&other, other.shared.get() + at, &state, clock, bytes, {}};
  copy_unseen(store.value, static_cast<const uint8_t*>(value), bytes);
  as(clock, [&] {
    if (watched()) __tsan_acquire(&start_of_cluster);
    std::memset(store.to, 0xff, bytes);
  });
  cluster->stores.push_back(store);
}

void copy_async(void* to, const void* from, int bytes, int real_bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("an asynchronous copy is not aligned");
  }
  at_shared_address(shared_address(to), bytes);
  std::memset(to, 0xff, bytes);  // by the thread
  const Inside inside;
  self->copies.push_back({static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), bytes, real_bytes});
}

void commit_copies() {
  const Inside inside;
  self->copy_groups.push_back(std::move(self->copies));
  self->copies.clear();
}

void wait_for_copies(int pending_groups) {
  const Inside inside;
  while (static_cast<int>(self->copy_groups.size()) > pending_groups) {
    for (const Copy& copy : self->copy_groups.front()) {
      as(self->clock, [&] {
        std::memcpy(copy.to, copy.from, copy.real_bytes);
        std::memset(copy.to + copy.real_bytes, 0, copy.bytes - copy.real_bytes);
      });
    }
    self->copy_groups.pop_front();
  }
}

void multiply(float* d, int columns, Matrix a, Matrix b, bool accumulate) {
  const Inside inside;
  const int numbers = columns / 2;
  const auto [found, fresh] = self->accumulators.try_emplace(d);
  if (fresh) {
    const std::vector<float> garbage(numbers, std::numeric_limits<float>::quiet_NaN());
    found->second.values.resize(numbers);
    copy_unseen(found->second.values.data(), d, numbers);
    copy_unseen(d, garbage.data(), numbers);
  }
  ++found->second.pending;
  self->products.push_back({d, columns, a, b, accumulate});
  touch_operands(self->products.back());
}

void commit_products() {
  const Inside inside;
  self->product_groups.push_back(std::move(self->products));
  self->products.clear();
}

void wait_for_products(int pending_groups) {
  const Inside inside;
  while (static_cast<int>(self->product_groups.size()) > pending_groups) {
    for (const Product& product : self->product_groups.front()) {
      const auto found = self->accumulators.find(product.d);
      touch_operands(product);
      compute(product, found->second.values.data());
      if (--found->second.pending == 0) {
        copy_unseen(product.d, found->second.values.data(), product.columns / 2);
        self->accumulators.erase(found);
      }
    }
    self->product_groups.pop_front();
  }
  // What any lane does then comes after what the warp's products have read.
  Warp& warp = warp_of(*self);
  char* const done = &warp.done[warp.barrier.generation % 2];
  if (watched()) as(self->async_clock, [&] { __tsan_release(done); });
  exchange(0);
  if (watched()) as(self->clock, [&] { __tsan_acquire(done); });
}

void fence_proxy_async() {
  if (!watched()) return;
  const Inside inside;
  as(self->clock, [] { __tsan_release(&self->fence); });
  as(self->async_clock, [] { __tsan_acquire(&self->fence); });
}

}  // namespace hopper
