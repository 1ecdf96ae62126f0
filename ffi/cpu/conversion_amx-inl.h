// Keys as bf16 numbers, in the two forms that tile products take. Part of products_amx-inl.h, which see.
//
// An e4m3 byte s eeee mmm becomes the word s 0000eeee mmm0000 by two bit matrices, one for each half of it; adding
// (scale - 7) << 7 makes its exponent right. Subnormal bytes get theirs from a table, for they are not rare. NaN, and
// scales that take a number beyond normal bf16, go the way of the other kernels.

constexpr int kSteps = 2 * kBlocks;  // of a group
constexpr int kBlockNumbers = kGroupKeys * kBlock;

// The order of converted keys. 64 numbers of 16 bits are two vectors h = 0, 1, whose lane l holds the numbers
// 16 l + 8 h + 0 .. 7: unpacking bytes gives it, and here numbers of 16 bits are put into it.
inline void load_block(const void* from, __m512i* block0, __m512i* block1) {
  const __m512i x0 = _mm512_loadu_si512(from), x1 = _mm512_loadu_si512(static_cast<const uint8_t*>(from) + 64);
  *block0 = _mm512_permutex2var_epi64(x0, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), x1);
  *block1 = _mm512_permutex2var_epi64(x0, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), x1);
}

// 64 numbers of two keys a, b.
struct Pair {
  __m512i a0, a1, b0, b1;
};
// The same, a's and b's numbers by turns, in order: vector i, lane l has numbers 16 l + 4 i + 0 .. 3 of both.
struct Interleaved {
  __m512i z[4];
};

inline Interleaved interleaved(const Pair& p) {
  return {{_mm512_unpacklo_epi16(p.a0, p.b0), _mm512_unpackhi_epi16(p.a0, p.b0), _mm512_unpacklo_epi16(p.a1, p.b1),
           _mm512_unpackhi_epi16(p.a1, p.b1)}};
}

// As A of the scores, two rows of a tile and of the next one.
inline void store(const Pair& p, uint16_t* row) {
  _mm512_store_si512(row, p.a0);
  _mm512_store_si512(row + 32, p.b0);
  _mm512_store_si512(row + kTile, p.a1);
  _mm512_store_si512(row + kTile + 32, p.b1);
}
// As B of the output, a row of four tiles.
inline void store(const Interleaved& p, uint16_t* row) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm512_store_si512(row + i * kTile, p.z[i]);
}

// How two keys' bytes of a block are converted.
enum class Way : uint8_t {
  kNormal,     // e4m3, no number is subnormal, zero or NaN
  kSubnormal,  // e4m3, none is NaN
  kExact,
};

