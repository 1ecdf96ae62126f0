// Sparse MLA decode on Hopper. One persistent block per multiprocessor follows the plan's work items. Its warps have
// one task each, a loop over the keys of the items, and hand shared memory on through barriers:
//
//   produce (4 warps)   slots to addresses, packed rows by cp.async, e4m3 to bf16, groups of 32 keys    -> full
//   scores (4 warps)    S[64 heads, 64 keys] = Q . K^T, softmax against a running maximum, P        -> p_full
//   values (2 x 4)      O[64 heads, 256 of 512] += P . V, V being the very tile that was K; output  -> p_free, free
//
// So tensor cores, conversion and memory are busy with different keys at the same time. Heads beyond 64 are further
// blocks that walk the same items at the same time and find the rows in L2. A token cut into several items leaves
// partials that a second, small kernel combines in key order; that kernel also answers tokens that have no item.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/sm90.h"

namespace jax_dsv4::cuda {
namespace {

using namespace sm90;

constexpr int kGroupKeys = 32;  // a tile is filled, and freed, in halves
constexpr int kGroups = kKeyTile / kGroupKeys;
constexpr int kTiles = 2;
constexpr int kRowBytes = 128;  // of a plane: 64 bf16, what the 128-byte swizzle spans
constexpr int kPlanes = kLatentDim / 64;
constexpr int kPlaneBytes = kKeyTile * kRowBytes;

constexpr int kProducerWarps = 4;
constexpr int kKeysPerWarp = kGroupKeys / kProducerWarps;
constexpr int kLanesPerKey = 32 / kKeysPerWarp;
constexpr int kChunks =
    kPackedRowBytes / 16 / kLanesPerKey;       // 16-byte pieces of a row per lane: piece j lies in scale tile j
constexpr int kStepChunks = 3;                 // expanded at a time, for instruction-level parallelism
constexpr int kSteps = kChunks / kStepChunks;  // of a group
constexpr int kStepsAhead = 4;                 // copies a warp has on their way
static_assert(kKeysPerWarp == 8 && kLanesPerKey == 4 && kChunks == kScaleTiles + 2 && kStepsAhead == kSteps + 1);
constexpr int kDone = -1;  // in place of a group: there are no more keys

constexpr int kWarpgroup = 128;
constexpr int kThreads = 4 * kWarpgroup;
// setmaxnreg takes multiples of 8; together 512 per lane of the four warpgroups.
constexpr int kProducerRegisters = 112;
constexpr int kScoresRegisters = 80;
constexpr int kValuesRegisters = 160;  // 128 of them accumulators
static_assert(kProducerRegisters + kScoresRegisters + 2 * kValuesRegisters == 65536 / kWarpgroup);

constexpr float kLog2e = 1.4426950408889634f;
// The running maximum is raised only when a score exceeds it by 2^8: P then stays far inside bf16's and fp32's range,
// its relative rounding is the same, and the accumulators are hardly ever rescaled.
constexpr float kRescaleThresholdLog2 = 8.f;

struct __align__(1024) Shared {
  // Planes of 64 dimensions: [rows][64] bf16, swizzled, as wgmma reads them.
  uint8_t q[kPlanes][kHeadsPerBlock * kRowBytes];
  uint8_t k[kTiles][kPlanes][kPlaneBytes];
  uint8_t p[kHeadsPerBlock * kRowBytes];  // [heads][64 keys]
  uint4 raw[kProducerWarps][kStepsAhead][kStepChunks]
           [32];                                  // packed bytes on their way; a lane reads only what it copied
  uint2 scales[2][kProducerWarps][kKeysPerWarp];  // of two groups, copied by one lane for the four of a key
  float factor[kHeadsPerBlock];  // rescales the accumulators before this P is added; the last one of an item normalises
  int32_t rescale[4];            // per warp of rows: whether `factor` holds anything but ones
  uint8_t valid[kTiles][kGroups * kProducerWarps];  // bit i of byte j: key 8 j + i of the tile is attended to
  uint64_t full[kTiles][kGroups], free[kTiles][kGroups];
  uint64_t p_full, p_free;
};
constexpr int kSharedBytes = sizeof(Shared);
static_assert(kSharedBytes <= 227 * 1024, "what a Hopper block can have");

// --- Work

__device__ __forceinline__ int clamped_length(const Scope& scope, int token) {
  return scope.topk > 0 ? max(0, min(scope.lengths[token], scope.topk)) : 0;
}

// A work item with its keys counted from the token's first, or none.
struct Item {
  int token, partial, begin, end, swa_length;
};

// The items of this block's worker, in order, without those that make no sense: a plan made for other lengths, or for
// another call, must not lead anywhere outside the buffers.
class Work {
 public:
  __device__ explicit Work(const DecodeParams& params) : params_(params) {
    const Plan& plan = params.plan;
    // The last block takes the workers for which there is none: a plan for this device has given them nothing.
    const int end = blockIdx.y + 1 < gridDim.y ? blockIdx.y + 1 : plan.workers;
    next_ = max(0, plan.work_indptr[blockIdx.y]);
    end_ = min(plan.max_items, plan.work_indptr[end]);
  }

