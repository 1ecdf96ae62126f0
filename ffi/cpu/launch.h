// What the CPU handlers call. No XLA types.
#ifndef JAX_DSV4_CPU_LAUNCH_H_
#define JAX_DSV4_CPU_LAUNCH_H_

#include <cstddef>
#include <cstdint>

#include "common/params.h"

namespace jax_dsv4::cpu {

// The plan's granularity (jax_dsv4/_implementations/cpu.py).
constexpr int kPlanKeys = 64;
// Some kernels take heads in blocks, and heads that there are not as zeros.
constexpr int kHeadBlock = 16;
// Scratch of one lane (one thread's work in progress); jax_dsv4/_implementations/cpu.py sizes the workspace by the same
// numbers.
constexpr size_t kLaneBytesFixed = 272 * 1024;
constexpr size_t kLaneBytesPerHead = 5 * 1024;
// And of what has been merged so far.
constexpr size_t kMergeBytesPerHead = 2 * 1024 + 64;
// Groups of heads that are tasks of their own, at most.
constexpr int kMaxHeadGroups = kMaxHeads / kHeadBlock;
// A token's counters: one per head group, then its PartialRows.
constexpr int kTokenCounters = kMaxHeadGroups + 2;
// Floats of a partial besides its output: the maximum and the sum.
constexpr int kPartialNumbers = 2;

constexpr int32_t padded_heads(int32_t heads) { return (heads + kHeadBlock - 1) / kHeadBlock * kHeadBlock; }

constexpr size_t lane_bytes(int32_t heads) {
  return kLaneBytesFixed + (kLaneBytesPerHead + kMergeBytesPerHead) * static_cast<size_t>(padded_heads(heads));
}

// The most heads of one of so many groups of whole blocks.
constexpr int32_t group_heads(int32_t heads, int32_t groups) {
  const int32_t blocks = padded_heads(heads) / kHeadBlock;
  return (blocks + groups - 1) / groups * kHeadBlock;
}

// A token's keys are attended to in segments, each by itself, and the segments merged in order: (((0, 1), 2), ...).
// Where they begin depends on the token's length alone, so a result has the same bits wherever a plan cuts the token: a
// cut moves to the next segment. At most kMaxSegments of them, of whole tiles of a kernel.
constexpr int kMaxSegments = 10;

constexpr int32_t segment_keys(int32_t length, int32_t tile_keys) {
  const int64_t most = int64_t{kMaxSegments} * tile_keys;
  return length <= most ? tile_keys : static_cast<int32_t>(tile_keys * ((length + most - 1) / most));
}

// Segments that begin before a key; before a token's length: all of its segments.
constexpr int32_t segments_before(int32_t key, int32_t segment_keys) {
  return key / segment_keys + (key % segment_keys != 0);
}

// The key after a number of segments of a token. 64 bits: lengths may come close to what 32 hold.
constexpr int32_t segments_end(int32_t segments, int32_t segment_keys, int32_t length) {
  const int64_t end = int64_t{segments} * segment_keys;
  return end < length ? static_cast<int32_t>(end) : length;
}

// Nothing overflows.
static_assert(segments_before(0x7fffffff, segment_keys(0x7fffffff, kPlanKeys)) == kMaxSegments);
static_assert(segments_end(kMaxSegments, segment_keys(0x7fffffff, kPlanKeys), 0x7fffffff) == 0x7fffffff);

// A partial is what attend knows of some keys: the maximum (log2 units) and the sum of the probabilities, and the sum
// of the latents weighed by them. A token that is cut has one row of the partial buffers for all segments of its first
// item, and one for each segment after them.
struct PartialRows {
  int32_t first;   // -1: there are none left, and its first item does all
  int32_t merged;  // segments of the first item
};

// One unit of work: some heads of one work item.
struct Task {
  int32_t token;
  int32_t kv_begin, kv_end;  // within the token's keys, whole segments
  int32_t segment_keys;
  int32_t row;  // of the partial buffers; -1: write the output
  int32_t head_begin, head_end;
};

// The decode kernels of one instruction set. Results do not depend on how heads are grouped into tasks.
struct Kernels {
  const char* name;
  bool bf16;          // they take q and caches of bf16 numbers only (fp8_ds_mla's are such)
  int32_t tile_keys;  // that are dequantised and multiplied together
  // Attends; `scratch` is one lane's, 64-byte aligned.
  void (*attend)(const DecodeParams& p, const Task& task, uint8_t* scratch);
  // Writes out and lse of one token's heads from its partials, `count` rows from `row` on.
  void (*combine)(const DecodeParams& p, int32_t token, int32_t row, int32_t count, int32_t head_begin,
                  int32_t head_end);
};

extern const Kernels generic_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels;

// Those of this process's choice (choose.h); where a call has fp32 numbers and they multiply bf16, the AVX-512 ones.
const Kernels& select_kernels(const DecodeParams& p);

// About how many of a plan's items have something to do: no more than there are segments.
int32_t count_tasks(const DecodeParams& p, int32_t tile_keys);

// A call is cut into items * head groups. More groups than 1 dequantise the same keys again, so only as many as keep
// the threads busy.
int32_t choose_head_groups(int32_t items, int32_t heads, int64_t threads);

// Writes the tokens that no kernel will touch: zeros and -inf for a token without keys; NaN for one whose plan is not
// for its lengths, does not cover it, or names what is out of bounds. Sets counters[token][g] to the number of items
// that g must wait for, and -1 for a token that is done; and gives the tokens that are cut their rows of the partial
// buffers, of which there are `partial_rows`. Returns how many rows of work_info_set hold items.
int32_t prepare_tokens(const DecodeParams& p, int32_t tile_keys, int32_t partial_rows, int32_t head_groups);

// Runs one of the `items * head_groups` tasks, with one lane's scratch. The last one of a token's head group combines.
void run_task(const DecodeParams& p, const Kernels& kernels, int32_t head_groups, int64_t task_index, uint8_t* scratch);

// Latents whose slot s has s % shards == shard.
void append(const AppendParams& p, int32_t shard, int32_t shards);

}  // namespace jax_dsv4::cpu

#endif  // JAX_DSV4_CPU_LAUNCH_H_
