// What each instruction does. An elementwise one is a line in a table: its C++ types are its operand types, from which
// the templates below derive how operands are fetched (32 or 64 bits, sign modifiers, DPP, SDWA) and how the result is
// written.
//
// Sources: AMD's CDNA3 and CDNA4 instruction set references; where those are silent, what AITER's kernels need in order
// to agree with NumPy (tests/gfx950/test_instructions.py pins the ones easy to get wrong).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "machine.h"

namespace gfx950 {
namespace {

using I = const Instruction&;

// ---- Operands.

int vgpr(Wave& w, I i, const Operand& op, int role) {
  int reg = op.reg;
  // s_set_gpr_idx_on: M0[15:12] says which roles (sources 0-2, destination) M0[7:0] is added to.
  if (w.gpr_index && (w.s[kM0] >> (12 + role) & 1)) reg += w.s[kM0] & 0xff;
  if (reg + op.count > kVgprs) fault(w, i, "VGPR number out of range");
  return reg;
}
constexpr int kDestination = 3;

uint32_t scalar32(Wave& w, I i, const Operand& op) {
  switch (op.kind) {
    case Operand::kSgpr:
      if (w.hazards) uses_sgprs(w, i, op.reg, 1);
      return w.s[op.reg];
    case Operand::kConstant:
      return op.bits32;
    case Operand::kScc:
      return w.scc;
    case Operand::kVccz:
      return w.s[kVcc] == 0 && w.s[kVcc + 1] == 0;
    case Operand::kExecz:
      return w.exec() == 0;
    default:
      fault(w, i, "a scalar operand was expected");
  }
}

uint64_t scalar64(Wave& w, I i, const Operand& op) {
  if (op.kind == Operand::kConstant) return op.bits64;
  if (op.kind != Operand::kSgpr) return scalar32(w, i, op);
  if (w.hazards) uses_sgprs(w, i, op.reg, 2);
  return w.s[op.reg] | uint64_t{w.s[op.reg + 1]} << 32;
}

uint32_t select(uint32_t x, Instruction::Select s, bool sign_extend) {
  if (s == Instruction::kDword) return x;
  const int bits = s < Instruction::kWord0 ? 8 : 16,
            shift = s < Instruction::kWord0 ? 8 * s : 16 * (s - Instruction::kWord0);
  const int32_t top = static_cast<int32_t>(x << (32 - bits - shift));
  return sign_extend ? static_cast<uint32_t>(top >> (32 - bits)) : static_cast<uint32_t>(top) >> (32 - bits);
}

// Lanes of a VGPR that DPP may read: a source lane that is absent or inactive gives 0 with bound_ctrl, else no write.
bool dpp_reads(const Wave& w, I i, int lane) { return (*i.dpp)[lane] >= 0 && w.active((*i.dpp)[lane]); }

// One 32-bit half of a source operand, per lane. `source` counts from 0; DPP applies to source 0, SDWA to 0 and 1.
const uint32_t* lanes32(Wave& w, I i, const Operand& op, int source, int half, bool is_float, bool wide,
                        Lanes& scratch) {
  if (op.kind == Operand::kVgpr) {
    const int reg = vgpr(w, i, op, source) + half;
    if (w.hazards) uses_vgprs(w, i, reg, 1);
    const Lanes& from = w.v[reg];
    const bool dpp = i.dpp && source == 0, sdwa = i.sdwa && source < 2;
    if (!dpp && !sdwa && !op.negate && !op.absolute) return from.data();
    for (int l = 0; l < kLanes; ++l) scratch[l] = !dpp ? from[l] : dpp_reads(w, i, l) ? from[(*i.dpp)[l]] : 0;
    if (sdwa)
      for (uint32_t& x : scratch) x = select(x, i.select_src[source], op.sign_extend);
  } else {
    const uint64_t value = wide ? scalar64(w, i, op) : scalar32(w, i, op);
    scratch.fill(static_cast<uint32_t>(value >> (32 * half)));
  }
  if ((op.negate || op.absolute) && (!wide || half == 1)) {
    if (!is_float) fault(w, i, "sign modifier on an integer operand");
    if (op.absolute)
      for (uint32_t& x : scratch) x &= 0x7fffffff;
    if (op.negate)
      for (uint32_t& x : scratch) x ^= 0x80000000;
  }
  return scratch.data();
}

// Reads operand values of type T per lane.
template <class T>
struct Reader {
  Lanes scratch[sizeof(T) == 8 ? 2 : 1];
  const uint32_t *lo, *hi = nullptr;

  Reader(Wave& w, I i, int operand, int source) {
    if (operand >= static_cast<int>(i.operands.size())) fault(w, i, "operand missing");
    const Operand& op = i.operands[operand];
    constexpr bool wide = sizeof(T) == 8, is_float = std::is_floating_point_v<T>;
    lo = lanes32(w, i, op, source, 0, is_float, wide, scratch[0]);
    if constexpr (wide) hi = lanes32(w, i, op, source, 1, is_float, wide, scratch[1]);
  }
  T operator()(int l) const {
    if constexpr (sizeof(T) == 8)
      return std::bit_cast<T>(lo[l] | uint64_t{hi[l]} << 32);
    else if constexpr (sizeof(T) == 2)
      return std::bit_cast<T>(static_cast<uint16_t>(lo[l]));
    else
      return std::bit_cast<T>(lo[l]);
  }
};

// Writes one destination register under EXEC, DPP's and SDWA's masks.
void write_vgpr(Wave& w, I i, int reg, const Lanes& value) {
  if (w.hazards) uses_vgprs(w, i, reg, 1);
  Lanes& to = w.v[reg];
  if (w.exec_full && !i.nontrivial) {
    to = value;
    return;
  }
  for (int l = 0; l < kLanes; ++l) {
    if (!w.exec_lanes[l]) continue;
    if (i.dpp && (!(*i.dpp_write)[l] || (!i.bound_ctrl && !dpp_reads(w, i, l)))) continue;
    if (i.sdwa && i.select_dst != Instruction::kDword) {
      const bool byte = i.select_dst < Instruction::kWord0;
      const int shift = byte ? 8 * i.select_dst : 16 * (i.select_dst - Instruction::kWord0);
      const uint32_t mask = (byte ? 0xffu : 0xffffu) << shift;
      uint32_t field = value[l] << shift & mask;
      if (i.sdwa_sign_extend)
        field = static_cast<uint32_t>(static_cast<int32_t>(value[l] << (byte ? 24 : 16)) >> (byte ? 24 : 16)) << shift;
      to[l] = i.sdwa_preserve ? (to[l] & ~mask) | field : field;
    } else {
      to[l] = value[l];
    }
  }
}

void write_scalar64(Wave& w, const Operand& op, uint64_t value) {
  w.set_scalar(op.reg, static_cast<uint32_t>(value));
  w.set_scalar(op.reg + 1, static_cast<uint32_t>(value >> 32));
}

// ---- Elementwise vector instructions from a lambda over one lane's values.

template <class F, class R, class... A>
struct Elementwise {
  static void execute(Wave& w, I i) { run(w, i, std::index_sequence_for<A...>()); }

  template <size_t... K>
  static void run(Wave& w, I i, std::index_sequence<K...>) {
    compute(w, i, Reader<A>(w, i, static_cast<int>(K) + 1, static_cast<int>(K))...);
  }

  static void compute(Wave& w, I i, const Reader<A>&... read) {
    Lanes lo, hi;
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      R r = F{}(read(l)...);
      if constexpr (sizeof(R) == 8) {
        const uint64_t bits = std::bit_cast<uint64_t>(r);
        lo[l] = static_cast<uint32_t>(bits), hi[l] = static_cast<uint32_t>(bits >> 32);
      } else if constexpr (sizeof(R) == 2) {
        lo[l] = std::bit_cast<uint16_t>(r);
      } else {
        lo[l] = std::bit_cast<uint32_t>(r);
      }
    }
    if (i.clamp || i.scale != 1.0f) {
      if constexpr (!std::is_same_v<R, float>) {
        fault(w, i, "clamp or output scale on a result that is not fp32");
      } else {
        for (uint32_t& x : lo) {
          float f = std::bit_cast<float>(x) * i.scale;
          if (i.clamp) f = f >= 0 ? std::min(f, 1.0f) : 0.0f;  // NaN becomes 0
          x = std::bit_cast<uint32_t>(f);
        }
      }
    }
    const int reg = vgpr(w, i, i.operands[0], kDestination);
    write_vgpr(w, i, reg, lo);
    if constexpr (sizeof(R) == 8) write_vgpr(w, i, reg + 1, hi);
  }
};

template <class F, class R, class... A>
constexpr Opcode elementwise(R (F::*)(A...) const) {
  return {&Elementwise<F, R, A...>::execute, Class::kVector};
}
template <class F>
constexpr Opcode lanes(F) {
  return elementwise(&F::operator());
}

// Per-lane comparisons: one bit per active lane into a scalar pair; v_cmpx also into EXEC.
uint64_t as_mask(const Wave& w, const Lanes& bits) {
  uint64_t mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= static_cast<uint64_t>(bits[l] & w.exec_lanes[l] & 1) << l;
  return mask;
}

template <bool X, class F, class A, class B>
struct Comparison {
  static void execute(Wave& w, I i) {
    const Reader<A> a(w, i, 1, 0);
    const Reader<B> b(w, i, 2, 1);
    Lanes bits;
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) bits[l] = F{}(a(l), b(l)) ? 1 : 0;
    const uint64_t mask = as_mask(w, bits);
    write_scalar64(w, i.operands[0], mask);
    if (X) w.set_exec(mask);
  }
};
template <bool X, class F, class A, class B>
constexpr Opcode comparison(bool (F::*)(A, B) const) {
  return {&Comparison<X, F, A, B>::execute, Class::kVector};
}

// ---- Scalar instructions from a lambda; a first parameter of type bool& is SCC.

template <class T>
T scalar(Wave& w, I i, size_t operand) {
  if (operand >= i.operands.size()) fault(w, i, "operand missing");
  if constexpr (sizeof(T) == 8)
    return std::bit_cast<T>(scalar64(w, i, i.operands[operand]));
  else
    return std::bit_cast<T>(scalar32(w, i, i.operands[operand]));
}

template <class F, class R, class... A>
struct Scalar {
  static void execute(Wave& w, I i) { run(w, i, std::index_sequence_for<A...>()); }
  template <size_t... K>
  static void run(Wave& w, I i, std::index_sequence<K...>) {
    if constexpr (std::is_void_v<R>) {
      F{}(w.scc, scalar<A>(w, i, K)...);
    } else {
      bool scc = w.scc;
      const R r = F{}(scc, scalar<A>(w, i, K + 1)...);
      w.scc = scc;
      if constexpr (sizeof(R) == 8)
        write_scalar64(w, i.operands[0], std::bit_cast<uint64_t>(r));
      else
        w.set_scalar(i.operands[0].reg, std::bit_cast<uint32_t>(r));
    }
  }
};
template <class F, class R, class... A>
constexpr Opcode scalar_opcode(R (F::*)(bool&, A...) const) {
  return {&Scalar<F, R, A...>::execute, Class::kScalar};
}
template <class F>
constexpr Opcode scalar(F) {
  return scalar_opcode(&F::operator());
}

// SCC: whether the result is not 0.
template <class F, class R, class... A>
constexpr Opcode nonzero_opcode(R (F::*)(A...) const) {
  return scalar([](bool& scc, A... a) {
    const R r = F{}(a...);
    scc = r != 0;
    return r;
  });
}
template <class F>
constexpr Opcode nonzero(F) {
  return nonzero_opcode(&F::operator());
}

// A result in 64 bits, of two operands and SCC. SCC: whether it does not fit 32.
template <class F>
constexpr Opcode cut(F) {
  return scalar([](bool& scc, uint32_t a, uint32_t b) {
    const uint64_t r = F{}(uint64_t{a}, uint64_t{b}, uint64_t{scc});
    scc = r >> 32 != 0;
    return static_cast<uint32_t>(r);
  });
}

// ---- Arithmetic that more than one instruction uses.

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