  __device__ bool next(Item* item) {
    while (next_ < end_) {
      const int4* row = reinterpret_cast<const int4*>(params_.plan.work_info_set) + 2 * next_++;
      const int4 head = row[0],
                 tail = row[1];  // {batch_idx, partial_qo_loc, qo_start, qo_end}, {kv_start, kv_end, ...}
      const int token = head.x;
      if (token < 0 || token >= params_.tokens || head.y < -1 || head.y >= params_.plan.max_partials) continue;
      const int swa = clamped_length(params_.scopes[0], token), extra = clamped_length(params_.scopes[1], token);
      if (params_.plan.kv_lengths[token] != swa + extra) continue;
      const int64_t first = static_cast<int64_t>(token) * (params_.scopes[0].topk + params_.scopes[1].topk);
      const int64_t begin = tail.x - first, end = tail.y - first;
      if (begin < 0 || begin >= end || end > swa + extra) continue;
      *item = {token, head.y, static_cast<int>(begin), static_cast<int>(end), swa};
      return true;
    }
    return false;
  }

 private:
  const DecodeParams& params_;
  int next_, end_;
};

// Parities of a ring of up to 32 barriers: which phase of each comes next.
struct Phases {
  uint32_t bits = 0;
  __device__ uint32_t take(int i) {
    const uint32_t parity = (bits >> i) & 1;
    bits ^= 1u << i;
    return parity;
  }
};

// --- Producer

// n / d for 0 <= n < 2^31 as (n + high word of n * multiplier) >> shift.
struct Divisor {
  uint32_t multiplier, shift;
  explicit Divisor(uint32_t d) : multiplier(0), shift(0) {
    while (uint64_t{1} << shift < d) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  __device__ uint32_t divide(uint32_t n) const { return (n + __umulhi(n, multiplier)) >> shift; }
};

struct DecodeArgs {
  DecodeParams params;
  Divisor block_size[2];
};

// What a lane knows of its key of a group, two groups before the key is needed.
struct KeyFetch {
  int slot;
  int extra;
  int place;  // of the group in the ring of K; kDone: there is no group
};

// Where the key lies; row is null for a key that is not attended to.
struct KeyRow {
  const uint8_t* row;
  int scales;  // from the row to its scales
  int place;
};

// Walks the groups of all items as one sequence, so that fetching runs ahead across items.
class Groups {
 public:
  __device__ explicit Groups(const DecodeParams& params) : params_(params), work_(params) { open(); }

  // This thread's key of the next group.
  __device__ KeyFetch fetch() {
    if (begin_ >= item_.end) return {-1, 0, kDone};
    KeyFetch f{-1, 0, place_};
    const int key = begin_ + threadIdx.x % kWarpgroup / kLanesPerKey;
    if (key < item_.end) {
      f.extra = key >= item_.swa_length;
      f.slot = *index(f.extra, key);
    }
    begin_ += kGroupKeys;
    place_ = (place_ + 1) % (kTiles * kGroups);
    if (begin_ >= item_.end) {
      place_ = (place_ + 1) / kGroups * kGroups % (kTiles * kGroups);  // an item begins a tile
      open();
    }
    return f;
  }

 private:
  __device__ const int* index(bool extra, int key) const {
    const Scope& scope = params_.scopes[extra];
    return scope.indices + static_cast<int64_t>(item_.token) * scope.topk + key - (extra ? item_.swa_length : 0);
  }

  __device__ void open() {
    if (!work_.next(&item_)) {
      begin_ = item_.end = 0;
      return;
    }
    begin_ = item_.begin;
    // The item's slots, a line of 32 per thread: by the time they are read they are near.
    for (int key = begin_ + 32 * (threadIdx.x % kWarpgroup); key < item_.end; key += 32 * kWarpgroup) {
      prefetch_l2(index(key >= item_.swa_length, key));
    }
  }

