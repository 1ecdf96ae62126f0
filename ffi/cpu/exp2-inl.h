// Part of decode-inl.h, which see.

// 2^x for x <= 0, relative error under 2e-7; below 2^-126: 0. NaN stays NaN.
inline V exp2(V x) {
  const V clamped = Simd::max(Simd::set1(-126), x), n = Simd::round(clamped), f = Simd::sub(clamped, n);
  V y = Simd::set1(1.5252734e-5f);
  y = Simd::fma(y, f, Simd::set1(1.5403530e-4f));
  y = Simd::fma(y, f, Simd::set1(1.3333558e-3f));
  y = Simd::fma(y, f, Simd::set1(9.6181291e-3f));
  y = Simd::fma(y, f, Simd::set1(5.5504109e-2f));
  y = Simd::fma(y, f, Simd::set1(2.4022651e-1f));
  y = Simd::fma(y, f, Simd::set1(6.9314718e-1f));
  y = Simd::fma(y, f, Simd::set1(1));
  return Simd::finish_exp2(y, n, x);  // y * 2^n; 0 where x < -126, NaN where x is
}
