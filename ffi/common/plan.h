// The planner: turns lengths into work items, in the format and with the arithmetic of AITER's get_mla_metadata_v1, for
// every platform. It differs from AITER's in one point: an empty token gets no work item (AITER's kernel ends its whole
// workgroup at one).
//
// A token of n blocks (ceil(length / granularity)) costs n + overhead. A worker takes at most `payload` of cost; a
// token that does not fit into what is left is cut at a block boundary and goes on with the next worker. So the plan is
// a scan over tokens that carries a PlanCursor (plan_token_place), and the rows of one token follow from its cursor
// alone (plan_token_write): on a GPU one thread scans and all threads write.
#ifndef JAX_DSV4_COMMON_PLAN_H_
#define JAX_DSV4_COMMON_PLAN_H_

#include <cstdint>

#include "common/params.h"

#if defined(__CUDACC__) || defined(__HIP__)
#define JAX_DSV4_HD __host__ __device__ inline
#else
#define JAX_DSV4_HD inline
#endif

namespace jax_dsv4 {

// The planner's operands. Outputs are those of struct Plan; rows past what is used are left to the caller (zero them
// first).
struct PlanParams {
  const int32_t* lengths[2];  // [tokens] per scope, any value; null where topk is 0
  int32_t topk[2];            // lengths are clamped to [0, topk]
  int32_t tokens;
  int32_t workers;              // work_indptr has workers + 1 entries
  int32_t active_workers;       // of which this many get work
  int32_t granularity;          // keys per block: cuts happen at its multiples
  int32_t overhead;             // blocks' worth of cost per item
  int32_t max_items;            // rows of work_info_set, >= tokens + active_workers - 1
  int32_t max_partials;         // rows of reduce_partial_map, >= plan_max_partials(...)
  int32_t* kv_lengths;          // [tokens]
  int32_t* work_indptr;         // [workers + 1]
  int32_t* work_info_set;       // [max_items, 8]
  int32_t* reduce_indptr;       // [tokens + 1]
  int32_t* reduce_final_map;    // [tokens, 2]
  int32_t* reduce_partial_map;  // [max_partials]
};

// Where a token starts: the worker, what that worker has left, and the counts of everything before.
struct PlanCursor {
  int32_t worker;
  int32_t remaining;  // of the worker's payload
  int32_t items;
  int32_t partials;
};

// How a token is cut: `first` blocks go to the cursor's worker (0: that worker is closed as it is), then whole workers
// of `each`.
struct PlanCut {
  int32_t first;
  int32_t each;
  int32_t items;
};

JAX_DSV4_HD int32_t plan_min(int32_t a, int32_t b) { return a < b ? a : b; }
JAX_DSV4_HD int32_t plan_max(int32_t a, int32_t b) { return a > b ? a : b; }
JAX_DSV4_HD int32_t plan_ceil_div(int64_t a, int32_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// A token is cut only where a worker closes, so `workers` closings give at most this many partials.
JAX_DSV4_HD int64_t plan_max_partials(int64_t tokens, int64_t workers) {
  int64_t by_items = tokens + workers - 1, by_cuts = 2 * (workers - 1);
  return by_items < by_cuts ? by_items : by_cuts;
}

JAX_DSV4_HD int32_t plan_length(const PlanParams& p, int32_t token) {
  int32_t sum = 0;
  for (int s = 0; s < 2; ++s) {
    if (p.topk[s] > 0) sum += plan_max(0, plan_min(p.lengths[s][token], p.topk[s]));
  }
  return sum;
}

JAX_DSV4_HD int32_t plan_cost(const PlanParams& p, int32_t length) {
  return length == 0 ? 0 : plan_ceil_div(length, p.granularity) + p.overhead;
}

// The payload of every worker, given the sum of all tokens' costs.
JAX_DSV4_HD int32_t plan_payload(const PlanParams& p, int64_t total_cost) {
  return plan_ceil_div(total_cost, p.active_workers) + p.overhead;
}

// Cuts the token at the cursor and moves the cursor past it.
JAX_DSV4_HD PlanCut plan_token_place(const PlanParams& p, int32_t payload, int32_t length, PlanCursor* cursor) {
  const int32_t blocks = plan_ceil_div(length, p.granularity);
  PlanCut cut{0, payload - p.overhead, 0};
  if (length == 0) return cut;
  if (blocks + p.overhead <= cursor->remaining) {
    cut.first = blocks;
    cut.items = 1;
    cursor->remaining -= blocks + p.overhead;
    cursor->items += 1;
    return cut;
  }
  cut.first = plan_max(0, cursor->remaining - p.overhead);
  const int32_t rest = blocks - cut.first;
  const int32_t fresh = plan_ceil_div(rest, cut.each);  // workers opened for this token
  cut.items = fresh + (cut.first > 0);
  cursor->worker += fresh;
  cursor->remaining = payload - (rest - (fresh - 1) * cut.each + p.overhead);
  cursor->items += cut.items;
  cursor->partials += cut.items > 1 ? cut.items : 0;
  return cut;
}

// Writes one token's rows; `at` is the cursor before the token was placed. work_indptr[1 .. workers] must hold the
// total number of items beforehand: only workers that are closed before the last one are written here.
JAX_DSV4_HD void plan_token_write(const PlanParams& p, int32_t token, int32_t length, PlanCursor at, PlanCut cut) {
  const bool split = cut.items > 1;
  const int32_t stride = p.topk[0] + p.topk[1];
  const bool wasted = length > 0 && cut.first == 0;  // the cursor's worker had no room for a single block
  p.kv_lengths[token] = length;
  p.reduce_indptr[token + 1] = at.partials + (split ? cut.items : 0);
  if (split) {
    p.reduce_final_map[2 * token] = token;
    p.reduce_final_map[2 * token + 1] = token + 1;
  }
  if (wasted && at.worker < p.workers) p.work_indptr[at.worker + 1] = at.items;
  const int32_t first = wasted ? cut.each : cut.first;
  for (int32_t i = 0; i < cut.items; ++i) {
    const int32_t begin = i == 0 ? 0 : plan_min((first + (i - 1) * cut.each) * p.granularity, length);
    const bool last = i == cut.items - 1;
    const int32_t end = last ? length : plan_min((first + i * cut.each) * p.granularity, length);
    const int32_t item = at.items + i, partial = at.partials + i;
    if (item >= p.max_items || (split && partial >= p.max_partials)) return;  // the caller's buffers are too small
    int32_t* info = p.work_info_set + 8 * static_cast<int64_t>(item);
    info[0] = token;
    info[1] = split ? partial : -1;
    info[2] = token;
    info[3] = token + 1;
    info[4] = token * stride + begin;
    info[5] = token * stride + end;
    info[6] = length - end;
    info[7] = 0;
    if (split) p.reduce_partial_map[partial] = partial;
    const int32_t worker = at.worker + i + wasted;
    if (!last && worker < p.workers) p.work_indptr[worker + 1] = item + 1;
  }
}

// The whole plan on one thread.
inline void plan_serial(const PlanParams& p) {
  int64_t total = 0;
  for (int32_t t = 0; t < p.tokens; ++t) total += plan_cost(p, plan_length(p, t));
  const int32_t payload = plan_payload(p, total);
  const PlanCursor start{0, payload, 0, 0};
  PlanCursor cursor = start;
  for (int32_t t = 0; t < p.tokens; ++t) plan_token_place(p, payload, plan_length(p, t), &cursor);
  p.work_indptr[0] = 0;
  for (int32_t w = 1; w <= p.workers; ++w) p.work_indptr[w] = cursor.items;
  p.reduce_indptr[0] = 0;
  cursor = start;
  for (int32_t t = 0; t < p.tokens; ++t) {
    const PlanCursor at = cursor;
    const int32_t length = plan_length(p, t);
    const PlanCut cut = plan_token_place(p, payload, length, &cursor);
    plan_token_write(p, t, length, at, cut);
  }
}

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_PLAN_H_