  const DecodeParams& params_;
  Work work_;
  Item item_;
  int begin_;
  int place_ = 0;
};

__device__ __forceinline__ KeyRow locate(const DecodeArgs& args, KeyFetch fetch) {
  const Cache& cache = args.params.scopes[fetch.extra].cache;
  const uint32_t block = args.block_size[fetch.extra].divide(fetch.slot);
  if (fetch.slot < 0 || block >= cache.num_blocks) return {nullptr, 0, fetch.place};
  const int offset = fetch.slot - block * cache.block_size;
  return {cache.data + block * cache.block_stride_bytes + offset * kPackedRowBytes,
          cache.block_size * kPackedRowBytes - offset * (kPackedRowBytes - kPackedScaleBytes), fetch.place};
}

// Copies kBytes that are aligned to kAlign only, or zeros if `real` is false. Nothing aligned to less than 4 bytes can
// be copied asynchronously: the bytes go through registers then, which is slow and right.
template <int kBytes, int kAlign>
__device__ __forceinline__ void copy(void* dst, const uint8_t* src, bool real) {
  uint8_t* to = static_cast<uint8_t*>(dst);
  if constexpr (kAlign >= 4) {
    constexpr int kStep = kAlign < kBytes ? kAlign : kBytes;
#pragma unroll
    for (int i = 0; i < kBytes; i += kStep) copy_async<kStep>(to + i, src + i, real ? kStep : 0);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) to[i] = real ? src[i] : 0;
  }
}

// An address for copies of no bytes.
__device__ __forceinline__ const uint8_t* nowhere(const DecodeParams& params) {
  return static_cast<const uint8_t*>(params.q);
}

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <uint32_t kSelect>
__device__ __forceinline__ uint32_t permute(uint32_t a) {
  uint32_t d;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(d) : "r"(a), "n"(kSelect));
  return d;
}

// Two e4m3 of `word` as bf16 times 2^-120, exactly: exponent and mantissa moved to bf16's place, the sign to bit 15.
// kSelect spreads the bytes over the halves and replicates their signs above them.
template <uint32_t kSelect>
__device__ __forceinline__ uint32_t spread_e4m3x2(uint32_t word) {
  return (permute<kSelect>(word) << 4) & 0x87f087f0u;
}

// 16 e4m3 to bf16 times 2^(e8m0 - 127), exactly, by one multiplication with 2^(e8m0 - 127 + 120). bf16 has no such
// power above e8m0 134, a scale no quantiser of reasonable data gets near: with kAnyScale the rest is a second factor,
// and NaN for 255.
constexpr uint32_t kLargestScale = 134;

template <bool kAnyScale>
__device__ __forceinline__ void expand_scaled(uint4 packed, uint32_t e8m0, uint4 (&out)[2]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  const uint32_t scale = ((kAnyScale ? min(e8m0, kLargestScale) : e8m0) + 120) * (0x10001u << 7);
  uint32_t wide[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wide[2 * i] = multiply_bf16x2(spread_e4m3x2<0x9180>(words[i]), scale);
    wide[2 * i + 1] = multiply_bf16x2(spread_e4m3x2<0xB3A2>(words[i]), scale);
  }
  if (kAnyScale) {
    const uint32_t over = max(e8m0, kLargestScale) - kLargestScale;
    const uint32_t rest = e8m0 == 255 ? 0x7fc07fc0u : (over + 127) * (0x10001u << 7);
#pragma unroll
    for (int i = 0; i < 8; ++i) wide[i] = multiply_bf16x2(wide[i], rest);
  }
  out[0] = {wide[0], wide[1], wide[2], wide[3]};
  out[1] = {wide[4], wide[5], wide[6], wide[7]};
}

__device__ __forceinline__ bool needs_any_scale(uint2 scales) {
  return (__vcmpgtu4(scales.x, kLargestScale * 0x01010101u) |
          __vcmpgtu4(scales.y & 0xffffffu, kLargestScale * 0x01010101u)) != 0;
}

// A warp has 8 keys of a group, a quarter of each 64-dimension tile to a lane, all the way from the copy to the store:
// no other thread has to know when the bytes arrive. Copies run four steps (12 of a lane's pieces) ahead, reads from
// the ring one step.
template <int kAlign>
__device__ __forceinline__ void produce(const DecodeArgs& args, Shared& shared) {
  const DecodeParams& params = args.params;
  const int warp = threadIdx.x / 32 % kProducerWarps, lane = threadIdx.x % 32;
  const int key = lane / kLanesPerKey, quarter = lane % kLanesPerKey;
  uint4(*raw)[kStepChunks][32] = shared.raw[warp];

  int scales_at = 0;
  auto copy_step = [&](const KeyRow& from, int step, int slot) {
    const bool real = from.row != nullptr;
    const uint8_t* src = (real ? from.row : nowhere(params)) + 16 * (kLanesPerKey * kStepChunks * step + quarter);
#pragma unroll
    for (int j = 0; j < kStepChunks; ++j) copy<16, kAlign>(&raw[slot][j][lane], src + 16 * kLanesPerKey * j, real);
    if (step == 0) {
      if (quarter == 0) {
        copy<kPackedScaleBytes, kAlign>(&shared.scales[scales_at][warp][key],
                                        real ? from.row + from.scales : nowhere(params), real);
      }
      scales_at ^= 1;
    }
    copy_async_commit();
  };
  auto prefetch = [&](const KeyRow& at) {
    if (at.row == nullptr) return;
    prefetch_l2(at.row + 128 * quarter);
    if (quarter == 0) prefetch_l2(at.row + 512);
    if (quarter == 1) prefetch_l2(at.row + at.scales);
  };

  // Groups on their way: of `row` the copies run, `next` and `later` are asked into L2, of `last` the slot is known.
  Groups groups(params);
  const KeyFetch first = groups.fetch(), second = groups.fetch(), third = groups.fetch();
  KeyFetch last = groups.fetch();
  KeyRow row = locate(args, first);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) copy_step(row, step, step);
  KeyRow next = locate(args, second);
  copy_step(next, 0, kSteps);
  KeyRow later = locate(args, third);
  prefetch(next);
  prefetch(later);

