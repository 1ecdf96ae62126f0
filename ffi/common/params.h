// What every launcher is handed: plain structs of raw pointers, no XLA types. Shapes are in the comments, row-major and
// contiguous unless a stride says otherwise. jax_dsv4/_implementations/native.py states the same operands in Python.
#ifndef JAX_DSV4_COMMON_PARAMS_H_
#define JAX_DSV4_COMMON_PARAMS_H_

#include <cstdint>

#include "common/host_device.h"

namespace jax_dsv4 {

constexpr int kLatentDim = 512;                  // numbers per cached position: K and V alike
constexpr int kRopeDim = 64;                     // the last of them
constexpr int kNopeDim = kLatentDim - kRopeDim;  // 448
constexpr int kScaleTile = 64;                   // nope numbers that share one ue8m0 scale
constexpr int kScaleTiles = kNopeDim / kScaleTile;
// fp8_ds_mla: a block is block_size rows (448 e4m3, 64 bf16), then block_size scale groups (7 ue8m0, 1 pad byte).
constexpr int kPackedRowBytes = kNopeDim + 2 * kRopeDim;  // 576
constexpr int kPackedScaleBytes = 8;
constexpr int kPackedTokenBytes = kPackedRowBytes + kPackedScaleBytes;  // 584
static_assert(kPackedTokenBytes == 584, "fp8_ds_mla is byte-compatible with FlashMLA's MODEL1");

// mxfp8_528: 512 e4m3, and a ue8m0 for every 32. nvfp4_288: 512 e2m1, number 2k in the low half of byte k, and an e4m3
// for every 16. A slot's scales directly follow its numbers (inline), or a block's the numbers of all its slots, as
// above.
constexpr int kMxfp8Tile = 32;
constexpr int kMxfp8RowBytes = kLatentDim;
constexpr int kMxfp8ScaleBytes = kLatentDim / kMxfp8Tile;
constexpr int kNvfp4Tile = 16;
constexpr int kNvfp4RowBytes = kLatentDim / 2;
constexpr int kNvfp4ScaleBytes = kLatentDim / kNvfp4Tile;
static_assert(kMxfp8RowBytes + kMxfp8ScaleBytes == 528 && kNvfp4RowBytes + kNvfp4ScaleBytes == 288,
              "byte-compatible with FlashMLA's V41 and V41_FP4");

constexpr int kMaxHeads = 128;
// Exponentials are taken in base 2.
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

enum class Layout : int32_t {
  kFp8DsMla = 0,
  kBf16 = 1,
  kFloat32 = 2,
  kAiterFp8 = 3,
  kAiterBf16 = 4,
  kMxfp8 = 5,
  kNvfp4 = 6,
  kAiterFp8Fnuz = 7
};
enum class Dtype : int32_t { kBf16 = 0, kFloat32 = 1 };

// Bytes of a slot: its numbers, and the scales of layouts that have them.
struct SlotBytes {
  int32_t row, scales;
};
JAX_DSV4_HD constexpr SlotBytes slot_bytes(Layout layout) {
  switch (layout) {
    case Layout::kFp8DsMla:
      return {kPackedRowBytes, kPackedScaleBytes};
    case Layout::kBf16:
      return {2 * kLatentDim, 0};
    case Layout::kFloat32:
      return {4 * kLatentDim, 0};
    case Layout::kMxfp8:
      return {kMxfp8RowBytes, kMxfp8ScaleBytes};
    case Layout::kNvfp4:
      return {kNvfp4RowBytes, kNvfp4ScaleBytes};
    default:
      return {0, 0};
  }
}

// A cache. Slot s is row s % block_size of block s / block_size; a slot outside [0, num_blocks * block_size) is
// invalid.
struct Cache {
  const uint8_t* data;  // [num_blocks, block_stride_bytes]
  int64_t num_blocks;
  int64_t block_stride_bytes;  // >= block_size * bytes per token; what lies past a block's tokens is never read
  int32_t block_size;
  Layout layout;
  // Of a block: row i begins at i * row_pitch, its scales at scales_begin + i * scale_pitch.
  int64_t scales_begin;
  int32_t row_pitch, scale_pitch;

