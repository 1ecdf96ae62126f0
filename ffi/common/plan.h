// The planner: turns lengths into work items, in the format and with the arithmetic of AITER's get_mla_metadata_v1, for
// every platform. It differs from AITER's in two points: an empty token gets no work item (AITER's kernel ends its
// whole workgroup at one), and a platform may have tokens left whole (PlanShare).
//
// A token of n blocks (ceil(length / granularity)) costs n + overhead. Workers are filled in order. A fresh one has
// room for `payload` blocks; an item takes its blocks and the overhead from the room; what does not fit goes on with
// the next worker, cut at a block boundary. So the plan is a scan over tokens that carries a PlanCursor
// (plan_token_place), and the rows of one token follow from its cursor alone (plan_token, plan_item): on a GPU all
// threads write.
//
// The scan itself can run in pieces, because all that a token needs of the tokens before it is `room`, and few values
// of it occur. With room r <= payload before a token of n > 0 blocks, or r = 0 where it does not begin in it,
// `fresh` workers are opened so that
//   left = r - n + fresh * payload  is in [0, payload):  left = (r - n) mod payload,
// and the room after it is max(0, left - overhead), in [0, plan_rooms()). So a stretch of tokens is a map from room to
// room, a GPU computes the maps of many stretches at once, and chaining them tells where each stretch starts
// (plan_step).
//
// In a plan of segments a token's items follow from its own length alone, so that its answer has the same bits in any
// batch. An item is of the worker in whose even share of the cost it begins (plan_segment).
#ifndef JAX_DSV4_COMMON_PLAN_H_
#define JAX_DSV4_COMMON_PLAN_H_

#include <cstdint>

#include "common/host_device.h"
#include "common/params.h"