i32 low24(u32 x) { return static_cast<i32>(x << 8) >> 8; }
u32 bfe(u32 x, u32 offset, u32 width) { return width ? x >> offset & (~0u >> (32 - width)) : 0; }
u64 bfe64(u64 x, u32 offset, u32 width) { return width ? x >> offset & (~u64{0} >> (64 - width)) : 0; }
i32 bfe_signed(i32 x, u32 offset, u32 width) {
  if (!width) return 0;
  if (offset + width >= 32) return x >> offset;
  return static_cast<i32>(static_cast<u32>(x) << (32 - offset - width)) >> (32 - width);
}
// IEEE maxNum, minNum: a NaN loses against a number.
float max_number(float a, float b) { return b != b ? a : a > b || a != a ? (a != a ? b : a) : b; }
float min_number(float a, float b) { return b != b ? a : a != a ? b : a < b ? a : b; }
// IEEE maximum, minimum: a NaN wins, and +0 is above -0.
float maximum(float a, float b) { return a != a || b != b ? a + b : a > b || (a == b && !std::signbit(a)) ? a : b; }
float minimum(float a, float b) { return a != a || b != b ? a + b : a < b || (a == b && std::signbit(a)) ? a : b; }
u32 find_low(u32 x) { return x ? __builtin_ctz(x) : ~0u; }
u32 find_high(u32 x) { return x ? __builtin_clz(x) : ~0u; }

u32 to_unsigned(float f) { return !(f > 0) ? 0 : f >= 4294967296.0f ? ~0u : static_cast<u32>(f); }
i32 to_signed(float f) {
  return f != f ? 0 : f >= 2147483648.0f ? INT32_MAX : f < -2147483648.0f ? INT32_MIN : static_cast<i32>(f);
}

u32 to_bf16(float f) {
  const u32 x = std::bit_cast<u32>(f);
  if ((x & 0x7fffffff) > 0x7f800000) return x >> 16 | 0x40;  // quieted
  return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}

// Two formats of a sign, four bits of exponent and three of mantissa. e4m3fn, gfx950's: bias 7, NaN is 0x7f and 0xff.
// e4m3fnuz, gfx942's: bias 8, NaN is 0x80, and there is no -0.
template <bool Fnuz>
struct E4m3 {
  static constexpr int kBytes = 1, kBias = Fnuz ? 8 : 7;
  static constexpr u32 kLargest = Fnuz ? 0x7f : 0x7e;

  // Round to nearest even. Beyond the largest finite value: NaN, as the hardware does when it does not clamp.
  static u32 code(float f) {
    const u32 x = std::bit_cast<u32>(f), sign = x >> 24 & 0x80, nan = Fnuz ? 0x80 : sign | 0x7f;
    const float a = std::fabs(f);
    if (!(a <= 480.0f)) return nan;
    u32 code = (x & 0x7fffffff) + 0x7ffff + (x >> 20 & 1);
    if (a < std::ldexp(1.0f, 1 - kBias))
      code = static_cast<u32>(std::nearbyint(std::ldexp(a, kBias + 2)));  // subnormal
    else
      code = (code >> 20) - ((127 - kBias) << 3);
    return code > kLargest ? nan : Fnuz && code == 0 ? 0 : sign | code;
  }

  static const std::array<float, 256>& values() {
    static const std::array<float, 256> table = [] {
      std::array<float, 256> t;
      for (u32 c = 0; c < 256; ++c) {
        const int exponent = c >> 3 & 15, mantissa = c & 7;
        const float a = std::ldexp((exponent ? 1.0f : 0.0f) + mantissa / 8.0f, (exponent ? exponent : 1) - kBias);
        const bool nan = Fnuz ? c == 0x80 : (c & 0x7f) == 0x7f;
        t[c] = nan ? std::numeric_limits<float>::quiet_NaN() : c & 0x80 ? -a : a;
      }
      return t;
    }();
    return table;
  }
  static float value(u32 bits) { return values()[bits]; }
};
using Fp8 = E4m3<false>;
using Fp8Fnuz = E4m3<true>;

int exponent_field(float x) { return std::bit_cast<u32>(x) >> 23 & 0xff; }
bool is_denormal(float x) { return exponent_field(x) == 0 && x != 0; }

// V_DIV_FIXUP_F32: quotient, denominator, numerator.
float div_fixup(float q, float d, float n) {
  const bool negative = std::signbit(d) != std::signbit(n);
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  if (n != n) return n;
  if (d != d) return d;
  if ((d == 0 && n == 0) || (std::isinf(d) && std::isinf(n))) return nan;
  if (d == 0 || std::isinf(n)) return negative ? -inf : inf;
  if (std::isinf(d) || n == 0) return negative ? -0.0f : 0.0f;
  if (std::ilogb(n) - std::ilogb(d) < -150) return negative ? -0.0f : 0.0f;
  if (q != q) q = inf;  // the quotient was beyond range: the sequence before has subtracted infinities
  return negative ? -std::fabs(q) : std::fabs(q);
}

u32 permute_bytes(u32 a, u32 b, u32 selectors) {
  u32 out = 0;
  const u64 bytes = u64{a} << 32 | b;
  for (int k = 0; k < 4; ++k) {
    const u32 s = selectors >> (8 * k) & 0xff;
    u32 byte;
    if (s < 8)
      byte = bytes >> (8 * s) & 0xff;
    else if (s < 12)
      byte = bytes >> (16 * (s - 8) + 15) & 1 ? 0xff : 0;  // sign of a half
    else
      byte = s == 12 ? 0 : 0xff;
    out |= byte << (8 * k);
  }
  return out;
}

// ---- Vector instructions that are not elementwise.

// add and subtract with carry: destination, carry out, a, b [, carry in].
template <class F>
void with_carry(Wave& w, I i) {
  const Reader<u32> a(w, i, 2, 0), b(w, i, 3, 1);
  const u64 in = i.operands.size() > 4 ? scalar64(w, i, i.operands[4]) : 0;
  Lanes low, carry;
  for (int l = 0; l < kLanes; ++l) {
    const u64 sum = F{}(u64{a(l)}, u64{b(l)}, in >> l & 1);
    low[l] = static_cast<u32>(sum), carry[l] = sum >> 32 & 1;
  }
  write_vgpr(w, i, vgpr(w, i, i.operands[0], kDestination), low);
  write_scalar64(w, i.operands[1], as_mask(w, carry));
}
template <class F>
constexpr Opcode carrying(F) {
  return {&with_carry<F>, Class::kVector};
}

// v_mad_u64_u32 and i64_i32: destination, carry out, a, b, c.
template <class Narrow, class Wide>
void multiply_add_wide(Wave& w, I i) {
  const Reader<Narrow> a(w, i, 2, 0), b(w, i, 3, 1);
  const Reader<Wide> c(w, i, 4, 2);
  Lanes lo, hi, carry;
  for (int l = 0; l < kLanes; ++l) {
    const u64 product = static_cast<u64>(Wide{a(l)} * Wide{b(l)}), sum = product + static_cast<u64>(c(l));
    lo[l] = static_cast<u32>(sum), hi[l] = static_cast<u32>(sum >> 32), carry[l] = sum < product;
  }
  const int reg = vgpr(w, i, i.operands[0], kDestination);
  write_vgpr(w, i, reg, lo);
  write_vgpr(w, i, reg + 1, hi);
  write_scalar64(w, i.operands[1], as_mask(w, carry));
}

void v_cndmask(Wave& w, I i) {
  const Reader<float> a(w, i, 1, 0), b(w, i, 2, 1);
  const u64 mask = scalar64(w, i, i.operands[3]);
  Lanes out;
  for (int l = 0; l < kLanes; ++l) out[l] = std::bit_cast<u32>(mask >> l & 1 ? b(l) : a(l));
  write_vgpr(w, i, vgpr(w, i, i.operands[0], kDestination), out);
}

// Destination, flag, the operand to scale, denominator, numerator.
void v_div_scale(Wave& w, I i) {
  const Reader<float> s(w, i, 2, 0), d(w, i, 3, 1), n(w, i, 4, 2);
  Lanes out, flag{};
  for (int l = 0; l < kLanes; ++l) {
    const float s0 = s(l), s1 = d(l), s2 = n(l);
    const bool scales_denominator = std::bit_cast<u32>(s0) == std::bit_cast<u32>(s1);
    const bool scales_numerator = std::bit_cast<u32>(s0) == std::bit_cast<u32>(s2);
    float r = s0;
    if (s2 == 0 || s1 == 0)
      r = std::numeric_limits<float>::quiet_NaN();
    else if (exponent_field(s2) - exponent_field(s1) >= 96)
      flag[l] = 1, r = scales_denominator ? std::ldexp(s0, 64) : s0;
    else if (is_denormal(s1))
      r = std::ldexp(s0, 64);
    else if (is_denormal(1 / s1) && is_denormal(s2 / s1))
      flag[l] = 1, r = scales_denominator ? std::ldexp(s0, 64) : s0;
    else if (is_denormal(1 / s1))
      r = std::ldexp(s0, -64);
    else if (is_denormal(s2 / s1))
      flag[l] = 1, r = scales_numerator ? std::ldexp(s0, 64) : s0;
    else if (exponent_field(s2) <= 23)
      r = std::ldexp(s0, 64);
    out[l] = std::bit_cast<u32>(r);
  }
  write_vgpr(w, i, vgpr(w, i, i.operands[0], kDestination), out);
  write_scalar64(w, i.operands[1], as_mask(w, flag));
}

// Undoes the scaling by 2^64 that v_div_scale flagged: of the denominator, which leaves a large quotient too small, or
// of the numerator, which leaves a small one too large.
void v_div_fmas(Wave& w, I i) {
  const Reader<float> a(w, i, 1, 0), b(w, i, 2, 1), c(w, i, 3, 2);
  const u64 flag = w.s[kVcc] | u64{w.s[kVcc + 1]} << 32;
  Lanes out;
  for (int l = 0; l < kLanes; ++l) {
    float r = std::fma(a(l), b(l), c(l));
    if (flag >> l & 1) {  // rounded once, to a subnormal perhaps
      const double exact = std::fma(static_cast<double>(a(l)), static_cast<double>(b(l)), static_cast<double>(c(l)));
      r = static_cast<float>(std::ldexp(exact, exponent_field(c(l)) > 127 ? 64 : -64));
    }
    out[l] = std::bit_cast<u32>(r);
  }
  write_vgpr(w, i, vgpr(w, i, i.operands[0], kDestination), out);
}

// v_cmp_class_f32: which of ten kinds of number, as a bit set.
void v_cmp_class(Wave& w, I i) {
  const Reader<float> a(w, i, 1, 0);
  const Reader<u32> wanted(w, i, 2, 1);
  Lanes bits;
  for (int l = 0; l < kLanes; ++l) {
    const float x = a(l);
    const bool negative = std::signbit(x);
    int kind;
    if (x != x)
      kind = std::bit_cast<u32>(x) & 0x400000 ? 1 : 0;
    else if (std::isinf(x))
      kind = negative ? 2 : 9;
    else if (x == 0)
      kind = negative ? 5 : 6;
    else if (is_denormal(x))
      kind = negative ? 4 : 7;
    else
      kind = negative ? 3 : 8;
    bits[l] = wanted(l) >> kind & 1;
  }
  write_scalar64(w, i.operands[0], as_mask(w, bits));
}

