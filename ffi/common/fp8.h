// The number formats of packed caches, one value at a time, exact. Kernels have faster forms of the same functions.
#ifndef JAX_DSV4_COMMON_FP8_H_
#define JAX_DSV4_COMMON_FP8_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace jax_dsv4 {

JAX_DSV4_HD float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

JAX_DSV4_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

JAX_DSV4_HD float bf16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

// Round to nearest even; a NaN stays one.
JAX_DSV4_HD uint16_t float_to_bf16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e4m3fn: bias 7, subnormals, no infinities, 0x7f and 0xff are NaN, largest 448.
JAX_DSV4_HD float e4m3_to_float(uint8_t byte) {
  const uint32_t sign = static_cast<uint32_t>(byte & 0x80) << 24, magnitude = byte & 0x7f;
  if (magnitude == 0x7f) return bits_to_float(sign | 0x7fc00000u);
  if (magnitude < 8) {  // subnormal: magnitude * 2^-9
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    return sign ? -value : value;
  }
  return bits_to_float(sign | ((magnitude << 20) + ((127u - 7u) << 23)));
}

// Round to nearest even; beyond 448 saturates (so do infinities); NaN gives 0x7f.
JAX_DSV4_HD uint8_t float_to_e4m3(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;
  if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7e);  // >= 448
  if (magnitude < ((127u - 6u) << 23)) {  // below 2^-6: a multiple of 2^-9, which adding 2^14 rounds to
    const float shifted = bits_to_float(magnitude) + 0x1p14f;
    return static_cast<uint8_t>(sign | (float_to_bits(shifted) - float_to_bits(0x1p14f)));
  }
  const uint32_t rounded = magnitude + 0x7ffff + ((magnitude >> 20) & 1) - ((127u - 7u) << 23);
  return static_cast<uint8_t>(sign | (rounded >> 20));
}

// e4m3fnuz: bias 8, no -0, 0x80 is NaN, largest 240. As above: to nearest even, saturated.
JAX_DSV4_HD uint8_t float_to_e4m3fnuz(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x80;
  if (magnitude >= 0x43700000u) return static_cast<uint8_t>(sign | 0x7f);  // >= 240
  uint32_t code;
  if (magnitude < ((127u - 7u) << 23)) {  // below 2^-7: a multiple of 2^-10, which adding 2^13 rounds to
    code = float_to_bits(bits_to_float(magnitude) + 0x1p13f) - float_to_bits(0x1p13f);
  } else {
    code = (magnitude + 0x7ffff + ((magnitude >> 20) & 1) - ((127u - 8u) << 23)) >> 20;
  }
  return static_cast<uint8_t>(code ? sign | code : 0);
}

// e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and with bit 3 their negatives.
JAX_DSV4_HD float e2m1_to_float(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 8) << 28, magnitude = code & 7;
  return bits_to_float(sign | (magnitude < 2 ? magnitude * (126u << 23) : (magnitude << 22) + (126u << 23)));
}

// The code nearest value / scale: to nearest even, beyond 6 saturated. It is compared with the middles between codes,
// times the scale, which are exact for an e4m3 scale: a quotient would be rounded before.
JAX_DSV4_HD uint8_t float_to_e2m1(float value, float scale) {
  const uint32_t bits = float_to_bits(value);
  const float magnitude = bits_to_float(bits & 0x7fffffffu);
  const int code = (magnitude > 0.25f * scale) + (magnitude >= 0.75f * scale) + (magnitude > 1.25f * scale) +
                   (magnitude >= 1.75f * scale) + (magnitude > 2.5f * scale) + (magnitude >= 3.5f * scale) +
                   (magnitude > 5 * scale);
  return static_cast<uint8_t>((bits >> 28 & 8) | code);
}

// The e4m3 scale of a tile of e2m1 whose largest magnitude is `amax`: amax / 6, from 2^-9 to 448. NaN gives NaN.
JAX_DSV4_HD uint8_t e4m3_scale_of(float amax) {
  // Rounded twice, a quotient beside the middle of two codes would be taken for it. Of what amax has past its first 16
  // bits it matters only whether it is zero: a middle times 6 has 7.
  const uint32_t bits = float_to_bits(amax);
  const float quotient = bits_to_float((bits & ~0xffu) | ((bits & 0xff) != 0 ? 0x80 : 0)) / 6;
  return float_to_e4m3(quotient < 0x1p-9f ? 0x1p-9f : quotient);
}

// ue8m0: 2^(byte - 127); 255 is NaN.
JAX_DSV4_HD float ue8m0_to_float(uint8_t byte) {
  if (byte == 255) return bits_to_float(0x7fc00000u);
  if (byte == 0) return bits_to_float(0x00400000u);  // 2^-127, subnormal
  return bits_to_float(static_cast<uint32_t>(byte) << 23);
}

// The scale of a tile whose largest magnitude is `amax`: the smallest 2^k with amax <= 448 * 2^k, k >= -22 (amax is
// taken to be at least 1e-4, as DeepSeek's quantiser does), k <= 127.
JAX_DSV4_HD uint8_t ue8m0_scale_of(float amax) {
  if (!(amax > 1e-4f)) amax = 1e-4f;
  const uint32_t bits = float_to_bits(amax);
  if (bits >= 0x7f800000u) return 254;
  // amax = 1.m * 2^e and 448 = 1.75 * 2^8: k = e - 8, one more if 1.m > 1.75.
  const int32_t k = static_cast<int32_t>(bits >> 23) - 127 - 8 + ((bits & 0x7fffffu) > 0x600000u);
  return static_cast<uint8_t>(k + 127);
}

}  // namespace jax_dsv4

#endif  // JAX_DSV4_COMMON_FP8_H_