  JAX_DSV4_HD_MEMBER int64_t row_at(int64_t offset) const { return offset * row_pitch; }
  JAX_DSV4_HD_MEMBER int64_t scales_at(int64_t offset) const { return scales_begin + offset * scale_pitch; }
};

// The places of a block of so many slots.
JAX_DSV4_HD void arrange(Cache* cache, bool inline_scales) {
  const SlotBytes bytes = slot_bytes(cache->layout);
  cache->row_pitch = inline_scales ? bytes.row + bytes.scales : bytes.row;
  cache->scale_pitch = inline_scales ? bytes.row + bytes.scales : bytes.scales;
  cache->scales_begin = inline_scales ? bytes.row : int64_t{cache->block_size} * bytes.row;
}

// A cache and the slots of it that each token attends to.
struct Scope {
  Cache cache;
  const int32_t* indices;  // [tokens, topk] slots; entries at or past the length may be anything
  const int32_t* lengths;  // [tokens]; any value, clamped to [0, topk]
  int32_t topk;            // 0: the scope is absent
};

// Keys of a token in a scope.
JAX_DSV4_HD int32_t clamp_length(int32_t length, int32_t topk) { return max_int(0, min_int(length, topk)); }
JAX_DSV4_HD int32_t clamped_length(const Scope& scope, int32_t token) {
  return scope.topk > 0 ? clamp_length(scope.lengths[token], scope.topk) : 0;
}

// Who computes what, in AITER's format (ffi/common/plan.h makes it). A token's keys are numbered as one list: the swa
// scope's entries 0 .. length-1, directly followed by the extra scope's. Token i owns the numbers [i * stride, i *
// stride + kv_lengths[i]), stride = the sum of the scopes' topk.
struct Plan {
  const int32_t* kv_lengths;          // [tokens] the (clamped, summed) lengths that the plan was made for
  const int32_t* work_indptr;         // [workers + 1] worker w runs items work_indptr[w] .. work_indptr[w + 1]
  const int32_t* work_info_set;       // [max_items, 8] see WorkInfo
  const int32_t* reduce_indptr;       // [tokens + 1] a token's range in reduce_partial_map; empty: not split
  const int32_t* reduce_final_map;    // [tokens, 2] {q_start, q_end} of split token i; other rows unspecified
  const int32_t* reduce_partial_map;  // [max_partials] rows of the partial buffers, in kv order
  int32_t workers;
  int32_t max_items;
  int32_t max_partials;  // rows of the partial buffers; a plan that names others is answered with NaN
};

// One row of work_info_set. Aligned for accesses of 16 bytes, as every buffer of XLA's is.
struct alignas(16) WorkInfo {
  int32_t batch_idx;       // the token
  int32_t partial_qo_loc;  // row of the partial buffers to write; -1: the item is the whole token and writes the output
  int32_t qo_start, qo_end;
  int32_t kv_start, kv_end;  // absolute key numbers, never an empty range
  int32_t kv_offset;         // keys of the token after kv_end
  int32_t pad;
};
static_assert(sizeof(WorkInfo) == 32, "work_info_set rows are 8 int32");

// out = softmax(scale * q . k over the union of the scopes' valid keys, with exp(sink) added to the denominator) . k
// lse = natural log of the sum of exponentials, sink excluded; -inf, and out = 0, for a token without a valid key.
// A token whose plan.kv_lengths differs from its lengths is answered with NaN in out and lse.
struct DecodeParams {
  const void* q;      // [tokens, heads, 512] of q_dtype
  const float* sink;  // [heads], or null: no sink
  Scope scopes[2];    // swa, extra
  Plan plan;
  void* out;   // [tokens, heads, 512] of out_dtype
  float* lse;  // [tokens, heads]
  // Workspaces, uninitialised.
  float* partial_out;  // CPU: [rows, heads, 512]; CUDA: [max_partials, heads rounded up to kPartialHeads, 512]
  float* partial_lse;  // CPU: [rows, heads, kPartialNumbers] maxima and sums; CUDA: [max_partials, heads]
  int32_t* counters;   // CPU: [tokens, kTokenCounters]; CUDA: [tokens, 0]
  int32_t tokens;
  int32_t heads;
  float scale;  // times the natural-log scores
  Dtype q_dtype;
  Dtype out_dtype;       // q's, or fp32 for a scope that will be merged with another
  bool batch_invariant;  // nothing that a token's bits depend on may follow from other tokens, or from their number
};

// Quantises latents and writes them to their slots. Invalid slots are skipped; of equal slots the last row wins.
struct AppendParams {
  const void* latents;   // [count, 512] of dtype
  const int32_t* slots;  // [count]
  Cache cache;           // written through `data_out`
  uint8_t* data_out;     // = cache.data, writable
  int64_t count;
  Dtype dtype;
};

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_PARAMS_H_
