// AVX2 with FMA and F16C. Compiled with those flags; called only where the processor has them.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "common/fp8.h"
#include "cpu/launch.h"

namespace jax_dsv4::cpu {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kTileKeys = 64;
  static constexpr int kScoreKeys = 6;                  // 12 accumulators, 2 vectors of heads, 1 number of a key
  static constexpr int kOutHeads = 6, kOutVectors = 2;  // 12 accumulators, 2 rows, 1 weight
  using V = __m256;

  static V load(const float* p) { return _mm256_load_ps(p); }
  static V loadu(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static void store(float* p, V v) { _mm256_store_ps(p, v); }
  static void storeu(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V merge(V total, V keep, V part, V take) { return fma(part, take, mul(total, keep)); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }  // b if either is NaN
  static float first(V v) { return _mm256_cvtss_f32(v); }

  static void transpose(V (&r)[8]) {
    V t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = r[i];
      r[i] = _mm256_permute2f128_ps(t[i], r[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(t[i], r[i + 4], 0x31);
    }
  }

  static V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V finish_exp2(V y, V n, V x) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const V tiny = _mm256_cmp_ps(x, set1(-126), _CMP_LT_OQ);
    const V nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_or_ps(_mm256_andnot_ps(tiny, mul(y, _mm256_castsi256_ps(power))), nan);
  }

  // e4m3 numbers, 32 or 64, with one scale. An e4m3 byte's bits, moved into an f16, are its value times 2^-8.
  template <int kNumbers>
  static void dequantize_tile(const uint8_t* src, uint8_t scale, float* dst) {
    const __m256i top = _mm256_set1_epi8(0x7f);
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + kNumbers - 32));
    const __m256i nan = _mm256_or_si256(_mm256_cmpeq_epi8(_mm256_and_si256(low, top), top),
                                        _mm256_cmpeq_epi8(_mm256_and_si256(high, top), top));
    if (scale > 246 || !_mm256_testz_si256(nan, nan)) {
      for (int i = 0; i < kNumbers; ++i) dst[i] = e4m3_to_float(src[i]) * ue8m0_to_float(scale);
      return;
    }
    const V factor = _mm256_castsi256_ps(_mm256_set1_epi32((scale + 8) << 23));
    for (int i = 0; i < kNumbers; i += 16) {
      const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
      const __m256i half = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0x3f80)),
                                           _mm256_and_si256(_mm256_slli_epi16(wide, 8), _mm256_set1_epi16(-0x8000)));
      store(dst + i, mul(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), factor));
      store(dst + i + 8, mul(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), factor));
    }
  }

  // A row of nvfp4. A lookup takes three bits of an index; the fourth is the sign.
  static void dequantize_e2m1(const uint8_t* src, const float* scales, float* dst) {
    const V values = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
    const __m256i sign = _mm256_set1_epi32(static_cast<int>(0x80000000u));
    for (int i = 0; i < kLatentDim; i += kNvfp4Tile) {
      const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(src + i / 2)), high = _mm_srli_epi16(low, 4);
      const __m128i codes = _mm_unpacklo_epi8(low, high);
      const V scale = set1(scales[i / kNvfp4Tile]);
      for (int half = 0; half < 2; ++half) {
        const __m256i code = _mm256_cvtepu8_epi32(half == 0 ? codes : _mm_unpackhi_epi64(codes, codes));
        const V signs = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(code, 28), sign));
        store(dst + i + 8 * half, mul(_mm256_xor_ps(_mm256_permutevar8x32_ps(values, code), signs), scale));
      }
    }
  }

  static V load_bf16(const uint8_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  static void float_to_bf16(const float* src, uint8_t* dst, int n) {
    for (int i = 0; i < n; i += kLanes) {
      const V value = load(src + i);
      const __m256i bits = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const V nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
      const __m256i result =
          _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
      const __m256i top = _mm256_srli_epi32(result, 16);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * i),
                       _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)));
    }
  }
};

#include "cpu/products_f32-inl.h"
// decode-inl.h builds on it.
#include "cpu/decode-inl.h"

}  // namespace

const Kernels avx2_kernels{"avx2", false, kTileKeys, attend, combine};

}  // namespace jax_dsv4::cpu

#endif  // __x86_64__
