// Products of bf16 tiles with fp32 sums (AMX). What is said of products_bf16-inl.h holds here too. Part of
// decode-inl.h, which see.
//
// A product adds A [16, 32] times B [32, 16] to C [16, 16]; B is stored by pairs of rows, number by number:
//   scores  C [key, head] = A: 16 keys' latents as they are    times B: 16 heads' q, turned around once a token
//   output  C [head, d]   = A: the weights, turned around      times B: pairs of keys' latents, interleaved
// So a key is converted once and never turned around, and softmax runs along keys with 16 heads a vector. Tiles are fed
// from memory and multiplied beside the vector units, so keys are converted between the products of those before them.
//
// Heads are padded to 16 with q = 0, keys to 32 with latents of 0 and weights of 0.

constexpr int kTileKeys = 160;  // four segments for DeepSeek-V4's 128 + 512 keys, as even as can be

#include "cpu/keys-inl.h"

constexpr int kL = Simd::kLanes;
using V = Simd::V;

constexpr int kTile = 512;                       // bf16 numbers of a tile
constexpr int kSums = 256;                       // floats of one: sums of 16 heads and 16 numbers
constexpr int kGroupKeys = 32;                   // that one product sums over
constexpr int kGroups = kTileKeys / kGroupKeys;  // at most
constexpr int kBlock = 64;                       // numbers of a key that are converted together, as they have one scale
constexpr int kBlocks = kLatentDim / kBlock;
constexpr int kGroupNumbers = kGroupKeys * kLatentDim;
static_assert(kTileKeys % kGroupKeys == 0 && kBlock == kScaleTile, "whole groups");

// Scores of one block of heads and one group of keys, [32, 16].
constexpr int kScores = kGroupKeys * kHeadBlock;

// The order of converted keys. 64 numbers of 16 bits are two vectors h = 0, 1, whose lane l holds the numbers
// 16 l + 8 h + 0 .. 7: unpacking bytes gives it, and here numbers of 16 bits are put into it.
inline void load_block(const void* from, __m512i* block0, __m512i* block1) {
  const __m512i x0 = _mm512_loadu_si512(from), x1 = _mm512_loadu_si512(static_cast<const uint8_t*>(from) + 64);
  *block0 = _mm512_permutex2var_epi64(x0, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), x1);
  *block1 = _mm512_permutex2var_epi64(x0, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), x1);
}

// Conversion of keys to bf16, tile after tile and group after group, in steps of 64 numbers of 16 keys.
//
// An e4m3 byte s eeee mmm becomes the word s 0000eeee mmm0000 by two bit matrices, one for each half of it; adding
// (scale - 7) << 7 makes its exponent right. Subnormal numbers, zeros, NaN, and scales that take a number beyond normal
// bf16 need more: they are rare, and go the way of the other kernels.
class Conversion {
 public:
  static constexpr int kSteps = 2 * kBlocks;  // of a group

  void reset() {
    tile_ = nullptr;
    n_ = base_ = 0;
  }
  // Goes on with a tile. The one before it may still be multiplied by weights.
  void start(const Row* tile, int n) {
    base_ = (base_ + groups()) % kRing;
    tile_ = tile;
    n_ = n;
    next_n_ = done_ = 0;
  }
  // The tile after it, whose bytes are fetched meanwhile.
  void announce(const Row* next, int next_n) {
    next_ = next;
    next_n_ = next_n;
  }
  const Row* tile() const { return tile_; }
  int groups() const { return (n_ + kGroupKeys - 1) / kGroupKeys; }
  int keys(int group) const { return n_ - group * kGroupKeys; }  // from this group on
  bool has(int group) const { return done_ >= (group + 1) * kSteps; }

  // A group's keys as A of the scores: [8 blocks, 2 halves of the keys, 2 halves of the block, 16 keys, 32].
  const uint16_t* rows(int group) const { return rows_[(base_ + group) % 2]; }
  // And as B of the output: [32, 16 pairs of keys, 16 numbers, 2].
  const uint16_t* pairs(int group) const { return pairs_[(base_ + group) % kRing]; }

  __attribute__((noinline)) void step() {
    const int group = done_ / kSteps, block = done_ % kSteps / 2, half = done_ % 2;
    if (done_ % kSteps == 0) begin(group);
    ++done_;
    for (int key = 16 * half; key < 16 * half + 16; ++key) {
      if (later_[key] != nullptr) fetch(*later_[key], block);
    }
    convert(group, block, half);
  }

