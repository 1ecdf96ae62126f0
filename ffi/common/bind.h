// The targets that platforms share. Of each: the struct that its handler is called with, its binding, and what checks
// the struct and fills in the launcher's. The order is that of jax_dsv4/_implementations/native.py.
#ifndef JAX_DSV4_COMMON_BIND_H_
#define JAX_DSV4_COMMON_BIND_H_

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "common/check.h"
#include "common/params.h"
#include "common/plan.h"

namespace jax_dsv4 {

using Buffer = ffi::AnyBuffer;

template <typename T>
T* data_of(const Buffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// --- Bindings. A target's struct names its operands, its results, then its attributes. A binding binds as many of each
// in the same order; one that does not cannot initialise the struct.

template <int kCount, typename Binding>
auto with_operands(Binding&& binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Arg<Buffer>();
  } else {
    return with_operands<kCount - 1>(std::move(binding).template Arg<Buffer>());
  }
}

template <int kCount, typename Binding>
auto with_results(Binding&& binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Ret<Buffer>();
  } else {
    return with_results<kCount - 1>(std::move(binding).template Ret<Buffer>());
  }
}

template <typename T, typename Binding, typename... Names>
auto with_attributes(Binding&& binding, const char* name, Names... names) {
  if constexpr (sizeof...(names) == 0) {
    return std::move(binding).template Attr<T>(name);
  } else {
    return with_attributes<T>(std::move(binding).template Attr<T>(name), names...);
  }
}

// What XLA is to call for a handler that takes a target's struct, then what its platform has bound before.
template <typename Result, typename Operands, typename... Context>
auto taking_struct(Result (*handler)(const Operands&, Context...)) {
  return [handler](Context... context, auto... values) {
    const auto plain = [](auto value) {
      if constexpr (std::is_same_v<decltype(value), ffi::Result<Buffer>>) {
        return *value;
      } else {
        return value;
      }
    };
    return handler(Operands{plain(values)...}, context...);
  };
}

#define JAX_DSV4_EXPORT extern "C" __attribute__((visibility("default")))

// Defines a target, which Python finds by its name through ctypes. After the binding: its traits, if any.
#define JAX_DSV4_TARGET(name, function, ...)                      \
  JAX_DSV4_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame* frame) { \
    XLA_FFI_DEFINE_HANDLER(handler, function, __VA_ARGS__);       \
    return handler(frame);                                        \
  }

// --- What several targets have.

struct ScopeOperands {
  Buffer cache, indices, lengths;
};

struct PlanArrays {
  Buffer kv_lengths, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map;
};

inline bool fill_dtype(Checker& check, const Buffer& buffer, const Text& argument, Dtype* dtype) {
  const bool f32 = buffer.element_type() == ffi::DataType::F32;
  *dtype = f32 ? Dtype::kFloat32 : Dtype::kBf16;
  return f32 || check.dtype(buffer, argument, ffi::DataType::BF16);
}

inline bool fill_q(Checker& check, const Buffer& q, const void** data, Dtype* dtype) {
  check.shape(q, "q", "(tokens, heads, 512)", {-1, -1, kLatentDim});
  if (!check.ok() || !fill_dtype(check, q, "q", dtype)) return false;
  *data = q.untyped_data();
  const int64_t heads = q.dimensions()[1];
  return check.require(heads >= 1 && heads <= kMaxHeads, "q", Text("have 1 to ") + kMaxHeads + " heads", heads);
}