  uint4 chunks[kStepChunks];
  auto read_step = [&](int slot) {
    copy_async_wait<kStepsAhead - 2>();
#pragma unroll
    for (int j = 0; j < kStepChunks; ++j) chunks[j] = raw[slot][j][lane];
  };
  read_step(0);
  __syncwarp();  // the scales came through another lane
  uint2 scales = shared.scales[0][warp][key];

  Phases free_phase;
  int slot = 0;  // of the step in `chunks`
  for (int parity = 1; row.place != kDone; parity ^= 1) {
    const int place = row.place;
    const int tile_row = place % kGroups * kGroupKeys + warp * kKeysPerWarp + key;
    uint8_t* dst = shared.k[0][0] + place / kGroups * (kPlanes * kPlaneBytes) + tile_row * kRowBytes;
    const uint32_t attended = __ballot_sync(~0u, row.row != nullptr);
    uint2 next_scales;
    barrier_wait(&shared.free[0][0] + place, free_phase.take(place) ^ 1);

    auto expand_group = [&](auto any_scale) {
      constexpr bool kAnyScale = decltype(any_scale)::value;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint4 packed[kStepChunks];
#pragma unroll
        for (int i = 0; i < kStepChunks; ++i) packed[i] = chunks[i];
        const int next_slot = (slot + 1) % kStepsAhead;
        read_step(next_slot);
        if (step == kSteps - 1) {
          __syncwarp();
          next_scales = shared.scales[parity][warp][key];
        }
#pragma unroll
        for (int i = 0; i < kStepChunks; ++i) {
          const int j = kStepChunks * step + i;
          if (j < kScaleTiles) {
            uint4 wide[2];
            expand_scaled<kAnyScale>(packed[i], (j < 4 ? scales.x : scales.y) >> (8 * (j % 4)) & 0xff, wide);
            // The swizzle depends on the row of 8 only, which is `key`. Rows r and r + 1 of a store fill the even and
            // the odd units: no conflicts.
#pragma unroll
            for (int u = 0; u < 2; ++u)
              *reinterpret_cast<uint4*>(dst + j * kPlaneBytes + 16 * ((2 * quarter + u) ^ key)) = wide[u];
          } else {
            const int unit = quarter + kLanesPerKey * (j - kScaleTiles);
            *reinterpret_cast<uint4*>(dst + (kPlanes - 1) * kPlaneBytes + 16 * (unit ^ key)) = packed[i];
          }
        }
        if (step == 0) {
          // Meanwhile, the addresses of a later group.
          row = next;
          next = later;
          later = locate(args, last);
          prefetch(later);
          last = groups.fetch();
        }
        if (step + 1 < kSteps) {
          copy_step(row, step + 1, slot);
        } else {
          copy_step(next, 0, slot);
        }
        slot = next_slot;
      }
    };
    // Two copies of the code, so that the one that runs has no branches: latencies hide in straight lines.
    if (__any_sync(~0u, needs_any_scale(scales))) {
      expand_group(std::true_type{});
    } else {
      expand_group(std::false_type{});
    }
    scales = next_scales;

    fence_proxy_async();
    if (lane == 0) {
      uint32_t byte = 0;
#pragma unroll
      for (int i = 0; i < kKeysPerWarp; ++i) byte |= (attended >> (kLanesPerKey * i) & 1) << i;
      shared.valid[place / kGroups][place % kGroups * kProducerWarps + warp] = byte;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.full[0][0] + place);
  }
}

// --- Scores

// Q of one token: rows at and past the number of heads are zeros.
__device__ __forceinline__ void load_q(const DecodeParams& params, Shared& shared, int token, int first_head) {
  named_barrier_sync(1, kWarpgroup);  // no warp's products still read the previous Q
  const int thread = threadIdx.x % kWarpgroup;
  const int heads = min(kHeadsPerBlock, params.heads - first_head);
  const uint8_t* q = static_cast<const uint8_t*>(params.q) +
                     (static_cast<int64_t>(token) * params.heads + first_head) * (2 * kLatentDim);
  constexpr int kUnits = 2 * kLatentDim / 16;  // per row
  for (int i = thread; i < kHeadsPerBlock * kUnits; i += kWarpgroup) {
    const int head = i / kUnits, unit = i % kUnits;
    uint8_t* dst = &shared.q[unit / 8][head * kRowBytes + 16 * (unit % 8 ^ head % 8)];
    copy_async<16>(dst, head < heads ? q + 16 * i : q, head < heads ? 16 : 0);
  }
  copy_async_wait_all();
  fence_proxy_async();
  named_barrier_sync(1, kWarpgroup);
}