// Packed fp32: op_sel picks each source's register for the low result, op_sel_hi for the high one.
template <class F, int N>
struct Packed {
  static void execute(Wave& w, I i) {
    Lanes out[2], scratch[3];
    const uint8_t selects[2] = {i.op_sel, i.op_sel_hi}, negates[2] = {i.neg_lo, i.neg_hi};
    for (int half = 0; half < 2; ++half) {
      const u32* in[3] = {};
      for (int k = 0; k < N; ++k) {
        const Operand& op = i.operands[k + 1];
        const int which = selects[half] >> k & 1;
        if (op.kind == Operand::kVgpr) {
          in[k] = lanes32(w, i, op, k, which, true, false, scratch[k]);
        } else {
          // A scalar pair gives its two halves. A constant has no high half: the compiler selects the low one for both.
          if (op.kind == Operand::kConstant && which) fault(w, i, "high half of a constant");
          scratch[k].fill(op.kind == Operand::kConstant ? op.bits32
                                                        : static_cast<u32>(scalar64(w, i, op) >> (32 * which)));
          in[k] = scratch[k].data();
        }
        if (negates[half] >> k & 1) {
          if (in[k] != scratch[k].data()) std::copy_n(in[k], kLanes, scratch[k].data());
          for (u32& x : scratch[k]) x ^= 0x80000000;
          in[k] = scratch[k].data();
        }
      }
#pragma GCC ivdep
      for (int l = 0; l < kLanes; ++l) {
        const auto value = [&](int k) { return std::bit_cast<float>(in[k][l]); };
        if constexpr (N == 2)
          out[half][l] = std::bit_cast<u32>(F{}(value(0), value(1)));
        else
          out[half][l] = std::bit_cast<u32>(F{}(value(0), value(1), value(2)));
      }
    }
    const int reg = vgpr(w, i, i.operands[0], kDestination);
    write_vgpr(w, i, reg, out[0]);
    write_vgpr(w, i, reg + 1, out[1]);
  }
};
template <int N, class F>
constexpr Opcode packed(F) {
  return {&Packed<F, N>::execute, Class::kVector};
}

// v_pk_mov_b32: the low result from source 0, the high one from source 1.
void v_pk_mov(Wave& w, I i) {
  Lanes out[2];
  for (int half = 0; half < 2; ++half) {
    const Operand& op = i.operands[half + 1];
    const int which = i.op_sel >> half & 1;
    Lanes scratch;
    std::copy_n(lanes32(w, i, op, half, op.kind == Operand::kConstant ? 0 : which, false, op.kind != Operand::kConstant,
                        scratch),
                kLanes, out[half].data());
  }
  const int reg = vgpr(w, i, i.operands[0], kDestination);
  write_vgpr(w, i, reg, out[0]);
  write_vgpr(w, i, reg + 1, out[1]);
}

// v_cvt_pk_fp8_f32: op_sel's third bit puts the pair into the high half and leaves the low one.
template <class T>
void v_cvt_pk_fp8(Wave& w, I i) {
  const Reader<float> a(w, i, 1, 0), b(w, i, 2, 1);
  const int reg = vgpr(w, i, i.operands[0], kDestination), shift = i.op_sel >> 2 & 1 ? 16 : 0;
  Lanes out;
  for (int l = 0; l < kLanes; ++l)
    out[l] = (w.v[reg][l] & ~(0xffffu << shift)) | (T::code(a(l)) | T::code(b(l)) << 8) << shift;
  write_vgpr(w, i, reg, out);
}

// v_cvt_scalef32_pk_f32_fp8: the pair in the half that op_sel picks, times the power of two in the scale's exponent.
void v_cvt_scalef32_pk_f32_fp8(Wave& w, I i) {
  const Reader<u32> pair(w, i, 1, 0), scale(w, i, 2, 1);
  const int reg = vgpr(w, i, i.operands[0], kDestination), shift = i.op_sel & 1 ? 16 : 0;
  Lanes out[2];  // written at the end: the source may be among the destination
  for (int k = 0; k < 2; ++k)
    for (int l = 0; l < kLanes; ++l)
      out[k][l] = std::bit_cast<u32>(Fp8::values()[pair(l) >> (shift + 8 * k) & 0xff] *
                                     std::bit_cast<float>(scale(l) & 0x7f800000));
  for (int k = 0; k < 2; ++k) write_vgpr(w, i, reg + k, out[k]);
}

// v_bitop3: any function of three bits, as a table whose index is a's, b's, c's bit. With 16 bits, op_sel picks halves.
template <int Bits>
void v_bitop3(Wave& w, I i) {
  const Reader<u32> a(w, i, 1, 0), b(w, i, 2, 1), c(w, i, 3, 2);
  const int reg = vgpr(w, i, i.operands[0], kDestination);
  constexpr u32 kMask = Bits == 16 ? 0xffff : ~0u;
  const auto shift = [&](int k) { return Bits == 16 && i.op_sel >> k & 1 ? 16 : 0; };
  Lanes out;
  for (int l = 0; l < kLanes; ++l) {
    const u32 x = a(l) >> shift(0), y = b(l) >> shift(1), z = c(l) >> shift(2);
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (i.bitop3 >> k & 1) r |= (k & 4 ? x : ~x) & (k & 2 ? y : ~y) & (k & 1 ? z : ~z);
    out[l] = (w.v[reg][l] & ~(kMask << shift(3))) | (r & kMask) << shift(3);
  }
  write_vgpr(w, i, reg, out);
}

int first_active(const Wave& w) { return w.exec() ? __builtin_ctzll(w.exec()) : 0; }

void v_readfirstlane(Wave& w, I i) {
  const Reader<u32> a(w, i, 1, 0);
  w.set_scalar(i.operands[0].reg, a(first_active(w)));
}
void v_readlane(Wave& w, I i) {
  const Reader<u32> a(w, i, 1, 0);
  w.set_scalar(i.operands[0].reg, a(scalar32(w, i, i.operands[2]) & 63));
}
void v_writelane(Wave& w, I i) {
  w.v[i.operands[0].reg][scalar32(w, i, i.operands[2]) & 63] = scalar32(w, i, i.operands[1]);
}

template <int Half>  // v_mbcnt_lo, v_mbcnt_hi: how many mask bits lie below the lane, plus b
void v_mbcnt(Wave& w, I i) {
  const Reader<u32> a(w, i, 1, 0), b(w, i, 2, 1);
  Lanes out;
  for (int l = 0; l < kLanes; ++l) {
    const u64 below = (u64{1} << l) - 1;
    out[l] = b(l) + __builtin_popcount(a(l) & static_cast<u32>(below >> (32 * Half)));
  }
  write_vgpr(w, i, vgpr(w, i, i.operands[0], kDestination), out);
}

void both_registers(Wave& w, I i, int& a, int& b) {
  a = vgpr(w, i, i.operands[0], kDestination), b = vgpr(w, i, i.operands[1], 0);
  if (w.hazards) uses_vgprs(w, i, a, 1), uses_vgprs(w, i, b, 1);
}
void v_swap(Wave& w, I i) {
  int a, b;
  both_registers(w, i, a, b);
  for (int l = 0; l < kLanes; ++l)
    if (w.active(l)) std::swap(w.v[a][l], w.v[b][l]);
}
// Odd rows of 16 (or the upper 32 lanes) of the first against the even rows (the lower 32) of the second.
template <int Row>
void v_permlane_swap(Wave& w, I i) {
  if (!w.exec_full) fault(w, i, "permlane swap with inactive lanes is not modelled");
  int a, b;
  both_registers(w, i, a, b);
  for (int l = 0; l < kLanes; ++l)
    if (l & Row) std::swap(w.v[a][l], w.v[b][l ^ Row]);
}

// What a matrix instruction multiplies.
struct Bf16 {
  static constexpr int kBytes = 2;
  static float value(u32 bits) { return std::bit_cast<float>(bits << 16); }
};

// D = A * B + C. A lane holds M * K / 64 consecutive k of row (column) lane % M.
template <class T, int M, int K>
void v_mfma(Wave& w, I i) {
  constexpr int kIn = M * K / kLanes, kOut = M * M / kLanes, kPerRegister = 4 / T::kBytes, kBits = 8 * T::kBytes;
  alignas(64) float a[M][K], b[K][M], d[M][M];
  for (int side = 0; side < 2; ++side) {
    const Operand& op = i.operands[1 + side];
    if (op.kind != Operand::kVgpr || op.count * kPerRegister != kIn) fault(w, i, "unexpected width of an operand");
    const int reg = vgpr(w, i, op, side);
    if (w.hazards) uses_vgprs(w, i, reg, op.count);
    for (int l = 0; l < kLanes; ++l)
      for (int j = 0; j < kIn; ++j) {
        const u32 word = w.v[reg + j / kPerRegister][l];
        const float x = T::value(word >> (kBits * (j % kPerRegister)) & ((1u << kBits) - 1));
        const int k = kIn * (l / M) + j;
        if (side == 0)
          a[l % M][k] = x;
        else
          b[k][l % M] = x;
      }
  }
  const auto row = [](int r, int l) { return 8 * (r / 4) + 4 * (l / M) + r % 4; };
  const Operand& c = i.operands[3];
  const int from = c.kind == Operand::kVgpr ? vgpr(w, i, c, 2) : -1;
  if (w.hazards && from >= 0) uses_vgprs(w, i, from, kOut);
  for (int r = 0; r < kOut; ++r)
    for (int l = 0; l < kLanes; ++l)
      d[row(r, l)][l % M] = std::bit_cast<float>(from >= 0 ? w.v[from + r][l] : c.bits32);
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < M; ++n) d[m][n] += a[m][k] * b[k][n];
  const int to = vgpr(w, i, i.operands[0], kDestination);
  if (w.hazards) uses_vgprs(w, i, to, kOut);
  for (int r = 0; r < kOut; ++r)  // the matrix core ignores EXEC
    for (int l = 0; l < kLanes; ++l) w.v[to + r][l] = std::bit_cast<u32>(d[row(r, l)][l % M]);
}

// v_dot2c_f32_bf16: the destination is the addend.
void v_dot2c_f32_bf16(Wave& w, I i) {
  const Reader<u32> a(w, i, 1, 0), b(w, i, 2, 1);
  const int reg = vgpr(w, i, i.operands[0], kDestination);
  Lanes out;
  for (int l = 0; l < kLanes; ++l) {
    float sum = std::bit_cast<float>(w.v[reg][l]);
    for (int shift : {0, 16}) sum += Bf16::value(a(l) >> shift & 0xffff) * Bf16::value(b(l) >> shift & 0xffff);
    out[l] = std::bit_cast<u32>(sum);
  }
  write_vgpr(w, i, reg, out);
}

// ---- LDS.

std::unique_ptr<Pending> pending(Wave& w, Counter counter, Pending::Target target, int reg, int count) {
  std::unique_ptr<Pending> op(new Pending);
  op->counter = counter, op->target = target, op->reg = reg, op->count = count, op->lanes = w.exec();
  return op;
}

u32 lds_address(Wave& w, I i, const Reader<u32>& address, int lane, int offset, u32 bytes) {
  const u64 at = u64{address(lane)} + static_cast<u32>(offset);
  if (at + bytes > w.group->lds.size())
    fault(w, i,
          "LDS address " + std::to_string(at) + " of lane " + std::to_string(lane) + " is outside the " +
              std::to_string(w.group->lds.size()) + " bytes that the kernel has");
  return static_cast<u32>(at);
}

// Extends what a narrow load brings, and says which bits of the old register stay.
enum class Narrow { kNone, kU8, kI8, kU16, kI16, kU8Low, kU8High, kI8Low, kI8High, kLow, kHigh };
constexpr int narrow_bytes(Narrow n) {
  return n == Narrow::kU16 || n == Narrow::kI16 || n == Narrow::kLow || n == Narrow::kHigh ? 2 : 1;
}
u32 widen(Narrow n, u32 x) {
  switch (n) {
    case Narrow::kI8:
      return static_cast<u32>(static_cast<int8_t>(x));
    case Narrow::kI16:
      return static_cast<u32>(static_cast<int16_t>(x));
    case Narrow::kI8Low:
      return static_cast<u32>(static_cast<int8_t>(x)) & 0xffff;
    case Narrow::kI8High:
      return static_cast<u32>(static_cast<int8_t>(x)) << 16;
    case Narrow::kU8High:
    case Narrow::kHigh:
      return x << 16;
    default:
      return x;
  }
}
u32 kept_bits(Narrow n) {
  switch (n) {
    case Narrow::kU8Low:
    case Narrow::kI8Low:
    case Narrow::kLow:
      return 0xffff0000;
    case Narrow::kU8High:
    case Narrow::kI8High:
    case Narrow::kHigh:
      return 0x0000ffff;
    default:
      return 0;
  }
}