 private:
  static constexpr int kRing = kGroups + 1;
  static_assert(kRing % 2 == 0, "rows alternate");

  // Groups whose bytes are on their way.
  static constexpr int kAhead = 2;

  void begin(int group) {
    alignas(64) static const uint8_t kZeros[2 * kLatentDim] = {};
    static const Row kNoKey = {kZeros, nullptr, Layout::kBf16};
    for (int i = 0; i < kGroupKeys; ++i) {
      const int key = group * kGroupKeys + i, later = key + kAhead * kGroupKeys;
      const int beyond = later - groups() * kGroupKeys;
      later_[i] = later < n_ ? &tile_[later] : beyond >= 0 && beyond < next_n_ ? &next_[beyond] : nullptr;
      now_[i] = key < n_ ? &tile_[key] : &kNoKey;
      const Layout layout = now_[i]->layout;
      const bool mxfp8 = layout == Layout::kMxfp8;
      usual_[i] = mxfp8 || layout == Layout::kFp8DsMla;
      if (layout == Layout::kNvfp4) {
        Simd::dequantize_tile<kNvfp4ScaleBytes>(now_[i]->scales, kUnitScale, factors_[i]);
      }
      if (!usual_[i]) continue;
      // Of every half a block, which is a tile of mxfp8.
      const __m128i loaded = mxfp8 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(now_[i]->scales))
                                   : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(now_[i]->scales));
      const __m128i bytes = mxfp8 ? loaded : _mm_unpacklo_epi8(loaded, loaded);
      const __mmask16 in_use = mxfp8 ? 0xffff : 0x3fff;
      const __m512i power = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(7));
      usual_[i] = (_mm512_cmple_epu32_mask(power, _mm512_set1_epi32(246 - 7)) & in_use) == in_use;
      const __m512i bias = _mm512_slli_epi32(power, 7);
      _mm512_store_si512(scales_[i], _mm512_or_si512(bias, _mm512_slli_epi32(bias, 16)));
    }
  }

  static void fetch(const Row& row, int block) {
    const int per_block = row.layout == Layout::kBf16 ? 2 * kBlock : row.layout == Layout::kNvfp4 ? kBlock / 2 : kBlock;
    const uint8_t* bytes = row.data + block * per_block;
    prefetch<Level::kSecond>(bytes);
    const bool last = block == kBlocks - 1;
    if (row.layout == Layout::kBf16 || (row.layout == Layout::kFp8DsMla && last)) prefetch<Level::kSecond>(bytes + 64);
    if (row.scales != nullptr && last) prefetch<Level::kSecond>(row.scales);
  }

  // e4m3 times a power of two has four bits: as bf16 it is a float's upper half.
  __attribute__((noinline)) static void convert_exactly(const Row& row, int block, uint16_t* to) {
    alignas(64) float numbers[kBlock];
    const uint8_t* data = row.data + block * kBlock;
    if (row.layout == Layout::kMxfp8) {
      for (int half = 0; half < 2; ++half) {
        Simd::dequantize_tile<kMxfp8Tile>(data + half * kMxfp8Tile, row.scales[2 * block + half],
                                          numbers + half * kMxfp8Tile);
      }
    } else {
      Simd::dequantize_tile<kScaleTile>(data, row.scales[block], numbers);
    }
    for (int i = 0; i < kBlock; i += kL) {
      const __m512i bits = _mm512_castps_si512(Simd::load(numbers + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
  }

  // e2m1 times e4m3 has six bits. Lane l of both vectors is tile l of the block.
  void convert_e2m1(int key, int block, __m512i* block0, __m512i* block1) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(now_[key]->data + block * (kBlock / 2)));
    const __m512i twice =
        _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), _mm512_castsi256_si512(bytes));
    const __m512i tile = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const V scale = _mm512_permutexvar_ps(tile, _mm512_castps128_ps512(_mm_load_ps(factors_[key] + 4 * block)));
    const V values = Simd::e2m1_values();
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    // Byte j of a lane, each in 32 bits; the odd lanes have the second half of 16 bytes.
    const __m512i first =
        _mm512_add_epi32(_mm512_broadcast_i32x4(_mm_setr_epi32(0x80808000, 0x80808001, 0x80808002, 0x80808003)),
                         _mm512_setr_epi32(0, 0, 0, 0, 8, 8, 8, 8, 0, 0, 0, 0, 8, 8, 8, 8));
    const auto half = [&](int bytes_before) {
      const __m512i codes = _mm512_shuffle_epi8(twice, _mm512_add_epi32(first, _mm512_set1_epi32(bytes_before)));
      const V even = Simd::mul(_mm512_permutexvar_ps(codes, values), scale);
      const V odd = Simd::mul(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values), scale);
      return _mm512_ternarylogic_epi32(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd),
                                       upper,
                                       0xf8);  // a | (b & c)
    };
    *block0 = half(0);
    *block1 = half(4);
  }

  void convert_any(int key, int block, __m512i* block0, __m512i* block1) const {
    const Row& row = *now_[key];
    if (row.layout == Layout::kNvfp4) {
      convert_e2m1(key, block, block0, block1);
    } else if (row.layout == Layout::kBf16) {
      load_block(row.data + block * 2 * kBlock, block0, block1);
    } else if (row.layout == Layout::kFp8DsMla && block == kScaleTiles) {
      load_block(row.data + kNopeDim, block0, block1);
    } else {
      alignas(64) uint16_t exact[kBlock];
      convert_exactly(row, block, exact);
      load_block(exact, block0, block1);
    }
  }

  // Of the two halves of a block.
  static __m512i bias(const uint32_t* scales) {
    return _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(scales[0])), 0xff00, static_cast<int>(scales[1]));
  }

  // False: some byte of the two keys is not a usual one.
  bool convert_usual(int key, int block, __m512i* a0, __m512i* a1, __m512i* b0, __m512i* b1) const {
    const __m512i low = _mm512_set1_epi64(0x0000000001020408), high = _mm512_set1_epi64(0x1020400000000080);
    const __m512i a = _mm512_loadu_si512(now_[key]->data + block * kBlock);
    const __m512i b = _mm512_loadu_si512(now_[key + 1]->data + block * kBlock);
    // Without its sign a usual byte is from 8 to 126: twice it, less 16, is at most 236.
    const __m512i sixteen = _mm512_set1_epi8(16);
    const __m512i most = _mm512_max_epu8(_mm512_sub_epi8(_mm512_add_epi8(a, a), sixteen),
                                         _mm512_sub_epi8(_mm512_add_epi8(b, b), sixteen));
    if (_mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(static_cast<char>(236))) != 0) return false;
    const __m512i a_low = _mm512_gf2p8affine_epi64_epi8(a, low, 0), a_high = _mm512_gf2p8affine_epi64_epi8(a, high, 0);
    const __m512i b_low = _mm512_gf2p8affine_epi64_epi8(b, low, 0), b_high = _mm512_gf2p8affine_epi64_epi8(b, high, 0);
    const __m512i a_bias = bias(scales_[key] + 2 * block), b_bias = bias(scales_[key + 1] + 2 * block);
    *a0 = _mm512_add_epi16(_mm512_unpacklo_epi8(a_low, a_high), a_bias);
    *a1 = _mm512_add_epi16(_mm512_unpackhi_epi8(a_low, a_high), a_bias);
    *b0 = _mm512_add_epi16(_mm512_unpacklo_epi8(b_low, b_high), b_bias);
    *b1 = _mm512_add_epi16(_mm512_unpackhi_epi8(b_low, b_high), b_bias);
    return true;
  }

  bool usual(int key, int block) const {
    return usual_[key] && (block < kScaleTiles || now_[key]->layout == Layout::kMxfp8);
  }

  void convert(int group, int block, int half) {
    uint16_t* row = rows_[(base_ + group) % 2] + (2 * block + half) * 2 * kTile;
    uint16_t* pair = pairs_[(base_ + group) % kRing] + 4 * block * kTile + half * kTile / 2;
    for (int key = 16 * half; key < 16 * half + 16; key += 2, row += 64, pair += 32) {
      __m512i a0, a1, b0, b1;
      if (!usual(key, block) || !usual(key + 1, block) || !convert_usual(key, block, &a0, &a1, &b0, &b1)) {
        convert_any(key, block, &a0, &a1);
        convert_any(key + 1, block, &b0, &b1);
      }
      _mm512_store_si512(row, a0);
      _mm512_store_si512(row + 32, b0);
      _mm512_store_si512(row + kTile, a1);
      _mm512_store_si512(row + kTile + 32, b1);
      _mm512_store_si512(pair, _mm512_unpacklo_epi16(a0, b0));
      _mm512_store_si512(pair + kTile, _mm512_unpackhi_epi16(a0, b0));
      _mm512_store_si512(pair + 2 * kTile, _mm512_unpacklo_epi16(a1, b1));
      _mm512_store_si512(pair + 3 * kTile, _mm512_unpackhi_epi16(a1, b1));
    }
  }

  alignas(64) uint16_t rows_[2][kGroupNumbers];
  uint16_t pairs_[kRing][kGroupNumbers];
  // Of the group that is being converted: e4m3's (scale - 7) << 7 in both halves, of every half a block; nvfp4's
  // scales.
  alignas(64) uint32_t scales_[kGroupKeys][2 * kBlocks];
  alignas(64) float factors_[kGroupKeys][kNvfp4ScaleBytes];
  const Row *now_[kGroupKeys], *later_[kGroupKeys];
  bool usual_[kGroupKeys];  // e4m3, and its scales give normal numbers
  const Row *tile_, *next_;
  int n_, next_n_;
  int base_;  // where in the ring its groups begin
  int done_;  // steps
};