__device__ __forceinline__ void multiply_scores(const Shared& shared, int buffer, float (&s)[32]) {
  const uint32_t q = smem_address(shared.q), k = smem_address(shared.k[buffer]);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kLatentDim / 16; ++step) {
    const int plane = step / 4, offset = step % 4 * 32;
    wgmma_m64n64k16(s, matrix_descriptor(q + plane * kHeadsPerBlock * kRowBytes + offset, 0, 8 * kRowBytes),
                    matrix_descriptor(k + plane * kPlaneBytes + offset, 0, 8 * kRowBytes), step > 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void score(const DecodeParams& params, Shared& shared) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_head = blockIdx.x * kHeadsPerBlock;
  const int rows[2] = {16 * warp + lane / 4, 16 * warp + lane / 4 + 8};
  const float scale_log2 = params.scale * kLog2e;

  Work work(params);
  Item item;
  Phases full_phase;
  uint32_t p_free_parity = 0;
  int tile = 0;
  while (work.next(&item)) {
    load_q(params, shared, item.token, first_head);
    // Base-2 scores: the maximum that P is relative to, and the sum of P over this thread's columns.
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
    float s[32] = {};
    for (int begin = item.begin; begin < item.end; begin += kKeyTile, ++tile) {
      const int buffer = tile % kTiles;
      const bool whole = begin + kGroupKeys < item.end;
      barrier_wait(&shared.full[buffer][0], full_phase.take(buffer * kGroups));
      if (whole) barrier_wait(&shared.full[buffer][1], full_phase.take(buffer * kGroups + 1));
      // S[h, k] = sum_d Q[h, d] K[k, d]
      multiply_scores(shared, buffer, s);
      uint64_t valid = *reinterpret_cast<const volatile uint64_t*>(shared.valid[buffer]);
      if (!whole) valid &= 0xffffffffu;  // the other half holds an older tile
      wgmma_wait<0>();

      // Before anything else, for what a key nobody attends to has in store may be NaN.
      if (valid != ~uint64_t{0}) {
        const uint64_t mine = valid >> (2 * (lane % 4));
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          if (!(mine >> (8 * (i / 4) + i % 2) & 1)) s[i] = -INFINITY;
        }
      }

      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = s[2 * r];
#pragma unroll
        for (int i = 0; i < 32; i += 4) top = fmaxf(top, fmaxf(s[i + 2 * r], s[i + 2 * r + 1]));
        top = quad_max(top) * scale_log2;
        const float before = maximum[r];
        if (top > before + kRescaleThresholdLog2 || before == -INFINITY) maximum[r] = top;
        factor[r] = before == maximum[r] ? 1.f : exp2_approx(before - maximum[r]);
        const float base = maximum[r] == -INFINITY ? 0.f : maximum[r];
        float added = 0.f;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          if (i / 2 % 2 != r) continue;
          s[i] = exp2_approx(fmaf(s[i], scale_log2, -base));
          added += s[i];
        }
        sum[r] = fmaf(sum[r], factor[r], added);
      }

      barrier_wait(&shared.p_free, p_free_parity ^= 1);
      const uint32_t p = smem_address(shared.p);
      const int store_row = 16 * warp + lane % 16;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const float* f = s + 4 * j;
        store_matrices(p + store_row * kRowBytes + 16 * ((j + lane / 16) ^ store_row % 8), pack_bf16x2(f[0], f[1]),
                       pack_bf16x2(f[2], f[3]), pack_bf16x2(f[4], f[5]), pack_bf16x2(f[6], f[7]));
      }
      if (lane % 4 == 0) {
        shared.factor[rows[0]] = factor[0];
        shared.factor[rows[1]] = factor[1];
      }
      const bool rescale = __any_sync(~0u, factor[0] != 1.f || factor[1] != 1.f);
      if (lane == 0) shared.rescale[warp] = rescale;
      fence_proxy_async();
      __syncwarp();
      barrier_arrive(&shared.p_full);
    }

    // The item's end: one more factor, that normalises. The sink enters where this item is the whole token.
    barrier_wait(&shared.p_free, p_free_parity ^= 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[r]);
      const int head = first_head + rows[r];
      const bool empty = maximum[r] == -INFINITY;
      if (lane % 4 == 0) {
        float denominator = total;
        if (head < params.heads) {
          const float lse = empty ? -INFINITY : (maximum[r] + log2f(total)) / kLog2e;
          if (item.partial < 0) {
            params.lse[static_cast<int64_t>(item.token) * params.heads + head] = lse;
            if (params.sink) denominator += exp2f(params.sink[head] * kLog2e - (empty ? 0.f : maximum[r]));
          } else {
            params.partial_lse[static_cast<int64_t>(item.partial) * params.heads + head] = lse;
          }
        }
        shared.factor[rows[r]] = empty ? 0.f : 1.f / denominator;
      }
    }
    __syncwarp();
    barrier_arrive(&shared.p_full);
  }
}

