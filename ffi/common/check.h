// Checks of what a handler is handed, in the words of the Python layer: another caller may reach the target.
//   "<op>: <argument> must <rule>, got <got>"
#ifndef JAX_DSV4_COMMON_CHECK_H_
#define JAX_DSV4_COMMON_CHECK_H_

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "common/params.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

namespace ffi = ::xla::ffi;

// Collects the first failure; later checks are skipped once there is one.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  bool ok() const { return message_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, message_);
  }

  bool require(bool condition, const std::string& argument, const std::string& rule, const std::string& got) {
    if (ok() && !condition) message_ = std::string(op_) + ": " + argument + " must " + rule + ", got " + got;
    return ok();
  }

  // Dimensions as named, e.g. shape(q, "q", "(tokens, heads, 512)", {t, h, 512}); -1 matches anything.
  bool shape(const ffi::AnyBuffer& buffer, const std::string& argument, const char* names,
             std::initializer_list<int64_t> expected) {
    const auto dims = buffer.dimensions();
    bool same = dims.size() == expected.size();
    size_t i = 0;
    for (int64_t e : expected) {
      if (same && e >= 0 && dims[i] != e) same = false;
      ++i;
    }
    return ok() && require(same, argument, "have shape " + std::string(names) + " = " + text(expected), text(dims));
  }

  bool dtype(const ffi::AnyBuffer& buffer, const std::string& argument, ffi::DataType expected) {
    return ok() && require(buffer.element_type() == expected, argument, "have dtype " + text(expected),
                           text(buffer.element_type()));
  }

  bool buffer(const ffi::AnyBuffer& value, const std::string& argument, ffi::DataType expected, const char* names,
              std::initializer_list<int64_t> dims) {
    return dtype(value, argument, expected) && shape(value, argument, names, dims);
  }

  // int64 to int32, refusing what does not fit.
  int32_t narrow(int64_t value, const std::string& argument) {
    require(value >= 0 && value <= std::numeric_limits<int32_t>::max(), argument, "fit int32", std::to_string(value));
    return ok() ? static_cast<int32_t>(value) : 0;
  }

 private:
  template <typename Dims>
  static std::string text(const Dims& dims) {
    std::string s = "(";
    size_t i = 0;
    for (int64_t d : dims) s += (i++ ? ", " : "") + (d < 0 ? "*" : std::to_string(d));
    return s + (i == 1 ? ",)" : ")");
  }

  static std::string text(ffi::DataType type) {
    switch (type) {
      case ffi::DataType::BF16:
        return "bfloat16";
      case ffi::DataType::F32:
        return "float32";
      case ffi::DataType::S32:
        return "int32";
      case ffi::DataType::U8:
        return "uint8";
      default:
        return "XLA type " + std::to_string(static_cast<int>(type));
    }
  }

  const char* op_;
  std::string message_;
};

inline int64_t layout_token_bytes(Layout layout) {
  switch (layout) {
    case Layout::kFp8DsMla:
      return kPackedTokenBytes;
    case Layout::kBf16:
      return 2 * kLatentDim;
    case Layout::kFloat32:
      return 4 * kLatentDim;
    default:
      return 0;
  }
}

inline bool bind_float_dtype(Checker& check, const ffi::AnyBuffer& buffer, const std::string& argument, Dtype* dtype) {
  const bool f32 = buffer.element_type() == ffi::DataType::F32;
  *dtype = f32 ? Dtype::kFloat32 : Dtype::kBf16;
  return f32 || check.dtype(buffer, argument, ffi::DataType::BF16);
}

