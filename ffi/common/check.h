// Checks of what a handler is handed, in the words of the Python layer: another caller may reach the target.
//   "<op>: <argument> must <rule>, got <got>"
#ifndef JAX_DSV4_COMMON_CHECK_H_
#define JAX_DSV4_COMMON_CHECK_H_

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

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

  // Refuses what does not fit.
  int32_t to_int32(int64_t value, const std::string& argument) {
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

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_CHECK_H_