// --- Values

// A part: 8 heads by 32 dimensions as one warp holds them in wgmma's accumulators: of head l / 4, lane l has columns
// 8 j + 2 * (l % 4) and the next in x[j], j = 0..3.
constexpr int kPartHeads = kPartialHeads;
constexpr int kPartDims = 32;
constexpr int kParts = kLatentDim / kPartDims;

__device__ __forceinline__ int64_t out_offset(const DecodeParams& params, int token, int head, int part) {
  return (static_cast<int64_t>(token) * params.heads + head) * kLatentDim + part * kPartDims;
}

__device__ __forceinline__ void store_float32(const DecodeParams& params, int token, int first_head, int part, int lane,
                                              const float2 (&x)[4]) {
  const int head = first_head + lane / 4;
  if (head >= params.heads) return;
  float2* out =
      reinterpret_cast<float2*>(static_cast<float*>(params.out) + out_offset(params, token, head, part)) + lane % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) out[4 * j] = x[j];
}

// The four lanes of a head transpose their pairs, so that each stores 16 bytes rather than 4 bytes in 4 places: stores
// cost by the lines they touch.
__device__ __forceinline__ void store_bf16(const DecodeParams& params, int token, int first_head, int part, int lane,
                                           const float2 (&x)[4]) {
  uint32_t w[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) w[j] = pack_bf16x2(x[j].x, x[j].y);
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {  // transposes blocks of one word, then of two by two
    const bool upper = lane & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? w[j] : w[j + step], step);
      w[j] = upper ? other : w[j];
      w[j + step] = upper ? w[j + step] : other;
    }
  }
  const int head = first_head + lane / 4;
  if (head >= params.heads) return;
  uint16_t* out = static_cast<uint16_t*>(params.out) + out_offset(params, token, head, part);
  *reinterpret_cast<uint4*>(out + 8 * (lane % 4)) = {w[0], w[1], w[2], w[3]};
}

// Partial outputs lie in the order in which warps hold them, so that a warp writes and reads them in one piece:
// [row][heads / 8][part][2][lane][4]. -> this lane's x[0], x[1]; x[2], x[3] follow 32 further on.
__device__ __forceinline__ float4* partial_part(const DecodeParams& params, int row, int first_head, int part,
                                                int lane) {
  const int64_t heads = (params.heads + kPartHeads - 1) / kPartHeads * kPartHeads;
  return reinterpret_cast<float4*>(params.partial_out + (row * heads + first_head) * kLatentDim +
                                   part * (kPartHeads * kPartDims)) +
         lane;
}

__device__ __forceinline__ void accumulate_values(const Shared& shared, int buffer, int group, int half,
                                                  bool accumulate, float (&o)[128]) {
  const uint32_t p = smem_address(shared.p) + group * (2 * kGroupKeys);
  const uint32_t v = smem_address(shared.k[buffer][half * kPlanes / 2]) + group * (kGroupKeys * kRowBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kGroupKeys / 16; ++step) {
    const uint64_t a = matrix_descriptor(p + step * 32, 0, 8 * kRowBytes);
    const uint32_t b = v + step * 16 * kRowBytes;
    wgmma_m64n128k16<0>(o, a, matrix_descriptor(b, kPlaneBytes, 8 * kRowBytes), accumulate || step > 0);
    wgmma_m64n128k16<64>(o, a, matrix_descriptor(b + 2 * kPlaneBytes, kPlaneBytes, 8 * kRowBytes),
                         accumulate || step > 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ void value(const DecodeParams& params, Shared& shared, int half) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_head = blockIdx.x * kHeadsPerBlock;
  const int rows[2] = {16 * warp + lane / 4, 16 * warp + lane / 4 + 8};

  Work work(params);
  Item item;
  uint32_t p_full_parity = 1;
  int tile = 0;
  while (work.next(&item)) {
    float o[128] = {};
    for (int begin = item.begin; begin < item.end; begin += kKeyTile, ++tile) {
      const int buffer = tile % kTiles;
      const bool whole = begin + kGroupKeys < item.end, first = begin == item.begin;
      barrier_wait(&shared.p_full, p_full_parity ^= 1);
      if (!first && shared.rescale[warp]) {
        const float factor[2] = {shared.factor[rows[0]], shared.factor[rows[1]]};
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] *= factor[i / 2 % 2];
      }

      // O[h, d] += sum_k P[h, k] V[k, d]
      accumulate_values(shared, buffer, 0, half, !first, o);
      if (whole) {
        accumulate_values(shared, buffer, 1, half, true, o);
        wgmma_wait<1>();
        if (lane == 0) barrier_arrive(&shared.free[buffer][0]);
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(&shared.free[buffer][1]);
      } else {
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(&shared.free[buffer][0]);
      }
      barrier_arrive(&shared.p_free);
    }

    barrier_wait(&shared.p_full, p_full_parity ^= 1);
    const float factor[2] = {shared.factor[rows[0]], shared.factor[rows[1]]};
    __syncwarp();
    barrier_arrive(&shared.p_free);

    // A row without a valid key has P = 0, and V has no NaN from keys nobody attends to: its sums are zeros.
    auto for_each_part = [&](auto store) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int head = first_head + 16 * warp + 8 * r;
        if (head >= params.heads) break;
#pragma unroll
        for (int i = 0; i < kParts / 2; ++i) {
          float2 x[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int at = 16 * i + 4 * j + 2 * r;
            x[j] = {o[at] * factor[r], o[at + 1] * factor[r]};
          }
          store(head, half * kParts / 2 + i, x);
        }
      }
    };
    // Each way in a piece of its own: code that runs once per item costs what fetching it costs.
    if (item.partial >= 0) {
      for_each_part([&](int head, int part, const float2(&x)[4]) {
        float4* partial = partial_part(params, item.partial, head, part, lane);
        partial[0] = {x[0].x, x[0].y, x[1].x, x[1].y};
        partial[32] = {x[2].x, x[2].y, x[3].x, x[3].y};
      });
    } else if (params.out_dtype == Dtype::kBf16) {
      for_each_part(
          [&](int head, int part, const float2(&x)[4]) { store_bf16(params, item.token, head, part, lane, x); });
    } else {
      for_each_part(
          [&](int head, int part, const float2(&x)[4]) { store_float32(params, item.token, head, part, lane, x); });
    }
  }
}

