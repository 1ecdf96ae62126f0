// Vectors of 16 floats. Included inside the namespace of each file that is compiled for AVX-512 (see decode-inl.h).

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kTileKeys = 128;
  static constexpr int kScoreKeys = 12;                 // 24 accumulators, 2 vectors of heads, 1 number of a key
  static constexpr int kOutHeads = 6, kOutVectors = 4;  // 24 accumulators, 4 rows, 1 weight
  using V = __m512;

  static V load(const float* p) { return _mm512_load_ps(p); }
  static V loadu(const void* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_store_ps(p, v); }
  static void storeu(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V merge(V total, V keep, V part, V take) { return fma(part, take, mul(total, keep)); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b if either is NaN
  static float first(V v) { return _mm512_cvtss_f32(v); }

  static void transpose(V (&r)[16]) {
    V t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

  static V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V finish_exp2(V y, V n, V x) {
    const __mmask16 tiny = _mm512_cmp_ps_mask(x, set1(-126), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_scalef_ps(y, n), tiny, set1(0));
  }

  // 32 numbers, twice, or 64.
  template <int kNumbers>
  static __m512i load_e4m3(const uint8_t* src) {
    return kNumbers == 64 ? _mm512_loadu_si512(src)
                          : _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
  }

  // Whether e4m3 numbers, 32 or 64, and they times their scale are normal numbers, as they usually are. Of their bits,
  // moved into a float or a bf16, only the exponent is to be made right then.
  template <int kNumbers>
  static bool usual_e4m3(const uint8_t* src, uint8_t scale) {
    const __m512i bytes = load_e4m3<kNumbers>(src);
    // Without its sign a usual byte is from 8 to 126, and twice it, less 16, at most 236.
    const __m512i doubled = _mm512_sub_epi8(_mm512_add_epi8(bytes, bytes), _mm512_set1_epi8(16));
    return scale >= 7 && scale <= 246 && _mm512_cmpgt_epu8_mask(doubled, _mm512_set1_epi8(static_cast<char>(236))) == 0;
  }

  // e4m3 numbers, 32 or 64, with one scale.
  template <int kNumbers>
  static void dequantize_tile(const uint8_t* src, uint8_t scale, float* dst) {
    if (usual_e4m3<kNumbers>(src, scale)) {
      const __m512i exponent = _mm512_set1_epi32((scale - 7) << 23),
                    kept = _mm512_set1_epi32(static_cast<int>(0x87f00000));
      for (int i = 0; i < kNumbers; i += 16) {
        const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepi8_epi32(part), 20);
        store(dst + i, _mm512_castsi512_ps(_mm512_add_epi32(_mm512_and_si512(wide, kept), exponent)));
      }
      return;
    }
    // An e4m3 byte's bits, moved into an f16, are its value times 2^-8.
    const __m512i magnitude = _mm512_and_si512(load_e4m3<kNumbers>(src), _mm512_set1_epi8(0x7f));
    if (scale > 246 || _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7f)) != 0) {
      for (int i = 0; i < kNumbers; ++i) dst[i] = e4m3_to_float(src[i]) * ue8m0_to_float(scale);
      return;
    }
    const V factor = _mm512_castsi512_ps(_mm512_set1_epi32((scale + 8) << 23));
    for (int i = 0; i < kNumbers; i += 32) {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
      const __m512i half = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(0x3f80)),
                                           _mm512_and_si512(_mm512_slli_epi16(wide, 8), _mm512_set1_epi16(-0x8000)));
      store(dst + i, mul(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), factor));
      store(dst + i + 16, mul(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), factor));
    }
  }

  // A row of nvfp4. A lookup takes four bits of an index, whatever is above them.
  static void dequantize_e2m1(const uint8_t* src, const float* scales, float* dst) {
    const V values = e2m1_values();
    for (int i = 0; i < kLatentDim; i += 2 * kNvfp4Tile, scales += 2) {
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i / 2)), high = _mm_srli_epi16(low, 4);
      const __m512i a = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
      const __m512i b = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(low, high));
      store(dst + i, mul(_mm512_permutexvar_ps(a, values), set1(scales[0])));
      store(dst + i + kNvfp4Tile, mul(_mm512_permutexvar_ps(b, values), set1(scales[1])));
    }
  }
  static V e2m1_values() {
    return _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  }

  static V load_bf16(const uint8_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  static void float_to_bf16(const float* src, uint8_t* dst, int n) {
    for (int i = 0; i < n; i += kLanes) {
      const V value = load(src + i);
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 2 * i),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
    }
  }
};
