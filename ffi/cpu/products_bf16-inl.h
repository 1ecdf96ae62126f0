// Products in bf16 with fp32 sums, two at a time (AVX512-BF16): on AMD's processors at twice the rate of fp32. Nothing
// is lost by it: q, rope, e4m3 times a power of two, and e2m1 times e4m3 are bf16 numbers already, and a weight p is
// taken as the sum of two (subnormal bf16 numbers count as zero). Part of decode-inl.h, which see.

constexpr int kTileKeys = 64;
// Keys whose scores are summed together: 24 accumulators, 2 vectors of heads, 2 numbers of a key. A vector alone takes
// more keys: fewer sums would wait for each other.
constexpr int kScoreKeys = 12, kLoneScoreKeys = 16;

#include "cpu/blocks-inl.h"
#include "cpu/keys-inl.h"

constexpr int kL = Simd::kLanes;
using V = Simd::V;

#include "cpu/exp2-inl.h"

// Numbers between rows: an odd number of cache lines, or a column of rows would share few cache sets.
constexpr int kRowStride = kLatentDim + 32;
constexpr int kPairs = kTileKeys / 2;
constexpr int kSlice = Simd::kOutVectors * kL;     // numbers of a row that are multiplied by weights at a time
constexpr int kQueryVector = kLatentDim / 2 * kL;  // pairs of numbers of a vector of heads

// One lane's scratch. Sizes: kLaneBytesFixed and kLaneBytesPerHead of launch.h. Heads go in vectors, and heads that
// there are not are zeros in q. Two bf16 numbers that are multiplied together are one of 32 bits.
struct Scratch {
  uint16_t* rows;    // [64, kRowStride]
  uint16_t* pairs;   // [32, 2 kSlice] a slice of rows 2i and 2i + 1, number by number
  int32_t* q;        // [vectors of heads, 256 pairs of numbers, kL]
  int32_t* weights;  // [vectors of heads, 32 pairs of keys, 2, kL] p as the sum of two bf16 numbers
  float* o;          // [heads, 512]
  float* p;          // [vectors of heads, 64, kL]
  float* max;        // [heads] of s, log2 units
  float* sum;        // [heads] of p
  float* alpha;      // [heads]

  const int32_t* weights_of(int32_t head) const { return weights + head / kL * (kPairs * 2 * kL) + head % kL; }
};

inline Scratch carve(uint8_t* bytes, int32_t heads) {
  static_assert(2 * (kTileKeys * kRowStride + kPairs * 2 * kSlice) <= kLaneBytesFixed, "tile");
  static_assert(4 * (kLatentDim / 2 + kTileKeys) + 4 * (kLatentDim + kTileKeys + 3) <= kLaneBytesPerHead, "per head");
  Scratch s;
  uint16_t* at = reinterpret_cast<uint16_t*>(bytes);
  s.rows = at, at += kTileKeys * kRowStride;
  s.pairs = at, at += kPairs * 2 * kSlice;
  s.q = reinterpret_cast<int32_t*>(at);
  s.weights = s.q + heads * kLatentDim / 2;
  s.o = reinterpret_cast<float*>(s.weights + heads * kTileKeys);
  s.p = s.o + heads * kLatentDim;
  s.max = s.p + heads * kTileKeys;
  s.sum = s.max + heads;
  s.alpha = s.sum + heads;
  return s;
}

#include "cpu/softmax-inl.h"

inline void load_queries(const DecodeParams& p, int64_t first_head, int32_t heads, const Scratch& s) {
  const uint16_t* q = static_cast<const uint16_t*>(p.q) + first_head * kLatentDim;
  int32_t* to = s.q;
  for (int32_t first = 0; first < heads; first += kL) {
    for (int d = 0; d < kLatentDim; d += 2 * kL, to += kL * kL) {
      V block[kL];
      for (int h = 0; h < kL; ++h) {
        block[h] = first + h < heads ? Simd::loadu(q + (first + h) * kLatentDim + d) : Simd::set1(0);
      }
      Simd::transpose(block);
      for (int i = 0; i < kL; ++i) _mm512_store_ps(to + i * kL, block[i]);
    }
  }
}