// 32 keys of a tile.
class Group {
 public:
  // The first `n` keys are there, the others are zeros.
  void begin(const Row* keys, int n) {
    alignas(64) static const uint8_t kZeros[2 * kLatentDim] = {};
    static const Row kNoKey = {kZeros, nullptr, Layout::kBf16};
    for (int i = 0; i < kGroupKeys; ++i) rows_[i] = i < n ? &keys[i] : &kNoKey;
    for (int i = 0; i < kGroupKeys; i += 2) {
      const int a = prepare(i), b = prepare(i + 1);
      e4m3_blocks_[i / 2] = static_cast<uint8_t>(min_int(a, b));
      // Of two keys whose numbers alternate. Where they are not e4m3, nobody reads it.
      const __m512i bias =
          _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_load_si512(bias_[i]), _mm512_load_si512(bias_[i + 1]));
      _mm512_store_si512(pair_bias_[i / 2], bias);
    }
  }

  // Keys 2 `pair` and 2 `pair` + 1. -> how they were converted
  __attribute__((always_inline)) Way convert(int pair, int block, Pair* to) const {
    const int key = 2 * pair;
    if (block < e4m3_blocks_[pair]) {
      const __m512i a = load(key, block), b = load(key + 1, block);
      const Way way = way_of(a, b);
      if (__builtin_expect(way != Way::kExact, true)) {
        const __m512i a_low = low(a), a_high = high(a), b_low = low(b), b_high = high(b);
        const __m512i a_bias = of_halves(bias_[key] + 2 * block), b_bias = of_halves(bias_[key + 1] + 2 * block);
        *to = {_mm512_unpacklo_epi8(a_low, a_high), _mm512_unpackhi_epi8(a_low, a_high),
               _mm512_unpacklo_epi8(b_low, b_high), _mm512_unpackhi_epi8(b_low, b_high)};
        if (__builtin_expect(way == Way::kNormal, true)) {
          to->a0 = _mm512_add_epi16(to->a0, a_bias), to->a1 = _mm512_add_epi16(to->a1, a_bias);
          to->b0 = _mm512_add_epi16(to->b0, b_bias), to->b1 = _mm512_add_epi16(to->b1, b_bias);
        } else {
          to->a0 = with_subnormals(to->a0, a_bias), to->a1 = with_subnormals(to->a1, a_bias);
          to->b0 = with_subnormals(to->b0, b_bias), to->b1 = with_subnormals(to->b1, b_bias);
        }
        return way;
      }
    }
    convert_any(key, block, &to->a0, &to->a1);
    convert_any(key + 1, block, &to->b0, &to->b1);
    return Way::kExact;
  }

  // The same interleaved, with fewer instructions; `way` is what convert() gave for them.
  __attribute__((always_inline)) void convert(int pair, int block, Way way, Interleaved* to) const {
    const int key = 2 * pair;
    if (__builtin_expect(way == Way::kExact, false)) {
      Pair numbers;
      convert_any(key, block, &numbers.a0, &numbers.a1);
      convert_any(key + 1, block, &numbers.b0, &numbers.b1);
      *to = interleaved(numbers);
      return;
    }
    const __m512i a = load(key, block), b = load(key + 1, block);
    const __m512i x = _mm512_unpacklo_epi8(a, b), y = _mm512_unpackhi_epi8(a, b);
    const __m512i x_low = low(x), x_high = high(x), y_low = low(y), y_high = high(y);
    const __m512i bias = of_halves(pair_bias_[pair] + 2 * block);
    *to = {{_mm512_unpacklo_epi8(x_low, x_high), _mm512_unpackhi_epi8(x_low, x_high),
            _mm512_unpacklo_epi8(y_low, y_high), _mm512_unpackhi_epi8(y_low, y_high)}};
#pragma GCC unroll 4
    for (__m512i& z : to->z) {
      z = __builtin_expect(way == Way::kNormal, true) ? _mm512_add_epi16(z, bias) : with_subnormals(z, bias);
    }
  }

 private:
  // -> how many of a key's blocks, from the first on, are e4m3 and have scales that give normal numbers
  int prepare(int key) {
    const Row& row = *rows_[key];
    if (row.layout == Layout::kNvfp4) {
      Simd::dequantize_tile<kNvfp4ScaleBytes>(row.scales, kUnitScale, factors_[key]);
    }
    const bool mxfp8 = row.layout == Layout::kMxfp8;
    if (!mxfp8 && row.layout != Layout::kFp8DsMla) return 0;
    data_[key] = row.data;
    // Of every half a block, which is a tile of mxfp8.
    const __m128i loaded = mxfp8 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.scales))
                                 : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row.scales));
    const __m128i bytes = mxfp8 ? loaded : _mm_unpacklo_epi8(loaded, loaded);
    const __mmask16 in_use = mxfp8 ? 0xffff : 0x3fff;
    // What it adds to an exponent, from -2 (the smallest subnormal number's) to 15.
    const __m512i added = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(7));
    const __m512i bias = _mm512_slli_epi32(added, 7);
    _mm512_store_si512(bias_[key], _mm512_or_si512(bias, _mm512_slli_epi32(bias, 16)));
    const __mmask16 normal =
        _mm512_cmple_epu32_mask(_mm512_sub_epi32(added, _mm512_set1_epi32(3)), _mm512_set1_epi32(254 - 15 - 3));
    return (normal & in_use) != in_use ? 0 : mxfp8 ? kBlocks : kScaleTiles;
  }

  __m512i load(int key, int block) const { return _mm512_loadu_si512(data_[key] + block * kBlock); }

  static __m512i low(__m512i bytes) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x0000000001020408), 0);
  }
  static __m512i high(__m512i bytes) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x1020400000000080), 0);
  }

  static Way way_of(__m512i a, __m512i b) {
    // Without its sign a normal byte is from 8 to 126: twice it, less 16, is at most 236. NaN gives 238, others more.
    const __m512i less = kept(_mm512_set1_epi8(-16)), most = kept(_mm512_set1_epi8(static_cast<char>(236)));
    const __m512i a2 = _mm512_add_epi8(a, a), b2 = _mm512_add_epi8(b, b);
    const __m512i found = _mm512_max_epu8(_mm512_add_epi8(a2, less), _mm512_add_epi8(b2, less));
    if (__builtin_expect(_mm512_cmpgt_epu8_mask(found, most) == 0, true)) return Way::kNormal;
    const __m512i nan = _mm512_set1_epi8(static_cast<char>(2 * 0x7f));
    const bool any = (_mm512_cmpeq_epi8_mask(a2, nan) | _mm512_cmpeq_epi8_mask(b2, nan)) != 0;
    return any ? Way::kExact : Way::kSubnormal;
  }

  // A constant that stays in a register: GCC makes such ones anew for each use.
  static __m512i kept(__m512i x) {
    asm("" : "+v"(x));
    return x;
  }

  // Of the two halves of a block.
  static __m512i of_halves(const uint32_t* two) {
    return _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(two[0])), 0xff00, static_cast<int>(two[1]));
  }

  // words + bias, where words of e = 0 are the numbers m * 2^-9: 0 or 2^(e - 7) * (1 + m' / 8), e from -2 to 0.
  static __m512i with_subnormals(__m512i words, __m512i bias) {
    const __m512i sign = _mm512_and_si512(words, _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
    const __m512i normalised = _mm512_broadcast_i32x4(_mm_setr_epi16(0, -256, -128, -128 + 64, 0, 32, 64, 96));
    const __m512i found = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), normalised);
    const __mmask32 subnormal = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x0780));
    const __mmask32 zero = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x07f0));
    const __m512i sum =
        _mm512_mask_add_epi16(_mm512_add_epi16(words, bias), subnormal, _mm512_add_epi16(sign, found), bias);
    return _mm512_mask_mov_epi16(sum, zero, sign);
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
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows_[key]->data + block * (kBlock / 2)));
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
    const Row& row = *rows_[key];
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

  const Row* rows_[kGroupKeys];
  const uint8_t* data_[kGroupKeys];      // of those that are e4m3
  uint8_t e4m3_blocks_[kGroupKeys / 2];  // of both keys, as prepare() counts them
  // e4m3's (scale - 7) << 7 in both halves, of every half a block.
  alignas(64) uint32_t bias_[kGroupKeys][2 * kBlocks];
  alignas(64) uint32_t pair_bias_[kGroupKeys / 2][2 * kBlocks];  // the first key's in the lower half
  alignas(64) float factors_[kGroupKeys][kNvfp4ScaleBytes];      // nvfp4's scales
};

