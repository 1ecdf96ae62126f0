// Products in bf16 with fp32 sums, two at a time (AVX512-BF16): on AMD's processors at twice the rate of fp32. Nothing
// is lost by it: q, rope, e4m3 times a power of two, and e2m1 times e4m3 are bf16 numbers already, and a weight p is
// taken as the sum of two (subnormal bf16 numbers count as zero). Part of decode-inl.h, which see.

constexpr int kTileKeys = 64;
constexpr int kScoreHeads = 6, kScoreKeys = 4, kScoreGroup = 32;  // 24 accumulators, 4 rows, 1 query

#include "cpu/blocks-inl.h"
#include "cpu/keys-inl.h"

constexpr int kL = Simd::kLanes;
using V = Simd::V;

#include "cpu/exp2-inl.h"

// Numbers between rows: an odd number of cache lines, or a column of rows would share few cache sets.
constexpr int kRowStride = kLatentDim + 32;
constexpr int kPairStride = 2 * kLatentDim + 32;

// One lane's scratch. Sizes: kLaneBytesFixed and kLaneBytesPerHead of launch.h.
struct Scratch {
  const uint16_t* q;  // [heads, 512] the caller's
  uint16_t* rows;     // [64, kRowStride]
  uint16_t* pairs;    // [32, kPairStride] rows 2i and 2i + 1, number by number: what the second product multiplies
  uint16_t* weights;  // [heads, 2, 64] p as the sum of two bf16 numbers
  float* o;           // [heads, 512]
  float* p;           // [heads, 64]
  float* max;         // [heads] of s, log2 units
  float* sum;         // [heads] of p
  float* alpha;       // [heads]
};

inline Scratch carve(uint8_t* bytes, int32_t heads) {
  static_assert(2 * (kTileKeys * kRowStride + kTileKeys / 2 * kPairStride) <= kLaneBytesFixed, "tile");
  static_assert(4 * kTileKeys + 4 * (kLatentDim + kTileKeys + 3) <= kLaneBytesPerHead, "per head");
  Scratch s;
  s.q = nullptr;
  uint16_t* at = reinterpret_cast<uint16_t*>(bytes);
  s.rows = at, at += kTileKeys * kRowStride;
  s.pairs = at, at += kTileKeys / 2 * kPairStride;
  s.weights = at, at += heads * 2 * kTileKeys;
  float* floats = reinterpret_cast<float*>(at);
  s.o = floats, floats += heads * kLatentDim;
  s.p = floats, floats += heads * kTileKeys;
  s.max = floats, floats += heads;
  s.sum = floats, floats += heads;
  s.alpha = floats;
  return s;
}

inline void load_queries(const DecodeParams& p, int64_t first_head, int32_t, Scratch& s) {
  s.q = static_cast<const uint16_t*>(p.q) + first_head * kLatentDim;
}

inline V widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline __m512i load_bits(const uint16_t* p) { return _mm512_loadu_si512(p); }

inline void load_row(const Row& row, uint16_t* dst) {
  if (row.layout == Layout::kBf16) {
    for (int d = 0; d < kLatentDim; d += 32) _mm512_store_si512(dst + d, _mm512_loadu_si512(row.data + 2 * d));
    return;
  }
  alignas(64) float numbers[kLatentDim];
  dequantize_row(row, numbers);
  for (int d = 0; d < kLatentDim; d += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(Simd::load(numbers + d + 16), Simd::load(numbers + d));
    _mm512_store_si512(dst + d, (__m512i)both);
  }
}