// A cache buffer is [num_blocks, ...]: uint8 [num_blocks, block_stride_bytes] for fp8_ds_mla, [num_blocks, block_size,
// 512] else.
inline bool bind_cache(Checker& check, const ffi::AnyBuffer& buffer, const std::string& argument, int32_t block_size,
                       int32_t layout, Cache* cache) {
  cache->layout = static_cast<Layout>(layout);
  const int64_t token_bytes = layout_token_bytes(cache->layout);
  check.require(token_bytes > 0, argument + ".layout", "be one that this platform reads", std::to_string(layout));
  check.require(block_size > 0, argument + ".block_size", "be positive", std::to_string(block_size));
  if (!check.ok()) return false;
  if (cache->layout == Layout::kFp8DsMla) {
    check.buffer(buffer, argument, ffi::DataType::U8, "(num_blocks, block_stride_bytes)", {-1, -1});
  } else {
    check.buffer(buffer, argument, cache->layout == Layout::kBf16 ? ffi::DataType::BF16 : ffi::DataType::F32,
                 "(num_blocks, block_size, 512)", {-1, block_size, kLatentDim});
  }
  if (!check.ok()) return false;
  const auto dims = buffer.dimensions();
  cache->data = static_cast<const uint8_t*>(buffer.untyped_data());
  cache->num_blocks = dims[0];
  cache->block_size = block_size;
  cache->block_stride_bytes = cache->layout == Layout::kFp8DsMla ? dims[1] : block_size * token_bytes;
  return check.require(
      cache->block_stride_bytes >= block_size * token_bytes, argument + ".block_stride_bytes",
      "be at least block_size * " + std::to_string(token_bytes) + " = " + std::to_string(block_size * token_bytes),
      std::to_string(cache->block_stride_bytes));
}

inline bool bind_scope(Checker& check, const std::string& name, int64_t tokens, const ffi::AnyBuffer& cache,
                       const ffi::AnyBuffer& indices, const ffi::AnyBuffer& lengths, int32_t block_size, int32_t layout,
                       Scope* scope) {
  if (!bind_cache(check, cache, name + ".cache", block_size, layout, &scope->cache) ||
      !check.buffer(indices, name + ".indices", ffi::DataType::S32, "(tokens, topk)", {tokens, -1}) ||
      !check.buffer(lengths, name + ".lengths", ffi::DataType::S32, "(tokens,)", {tokens})) {
    return false;
  }
  scope->indices = static_cast<const int32_t*>(indices.untyped_data());
  scope->lengths = static_cast<const int32_t*>(lengths.untyped_data());
  scope->topk = check.narrow(indices.dimensions()[1], name + ".topk");
  return check.ok();
}

inline bool bind_plan(Checker& check, int64_t tokens, const ffi::AnyBuffer& kv_lengths,
                      const ffi::AnyBuffer& work_indptr, const ffi::AnyBuffer& work_info_set,
                      const ffi::AnyBuffer& reduce_indptr, const ffi::AnyBuffer& reduce_final_map,
                      const ffi::AnyBuffer& reduce_partial_map, Plan* plan) {
  constexpr ffi::DataType kInt = ffi::DataType::S32;
  if (!check.buffer(kv_lengths, "plan.kv_lengths", kInt, "(tokens,)", {tokens}) ||
      !check.buffer(work_indptr, "plan.work_indptr", kInt, "(workers + 1,)", {-1}) ||
      !check.require(work_indptr.dimensions()[0] > 1, "plan.work_indptr", "have at least 2 entries",
                     std::to_string(work_indptr.dimensions()[0])) ||
      !check.buffer(work_info_set, "plan.work_info_set", kInt, "(max_items, 8)", {-1, 8}) ||
      !check.buffer(reduce_indptr, "plan.reduce_indptr", kInt, "(tokens + 1,)", {tokens + 1}) ||
      !check.buffer(reduce_final_map, "plan.reduce_final_map", kInt, "(tokens, 2)", {tokens, 2}) ||
      !check.buffer(reduce_partial_map, "plan.reduce_partial_map", kInt, "(max_partials,)", {-1})) {
    return false;
  }
  const auto data = [](const ffi::AnyBuffer& b) { return static_cast<const int32_t*>(b.untyped_data()); };
  plan->kv_lengths = data(kv_lengths);
  plan->work_indptr = data(work_indptr);
  plan->work_info_set = data(work_info_set);
  plan->reduce_indptr = data(reduce_indptr);
  plan->reduce_final_map = data(reduce_final_map);
  plan->reduce_partial_map = data(reduce_partial_map);
  plan->workers = check.narrow(work_indptr.dimensions()[0] - 1, "plan.work_indptr");
  plan->max_items = check.narrow(work_info_set.dimensions()[0], "plan.work_info_set");
  plan->max_partials = check.narrow(reduce_partial_map.dimensions()[0], "plan.reduce_partial_map");
  return check.ok();
}

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_CHECK_H_