namespace jax_dsv4 {

// The planner's operands. Outputs are those of struct Plan; rows past what is used are left to the caller (zero them
// first).
struct PlanParams {
  const int32_t* lengths[2];  // [tokens] per scope, any value; not looked at where topk is 0
  int32_t topk[2];            // lengths are clamped to [0, topk]
  int32_t tokens;
  int32_t workers;              // work_indptr has workers + 1 entries
  int32_t active_workers;       // of which this many get work
  int32_t granularity;          // keys per block: cuts happen at its multiples
  int32_t overhead;             // blocks' worth of cost per item
  int32_t cut_cost;             // what cutting tokens adds to an item's cost, in blocks; 0: cut where AITER cuts
  int32_t segment;              // blocks: tokens are cut at its multiples and nowhere else; 0: where workers are full
  int32_t max_items;            // rows of work_info_set, >= plan_max_items(...)
  int32_t max_partials;         // rows of reduce_partial_map, >= plan_max_partials(...)
  int32_t* kv_lengths;          // [tokens]
  int32_t* work_indptr;         // [workers + 1]
  int32_t* work_info_set;       // [max_items, 8]
  int32_t* reduce_indptr;       // [tokens + 1]
  int32_t* reduce_final_map;    // [tokens, 2]
  int32_t* reduce_partial_map;  // [max_partials]
};

// Where a token starts: the worker, the blocks that it has room for, and the counts of everything before. The scan
// starts at kPlanStart: before the first worker, so that whatever comes first opens it.
struct PlanCursor {
  int32_t worker;
  int32_t room;
  int32_t items;
  int32_t partials;
};
constexpr PlanCursor kPlanStart{-1, 0, 0, 0};

// How a token is cut: `first` blocks go to the cursor's worker (0: that worker is closed as it is), then whole workers
// of `each`.
struct PlanCut {
  int32_t first;
  int32_t each;
  int32_t items;
};

JAX_DSV4_HD int32_t plan_ceil_div(int32_t a, int32_t b) {
  return static_cast<int32_t>((static_cast<uint32_t>(a) + static_cast<uint32_t>(b) - 1) / static_cast<uint32_t>(b));
}

// A token is cut only where a worker closes, so `workers` closings give at most this many items and partials. In a plan
// of segments: of so many to a token.
JAX_DSV4_HD int64_t plan_max_items(int64_t tokens, int64_t workers, int64_t segments) {
  return segments > 1 ? tokens * segments : tokens + workers - 1;
}
JAX_DSV4_HD int64_t plan_max_partials(int64_t tokens, int64_t workers, int64_t segments) {
  const int64_t by_items = plan_max_items(tokens, workers, segments), by_cuts = 2 * (workers - 1);
  return segments > 1 || by_items < by_cuts ? by_items : by_cuts;
}

JAX_DSV4_HD int32_t plan_length(const PlanParams& p, int32_t token) {
  int32_t sum = 0;
  for (int s = 0; s < 2; ++s) {
    if (p.topk[s] > 0) sum += clamp_length(p.lengths[s][token], p.topk[s]);
  }
  return sum;
}

JAX_DSV4_HD int32_t plan_blocks(const PlanParams& p, int32_t length) { return plan_ceil_div(length, p.granularity); }

JAX_DSV4_HD int32_t plan_cost(const PlanParams& p, int32_t blocks) { return blocks == 0 ? 0 : blocks + p.overhead; }

// What the planner asks of all tokens together before it places any.
struct PlanTotals {
  int32_t cost;     // their sum
  int32_t largest;  // of the costs
  int32_t tokens;   // that are not empty
};

JAX_DSV4_HD PlanTotals plan_add(PlanTotals a, PlanTotals b) {
  return {a.cost + b.cost, max_int(a.largest, b.largest), a.tokens + b.tokens};
}

JAX_DSV4_HD PlanTotals plan_totals(int32_t cost) { return {cost, cost, cost > 0}; }

// What a fresh worker has room for: an even share of the cost, which tokens are cut to fill. But where that is hardly
// less than as many of the largest tokens as a worker has to take for all to be taken, it has room for those, and no
// token is cut. For where tokens are cut, a worker has about two items more, the first and the last of its items have
// partial results to be written and read again, and the more tokens there are, the longer it takes to combine them.
//
// And where there is little to do, a worker takes no fewer blocks than take as long as it takes to combine the partials
// of the largest token then.
constexpr int32_t kPlanPartialsPerBlock = 6;  // that are combined while a block is attended to

struct PlanShare {
  int32_t payload;
  int32_t cuts;  // 1; 0: no token begins where it does not fit
};

JAX_DSV4_HD PlanShare plan_share(const PlanParams& p, PlanTotals totals) {
  int32_t even = plan_ceil_div(totals.cost, p.active_workers);
  if (p.cut_cost > 0) {
    while (int64_t{kPlanPartialsPerBlock} * even * even < totals.largest) ++even;
  }
  const int32_t each = plan_ceil_div(totals.tokens, p.active_workers), whole = each * totals.largest;
  const bool cuts = p.cut_cost == 0 || whole - even > int64_t{p.cut_cost} * (each + 2);
  return {max_int(1, cuts ? even : whole), cuts};
}

// After any token the room is in [0, plan_rooms()).
JAX_DSV4_HD int32_t plan_rooms(const PlanParams& p, PlanShare share) { return max_int(1, share.payload - p.overhead); }

// A token as a step from room to room, with no more than additions and comparisons. An empty one leaves the room as it
// is: zeros.
struct PlanStep {
  int32_t blocks;  // up to payload; of more, mod payload
  int32_t cost;    // of these
};

JAX_DSV4_HD PlanStep plan_step(const PlanParams& p, PlanShare share, int32_t blocks) {
  const int32_t rest = blocks <= share.payload ? blocks : blocks % share.payload;
  return {rest, blocks == 0 ? 0 : rest + p.overhead};
}

JAX_DSV4_HD int32_t plan_room_after(PlanStep step, PlanShare share, int32_t room) {
  // Where it is not taken it may be too large for 32 bits.
  const uint32_t in_fresh = static_cast<uint32_t>(room * share.cuts) + static_cast<uint32_t>(share.payload - step.cost);
  return max_int(0, room >= step.blocks ? room - step.cost : static_cast<int32_t>(in_fresh));
}

// Cuts a token of so many blocks where there is such room.
JAX_DSV4_HD PlanCut plan_cut(PlanShare share, int32_t blocks, int32_t room) {
  const int32_t first = blocks <= room ? blocks : room * share.cuts, rest = blocks - first;
  return {first, share.payload, (first > 0) + (rest <= share.payload ? rest > 0 : plan_ceil_div(rest, share.payload))};
}

// The workers that it opens.
JAX_DSV4_HD int32_t plan_fresh(PlanCut cut) { return cut.items - (cut.first > 0); }

// Cuts a token of so many blocks at the cursor and moves the cursor past it.
JAX_DSV4_HD PlanCut plan_token_place(const PlanParams& p, PlanShare share, int32_t blocks, PlanCursor* cursor) {
  const PlanCut cut = plan_cut(share, blocks, cursor->room);
  const int32_t fresh = plan_fresh(cut);
  cursor->worker += fresh;
  if (blocks > 0) cursor->room = plan_room_after(plan_step(p, share, blocks), share, cursor->room);
  cursor->items += cut.items;
  cursor->partials += cut.items > 1 ? cut.items : 0;
  return cut;
}

// Whether the cursor's worker is closed without an item of this token.
JAX_DSV4_HD bool plan_closes(int32_t length, PlanCut cut) { return length > 0 && cut.first == 0; }

// Writes what there is once per token of so many items, where there are so many partials before.
JAX_DSV4_HD void plan_token_row(const PlanParams& p, int32_t token, int32_t length, int32_t partials, int32_t items) {
  const bool split = items > 1;
  p.kv_lengths[token] = length;
  p.reduce_indptr[token + 1] = partials + (split ? items : 0);
  p.reduce_final_map[2 * token] = split ? token : 0;
  p.reduce_final_map[2 * token + 1] = split ? token + 1 : 0;
}

// Writes an item: keys begin <= k < end of a token, as a partial or (-1) as all of it.
JAX_DSV4_HD void plan_item_row(const PlanParams& p, int32_t token, int32_t length, int32_t item, int32_t partial,
                               int32_t begin, int32_t end) {
  const int32_t base = token * (p.topk[0] + p.topk[1]);
  reinterpret_cast<WorkInfo*>(p.work_info_set)[item] = {token,        partial,    token,        token + 1,
                                                        base + begin, base + end, length - end, 0};
  if (partial >= 0) p.reduce_partial_map[partial] = partial;
}

// `at` is the cursor before the token was placed.
JAX_DSV4_HD void plan_token(const PlanParams& p, int32_t token, int32_t length, PlanCursor at, PlanCut cut) {
  plan_token_row(p, token, length, at.partials, cut.items);
  if (plan_closes(length, cut) && at.worker < p.workers) p.work_indptr[at.worker + 1] = at.items;
}

// Writes a token's item i, and the end of its worker unless more of that worker's items may follow.
JAX_DSV4_HD void plan_item(const PlanParams& p, int32_t token, int32_t length, PlanCursor at, PlanCut cut, int32_t i) {
  const int32_t item = at.items + i, partial = cut.items > 1 ? at.partials + i : -1;
  if (item >= p.max_items || partial >= p.max_partials) return;  // the caller's buffers are too small
  const bool closes = plan_closes(length, cut), last = i == cut.items - 1;
  const int32_t first = closes ? cut.each : cut.first;
  const int32_t begin = i == 0 ? 0 : min_int((first + (i - 1) * cut.each) * p.granularity, length);
  const int32_t end = last ? length : min_int((first + i * cut.each) * p.granularity, length);
  plan_item_row(p, token, length, item, partial, begin, end);
  const int32_t worker = at.worker + i + closes;
  if (!last && worker < p.workers) p.work_indptr[worker + 1] = item + 1;
}

// Writes one token's rows. Of work_indptr that is the entries up to the worker that the scan ends with; all later ones
// must hold the total number of items.
JAX_DSV4_HD void plan_token_write(const PlanParams& p, int32_t token, int32_t length, PlanCursor at, PlanCut cut) {
  plan_token(p, token, length, at, cut);
  for (int32_t i = 0; i < cut.items; ++i) plan_item(p, token, length, at, cut, i);
}

// Sums over tokens. `load`: their cost, in a plan of segments; elsewhere, the workers that they open.
struct PlanSums {
  int32_t load, items, partials;
};

JAX_DSV4_HD PlanSums plan_add(PlanSums a, PlanSums b) {
  return {a.load + b.load, a.items + b.items, a.partials + b.partials};
}

JAX_DSV4_HD PlanSums plan_sums(const PlanParams& p, int32_t blocks) {
  const int32_t items = plan_ceil_div(blocks, p.segment);
  return {blocks + items * p.overhead, items, items > 1 ? items : 0};
}

// Writes a token's item i of those that `own` counts, and the ends of the workers whose shares of the cost, `payload`
// each, end in it.
JAX_DSV4_HD void plan_segment(const PlanParams& p, int32_t payload, int32_t token, int32_t length, PlanSums before,
                              PlanSums own, int32_t i) {
  const int32_t item = before.items + i, partial = own.items > 1 ? before.partials + i : -1;
  if (item >= p.max_items || partial >= p.max_partials) return;  // the caller's buffers are too small
  const int32_t keys = p.segment * p.granularity, begin = i * keys;
  const bool last = i == own.items - 1;
  plan_item_row(p, token, length, item, partial, begin, last ? length : begin + keys);
  const int32_t from = before.load + i * (p.segment + p.overhead);
  const int32_t to = last ? before.load + own.load : from + p.segment + p.overhead;
  for (int32_t w = from / payload + 1; w <= to / payload && w <= p.workers; ++w) p.work_indptr[w] = item + 1;
}

// The plan of segments on one thread.
inline void plan_segments_serial(const PlanParams& p) {
  PlanSums all{};
  for (int32_t t = 0; t < p.tokens; ++t) all = plan_add(all, plan_sums(p, plan_blocks(p, plan_length(p, t))));
  const int32_t payload = max_int(1, plan_ceil_div(all.load, p.active_workers));
  p.reduce_indptr[0] = p.work_indptr[0] = 0;
  PlanSums before{};
  for (int32_t t = 0; t < p.tokens; ++t) {
    const int32_t length = plan_length(p, t);
    const PlanSums own = plan_sums(p, plan_blocks(p, length));
    plan_token_row(p, t, length, before.partials, own.items);
    for (int32_t i = 0; i < own.items; ++i) plan_segment(p, payload, t, length, before, own, i);
    before = plan_add(before, own);
  }
  for (int32_t w = all.load / payload + 1; w <= p.workers; ++w) p.work_indptr[w] = all.items;
}

// The whole plan on one thread.
inline void plan_serial(const PlanParams& p) {
  if (p.segment > 0) return plan_segments_serial(p);
  PlanTotals totals{};
  for (int32_t t = 0; t < p.tokens; ++t) {
    totals = plan_add(totals, plan_totals(plan_cost(p, plan_blocks(p, plan_length(p, t)))));
  }
  const PlanShare share = plan_share(p, totals);
  p.reduce_indptr[0] = 0;
  PlanCursor cursor = kPlanStart;
  for (int32_t t = 0; t < p.tokens; ++t) {
    const PlanCursor at = cursor;
    const int32_t length = plan_length(p, t);
    const PlanCut cut = plan_token_place(p, share, plan_blocks(p, length), &cursor);
    plan_token_write(p, t, length, at, cut);
  }
  for (int32_t w = cursor.worker + 1; w <= p.workers; ++w) p.work_indptr[w] = cursor.items;
}

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_PLAN_H_