inline void load_tile(const Row* rows, int n, const Scratch& s) {
  int k = 0;
  for (; k < n; ++k) load_row(rows[k], s.rows + k * kRowStride);
  // The score kernel takes keys in groups, the other one in pairs: a group's missing ones read as zeros.
  for (; k % kScoreKeys != 0; ++k) {
    for (int d = 0; d < kLatentDim; d += 32) _mm512_store_si512(s.rows + k * kRowStride + d, _mm512_setzero_si512());
  }
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    const uint16_t from = static_cast<uint16_t>(i / 2 + (i % 2 ? 32 : 0));
    order[0][i] = from;
    order[1][i] = static_cast<uint16_t>(from + 16);
  }
  const __m512i low = load_bits(order[0]), high = load_bits(order[1]);
  for (int i = 0; 2 * i < k; ++i) {
    const uint16_t* row = s.rows + 2 * i * kRowStride;
    uint16_t* pair = s.pairs + i * kPairStride;
    for (int d = 0; d < kLatentDim; d += 32) {
      const __m512i even = load_bits(row + d), odd = load_bits(row + kRowStride + d);
      _mm512_store_si512(pair + 2 * d, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(pair + 2 * d + 32, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

// s[h, k] for H heads and kScoreKeys keys: dot products along d.
template <int H>
inline void score_block(const uint16_t* q, const uint16_t* rows, float* s) {
  constexpr int K = kScoreKeys;
  V acc[H][K];
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) acc[h][k] = Simd::set1(0);
  }
#pragma GCC unroll 1
  for (int d = 0; d < kLatentDim; d += 32) {
    __m512bh row[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) row[k] = (__m512bh)load_bits(rows + k * kRowStride + d);
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      const __m512bh qv = (__m512bh)load_bits(q + h * kLatentDim + d);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) acc[h][k] = _mm512_dpbf16_ps(acc[h][k], qv, row[k]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) Simd::sums(acc[h], s + h * kTileKeys);
}

struct ScoreHeads {
  const Scratch& s;
  int begin, end;  // keys
  template <int H>
  void run(int32_t h) const {
    for (int k = begin; k < end; k += kScoreKeys) {
      score_block<H>(s.q + h * kLatentDim, s.rows + k * kRowStride, s.p + h * kTileKeys + k);
    }
  }
};

inline void scores(const Row* rows, int n, const Row*, int, const Scratch& s, int32_t heads) {
  load_tile(rows, n, s);
  // A group of rows stays in the first-level cache while all heads pass over it.
  for (int k = 0; k < n; k += kScoreGroup) {
    const int end = k + kScoreGroup < n ? k + kScoreGroup : n;
    for_blocks<kScoreHeads>(heads, ScoreHeads{s, k, end});
  }
}

inline void store_weights(const Scratch& s, int32_t h) {
  uint16_t* weights = s.weights + h * 2 * kTileKeys;
  for (int k = 0; k < kTileKeys; k += 32) {
    const V low = Simd::load(s.p + h * kTileKeys + k), high = Simd::load(s.p + h * kTileKeys + k + 16);
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const V low_rounded = widen(_mm512_castsi512_si256(rounded)),
            high_rounded = widen(_mm512_extracti64x4_epi64(rounded, 1));
    const __m512i rest = (__m512i)_mm512_cvtne2ps_pbh(Simd::sub(high, high_rounded), Simd::sub(low, low_rounded));
    _mm512_store_si512(weights + k, rounded);
    _mm512_store_si512(weights + kTileKeys + k, rest);
  }
}

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

// o[h, d .. d + N lanes] += sum_k p[h, k] * rows[k, d ..], keys 2i and 2i + 1 at once; or that merged into the total.
template <int H>
inline void accumulate_block(const uint16_t* weights, const uint16_t* pairs, const float* alpha, int n, bool first,
                             float* o, const Merge& merge) {
  constexpr int N = Simd::kOutVectors;
  V acc[H][N];
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
    const V a = Simd::set1(alpha[h]);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      acc[h][i] = first ? Simd::set1(0) : Simd::mul(Simd::load(o + h * kLatentDim + i * kL), a);
    }
  }
#pragma GCC unroll 1
  for (int k = 0; k < n; k += 2) {
    __m512bh row[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) row[i] = (__m512bh)load_bits(pairs + k / 2 * kPairStride + i * 2 * kL);
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part) {
        int32_t both;
        __builtin_memcpy(&both, weights + (2 * h + part) * kTileKeys + k, sizeof both);
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) acc[h][i] = _mm512_dpbf16_ps(acc[h][i], weight, row[i]);
      }
    }
  }
  store_sums(acc, o, merge);
}

struct AccumulateHeads {
  const Scratch& s;
  int n, d;
  bool first;
  const Merge& merge;
  template <int H>
  void run(int32_t h) const {
    accumulate_block<H>(s.weights + h * 2 * kTileKeys, s.pairs + 2 * d, s.alpha + h, n, first, s.o + h * kLatentDim + d,
                        merge.from(h, h * kLatentDim + d));
  }
};

// The next tile's bytes are fetched meanwhile, a few rows at a time: asked for all at once they would stall what comes
// after.
inline void accumulate(const Scratch& s, int32_t heads, int n, bool first, const Merge& merge, const Row* next,
                       int next_n) {
  int fetched = 0;
  for (int d = 0; d < kLatentDim; d += Simd::kOutVectors * kL) {
    for (const int due = next_n * (d + Simd::kOutVectors * kL) / kLatentDim; fetched < due; ++fetched)
      prefetch_row(next[fetched]);
    for_blocks<Simd::kOutHeads>(heads, AccumulateHeads{s, n, d, first, merge});
  }
}

inline float* numbers_of(float* o, int32_t h, float*) { return o + h * kLatentDim; }