// A cache buffer is [num_blocks, ...]: uint8 [num_blocks, block_stride_bytes] where there are scales, [num_blocks,
// block_size, 512] else. `inline_scales`: 1 where each slot's scales directly follow its numbers, else 0.
inline bool fill_cache(Checker& check, const Buffer& buffer, const Text& argument, int32_t block_size, int32_t layout,
                       int32_t inline_scales, Cache* cache) {
  cache->layout = static_cast<Layout>(layout);
  const SlotBytes bytes = slot_bytes(cache->layout);
  const int64_t slot = bytes.row + bytes.scales;
  check.require(slot > 0, argument + ".layout", "be one that this platform reads", layout);
  check.require(block_size > 0, argument + ".block_size", "be positive", block_size);
  const bool either = cache->layout == Layout::kMxfp8 || cache->layout == Layout::kNvfp4;
  check.require(inline_scales == 0 || (inline_scales == 1 && either), argument + ".inline",
                either ? "be 0 or 1" : "be 0 in this layout", inline_scales);
  if (!check.ok()) return false;
  if (bytes.scales > 0) {
    check.buffer(buffer, argument, ffi::DataType::U8, "(num_blocks, block_stride_bytes)", {-1, -1});
  } else {
    check.buffer(buffer, argument, cache->layout == Layout::kBf16 ? ffi::DataType::BF16 : ffi::DataType::F32,
                 "(num_blocks, block_size, 512)", {-1, block_size, kLatentDim});
  }
  if (!check.ok()) return false;
  const auto dims = buffer.dimensions();
  cache->data = data_of<const uint8_t>(buffer);
  cache->num_blocks = dims[0];
  cache->block_size = block_size;
  cache->block_stride_bytes = bytes.scales > 0 ? dims[1] : block_size * slot;
  arrange(cache, inline_scales != 0);
  const int64_t stride = cache->block_stride_bytes;
  check.require(stride >= block_size * slot, argument + ".block_stride_bytes",
                Text("be at least block_size * ") + slot + Text(" = ") + block_size * slot, stride);
  return check.require(inline_scales == 0 || stride % slot == 0, argument + ".block_stride_bytes",
                       Text("be a multiple of ") + slot + ", an inline slot", stride);
}

inline bool fill_scope(Checker& check, const Text& name, int64_t tokens, const ScopeOperands& o, int32_t block_size,
                       int32_t layout, int32_t inline_scales, Scope* scope) {
  if (!fill_cache(check, o.cache, name + ".cache", block_size, layout, inline_scales, &scope->cache) ||
      !check.buffer(o.indices, name + ".indices", ffi::DataType::S32, "(tokens, topk)", {tokens, -1}) ||
      !check.buffer(o.lengths, name + ".lengths", ffi::DataType::S32, "(tokens,)", {tokens})) {
    return false;
  }
  scope->indices = data_of<const int32_t>(o.indices);
  scope->lengths = data_of<const int32_t>(o.lengths);
  scope->topk = check.to_int32(o.indices.dimensions()[1], name + ".topk");
  return check.ok();
}

inline bool fill_plan(Checker& check, int64_t tokens, const PlanArrays& o, Plan* plan) {
  constexpr ffi::DataType kInt = ffi::DataType::S32;
  if (!check.buffer(o.kv_lengths, "plan.kv_lengths", kInt, "(tokens,)", {tokens}) ||
      !check.buffer(o.work_indptr, "plan.work_indptr", kInt, "(workers + 1,)", {-1}) ||
      !check.require(o.work_indptr.dimensions()[0] > 1, "plan.work_indptr", "have at least 2 entries",
                     o.work_indptr.dimensions()[0]) ||
      !check.buffer(o.work_info_set, "plan.work_info_set", kInt, "(max_items, 8)", {-1, 8}) ||
      !check.buffer(o.reduce_indptr, "plan.reduce_indptr", kInt, "(tokens + 1,)", {tokens + 1}) ||
      !check.buffer(o.reduce_final_map, "plan.reduce_final_map", kInt, "(tokens, 2)", {tokens, 2}) ||
      !check.buffer(o.reduce_partial_map, "plan.reduce_partial_map", kInt, "(max_partials,)", {-1})) {
    return false;
  }
  plan->kv_lengths = data_of<const int32_t>(o.kv_lengths);
  plan->work_indptr = data_of<const int32_t>(o.work_indptr);
  plan->work_info_set = data_of<const int32_t>(o.work_info_set);
  plan->reduce_indptr = data_of<const int32_t>(o.reduce_indptr);
  plan->reduce_final_map = data_of<const int32_t>(o.reduce_final_map);
  plan->reduce_partial_map = data_of<const int32_t>(o.reduce_partial_map);
  plan->workers = check.to_int32(o.work_indptr.dimensions()[0] - 1, "plan.work_indptr");
  plan->max_items = check.to_int32(o.work_info_set.dimensions()[0], "plan.work_info_set");
  plan->max_partials = check.to_int32(o.reduce_partial_map.dimensions()[0], "plan.reduce_partial_map");
  return check.ok();
}

// Rows to be written to a cache, and the result that has them: AppendParams, or a platform's own.
template <typename Params>
bool fill_rows(Checker& check, const Buffer& latents, const Buffer& slots, const Buffer& cache, const Buffer& updated,
               Params* p) {
  check.shape(latents, "latents", "(count, 512)", {-1, kLatentDim});
  if (!check.ok() || !fill_dtype(check, latents, "latents", &p->dtype)) return false;
  p->count = latents.dimensions()[0];
  p->latents = latents.untyped_data();
  p->slots = data_of<const int32_t>(slots);
  check.buffer(slots, "slots", ffi::DataType::S32, "(count,)", {p->count});
  return check.require(updated.size_bytes() == cache.size_bytes(), "the result", "have the cache's size",
                       updated.size_bytes());
}

