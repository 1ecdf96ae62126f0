// What the CPU handlers call. No XLA types.
#ifndef JAX_DSV4_CPU_LAUNCH_H_
#define JAX_DSV4_CPU_LAUNCH_H_

#include <cstddef>
#include <cstdint>

#include "common/params.h"

namespace jax_dsv4::cpu {

// Keys that are dequantised and multiplied together. Also the plan's granularity (jax_dsv4/implementations/native.py).
constexpr int kTileKeys = 64;
// Scratch of one lane (one thread's work in progress); native.py sizes the workspace by the same two numbers.
constexpr size_t kLaneBytesFixed = 160 * 1024;
constexpr size_t kLaneBytesPerHead = 5 * 1024;
// A token's counters: one per head group.
constexpr int kMaxHeadGroups = 8;

constexpr size_t lane_bytes(int32_t heads) { return kLaneBytesFixed + kLaneBytesPerHead * static_cast<size_t>(heads); }

// One unit of work: some heads of one work item.
struct Task {
  int32_t token;
  int32_t kv_begin, kv_end;  // within the token's keys
  int32_t partial;           // row of the partial buffers; -1: write the output
  int32_t head_begin, head_end;
};

// The decode kernels of one instruction set. Results do not depend on how heads are grouped into tasks.
struct Kernels {
  const char* name;
  // Attends; `scratch` is one lane's, 64-byte aligned.
  void (*attend)(const DecodeParams& p, const Task& task, uint8_t* scratch);
  // Writes out and lse of one token's heads from its partials.
  void (*combine)(const DecodeParams& p, int32_t token, int32_t head_begin, int32_t head_end);
};

// The instruction sets compiled in; null where this machine or this call cannot use one.
const Kernels* generic_kernels(const DecodeParams& p);
const Kernels* avx2_kernels(const DecodeParams& p);
const Kernels* avx512_kernels(const DecodeParams& p);
const Kernels* avx512_bf16_kernels(const DecodeParams& p);

// The fastest of them for this call on this machine, none beyond the limit.
const Kernels& select_kernels(const DecodeParams& p);

// 0 generic, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16 products. Default: no limit.
void limit_isa(int highest);

// Writes the tokens that no kernel will touch: zeros and -inf for a token without keys; NaN for one whose plan is not
// for its lengths, does not cover it, or names what is out of bounds. Sets counters[token][g] to the number of partials
// that g must wait for, and -1 for a token that is done. Returns how many rows of work_info_set hold items.
int32_t prepare_tokens(const DecodeParams& p, int32_t head_groups);

// Runs tasks on behalf of one lane until `next_task()` is exhausted.
void run_task(const DecodeParams& p, const Kernels& kernels, int32_t head_groups, int64_t task_index, uint8_t* scratch);

// Latents whose slot s has s % shards == shard.
void append(const AppendParams& p, int32_t shard, int32_t shards);

}  // namespace jax_dsv4::cpu

#endif  // JAX_DSV4_CPU_LAUNCH_H_