// One lane's scratch. Sizes: kLaneBytesFixed and kLaneBytesPerHead of launch.h.
struct Scratch {
  Conversion* conversion;  // of its keys
  float* sums;             // [4, 16, 16]
  V* turned;               // [2, 16 pairs of keys] weights that are to be turned around, of 16 heads
  uint16_t* q;             // [head blocks, 16, 16 pairs of numbers, 16 heads, 2]
  uint16_t* weights;       // [head blocks, groups, 2, 16 heads, 32 keys] p as the sum of two bf16 numbers
  float* o;                // [head blocks, 512 / 16, 16 heads, 16] in the order of converted keys
  float* p;                // [head blocks, groups, 32 keys, 16 heads] scores
  float* highest;          // [heads] of the tile's s, log2 units
  float* max;              // [heads] of s, log2 units
  float* sum;              // [heads] of p
  float* alpha;            // [heads]
  float scale_log2;
};

inline Scratch carve(uint8_t* bytes, int32_t heads) {
  static_assert(sizeof(Conversion) + sizeof(float) * 4 * kSums + sizeof(V) * 2 * 16 <= kLaneBytesFixed, "tile");
  static_assert(2 * (kLatentDim + 2 * kTileKeys) + 4 * (kLatentDim + kTileKeys + 4) <= kLaneBytesPerHead, "per head");
  Scratch s;
  s.conversion = reinterpret_cast<Conversion*>(bytes);
  s.conversion->reset();
  float* floats = reinterpret_cast<float*>(bytes + sizeof(Conversion));
  s.sums = floats, floats += 4 * kSums;
  s.turned = reinterpret_cast<V*>(floats), floats += 2 * 16 * kL;
  uint16_t* at = reinterpret_cast<uint16_t*>(floats);
  s.q = at, at += heads * kLatentDim;
  s.weights = at, at += heads * 2 * kTileKeys;
  floats = reinterpret_cast<float*>(at);
  s.o = floats, floats += heads * kLatentDim;
  s.p = floats, floats += heads * kTileKeys;
  s.highest = floats, floats += heads;
  s.max = floats, floats += heads;
  s.sum = floats, floats += heads;
  s.alpha = floats;
  return s;
}