// --- dsv4_plan: lengths of two scopes -> a plan. An absent scope has topk 0.

struct PlanOperands {
  Buffer swa_lengths, extra_lengths;
  PlanArrays plan;
  int32_t swa_topk, extra_topk, active_workers, granularity, overhead, cut_cost, segment;
};

template <typename Binding>
auto plan_binding(Binding&& context) {
  return with_attributes<int32_t>(with_results<6>(with_operands<2>(std::move(context))), "swa_topk", "extra_topk",
                                  "active_workers", "granularity", "overhead", "cut_cost", "segment");
}

inline ffi::Error fill_plan_params(const PlanOperands& o, PlanParams* p) {
  Checker check("plan_decode");
  check.buffer(o.swa_lengths, "swa_lengths", ffi::DataType::S32, "(tokens,)", {-1});
  if (!check.ok()) return check.error();
  const int64_t tokens = o.swa_lengths.dimensions()[0];
  check.buffer(o.extra_lengths, "extra_lengths", ffi::DataType::S32, "(tokens,)", {tokens});
  check.require(o.swa_topk >= 0, "swa_topk", "not be negative", o.swa_topk);
  check.require(o.extra_topk >= 0, "extra_topk", "not be negative", o.extra_topk);
  check.require(o.granularity > 0, "granularity", "be positive", o.granularity);
  check.require(o.overhead >= 0, "overhead", "not be negative", o.overhead);
  check.require(o.cut_cost >= 0, "cut_cost", "not be negative", o.cut_cost);
  check.require(o.segment >= 0, "segment", "not be negative", o.segment);
  Plan plan;
  if (!check.ok() || !fill_plan(check, tokens, o.plan, &plan)) return check.error();
  p->tokens = check.to_int32(tokens, "tokens");
  const int64_t topk = static_cast<int64_t>(o.swa_topk) + o.extra_topk;
  check.to_int32(tokens * topk, "tokens * topk");
  const int64_t blocks = (topk + o.granularity - 1) / o.granularity;
  const int64_t segments = o.segment > 0 ? (blocks + o.segment - 1) / o.segment : 1;  // of a token, at most
  check.to_int32(tokens * (blocks + segments * o.overhead) + o.overhead, "the cost of all items in blocks");
  check.require(o.active_workers >= 1 && o.active_workers <= plan.workers, "active_workers",
                Text("be from 1 to workers = ") + plan.workers, o.active_workers);
  const int64_t items = plan_max_items(tokens, o.active_workers, segments);
  check.require(plan.max_items >= items, "work_info_set",
                segments > 1 ? Text("have at least tokens * segments = ") + items + " rows"
                             : Text("have at least tokens + active_workers - 1 = ") + items + " rows",
                plan.max_items);
  const int64_t partials = plan_max_partials(tokens, o.active_workers, segments);
  check.require(plan.max_partials >= partials, "reduce_partial_map", Text("have at least ") + partials + " entries",
                plan.max_partials);
  p->lengths[0] = data_of<const int32_t>(o.swa_lengths);
  p->lengths[1] = data_of<const int32_t>(o.extra_lengths);
  p->topk[0] = o.swa_topk;
  p->topk[1] = o.extra_topk;
  p->workers = plan.workers;
  p->active_workers = o.active_workers;
  p->granularity = o.granularity;
  p->overhead = o.overhead;
  p->cut_cost = o.cut_cost;
  p->segment = o.segment;
  p->max_items = plan.max_items;
  p->max_partials = plan.max_partials;
  p->kv_lengths = data_of<int32_t>(o.plan.kv_lengths);
  p->work_indptr = data_of<int32_t>(o.plan.work_indptr);
  p->work_info_set = data_of<int32_t>(o.plan.work_info_set);
  p->reduce_indptr = data_of<int32_t>(o.plan.reduce_indptr);
  p->reduce_final_map = data_of<int32_t>(o.plan.reduce_final_map);
  p->reduce_partial_map = data_of<int32_t>(o.plan.reduce_partial_map);
  return check.error();
}

// --- dsv4_decode: q, sink, two scopes, a plan -> out, lse and workspaces. An absent extra scope has topk 0.

struct DecodeOperands {
  Buffer q, sink;
  ScopeOperands swa, extra;
  PlanArrays plan;
  Buffer out, lse, partial_out, partial_lse, counters;
  float scale;
  bool has_sink, batch_invariant;
  int32_t swa_block_size, swa_layout, swa_inline, extra_block_size, extra_layout, extra_inline;
};

