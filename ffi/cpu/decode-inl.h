// The fp32 decode kernel, written once over a vector type. Each instruction set's file defines `Simd` in its own
// namespace, includes this file there, and is compiled with its own flags; so nothing here may call an inline function
// of the standard library (the linker would keep one copy for all, in whichever instruction set).
//
// Per tile of up to 64 valid keys, all heads of the task:
//   rows[k, d]   = the tile's latents in fp32                         (load_tile)
//   s[h, k]      = sum_d q[h, d] * rows[k, d]                         (scores)
//   p[h, k]      = 2^(s * scale * log2(e) - max), running max and sum (softmax)
//   o[h, d]      = o[h, d] * alpha[h] + sum_k p[h, k] * rows[k, d]    (accumulate)

#include "cpu/keys-inl.h"

constexpr int kRowStride =
    kLatentDim + 16;  // floats: an odd number of cache lines, or a column of rows would share few cache sets
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr int kL = Simd::kLanes;
using V = Simd::V;

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

inline void load_row(const Row& row, float* dst) {
  if (row.layout == Layout::kFp8DsMla) {
    for (int t = 0; t < kScaleTiles; ++t) {
      Simd::dequantize_tile(row.data + t * kScaleTile, row.scales[t], dst + t * kScaleTile);
    }
    Simd::bf16_to_float(row.data + kNopeDim, dst + kNopeDim, kRopeDim);
  } else if (row.layout == Layout::kBf16) {
    Simd::bf16_to_float(row.data, dst, kLatentDim);
  } else {
    for (int d = 0; d < kLatentDim; d += kL) Simd::store(dst + d, Simd::loadu(row.data + 4 * d));
  }
}

// Fetches `next`'s bytes while this tile's are converted.
inline void load_tile(const Row* rows, int n, const Row* next, int next_n, float* tile) {
  for (int k = 0; k < n; ++k) {
    if (k < next_n) prefetch_row(next[k]);
    load_row(rows[k], tile + k * kRowStride);
  }
  // The score kernel takes keys in groups: a group's missing ones read as zeros.
  for (int k = n; k % Simd::kScoreKeys != 0; ++k) {
    for (int d = 0; d < kLatentDim; d += kL) Simd::store(tile + k * kRowStride + d, Simd::set1(0));
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

// o[h, d .. d + N lanes] += sum_k p[h, k] * rows[k, d ..]
template <int H>
inline void accumulate_block(const float* p, const float* rows, const float* alpha, int n, bool first, float* o) {
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
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) Simd::store(o + h * kLatentDim + i * kL, acc[h][i]);
  }
}

// Calls Block<H> for all heads, H at most kMax, as evenly as can be.
template <int kMax, typename Block>
inline void for_head_blocks(int32_t heads, const Block& block) {
  int32_t h = 0;
  while (h < heads) {
    const int32_t blocks = (heads - h + kMax - 1) / kMax;
    const int32_t size = (heads - h + blocks - 1) / blocks;
    switch (size) {
      case 1:
        block.template run<1>(h);
        break;
      case 2:
        block.template run<2>(h);
        break;
      case 3:
        block.template run<3>(h);
        break;
      case 4:
        block.template run<4>(h);
        break;
      case 5:
        block.template run<(kMax >= 5 ? 5 : 1)>(h);
        break;
      default:
        block.template run<(kMax >= 6 ? 6 : 1)>(h);
        break;
    }
    h += size;
  }
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
    s.sum[h] = (first ? 0 : s.sum[h] * alpha) + Simd::hsum(sum);
    s.max[h] = m;
    s.alpha[h] = alpha;
  }
}

struct AccumulateHeads {
  const Scratch& s;
  int n, d;
  bool first;
  template <int H>
  void run(int32_t h) const {
    accumulate_block<H>(s.p + h * kTileKeys, s.rows + d, s.alpha + h, n, first, s.o + h * kLatentDim + d);
  }
};

inline void accumulate(const Scratch& s, int32_t heads, int n, bool first) {
  for (int d = 0; d < kLatentDim; d += Simd::kOutVectors * kL) {
    for_head_blocks<Simd::kOutHeads>(heads, AccumulateHeads{s, n, d, first});
  }
}

void attend(const DecodeParams& p, const Task& task, uint8_t* bytes) {
  const int32_t heads = task.head_end - task.head_begin;
  const Scratch s = carve(bytes, heads);
  const int64_t first_head = static_cast<int64_t>(task.token) * p.heads + task.head_begin;
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

  Row lists[2][kTileKeys];
  KeyCursor cursor = first_key(p, task.token, task.kv_begin);
  int n = next_rows(p, task.token, task.kv_end, &cursor, lists[0]);
  bool first = true;
  for (int turn = 0; n > 0; turn ^= 1) {
    const int next_n = next_rows(p, task.token, task.kv_end, &cursor, lists[turn ^ 1]);
    load_tile(lists[turn], n, lists[turn ^ 1], next_n, s.rows);
    scores(s, heads, n);
    softmax(s, heads, n, p.scale * kLog2e, first);
    accumulate(s, heads, n, first);
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
