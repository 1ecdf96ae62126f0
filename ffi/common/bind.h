// The operands, results and attributes of the targets that CPU and CUDA share, bound and checked into the launchers'
// structs. The order is that of jax_dsv4/implementations/native.py.
#ifndef JAX_DSV4_COMMON_BIND_H_
#define JAX_DSV4_COMMON_BIND_H_

#include "common/check.h"
#include "common/params.h"
#include "common/plan.h"

namespace jax_dsv4 {

using Buffer = ffi::AnyBuffer;
template <typename T>
T* data_of(const Buffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// dsv4_decode: q, sink, two scopes, a plan -> out, lse and workspaces. An absent extra scope has topk 0.
struct DecodeOperands {
  Buffer q, sink;
  Buffer swa_cache, swa_indices, swa_lengths;
  Buffer extra_cache, extra_indices, extra_lengths;
  Buffer kv_lengths, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map;
  Buffer out, lse, partial_out, partial_lse, counters;
  float scale;
  bool has_sink;
  int32_t swa_block_size, swa_layout, extra_block_size, extra_layout;
};

// `partial_numbers`: floats that a platform keeps of a partial besides its output. One: its lse.
inline ffi::Error bind_decode(const DecodeOperands& o, int64_t counters_per_token, DecodeParams* p,
                              int64_t partial_numbers = 1) {
  Checker check("sparse_mla_decode");
  check.shape(o.q, "q", "(tokens, heads, 512)", {-1, -1, kLatentDim});
  if (!check.ok() || !bind_float_dtype(check, o.q, "q", &p->q_dtype)) return check.error();
  const int64_t tokens = o.q.dimensions()[0], heads = o.q.dimensions()[1];
  check.require(heads >= 1 && heads <= 128, "q", "have 1 to 128 heads", std::to_string(heads));
  // Without a sink, nothing: zeros would be filled in by a kernel of their own in every call.
  check.buffer(o.sink, "attn_sink", ffi::DataType::F32, o.has_sink ? "(heads,)" : "(0,)", {o.has_sink ? heads : 0});
  if (!bind_scope(check, "swa", tokens, o.swa_cache, o.swa_indices, o.swa_lengths, o.swa_block_size, o.swa_layout,
                  &p->scopes[0]) ||
      !bind_scope(check, "extra", tokens, o.extra_cache, o.extra_indices, o.extra_lengths, o.extra_block_size,
                  o.extra_layout, &p->scopes[1]) ||
      !bind_plan(check, tokens, o.kv_lengths, o.work_indptr, o.work_info_set, o.reduce_indptr, o.reduce_final_map,
                 o.reduce_partial_map, &p->plan)) {
    return check.error();
  }
  check.narrow(tokens * (static_cast<int64_t>(p->scopes[0].topk) + p->scopes[1].topk), "tokens * topk");
  // A scope that will be merged with another asks for fp32: rounding both to bf16 first would cost accuracy.
  if (!bind_float_dtype(check, o.out, "out", &p->out_dtype)) return check.error();
  check.shape(o.out, "out", "(tokens, heads, 512)", {tokens, heads, kLatentDim});
  check.buffer(o.lse, "lse", ffi::DataType::F32, "(tokens, heads)", {tokens, heads});
  check.buffer(o.partial_out, "partial_out", ffi::DataType::F32, "(max_partials, heads, 512)", {-1, heads, kLatentDim});
  if (!check.ok()) return check.error();
  const int64_t partials = o.partial_out.dimensions()[0];
  check.buffer(o.partial_lse, "partial_lse", ffi::DataType::F32,
               partial_numbers == 1 ? "(max_partials, heads)" : "(max_partials, heads * numbers)",
               {partials, heads * partial_numbers});
  check.buffer(o.counters, "counters", ffi::DataType::S32, "(tokens, counters)", {tokens, counters_per_token});
  p->q = o.q.untyped_data();
  p->sink = o.has_sink ? static_cast<const float*>(o.sink.untyped_data()) : nullptr;
  // The plan's arrays have room for any platform's plan, the workspace for this platform's.
  p->plan.max_partials = static_cast<int32_t>(partials < p->plan.max_partials ? partials : p->plan.max_partials);
  p->out = data_of<void>(o.out);
  p->lse = data_of<float>(o.lse);
  p->partial_out = data_of<float>(o.partial_out);
  p->partial_lse = data_of<float>(o.partial_lse);
  p->counters = data_of<int32_t>(o.counters);
  p->tokens = check.narrow(tokens, "tokens");
  p->heads = static_cast<int32_t>(heads);
  p->scale = o.scale;
  return check.error();
}

// dsv4_plan: lengths of two scopes -> a plan. An absent scope has topk 0.
struct PlanOperands {
  Buffer swa_lengths, extra_lengths;
  Buffer kv_lengths, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map;
  int32_t swa_topk, extra_topk, active_workers, granularity, overhead, cut_cost;
};

inline ffi::Error bind_plan_params(const PlanOperands& o, PlanParams* p) {
  Checker check("plan_decode");
  check.buffer(o.swa_lengths, "swa_lengths", ffi::DataType::S32, "(tokens,)", {-1});
  if (!check.ok()) return check.error();
  const int64_t tokens = o.swa_lengths.dimensions()[0];
  check.buffer(o.extra_lengths, "extra_lengths", ffi::DataType::S32, "(tokens,)", {tokens});
  check.require(o.swa_topk >= 0, "swa_topk", "not be negative", std::to_string(o.swa_topk));
  check.require(o.extra_topk >= 0, "extra_topk", "not be negative", std::to_string(o.extra_topk));
  check.require(o.granularity > 0, "granularity", "be positive", std::to_string(o.granularity));
  check.require(o.overhead >= 0, "overhead", "not be negative", std::to_string(o.overhead));
  check.require(o.cut_cost >= 0, "cut_cost", "not be negative", std::to_string(o.cut_cost));
  Plan plan;
  if (!check.ok() || !bind_plan(check, tokens, o.kv_lengths, o.work_indptr, o.work_info_set, o.reduce_indptr,
                                o.reduce_final_map, o.reduce_partial_map, &plan)) {
    return check.error();
  }
  p->tokens = check.narrow(tokens, "tokens");
  const int64_t topk = static_cast<int64_t>(o.swa_topk) + o.extra_topk;
  check.narrow(tokens * topk, "tokens * topk");
  const int64_t blocks = (topk + o.granularity - 1) / o.granularity;
  check.narrow(tokens * (blocks + o.overhead) + o.overhead, "the cost of all items in blocks");
  check.require(o.active_workers >= 1 && o.active_workers <= plan.workers, "active_workers",
                "be from 1 to workers = " + std::to_string(plan.workers), std::to_string(o.active_workers));
  check.require(
      plan.max_items >= tokens + o.active_workers - 1, "work_info_set",
      "have at least tokens + active_workers - 1 = " + std::to_string(tokens + o.active_workers - 1) + " rows",
      std::to_string(plan.max_items));
  const int64_t partials = plan_max_partials(tokens, o.active_workers);
  check.require(plan.max_partials >= partials, "reduce_partial_map",
                "have at least " + std::to_string(partials) + " entries", std::to_string(plan.max_partials));
  p->lengths[0] = static_cast<const int32_t*>(o.swa_lengths.untyped_data());
  p->lengths[1] = static_cast<const int32_t*>(o.extra_lengths.untyped_data());
  p->topk[0] = o.swa_topk;
  p->topk[1] = o.extra_topk;
  p->workers = plan.workers;
  p->active_workers = o.active_workers;
  p->granularity = o.granularity;
  p->overhead = o.overhead;
  p->cut_cost = o.cut_cost;
  p->max_items = plan.max_items;
  p->max_partials = plan.max_partials;
  p->kv_lengths = data_of<int32_t>(o.kv_lengths);
  p->work_indptr = data_of<int32_t>(o.work_indptr);
  p->work_info_set = data_of<int32_t>(o.work_info_set);
  p->reduce_indptr = data_of<int32_t>(o.reduce_indptr);
  p->reduce_final_map = data_of<int32_t>(o.reduce_final_map);
  p->reduce_partial_map = data_of<int32_t>(o.reduce_partial_map);
  return check.error();
}

// dsv4_append: a cache, latents, slots -> the cache (the same buffer when XLA aliases it, as native.py asks).
inline ffi::Error bind_append(Buffer cache, Buffer latents, Buffer slots, Buffer updated, int32_t block_size,
                              int32_t layout, AppendParams* p) {
  Checker check("append");
  if (!bind_cache(check, cache, "cache", block_size, layout, &p->cache)) return check.error();
  check.shape(latents, "latents", "(count, 512)", {-1, kLatentDim});
  if (!check.ok() || !bind_float_dtype(check, latents, "latents", &p->dtype)) return check.error();
  p->count = latents.dimensions()[0];
  check.buffer(slots, "slots", ffi::DataType::S32, "(count,)", {p->count});
  check.require(updated.size_bytes() == cache.size_bytes(), "the result", "have the cache's size",
                std::to_string(updated.size_bytes()));
  p->latents = latents.untyped_data();
  p->slots = static_cast<const int32_t*>(slots.untyped_data());
  p->data_out = data_of<uint8_t>(updated);
  return check.error();
}

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_BIND_H_
