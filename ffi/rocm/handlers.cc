// XLA FFI handlers on ROCm for layout aiter_fp8: bind, check, enqueue on XLA's stream.
// jax_dsv4/implementations/aiter.py states the same operands. Modules are loaded in the initialize stage, which never
// runs under capture; execute only enqueues, so the handlers may be part of a command buffer.
#include <atomic>
#include <cstring>
#include <string>

#include "common/bind.h"
#include "rocm/launch.h"

#define JAX_DSV4_EXPORT __attribute__((visibility("default")))

namespace jax_dsv4::rocm {
namespace {

using Out = ffi::Result<Buffer>;

// Executions of the decode handler, and how many of them a stream capture recorded. XLA replays what it captured
// without calling the handler, so the two tell whether command buffers are in use.
std::atomic<int64_t> g_calls{0}, g_captured{0};

ffi::Error status(const char* op, const std::string& error) {
  return error.empty() ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInternal, std::string(op) + ": " + error);
}

// The kernel that the program was made for: its workspaces have that kernel's sizes. Another AITER than then may be
// installed.
const AiterKernel* kernel_for(int device, int32_t kernel_heads, int64_t pool_bytes, std::string* reason) {
  const std::string architecture = architecture_of(device, reason);
  if (architecture.empty()) return nullptr;
  const AiterKernel* kernel = choose_kernel(architecture, kernel_heads, pool_bytes, reason);
  if (!kernel || kernel->heads == kernel_heads) return kernel;
  *reason = "the program was made for AITER's kernel of " + std::to_string(kernel_heads) +
            " heads, which the AITER installed here has not";
  return nullptr;
}

// ---- dsv4_aiter_plan: the operands of dsv4_plan.

ffi::Error initialize_plan(int32_t device, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return status("plan_decode", load_modules(device, nullptr));
}

ffi::Error plan(hip::Stream stream, int32_t device, Buffer swa_lengths, Buffer extra_lengths, Out kv_lengths,
                Out work_indptr, Out work_info_set, Out reduce_indptr, Out reduce_final_map, Out reduce_partial_map,
                int32_t swa_topk, int32_t extra_topk, int32_t active_workers, int32_t granularity, int32_t overhead,
                int32_t cut_cost) {
  PlanParams p;
  const ffi::Error error = bind_plan_params(
      {swa_lengths, extra_lengths, *kv_lengths, *work_indptr, *work_info_set, *reduce_indptr, *reduce_final_map,
       *reduce_partial_map, swa_topk, extra_topk, active_workers, granularity, overhead, cut_cost},
      &p);
  if (!error.success()) return error;
  Checker check("plan_decode");
  check.require(cut_cost == 0, "cut_cost", "be 0: tokens are cut where AITER cuts them", std::to_string(cut_cost));
  return check.ok() ? status("plan_decode", enqueue_plan(device, stream, p)) : check.error();
}

// ---- dsv4_aiter_metadata_plan: the same plan from AITER's builder, with workspaces for what it reads.

ffi::Error initialize_metadata(hip::Stream stream, int32_t device, ffi::RemainingArgs, ffi::RemainingRets,
                               ffi::Dictionary) {
  const std::string error = load_modules(device, nullptr);
  return status("plan_decode", error.empty() ? load_metadata(device, stream) : error);
}

ffi::Error metadata(hip::Stream stream, int32_t device, Buffer lengths, Out kv_lengths, Out work_indptr,
                    Out work_info_set, Out reduce_indptr, Out reduce_final_map, Out reduce_partial_map, Out qo_indptr,
                    Out kv_indptr, Out last_page_lens, Out work_pointers, int32_t topk, int32_t units,
                    int32_t granularity, int32_t heads) {
  constexpr ffi::DataType kInt = ffi::DataType::S32;
  MetadataParams p{};
  // AITER's builder counts an item as 16 blocks; it needs no more room than ours.
  ffi::Error error = bind_plan_params({lengths, lengths, *kv_lengths, *work_indptr, *work_info_set, *reduce_indptr,
                                       *reduce_final_map, *reduce_partial_map, topk, 0, units, granularity, 16, 0},
                                      &p.plan);
  if (!error.success()) return error;
  const int64_t tokens = p.plan.tokens;
  Checker check("plan_decode");
  check.require((granularity & (granularity - 1)) == 0, "granularity", "be a power of two",
                std::to_string(granularity));
  // For any other number the builder plans several tiles of heads a token, and needs more room.
  check.require(heads == 16 || heads == 64 || heads == 128, "heads", "be 16, 64 or 128", std::to_string(heads));
  check.buffer(*qo_indptr, "qo_indptr", kInt, "(tokens + 1,)", {tokens + 1});
  check.buffer(*kv_indptr, "kv_indptr", kInt, "(tokens + 1,)", {tokens + 1});
  check.buffer(*last_page_lens, "last_page_lens", kInt, "(tokens,)", {tokens});
  check.buffer(*work_pointers, "work_pointers", kInt, "(4,)", {4});
  if (!check.ok()) return check.error();
  p.qo_indptr = data_of<int32_t>(*qo_indptr);
  p.kv_indptr = data_of<int32_t>(*kv_indptr);
  p.last_page_lens = data_of<int32_t>(*last_page_lens);
  return status("plan_decode", enqueue_metadata(device, stream, p, heads, data_of<uint64_t>(*work_pointers)));
}

// ---- dsv4_aiter_decode: one scope.

ffi::Error initialize_decode(int32_t device, ffi::RemainingArgs args, ffi::RemainingRets, ffi::Dictionary attrs) {
  constexpr const char* kOp = "sparse_mla_decode";
  const auto pool = args.get<Buffer>(1);
  const auto kernel_heads = attrs.get<int32_t>("kernel_heads");
  if (!pool.has_value() || !kernel_heads.has_value()) return status(kOp, "the cache or kernel_heads is missing");
  std::string reason;
  const AiterKernel* kernel = kernel_for(device, *kernel_heads, static_cast<int64_t>(pool->size_bytes()), &reason);
  if (!kernel) return ffi::Error(ffi::ErrorCode::kUnimplemented, std::string(kOp) + ": " + reason);
  return status(kOp, load_modules(device, kernel));
}

// The pool: uint8 [1 + num_blocks, block_size, 576].
bool bind_pool(Checker& check, Buffer pool, int32_t block_size, float cache_scale, int64_t* num_slots) {
  check.require(block_size > 0, "cache.block_size", "be positive", std::to_string(block_size));
  check.require(cache_scale >= 0x1p-100f && cache_scale <= 0x1p100f, "cache.scale",
                "be positive, from 2**-100 to 2**100", std::to_string(cache_scale));
  check.buffer(pool, "cache", ffi::DataType::U8, "(1 + num_blocks, block_size, 576)", {-1, block_size, kRowBytes});
  if (!check.ok()) return false;
  const int64_t blocks = pool.dimensions()[0];
  check.require(blocks >= kZeroBlocks, "cache", "begin with a block of zeros", std::to_string(blocks) + " blocks");
  check.narrow(blocks * block_size, "(1 + num_blocks) * block_size");
  *num_slots = (blocks - kZeroBlocks) * block_size;
  return check.ok();
}

ffi::Error decode(hip::Stream stream, int32_t device, Buffer q, Buffer pool, Buffer indices, Buffer lengths,
                  Buffer kv_lengths, Buffer work_indptr, Buffer work_info_set, Buffer reduce_indptr,
                  Buffer reduce_final_map, Buffer reduce_partial_map, Out out, Out lse, Out q_packed, Out rows,
                  Out state, Out own_indptr, Out own_items, Out qo_indptr, Out work_pointers, Out scales, Out amax,
                  Out partial_out, Out partial_lse, float scale, float cache_scale, int32_t block_size, int32_t workers,
                  int32_t kernel_heads) {
  constexpr ffi::DataType kInt = ffi::DataType::S32, kFloat = ffi::DataType::F32;
  Checker check("sparse_mla_decode");
  DecodeScopeParams p{};
  check.shape(q, "q", "(tokens, heads, 512)", {-1, -1, kLatentDim});
  if (!check.ok() || !bind_float_dtype(check, q, "q", &p.q_dtype)) return check.error();
  const int64_t tokens = q.dimensions()[0], heads = q.dimensions()[1];
  check.require(heads >= 1 && heads <= 128, "q", "have 1 to 128 heads", std::to_string(heads));
  if (!bind_pool(check, pool, block_size, cache_scale, &p.num_slots)) return check.error();
  check.buffer(indices, "indices", kInt, "(tokens, topk)", {tokens, -1});
  check.buffer(lengths, "lengths", kInt, "(tokens,)", {tokens});
  if (!check.ok() || !bind_plan(check, tokens, kv_lengths, work_indptr, work_info_set, reduce_indptr, reduce_final_map,
                                reduce_partial_map, &p.plan)) {
    return check.error();
  }
  check.require(workers >= 1 && workers <= p.plan.workers, "workers", "be from 1 to " + std::to_string(p.plan.workers),
                std::to_string(workers));
  std::string reason;
  const AiterKernel* kernel = kernel_for(device, kernel_heads, static_cast<int64_t>(pool.size_bytes()), &reason);
  if (!kernel) return ffi::Error(ffi::ErrorCode::kUnimplemented, "sparse_mla_decode: " + reason);
  const int64_t topk = indices.dimensions()[1], stride = topk > 1 ? topk : 1;
  const int64_t folds = folds_of(*kernel, static_cast<int>(heads)), padded = folds * kernel->heads;
  check.narrow(tokens * stride, "tokens * topk");
  check.narrow(tokens * padded, "tokens * padded heads");

  check.shape(*out, "out", "(tokens, heads, 512)", {tokens, heads, kLatentDim});
  if (!check.ok() || !bind_float_dtype(check, *out, "out", &p.out_dtype)) return check.error();
  check.buffer(*lse, "lse", kFloat, "(tokens, heads)", {tokens, heads});
  check.buffer(*q_packed, "q_packed", ffi::DataType::U8, "(tokens, padded heads, 576)", {tokens, padded, kRowBytes});
  check.buffer(*rows, "rows", kInt, "(tokens, max(topk, 1))", {tokens, stride});
  check.buffer(*state, "state", kInt, "(tokens, 3)", {tokens, 3});
  check.buffer(*own_indptr, "own_indptr", kInt, "(folds * workers + 1,)", {folds * workers + 1});
  check.buffer(*own_items, "own_items", kInt, "(folds * max_items, 8)", {folds * p.plan.max_items, 8});
  check.buffer(*qo_indptr, "qo_indptr", kInt, "(tokens * folds + 1,)", {tokens * folds + 1});
  check.buffer(*work_pointers, "work_pointers", kInt, "(4,)", {4});
  check.buffer(*scales, "scales", kFloat, "(2,)", {2});
  check.buffer(*amax, "amax", kFloat, "(64,)", {kAmaxBlocks});
  check.buffer(*partial_out, "partial_out", kFloat, "(max_partials + tokens + 1, padded heads, 512)",
               {-1, padded, kLatentDim});
  if (!check.ok()) return check.error();
  const int64_t partials = partial_out->dimensions()[0];
  check.buffer(*partial_lse, "partial_lse", kFloat, "(max_partials + tokens + 1, padded heads)", {partials, padded});
  check.require(partials > tokens + 1, "partial_out", "have more than tokens + 1 rows", std::to_string(partials));
  check.narrow(partials * padded, "partial rows * heads");
  if (!check.ok()) return check.error();
  // The plan's arrays have room for any platform's plan, the workspace for this one's.
  const int32_t planned = static_cast<int32_t>(partials - tokens - 1);
  p.plan.max_partials = planned < p.plan.max_partials ? planned : p.plan.max_partials;

  p.q = q.untyped_data();
  p.pool = data_of<uint8_t>(pool);
  p.indices = data_of<int32_t>(indices);
  p.lengths = data_of<int32_t>(lengths);
  p.out = data_of<void>(*out);
  p.lse = data_of<float>(*lse);
  p.q_packed = data_of<uint8_t>(*q_packed);
  p.rows = data_of<int32_t>(*rows);
  p.state = data_of<TokenState>(*state);
  p.work_indptr = data_of<int32_t>(*own_indptr);
  p.work_info_set = data_of<WorkInfo>(*own_items);
  p.qo_indptr = data_of<int32_t>(*qo_indptr);
  p.work_pointers = data_of<uint64_t>(*work_pointers);
  p.scales = data_of<float>(*scales);
  p.amax = data_of<float>(*amax);
  p.partial_out = data_of<float>(*partial_out);
  p.partial_lse = data_of<float>(*partial_lse);
  p.block_size = block_size;
  p.tokens = check.narrow(tokens, "tokens");
  p.heads = static_cast<int32_t>(heads);
  p.kernel_heads = kernel->heads;
  p.folds = static_cast<int32_t>(folds);
  p.topk = static_cast<int32_t>(topk);
  p.row_stride = static_cast<int32_t>(stride);
  p.workers = workers;
  p.direct = kernel->reports_lse && padded == heads && p.out_dtype == Dtype::kBf16;
  p.scale = scale;
  p.cache_scale = cache_scale;

  g_calls++;
  hip::CaptureStatus capture = hip::kCaptureStatusNone;
  const hip::Api* api = hip::api(&reason);
  if (api && !api->StreamIsCapturing(stream, &capture) && capture == hip::kCaptureStatusActive) g_captured++;
  return status("sparse_mla_decode", enqueue_decode(device, stream, *kernel, p));
}

// ---- dsv4_aiter_append.

ffi::Error initialize_append(int32_t device, ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return status("append", load_modules(device, nullptr));
}

ffi::Error append_rows(hip::Stream stream, int32_t device, Buffer pool, Buffer latents, Buffer slots, Out updated,
                       int32_t block_size, float cache_scale) {
  Checker check("append");
  AppendFp8Params p{};
  if (!bind_pool(check, pool, block_size, cache_scale, &p.num_slots)) return check.error();
  check.shape(latents, "latents", "(count, 512)", {-1, kLatentDim});
  if (!check.ok() || !bind_float_dtype(check, latents, "latents", &p.dtype)) return check.error();
  p.count = latents.dimensions()[0];
  check.buffer(slots, "slots", ffi::DataType::S32, "(count,)", {p.count});
  check.require(updated->size_bytes() == pool.size_bytes(), "the result", "have the cache's size",
                std::to_string(updated->size_bytes()));
  if (!check.ok()) return check.error();
  p.latents = latents.untyped_data();
  p.slots = data_of<int32_t>(slots);
  p.pool = data_of<uint8_t>(*updated);
  p.block_size = block_size;
  p.cache_scale = cache_scale;
  std::string reason;
  const hip::Api* api = hip::api(&reason);
  if (!api) return status("append", reason);
  if (p.pool != pool.untyped_data() &&
      api->MemcpyAsync(p.pool, pool.untyped_data(), pool.size_bytes(), hip::kMemcpyDeviceToDevice, stream)) {
    return status("append", "hipMemcpyAsync failed");
  }
  return status("append", enqueue_append(device, stream, p));
}

constexpr ffi::Traits kCapturable = ffi::Traits::kCmdBufferCompatible;

#define JAX_DSV4_INITIALIZER(name, function)                                                                           \
  XLA_FFI_DEFINE_HANDLER(name, function,                                                                               \
                         ffi::Ffi::BindInitialize().Ctx<ffi::DeviceOrdinal>().RemainingArgs().RemainingRets().Attrs(), \
                         {kCapturable})
JAX_DSV4_INITIALIZER(kInitializePlan, initialize_plan);
JAX_DSV4_INITIALIZER(kInitializeDecode, initialize_decode);
JAX_DSV4_INITIALIZER(kInitializeAppend, initialize_append);

XLA_FFI_DEFINE_HANDLER(kPlan, plan,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<hip::Stream>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Buffer>()  // swa_lengths
                           .Arg<Buffer>()  // extra_lengths
                           .Ret<Buffer>()  // kv_lengths
                           .Ret<Buffer>()  // work_indptr
                           .Ret<Buffer>()  // work_info_set
                           .Ret<Buffer>()  // reduce_indptr
                           .Ret<Buffer>()  // reduce_final_map
                           .Ret<Buffer>()  // reduce_partial_map
                           .Attr<int32_t>("swa_topk")
                           .Attr<int32_t>("extra_topk")
                           .Attr<int32_t>("active_workers")
                           .Attr<int32_t>("granularity")
                           .Attr<int32_t>("overhead")
                           .Attr<int32_t>("cut_cost"),
                       {kCapturable});

XLA_FFI_DEFINE_HANDLER(kInitializeMetadata, initialize_metadata,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::PlatformStream<hip::Stream>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs(),
                       {kCapturable});

XLA_FFI_DEFINE_HANDLER(kMetadata, metadata,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<hip::Stream>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Buffer>()  // lengths
                           .Ret<Buffer>()  // kv_lengths
                           .Ret<Buffer>()  // work_indptr
                           .Ret<Buffer>()  // work_info_set
                           .Ret<Buffer>()  // reduce_indptr
                           .Ret<Buffer>()  // reduce_final_map
                           .Ret<Buffer>()  // reduce_partial_map
                           .Ret<Buffer>()  // qo_indptr
                           .Ret<Buffer>()  // kv_indptr
                           .Ret<Buffer>()  // last_page_lens
                           .Ret<Buffer>()  // work_pointers
                           .Attr<int32_t>("topk")
                           .Attr<int32_t>("units")
                           .Attr<int32_t>("granularity")
                           .Attr<int32_t>("heads"),
                       {kCapturable});

XLA_FFI_DEFINE_HANDLER(kDecode, decode,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<hip::Stream>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Buffer>()  // q
                           .Arg<Buffer>()  // cache
                           .Arg<Buffer>()  // indices
                           .Arg<Buffer>()  // lengths
                           .Arg<Buffer>()  // plan.kv_lengths
                           .Arg<Buffer>()  // plan.work_indptr
                           .Arg<Buffer>()  // plan.work_info_set
                           .Arg<Buffer>()  // plan.reduce_indptr
                           .Arg<Buffer>()  // plan.reduce_final_map
                           .Arg<Buffer>()  // plan.reduce_partial_map
                           .Ret<Buffer>()  // out
                           .Ret<Buffer>()  // lse
                           .Ret<Buffer>()  // q_packed
                           .Ret<Buffer>()  // rows
                           .Ret<Buffer>()  // state
                           .Ret<Buffer>()  // own_indptr
                           .Ret<Buffer>()  // own_items
                           .Ret<Buffer>()  // qo_indptr
                           .Ret<Buffer>()  // work_pointers
                           .Ret<Buffer>()  // scales
                           .Ret<Buffer>()  // amax
                           .Ret<Buffer>()  // partial_out
                           .Ret<Buffer>()  // partial_lse
                           .Attr<float>("scale")
                           .Attr<float>("cache_scale")
                           .Attr<int32_t>("block_size")
                           .Attr<int32_t>("workers")
                           .Attr<int32_t>("kernel_heads"),
                       {kCapturable});

XLA_FFI_DEFINE_HANDLER(kAppend, append_rows,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<hip::Stream>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Buffer>()  // cache
                           .Arg<Buffer>()  // latents
                           .Arg<Buffer>()  // slots
                           .Ret<Buffer>()  // updated cache
                           .Attr<int32_t>("block_size")
                           .Attr<float>("cache_scale"),
                       {kCapturable});

}  // namespace
}  // namespace jax_dsv4::rocm

