// Products in fp32: any dtype of q, any layout. Part of decode-inl.h, which see.

constexpr int kTileKeys = Simd::kTileKeys;

#include "cpu/blocks-inl.h"
#include "cpu/keys-inl.h"

constexpr int kL = Simd::kLanes;
using V = Simd::V;

#include "cpu/exp2-inl.h"

// floats: an odd number of cache lines, or a column of rows would share few cache sets
constexpr int kRowStride = kLatentDim + 16;

// One lane's scratch. Sizes: kLaneBytesFixed and kLaneBytesPerHead of launch.h. Heads go in vectors, and heads that
// there are not are zeros in q.
struct Scratch {
  float* rows;   // [kTileKeys, kRowStride]
  float* q;      // [vectors of heads, 512, kL]
  float* o;      // [heads, 512]
  float* p;      // [vectors of heads, kTileKeys, kL]
  float* max;    // [heads] of s, log2 units
  float* sum;    // [heads] of p
  float* alpha;  // [heads]

  const float* weights(int32_t head) const { return p + head / kL * kL * kTileKeys + head % kL; }
};

inline Scratch carve(uint8_t* bytes, int32_t heads) {
  static_assert(sizeof(float) * kTileKeys * kRowStride <= kLaneBytesFixed, "tile");
  static_assert(sizeof(float) * (2 * kLatentDim + kTileKeys + 3) <= kLaneBytesPerHead, "per head");
  Scratch s;
  float* at = reinterpret_cast<float*>(bytes);
  s.rows = at, at += kTileKeys * kRowStride;
  s.q = at, at += heads * kLatentDim;
  s.o = at, at += heads * kLatentDim;
  s.p = at, at += heads * kTileKeys;
  s.max = at, at += heads;
  s.sum = at, at += heads;
  s.alpha = at;
  return s;
}

#include "cpu/softmax-inl.h"

inline void load_queries(const DecodeParams& p, int64_t first_head, int32_t heads, const Scratch& s) {
  float* to = s.q;
  for (int32_t first = 0; first < heads; first += kL) {
    for (int d = 0; d < kLatentDim; d += kL, to += kL * kL) {
      V block[kL];
      for (int h = 0; h < kL; ++h) {
        const int64_t at = (first_head + first + h) * kLatentDim + d;
        block[h] = first + h >= heads          ? Simd::set1(0)
                   : p.q_dtype == Dtype::kBf16 ? Simd::load_bf16(static_cast<const uint8_t*>(p.q) + 2 * at)
                                               : Simd::loadu(static_cast<const uint8_t*>(p.q) + 4 * at);
      }
      Simd::transpose(block);
      for (int i = 0; i < kL; ++i) Simd::store(to + i * kL, block[i]);
    }
  }
}

inline void load_row(const Row& row, float* dst) {
  if (row.scales != nullptr) {
    dequantize_row(row, dst);
  } else if (row.layout == Layout::kBf16) {
    bf16_to_floats(row.data, dst, kLatentDim);
  } else {
    for (int d = 0; d < kLatentDim; d += kL) Simd::store(dst + d, Simd::loadu(row.data + 4 * d));
  }
}

// s[k, h] for N vectors of heads and K keys.
template <int N, int K>
inline void score_block(const float* q, const float* rows, float* s) {
  V acc[N][K];
#pragma GCC unroll 2
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) acc[i][k] = Simd::set1(0);
  }
#pragma GCC unroll 1
  for (int d = 0; d < kLatentDim; ++d) {
    V queries[N];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) queries[i] = Simd::load(q + (i * kLatentDim + d) * kL);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const V number = Simd::set1(rows[k * kRowStride + d]);
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) acc[i][k] = Simd::fma(queries[i], number, acc[i][k]);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) Simd::store(s + (i * kTileKeys + k) * kL, acc[i][k]);
  }
}

// Keys are dequantised a few at a time: these are in the first-level cache while all heads pass over them.
struct ScoreKeys {
  const Row* tile;
  const Scratch& s;
  int32_t vectors;
  template <int K>
  void run(int key) const {
    float* const rows = s.rows + key * kRowStride;
    for (int k = 0; k < K; ++k) load_row(tile[key + k], rows + k * kRowStride);
    for (int32_t v = 0; v < vectors; v += 2) {
      const float* q = s.q + v * kLatentDim * kL;
      float* p = s.p + (v * kTileKeys + key) * kL;
      v + 1 < vectors ? score_block<2, K>(q, rows, p) : score_block<1, K>(q, rows, p);
    }
  }
};

inline void scores(const Row* rows, int n, const Row*, int, const Scratch& s, int32_t heads) {
  for_blocks<Simd::kScoreKeys>(n, ScoreKeys{rows, s, head_vectors(heads)});
}

inline void softmax(const Scratch& s, int32_t heads, int n, float scale_log2, bool first) {
  for (int32_t h = 0; h < heads; h += kL) softmax_of_vector(s, h, n, scale_log2, first);
}

// o[h, d .. d + N lanes] += sum_k p[h, k] * rows[k, d ..], or that merged into the total.
template <int H>
inline void accumulate_block(const Scratch& s, int32_t head, int n, int d, bool first, const Merge& merge) {
  constexpr int N = Simd::kOutVectors;
  const float *rows = s.rows + d, *p[H];
  float* o = s.o + head * kLatentDim + d;
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) p[h] = s.weights(head + h);
  V acc[H][N];
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
    const V a = Simd::set1(s.alpha[head + h]);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      acc[h][i] = first ? Simd::set1(0) : Simd::mul(Simd::load(o + h * kLatentDim + i * kL), a);
    }
  }
#pragma GCC unroll 1
  for (int k = 0; k < n; ++k) {
    V row[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) row[i] = Simd::load(rows + k * kRowStride + i * kL);
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      const V pv = Simd::set1(p[h][k * kL]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) acc[h][i] = Simd::fma(pv, row[i], acc[h][i]);
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
    accumulate_block<H>(s, h, n, d, first, merge.from(h, h * kLatentDim + d));
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