// A task's keys, tile after tile and group after group.
class Conversion {
 public:
  void reset() {
    tile_ = nullptr;
    n_ = 0;
  }
  void start(const Row* tile, int n) {
    tile_ = tile;
    n_ = n;
    next_n_ = 0;
  }
  // The tile after it, whose bytes are fetched meanwhile.
  void announce(const Row* next, int next_n) {
    next_ = next;
    next_n_ = next_n;
  }
  const Row* tile() const { return tile_; }
  int groups() const { return (n_ + kGroupKeys - 1) / kGroupKeys; }
  int keys(int group) const { return n_ - group * kGroupKeys; }  // from this group on

 protected:
  // A group's steps: 64 numbers of 16 keys each, half by half.
  struct Step {
    explicit Step(int i) : group(i / kSteps), block(i % kSteps / 2), half(i % 2) {}
    bool first() const { return block == 0 && half == 0; }
    int group, block, half;
  };

  void begin(int group, Group* to) {
    for (int i = 0; i < kGroupKeys; ++i) {
      const int later = (group + kAhead) * kGroupKeys + i, beyond = later - groups() * kGroupKeys;
      later_[i] = later < n_ ? &tile_[later] : beyond >= 0 && beyond < next_n_ ? &next_[beyond] : nullptr;
    }
    to->begin(tile_ + group * kGroupKeys, keys(group));
  }

  // Of the keys that come kAhead groups after those of a step.
  void fetch(const Step& step) const {
    for (int key = 16 * step.half; key < 16 * step.half + 16; ++key) {
      if (later_[key] != nullptr) fetch(*later_[key], step.block);
    }
  }

 private:
  // Groups whose bytes are on their way.
  static constexpr int kAhead = 2;

  static void fetch(const Row& row, int block) {
    const int per_block = row.layout == Layout::kBf16 ? 2 * kBlock : row.layout == Layout::kNvfp4 ? kBlock / 2 : kBlock;
    const uint8_t* bytes = row.data + block * per_block;
    prefetch<Level::kSecond>(bytes);
    const bool last = block == kBlocks - 1;
    if (row.layout == Layout::kBf16 || (row.layout == Layout::kFp8DsMla && last)) prefetch<Level::kSecond>(bytes + 64);
    if (row.scales != nullptr && last) prefetch<Level::kSecond>(row.scales);
  }