// Found by Python through ctypes.
extern "C" {
#define JAX_DSV4_HANDLER(name, handler) \
  JAX_DSV4_EXPORT XLA_FFI_Error* name(XLA_FFI_CallFrame* frame) { return jax_dsv4::rocm::handler(frame); }
JAX_DSV4_HANDLER(dsv4_aiter_plan, kPlan)
JAX_DSV4_HANDLER(dsv4_aiter_plan_initialize, kInitializePlan)
JAX_DSV4_HANDLER(dsv4_aiter_metadata_plan, kMetadata)
JAX_DSV4_HANDLER(dsv4_aiter_metadata_plan_initialize, kInitializeMetadata)
JAX_DSV4_HANDLER(dsv4_aiter_decode, kDecode)
JAX_DSV4_HANDLER(dsv4_aiter_decode_initialize, kInitializeDecode)
JAX_DSV4_HANDLER(dsv4_aiter_append, kAppend)
JAX_DSV4_HANDLER(dsv4_aiter_append_initialize, kInitializeAppend)

// AITER's hsa directory, the directory of our own code objects, and the library of AITER's plan builder ("" for none).
// To be called first, once.
JAX_DSV4_EXPORT void dsv4_rocm_directories(const char* aiter, const char* own, const char* metadata) {
  jax_dsv4::rocm::set_metadata_library(metadata);
  jax_dsv4::rocm::set_aiter_directory(aiter);
  jax_dsv4::rocm::set_kernel_directory(own);
}

// What a call with `heads` heads on a pool of `pool_bytes` runs on device 0; or, without asking HIP, on a device of an
// architecture that is named. ABI of jax_dsv4/implementations/aiter.py.
struct dsv4_rocm_choice {
  int32_t kernel_heads, tile, reports_lse, units, kernarg_bytes;
  char architecture[32];
  char text[2048];  // the kernel's file, or why there is none
};
JAX_DSV4_EXPORT int dsv4_rocm_choose(const char* named, int32_t heads, int64_t pool_bytes, dsv4_rocm_choice* choice) {
  using namespace jax_dsv4;
  std::memset(choice, 0, sizeof *choice);
  std::string reason;
  const std::string architecture = *named ? named : rocm::architecture_of(0, &reason);
  const rocm::AiterKernel* kernel =
      architecture.empty() ? nullptr : rocm::choose_kernel(architecture, heads, pool_bytes, &reason);
  std::strncpy(choice->architecture, architecture.c_str(), sizeof choice->architecture - 1);
  std::strncpy(choice->text, kernel ? kernel->file.c_str() : reason.c_str(), sizeof choice->text - 1);
  if (!kernel) return 0;
  choice->kernel_heads = kernel->heads;
  choice->tile = kernel->tile;
  choice->reports_lse = kernel->reports_lse;
  choice->kernarg_bytes = kernel->kernarg_bytes;
  if (*named) return choice->units = rocm::kUnitsOfGfx950;
  return hip::api(&reason)->DeviceGetAttribute(&choice->units, hip::kAttributeMultiprocessorCount, 0) == hip::kSuccess;
}

// The HIP library and its version, or why there is none, as a string of at most `bytes`.
JAX_DSV4_EXPORT void dsv4_rocm_hip(char* text, size_t bytes) {
  std::strncpy(text, jax_dsv4::hip::describe().c_str(), bytes - 1)[bytes - 1] = '\0';
}

// [decode handler executions, those recorded by a capture]
JAX_DSV4_EXPORT void dsv4_rocm_calls(int64_t* calls) {
  calls[0] = jax_dsv4::rocm::g_calls;
  calls[1] = jax_dsv4::rocm::g_captured;
}
}