inline int32_t head_blocks(int32_t heads) { return padded_heads(heads) / kHeadBlock; }

#include "cpu/exp2-inl.h"

// A head's numbers, to `room`. Interleaving two keys splits each lane once more: of 64 numbers, 16 l + 4 j + i is in
// vector j at 4 l + i.
inline float* numbers_of(float* o, int32_t h, float* room) {
  o += h / kHeadBlock * kHeadBlock * kLatentDim + h % kHeadBlock * kL;
  for (int d = 0; d < kLatentDim; d += kBlock, o += kBlock * kHeadBlock) {
    const V z0 = Simd::load(o), z1 = Simd::load(o + kSums), z2 = Simd::load(o + 2 * kSums),
            z3 = Simd::load(o + 3 * kSums);
    const V a = _mm512_shuffle_f32x4(z0, z1, 0x44), b = _mm512_shuffle_f32x4(z2, z3, 0x44);
    const V c = _mm512_shuffle_f32x4(z0, z1, 0xee), e = _mm512_shuffle_f32x4(z2, z3, 0xee);
    Simd::store(room + d, _mm512_shuffle_f32x4(a, b, 0x88));
    Simd::store(room + d + 16, _mm512_shuffle_f32x4(a, b, 0xdd));
    Simd::store(room + d + 32, _mm512_shuffle_f32x4(c, e, 0x88));
    Simd::store(room + d + 48, _mm512_shuffle_f32x4(c, e, 0xdd));
  }
  return room;
}

