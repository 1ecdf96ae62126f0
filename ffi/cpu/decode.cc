// What surrounds the kernels: which one runs, which tokens need none, and who combines.
#include <cstring>
#include <limits>

#include "common/fp8.h"
#include "cpu/choose.h"
#include "cpu/launch.h"

namespace jax_dsv4::cpu {
namespace {

void answer_token(const DecodeParams& p, int32_t token, float out, float lse) {
  const int64_t rows = p.heads, first = static_cast<int64_t>(token) * rows;
  for (int64_t h = first; h < first + rows; ++h) p.lse[h] = lse;
  const int64_t count = rows * kLatentDim;
  if (p.out_dtype == Dtype::kBf16) {
    uint16_t* at = static_cast<uint16_t*>(p.out) + first * kLatentDim;
    const uint16_t bits = float_to_bf16(out);
    for (int64_t i = 0; i < count; ++i) at[i] = bits;
  } else {
    float* at = static_cast<float*>(p.out) + first * kLatentDim;
    for (int64_t i = 0; i < count; ++i) at[i] = out;
  }
}

constexpr const Kernels* kKernels[kIsas] = {
    &generic_kernels,
#if defined(__x86_64__)
    &avx2_kernels,    &avx512_kernels, &avx512_bf16_kernels, &amx_kernels,
#endif
};

bool is_bf16(const Scope& scope) { return scope.topk == 0 || scope.cache.layout != Layout::kFloat32; }

}  // namespace

const Kernels& select_kernels(const DecodeParams& p) {
  const Kernels& chosen = *kKernels[choice().isa];
  const bool bf16 = p.q_dtype == Dtype::kBf16 && is_bf16(p.scopes[0]) && is_bf16(p.scopes[1]);
  return chosen.bf16 && !bf16 ? *kKernels[kAvx512] : chosen;
}

int32_t count_tasks(const DecodeParams& p, int32_t tile_keys) {
  int64_t segments = 0;
  for (int32_t t = 0; t < p.tokens; ++t) {
    const int32_t length = max_int(0, p.plan.kv_lengths[t]);
    segments += segments_before(length, segment_keys(length, tile_keys));
  }
  const int32_t items = max_int(0, p.plan.work_indptr[p.plan.workers]);
  return segments < items ? static_cast<int32_t>(segments) : items;
}

int32_t choose_head_groups(int32_t items, int32_t heads, int64_t threads) {
  int32_t groups = 1;
  // Items may be of different lengths, groups are not.
  const int64_t wanted = items > 1 ? 2 * threads : threads;
  while (groups < kMaxHeadGroups && items * int64_t{groups} < wanted && heads / (2 * groups) >= kHeadBlock) {
    groups *= 2;
  }
  return groups;
}

int32_t prepare_tokens(const DecodeParams& p, int32_t tile_keys, int32_t partial_rows, int32_t head_groups) {
  const Plan& plan = p.plan;
  const int32_t stride = p.scopes[0].topk + p.scopes[1].topk;
  const int32_t claimed = plan.work_indptr[plan.workers];
  const int32_t items = claimed < 0 ? 0 : claimed > plan.max_items ? plan.max_items : claimed;
  // Of a token's items, in the place of its counters until these are known; kFirstKeys: of the first item.
  enum Seen { kKeys, kItems, kWrong, kFirstKeys };
  int32_t* const state = p.counters;
  std::memset(state, 0, sizeof(int32_t) * kTokenCounters * static_cast<size_t>(p.tokens));
  for (int32_t i = 0; i < items; ++i) {
    WorkInfo info;
    std::memcpy(&info, plan.work_info_set + 8 * static_cast<int64_t>(i), sizeof info);
    if (info.batch_idx < 0 || info.batch_idx >= p.tokens) continue;
    int32_t* seen = state + static_cast<int64_t>(info.batch_idx) * kTokenCounters;
    const int64_t first = static_cast<int64_t>(info.batch_idx) * stride;
    // A token's items come in the order of its keys, each with the next of its rows of the partial buffers.
    const int32_t begin = plan.reduce_indptr[info.batch_idx], end = plan.reduce_indptr[info.batch_idx + 1];
    const int64_t at = static_cast<int64_t>(begin) + seen[kItems];
    const bool listed = at >= 0 && at < end && at < plan.max_partials;
    const int32_t row = begin == end ? -1 : listed ? plan.reduce_partial_map[at] : plan.max_partials;
    const int32_t keys =
        info.kv_start == first + seen[kKeys] && info.kv_start < info.kv_end && info.kv_end <= first + stride
            ? info.kv_end - info.kv_start
            : 0;
    // An item that writes the output must be the token's only one.
    if (keys == 0 || row != info.partial_qo_loc || row < -1 || row >= plan.max_partials ||
        (row < 0 && keys != plan.kv_lengths[info.batch_idx])) {
      seen[kWrong] = 1;
      continue;
    }
    seen[kKeys] += keys;
    seen[kItems] += 1;
    if (seen[kItems] == 1) seen[kFirstKeys] = keys;
  }
  int32_t rows = 0;
  for (int32_t t = 0; t < p.tokens; ++t) {
    int32_t* seen = state + static_cast<int64_t>(t) * kTokenCounters;
    const int32_t length = clamped_length(p.scopes[0], t) + clamped_length(p.scopes[1], t);
    const int32_t begin = plan.reduce_indptr[t], end = plan.reduce_indptr[t + 1];
    bool valid = plan.kv_lengths[t] == length && seen[kKeys] == length && seen[kWrong] == 0;
    int32_t partials = 0;
    if (valid && end != begin) {
      partials = seen[kItems];
      valid = static_cast<int64_t>(end) - begin == partials;
      const int32_t segment = segment_keys(length, tile_keys), merged = segments_before(seen[kFirstKeys], segment);
      const int32_t wanted = 1 + segments_before(length, segment) - merged;
      const bool fits = wanted <= partial_rows - rows;
      const PartialRows mine{fits ? rows : -1, merged};
      std::memcpy(seen + kMaxHeadGroups, &mine, sizeof mine);
      if (valid && fits) rows += wanted;
    }
    if (!valid || length == 0) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      answer_token(p, t, valid ? 0 : nan, valid ? -std::numeric_limits<float>::infinity() : nan);
      partials = -1;
    }
    for (int32_t g = 0; g < head_groups; ++g) seen[g] = partials;
  }
  return items;
}