void load_lds(Wave& w, I i, Pending& op, int first, const Reader<u32>& address, int offset, u32 bytes, Narrow narrow) {
  for (int l = 0; l < kLanes; ++l) {
    if (!w.active(l)) continue;
    const u32 at = lds_address(w, i, address, l, offset, bytes);
    u32 value[4] = {};
    memcpy(value, &w.group->lds[at], bytes);
    for (u32 k = 0; k < (bytes + 3) / 4; ++k)
      op.data[first + k][l] = narrow == Narrow::kNone ? value[k] : widen(narrow, value[k]);
    if (w.hazards) reads_lds(w, i, at, bytes);
    w.group->launch->counters.lds_bytes_read += bytes;
  }
}

template <int Bytes, Narrow N = Narrow::kNone>
void ds_read(Wave& w, I i) {
  const Reader<u32> address(w, i, 1, 0);
  auto op = pending(w, Counter::kLgkm, Pending::kVgprs, i.operands[0].reg, (Bytes + 3) / 4);
  op->keep = kept_bits(N);
  load_lds(w, i, *op, 0, address, i.offset, Bytes, N);
  issue(w, i, std::move(op));
}

template <int Bytes, int Stride>  // two elements, offsets in units of Stride elements
void ds_read2(Wave& w, I i) {
  const Reader<u32> address(w, i, 1, 0);
  auto op = pending(w, Counter::kLgkm, Pending::kVgprs, i.operands[0].reg, 2 * Bytes / 4);
  load_lds(w, i, *op, 0, address, i.offset * Bytes * Stride, Bytes, Narrow::kNone);
  load_lds(w, i, *op, Bytes / 4, address, i.offset1 * Bytes * Stride, Bytes, Narrow::kNone);
  issue(w, i, std::move(op));
}

void store_lds(Wave& w, I i, const Reader<u32>& address, const Operand& data, int offset, u32 bytes, int shift = 0) {
  const int reg = vgpr(w, i, data, 1);
  if (w.hazards) uses_vgprs(w, i, reg, (bytes + 3) / 4);
  for (int l = 0; l < kLanes; ++l) {
    if (!w.active(l)) continue;
    const u32 at = lds_address(w, i, address, l, offset, bytes);
    u32 value[4];
    for (u32 k = 0; k < (bytes + 3) / 4; ++k) value[k] = w.v[reg + k][l] >> shift;
    memcpy(&w.group->lds[at], value, bytes);
    // The write gets the next number when it is issued, below.
    if (w.hazards) writes_lds(w, i, at, bytes, Counter::kLgkm, w.wait[1].issued + 1);
    w.group->launch->counters.lds_bytes_written += bytes;
  }
}

template <int Bytes, int Shift = 0>
void ds_write(Wave& w, I i) {
  const Reader<u32> address(w, i, 0, 0);
  store_lds(w, i, address, i.operands[1], i.offset, Bytes, Shift);
  issue(w, i, pending(w, Counter::kLgkm, Pending::kNothing, 0, 0));
}

template <int Bytes, int Stride>
void ds_write2(Wave& w, I i) {
  const Reader<u32> address(w, i, 0, 0);
  store_lds(w, i, address, i.operands[1], i.offset * Bytes * Stride, Bytes);
  store_lds(w, i, address, i.operands[2], i.offset1 * Bytes * Stride, Bytes);
  issue(w, i, pending(w, Counter::kLgkm, Pending::kNothing, 0, 0));
}

// In each 16 lanes, 128 bytes are a matrix of 16 columns, row by row, 8 bytes from each lane; lane c receives column c.
template <int Bits>
void ds_read_tr(Wave& w, I i) {
  const Reader<u32> address(w, i, 1, 0);
  auto op = pending(w, Counter::kLgkm, Pending::kVgprs, i.operands[0].reg, 2);
  Pending rows;
  load_lds(w, i, rows, 0, address, i.offset, 8, Narrow::kNone);
  if (!w.exec_full) fault(w, i, "transposing read with inactive lanes is not modelled");
  const auto element = [&](int l, int bit) { return u64{rows.data[bit / 32][l]} >> bit % 32 & ((1u << Bits) - 1); };
  for (int l = 0; l < kLanes; ++l) {
    u64 column = 0;
    for (int r = 0; r < 64 / Bits; ++r) {
      const int at = Bits * (16 * r + l % 16);
      column |= element((l & ~15) | at / 64, at % 64) << Bits * r;
    }
    op->data[0][l] = static_cast<u32>(column), op->data[1][l] = static_cast<u32>(column >> 32);
  }
  issue(w, i, std::move(op));
}

// Lane l receives the value of lane address[l] / 4 (0 from an inactive one): a crossbar, LDS memory is not involved.
void ds_bpermute(Wave& w, I i) {
  const Reader<u32> address(w, i, 1, 0), data(w, i, 2, 1);
  auto op = pending(w, Counter::kLgkm, Pending::kVgprs, i.operands[0].reg, 1);
  for (int l = 0; l < kLanes; ++l) {
    const int from = (address(l) + static_cast<u32>(i.offset)) / 4 & 63;
    op->data[0][l] = w.active(from) ? data(from) : 0;
  }
  issue(w, i, std::move(op));
}

// The same crossbar with a fixed pattern: within four lanes, or masks on the number of a lane within 32.
void ds_swizzle(Wave& w, I i) {
  const Reader<u32> data(w, i, 1, 0);
  auto op = pending(w, Counter::kLgkm, Pending::kVgprs, i.operands[0].reg, 1);
  const int pattern = i.immediate;
  if (pattern >= 0x8100) fault(w, i, "this swizzle is not modelled");
  for (int l = 0; l < kLanes; ++l) {
    const int from = pattern >> 15 ? (l & ~3) | (pattern >> (2 * (l & 3)) & 3)
                                   : (l & 32) | (((l & pattern & 31) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31));
    op->data[0][l] = w.active(from) ? data(from) : 0;
  }
  issue(w, i, std::move(op));
}

template <bool Returns, class F, class T>
struct LdsAtomic {
  static void execute(Wave& w, I i) {
    const Reader<u32> address(w, i, Returns ? 1 : 0, 0);
    const Reader<T> data(w, i, Returns ? 2 : 1, 1);
    auto op =
        pending(w, Counter::kLgkm, Returns ? Pending::kVgprs : Pending::kNothing, Returns ? i.operands[0].reg : 0, 1);
    for (int l = 0; l < kLanes; ++l) {
      if (!w.active(l)) continue;
      const u32 at = lds_address(w, i, address, l, i.offset, 4);
      T old;
      memcpy(&old, &w.group->lds[at], 4);
      const T now = F{}(old, data(l));
      memcpy(&w.group->lds[at], &now, 4);
      op->data[0][l] = std::bit_cast<u32>(old);
    }
    issue(w, i, std::move(op));
  }
};
template <bool Returns, class F, class T>
constexpr Opcode lds_atomic(T (F::*)(T, T) const) {
  return {&LdsAtomic<Returns, F, T>::execute, Class::kLds};
}

// ---- Global memory, through addresses or buffer descriptors.

constexpr u64 kNowhere = ~u64{0};

// Per lane, where an access goes; kNowhere for an inactive lane. Dwords of a buffer access are checked one by one.
struct Addresses {
  std::array<u64, kLanes> at;
  std::array<u32, kLanes> room;  // bytes from there on that are inside the buffer
};

// vaddr, then saddr: v[0:1], off | v0, s[0:1]. The offset is signed.
Addresses global_addresses(Wave& w, I i, int vaddr, int saddr) {
  Addresses a;
  a.room.fill(~0u);
  const Operand& base = i.operands[saddr];
  if (base.kind == Operand::kOff) {
    const Reader<u64> address(w, i, vaddr, 0);
    for (int l = 0; l < kLanes; ++l) a.at[l] = w.active(l) ? address(l) + i.offset : kNowhere;
  } else {
    const u64 origin = scalar64(w, i, base);
    const Reader<u32> offset(w, i, vaddr, 0);
    for (int l = 0; l < kLanes; ++l) a.at[l] = w.active(l) ? origin + offset(l) + i.offset : kNowhere;
  }
  return a;
}

// Raw buffers (no index): base 48 bits, num_records in bytes.
Addresses buffer_addresses(Wave& w, I i, int vaddr) {
  const Operand& descriptor = i.operands[vaddr + 1];
  if (w.hazards) uses_sgprs(w, i, descriptor.reg, 4);
  const u32* d = &w.s[descriptor.reg];
  const u64 base = d[0] | u64{d[1] & 0xffff} << 32, records = d[2];
  if (d[1] >> 31) fault(w, i, "swizzled buffers are not modelled");
  const u64 soffset = scalar32(w, i, i.operands[vaddr + 2]);
  Addresses a;
  Lanes zero{};
  const u32* voffset = zero.data();
  std::unique_ptr<Reader<u32>> reader;
  if (i.offen) reader = std::make_unique<Reader<u32>>(w, i, vaddr, 0), voffset = reader->lo;
  for (int l = 0; l < kLanes; ++l) {
    const u64 offset = u64{voffset[l]} + static_cast<u32>(i.offset) + soffset;
    a.at[l] = w.active(l) ? base + offset : kNowhere;
    a.room[l] = static_cast<u32>(std::min<u64>(offset < records ? records - offset : 0, ~0u));
  }
  return a;
}

// Where a lane's own memory is.
u64 scratch_address(Wave& w, I i, int lane, u64 at, u32 bytes) {
  const u32 each = w.group->launch->kernel->scratch_bytes;
  if (at + bytes > each)
    fault(w, i,
          "scratch address " + std::to_string(at) + " is outside the " + std::to_string(each) + " bytes of a lane");
  return reinterpret_cast<u64>(w.group->launch->scratch.data()) + u64{each} * (kLanes * w.id + lane) + at;
}

// vaddr or off, then saddr or off.
Addresses scratch_addresses(Wave& w, I i, int vaddr, int saddr, u32 bytes) {
  const u32 scalar_offset = i.operands[saddr].kind == Operand::kOff ? 0 : scalar32(w, i, i.operands[saddr]);
  Lanes zero{};
  const u32* offset = zero.data();
  std::unique_ptr<Reader<u32>> reader;
  if (i.operands[vaddr].kind != Operand::kOff)
    reader = std::make_unique<Reader<u32>>(w, i, vaddr, 0), offset = reader->lo;
  Addresses a;
  a.room.fill(~0u);
  for (int l = 0; l < kLanes; ++l) {
    const u64 at = u64{offset[l]} + scalar_offset + static_cast<i64>(i.offset);
    a.at[l] = w.active(l) ? scratch_address(w, i, l, at, bytes) : kNowhere;
  }
  return a;
}

// A lane's own memory or global memory, as the address says.
Addresses flat_addresses(Wave& w, I i, int vaddr, u32 bytes) {
  const Reader<u64> address(w, i, vaddr, 0);
  Addresses a;
  a.room.fill(~0u);
  for (int l = 0; l < kLanes; ++l) {
    const u64 at = address(l) + i.offset;
    if (w.active(l) && (at & ~u64{~0u}) == kSharedAperture) fault(w, i, "a flat address in LDS is not modelled");
    const bool own = (at & ~u64{~0u}) == kPrivateAperture;
    a.at[l] = !w.active(l) ? kNowhere : own ? scratch_address(w, i, l, at - kPrivateAperture, bytes) : at;
  }
  return a;
}

void load(Wave& w, I i, const Addresses& a, u32 bytes, Narrow narrow, Pending& op) {
  const u32 dwords = (bytes + 3) / 4;
  for (int l = 0; l < kLanes; ++l) {
    if (a.at[l] == kNowhere) continue;
    u32 value[4] = {};
    u32 inside = a.room[l] >= bytes ? bytes : bytes < 4 ? 0 : a.room[l] & ~3u;  // loads out of range give 0
    if (inside) memcpy(value, locate(w, i, a.at[l], inside, false), inside);
    for (u32 k = 0; k < dwords; ++k) op.data[k][l] = narrow == Narrow::kNone ? value[k] : widen(narrow, value[k]);
  }
}

