// The decode kernel, written once over a vector type and a kind of products. Each instruction set's file defines `Simd`
// in its own namespace, then includes there one of products_*-inl.h and this file, and is compiled with its own flags;
// so nothing here may call an inline function of the standard library (the linker would keep one copy for all, in
// whichever instruction set).
//
// Per tile of up to 64 valid keys, all heads of the task:
//   rows[k, d]   = the tile's latents                                 (load_tile)
//   s[h, k]      = sum_d q[h, d] * rows[k, d]                         (scores)
//   p[h, k]      = 2^(s * scale * log2(e) - max), running max and sum (softmax)
//   o[h, d]      = o[h, d] * alpha[h] + sum_k p[h, k] * rows[k, d]    (accumulate)
// Scores, softmax and sums are fp32 throughout.

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

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
      alpha = Simd::first(Simd::exp2(Simd::set1(s.max[h] - m)));
    }
    V sum = Simd::set1(0);
    for (int k = 0; k < kTileKeys; k += kL) {
      const V e = Simd::exp2(Simd::sub(Simd::load(row + k), Simd::set1(m)));
      Simd::store(row + k, e);
      sum = Simd::add(sum, e);
    }
    store_weights(s, h);
    s.sum[h] = (first ? 0 : s.sum[h] * alpha) + Simd::hsum(sum);
    s.max[h] = m;
    s.alpha[h] = alpha;
  }
}

void attend(const DecodeParams& p, const Task& task, uint8_t* bytes) {
  const int32_t heads = task.head_end - task.head_begin;
  Scratch s = carve(bytes, heads);
  const int64_t first_head = static_cast<int64_t>(task.token) * p.heads + task.head_begin;
  Row lists[2][kTileKeys];
  KeyCursor cursor = first_key(p, task.token, task.kv_begin);
  int n = next_rows(p, task.token, task.kv_end, &cursor, lists[0]);
  for (int k = 0; k < n; ++k) prefetch_row(lists[0][k]);
  load_queries(p, first_head, heads, s);
  bool first = true;
  for (int turn = 0; n > 0; turn ^= 1) {
    const int next_n = next_rows(p, task.token, task.kv_end, &cursor, lists[turn ^ 1]);
    load_tile(lists[turn], n, s);
    scores(s, heads, n);
    softmax(s, heads, n, p.scale * kLog2e, first);
    accumulate(s, heads, n, first, lists[turn ^ 1], next_n);
    first = false;
    n = next_n;
  }

  for (int32_t h = 0; h < heads; ++h) {
    const float sum = first ? 0 : s.sum[h], max = first ? 0 : s.max[h];
    const float lse = first ? -__builtin_inff() : kLn2 * (max + log2f(sum));
    float total = sum;  // of the denominator
    if (task.partial < 0 && p.sink != nullptr && !first) total += exp2f(p.sink[task.head_begin + h] * kLog2e - max);
    const V inverse = Simd::set1(first ? 0 : 1 / total);
    float* o = s.o + h * kLatentDim;
    for (int d = 0; d < kLatentDim; d += kL) {
      Simd::store(o + d, first ? Simd::set1(0) : Simd::mul(Simd::load(o + d), inverse));
    }
    if (task.partial < 0) {
      write_out(p, first_head + h, o);
      p.lse[first_head + h] = lse;
    } else {
      const int64_t at = static_cast<int64_t>(task.partial) * p.heads + task.head_begin + h;
      for (int d = 0; d < kLatentDim; d += kL) Simd::storeu(p.partial_out + at * kLatentDim + d, Simd::load(o + d));
      p.partial_lse[at] = lse;
    }
  }
}
