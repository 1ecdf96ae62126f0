// Checks of what a handler is handed, in the words of the Python layer: another caller may reach the target.
//   "<op>: <argument> must <rule>, got <got>"
#ifndef JAX_DSV4_COMMON_CHECK_H_
#define JAX_DSV4_COMMON_CHECK_H_

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

namespace jax_dsv4 {

namespace ffi = ::xla::ffi;

// What a message would say: pieces of text and numbers, put together only when a check has failed. It refers to the
// text, and is not to outlive the call that it is passed to.
class Text {
 public:
  Text(const char* text) { pieces_[count_++] = {text, 0}; }
  Text(const std::string& text) : Text(text.c_str()) {}
  template <typename Number, typename = std::enable_if_t<std::is_integral_v<Number>>>
  Text(Number number) {
    pieces_[count_++] = {nullptr, static_cast<int64_t>(number)};
  }

  Text operator+(const Text& more) const {
    Text both = *this;
    for (int i = 0; i < more.count_ && both.count_ < kPieces; ++i) both.pieces_[both.count_++] = more.pieces_[i];
    return both;
  }

  std::string string() const {
    std::string s;
    for (int i = 0; i < count_; ++i) s += pieces_[i].text ? pieces_[i].text : std::to_string(pieces_[i].number);
    return s;
  }

 private:
  static constexpr int kPieces = 6;
  struct Piece {
    const char* text;  // null: the number
    int64_t number;
  };
  Piece pieces_[kPieces];
  int count_ = 0;
};

// Collects the first failure; later checks are skipped once there is one. A check that holds costs a comparison: a call
// makes some fifty of them.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  bool ok() const { return message_.empty(); }
  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, message_);
  }

  bool require(bool condition, const Text& argument, const Text& rule, const Text& got) {
    if (ok() && !condition) fail(argument, rule.string(), got.string());
    return ok();
  }

  // Dimensions as named, e.g. shape(q, "q", "(tokens, heads, 512)", {t, h, 512}); -1 matches anything.
  bool shape(const ffi::AnyBuffer& buffer, const Text& argument, const char* names,
             std::initializer_list<int64_t> expected) {
    const auto dims = buffer.dimensions();
    bool same = dims.size() == expected.size();
    size_t i = 0;
    for (int64_t e : expected) {
      if (same && e >= 0 && dims[i] != e) same = false;
      ++i;
    }
    if (ok() && !same) fail(argument, "have shape " + std::string(names) + " = " + text(expected), text(dims));
    return ok();
  }

  bool dtype(const ffi::AnyBuffer& buffer, const Text& argument, ffi::DataType expected) {
    const ffi::DataType got = buffer.element_type();
    if (ok() && got != expected) fail(argument, "have dtype " + text(expected), text(got));
    return ok();
  }

  bool buffer(const ffi::AnyBuffer& value, const Text& argument, ffi::DataType expected, const char* names,
              std::initializer_list<int64_t> dims) {
    return dtype(value, argument, expected) && shape(value, argument, names, dims);
  }

  // Refuses what does not fit.
  int32_t to_int32(int64_t value, const Text& argument) {
    require(value >= 0 && value <= std::numeric_limits<int32_t>::max(), argument, "fit int32", value);
    return ok() ? static_cast<int32_t>(value) : 0;
  }

 private:
  __attribute__((noinline)) void fail(const Text& argument, const std::string& rule, const std::string& got) {
    message_ = std::string(op_) + ": " + argument.string() + " must " + rule + ", got " + got;
  }

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