// `operand`: of the address. With lds, lane l's data go to LDS at M0 + offset + l * bytes.
void load_into(Wave& w, I i, const Addresses& a, u32 bytes, Narrow narrow, bool lds) {
  const int dwords = static_cast<int>((bytes + 3) / 4);
  auto op = pending(w, Counter::kVm, lds ? Pending::kLds : Pending::kVgprs, lds ? 0 : i.operands[0].reg, dwords);
  op->keep = kept_bits(narrow);
  load(w, i, a, bytes, narrow, *op);
  if (lds)
    for (int l = 0; l < kLanes; ++l) {
      op->where[l] = w.s[kM0] + i.offset + l * bytes;
      if (w.active(l) && op->where[l] + bytes > w.group->lds.size()) fault(w, i, "direct load beyond the kernel's LDS");
      if (w.active(l)) w.group->launch->counters.lds_bytes_written += bytes;
    }
  issue(w, i, std::move(op));
}

void store(Wave& w, I i, const Addresses& a, const Operand& data, u32 bytes, int shift) {
  const int reg = vgpr(w, i, data, 1);
  const u32 dwords = (bytes + 3) / 4;
  if (w.hazards) uses_vgprs(w, i, reg, dwords);
  for (int l = 0; l < kLanes; ++l) {
    if (a.at[l] == kNowhere) continue;
    u32 value[4];
    for (u32 k = 0; k < dwords; ++k) value[k] = w.v[reg + k][l] >> shift;
    const u32 inside = a.room[l] >= bytes ? bytes : bytes < 4 ? 0 : a.room[l] & ~3u;  // stores out of range vanish
    if (inside) memcpy(locate(w, i, a.at[l], inside, true), value, inside);
  }
  issue(w, i, pending(w, Counter::kVm, Pending::kNothing, 0, 0));
}

template <int Bytes, Narrow N = Narrow::kNone>
void global_load(Wave& w, I i) {
  load_into(w, i, global_addresses(w, i, 1, 2), Bytes, N, false);
}
template <int Bytes>
void global_load_lds(Wave& w, I i) {
  load_into(w, i, global_addresses(w, i, 0, 1), Bytes, Narrow::kNone, true);
}
template <int Bytes, int Shift = 0>
void global_store(Wave& w, I i) {
  store(w, i, global_addresses(w, i, 0, 2), i.operands[1], Bytes, Shift);
}
template <int Bytes, Narrow N = Narrow::kNone>
void flat_load(Wave& w, I i) {
  load_into(w, i, flat_addresses(w, i, 1, Bytes), Bytes, N, false);
}
template <int Bytes>
void flat_store(Wave& w, I i) {
  store(w, i, flat_addresses(w, i, 0, Bytes), i.operands[1], Bytes, 0);
}
template <int Bytes, Narrow N = Narrow::kNone>
void scratch_load(Wave& w, I i) {
  load_into(w, i, scratch_addresses(w, i, 1, 2, Bytes), Bytes, N, false);
}
template <int Bytes, int Shift = 0>
void scratch_store(Wave& w, I i) {
  store(w, i, scratch_addresses(w, i, 0, 2, Bytes), i.operands[1], Bytes, Shift);
}
template <int Bytes, Narrow N = Narrow::kNone>
void buffer_load(Wave& w, I i) {
  load_into(w, i, buffer_addresses(w, i, i.lds ? 0 : 1), Bytes, N, i.lds);
}
template <int Bytes, int Shift = 0>
void buffer_store(Wave& w, I i) {
  store(w, i, buffer_addresses(w, i, 1), i.operands[0], Bytes, Shift);
}

template <class F, class T>
struct GlobalAtomic {
  static void execute(Wave& w, I i) {
    const int vaddr = i.returns ? 1 : 0;
    const Addresses a = global_addresses(w, i, vaddr, vaddr + 2);
    const Reader<T> data(w, i, vaddr + 1, 1);
    auto op = pending(w, Counter::kVm, i.returns ? Pending::kVgprs : Pending::kNothing,
                      i.returns ? i.operands[0].reg : 0, sizeof(T) / 4);
    for (int l = 0; l < kLanes; ++l) {
      if (a.at[l] == kNowhere) continue;
      T old;
      uint8_t* p = locate(w, i, a.at[l], sizeof(T), true);
      memcpy(&old, p, sizeof(T));
      const T now = F{}(old, data(l));
      memcpy(p, &now, sizeof(T));
      u32 bits[sizeof(T) / 4];
      memcpy(bits, &old, sizeof(T));
      for (size_t k = 0; k < sizeof(T) / 4; ++k) op->data[k][l] = bits[k];
    }
    issue(w, i, std::move(op));
  }
};
template <class F, class T>
constexpr Opcode global_atomic(T (F::*)(T, T) const) {
  return {&GlobalAtomic<F, T>::execute, Class::kGlobal};
}

// Data are the new value and, behind it, the one that the old must equal.
template <class T>
void global_atomic_cmpswap(Wave& w, I i) {
  const int vaddr = i.returns ? 1 : 0, words = sizeof(T) / 4;
  const Addresses a = global_addresses(w, i, vaddr, vaddr + 2);
  const int data = vgpr(w, i, i.operands[vaddr + 1], 1);
  if (w.hazards) uses_vgprs(w, i, data, 2 * words);
  auto op = pending(w, Counter::kVm, i.returns ? Pending::kVgprs : Pending::kNothing, i.returns ? i.operands[0].reg : 0,
                    words);
  for (int l = 0; l < kLanes; ++l) {
    if (a.at[l] == kNowhere) continue;
    u32 old[words], now[words], expected[words];
    uint8_t* p = locate(w, i, a.at[l], sizeof(T), true);
    memcpy(old, p, sizeof(T));
    for (int k = 0; k < words; ++k)
      now[k] = w.v[data + k][l], expected[k] = w.v[data + words + k][l], op->data[k][l] = old[k];
    if (memcmp(old, expected, sizeof(T)) == 0) memcpy(p, now, sizeof(T));
  }
  issue(w, i, std::move(op));
}

// s_load: destination, base, offset (a constant or a register, plus offset:).
template <int Dwords>
void s_load(Wave& w, I i) {
  u64 address = (scalar64(w, i, i.operands[1]) & kAddressMask) + i.offset;
  if (i.operands.size() > 2) address += static_cast<i64>(static_cast<i32>(scalar32(w, i, i.operands[2])));
  auto op = pending(w, Counter::kLgkm, Pending::kSgprs, i.operands[0].reg, Dwords);
  memcpy(op->scalars.data(), locate(w, i, address & ~u64{3}, 4 * Dwords, false), 4 * Dwords);
  issue(w, i, std::move(op));
}

// ---- Control.

void nothing(Wave&, I) {}
void s_endpgm(Wave& w, I) { w.done = true; }
void s_barrier(Wave& w, I) { w.at_barrier = true; }
void s_branch(Wave& w, I i) { w.pc = i.target; }

template <class F>
constexpr Opcode branch_if(F) {
  return {[](Wave& w, I i) {
            if (F{}(w)) w.pc = i.target;
          },
          Class::kControl};
}

void s_waitcnt(Wave& w, I i) {
  wait_for(w, i, Counter::kVm, (i.immediate & 0xf) | (i.immediate >> 14 << 4));
  wait_for(w, i, Counter::kLgkm, i.immediate >> 8 & 0xf);
}

void s_set_gpr_idx_on(Wave& w, I i) {
  w.gpr_index = true;
  w.s[kM0] = (w.s[kM0] & 0xffff0f00) | (scalar32(w, i, i.operands[0]) & 0xff) | u32{i.gpr_index_mode} << 12;
}
void s_set_gpr_idx_off(Wave& w, I) { w.gpr_index = false; }

// SOPK: one register and a 16-bit constant.
template <class F>
constexpr Opcode with_constant(F) {
  return {[](Wave& w, I i) {
            const u32 old = scalar32(w, i, i.operands[0]);
            const u32 now = F{}(w.scc, old, i.immediate);
            if (now != old) w.set_scalar(i.operands[0].reg, now);
          },
          Class::kScalar};
}

// s_and_saveexec_b64 and its kin: the old EXEC goes to the destination, the new one is f(source, old).
template <class F>
constexpr Opcode saving_exec(F) {
  return {[](Wave& w, I i) {
            const u64 old = w.exec(), now = F{}(scalar64(w, i, i.operands[1]), old);
            write_scalar64(w, i.operands[0], old);
            w.set_exec(now);
            w.scc = now != 0;
          },
          Class::kScalar};
}

// A program knows its instructions by their offset in its image.
u64 next_address(const Wave& w) {
  const Program& program = *w.group->launch->program;
  return reinterpret_cast<u64>(program.image.get()) + program.instructions[w.pc].address;
}
void jump(Wave& w, I i, u64 address) {
  const Program& program = *w.group->launch->program;
  const auto to = program.by_address.find(address - reinterpret_cast<u64>(program.image.get()));
  if (to == program.by_address.end()) fault(w, i, "jump into nothing");
  w.pc = to->second;
}
void s_getpc(Wave& w, I i) { write_scalar64(w, i.operands[0], next_address(w)); }
void s_setpc(Wave& w, I i) { jump(w, i, scalar64(w, i, i.operands[0])); }
void s_swappc(Wave& w, I i) {
  const u64 to = scalar64(w, i, i.operands[1]);
  write_scalar64(w, i.operands[0], next_address(w));
  jump(w, i, to);
}

void s_trap(Wave& w, I i) { fault(w, i, "the kernel trapped"); }

// ---- The table.

using Table = std::unordered_map<std::string, Opcode>;

template <class T>
void add_comparisons(Table& t, const std::string& type) {
  const auto add = [&](const std::string& name, auto f) {
    using F = decltype(f);
    t["v_cmp_" + name + "_" + type] = comparison<false>(&F::operator());
    t["v_cmpx_" + name + "_" + type] = comparison<true>(&F::operator());
  };
  add("lt", [](T a, T b) { return a < b; });
  add("eq", [](T a, T b) { return a == b; });
  add("le", [](T a, T b) { return a <= b; });
  add("gt", [](T a, T b) { return a > b; });
  add("ge", [](T a, T b) { return a >= b; });
  if constexpr (std::is_floating_point_v<T>) {
    add("lg", [](T a, T b) { return a < b || a > b; });
    add("o", [](T a, T b) { return a == a && b == b; });
    add("u", [](T a, T b) { return a != a || b != b; });
    add("nlt", [](T a, T b) { return !(a < b); });
    add("neq", [](T a, T b) { return !(a == b); });
    add("nle", [](T a, T b) { return !(a <= b); });
    add("ngt", [](T a, T b) { return !(a > b); });
    add("nge", [](T a, T b) { return !(a >= b); });
    add("nlg", [](T a, T b) { return !(a < b || a > b); });
  } else {
    add("ne", [](T a, T b) { return a != b; });
  }
}