inline void load_queries(const DecodeParams& p, int64_t first_head, int32_t heads, Scratch& s) {
  s.scale_log2 = p.scale * kLog2e;
  const uint16_t* q = static_cast<const uint16_t*>(p.q) + first_head * kLatentDim;
  uint16_t* to = s.q;
  for (int32_t first = 0; first < heads; first += kHeadBlock) {
    for (int d = 0; d < kLatentDim; d += kBlock) {
      V halves[2][kHeadBlock];
      for (int h = 0; h < kHeadBlock; ++h) {
        __m512i block0 = _mm512_setzero_si512(), block1 = block0;
        if (first + h < heads) load_block(q + (first + h) * kLatentDim + d, &block0, &block1);
        halves[0][h] = _mm512_castsi512_ps(block0);
        halves[1][h] = _mm512_castsi512_ps(block1);
      }
      for (auto& half : halves) {
        Simd::transpose(half);
        for (int i = 0; i < 16; ++i, to += 32) _mm512_store_ps(to, half[i]);
      }
    }
  }
}

// So many steps of vector work in so many slots between tile products, in even parts.
struct Shares {
  int steps, slots, due = 0;
  template <typename Step>
  void take(const Step& step) {
    for (due += steps; due >= slots; due -= slots) step();
  }
};

// Scores of a group for one or two blocks of heads. `beside` runs after each of 16 steps.
template <int B, typename Beside>
inline void score_group(const Scratch& s, int group, int32_t block, const Beside& beside) {
  const uint16_t* q = s.q + block * kHeadBlock * kLatentDim;
  const uint16_t* row = s.conversion->rows(group);
  float* p[2];
  for (int b = 0; b < B; ++b) p[b] = s.p + ((block + b) * kGroups + group) * kScores;
  Tiles::zero<0>();
  Tiles::zero<1>();
  if constexpr (B == 2) {
    Tiles::zero<2>();
    Tiles::zero<3>();
  }
  for (int d = 0; d < 16; ++d, q += kTile) {
    const uint16_t* keys = row + (d / 2 * 4 + d % 2) * kTile;
    Tiles::load<6>(q);
    Tiles::load<4>(keys);
    Tiles::dot<0, 4, 6>();
    Tiles::load<5>(keys + 2 * kTile);
    Tiles::dot<1, 5, 6>();
    if constexpr (B == 2) {
      Tiles::load<7>(q + 16 * kTile);
      Tiles::dot<2, 4, 7>();
      Tiles::dot<3, 5, 7>();
    }
    beside();
  }
  Tiles::store<0>(p[0]);
  Tiles::store<1>(p[0] + kScores / 2);
  if constexpr (B == 2) {
    Tiles::store<2>(p[1]);
    Tiles::store<3>(p[1] + kScores / 2);
  }
  const V scale = Simd::set1(s.scale_log2);
  const int keys = min_int(s.conversion->keys(group), kGroupKeys);
  for (int b = 0; b < B; ++b) {
    float* highest = s.highest + (block + b) * kHeadBlock;
    const V lowest = Simd::set1(-__builtin_inff());
    V even = group == 0 ? lowest : Simd::load(highest), odd = lowest;
    for (int k = 0; k < keys; k += 2) {
      even = Simd::max(Simd::mul(Simd::load(p[b] + k * kHeadBlock), scale), even);
      if (k + 1 < keys) odd = Simd::max(Simd::mul(Simd::load(p[b] + (k + 1) * kHeadBlock), scale), odd);
    }
    Simd::store(highest, Simd::max(even, odd));
  }
}