template <int kAlign>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTiles; ++i) {
      for (int g = 0; g < kGroups; ++g) {
        barrier_init(&shared.full[i][g], kProducerWarps);
        barrier_init(&shared.free[i][g], 8);  // the warps of both halves of the values
      }
    }
    // Whole warps arrive here, for every lane has ordinary data to hand on.
    barrier_init(&shared.p_full, kWarpgroup);
    barrier_init(&shared.p_free, 2 * kWarpgroup);
    barrier_init_fence();
  }
  __syncthreads();
  // The combining kernel may take the multiprocessors that this one leaves; it waits for all of this one before it
  // reads.
  cudaTriggerProgrammaticLaunchCompletion();

  const int role = threadIdx.x / kWarpgroup;
  if (role == 0) {
    registers_decrease<kProducerRegisters>();
    produce<kAlign>(args, shared);
  } else if (role == 1) {
    registers_decrease<kScoresRegisters>();
    score(args.params, shared);
  } else {
    registers_increase<kValuesRegisters>();
    value(args.params, shared, role - 2);
  }
}

// --- Combine

constexpr int kCombineWarps = 8;
constexpr int kCombineBlocks = 4 * 132;  // about what runs at once

// out = sum_i exp(lse_i - lse) out_i over a token's partials in key order, a warp per part; and the answer for tokens
// that have no item (empty: zeros, -inf) or whose plan was made for other lengths or other buffers (NaN).
// kPartialsAtOnce are in flight per warp: many hide latency where a token is cut into many, few leave room for more
// blocks where most tokens are not cut.
template <int kPartialsAtOnce>
__global__ void __launch_bounds__(32 * kCombineWarps, kPartialsAtOnce > 4 ? 2 : 3)
    combine_kernel(const __grid_constant__ DecodeParams params) {
  cudaGridDependencySynchronize();
  const int token = blockIdx.x, lane = threadIdx.x % 32;
  const Plan& plan = params.plan;
  const int length = clamped_length(params.scopes[0], token) + clamped_length(params.scopes[1], token);
  const int begin = plan.reduce_indptr[token];
  const int end = length > 0 ? plan.reduce_indptr[token + 1] : begin;
  bool sound = plan.kv_lengths[token] == length && begin >= 0 && end <= plan.max_partials;
  if (sound && length > 0 && begin >= end) return;  // one item wrote the output

  const int units = (params.heads + kPartHeads - 1) / kPartHeads * kParts;
  for (int unit = blockIdx.y * kCombineWarps + threadIdx.x / 32; unit < units; unit += gridDim.y * kCombineWarps) {
    const int part = unit % kParts, first_head = unit / kParts * kPartHeads;
    const int head = min(first_head + lane / 4, params.heads - 1);
    float2 o[4] = {};
    float maximum = -INFINITY, sum = 0.f;  // `sum` and `o` are relative to exp(maximum)
    for (int first = begin; sound && first < end; first += 32) {
      // A lane looks up one of the next 32 partials.
      const int count = min(32, end - first);
      const int row_of_lane = plan.reduce_partial_map[first + min(lane, count - 1)];
      sound = __all_sync(~0u, row_of_lane >= 0 && row_of_lane < plan.max_partials);
      for (int i = 0; sound && i < count; i += kPartialsAtOnce) {
        float lse[kPartialsAtOnce];
        float4 x[kPartialsAtOnce][2];
#pragma unroll
        for (int k = 0; k < kPartialsAtOnce; ++k) {
          const int row = __shfl_sync(~0u, row_of_lane, i + k);
          lse[k] = -INFINITY;
          x[k][0] = x[k][1] = {};
          if (i + k < count) {
            lse[k] = params.partial_lse[static_cast<int64_t>(row) * params.heads + head];
            const float4* in = partial_part(params, row, first_head, part, lane);
            x[k][0] = in[0];
            x[k][1] = in[32];
          }
        }
#pragma unroll
        for (int k = 0; k < kPartialsAtOnce; ++k) {
          const float top = fmaxf(maximum, lse[k]), base = top == -INFINITY ? 0.f : top;
          const float shrink = expf(maximum - base), weight = expf(lse[k] - base);
          maximum = top;
          sum = fmaf(sum, shrink, weight);
          auto add = [&](float2& to, float a, float b) {
            to = {fmaf(weight, a, to.x * shrink), fmaf(weight, b, to.y * shrink)};
          };
          add(o[0], x[k][0].x, x[k][0].y);
          add(o[1], x[k][0].z, x[k][0].w);
          add(o[2], x[k][1].x, x[k][1].y);
          add(o[3], x[k][1].z, x[k][1].w);
        }
      }
    }

    const bool empty = maximum == -INFINITY && sum == 0.f;
    float lse = empty ? -INFINITY : maximum + logf(sum);
    float factor = empty ? 0.f : 1.f / (sum + (params.sink ? expf(params.sink[head] - maximum) : 0.f));
    if (!sound) lse = factor = __int_as_float(0x7fc00000);
#pragma unroll
    for (int j = 0; j < 4; ++j) o[j] = {o[j].x * factor, o[j].y * factor};
    if (params.out_dtype == Dtype::kBf16) {
      store_bf16(params, token, first_head, part, lane, o);
    } else {
      store_float32(params, token, first_head, part, lane, o);
    }
    if (part == 0 && lane % 4 == 0 && first_head + lane / 4 < params.heads) {
      params.lse[static_cast<int64_t>(token) * params.heads + head] = lse;
    }
  }
}

