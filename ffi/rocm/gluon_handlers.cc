// XLA FFI handlers on ROCm for layout fp8_ds_mla, which AITER's Gluon kernel reads: bind, check, enqueue on XLA's
// stream. jax_dsv4/_implementations/aiter_gluon.py states the same operands. Modules are loaded in the initialize
// stage.
#include <cstring>
#include <string>

#include "common/bind.h"
#include "rocm/gluon.h"
#include "rocm/handlers.h"
#include "rocm/launch.h"

namespace jax_dsv4::rocm {
namespace {

// ---- dsv4_aiter_gluon_decode.

constexpr const char* kOp = "sparse_mla_decode";

struct GluonOperands {
  Buffer q, sink;
  ScopeOperands swa, extra;
  Buffer out, lse, counts, swa_indptr, swa_slots, extra_indptr, extra_slots, partial_max, partial_sum, partial_out;
  float scale;
  bool has_sink;
  int32_t swa_block_size, extra_block_size, tokens_per_launch;
};

template <typename Binding>
auto gluon_binding(Binding&& context) {
  return with_attributes<int32_t>(with_results<10>(with_operands<8>(std::move(context)))
                                      .template Attr<float>("scale")
                                      .template Attr<bool>("has_sink"),
                                  "swa_block_size", "extra_block_size", "tokens_per_launch");
}

bool fill_gluon_scope(Checker& check, const std::string& name, int64_t tokens, const ScopeOperands& o,
                      int32_t block_size, const Buffer& indptr, const Buffer& slots, GluonScope* s) {
  constexpr ffi::DataType kInt = ffi::DataType::S32;
  constexpr int32_t kLayout = static_cast<int32_t>(Layout::kFp8DsMla);
  if (!fill_scope(check, name, tokens, o, block_size, kLayout, /*inline_scales=*/0, &s->scope)) return false;
  const Cache& cache = s->scope.cache;
  check.require(cache.block_stride_bytes % 2 == 0, name + ".cache's block stride", "be even",
                std::to_string(cache.block_stride_bytes));
  check.to_int32(cache.block_stride_bytes, name + ".cache's block stride");
  check.to_int32(cache.num_blocks * cache.block_size, name + ".cache's slots");
  check.to_int32(tokens * s->scope.topk, "tokens * topk");
  check.buffer(indptr, name + "_indptr", kInt, "(tokens + 1,)", {tokens + 1});
  check.buffer(slots, name + "_slots", kInt, "(tokens, topk)", {tokens, s->scope.topk});
  s->indptr = data_of<int32_t>(indptr);
  s->slots = data_of<int32_t>(slots);
  return check.ok();
}

bool fill_gluon_params(Checker& check, const GluonOperands& o, GluonDecodeParams* p) {
  constexpr ffi::DataType kInt = ffi::DataType::S32, kFloat = ffi::DataType::F32;
  Dtype q_dtype;
  if (!check.dtype(o.q, "q", ffi::DataType::BF16) || !fill_q(check, o.q, &p->q, &q_dtype)) return false;
  const int64_t tokens = o.q.dimensions()[0], heads = o.q.dimensions()[1];
  check.buffer(o.sink, "attn_sink", kFloat, o.has_sink ? "(heads,)" : "(0,)", {o.has_sink ? heads : 0});
  GluonScope *swa = &p->scopes[0], *extra = &p->scopes[1];
  if (!fill_gluon_scope(check, "swa", tokens, o.swa, o.swa_block_size, o.swa_indptr, o.swa_slots, swa) ||
      !fill_gluon_scope(check, "extra", tokens, o.extra, o.extra_block_size, o.extra_indptr, o.extra_slots, extra) ||
      !fill_dtype(check, o.out, "out", &p->out_dtype)) {
    return false;
  }
  check.shape(o.out, "out", "(tokens, heads, 512)", {tokens, heads, kLatentDim});
  check.buffer(o.lse, "lse", kFloat, "(tokens, heads)", {tokens, heads});
  check.buffer(o.counts, "counts", kInt, "(2, tokens)", {2, tokens});
  check.buffer(o.partial_out, "partial_out", kFloat, "(tokens, splits, heads, 512)", {tokens, -1, heads, kLatentDim});
  if (!check.ok()) return false;
  const int64_t splits = o.partial_out.dimensions()[1];
  // One split would write the final output and no lse.
  check.require(splits >= 2, "partial_out", "have at least 2 splits", std::to_string(splits));
  for (const auto& [buffer, name] : {std::pair{o.partial_max, "partial_max"}, std::pair{o.partial_sum, "partial_sum"}})
    check.buffer(buffer, name, kFloat, "(tokens, splits, heads)", {tokens, splits, heads});
  const int64_t addressed = o.tokens_per_launch * splits * heads * kLatentDim * 4;
  check.require(o.tokens_per_launch > 0 && o.tokens_per_launch % 4 == 0 && addressed <= kGluonBytes,
                "tokens_per_launch", "be a multiple of 4 whose partial_out has less than 2 GiB",
                std::to_string(o.tokens_per_launch));
  p->sink = o.has_sink ? data_of<const float>(o.sink) : nullptr;
  p->out = data_of<void>(o.out);
  p->lse = data_of<float>(o.lse);
  swa->counts = data_of<int32_t>(o.counts);
  extra->counts = swa->counts + tokens;
  p->partial_max = data_of<float>(o.partial_max);
  p->partial_sum = data_of<float>(o.partial_sum);
  p->partial_out = data_of<float>(o.partial_out);
  p->tokens = check.to_int32(tokens, "tokens");
  p->heads = static_cast<int32_t>(heads);
  p->splits = static_cast<int32_t>(splits);
  return check.ok();
}

// What a call runs, from its operands.
ffi::Error prepare(const GluonOperands& o, GluonDecodeParams* p, const GluonKernel** kernel) {
  Checker check(kOp);
  if (!fill_gluon_params(check, o, p)) return check.error();
  std::string reason;
  *kernel = find_gluon_kernel(gluon_variant(*p, o.scale), &reason);
  return *kernel ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kUnimplemented, std::string(kOp) + ": " + reason);
}

ffi::Error initialize_gluon(const GluonOperands& o, int32_t device) {
  GluonDecodeParams p{};
  const GluonKernel* kernel;
  const ffi::Error error = prepare(o, &p, &kernel);
  return error.success() ? status(kOp, load_modules(device, kernel)) : error;
}

ffi::Error decode_gluon(const GluonOperands& o, hip::Stream stream, int32_t device) {
  GluonDecodeParams p{};
  const GluonKernel* kernel;
  const ffi::Error error = prepare(o, &p, &kernel);
  return error.success() ? status(kOp, enqueue_gluon_decode(device, stream, *kernel, p, o.tokens_per_launch)) : error;
}

// ---- dsv4_packed_append: the operands of dsv4_append.

ffi::Error initialize_append(const AppendOperands&, int32_t device) {
  return status("append", load_modules(device, nullptr));
}

ffi::Error append_rows(const AppendOperands& o, hip::Stream stream, int32_t device) {
  AppendParams p{};
  const ffi::Error error = fill_append_params(o, &p);
  if (!error.success()) return error;
  Checker check("append");
  check.require(p.cache.layout == Layout::kFp8DsMla, "cache.layout", "be fp8_ds_mla", std::to_string(o.layout));
  check.require(p.cache.block_stride_bytes % 2 == 0, "cache's block stride", "be even",
                std::to_string(p.cache.block_stride_bytes));
  if (!check.ok()) return check.error();
  const std::string copied = copy_unless_aliased(o.cache, p.data_out, stream);
  return status("append", copied.empty() ? enqueue_packed_append(device, stream, p) : copied);
}

auto on_device() { return ffi::Ffi::BindInitialize().Ctx<ffi::DeviceOrdinal>(); }

}  // namespace

