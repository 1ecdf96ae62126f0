// Our own kernels around AITER's: plan, pack, check, combine, append. Built by clang alone, without a ROCm
// installation, so this file uses the compiler's builtins and no HIP header.
#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))

// The formats' definitions are plain functions; here they are compiled for the device.
#pragma clang force_cuda_host_device begin
#include "common/fp8.h"
#pragma clang force_cuda_host_device end
#include "common/plan.h"
#include "rocm/gluon_params.h"
#include "rocm/params.h"

namespace jax_dsv4::rocm {
namespace {

#define JAX_DSV4_KERNEL extern "C" __global__ __attribute__((amdgpu_flat_work_group_size(kThreads, kThreads)))

constexpr int kWave = 64;

__device__ int thread_id() { return __builtin_amdgcn_workitem_id_x(); }
// Which group of so many threads this one belongs to. Whole waves make a group, and the compiler is told that it is the
// same for a wave: what follows from it is computed and loaded once.
__device__ uint32_t group_id(int threads) {
  return __builtin_amdgcn_workgroup_id_x() * (kThreads / threads) +
         __builtin_amdgcn_readfirstlane(static_cast<uint32_t>(thread_id()) / threads);
}
__device__ int block_id() { return __builtin_amdgcn_workgroup_id_x(); }

__device__ void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

__device__ float infinity() { return __builtin_inff(); }
// The lse of a partial result that was not computed. AITER's larger kernels report -inf for a row of NaN.
constexpr float kNoKeys = -3.402823466e38f;
__device__ float quiet_nan() { return __builtin_nanf(""); }

struct Eight {
  float values[8];
};

// Numbers 8 * i to 8 * i + 7, in loads of 16 bytes.
__device__ Eight load_eight(const void* data, Dtype dtype, int64_t i) {
  Eight out;
  if (dtype == Dtype::kFloat32) {
    out = static_cast<const Eight*>(__builtin_assume_aligned(data, 16))[i];
  } else {
    struct Halves {
      uint16_t bits[8];
    };
    const Halves halves = static_cast<const Halves*>(__builtin_assume_aligned(data, 16))[i];
    for (int k = 0; k < 8; ++k) out.values[k] = bf16_to_float(halves.bits[k]);
  }
  return out;
}

struct alignas(16) Four {
  float values[4];
};
// Threads that share a row of 512 numbers, four each.
constexpr uint32_t kThreadsPerRow = kLatentDim / 4;

// Numbers `at` to at + 3 of a result.
__device__ void store_four(void* out, Dtype dtype, int64_t at, const Four& four) {
  if (dtype == Dtype::kFloat32) {
    *reinterpret_cast<Four*>(static_cast<float*>(out) + at) = four;
  } else {
    uint64_t halves = 0;
    for (int k = 0; k < 4; ++k) halves |= static_cast<uint64_t>(float_to_bf16(four.values[k])) << (16 * k);
    *reinterpret_cast<uint64_t*>(static_cast<uint16_t*>(out) + at) = halves;
  }
}

// A lane writes its eight numbers of a row, and of the first lanes each eight zeros at its end.
template <typename Numbers>
__device__ void store_eight(uint8_t* to, uint32_t lane, Numbers numbers) {
  Numbers* row = static_cast<Numbers*>(__builtin_assume_aligned(to, sizeof(Numbers)));
  row[lane] = numbers;
  if (lane < (kRowNumbers - kLatentDim) / 8) row[kWave + lane] = {};
}

// A wave writes row `row` of `rows`: row `from` of `data` in bf16, or times a factor in e4m3; zeros if `from` is
// negative.
__device__ void store_row(uint8_t* rows, int64_t row, uint32_t lane, Layout layout, const void* data, Dtype dtype,
                          int64_t from, float factor) {
  struct alignas(16) Halves {
    uint16_t bits[8];
  };
  struct alignas(8) Codes {
    uint8_t bits[8];
  };
  const Eight eight = from >= 0 ? load_eight(data, dtype, from * kWave + lane) : Eight{};
  uint8_t* to = rows + row * row_bytes(layout);
  if (is_fp8(layout)) {
    Codes codes;
    for (int k = 0; k < 8; ++k) {
      const float value = eight.values[k] * factor;
      codes.bits[k] = layout == Layout::kAiterFp8 ? float_to_e4m3(value) : float_to_e4m3fnuz(value);
    }
    store_eight(to, lane, codes);
  } else {
    Halves halves;
    for (int k = 0; k < 8; ++k) halves.bits[k] = float_to_bf16(eight.values[k]);
    store_eight(to, lane, halves);
  }
}

// Whether a later row goes to the same slot: of equal slots the last row wins, whatever the order in which waves run.
__device__ bool superseded(const int32_t* slots, int64_t count, int64_t row) {
  const int lane = thread_id() % kWave;
  for (int64_t first = row + 1; first < count; first += kWave) {
    const bool again = first + lane < count && slots[first + lane] == slots[row];
    if (__builtin_amdgcn_ballot_w64(again)) return true;
  }
  return false;
}

// The sum over a workgroup, in a fixed order.
__device__ int64_t sum_over_threads(int64_t value) {
  __shared__ int64_t partial[kThreads];
  const int t = thread_id();
  partial[t] = value;
  for (int step = kThreads / 2; step; step >>= 1) {
    barrier();
    if (t < step) partial[t] += partial[t + step];
  }
  barrier();
  const int64_t sum = partial[0];
  barrier();
  return sum;
}

// The largest value in a wave, or in every so many lanes of it.
__device__ float max_over_wave(float value, int lanes = kWave) {
  const int lane = thread_id() % kWave;
  for (int step = 1; step < lanes; step <<= 1) {
    const int other = __builtin_amdgcn_ds_bpermute(4 * (lane ^ step), __builtin_bit_cast(int, value));
    const float theirs = __builtin_bit_cast(float, other);
    value = theirs > value ? theirs : value;
  }
  return value;
}

}  // namespace

// ---- Plan: one workgroup. One thread places tokens, a chunk at a time; all write their rows.

JAX_DSV4_KERNEL void dsv4_plan(PlanParams p) {
  __shared__ int32_t lengths[kThreads];
  __shared__ PlanCursor at[kThreads];
  __shared__ PlanCut cuts[kThreads];
  __shared__ PlanCursor cursor;
  const int t = thread_id();
  int64_t cost = 0;
  for (int32_t token = t; token < p.tokens; token += kThreads)
    cost += plan_cost(p, plan_blocks(p, plan_length(p, token)));
  // Of AITER's cuts the cost is all that matters: cut_cost is 0 (handlers.cc).
  const PlanShare share = plan_share(p, {static_cast<int32_t>(sum_over_threads(cost)), 0, 0});

  if (t == 0) cursor = kPlanStart, p.reduce_indptr[0] = 0;
  for (int32_t first = 0; first < p.tokens; first += kThreads) {
    if (first + t < p.tokens) lengths[t] = plan_length(p, first + t);
    barrier();
    if (t == 0) {
      for (int32_t i = 0; i < kThreads && first + i < p.tokens; ++i) {
        at[i] = cursor;
        cuts[i] = plan_token_place(p, share, plan_blocks(p, lengths[i]), &cursor);
      }
    }
    barrier();
    if (first + t < p.tokens) plan_token_write(p, first + t, lengths[t], at[t], cuts[t]);
  }
  barrier();
  for (int32_t w = cursor.worker + 1 + t; w <= p.workers; w += kThreads) p.work_indptr[w] = cursor.items;
}

// ---- Around AITER's plan builder: one workgroup each.

JAX_DSV4_KERNEL void dsv4_metadata_inputs(MetadataParams p) {
  __shared__ int32_t lengths[kThreads];
  __shared__ int32_t sum;
  const int t = thread_id();
  if (t == 0) sum = 0;
  for (int32_t first = 0; first < p.plan.tokens; first += kThreads) {
    const int32_t token = first + t;
    lengths[t] = token < p.plan.tokens ? plan_length(p.plan, token) : 0;
    barrier();
    int32_t before = sum;
    for (int i = 0; i < t; ++i) before += lengths[i];
    if (token < p.plan.tokens) {
      p.plan.kv_lengths[token] = lengths[t];
      p.kv_indptr[token] = before;
      p.qo_indptr[token] = token;
      p.last_page_lens[token] = 1;
    }
    barrier();
    if (t == kThreads - 1) sum = before + lengths[t];
    barrier();
  }
  if (t == 0) p.kv_indptr[p.plan.tokens] = sum, p.qo_indptr[p.plan.tokens] = p.plan.tokens;
}

// The builder knows of one worker per unit; the plan's array has room for more.
JAX_DSV4_KERNEL void dsv4_metadata_finish(MetadataParams p) {
  const int32_t units = p.plan.active_workers, items = p.plan.work_indptr[units];
  for (int32_t w = units + 1 + thread_id(); w <= p.plan.workers; w += kThreads) p.plan.work_indptr[w] = items;
}

// ---- Queries: rows of 576; in fp8 one scale for all.

// Each of kAmaxBlocks workgroups leaves the largest finite |q| it has seen.
JAX_DSV4_KERNEL void dsv4_amax(DecodeScopeParams p) {
  __shared__ float largest[kThreads / kWave];
  const int t = thread_id();
  const int64_t eights = static_cast<int64_t>(p.tokens) * p.heads * (kLatentDim / 8);
  float top = 0;
  for (int64_t i = block_id() * kThreads + t; i < eights; i += kAmaxBlocks * kThreads) {
    for (float value : load_eight(p.q, p.q_dtype, i).values) {
      const float magnitude = __builtin_fabsf(value);
      if (magnitude > top && magnitude < infinity()) top = magnitude;
    }
  }
  top = max_over_wave(top);
  if (t % kWave == 0) largest[t / kWave] = top;
  barrier();
  for (float other : largest) top = other > top ? other : top;
  if (t == 0) p.amax[block_id()] = top;
}

// One wave per token and padded head.
JAX_DSV4_KERNEL void dsv4_pack_q(DecodeScopeParams p) {
  const uint32_t lane = thread_id() % kWave, padded = p.head_passes * p.kernel_heads;
  const uint32_t row = group_id(kWave);
  if (row >= p.tokens * padded) return;
  const uint32_t token = row / padded, head = row % padded;
  static_assert(kAmaxBlocks == kWave && kLatentDim == 8 * kWave, "one for each lane");
  const bool scaled = is_fp8(p.layout);
  const float top = scaled ? max_over_wave(p.amax[lane]) : 0;
  // The least scale is one whose inverse is finite; it is reached when all of q is zero or next to it.
  const float scale = top > 1e-30f ? top / largest_of(p.layout) : 1e-30f;
  const bool inside = head < static_cast<uint32_t>(p.heads);
  store_row(p.q_packed, row, lane, p.layout, p.q, p.q_dtype, inside ? static_cast<int64_t>(token) * p.heads + head : -1,
            1 / scale);
  if (scaled && row == 0 && lane == 0) p.scales[0] = scale, p.scales[1] = p.cache_scale;
}

// ---- Slots: valid ones to the front, as rows of the pool. One wave per token.

JAX_DSV4_KERNEL void dsv4_pack_slots(DecodeScopeParams p) {
  const int lane = thread_id() % kWave;
  const int32_t token = group_id(kWave);
  if (token >= p.tokens) return;
  const int32_t length = clamp_length(p.lengths[token], p.topk);
  const int32_t* slots = p.indices + static_cast<int64_t>(token) * p.topk;
  int32_t* rows = p.rows + static_cast<int64_t>(token) * p.row_stride;
  int32_t valid = 0;
  for (int32_t first = 0; first < length; first += kWave) {
    const int32_t slot = first + lane < length ? slots[first + lane] : -1;
    const bool keep = slot >= 0 && slot < p.num_slots;
    const uint64_t kept = __builtin_amdgcn_ballot_w64(keep);
    const uint32_t before = __builtin_amdgcn_mbcnt_hi(kept >> 32, __builtin_amdgcn_mbcnt_lo(kept, 0));
    if (keep) rows[valid + before] = slot + kZeroBlocks * p.block_size;
    valid += __builtin_popcountll(kept);
  }
  if (lane == 0) {
    if (valid == 0) rows[0] = 0;  // for items that holes left empty
    p.state[token] = {valid, p.plan.kv_lengths[token] == length ? length : -1, 0};
  }
}

// ---- Items: the plan as AITER's kernel may follow it. One workgroup.
//
// The kernel ends a whole worker at an empty item and reads wherever an item points, so every item is checked here. One
// that is out of bounds, or that holes among the slots left without keys, is made to attend to one row and to write
// where nobody reads; each pass over the heads gets a copy of all items. A token whose items are bad or do not cover it
// is answered with NaN.
JAX_DSV4_KERNEL void dsv4_check_items(DecodeScopeParams p) {
  const int t = thread_id();
  const int32_t* indptr = p.plan.work_indptr;
  const int padded = p.head_passes * p.kernel_heads;
  const int32_t nobody = p.plan.max_partials + p.tokens;
  int64_t disorder = 0;
  for (int32_t w = t; w < p.workers; w += kThreads) {
    disorder += indptr[w] < 0 || indptr[w + 1] < indptr[w] || indptr[w + 1] > p.plan.max_items;
  }
  const bool usable = sum_over_threads(disorder) == 0 && indptr[0] == 0;
  const int32_t items = usable ? indptr[p.workers] : 0;

  for (int32_t pass = 0; pass < p.head_passes; ++pass) {
    for (int32_t w = t; w < p.workers; w += kThreads) {
      p.work_indptr[pass * p.workers + w] = pass * items + (usable ? indptr[w] : 0);
    }
  }
  for (int32_t i = t; i <= p.tokens * p.head_passes; i += kThreads) p.qo_indptr[i] = i;
  if (t == 0) {
    p.work_indptr[p.head_passes * p.workers] = p.head_passes * items;
    p.work_pointers[0] = reinterpret_cast<uint64_t>(p.work_indptr);
    p.work_pointers[1] = reinterpret_cast<uint64_t>(p.work_info_set);
  }

  for (int32_t i = t; i < items; i += kThreads) {
    const WorkInfo info = reinterpret_cast<const WorkInfo*>(p.plan.work_info_set)[i];
    const int32_t token = info.batch_idx;
    bool attends = token >= 0 && token < p.tokens && info.partial_qo_loc < p.plan.max_partials;
    int32_t begin = 0, end = 0, partial = nobody;
    if (attends) {
      TokenState& state = p.state[token];
      begin = info.kv_start - token * p.topk;
      end = info.kv_end - token * p.topk;
      attends = state.length >= 0 && begin >= 0 && begin < end && end <= state.length;
      if (attends) {
        __atomic_fetch_add(&state.covered, end - begin, __ATOMIC_RELAXED);
        partial = info.partial_qo_loc;
        if (partial < 0) partial = p.direct ? -1 : p.plan.max_partials + token;
        end = min_int(end, state.valid);
        if (end <= begin) {
          // Nothing but holes. Its partial counts for nothing; an unsplit token without any key is answered by combine.
          for (int h = 0; partial >= 0 && h < padded; ++h)
            p.partial_lse[static_cast<int64_t>(partial) * padded + h] = kNoKeys;
          attends = false, partial = nobody;
        }
      }
    }
    for (int32_t pass = 0; pass < p.head_passes; ++pass) {
      const int32_t owner = (attends ? token : 0) * p.head_passes + pass, at = (attends ? token : 0) * p.row_stride;
      const int32_t row = partial < 0 ? -1 : partial * p.head_passes + pass;
      const int32_t last = attends ? end : 1;
      p.work_info_set[pass * items + i] = {owner,
                                           row,
                                           owner,
                                           owner + 1,
                                           at + (attends ? begin : 0),
                                           at + last,
                                           attends ? p.state[token].valid - last : 0,
                                           0};
    }
  }
}

// ---- Combine: what is not written yet. Half a workgroup per token and head, four numbers a thread.

JAX_DSV4_KERNEL void dsv4_combine(DecodeScopeParams p) {
  const uint32_t t = thread_id() % kThreadsPerRow;
  const uint32_t row = group_id(kThreadsPerRow);
  if (row >= static_cast<uint32_t>(p.tokens * p.heads)) return;
  const int32_t token = row / static_cast<uint32_t>(p.heads), head = row % static_cast<uint32_t>(p.heads);
  const int32_t padded = p.head_passes * p.kernel_heads;
  const TokenState state = p.state[token];
  int32_t first = p.plan.reduce_indptr[token], last = p.plan.reduce_indptr[token + 1];
  bool plan_fits =
      state.length >= 0 && state.covered == state.length && first >= 0 && first <= last && last <= p.plan.max_partials;
  const bool split = first < last;
  if (!split) first = 0, last = 1;

  const auto lse_of = [&](int32_t partial) {
    const float lse = p.partial_lse[partial * padded + head];
    return lse == kNoKeys ? -infinity() : lse == -infinity() ? quiet_nan() : lse;
  };
  float top = -infinity(), total = 0;
  if (plan_fits && state.valid > 0) {
    if (!split && p.direct) return;
    for (int32_t i = first; i < last; ++i) {
      const int32_t partial = split ? p.plan.reduce_partial_map[i] : p.plan.max_partials + token;
      if (split && (partial < 0 || partial >= p.plan.max_partials)) {
        plan_fits = false;
        break;
      }
      const float lse = lse_of(partial);
      if (lse != lse || lse > top) top = lse;
    }
  }
  const bool empty = plan_fits && top == -infinity();
  // exp(lse - lse) is 1 for the only partial of a token, so an unsplit one comes out as the kernel wrote it.
  Four sum = {};
  for (int32_t i = first; plan_fits && !empty && i < last; ++i) {
    const int32_t partial = split ? p.plan.reduce_partial_map[i] : p.plan.max_partials + token;
    const float lse = lse_of(partial);
    if (lse == -infinity()) continue;  // no keys: its output was never written
    const float weight = __builtin_amdgcn_exp2f((lse - top) * kLog2e);
    total += weight;
    const Four* values =
        reinterpret_cast<const Four*>(p.partial_out + static_cast<int64_t>(partial * padded + head) * kLatentDim);
    const Four mine = values[t];
    for (int k = 0; k < 4; ++k) sum.values[k] += weight * mine.values[k];
  }
  const float inverse = 1 / total;
  for (int k = 0; k < 4; ++k) sum.values[k] = !plan_fits ? quiet_nan() : empty ? 0 : sum.values[k] * inverse;
  store_four(p.out, p.out_dtype, static_cast<int64_t>(row) * kLatentDim + 4 * t, sum);
  if (t == 0) p.lse[row] = !plan_fits ? quiet_nan() : empty ? -infinity() : top + __builtin_amdgcn_logf(total) * kLn2;
}

// ---- Append: one wave per latent.

JAX_DSV4_KERNEL void dsv4_append(PoolAppendParams p) {
  const uint32_t lane = thread_id() % kWave;
  const int64_t row = group_id(kWave);
  if (row >= p.count) return;
  const int32_t slot = p.slots[row];
  if (slot < 0 || slot >= p.num_slots || superseded(p.slots, p.count, row)) return;
  store_row(p.pool, static_cast<int64_t>(slot) + kZeroBlocks * p.block_size, lane, p.layout, p.latents, p.dtype, row,
            1 / p.cache_scale);
}

}  // namespace jax_dsv4::rocm

#include "rocm/gluon-inl.h"
