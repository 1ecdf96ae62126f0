// Softmax where a vector's lanes are heads. Part of decode-inl.h, which see.

inline int32_t head_vectors(int32_t heads) { return (heads + kL - 1) / kL; }

// Scores to probabilities, in place, of the vector of heads from `head` on.
inline void softmax_of_vector(const Scratch& s, int32_t head, int n, float scale_log2, bool first) {
  const V scale = Simd::set1(scale_log2);
  float* const p = s.p + head * kTileKeys;
  V max = Simd::set1(-__builtin_inff()), alpha = Simd::set1(0);
  for (int k = 0; k < n; ++k) max = Simd::max(Simd::mul(Simd::load(p + k * kL), scale), max);
  if (!first) {
    const V before = Simd::load(s.max + head);
    max = Simd::max(before, max);
    alpha = exp2(Simd::sub(before, max));
  }
  V sum = Simd::set1(0);
  for (int k = 0; k < n; ++k) {
    const V e = exp2(Simd::sub(Simd::mul(Simd::load(p + k * kL), scale), max));
    Simd::store(p + k * kL, e);
    sum = Simd::add(sum, e);
  }
  Simd::store(s.sum + head, first ? sum : Simd::fma(Simd::load(s.sum + head), alpha, sum));
  Simd::store(s.max + head, max);
  Simd::store(s.alpha + head, alpha);
}
