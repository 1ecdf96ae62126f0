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
static_assert(kTileKeys % kGroupKeys == 0 && kBlock == kScaleTile, "whole groups");

// Scores of one block of heads and one group of keys, [32, 16].
constexpr int kScores = kGroupKeys * kHeadBlock;

#include "cpu/conversion_amx-inl.h"

// One lane's scratch. Sizes: kLaneBytesFixed and kLaneBytesPerHead of launch.h.
struct Scratch {
  Conversion* conversion;  // of its keys: twice for a single block of heads
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
  static_assert(sizeof(ConversionTwice) <= sizeof(ConversionOnce), "in its place");
  static_assert(sizeof(ConversionOnce) + sizeof(float) * 4 * kSums + sizeof(V) * 2 * 16 <= kLaneBytesFixed, "tile");
  static_assert(2 * (kLatentDim + 2 * kTileKeys) + 4 * (kLatentDim + kTileKeys + 4) <= kLaneBytesPerHead, "per head");
  Scratch s;
  if (heads == kHeadBlock) {
    s.conversion = reinterpret_cast<ConversionTwice*>(bytes);
    s.conversion->reset();
  } else {
    ConversionOnce* conversion = reinterpret_cast<ConversionOnce*>(bytes);
    conversion->reset();
    s.conversion = conversion;
  }
  float* floats = reinterpret_cast<float*>(bytes + sizeof(ConversionOnce));
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

// Scores of a group for one or two blocks of heads. `rows(b)` is block b of its keys; `beside` runs after each of 16
// steps.
template <int B, typename Rows, typename Beside>
inline void score_group(const Scratch& s, int group, int32_t block, const Rows& rows, const Beside& beside) {
  const uint16_t* q = s.q + block * kHeadBlock * kLatentDim;
  float* p[2];
  for (int b = 0; b < B; ++b) p[b] = s.p + ((block + b) * kGroups + group) * kScores;
  Tiles::zero<0>();
  Tiles::zero<1>();
  if constexpr (B == 2) {
    Tiles::zero<2>();
    Tiles::zero<3>();
  }
  for (int d = 0; d < 16; ++d, q += kTile) {
    const uint16_t* keys = rows(d / 2) + d % 2 * kTile;
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
inline void scores_once(ConversionOnce& conversion, const Row* rows, int n, const Row* next, int next_n,
                        const Scratch& s, int32_t blocks) {
  if (conversion.tile() != rows) conversion.start(rows, n);
  conversion.announce(next, next_n);
  const int groups = conversion.groups(), slots = (blocks + 1) / 2 * 16;
  while (!conversion.has(0)) conversion.step();
  for (int group = 0; group < groups; ++group) {
    // The next group's conversion in even parts.
    Shares shares{group + 1 < groups ? kSteps : 0, slots};
    const auto beside = [&] { shares.take([&] { conversion.step(); }); };
    const auto rows = [&](int block) { return conversion.rows(group, block); };
    for (int32_t block = 0; block < blocks; block += 2) {
      block + 1 < blocks ? score_group<2>(s, group, block, rows, beside)
                         : score_group<1>(s, group, block, rows, beside);
    }
  }
}

inline void scores_twice(ConversionTwice& conversion, const Row* rows, int n, const Row* next, int next_n,
                         const Scratch& s) {
  conversion.start(rows, n);
  conversion.announce(next, next_n);
  int done = 0;
  const auto step = [&] {
    if (done < conversion.steps()) conversion.step_rows(done++);
  };
  while (done < ConversionTwice::kLead) step();
  for (int group = 0; group < conversion.groups(); ++group) {
    score_group<1>(s, group, 0, [&](int block) { return conversion.rows(group, block); }, step);
  }
}

inline void scores(const Row* rows, int n, const Row* next, int next_n, const Scratch& s, int32_t heads) {
  const int32_t blocks = head_blocks(heads);
  blocks == 1 ? scores_twice(static_cast<ConversionTwice&>(*s.conversion), rows, n, next, next_n, s)
              : scores_once(static_cast<ConversionOnce&>(*s.conversion), rows, n, next, next_n, s, blocks);
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

// Sums over the tile's keys for B blocks of heads and 4 / B times 16 numbers. `pairs(g, b)` is block b of a group's
// keys; `beside` runs twice for each group and block.
template <int B, typename Pairs, typename Beside>
inline void output_block(const Scratch& s, int groups, const Pairs& pairs, int32_t block, int d, bool first,
                         const Merge& merge, const Beside& beside) {
  const uint16_t* weights = s.weights + block * kGroups * 2 * kTile;
  constexpr int kNext = kGroups * 2 * kTile;  // the next block's weights
  Tiles::zero<0>();
  Tiles::zero<1>();
  Tiles::zero<2>();
  Tiles::zero<3>();
  for (int g = 0; g < groups; ++g, weights += 2 * kTile) {
    const uint16_t* values = pairs(g, d / kBlock) + d % kBlock / 16 * kTile;
    if constexpr (B == 2) {
      Tiles::load<6>(values);
      Tiles::load<7>(values + kTile);
      for (int part = 0; part < 2; ++part) {
        Tiles::load<4>(weights + part * kTile);
        Tiles::dot<0, 4, 6>();
        Tiles::dot<1, 4, 7>();
        Tiles::load<5>(weights + kNext + part * kTile);
        Tiles::dot<2, 5, 6>();
        Tiles::dot<3, 5, 7>();
      }
    } else {
      Tiles::load<4>(weights);
      Tiles::load<6>(values);
      Tiles::dot<0, 4, 6>();
      Tiles::load<7>(values + kTile);
      Tiles::dot<1, 4, 7>();
      Tiles::load<5>(weights + kTile);
      Tiles::dot<0, 5, 6>();
      Tiles::dot<1, 5, 7>();
      beside();
      Tiles::load<6>(values + 2 * kTile);
      Tiles::dot<2, 4, 6>();
      Tiles::load<7>(values + 3 * kTile);
      Tiles::dot<3, 4, 7>();
      Tiles::dot<2, 5, 6>();
      Tiles::dot<3, 5, 7>();
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
inline void accumulate_once(ConversionOnce& conversion, const Scratch& s, int32_t blocks, bool first,
                            const Merge& merge, const Row* next, int next_n) {
  const int groups = conversion.groups(), slots = kLatentDim / 32 * groups;
  const uint16_t* keys[kGroups];
  for (int g = 0; g < groups; ++g) keys[g] = conversion.pairs(g, 0);
  const auto pairs = [&](int group, int block) { return keys[group] + block * kBlockNumbers; };
  Softening softening(s, first);
  // Steps for the two blocks from `block` on.
  const auto softening_steps = [&](int32_t block) { return min_int(2, blocks - block) * groups * Softening::kSteps; };
  for (int i = 0; i < softening_steps(0); ++i) softening.step();
  for (int32_t block = 0; block < blocks; block += 2) {
    const bool two = block + 1 < blocks, last = block + 2 >= blocks;
    if (last && next_n > 0) conversion.start(next, next_n);
    Shares shares{!last ? softening_steps(block + 2) : next_n > 0 ? kSteps : 0, slots};
    const auto beside = [&] { shares.take([&] { last ? conversion.step() : softening.step(); }); };
    for (int d = 0; d < kLatentDim; d += two ? 32 : 64) {
      two ? output_block<2>(s, groups, pairs, block, d, first, merge, beside)
          : output_block<1>(s, groups, pairs, block, d, first, merge, beside);
    }
  }
}

inline void accumulate_twice(ConversionTwice& conversion, const Scratch& s, bool first, const Merge& merge) {
  const int groups = conversion.groups();
  Softening softening(s, first);
  for (int i = 0; i < groups * Softening::kSteps; ++i) softening.step();
  int done = 0;
  const auto step = [&] {
    if (done < conversion.steps()) conversion.step_pairs(done++);
  };
  while (done < ConversionTwice::kLead) step();
  const auto pairs = [&](int group, int block) { return conversion.pairs(group, block); };
  for (int d = 0; d < kLatentDim; d += 64) output_block<1>(s, groups, pairs, 0, d, first, merge, step);
}

inline void accumulate(const Scratch& s, int32_t heads, int, bool first, const Merge& merge, const Row* next,
                       int next_n) {
  const int32_t blocks = head_blocks(heads);
  blocks == 1 ? accumulate_twice(static_cast<ConversionTwice&>(*s.conversion), s, first, merge)
              : accumulate_once(static_cast<ConversionOnce&>(*s.conversion), s, blocks, first, merge, next, next_n);
}