void add_vector(Table& t) {
  t.insert({
      {"v_mov_b32", lanes([](u32 a) { return a; })},
      {"v_mov_b64", lanes([](u64 a) { return a; })},
      {"v_accvgpr_read_b32", lanes([](u32 a) { return a; })},
      {"v_accvgpr_write_b32", lanes([](u32 a) { return a; })},
      {"v_accvgpr_mov_b32", lanes([](u32 a) { return a; })},
      {"v_not_b32", lanes([](u32 a) { return ~a; })},
      {"v_and_b32", lanes([](u32 a, u32 b) { return a & b; })},
      {"v_or_b32", lanes([](u32 a, u32 b) { return a | b; })},
      {"v_xor_b32", lanes([](u32 a, u32 b) { return a ^ b; })},
      {"v_xnor_b32", lanes([](u32 a, u32 b) { return ~(a ^ b); })},
      {"v_or3_b32", lanes([](u32 a, u32 b, u32 c) { return a | b | c; })},
      {"v_and_or_b32", lanes([](u32 a, u32 b, u32 c) { return (a & b) | c; })},
      {"v_bfi_b32", lanes([](u32 a, u32 b, u32 c) { return (a & b) | (~a & c); })},
      {"v_bfe_u32", lanes([](u32 a, u32 b, u32 c) { return bfe(a, b & 31, c & 31); })},
      {"v_bfe_i32", lanes([](i32 a, u32 b, u32 c) { return bfe_signed(a, b & 31, c & 31); })},
      {"v_bfm_b32", lanes([](u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); })},
      {"v_bfrev_b32", lanes([](u32 a) {
         u32 r = 0;
         for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
         return r;
       })},
      {"v_bcnt_u32_b32", lanes([](u32 a, u32 b) { return static_cast<u32>(__builtin_popcount(a)) + b; })},
      {"v_ffbh_u32", lanes([](u32 a) { return find_high(a); })},
      {"v_ffbl_b32", lanes([](u32 a) { return find_low(a); })},
      {"v_alignbit_b32", lanes([](u32 a, u32 b, u32 c) { return static_cast<u32>((u64{a} << 32 | b) >> (c & 31)); })},
      {"v_alignbyte_b32",
       lanes([](u32 a, u32 b, u32 c) { return static_cast<u32>((u64{a} << 32 | b) >> (8 * (c & 3))); })},
      {"v_perm_b32", lanes([](u32 a, u32 b, u32 c) { return permute_bytes(a, b, c); })},

      {"v_lshlrev_b32", lanes([](u32 a, u32 b) { return b << (a & 31); })},
      {"v_lshrrev_b32", lanes([](u32 a, u32 b) { return b >> (a & 31); })},
      {"v_ashrrev_i32", lanes([](u32 a, i32 b) { return b >> (a & 31); })},
      {"v_lshlrev_b64", lanes([](u32 a, u64 b) { return b << (a & 63); })},
      {"v_lshrrev_b64", lanes([](u32 a, u64 b) { return b >> (a & 63); })},
      {"v_ashrrev_i64", lanes([](u32 a, i64 b) { return b >> (a & 63); })},
      {"v_lshlrev_b16", lanes([](u16 a, u16 b) { return static_cast<u16>(b << (a & 15)); })},
      {"v_lshrrev_b16", lanes([](u16 a, u16 b) { return static_cast<u16>(b >> (a & 15)); })},
      {"v_ashrrev_i16", lanes([](u16 a, i16 b) { return static_cast<u16>(b >> (a & 15)); })},
      {"v_lshl_or_b32", lanes([](u32 a, u32 b, u32 c) { return a << (b & 31) | c; })},
      {"v_lshl_add_u32", lanes([](u32 a, u32 b, u32 c) { return (a << (b & 31)) + c; })},
      {"v_add_lshl_u32", lanes([](u32 a, u32 b, u32 c) { return (a + b) << (c & 31); })},
      {"v_xad_u32", lanes([](u32 a, u32 b, u32 c) { return (a ^ b) + c; })},
      {"v_lshl_add_u64", lanes([](u64 a, u32 b, u64 c) { return (a << (b & 7)) + c; })},

      {"v_add_u32", lanes([](u32 a, u32 b) { return a + b; })},
      {"v_add_i32", lanes([](u32 a, u32 b) { return a + b; })},
      {"v_sub_u32", lanes([](u32 a, u32 b) { return a - b; })},
      {"v_sub_i32", lanes([](u32 a, u32 b) { return a - b; })},
      {"v_subrev_u32", lanes([](u32 a, u32 b) { return b - a; })},
      {"v_add3_u32", lanes([](u32 a, u32 b, u32 c) { return a + b + c; })},
      {"v_add_u16", lanes([](u16 a, u16 b) { return static_cast<u16>(a + b); })},
      {"v_sub_u16", lanes([](u16 a, u16 b) { return static_cast<u16>(a - b); })},
      {"v_subrev_u16", lanes([](u16 a, u16 b) { return static_cast<u16>(b - a); })},
      {"v_mul_lo_u16", lanes([](u16 a, u16 b) { return static_cast<u16>(u32{a} * b); })},
      {"v_mul_lo_u32", lanes([](u32 a, u32 b) { return a * b; })},
      {"v_mul_hi_u32", lanes([](u32 a, u32 b) { return static_cast<u32>(u64{a} * b >> 32); })},
      {"v_mul_hi_i32", lanes([](i32 a, i32 b) { return static_cast<i32>(i64{a} * b >> 32); })},
      {"v_mul_hi_u32_u24",
       lanes([](u32 a, u32 b) { return static_cast<u32>(u64{a & 0xffffff} * (b & 0xffffff) >> 32); })},
      {"v_mul_u32_u24", lanes([](u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); })},
      {"v_mul_i32_i24", lanes([](u32 a, u32 b) { return static_cast<u32>(low24(a)) * static_cast<u32>(low24(b)); })},
      {"v_mad_u32_u24", lanes([](u32 a, u32 b, u32 c) { return (a & 0xffffff) * (b & 0xffffff) + c; })},
      {"v_mad_i32_i24",
       lanes([](u32 a, u32 b, u32 c) { return static_cast<u32>(low24(a)) * static_cast<u32>(low24(b)) + c; })},
      {"v_mad_u32_u16", lanes([](u16 a, u16 b, u32 c) { return u32{a} * b + c; })},
      {"v_max_i32", lanes([](i32 a, i32 b) { return std::max(a, b); })},
      {"v_min_i32", lanes([](i32 a, i32 b) { return std::min(a, b); })},
      {"v_max_u32", lanes([](u32 a, u32 b) { return std::max(a, b); })},
      {"v_min_u32", lanes([](u32 a, u32 b) { return std::min(a, b); })},
      {"v_max_i16", lanes([](i16 a, i16 b) { return std::max(a, b); })},
      {"v_min_i16", lanes([](i16 a, i16 b) { return std::min(a, b); })},
      {"v_max_u16", lanes([](u16 a, u16 b) { return std::max(a, b); })},
      {"v_min_u16", lanes([](u16 a, u16 b) { return std::min(a, b); })},
      {"v_max3_i32", lanes([](i32 a, i32 b, i32 c) { return std::max(std::max(a, b), c); })},
      {"v_min3_i32", lanes([](i32 a, i32 b, i32 c) { return std::min(std::min(a, b), c); })},
      {"v_max3_u32", lanes([](u32 a, u32 b, u32 c) { return std::max(std::max(a, b), c); })},
      {"v_min3_u32", lanes([](u32 a, u32 b, u32 c) { return std::min(std::min(a, b), c); })},
      {"v_med3_i32", lanes([](i32 a, i32 b, i32 c) { return std::max(std::min(a, b), std::min(std::max(a, b), c)); })},
      {"v_med3_u32", lanes([](u32 a, u32 b, u32 c) { return std::max(std::min(a, b), std::min(std::max(a, b), c)); })},
      {"v_sad_u32", lanes([](u32 a, u32 b, u32 c) { return (a > b ? a - b : b - a) + c; })},

      {"v_add_f32", lanes([](float a, float b) { return a + b; })},
      {"v_sub_f32", lanes([](float a, float b) { return a - b; })},
      {"v_subrev_f32", lanes([](float a, float b) { return b - a; })},
      {"v_mul_f32", lanes([](float a, float b) { return a * b; })},
      {"v_fma_f32", lanes([](float a, float b, float c) { return std::fma(a, b, c); })},
      {"v_fmaak_f32", lanes([](float a, float b, float c) { return std::fma(a, b, c); })},
      {"v_fmamk_f32", lanes([](float a, float b, float c) { return std::fma(a, b, c); })},
      {"v_max_f32", lanes([](float a, float b) { return max_number(a, b); })},
      {"v_min_f32", lanes([](float a, float b) { return min_number(a, b); })},
      {"v_max3_f32", lanes([](float a, float b, float c) { return max_number(max_number(a, b), c); })},
      {"v_min3_f32", lanes([](float a, float b, float c) { return min_number(min_number(a, b), c); })},
      {"v_maximum3_f32", lanes([](float a, float b, float c) { return maximum(maximum(a, b), c); })},
      {"v_minimum3_f32", lanes([](float a, float b, float c) { return minimum(minimum(a, b), c); })},
      {"v_med3_f32", lanes([](float a, float b, float c) {
         if (a != a || b != b || c != c) return min_number(min_number(a, b), c);
         return max_number(min_number(a, b), min_number(max_number(a, b), c));
       })},
      {"v_add_f64", lanes([](double a, double b) { return a + b; })},
      {"v_mul_f64", lanes([](double a, double b) { return a * b; })},
      {"v_fma_f64", lanes([](double a, double b, double c) { return std::fma(a, b, c); })},
      {"v_exp_f32", lanes([](float a) { return std::exp2(a); })},
      {"v_log_f32", lanes([](float a) { return std::log2(a); })},
      {"v_rcp_f32", lanes([](float a) { return 1.0f / a; })},
      {"v_rcp_iflag_f32", lanes([](float a) { return 1.0f / a; })},
      {"v_rsq_f32", lanes([](float a) { return 1.0f / std::sqrt(a); })},
      {"v_sqrt_f32", lanes([](float a) { return std::sqrt(a); })},
      {"v_ldexp_f32", lanes([](float a, i32 b) { return std::ldexp(a, b); })},
      {"v_frexp_mant_f32", lanes([](float a) {
         int e;
         return std::isfinite(a) ? std::frexp(a, &e) : a;
       })},
      {"v_frexp_exp_i32_f32", lanes([](float a) {
         int e = 0;
         if (std::isfinite(a)) std::frexp(a, &e);
         return i32{e};
       })},
      {"v_floor_f32", lanes([](float a) { return std::floor(a); })},
      {"v_ceil_f32", lanes([](float a) { return std::ceil(a); })},
      {"v_trunc_f32", lanes([](float a) { return std::trunc(a); })},
      {"v_rndne_f32", lanes([](float a) { return std::nearbyint(a); })},
      {"v_fract_f32", lanes([](float a) { return a - std::floor(a); })},
      {"v_div_fixup_f32", lanes([](float q, float d, float n) { return div_fixup(q, d, n); })},
      {"v_cvt_f32_u32", lanes([](u32 a) { return static_cast<float>(a); })},
      {"v_cvt_f32_i32", lanes([](i32 a) { return static_cast<float>(a); })},
      {"v_cvt_u32_f32", lanes([](float a) { return to_unsigned(a); })},
      {"v_cvt_i32_f32", lanes([](float a) { return to_signed(a); })},
      {"v_cvt_f32_ubyte0", lanes([](u32 a) { return static_cast<float>(a & 0xff); })},
      {"v_cvt_f32_ubyte1", lanes([](u32 a) { return static_cast<float>(a >> 8 & 0xff); })},
      {"v_cvt_f32_ubyte2", lanes([](u32 a) { return static_cast<float>(a >> 16 & 0xff); })},
      {"v_cvt_f32_ubyte3", lanes([](u32 a) { return static_cast<float>(a >> 24); })},
      {"v_cvt_f64_f32", lanes([](float a) { return static_cast<double>(a); })},
      {"v_cvt_f64_u32", lanes([](u32 a) { return static_cast<double>(a); })},
      {"v_cvt_f64_i32", lanes([](i32 a) { return static_cast<double>(a); })},
      {"v_cvt_f32_f64", lanes([](double a) { return static_cast<float>(a); })},
      {"v_cvt_f32_fp8", lanes([](u32 a) { return Fp8::values()[a & 0xff]; })},
      {"v_cvt_pk_bf16_f32", lanes([](float a, float b) { return to_bf16(a) | to_bf16(b) << 16; })},

      {"v_add_co_u32", carrying([](u64 a, u64 b, u64 c) { return a + b + c; })},
      {"v_addc_co_u32", carrying([](u64 a, u64 b, u64 c) { return a + b + c; })},
      {"v_sub_co_u32", carrying([](u64 a, u64 b, u64 c) { return a - b - c; })},
      {"v_subb_co_u32", carrying([](u64 a, u64 b, u64 c) { return a - b - c; })},
      {"v_subrev_co_u32", carrying([](u64 a, u64 b, u64 c) { return b - a - c; })},
      {"v_subbrev_co_u32", carrying([](u64 a, u64 b, u64 c) { return b - a - c; })},

      {"v_pk_mul_f32", packed<2>([](float a, float b) { return a * b; })},
      {"v_pk_add_f32", packed<2>([](float a, float b) { return a + b; })},
      {"v_pk_fma_f32", packed<3>([](float a, float b, float c) { return std::fma(a, b, c); })},
  });
  // v_fmac d, a, b: the destination is the addend. As text it has two sources, so it is not in the form of the others.
  t["v_fmac_f32"] = {[](Wave& w, I i) {
                       const Reader<float> a(w, i, 1, 0), b(w, i, 2, 1);
                       const int reg = vgpr(w, i, i.operands[0], kDestination);
                       Lanes out;
                       for (int l = 0; l < kLanes; ++l)
                         out[l] = std::bit_cast<u32>(std::fma(a(l), b(l), std::bit_cast<float>(w.v[reg][l])));
                       write_vgpr(w, i, reg, out);
                     },
                     Class::kVector};
  const std::pair<const char*, void (*)(Wave&, I)> others[] = {
      {"v_mad_u64_u32", &multiply_add_wide<u32, u64>},
      {"v_mad_i64_i32", &multiply_add_wide<i32, i64>},
      {"v_cndmask_b32", &v_cndmask},
      {"v_div_scale_f32", &v_div_scale},
      {"v_div_fmas_f32", &v_div_fmas},
      {"v_pk_mov_b32", &v_pk_mov},
      {"v_cvt_pk_fp8_f32", &v_cvt_pk_fp8<Fp8>},
      {"v_cvt_pk_fp8_f32 fnuz", &v_cvt_pk_fp8<Fp8Fnuz>},
      {"v_cvt_scalef32_pk_f32_fp8", &v_cvt_scalef32_pk_f32_fp8},
      {"v_bitop3_b16", &v_bitop3<16>},
      {"v_bitop3_b32", &v_bitop3<32>},
      {"v_dot2c_f32_bf16", &v_dot2c_f32_bf16},
      {"v_readfirstlane_b32", &v_readfirstlane},
      {"v_readlane_b32", &v_readlane},
      {"v_writelane_b32", &v_writelane},
      {"v_mbcnt_lo_u32_b32", &v_mbcnt<0>},
      {"v_mbcnt_hi_u32_b32", &v_mbcnt<1>},
      {"v_swap_b32", &v_swap},
      {"v_permlane16_swap_b32", &v_permlane_swap<16>},
      {"v_permlane32_swap_b32", &v_permlane_swap<32>},
      {"v_cmp_class_f32", &v_cmp_class},
      {"v_nop", &nothing}};
  for (auto [name, execute] : others) t[name] = {execute, Class::kVector};
  t["v_mfma_f32_16x16x32_fp8_fp8"] = {&v_mfma<Fp8, 16, 32>, Class::kMatrix};
  t["v_mfma_f32_16x16x32_fp8_fp8 fnuz"] = {&v_mfma<Fp8Fnuz, 16, 32>, Class::kMatrix};
  t["v_mfma_f32_16x16x128_f8f6f4"] = {&v_mfma<Fp8, 16, 128>, Class::kMatrix};
  t["v_mfma_f32_32x32x64_f8f6f4"] = {&v_mfma<Fp8, 32, 64>, Class::kMatrix};
  t["v_mfma_f32_16x16x16_bf16"] = {&v_mfma<Bf16, 16, 16>, Class::kMatrix};
  t["v_mfma_f32_16x16x32_bf16"] = {&v_mfma<Bf16, 16, 32>, Class::kMatrix};
  t["v_mfma_f32_32x32x8_bf16"] = {&v_mfma<Bf16, 32, 8>, Class::kMatrix};
  t["v_mfma_f32_32x32x16_bf16"] = {&v_mfma<Bf16, 32, 16>, Class::kMatrix};
  add_comparisons<i32>(t, "i32");
  add_comparisons<u32>(t, "u32");
  add_comparisons<i64>(t, "i64");
  add_comparisons<u64>(t, "u64");
  add_comparisons<i16>(t, "i16");
  add_comparisons<u16>(t, "u16");
  add_comparisons<float>(t, "f32");
  add_comparisons<double>(t, "f64");
}

