#include "machine.h"

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
constexpr int kNamedBarriers = 16;

bool watched() { return __tsan_create_fiber != nullptr; }
void switch_clock(void* to) {
  if (watched()) __tsan_switch_to_fiber(to, 1);  // 1: that orders nothing
}

struct Thread;
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
  std::unique_ptr<uint8_t[]> stack;
  void *clock = nullptr, *async_clock = nullptr;
  int number;
  bool waits;
  std::vector<Copy> copies;  // not committed yet
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  std::map<float*, Accumulator> accumulators;
  char fence;  // an address
};

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  std::vector<Thread*> waiting;
  Order order;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];
  char done[2];  // addresses
};

struct Block {
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier named[kNamedBarriers];
  std::map<const uint64_t*, std::unique_ptr<Barrier>> barriers;
  uint8_t* shared;
  size_t shared_bytes;
  unsigned running;
};

std::vector<std::unique_ptr<Thread>> pool;
std::deque<Thread*> ready;
Thread* self = nullptr;
Block* block;
ucontext_t scheduler;
const std::function<void()>* body;
char start_of_block, end_of_block;  // addresses
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

// Leaves this fiber for one that can run, or for the scheduler if there is none.
void leave(ucontext_t* from) {
  if (ready.empty()) {
    swapcontext(from, &scheduler);
    return;
  }
  if (options().schedule != 0) {
    random_state = random_state * 1664525u + 1013904223u;
    std::swap(ready.front(), ready[(random_state >> 8) % ready.size()]);
  }
  self = ready.front();
  ready.pop_front();
  threadIdx = {static_cast<unsigned>(self->number), 0, 0};
  swapcontext(from, &self->context);
}

void wait_in(std::vector<Thread*>& list) {
  Thread* const thread = self;
  list.push_back(thread);
  thread->waits = true;
  while (thread->waits) leave(&thread->context);
}

void wake(std::vector<Thread*>& list) {
  for (Thread* thread : list) {
    thread->waits = false;
    ready.push_back(thread);
  }
  list.clear();
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

void run_thread() {
  acquire(&start_of_block, &start_of_block);
  switch_clock(self->clock);
  (*body)();
  switch_clock(machine_clock);
  release(&end_of_block, &end_of_block);
  if (!self->products.empty() || !self->product_groups.empty()) fail("a thread ended without waiting for its products");
  --block->running;
  leave(&self->context);
}

void start_thread(unsigned number) {
  if (pool.size() <= number) {
    pool.push_back(std::make_unique<Thread>());
    pool.back()->stack.reset(new uint8_t[kStackBytes]);
    if (watched()) {
      pool.back()->clock = __tsan_create_fiber(0);
      pool.back()->async_clock = __tsan_create_fiber(0);
    }
  }
  Thread& thread = *pool[number];
  thread.number = static_cast<int>(number);
  thread.waits = false;
  thread.copies.clear();
  thread.copy_groups.clear();
  thread.products.clear();
  thread.product_groups.clear();
  thread.accumulators.clear();
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, run_thread, 0);
  ready.push_back(&thread);
}

bool run_block() {
  const unsigned threads = blockDim.x;
  for (unsigned i = 0; i < threads; i += 32) block->warps.push_back(std::make_unique<Warp>());
  block->running = threads;
  ready.clear();
  for (unsigned i = 0; i < threads; ++i) start_thread(i);
  if (watched()) __tsan_release(&start_of_block);
  leave(&scheduler);
  if (watched()) __tsan_acquire(&end_of_block);
  if (message.empty() && block->running > 0) {
    message = std::to_string(block->running) + " of " + std::to_string(threads) + " threads of block (" +
              std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ") wait for ever";
  }
  return message.empty();
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

uint8_t* block_memory() { return block->shared; }
const char* error() { return message.c_str(); }

Options& options() {
  static Options all;
  return all;
}

void fail(const char* why) {
  message = std::string(why) + ", thread " + std::to_string(self->number) + " of block (" + std::to_string(blockIdx.x) +
            ", " + std::to_string(blockIdx.y) + ")";
  switch_clock(machine_clock);
  setcontext(&scheduler);
  std::abort();
}

uint32_t shared_address(const void* at) {
  const auto offset = static_cast<const uint8_t*>(at) - block->shared;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(block->shared_bytes)) fail("an address is not in shared memory");
  return static_cast<uint32_t>(offset);
}

uint8_t* at_shared_address(uint32_t address, size_t bytes) {
  if (address + bytes > block->shared_bytes) fail("an address is past the block's shared memory");
  return block->shared + address;
}

bool launch(Index grid, Index size, size_t shared_bytes, const std::function<void()>& kernel) {
  message.clear();
  if (size.y != 1 || size.z != 1 || size.x % 32 != 0 || size.x > 1024 || size.x == 0)
    message = "not a block that is modelled";
  if (shared_bytes > kMostSharedBytes) message = "more shared memory than a block can have";
  if (!message.empty()) return false;
  if (watched()) machine_clock = __tsan_get_current_fiber();
  random_state = options().schedule;
  body = &kernel;
  gridDim = grid;
  blockDim = size;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        Block now{};
        blockIdx = {x, y, z};
        // Kernels ask for multiples of the alignment, so AddressSanitizer sees what is past the end.
        std::unique_ptr<uint8_t, decltype(&std::free)> memory(nullptr, &std::free);
        if (shared_bytes > 0) {
          memory.reset(static_cast<uint8_t*>(
              std::aligned_alloc(kSharedAlign, (shared_bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign)));
          std::memset(memory.get(), 0xff, shared_bytes);  // NaN
        }
        now.shared = memory.get();
        now.shared_bytes = shared_bytes;
        block = &now;
        if (!run_block()) {
          memory.release();  // its threads have not ended: leaked
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
  shared_address(barrier);
  auto& state = block->barriers[barrier];
  if (state) fail("a barrier is initialised twice");
  state = std::make_unique<Barrier>();
  state->expected = arrivals;
}

void barrier_arrive(const uint64_t* barrier) {
  const Inside inside;
  const auto found = block->barriers.find(barrier);
  if (found == block->barriers.end()) fail("a barrier was not initialised");
  Barrier& state = *found->second;
  state.order.release(state.generation);
  if (++state.arrived == state.expected) {
    state.arrived = 0;
    ++state.generation;
    wake(state.waiting);
  }
}

void barrier_wait(const uint64_t* barrier, uint32_t parity) {
  const Inside inside;
  const auto found = block->barriers.find(barrier);
  if (found == block->barriers.end()) fail("a barrier was not initialised");
  Barrier& state = *found->second;
  while (state.generation % 2 == parity) wait_in(state.waiting);
  state.order.acquire(parity);
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