// Keys are converted as their scores are computed, a tile's first ones as the tile before is accumulated.
inline void scores(const Row* rows, int n, const Row* next, int next_n, const Scratch& s, int32_t heads) {
  Conversion& conversion = *s.conversion;
  if (conversion.tile() != rows) conversion.start(rows, n);
  conversion.announce(next, next_n);
  const int groups = conversion.groups();
  const int32_t blocks = head_blocks(heads), slots = (blocks + 1) / 2 * 16;
  while (!conversion.has(0)) conversion.step();
  for (int group = 0; group < groups; ++group) {
    // The next group's conversion in even parts.
    Shares shares{group + 1 < groups ? Conversion::kSteps : 0, slots};
    const auto beside = [&] { shares.take([&] { conversion.step(); }); };
    for (int32_t block = 0; block < blocks; block += 2) {
      block + 1 < blocks ? score_group<2>(s, group, block, beside) : score_group<1>(s, group, block, beside);
    }
  }
}

// Pairs of bf16 numbers, rounded to nearest, from floats that are not negative. A NaN stays one if its lower half is
// not all ones, which it is not: scores have the latents' NaN or the processor's own.
inline V pairs_of(V a, V b) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(b), half);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(low, high, upper, 0xf8));  // low | (high & upper)
}
inline V rounded(V a) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(a), half), upper));
}

// Scores to weights, block of heads after block and group of keys after group, in small steps.
class Softening {
 public:
  static constexpr int kSteps = 6;  // of a block and a group: four of eight keys, and two that turn the weights around

  // `first`: the sums start anew.
  Softening(const Scratch& s, bool first)
      : s_(s), keys_(s.conversion->keys(0)), groups_(s.conversion->groups()), first_(first) {}

  __attribute__((noinline)) void step() {
    if (part_ < 4) {
      soften();
    } else {
      turn();
    }
    if (++part_ < kSteps) return;
    part_ = 0;
    if (++group_ < groups_) return;
    const int h = block_ * kHeadBlock;
    const V before = first_ ? Simd::set1(0) : Simd::mul(Simd::load(s_.sum + h), Simd::load(s_.alpha + h));
    Simd::store(s_.sum + h, Simd::add(before, Simd::add(even_, odd_)));
    even_ = odd_ = Simd::set1(0);
    group_ = 0;
    ++block_;
  }

 private:
  void soften() {
    const float* p = s_.p + (block_ * kGroups + group_) * kScores + part_ * 8 * kHeadBlock;
    const V max = Simd::load(s_.max + block_ * kHeadBlock), scale = Simd::set1(s_.scale_log2);
    const int keys = keys_ - group_ * kGroupKeys;
    const auto weight = [&](int key) {
      return key < keys ? exp2(Simd::sub(Simd::mul(Simd::load(p + key % 8 * kHeadBlock), scale), max)) : Simd::set1(0);
    };
#pragma GCC unroll 4
    for (int i = 4 * part_; i < 4 * part_ + 4; ++i) {
      const V a = weight(2 * i), b = weight(2 * i + 1);
      even_ = Simd::add(even_, a);
      odd_ = Simd::add(odd_, b);
      s_.turned[i] = pairs_of(a, b);
      s_.turned[16 + i] = pairs_of(Simd::sub(a, rounded(a)), Simd::sub(b, rounded(b)));
    }
  }

  void turn() {
    V r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = s_.turned[16 * (part_ - 4) + i];
    Simd::transpose(r);
    uint16_t* to = s_.weights + ((block_ * kGroups + group_) * 2 + part_ - 4) * kTile;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_ps(to + 32 * i, r[i]);
  }

  const Scratch& s_;
  const int keys_, groups_;
  const bool first_;
  V even_ = Simd::set1(0), odd_ = Simd::set1(0);
  int block_ = 0, group_ = 0, part_ = 0;
};

// The new maxima. The weights and their sums are made beside the products that use them.
inline void softmax(const Scratch& s, int32_t heads, int, float, bool first) {
  for (int32_t h = 0; h < heads; h += kHeadBlock) {
    V max = Simd::load(s.highest + h), alpha = Simd::set1(0);
    if (!first) {
      const V old = Simd::load(s.max + h);
      max = Simd::max(old, max);
      alpha = exp2(Simd::sub(old, max));
    }
    Simd::store(s.max + h, max);
    Simd::store(s.alpha + h, alpha);
  }
}

// Sums of 16 heads and 16 numbers that are in memory, to o or merged into the total.
inline void add_sums(const float* sums, const float* alpha, bool first, float* o, const Merge& merge) {
#pragma GCC unroll 16
  for (int h = 0; h < kHeadBlock; ++h, sums += kL, o += kL) {
    V sum = Simd::load(sums);
    if (!first) sum = Simd::fma(Simd::load(o), Simd::set1(alpha[h]), sum);
    if (merge.total == nullptr) {
      Simd::store(o, sum);
    } else {
      float* total = merge.total + h * kL;
      Simd::store(total, Simd::merge(Simd::load(total), Simd::set1(merge.keep[h]), sum, Simd::set1(merge.take[h])));
    }
  }
}