template <typename Binding>
auto decode_binding(Binding&& context) {
  return with_attributes<int32_t>(with_results<5>(with_operands<14>(std::move(context)))
                                      .template Attr<float>("scale")
                                      .template Attr<bool>("has_sink")
                                      .template Attr<bool>("batch_invariant"),
                                  "swa_block_size", "swa_layout", "swa_inline", "extra_block_size", "extra_layout",
                                  "extra_inline");
}

// `partial_numbers`: floats that a platform keeps of a partial besides its output. One: its lse.
inline ffi::Error fill_decode_params(const DecodeOperands& o, int64_t counters_per_token, int64_t partial_numbers,
                                     DecodeParams* p) {
  Checker check("sparse_mla_decode");
  if (!fill_q(check, o.q, &p->q, &p->q_dtype)) return check.error();
  const int64_t tokens = o.q.dimensions()[0], heads = o.q.dimensions()[1];
  // Without a sink, nothing: zeros would be filled in by a kernel of their own in every call.
  check.buffer(o.sink, "attn_sink", ffi::DataType::F32, o.has_sink ? "(heads,)" : "(0,)", {o.has_sink ? heads : 0});
  if (!fill_scope(check, "swa", tokens, o.swa, o.swa_block_size, o.swa_layout, o.swa_inline, &p->scopes[0]) ||
      !fill_scope(check, "extra", tokens, o.extra, o.extra_block_size, o.extra_layout, o.extra_inline, &p->scopes[1]) ||
      !fill_plan(check, tokens, o.plan, &p->plan)) {
    return check.error();
  }
  check.to_int32(tokens * (static_cast<int64_t>(p->scopes[0].topk) + p->scopes[1].topk), "tokens * topk");
  // A scope that will be merged with another asks for fp32: rounding both to bf16 first would cost accuracy.
  if (!fill_dtype(check, o.out, "out", &p->out_dtype)) return check.error();
  check.shape(o.out, "out", "(tokens, heads, 512)", {tokens, heads, kLatentDim});
  check.buffer(o.lse, "lse", ffi::DataType::F32, "(tokens, heads)", {tokens, heads});
  check.buffer(o.partial_out, "partial_out", ffi::DataType::F32, "(max_partials, heads, 512)", {-1, heads, kLatentDim});
  if (!check.ok()) return check.error();
  const int64_t partials = o.partial_out.dimensions()[0];
  check.buffer(o.partial_lse, "partial_lse", ffi::DataType::F32,
               partial_numbers == 1 ? "(max_partials, heads)" : "(max_partials, heads * numbers)",
               {partials, heads * partial_numbers});
  check.buffer(o.counters, "counters", ffi::DataType::S32, "(tokens, counters)", {tokens, counters_per_token});
  p->sink = o.has_sink ? data_of<const float>(o.sink) : nullptr;
  // The plan's arrays have room for any platform's plan, the workspace for this platform's.
  p->plan.max_partials = static_cast<int32_t>(partials < p->plan.max_partials ? partials : p->plan.max_partials);
  p->out = data_of<void>(o.out);
  p->lse = data_of<float>(o.lse);
  p->partial_out = data_of<float>(o.partial_out);
  p->partial_lse = data_of<float>(o.partial_lse);
  p->counters = data_of<int32_t>(o.counters);
  p->tokens = check.to_int32(tokens, "tokens");
  p->heads = static_cast<int32_t>(heads);
  p->scale = o.scale;
  p->batch_invariant = o.batch_invariant;
  return check.error();
}

// --- dsv4_append: a cache, latents, slots -> the cache (the same buffer when XLA aliases it, as native.py asks).

struct AppendOperands {
  Buffer cache, latents, slots, updated;
  int32_t block_size, layout, inline_scales;
};

template <typename Binding>
auto append_binding(Binding&& context) {
  return with_attributes<int32_t>(with_results<1>(with_operands<3>(std::move(context))), "block_size", "layout",
                                  "inline");
}

inline ffi::Error fill_append_params(const AppendOperands& o, AppendParams* p) {
  Checker check("append");
  if (fill_cache(check, o.cache, "cache", o.block_size, o.layout, o.inline_scales, &p->cache)) {
    fill_rows(check, o.latents, o.slots, o.cache, o.updated, p);
  }
  p->data_out = data_of<uint8_t>(o.updated);
  return check.error();
}

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_BIND_H_
