// XLA FFI handlers on ROCm for layouts aiter_bf16, aiter_fp8 and aiter_fp8_fnuz: bind, check, enqueue on XLA's stream.
// jax_dsv4/_implementations/aiter.py states the same operands. Modules are loaded in the initialize stage, which never
// runs under capture; execute only enqueues, so the handlers may be part of a command buffer.
#include <cstring>
#include <string>

#include "common/bind.h"
#include "rocm/handlers.h"
#include "rocm/launch.h"

namespace jax_dsv4::rocm {
namespace {

// The kernel that the program was made for: its workspaces have that kernel's sizes. Another AITER than then may be
// installed.
const AiterKernel* kernel_for(int device, const Buffer& pool, Layout layout, int32_t kernel_heads,
                              std::string* reason) {
  const std::string architecture = architecture_of(device, reason);
  if (architecture.empty()) return nullptr;
  const AiterKernel* kernel =
      choose_kernel(architecture, layout, kernel_heads, static_cast<int64_t>(pool.size_bytes()), reason);
  if (!kernel || heads_at_a_time(*kernel, kernel_heads) == kernel_heads) return kernel;
  *reason = "the program was made for AITER's kernel of " + std::to_string(kernel_heads) +
            " heads, which the AITER installed here has not";
  return nullptr;
}

// ---- dsv4_aiter_plan: the operands of dsv4_plan.

ffi::Error initialize_plan(int32_t device, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return status("plan_decode", load_modules(device, nullptr));
}

ffi::Error plan(const PlanOperands& o, hip::Stream stream, int32_t device) {
  PlanParams p;
  const ffi::Error error = fill_plan_params(o, &p);
  if (!error.success()) return error;
  Checker check("plan_decode");
  check.require(o.cut_cost == 0, "cut_cost", "be 0: tokens are cut where AITER cuts them", std::to_string(o.cut_cost));
  check.require(o.segment == 0, "segment", "be 0: tokens are cut where AITER cuts them", std::to_string(o.segment));
  return check.ok() ? status("plan_decode", enqueue_plan(device, stream, p)) : check.error();
}

// ---- dsv4_aiter_metadata_plan: the same plan from AITER's builder, with workspaces for what it reads.

ffi::Error initialize_metadata(hip::Stream stream, int32_t device, ffi::RemainingArgs, ffi::RemainingRets,
                               ffi::Dictionary) {
  const std::string error = load_modules(device, nullptr);
  return status("plan_decode", error.empty() ? load_metadata(device, stream) : error);
}

struct MetadataOperands {
  Buffer lengths;
  PlanArrays plan;
  Buffer qo_indptr, kv_indptr, last_page_lens, work_pointers;
  int32_t topk, units, granularity, heads;
};

template <typename Binding>
auto metadata_binding(Binding&& context) {
  return with_attributes<int32_t>(with_results<10>(with_operands<1>(std::move(context))), "topk", "units",
                                  "granularity", "heads");
}

ffi::Error metadata(const MetadataOperands& o, hip::Stream stream, int32_t device) {
  constexpr ffi::DataType kInt = ffi::DataType::S32;
  MetadataParams p{};
  // AITER's builder counts an item as 16 blocks; it needs no more room than ours.
  const ffi::Error error = fill_plan_params(
      {o.lengths, o.lengths, o.plan, o.topk, 0, o.units, o.granularity, /*overhead=*/16, /*cut_cost=*/0, /*segment=*/0},
      &p.plan);
  if (!error.success()) return error;
  const int64_t tokens = p.plan.tokens;
  Checker check("plan_decode");
  check.require((o.granularity & (o.granularity - 1)) == 0, "granularity", "be a power of two",
                std::to_string(o.granularity));
  // For any other number the builder plans several tiles of heads a token, and needs more room.
  check.require(o.heads == 16 || o.heads == 64 || o.heads == 128, "heads", "be 16, 64 or 128", std::to_string(o.heads));
  check.buffer(o.qo_indptr, "qo_indptr", kInt, "(tokens + 1,)", {tokens + 1});
  check.buffer(o.kv_indptr, "kv_indptr", kInt, "(tokens + 1,)", {tokens + 1});
  check.buffer(o.last_page_lens, "last_page_lens", kInt, "(tokens,)", {tokens});
  check.buffer(o.work_pointers, "work_pointers", kInt, "(4,)", {4});
  if (!check.ok()) return check.error();
  p.qo_indptr = data_of<int32_t>(o.qo_indptr);
  p.kv_indptr = data_of<int32_t>(o.kv_indptr);
  p.last_page_lens = data_of<int32_t>(o.last_page_lens);
  return status("plan_decode", enqueue_metadata(device, stream, p, o.heads, data_of<uint64_t>(o.work_pointers)));
}

// ---- dsv4_aiter_decode: one scope.

ffi::Error initialize_decode(int32_t device, ffi::RemainingArgs args, ffi::RemainingRets, ffi::Dictionary attrs) {
  constexpr const char* kOp = "sparse_mla_decode";
  const auto pool = args.get<Buffer>(1);
  const auto kernel_heads = attrs.get<int32_t>("kernel_heads");
  const auto layout = attrs.get<int32_t>("layout");
  if (!pool.has_value() || !kernel_heads.has_value() || !layout.has_value())
    return status(kOp, "the cache, layout or kernel_heads is missing");
  std::string reason;
  const AiterKernel* kernel = kernel_for(device, *pool, static_cast<Layout>(*layout), *kernel_heads, &reason);
  if (!kernel) return ffi::Error(ffi::ErrorCode::kUnimplemented, std::string(kOp) + ": " + reason);
  return status(kOp, load_modules(device, kernel));
}

// The pool: uint8 (aiter_fp8, aiter_fp8_fnuz) or bfloat16 (aiter_bf16) [1 + num_blocks, block_size, 576].
bool fill_pool(Checker& check, const Buffer& pool, int32_t layout, int32_t block_size, float cache_scale,
               int64_t* num_slots) {
  const bool bf16 = layout == static_cast<int32_t>(Layout::kAiterBf16);
  check.require(bf16 || is_fp8(static_cast<Layout>(layout)), "cache.layout",
                "be aiter_bf16, aiter_fp8 or aiter_fp8_fnuz", std::to_string(layout));
  check.require(block_size > 0, "cache.block_size", "be positive", std::to_string(block_size));
  check.require(cache_scale >= 0x1p-100f && cache_scale <= 0x1p100f, "cache.scale",
                "be positive, from 2**-100 to 2**100", std::to_string(cache_scale));
  check.shape(pool, "cache", "(1 + num_blocks, block_size, 576)", {-1, block_size, kRowNumbers});
  check.dtype(pool, "cache", bf16 ? ffi::DataType::BF16 : ffi::DataType::U8);
  if (!check.ok()) return false;
  const int64_t blocks = pool.dimensions()[0];
  check.require(blocks >= kZeroBlocks, "cache", "begin with a block of zeros", std::to_string(blocks) + " blocks");
  check.to_int32(blocks * block_size, "(1 + num_blocks) * block_size");
  *num_slots = (blocks - kZeroBlocks) * block_size;
  return check.ok();
}

struct ScopeDecodeOperands {
  Buffer q;
  ScopeOperands scope;
  PlanArrays plan;
  Buffer out, lse, q_packed, rows, state, own_indptr, own_items, qo_indptr, work_pointers, scales, amax;
  Buffer partial_out, partial_lse;
  float scale, cache_scale;
  int32_t block_size, workers, kernel_heads, layout;
};

template <typename Binding>
auto scope_decode_binding(Binding&& context) {
  return with_attributes<int32_t>(
      with_attributes<float>(with_results<13>(with_operands<10>(std::move(context))), "scale", "cache_scale"),
      "block_size", "workers", "kernel_heads", "layout");
}

// The operands that say what to compute.
bool fill_call(Checker& check, const ScopeDecodeOperands& o, DecodeScopeParams* p) {
  constexpr ffi::DataType kInt = ffi::DataType::S32;
  if (!fill_q(check, o.q, &p->q, &p->q_dtype)) return false;
  const int64_t tokens = o.q.dimensions()[0];
  if (!fill_pool(check, o.scope.cache, o.layout, o.block_size, o.cache_scale, &p->num_slots)) return false;
  check.buffer(o.scope.indices, "indices", kInt, "(tokens, topk)", {tokens, -1});
  check.buffer(o.scope.lengths, "lengths", kInt, "(tokens,)", {tokens});
  if (!check.ok() || !fill_plan(check, tokens, o.plan, &p->plan)) return false;
  check.require(o.workers >= 1 && o.workers <= p->plan.workers, "workers",
                "be from 1 to " + std::to_string(p->plan.workers), std::to_string(o.workers));
  check.require(o.kernel_heads >= 1, "kernel_heads", "be positive", std::to_string(o.kernel_heads));
  if (!check.ok()) return false;
  p->pool = data_of<uint8_t>(o.scope.cache);
  p->layout = static_cast<Layout>(o.layout);
  p->indices = data_of<int32_t>(o.scope.indices);
  p->lengths = data_of<int32_t>(o.scope.lengths);
  p->block_size = o.block_size;
  p->heads = static_cast<int32_t>(o.q.dimensions()[1]);
  p->workers = o.workers;
  p->scale = o.scale;
  p->cache_scale = o.cache_scale;
  return true;
}

// The results and workspaces, whose sizes are the kernel's.
bool fill_results(Checker& check, const ScopeDecodeOperands& o, const AiterKernel& kernel, DecodeScopeParams* p) {
  constexpr ffi::DataType kInt = ffi::DataType::S32, kFloat = ffi::DataType::F32;
  const int64_t tokens = o.q.dimensions()[0], heads = p->heads;
  const int64_t topk = o.scope.indices.dimensions()[1], stride = topk > 1 ? topk : 1;
  const int64_t passes = (heads + o.kernel_heads - 1) / o.kernel_heads, padded = passes * o.kernel_heads;
  check.to_int32(tokens * stride, "tokens * topk");
  check.to_int32(tokens * padded, "tokens * padded heads");
  check.shape(o.out, "out", "(tokens, heads, 512)", {tokens, heads, kLatentDim});
  if (!check.ok() || !fill_dtype(check, o.out, "out", &p->out_dtype)) return false;
  check.buffer(o.lse, "lse", kFloat, "(tokens, heads)", {tokens, heads});
  check.buffer(o.q_packed, "q_packed", o.scope.cache.element_type(), "(tokens, padded heads, 576)",
               {tokens, padded, kRowNumbers});
  check.buffer(o.rows, "rows", kInt, "(tokens, max(topk, 1))", {tokens, stride});
  check.buffer(o.state, "state", kInt, "(tokens, 3)", {tokens, 3});
  check.buffer(o.own_indptr, "own_indptr", kInt, "(folds * workers + 1,)", {passes * p->workers + 1});
  check.buffer(o.own_items, "own_items", kInt, "(folds * max_items, 8)", {passes * p->plan.max_items, 8});
  check.buffer(o.qo_indptr, "qo_indptr", kInt, "(tokens * folds + 1,)", {tokens * passes + 1});
  check.buffer(o.work_pointers, "work_pointers", kInt, "(4,)", {4});
  check.buffer(o.scales, "scales", kFloat, "(2,)", {2});
  check.buffer(o.amax, "amax", kFloat, "(64,)", {kAmaxBlocks});
  check.buffer(o.partial_out, "partial_out", kFloat, "(max_partials + tokens + 1, padded heads, 512)",
               {-1, padded, kLatentDim});
  if (!check.ok()) return false;
  const int64_t partials = o.partial_out.dimensions()[0];
  check.buffer(o.partial_lse, "partial_lse", kFloat, "(max_partials + tokens + 1, padded heads)", {partials, padded});
  check.require(partials > tokens + 1, "partial_out", "have more than tokens + 1 rows", std::to_string(partials));
  check.to_int32(partials * padded, "partial rows * heads");
  if (!check.ok()) return false;
  // The plan's arrays have room for any platform's plan, the workspace for this one's.
  const int32_t planned = static_cast<int32_t>(partials - tokens - 1);
  p->plan.max_partials = planned < p->plan.max_partials ? planned : p->plan.max_partials;
  p->out = data_of<void>(o.out);
  p->lse = data_of<float>(o.lse);
  p->q_packed = data_of<uint8_t>(o.q_packed);
  p->rows = data_of<int32_t>(o.rows);
  p->state = data_of<TokenState>(o.state);
  p->work_indptr = data_of<int32_t>(o.own_indptr);
  p->work_info_set = data_of<WorkInfo>(o.own_items);
  p->qo_indptr = data_of<int32_t>(o.qo_indptr);
  p->work_pointers = data_of<uint64_t>(o.work_pointers);
  p->scales = data_of<float>(o.scales);
  p->amax = data_of<float>(o.amax);
  p->partial_out = data_of<float>(o.partial_out);
  p->partial_lse = data_of<float>(o.partial_lse);
  p->tokens = check.to_int32(tokens, "tokens");
  p->topk = static_cast<int32_t>(topk);
  p->row_stride = static_cast<int32_t>(stride);
  p->kernel_heads = o.kernel_heads;
  p->head_passes = static_cast<int32_t>(passes);
  p->direct = kernel.reports_lse && padded == heads && p->out_dtype == Dtype::kBf16;
  return check.ok();
}

ffi::Error decode(const ScopeDecodeOperands& o, hip::Stream stream, int32_t device) {
  Checker check("sparse_mla_decode");
  DecodeScopeParams p{};
  if (!fill_call(check, o, &p)) return check.error();
  std::string reason;
  const AiterKernel* kernel = kernel_for(device, o.scope.cache, p.layout, o.kernel_heads, &reason);
  if (!kernel) return ffi::Error(ffi::ErrorCode::kUnimplemented, "sparse_mla_decode: " + reason);
  if (!fill_results(check, o, *kernel, &p)) return check.error();
  return status("sparse_mla_decode", enqueue_decode(device, stream, *kernel, p));
}

// ---- dsv4_aiter_append.

ffi::Error initialize_append(int32_t device, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return status("append", load_modules(device, nullptr));
}

struct PoolAppendOperands {
  Buffer pool, latents, slots, updated;
  int32_t block_size, layout;
  float cache_scale;
};

template <typename Binding>
auto pool_append_binding(Binding&& context) {
  return with_attributes<float>(
      with_attributes<int32_t>(with_results<1>(with_operands<3>(std::move(context))), "block_size", "layout"),
      "cache_scale");
}

ffi::Error append_rows(const PoolAppendOperands& o, hip::Stream stream, int32_t device) {
  Checker check("append");
  PoolAppendParams p{};
  if (!fill_pool(check, o.pool, o.layout, o.block_size, o.cache_scale, &p.num_slots) ||
      !fill_rows(check, o.latents, o.slots, o.pool, o.updated, &p)) {
    return check.error();
  }
  p.pool = data_of<uint8_t>(o.updated);
  p.block_size = o.block_size;
  p.cache_scale = o.cache_scale;
  p.layout = static_cast<Layout>(o.layout);
  const std::string error = copy_unless_aliased(o.pool, p.pool, stream);
  return status("append", error.empty() ? enqueue_append(device, stream, p) : error);
}

// An initializer takes the operands as they are.
template <typename Binding>
auto initializing(Binding&& context) {
  return std::move(context).template Ctx<ffi::DeviceOrdinal>().RemainingArgs().RemainingRets().Attrs();
}

}  // namespace

JAX_DSV4_TARGET(dsv4_aiter_plan_initialize, initialize_plan, initializing(ffi::Ffi::BindInitialize()), {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_plan, taking_struct(plan), plan_binding(on_stream()), {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_metadata_plan_initialize, initialize_metadata,
                initializing(ffi::Ffi::BindInitialize().Ctx<Stream>()), {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_metadata_plan, taking_struct(metadata), metadata_binding(on_stream()), {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_decode_initialize, initialize_decode, initializing(ffi::Ffi::BindInitialize()),
                {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_decode, taking_struct(decode), scope_decode_binding(on_stream()), {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_append_initialize, initialize_append, initializing(ffi::Ffi::BindInitialize()),
                {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_append, taking_struct(append_rows), pool_append_binding(on_stream()), {kCapturable})

// AITER's hsa directory ("" for none), the directory of our own code objects, and the one that has AITER's plan builder
// for an architecture in aiter-<architecture>. To be called first, once.
JAX_DSV4_EXPORT void dsv4_rocm_directories(const char* aiter, const char* own, const char* builders) {
  set_builders_directory(builders);
  set_aiter_directory(aiter);
  set_kernel_directory(own);
}

// What a call with `heads` heads on a pool of `pool_bytes` in a layout runs on device 0; or, without asking HIP, on a
// device of an architecture that is named. ABI of jax_dsv4/_implementations/aiter.py.
struct dsv4_rocm_choice {
  int32_t kernel_heads, tile, reports_lse, units, kernarg_bytes;
  char architecture[32];
  char text[2048];  // the kernel's file, or why there is none
};
JAX_DSV4_EXPORT int dsv4_rocm_choose(const char* named, int32_t layout, int32_t heads, int64_t pool_bytes,
                                     dsv4_rocm_choice* choice) {
  std::memset(choice, 0, sizeof *choice);
  std::string reason;
  const std::string architecture = *named ? named : architecture_of(0, &reason);
  const AiterKernel* kernel =
      architecture.empty() ? nullptr
                           : choose_kernel(architecture, static_cast<Layout>(layout), heads, pool_bytes, &reason);
  std::strncpy(choice->architecture, architecture.c_str(), sizeof choice->architecture - 1);
  if (kernel) reason = kernel->file + (kernel->mend ? " (one wait mended)" : "");
  std::strncpy(choice->text, reason.c_str(), sizeof choice->text - 1);
  if (!kernel) return 0;
  choice->kernel_heads = heads_at_a_time(*kernel, heads);
  choice->tile = kernel->tile;
  choice->reports_lse = kernel->reports_lse;
  choice->kernarg_bytes = kernel->kernarg_bytes;
  if (*named) return choice->units = architecture == "gfx942" ? kUnitsOfGfx942 : kUnitsOfGfx950;
  return hip::api(&reason)->DeviceGetAttribute(&choice->units, hip::kAttributeMultiprocessorCount, 0) == hip::kSuccess;
}

// The HIP library and its version, or why there is none, as a string of at most `bytes`.
JAX_DSV4_EXPORT void dsv4_rocm_hip(char* text, size_t bytes) {
  std::strncpy(text, hip::describe().c_str(), bytes - 1)[bytes - 1] = '\0';
}

// [decode handler executions, those recorded by a capture]
JAX_DSV4_EXPORT void dsv4_rocm_calls(int64_t* calls) { decode_calls(calls); }

}  // namespace jax_dsv4::rocm
