// Softmax of scores whose rows are heads. Part of decode-inl.h, which see.

#include "cpu/exp2-inl.h"

// Scores to probabilities, in place; entries n .. 63 become 0.
inline void softmax(const Scratch& s, int32_t heads, int n, float scale_log2, bool first) {
  const V scale = Simd::set1(scale_log2);
  for (int32_t h = 0; h < heads; ++h) {
    float* row = s.p + h * kTileKeys;
    for (int k = 0; k < kTileKeys; k += kL) Simd::store(row + k, Simd::mul(Simd::load(row + k), scale));
    for (int k = n; k < kTileKeys; ++k) row[k] = -__builtin_inff();
    V max = Simd::set1(-__builtin_inff());
    for (int k = 0; k < kTileKeys; k += kL) max = Simd::max(Simd::load(row + k), max);
    float m = Simd::hmax(max);
    float alpha = 0;
    if (!first) {
      if (s.max[h] > m) m = s.max[h];
      alpha = Simd::first(exp2(Simd::set1(s.max[h] - m)));
    }
    V sum = Simd::set1(0);
    for (int k = 0; k < kTileKeys; k += kL) {
      const V e = exp2(Simd::sub(Simd::load(row + k), Simd::set1(m)));
      Simd::store(row + k, e);
      sum = Simd::add(sum, e);
    }
    store_weights(s, h);
    s.sum[h] = (first ? 0 : s.sum[h] * alpha) + Simd::hsum(sum);
    s.max[h] = m;
    s.alpha[h] = alpha;
  }
}