template <class T>
void add_scalar_comparisons(Table& t, const std::string& type) {
  // SOPK's constant is sign-extended for i32, zero-extended for u32.
  using K = std::conditional_t<std::is_signed_v<T>, i16, u16>;
  const auto add = [&](const char* name, auto f) {
    using F = decltype(f);
    t[std::string("s_cmp_") + name + "_" + type] = scalar([](bool& scc, T a, T b) { scc = F{}(a, b); });
    t[std::string("s_cmpk_") + name + "_" + type] = with_constant([](bool& scc, u32 a, u16 k) {
      scc = F{}(static_cast<T>(a), static_cast<T>(static_cast<K>(k)));
      return a;
    });
  };
  add("eq", [](T a, T b) { return a == b; });
  add("lg", [](T a, T b) { return a != b; });
  add("lt", [](T a, T b) { return a < b; });
  add("le", [](T a, T b) { return a <= b; });
  add("gt", [](T a, T b) { return a > b; });
  add("ge", [](T a, T b) { return a >= b; });
  const auto pick = [&](const char* name, auto f) {
    using F = decltype(f);
    t[std::string("s_") + name + "_" + type] = scalar([](bool& scc, T a, T b) {
      scc = F{}(a, b);
      return scc ? a : b;
    });
  };
  pick("min", [](T a, T b) { return a < b; });
  pick("max", [](T a, T b) { return a > b; });
}

template <class T>
struct Move {
  T operator()(bool&, T a) const { return a; }
};

template <class T>
void add_scalar_logic(Table& t, const std::string& type) {
  const auto add = [&](const char* name, auto f) { t[std::string("s_") + name + "_" + type] = nonzero(f); };
  add("and", [](T a, T b) { return a & b; });
  add("or", [](T a, T b) { return a | b; });
  add("xor", [](T a, T b) { return a ^ b; });
  add("andn2", [](T a, T b) { return a & ~b; });
  add("orn2", [](T a, T b) { return a | ~b; });
  add("nand", [](T a, T b) { return ~(a & b); });
  add("nor", [](T a, T b) { return ~(a | b); });
  add("xnor", [](T a, T b) { return ~(a ^ b); });
  add("not", [](T a) { return static_cast<T>(~a); });
  t["s_mov_" + type] = scalar(Move<T>());
  t["s_cmov_" + type] = {[](Wave& w, I i) {
                           if (w.scc) Scalar<Move<T>, T, T>::execute(w, i);
                         },
                         Class::kScalar};
  t["s_cselect_" + type] = scalar([](bool& scc, T a, T b) { return scc ? a : b; });
  t["s_brev_" + type] = scalar([](bool&, T a) {
    T r = 0;
    for (size_t k = 0; k < 8 * sizeof(T); ++k) r |= (a >> k & 1) << (8 * sizeof(T) - 1 - k);
    return r;
  });
}

void add_scalars(Table& t) {
  t.insert({
      {"s_add_u32", cut([](u64 a, u64 b, u64) { return a + b; })},
      {"s_sub_u32", cut([](u64 a, u64 b, u64) { return a - b; })},
      {"s_addc_u32", cut([](u64 a, u64 b, u64 c) { return a + b + c; })},
      {"s_subb_u32", cut([](u64 a, u64 b, u64 c) { return a - b - c; })},
      {"s_add_i32", scalar([](bool& c, i32 a, i32 b) {
         i32 r;
         c = __builtin_add_overflow(a, b, &r);
         return r;
       })},
      {"s_sub_i32", scalar([](bool& c, i32 a, i32 b) {
         i32 r;
         c = __builtin_sub_overflow(a, b, &r);
         return r;
       })},
      {"s_mul_i32", scalar([](bool&, u32 a, u32 b) { return a * b; })},
      {"s_mul_hi_u32", scalar([](bool&, u32 a, u32 b) { return static_cast<u32>(u64{a} * b >> 32); })},
      {"s_mul_hi_i32", scalar([](bool&, i32 a, i32 b) { return static_cast<i32>(i64{a} * b >> 32); })},
      {"s_abs_i32", nonzero([](u32 a) { return a >> 31 ? 0 - a : a; })},
      {"s_lshl_b32", nonzero([](u32 a, u32 b) { return a << (b & 31); })},
      {"s_lshr_b32", nonzero([](u32 a, u32 b) { return a >> (b & 31); })},
      {"s_ashr_i32", nonzero([](i32 a, u32 b) { return a >> (b & 31); })},
      {"s_lshl_b64", nonzero([](u64 a, u32 b) { return a << (b & 63); })},
      {"s_lshr_b64", nonzero([](u64 a, u32 b) { return a >> (b & 63); })},
      {"s_ashr_i64", nonzero([](i64 a, u32 b) { return a >> (b & 63); })},
      {"s_lshl1_add_u32", cut([](u64 a, u64 b, u64) { return (a << 1) + b; })},
      {"s_lshl2_add_u32", cut([](u64 a, u64 b, u64) { return (a << 2) + b; })},
      {"s_lshl3_add_u32", cut([](u64 a, u64 b, u64) { return (a << 3) + b; })},
      {"s_lshl4_add_u32", cut([](u64 a, u64 b, u64) { return (a << 4) + b; })},
      {"s_bfe_u32", nonzero([](u32 a, u32 b) { return bfe(a, b & 31, std::min(b >> 16 & 0x7f, 32u)); })},
      {"s_bfe_i32", nonzero([](i32 a, u32 b) { return bfe_signed(a, b & 31, std::min(b >> 16 & 0x7f, 32u)); })},
      {"s_bfe_u64", nonzero([](u64 a, u32 b) { return bfe64(a, b & 63, std::min(b >> 16 & 0x7f, 64u)); })},
      {"s_bfe_i64", nonzero([](u64 a, u32 b) {
         const u32 width = std::min(b >> 16 & 0x7f, 64u);
         return width ? static_cast<i64>(bfe64(a, b & 63, width) << (64 - width)) >> (64 - width) : i64{0};
       })},
      {"s_bfm_b32", scalar([](bool&, u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); })},
      {"s_sext_i32_i8", scalar([](bool&, u32 a) { return static_cast<i32>(static_cast<int8_t>(a)); })},
      {"s_sext_i32_i16", scalar([](bool&, u32 a) { return static_cast<i32>(static_cast<i16>(a)); })},
      {"s_pack_ll_b32_b16", scalar([](bool&, u32 a, u32 b) { return (a & 0xffff) | b << 16; })},
      {"s_pack_lh_b32_b16", scalar([](bool&, u32 a, u32 b) { return (a & 0xffff) | (b & 0xffff0000); })},
      {"s_pack_hh_b32_b16", scalar([](bool&, u32 a, u32 b) { return a >> 16 | (b & 0xffff0000); })},
      {"s_ff1_i32_b32", scalar([](bool&, u32 a) { return find_low(a); })},
      {"s_ff1_i32_b64", scalar([](bool&, u64 a) { return a ? static_cast<u32>(__builtin_ctzll(a)) : ~0u; })},
      {"s_flbit_i32_b32", scalar([](bool&, u32 a) { return find_high(a); })},
      {"s_flbit_i32_b64", scalar([](bool&, u64 a) { return a ? static_cast<u32>(__builtin_clzll(a)) : ~0u; })},
      {"s_bcnt1_i32_b32", nonzero([](u32 a) { return __builtin_popcount(a); })},
      {"s_bcnt1_i32_b64", nonzero([](u64 a) { return __builtin_popcountll(a); })},
      {"s_bitcmp0_b32", scalar([](bool& c, u32 a, u32 b) { c = !(a >> (b & 31) & 1); })},
      {"s_bitcmp1_b32", scalar([](bool& c, u32 a, u32 b) { c = a >> (b & 31) & 1; })},
      {"s_movk_i32", with_constant([](bool&, u32, u16 k) { return static_cast<u32>(static_cast<i16>(k)); })},
      {"s_addk_i32", with_constant([](bool& c, u32 a, u16 k) {
         i32 r;
         c = __builtin_add_overflow(static_cast<i32>(a), static_cast<i32>(static_cast<i16>(k)), &r);
         return static_cast<u32>(r);
       })},
      {"s_mulk_i32", with_constant([](bool&, u32 a, u16 k) { return a * static_cast<u32>(static_cast<i16>(k)); })},
      {"s_and_saveexec_b64", saving_exec([](u64 s, u64 e) { return s & e; })},
      {"s_or_saveexec_b64", saving_exec([](u64 s, u64 e) { return s | e; })},
      {"s_xor_saveexec_b64", saving_exec([](u64 s, u64 e) { return s ^ e; })},
      {"s_andn2_saveexec_b64", saving_exec([](u64 s, u64 e) { return s & ~e; })},
      {"s_getpc_b64", {&s_getpc, Class::kScalar}},
      {"s_setpc_b64", {&s_setpc, Class::kControl}},
      {"s_swappc_b64", {&s_swappc, Class::kControl}},
  });
  add_scalar_logic<u32>(t, "b32");
  add_scalar_logic<u64>(t, "b64");
  add_scalar_comparisons<u32>(t, "u32");
  add_scalar_comparisons<i32>(t, "i32");
  t["s_cmp_eq_u64"] = scalar([](bool& scc, u64 a, u64 b) { scc = a == b; });
  t["s_cmp_lg_u64"] = scalar([](bool& scc, u64 a, u64 b) { scc = a != b; });
  const std::pair<const char*, void (*)(Wave&, I)> control[] = {{"s_nop", &nothing},
                                                                {"s_sleep", &nothing},
                                                                {"s_setprio", &nothing},
                                                                {"s_icache_inv", &nothing},
                                                                {"s_dcache_inv", &nothing},
                                                                {"s_dcache_wb", &nothing},
                                                                {"s_endpgm", &s_endpgm},
                                                                {"s_barrier", &s_barrier},
                                                                {"s_branch", &s_branch},
                                                                {"s_waitcnt", &s_waitcnt},
                                                                {"s_trap", &s_trap},
                                                                {"s_set_gpr_idx_on", &s_set_gpr_idx_on},
                                                                {"s_set_gpr_idx_off", &s_set_gpr_idx_off}};
  for (auto [name, execute] : control) t[name] = {execute, Class::kControl};
  t["s_cbranch_scc0"] = branch_if([](const Wave& w) { return !w.scc; });
  t["s_cbranch_scc1"] = branch_if([](const Wave& w) { return w.scc; });
  t["s_cbranch_vccz"] = branch_if([](const Wave& w) { return (w.s[kVcc] | w.s[kVcc + 1]) == 0; });
  t["s_cbranch_vccnz"] = branch_if([](const Wave& w) { return (w.s[kVcc] | w.s[kVcc + 1]) != 0; });
  t["s_cbranch_execz"] = branch_if([](const Wave& w) { return w.exec() == 0; });
  t["s_cbranch_execnz"] = branch_if([](const Wave& w) { return w.exec() != 0; });
}