// The largest of 16, 4 and 1 that divides every address of a row.
int alignment(const Cache& cache) {
  const uint64_t bits = reinterpret_cast<uint64_t>(cache.data) | static_cast<uint64_t>(cache.block_stride_bytes);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
}

constexpr int kFewPartials = 4, kManyPartials = 8;
using CombineKernel = void (*)(DecodeParams);
using DecodeKernel = void (*)(DecodeArgs);

DecodeKernel decode_for(int alignment) {
  switch (alignment) {
    case 16:
      return decode_kernel<16>;
    case 4:
      return decode_kernel<4>;
    default:
      return decode_kernel<1>;
  }
}

}  // namespace

cudaError_t prepare_decode() {
  for (int align : {16, 4, 1}) {
    const cudaError_t status =
        cudaFuncSetAttribute(decode_for(align), cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
  }
  // The same split of L1 and shared memory for both kernels: changing it takes time. Setting it loads the kernel as
  // well.
  for (CombineKernel combine : {combine_kernel<kFewPartials>, combine_kernel<kManyPartials>}) {
    const cudaError_t status =
        cudaFuncSetAttribute(combine, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  if (params.q_dtype != Dtype::kBf16) return cudaErrorNotSupported;
  int align = 16;
  for (const Scope& scope : params.scopes) {
    if (scope.topk == 0) continue;
    if (scope.cache.layout != Layout::kFp8DsMla) return cudaErrorNotSupported;
    align = alignment(scope.cache) < align ? alignment(scope.cache) : align;
  }
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int blocks = (params.heads + kHeadsPerBlock - 1) / kHeadsPerBlock;
  const int workers = std::max(1, std::min(params.plan.workers, processors / blocks));
  auto divisor = [](const Scope& scope) { return Divisor(scope.topk > 0 ? scope.cache.block_size : 1); };
  const DecodeArgs args = {params, {divisor(params.scopes[0]), divisor(params.scopes[1])}};
  decode_for(align)<<<dim3(blocks, workers), kThreads, kSharedBytes, stream>>>(args);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;

  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  // Enough blocks to fill the device when few tokens are split many times, not so many that leaving costs time.
  const int units = (params.heads + kPartHeads - 1) / kPartHeads * kParts;
  const int spread = std::min(units / kCombineWarps, std::max(1, kCombineBlocks / params.tokens));
  config.gridDim = dim3(params.tokens, spread);
  config.blockDim = dim3(32 * kCombineWarps);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  const bool many = workers >= kManyPartials * params.tokens;  // a token's partials are about workers / tokens
  return cudaLaunchKernelEx(&config, many ? combine_kernel<kManyPartials> : combine_kernel<kFewPartials>, params);
}

}  // namespace jax_dsv4::cuda
