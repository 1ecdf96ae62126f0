// Any processor: four-lane vectors of the compiler's own, no instruction set named.
#include <math.h>

#include "common/fp8.h"
#include "cpu/launch.h"

namespace jax_dsv4::cpu {
namespace {

// What every code stands for.
template <int kCodes>
struct Table {
  float value[kCodes];
  explicit Table(float (*decode)(uint8_t)) {
    for (int i = 0; i < kCodes; ++i) value[i] = decode(static_cast<uint8_t>(i));
  }
};
const Table<256> kE4m3(e4m3_to_float);
const Table<16> kE2m1(e2m1_to_float);

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kTileKeys = 64;
  static constexpr int kScoreKeys = 4;
  static constexpr int kOutHeads = 4, kOutVectors = 2;
  typedef float V __attribute__((vector_size(16), may_alias));
  typedef float U __attribute__((vector_size(16), may_alias, aligned(1)));
  typedef int32_t I __attribute__((vector_size(16)));

  static V load(const float* p) { return *reinterpret_cast<const V*>(p); }
  static V loadu(const void* p) { return *static_cast<const U*>(p); }
  static void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }
  static void storeu(float* p, V v) { *reinterpret_cast<U*>(p) = v; }
  static V set1(float x) { return V{x, x, x, x}; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) {
#if defined(__FP_FAST_FMAF)
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
  }
  static V merge(V total, V keep, V part, V take) { return fma(part, take, total * keep); }
  static V max(V a, V b) { return a > b ? a : b; }  // b if either is NaN
  static float first(V v) { return v[0]; }
  static void transpose(V (&r)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const float x = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = x;
      }
    }
  }

  static V round(V x) { return x + 0x1.8p23f - 0x1.8p23f; }
  static V finish_exp2(V y, V n, V x) {
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    V result = y * reinterpret_cast<V>(power);
    for (int i = 0; i < 4; ++i) result[i] = x[i] < -126 ? 0 : x[i] != x[i] ? x[i] : result[i];
    return result;
  }

  template <int kNumbers>
  static void dequantize_tile(const uint8_t* src, uint8_t scale, float* dst) {
    const float factor = ue8m0_to_float(scale);
    for (int i = 0; i < kNumbers; ++i) dst[i] = kE4m3.value[src[i]] * factor;
  }

  // A row of nvfp4.
  static void dequantize_e2m1(const uint8_t* src, const float* scales, float* dst) {
    for (int i = 0; i < kLatentDim; i += 2) {
      dst[i] = kE2m1.value[src[i / 2] & 15] * scales[i / kNvfp4Tile];
      dst[i + 1] = kE2m1.value[src[i / 2] >> 4] * scales[i / kNvfp4Tile];
    }
  }

  static V load_bf16(const uint8_t* p) {
    V result;
    for (int i = 0; i < kLanes; ++i) {
      uint16_t bits;
      __builtin_memcpy(&bits, p + 2 * i, 2);
      result[i] = bf16_to_float(bits);
    }
    return result;
  }

  static void float_to_bf16(const float* src, uint8_t* dst, int n) {
    for (int i = 0; i < n; ++i) {
      const uint16_t bits = jax_dsv4::float_to_bf16(src[i]);
      __builtin_memcpy(dst + 2 * i, &bits, 2);
    }
  }
};

#include "cpu/products_f32-inl.h"
// decode-inl.h builds on it.
#include "cpu/decode-inl.h"

}  // namespace

const Kernels generic_kernels{"generic", false, kTileKeys, attend, combine};

}  // namespace jax_dsv4::cpu