// A tile's groups of keys as B of the output.
struct Values {
  const uint16_t* pairs[kGroups];
  int groups;
};

// Sums over the tile's keys for B blocks of heads and 4 / B times 16 numbers. `beside` runs after each group.
template <int B, typename Beside>
inline void output_block(const Scratch& s, const Values& values, int32_t block, int d, bool first, const Merge& merge,
                         const Beside& beside) {
  const uint16_t* weights = s.weights + block * kGroups * 2 * kTile;
  constexpr int kNext = kGroups * 2 * kTile;  // the next block's weights
  Tiles::zero<0>();
  Tiles::zero<1>();
  Tiles::zero<2>();
  Tiles::zero<3>();
  for (int g = 0; g < values.groups; ++g, weights += 2 * kTile) {
    const uint16_t* pairs = values.pairs[g] + d / 16 * kTile;
    Tiles::load<6>(pairs);
    Tiles::load<7>(pairs + kTile);
    for (int part = 0; part < 2; ++part) {
      Tiles::load<4>(weights + part * kTile);
      Tiles::dot<0, 4, 6>();
      Tiles::dot<1, 4, 7>();
      if constexpr (B == 2) {
        Tiles::load<5>(weights + kNext + part * kTile);
        Tiles::dot<2, 5, 6>();
        Tiles::dot<3, 5, 7>();
      }
    }
    if constexpr (B == 1) {
      Tiles::load<6>(pairs + 2 * kTile);
      Tiles::load<7>(pairs + 3 * kTile);
      for (int part = 0; part < 2; ++part) {
        Tiles::load<4>(weights + part * kTile);
        Tiles::dot<2, 4, 6>();
        Tiles::dot<3, 4, 7>();
      }
    }
    beside();
  }
  const bool as_they_are = first && merge.total == nullptr;
  const auto place = [&](int i) {
    return ((block + (B == 2 ? i / 2 : 0)) * (kLatentDim / 16) + d / 16 + (B == 2 ? i % 2 : i)) * kSums;
  };
  const auto target = [&](int i) { return as_they_are ? s.o + place(i) : s.sums + i * kSums; };
  Tiles::store<0>(target(0));
  Tiles::store<1>(target(1));
  Tiles::store<2>(target(2));
  Tiles::store<3>(target(3));
  if (as_they_are) return;
  for (int i = 0; i < 4; ++i) {
    const int h = kHeadBlock * (block + (B == 2 ? i / 2 : 0));
    add_sums(s.sums + i * kSums, s.alpha + h, first, s.o + place(i), merge.from(h, place(i)));
  }
}

// Beside the products of two blocks of heads the weights of the next two are made, and beside the last ones' the next
// tile's first keys are converted.
inline void accumulate(const Scratch& s, int32_t heads, int, bool first, const Merge& merge, const Row* next,
                       int next_n) {
  Conversion& conversion = *s.conversion;
  Values values;
  values.groups = conversion.groups();
  for (int g = 0; g < values.groups; ++g) values.pairs[g] = conversion.pairs(g);
  const int32_t blocks = head_blocks(heads);
  Softening softening(s, first);
  // Steps for the two blocks from `block` on.
  const auto softening_steps = [&](int32_t block) {
    return min_int(2, blocks - block) * values.groups * Softening::kSteps;
  };
  for (int i = 0; i < softening_steps(0); ++i) softening.step();
  for (int32_t block = 0; block < blocks; block += 2) {
    const bool two = block + 1 < blocks, last = block + 2 >= blocks;
    const int width = two ? 32 : 64, slots = kLatentDim / width * values.groups;
    if (last && next_n > 0) conversion.start(next, next_n);
    Shares shares{!last ? softening_steps(block + 2) : next_n > 0 ? Conversion::kSteps : 0, slots};
    const auto beside = [&] { shares.take([&] { last ? conversion.step() : softening.step(); }); };
    for (int d = 0; d < kLatentDim; d += width) {
      two ? output_block<2>(s, values, block, d, first, merge, beside)
          : output_block<1>(s, values, block, d, first, merge, beside);
    }
  }
}