JAX_DSV4_TARGET(dsv4_packed_append_initialize, taking_struct(initialize_append), append_binding(on_device()),
                {kCapturable})
JAX_DSV4_TARGET(dsv4_packed_append, taking_struct(append_rows), append_binding(on_stream()), {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_gluon_decode_initialize, taking_struct(initialize_gluon), gluon_binding(on_device()),
                {kCapturable})
JAX_DSV4_TARGET(dsv4_aiter_gluon_decode, taking_struct(decode_gluon), gluon_binding(on_stream()), {kCapturable})

// The directory of compiled variants. To be called first, once.
JAX_DSV4_EXPORT void dsv4_rocm_gluon_directory(const char* path) { set_gluon_directory(path); }

// Device 0, or without asking HIP a device of an architecture that is named. ABI of aiter_gluon.py.
struct dsv4_rocm_device {
  int32_t units;
  char architecture[32];
  char reason[1024];  // why there is none
};
JAX_DSV4_EXPORT void dsv4_rocm_describe(const char* named, dsv4_rocm_device* device) {
  std::memset(device, 0, sizeof *device);
  std::string reason;
  const std::string architecture = *named ? named : architecture_of(0, &reason);
  std::strncpy(device->architecture, architecture.c_str(), sizeof device->architecture - 1);
  std::strncpy(device->reason, reason.c_str(), sizeof device->reason - 1);
  if (*named) {
    device->units = kUnitsOfGfx950;
  } else if (!architecture.empty()) {
    hip::api(&reason)->DeviceGetAttribute(&device->units, hip::kAttributeMultiprocessorCount, 0);
  }
}

}  // namespace jax_dsv4::rocm
