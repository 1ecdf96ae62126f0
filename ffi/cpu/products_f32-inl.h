// Products in fp32: any dtype of q, any layout. Part of decode-inl.h, which see.

constexpr int kTileKeys = 64;

#include "cpu/blocks-inl.h"
#include "cpu/keys-inl.h"

constexpr int kL = Simd::kLanes;
using V = Simd::V;

// floats: an odd number of cache lines, or a column of rows would share few cache sets
constexpr int kRowStride = kLatentDim + 16;

// One lane's scratch. Sizes: kLaneBytesFixed and kLaneBytesPerHead of launch.h.
struct Scratch {
  float* rows;   // [64, kRowStride]
  float* q;      // [heads, 512]
  float* o;      // [heads, 512]
  float* p;      // [heads, 64]
  float* max;    // [heads] of s, log2 units
  float* sum;    // [heads] of p
  float* alpha;  // [heads]
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

inline void load_queries(const DecodeParams& p, int64_t first_head, int32_t heads, const Scratch& s) {
  for (int32_t h = 0; h < heads; ++h) {
    const int64_t at = (first_head + h) * kLatentDim;
    if (p.q_dtype == Dtype::kBf16) {
      Simd::bf16_to_float(static_cast<const uint8_t*>(p.q) + 2 * at, s.q + h * kLatentDim, kLatentDim);
    } else {
      for (int d = 0; d < kLatentDim; d += kL) {
        Simd::store(s.q + h * kLatentDim + d, Simd::loadu(static_cast<const uint8_t*>(p.q) + 4 * (at + d)));
      }
    }
  }
}

inline void load_row(const Row& row, float* dst) {
  if (row.scales != nullptr) {
    dequantize_row(row, dst);
  } else if (row.layout == Layout::kBf16) {
    Simd::bf16_to_float(row.data, dst, kLatentDim);
  } else {
    for (int d = 0; d < kLatentDim; d += kL) Simd::store(dst + d, Simd::loadu(row.data + 4 * d));
  }
}

inline void load_tile(const Row* rows, int n, const Row*, int, const Scratch& s) {
  for (int k = 0; k < n; ++k) {
    load_row(rows[k], s.rows + k * kRowStride);
  }
  // The score kernel takes keys in groups: a group's missing ones read as zeros.
  for (int k = n; k % Simd::kScoreKeys != 0; ++k) {
    for (int d = 0; d < kLatentDim; d += kL) Simd::store(s.rows + k * kRowStride + d, Simd::set1(0));
  }
}

// s[h, k] for H heads and kScoreKeys keys: dot products along d.
template <int H>
inline void score_block(const float* q, const float* rows, float* s) {
  constexpr int K = Simd::kScoreKeys;
  V acc[H][K];
  for (int h = 0; h < H; ++h) {
    for (int k = 0; k < K; ++k) acc[h][k] = Simd::set1(0);
  }
#pragma GCC unroll 1
  for (int d = 0; d < kLatentDim; d += kL) {
    V row[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) row[k] = Simd::load(rows + k * kRowStride + d);
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      const V qv = Simd::load(q + h * kLatentDim + d);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) acc[h][k] = Simd::fma(qv, row[k], acc[h][k]);
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
    for (int k = begin; k < end; k += Simd::kScoreKeys) {
      score_block<H>(s.q + h * kLatentDim, s.rows + k * kRowStride, s.p + h * kTileKeys + k);
    }
  }
};

inline void scores(const Scratch& s, int32_t heads, int n) {
  // A group of rows stays in the first-level cache while all heads pass over it.
  for (int k = 0; k < n; k += Simd::kScoreGroup) {
    const int end = k + Simd::kScoreGroup < n ? k + Simd::kScoreGroup : n;
    for_head_blocks<Simd::kScoreHeads>(heads, ScoreHeads{s, k, end});
  }
}

// p stays as it is.
inline void store_weights(const Scratch&, int32_t) {}

// o[h, d .. d + N lanes] += sum_k p[h, k] * rows[k, d ..], or that merged into the total.
template <int H>
inline void accumulate_block(const float* p, const float* rows, const float* alpha, int n, bool first, float* o,
                             const Merge& merge) {
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
  for (int k = 0; k < n; ++k) {
    V row[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) row[i] = Simd::load(rows + k * kRowStride + i * kL);
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
      const V pv = Simd::set1(p[h * kTileKeys + k]);
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
    accumulate_block<H>(s.p + h * kTileKeys, s.rows + d, s.alpha + h, n, first, s.o + h * kLatentDim + d,
                        merge.at(h, d));
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
    for_head_blocks<Simd::kOutHeads>(heads, AccumulateHeads{s, n, d, first, merge});
  }
}

// Numbers stay in the order of the cache.
inline void restore_order(float*) {}

#include "cpu/softmax-inl.h"