void run_task(const DecodeParams& p, const Kernels& kernels, int32_t head_groups, int64_t task_index,
              uint8_t* scratch) {
  const int64_t item = task_index / head_groups;
  const int32_t group = static_cast<int32_t>(task_index % head_groups);
  WorkInfo info;
  std::memcpy(&info, p.plan.work_info_set + 8 * item, sizeof info);
  if (info.batch_idx < 0 || info.batch_idx >= p.tokens) return;
  int32_t* counters = p.counters + static_cast<int64_t>(info.batch_idx) * kTokenCounters;
  int32_t* waiting = counters + group;
  if (__atomic_load_n(waiting, __ATOMIC_RELAXED) < 0) return;  // prepare_tokens has answered it
  const int32_t first = info.batch_idx * (p.scopes[0].topk + p.scopes[1].topk);
  const int32_t length = p.plan.kv_lengths[info.batch_idx], keys = segment_keys(length, kernels.tile_keys);
  const int32_t begin = segments_before(info.kv_start - first, keys);
  int32_t end = segments_before(info.kv_end - first, keys);
  bool cut = info.partial_qo_loc >= 0;
  PartialRows rows;
  std::memcpy(&rows, counters + kMaxHeadGroups, sizeof rows);
  if (cut && rows.first < 0) {
    if (begin > 0) return;
    cut = false;
    end = segments_before(length, keys);
  }
  Task task;
  task.token = info.batch_idx;
  task.kv_begin = segments_end(begin, keys, length);
  task.kv_end = segments_end(end, keys, length);
  task.segment_keys = keys;
  task.row = !cut ? -1 : begin == 0 ? rows.first : rows.first + 1 + begin - rows.merged;
  // Whole blocks of heads, but the last one.
  const int32_t blocks = padded_heads(p.heads) / kHeadBlock;
  task.head_begin = kHeadBlock * (blocks * group / head_groups);
  task.head_end = min_int(kHeadBlock * (blocks * (group + 1) / head_groups), p.heads);
  if (begin < end) kernels.attend(p, task, scratch);
  // The last of a token's items merges all partials, in the order of their keys: the result does not depend on who was
  // last.
  if (cut && __atomic_fetch_sub(waiting, 1, __ATOMIC_ACQ_REL) == 1) {
    const int32_t count = 1 + segments_before(length, keys) - rows.merged;
    kernels.combine(p, task.token, rows.first, count, task.head_begin, task.head_end);
  }
}

}  // namespace jax_dsv4::cpu