inline __m512i load_bits(const uint16_t* p) { return _mm512_load_si512(p); }
inline __m512bh set1_pair(const void* pair) {
  int32_t both;
  __builtin_memcpy(&both, pair, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

// e4m3 numbers, 32 or 64, with one scale.
template <int kNumbers>
inline void load_e4m3(const uint8_t* src, uint8_t scale, uint16_t* dst) {
  if (!Simd::usual_e4m3<kNumbers>(src, scale)) {
    alignas(64) float exact[kNumbers];
    Simd::dequantize_tile<kNumbers>(src, scale, exact);
    for (int i = 0; i < kNumbers; i += 32) {
      _mm512_store_si512(dst + i, (__m512i)_mm512_cvtne2ps_pbh(Simd::load(exact + i + 16), Simd::load(exact + i)));
    }
    return;
  }
  // A byte's bits, moved into a bf16: only the exponent is to be made right.
  const __m512i exponent = _mm512_set1_epi16(static_cast<short>((scale - 7) << 7)),
                kept = _mm512_set1_epi16(static_cast<short>(0x87f0));
  for (int i = 0; i < kNumbers; i += 32) {
    const __m256i part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(part), 4);
    _mm512_store_si512(dst + i, _mm512_add_epi16(_mm512_and_si512(wide, kept), exponent));
  }
}

// A row of nvfp4. For every 32 numbers, which have two scales, a table of all 16 numbers times each of them.
inline void load_e2m1(const uint8_t* src, const uint8_t* scales, uint16_t* dst) {
  alignas(64) float factors[kNvfp4ScaleBytes];
  Simd::dequantize_tile<kNvfp4ScaleBytes>(scales, kUnitScale, factors);
  const V values = Simd::e2m1_values();
  const __m512i nibble = _mm512_set1_epi32(0x000f000f);
  const __m512i table_half = _mm512_maskz_set1_epi32(0xff00, 0x00100010);
  for (int d = 0; d < kLatentDim; d += 2 * kNvfp4Tile) {
    const float* factor = factors + d / kNvfp4Tile;
    const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(Simd::mul(values, Simd::set1(factor[1])),
                                                       Simd::mul(values, Simd::set1(factor[0])));
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + d / 2)));
    const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    const __m512i place = _mm512_ternarylogic_epi32(both, nibble, table_half, 0xea);  // (a & b) | c
    _mm512_store_si512(dst + d, _mm512_permutexvar_epi16(place, table));
  }
}

inline void load_row(const Row& row, uint16_t* dst) {
  switch (row.layout) {
    case Layout::kFp8DsMla:
      for (int t = 0; t < kScaleTiles; ++t) {
        load_e4m3<kScaleTile>(row.data + t * kScaleTile, row.scales[t], dst + t * kScaleTile);
      }
      for (int d = 0; d < kRopeDim; d += 32) {
        _mm512_store_si512(dst + kNopeDim + d, _mm512_loadu_si512(row.data + kNopeDim + 2 * d));
      }
      break;
    case Layout::kMxfp8:
      for (int t = 0; t < kMxfp8ScaleBytes; ++t) {
        load_e4m3<kMxfp8Tile>(row.data + t * kMxfp8Tile, row.scales[t], dst + t * kMxfp8Tile);
      }
      break;
    case Layout::kBf16:
      for (int d = 0; d < kLatentDim; d += 32) _mm512_store_si512(dst + d, _mm512_loadu_si512(row.data + 2 * d));
      break;
    default:
      load_e2m1(row.data, row.scales, dst);
  }
}

// s[k, h] for N vectors of heads and K keys.
template <int N, int K>
inline void score_block(const int32_t* q, const uint16_t* rows, float* s) {
  V acc[N][K];
#pragma GCC unroll 2
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) acc[i][k] = Simd::set1(0);
  }
#pragma GCC unroll 1
  for (int d = 0; d < kLatentDim / 2; ++d) {
    __m512bh queries[N];
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) queries[i] = (__m512bh)_mm512_load_si512(q + i * kQueryVector + d * kL);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const __m512bh numbers = set1_pair(rows + k * kRowStride + 2 * d);
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) acc[i][k] = _mm512_dpbf16_ps(acc[i][k], queries[i], numbers);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) Simd::store(s + (i * kTileKeys + k) * kL, acc[i][k]);
  }
}

// A few rows stay in the first-level cache while all heads pass over them.
struct ScoreKeys {
  const Scratch& s;
  int32_t vectors;
  template <int K>
  void run(int key) const {
    const uint16_t* rows = s.rows + key * kRowStride;
    float* p = s.p + key * kL;
    int32_t v = 0;
    if constexpr (K <= kScoreKeys) {
      for (; v + 1 < vectors; v += 2) score_block<2, K>(s.q + v * kQueryVector, rows, p + v * kTileKeys * kL);
    }
    if (v < vectors) score_block<1, K>(s.q + v * kQueryVector, rows, p + v * kTileKeys * kL);
  }
};