  const Row *tile_, *next_;
  int n_, next_n_;
  const Row* later_[kGroupKeys];
};

// For several blocks of heads: both forms at once. They stay in the second-level cache until all have used them.
class ConversionOnce : public Conversion {
 public:
  void reset() {
    Conversion::reset();
    base_ = 0;
  }
  // Goes on with a tile. The one before it may still be multiplied by weights.
  void start(const Row* tile, int n) {
    base_ = (base_ + groups()) % kRing;
    Conversion::start(tile, n);
    done_ = 0;
  }
  bool has(int group) const { return done_ >= (group + 1) * kSteps; }

  // Numbers of a group's keys as A of the scores: [2 halves of the keys, 2 halves of the block, 16 keys, 32].
  const uint16_t* rows(int group, int block) const { return rows_[(base_ + group) % 2] + block * kBlockNumbers; }
  // And as B of the output: [4, 16 pairs of keys, 16 numbers, 2].
  const uint16_t* pairs(int group, int block) const { return pairs_[(base_ + group) % kRing] + block * kBlockNumbers; }

  __attribute__((noinline)) void step() {
    const Step step(done_++);
    if (step.first()) begin(step.group, &group_);
    fetch(step);
    const int at = step.block * kBlockNumbers;
    uint16_t* row = rows_[(base_ + step.group) % 2] + at + step.half * 2 * kTile;
    uint16_t* to = pairs_[(base_ + step.group) % kRing] + at + step.half * kTile / 2;
    for (int pair = 8 * step.half; pair < 8 * step.half + 8; ++pair, row += 64, to += 32) {
      Pair numbers;
      group_.convert(pair, step.block, &numbers);
      store(numbers, row);
      store(interleaved(numbers), to);
    }
  }

 private:
  static constexpr int kRing = kGroups + 1;
  static_assert(kRing % 2 == 0, "rows alternate");

  alignas(64) uint16_t rows_[2][kBlocks * kBlockNumbers];
  uint16_t pairs_[kRing][kBlocks * kBlockNumbers];
  Group group_;  // that is being converted
  int base_;     // where in the ring the tile's groups begin
  int done_;     // steps
};

// For a single block of heads: to one form for the scores, and from the bytes again to the other one for the output,
// just before they are multiplied. So both stay in the first-level cache, and that takes less time than the way to the
// second one and back.
class ConversionTwice : public Conversion {
 public:
  const uint16_t* rows(int group, int block) const { return rows_[(group * kBlocks + block) % kRing]; }
  const uint16_t* pairs(int group, int block) const { return pairs_[(block * groups() + group) % kRing]; }

  int steps() const { return groups() * kSteps; }  // of each form
  // Steps that are done before the first products; from then on one follows on the products of half a block.
  static constexpr int kLead = 4;

  // Group after group.
  __attribute__((noinline)) void step_rows(int i) {
    const Step step(i);
    if (step.first()) begin(step.group, &groups_[step.group]);
    fetch(step);
    uint16_t* row = rows_[i / 2 % kRing] + step.half * 2 * kTile;
    for (int pair = 8 * step.half; pair < 8 * step.half + 8; ++pair, row += 64) {
      Pair numbers;
      ways_[step.group][step.block][pair] = groups_[step.group].convert(pair, step.block, &numbers);
      store(numbers, row);
    }
  }

  // Block after block, all groups of each, after all steps of the rows.
  __attribute__((noinline)) void step_pairs(int i) {
    const int group = i / 2 % groups(), block = i / 2 / groups(), half = i % 2;
    uint16_t* to = pairs_[i / 2 % kRing] + half * kTile / 2;
    for (int pair = 8 * half; pair < 8 * half + 8; ++pair, to += 32) {
      Interleaved numbers;
      groups_[group].convert(pair, block, ways_[group][block][pair], &numbers);
      store(numbers, to);
    }
  }

 private:
  static constexpr int kRing = 4;  // blocks: one that is multiplied, two that are ahead

  alignas(64) uint16_t rows_[kRing][kBlockNumbers];
  uint16_t pairs_[kRing][kBlockNumbers];
  Group groups_[kGroups];
  Way ways_[kGroups][kBlocks][kGroupKeys / 2];
};
