// From a token's key numbers to rows of a cache. Included by each instruction set's file inside its own namespace (see
// decode-inl.h).

// One valid cached position: where its bytes are.
struct Row {
  const uint8_t* data;
  const uint8_t* scales;  // null where the layout has none
  Layout layout;
};

// What is to become of a segment's sum: total = total * keep + sum * take. Without a total: it is stored as it is.
struct Merge {
  float* total = nullptr;       // [heads, 512]
  const float* keep = nullptr;  // [heads]
  const float* take = nullptr;  // [heads]

  // From head h on, whose sums are `at` numbers into the total.
  Merge from(int32_t h, int32_t at) const { return total == nullptr ? *this : Merge{total + at, keep + h, take + h}; }
};

// Stores a block's sums, or merges them into the total.
template <int H, int N>
__attribute__((always_inline)) inline void store_sums(const Simd::V (&acc)[H][N], float* o, const Merge& merge) {
  constexpr int kL = Simd::kLanes;
  if (merge.total == nullptr) {
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) Simd::store(o + h * kLatentDim + i * kL, acc[h][i]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) {
    const Simd::V keep = Simd::set1(merge.keep[h]), take = Simd::set1(merge.take[h]);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      float* total = merge.total + h * kLatentDim + i * kL;
      Simd::store(total, Simd::merge(Simd::load(total), keep, acc[h][i], take));
    }
  }
}

constexpr uint8_t kUnitScale = 127;  // ue8m0

struct KeyCursor {
  int32_t at;          // the next key number within the token
  int32_t swa_length;  // key numbers below it are the swa scope's
};

inline KeyCursor first_key(const DecodeParams& p, int32_t token, int32_t kv_begin) {
  return {kv_begin, clamped_length(p.scopes[0], token)};
}

inline bool find_row(const Cache& cache, int32_t slot, Row* row) {
  if (slot < 0) return false;
  const int64_t block = slot / cache.block_size;
  if (block >= cache.num_blocks) return false;
  const int64_t offset = slot - block * cache.block_size;
  const uint8_t* base = cache.data + block * cache.block_stride_bytes;
  row->layout = cache.layout;
  row->data = base + cache.row_at(offset);
  row->scales = cache.scale_pitch > 0 ? base + cache.scales_at(offset) : nullptr;
  return true;
}

inline void bf16_to_floats(const uint8_t* src, float* dst, int n) {
  for (int d = 0; d < n; d += Simd::kLanes) Simd::store(dst + d, Simd::load_bf16(src + 2 * d));
}

// The numbers of a row that has scales, as fp32.
inline void dequantize_row(const Row& row, float* dst) {
  switch (row.layout) {
    case Layout::kFp8DsMla:
      for (int t = 0; t < kScaleTiles; ++t) {
        Simd::dequantize_tile<kScaleTile>(row.data + t * kScaleTile, row.scales[t], dst + t * kScaleTile);
      }
      bf16_to_floats(row.data + kNopeDim, dst + kNopeDim, kRopeDim);
      break;
    case Layout::kMxfp8:
      for (int t = 0; t < kMxfp8ScaleBytes; ++t) {
        Simd::dequantize_tile<kMxfp8Tile>(row.data + t * kMxfp8Tile, row.scales[t], dst + t * kMxfp8Tile);
      }
      break;
    default: {
      alignas(64) float scales[kNvfp4ScaleBytes];
      Simd::dequantize_tile<kNvfp4ScaleBytes>(row.scales, kUnitScale, scales);
      Simd::dequantize_e2m1(row.data, scales, dst);
    }
  }
}

// The next valid rows before kv_end, at most a tile of them; invalid slots are passed over. Returns how many.
inline int next_rows(const DecodeParams& p, int32_t token, int32_t kv_end, KeyCursor* cursor, Row* rows) {
  int n = 0;
  while (n < kTileKeys && cursor->at < kv_end) {
    const int32_t key = cursor->at++;
    const bool extra = key >= cursor->swa_length;
    const Scope& scope = p.scopes[extra];
    const int32_t entry = extra ? key - cursor->swa_length : key;
    const int32_t slot = scope.indices[static_cast<int64_t>(token) * scope.topk + entry];
    if (find_row(scope.cache, slot, &rows[n])) ++n;
  }
  return n;
}

// Asks for a cache line, of the first-level cache or of the second. In assembly: GCC deletes calls of functions that do
// nothing but __builtin_prefetch.
enum class Level { kFirst, kSecond };
template <Level kLevel>
inline void prefetch(const uint8_t* at) {
#if defined(__x86_64__)
  if constexpr (kLevel == Level::kFirst) {
    asm volatile("prefetcht0 %0" : : "m"(*at));
  } else {
    asm volatile("prefetcht1 %0" : : "m"(*at));
  }
#else
  __builtin_prefetch(at, 0, kLevel == Level::kFirst ? 3 : 2);
#endif
}

inline void prefetch_row(const Row& row) {
  const int bytes = slot_bytes(row.layout).row;
  for (int b = 0; b < bytes; b += 64) prefetch<Level::kFirst>(row.data + b);
  if (row.scales != nullptr) prefetch<Level::kFirst>(row.scales);
}

// Writes 512 numbers of one head in the result's dtype; row = token * heads + head.
inline void write_out(const DecodeParams& p, int64_t row, const float* values) {
  if (p.out_dtype == Dtype::kBf16) {
    Simd::float_to_bf16(values, static_cast<uint8_t*>(p.out) + 2 * row * kLatentDim, kLatentDim);
  } else {
    float* out = static_cast<float*>(p.out) + row * kLatentDim;
    for (int d = 0; d < kLatentDim; d += Simd::kLanes) Simd::storeu(out + d, Simd::load(values + d));
  }
}