inline void scores(const Row* tile, int n, const Row*, int, const Scratch& s, int32_t heads) {
  for (int k = 0; k < n; ++k) load_row(tile[k], s.rows + k * kRowStride);
  const ScoreKeys keys{s, head_vectors(heads)};
  keys.vectors == 1 ? for_blocks<kLoneScoreKeys>(n, keys) : for_blocks<kScoreKeys>(n, keys);
}

// Orders that interleave 16-bit numbers: of the lower halves of two vectors, of their upper halves, and of the two
// halves of one vector.
struct Interleave {
  __m512i low, high, halves;

  Interleave() {
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto with_odd = [even](int from) {
      return _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(from)), 16));
    };
    low = with_odd(32);
    high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    halves = with_odd(16);
  }
};

// Weights from probabilities, two keys at once.
inline void split_weights(const Scratch& s, int32_t head, int n, const Interleave& order) {
  float* const p = s.p + head * kTileKeys;
  int32_t* weights = s.weights + head * kTileKeys;
  if (n % 2 != 0) Simd::store(p + n * kL, Simd::set1(0));
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int k = 0; k < n; k += 2, weights += 2 * kL) {
    const V even = Simd::load(p + k * kL), odd = Simd::load(p + (k + 1) * kL);
    const __m512i rounded = _mm512_permutexvar_epi16(order.halves, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    const V even_rest = Simd::sub(even, _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16)));
    const V odd_rest = Simd::sub(odd, _mm512_castsi512_ps(_mm512_and_si512(rounded, upper)));
    const __m512i rest = _mm512_permutexvar_epi16(order.halves, (__m512i)_mm512_cvtne2ps_pbh(odd_rest, even_rest));
    _mm512_store_si512(weights, rounded);
    _mm512_store_si512(weights + kL, rest);
  }
}

inline void softmax(const Scratch& s, int32_t heads, int n, float scale_log2, bool first) {
  const Interleave order;
  for (int32_t h = 0; h < heads; h += kL) {
    softmax_of_vector(s, h, n, scale_log2, first);
    split_weights(s, h, n, order);
  }
}

// Interleaves a slice of a tile's rows, with zeros instead of a last one that is missing. It is done anew for each
// slice, as the room for one stays in the first-level cache.
inline void interleave_slice(const Scratch& s, int n, int d) {
  const Interleave order;
  for (int k = 0; k < n; k += 2) {
    const uint16_t* row = s.rows + k * kRowStride + d;
    uint16_t* pair = s.pairs + k * kSlice;
    for (int i = 0; i < kSlice; i += 32) {
      const __m512i even = load_bits(row + i),
                    odd = k + 1 < n ? load_bits(row + kRowStride + i) : _mm512_setzero_si512();
      _mm512_store_si512(pair + 2 * i, _mm512_permutex2var_epi16(even, order.low, odd));
      _mm512_store_si512(pair + 2 * i + 32, _mm512_permutex2var_epi16(even, order.high, odd));
    }
  }
}

// o[h, d .. d + kSlice] += sum_k p[h, k] * rows[k, d ..], keys 2i and 2i + 1 at once; or that merged into the total.
template <int H>
inline void accumulate_block(const Scratch& s, int32_t head, int n, int d, bool first, const Merge& merge) {
  constexpr int N = Simd::kOutVectors;
  const int32_t* weights[H];
  float* o = s.o + head * kLatentDim + d;
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) weights[h] = s.weights_of(head + h);
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
  for (int k = 0; 2 * k < n; ++k) {
    __m512bh row[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) row[i] = (__m512bh)load_bits(s.pairs + (k * kSlice + i * kL) * 2);
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 2
      for (int term = 0; term < 2; ++term) {
        const __m512bh weight = set1_pair(weights[h] + (2 * k + term) * kL);
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
    accumulate_block<H>(s, h, n, d, first, merge.from(h, h * kLatentDim + d));
  }
};

// The next tile's bytes are fetched meanwhile, a few rows at a time: asked for all at once they would stall what comes
// after.
inline void accumulate(const Scratch& s, int32_t heads, int n, bool first, const Merge& merge, const Row* next,
                       int next_n) {
  int fetched = 0;
  for (int d = 0; d < kLatentDim; d += kSlice) {
    for (const int due = next_n * (d + kSlice) / kLatentDim; fetched < due; ++fetched) prefetch_row(next[fetched]);
    interleave_slice(s, n, d);
    for_blocks<Simd::kOutHeads>(heads, AccumulateHeads{s, n, d, first, merge});
  }
}

inline float* numbers_of(float* o, int32_t h, float*) { return o + h * kLatentDim; }