void add_memory(Table& t) {
  const std::pair<const char*, void (*)(Wave&, I)> scalar_loads[] = {
      {"s_load_dword", &s_load<1>},   {"s_load_dwordx2", &s_load<2>}, {"s_load_dwordx3", &s_load<3>},
      {"s_load_dwordx4", &s_load<4>}, {"s_load_dwordx8", &s_load<8>}, {"s_load_dwordx16", &s_load<16>}};
  for (auto [name, execute] : scalar_loads) t[name] = {execute, Class::kScalarMemory};

  const std::pair<const char*, void (*)(Wave&, I)> lds[] = {{"ds_read_b32", &ds_read<4>},
                                                            {"ds_read_b64", &ds_read<8>},
                                                            {"ds_read_b96", &ds_read<12>},
                                                            {"ds_read_b128", &ds_read<16>},
                                                            {"ds_read_u8", &ds_read<1, Narrow::kU8>},
                                                            {"ds_read_i8", &ds_read<1, Narrow::kI8>},
                                                            {"ds_read_u16", &ds_read<2, Narrow::kU16>},
                                                            {"ds_read_i16", &ds_read<2, Narrow::kI16>},
                                                            {"ds_read_u16_d16", &ds_read<2, Narrow::kLow>},
                                                            {"ds_read_u16_d16_hi", &ds_read<2, Narrow::kHigh>},
                                                            {"ds_read2_b32", &ds_read2<4, 1>},
                                                            {"ds_read2_b64", &ds_read2<8, 1>},
                                                            {"ds_read2st64_b32", &ds_read2<4, 64>},
                                                            {"ds_read2st64_b64", &ds_read2<8, 64>},
                                                            {"ds_write_b8", &ds_write<1>},
                                                            {"ds_write_b16", &ds_write<2>},
                                                            {"ds_write_b8_d16_hi", &ds_write<1, 16>},
                                                            {"ds_write_b16_d16_hi", &ds_write<2, 16>},
                                                            {"ds_write_b32", &ds_write<4>},
                                                            {"ds_write_b64", &ds_write<8>},
                                                            {"ds_write_b96", &ds_write<12>},
                                                            {"ds_write_b128", &ds_write<16>},
                                                            {"ds_write2_b32", &ds_write2<4, 1>},
                                                            {"ds_write2_b64", &ds_write2<8, 1>},
                                                            {"ds_write2st64_b32", &ds_write2<4, 64>},
                                                            {"ds_write2st64_b64", &ds_write2<8, 64>},
                                                            {"ds_read_b64_tr_b8", &ds_read_tr<8>},
                                                            {"ds_read_b64_tr_b16", &ds_read_tr<16>},
                                                            {"ds_bpermute_b32", &ds_bpermute},
                                                            {"ds_swizzle_b32", &ds_swizzle}};
  for (auto [name, execute] : lds) t[name] = {execute, Class::kLds};

  const std::pair<const char*, std::array<void (*)(Wave&, I), 6>> loads[] = {
      {"dword",
       {&global_load<4>, &buffer_load<4>, &scratch_load<4>, &global_store<4>, &buffer_store<4>, &scratch_store<4>}},
      {"dwordx2",
       {&global_load<8>, &buffer_load<8>, &scratch_load<8>, &global_store<8>, &buffer_store<8>, &scratch_store<8>}},
      {"dwordx3",
       {&global_load<12>, &buffer_load<12>, &scratch_load<12>, &global_store<12>, &buffer_store<12>,
        &scratch_store<12>}},
      {"dwordx4",
       {&global_load<16>, &buffer_load<16>, &scratch_load<16>, &global_store<16>, &buffer_store<16>,
        &scratch_store<16>}},
      {"ubyte", {&global_load<1, Narrow::kU8>, &buffer_load<1, Narrow::kU8>, &scratch_load<1, Narrow::kU8>}},
      {"sbyte", {&global_load<1, Narrow::kI8>, &buffer_load<1, Narrow::kI8>, &scratch_load<1, Narrow::kI8>}},
      {"ushort", {&global_load<2, Narrow::kU16>, &buffer_load<2, Narrow::kU16>, &scratch_load<2, Narrow::kU16>}},
      {"sshort", {&global_load<2, Narrow::kI16>, &buffer_load<2, Narrow::kI16>, &scratch_load<2, Narrow::kI16>}},
      {"ubyte_d16",
       {&global_load<1, Narrow::kU8Low>, &buffer_load<1, Narrow::kU8Low>, &scratch_load<1, Narrow::kU8Low>}},
      {"ubyte_d16_hi",
       {&global_load<1, Narrow::kU8High>, &buffer_load<1, Narrow::kU8High>, &scratch_load<1, Narrow::kU8High>}},
      {"sbyte_d16",
       {&global_load<1, Narrow::kI8Low>, &buffer_load<1, Narrow::kI8Low>, &scratch_load<1, Narrow::kI8Low>}},
      {"sbyte_d16_hi",
       {&global_load<1, Narrow::kI8High>, &buffer_load<1, Narrow::kI8High>, &scratch_load<1, Narrow::kI8High>}},
      {"short_d16", {&global_load<2, Narrow::kLow>, &buffer_load<2, Narrow::kLow>, &scratch_load<2, Narrow::kLow>}},
      {"short_d16_hi",
       {&global_load<2, Narrow::kHigh>, &buffer_load<2, Narrow::kHigh>, &scratch_load<2, Narrow::kHigh>,
        &global_store<2, 16>, &buffer_store<2, 16>, &scratch_store<2, 16>}},
      {"byte", {nullptr, nullptr, nullptr, &global_store<1>, &buffer_store<1>, &scratch_store<1>}},
      {"byte_d16_hi", {nullptr, nullptr, nullptr, &global_store<1, 16>, &buffer_store<1, 16>, &scratch_store<1, 16>}},
      {"short", {nullptr, nullptr, nullptr, &global_store<2>, &buffer_store<2>, &scratch_store<2>}}};
  for (const auto& [name, execute] : loads) {
    const char* prefixes[] = {"global_load_",  "buffer_load_",  "scratch_load_",
                              "global_store_", "buffer_store_", "scratch_store_"};
    for (int k = 0; k < 6; ++k)
      if (execute[k]) t[std::string(prefixes[k]) + name] = {execute[k], Class::kGlobal};
  }
  const std::pair<const char*, void (*)(Wave&, I)> flat[] = {{"load_dword", &flat_load<4>},
                                                             {"load_dwordx2", &flat_load<8>},
                                                             {"load_dwordx3", &flat_load<12>},
                                                             {"load_dwordx4", &flat_load<16>},
                                                             {"load_ubyte", &flat_load<1, Narrow::kU8>},
                                                             {"load_sbyte", &flat_load<1, Narrow::kI8>},
                                                             {"load_ushort", &flat_load<2, Narrow::kU16>},
                                                             {"load_sshort", &flat_load<2, Narrow::kI16>},
                                                             {"store_dword", &flat_store<4>},
                                                             {"store_dwordx2", &flat_store<8>},
                                                             {"store_dwordx3", &flat_store<12>},
                                                             {"store_dwordx4", &flat_store<16>},
                                                             {"store_byte", &flat_store<1>},
                                                             {"store_short", &flat_store<2>}};
  for (auto [name, execute] : flat) t[std::string("flat_") + name] = {execute, Class::kGlobal};
  t["global_load_lds_dword"] = {&global_load_lds<4>, Class::kGlobal};
  t["global_load_lds_dwordx4"] = {&global_load_lds<16>, Class::kGlobal};
  t["buffer_wbl2"] = t["buffer_inv"] = {&nothing, Class::kControl};

  const auto atomics = [&](const std::string& name, auto f) {
    using F = decltype(f);
    t["global_atomic_" + name] = global_atomic(&F::operator());
  };
  atomics("add", [](u32 a, u32 b) { return a + b; });
  atomics("sub", [](u32 a, u32 b) { return a - b; });
  atomics("or", [](u32 a, u32 b) { return a | b; });
  atomics("and", [](u32 a, u32 b) { return a & b; });
  atomics("swap", [](u32, u32 b) { return b; });
  atomics("umax", [](u32 a, u32 b) { return std::max(a, b); });
  atomics("umin", [](u32 a, u32 b) { return std::min(a, b); });
  atomics("smax", [](i32 a, i32 b) { return std::max(a, b); });
  atomics("smin", [](i32 a, i32 b) { return std::min(a, b); });
  atomics("add_x2", [](u64 a, u64 b) { return a + b; });
  atomics("add_f32", [](float a, float b) { return a + b; });
  t["global_atomic_cmpswap"] = {&global_atomic_cmpswap<u32>, Class::kGlobal};
  t["global_atomic_cmpswap_x2"] = {&global_atomic_cmpswap<u64>, Class::kGlobal};
  const auto lds_atomics = [&](const std::string& name, const std::string& type, auto f) {
    using F = decltype(f);
    t["ds_" + name + "_" + type] = lds_atomic<false>(&F::operator());
    t["ds_" + name + "_rtn_" + type] = lds_atomic<true>(&F::operator());
  };
  lds_atomics("add", "u32", [](u32 a, u32 b) { return a + b; });
  lds_atomics("or", "b32", [](u32 a, u32 b) { return a | b; });
  lds_atomics("max", "u32", [](u32 a, u32 b) { return std::max(a, b); });
  lds_atomics("min", "u32", [](u32 a, u32 b) { return std::min(a, b); });
  lds_atomics("max", "i32", [](i32 a, i32 b) { return std::max(a, b); });
  lds_atomics("min", "i32", [](i32 a, i32 b) { return std::min(a, b); });
}

}  // namespace

const Opcode* find_opcode(const std::string& mnemonic) {
  static const Table table = [] {
    Table t;
    add_vector(t);
    add_scalars(t);
    add_memory(t);
    return t;
  }();
  auto it = table.find(mnemonic);
  return it == table.end() ? nullptr : &it->second;
}

}  // namespace gfx950
