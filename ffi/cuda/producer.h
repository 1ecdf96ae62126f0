// The producing role: slots to addresses, packed rows by cp.async, e4m3 to bf16, tiles of K.
#ifndef JAX_DSV4_CUDA_PRODUCER_H_
#define JAX_DSV4_CUDA_PRODUCER_H_

#include <cstdint>

#include "cuda/shared.h"
#include "cuda/work.h"

namespace jax_dsv4::cuda {

// A lane has a quarter of a row, in pieces of 16 bytes: one of each scale tile, then two of rope.
constexpr int kPieces = kPackedRowBytes / 16 / kLanesPerKey;
static_assert(kLanesPerKey == 4 && kPieces == kScaleTiles + 2);

// A key of a tile before it is needed, and how many tiles have been asked for with it.
struct KeySlot {
  int slot;
  bool extra;
  int tiles;
};

// Where a key lies; row is null for a key that is not attended to.
struct KeyRow {
  const uint8_t* row;
  const uint8_t* scales;
};

// The key of a group.
struct Key : KeyRow {
  Layout layout;
  bool group;  // there is such a group
};

__device__ __forceinline__ KeyRow locate(const DecodeArgs& args, KeySlot key) {
  const Cache& cache = args.params.scopes[key.extra].cache;
  const uint32_t block = args.block_size[key.extra].divide(key.slot);
  if (key.slot < 0 || block >= cache.num_blocks) return {nullptr, nullptr};
  const int offset = key.slot - block * cache.block_size;
  const uint8_t* rows = cache.data + block * cache.block_stride_bytes;
  return {rows + cache.row_at(offset), rows + cache.scales_at(offset)};
}

__device__ __forceinline__ const uint8_t* shuffle(const uint8_t* p, int lane) {
  const uint64_t bits = reinterpret_cast<uint64_t>(p);
  const uint32_t low = __shfl_sync(~0u, static_cast<uint32_t>(bits), lane);
  const uint32_t high = __shfl_sync(~0u, static_cast<uint32_t>(bits >> 32), lane);
  return reinterpret_cast<const uint8_t*>(uint64_t{high} << 32 | low);
}

// A lane's keys of the group that a producing warpgroup fills of every tile, over all items as one sequence. The lanes
// of a key look up its place in several tiles at once, one each, while those before are copied.
template <typename Work>
class Keys {
 public:
  // Of `group` of the tiles.
  __device__ Keys(const DecodeArgs& args, int group) : args_(args), work_(args), group_(group) {
    // The first slots need not wait for all that tells the first item, if it turns out to be what it mostly is.
    const Item guess = work_.guess();
    ahead_ = load(guess, guess.begin);
    open();
    const bool guessed = item_.token == guess.token && item_.begin == guess.begin && item_.end == guess.end &&
                         item_.swa_length == guess.swa_length;
    if (!guessed) ahead_ = load(item_, begin_);
    if (begin_ < item_.end) go_on();
  }

  // That of the next group.
  __device__ __forceinline__ Key next() {
    if (at_ == tiles_) look_up();
    const int lane = threadIdx.x % 32 / kLanesPerKey * kLanesPerKey + at_;
    const bool group = at_ < tiles_;
    at_ += group;
    const int layout = __shfl_sync(~0u, static_cast<int>(layout_), lane);
    return {{shuffle(place_.row, lane), shuffle(place_.scales, lane)}, static_cast<Layout>(layout), group};
  }

 private:
  __device__ __forceinline__ void look_up() {
    const Cache& cache = args_.params.scopes[ahead_.extra].cache;
    place_ = locate(args_, ahead_);
    layout_ = cache.layout;
    tiles_ = ahead_.tiles;
    at_ = 0;
    ahead_ = {-1, false, 0};
    if (begin_ < item_.end) {
      ahead_ = load(item_, begin_);
      go_on();
    }
  }

  __device__ KeySlot load(const Item& item, int begin) const {
    KeySlot f{-1, false, min(kLanesPerKey, (item.end - begin + kKeyTile - 1) / kKeyTile)};
    // Computed when it is needed: registers are few.
    const uint32_t thread = opaque(threadIdx.x) % kWarpgroup;
    const int key = begin + group_ * kGroupKeys + thread / kLanesPerKey + kKeyTile * (thread % kLanesPerKey);
    if (key < item.end) {
      f.extra = key >= item.swa_length;
      const Scope& scope = args_.params.scopes[f.extra];
      f.slot = scope.indices[static_cast<int64_t>(item.token) * scope.topk + key - (f.extra ? item.swa_length : 0)];
    }
    return f;
  }

  __device__ void go_on() {
    begin_ += kLanesPerKey * kKeyTile;
    if (begin_ >= item_.end) open();
  }

  __device__ void open() {
    if (!work_.next(&item_)) item_.begin = item_.end = 0;
    begin_ = item_.begin;
  }

  const DecodeArgs& args_;
  Work work_;
  Item item_;
  int begin_;  // of the tiles to be asked for next
  const int group_;
  KeySlot ahead_;
  KeyRow place_;
  Layout layout_;
  int tiles_ = 0, at_ = 0;  // that place_ is of, on all lanes of the key; the next one of these
};

// Copies kBytes that are aligned to kAlign only, or zeros if `real` is false. Nothing aligned to less than 4 bytes can
// be copied asynchronously: the bytes go through registers then, which is slow and right.
template <int kBytes, int kAlign>
__device__ __forceinline__ void copy(void* dst, const uint8_t* src, bool real) {
  uint8_t* to = static_cast<uint8_t*>(dst);
  if constexpr (kAlign >= 4) {
    constexpr int kStep = kAlign < kBytes ? kAlign : kBytes;
#pragma unroll
    for (int i = 0; i < kBytes; i += kStep) copy_async<kStep>(to + i, src + i, real ? kStep : 0);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) to[i] = real ? src[i] : 0;
  }
}

// Two e4m3 of `word` as bf16 times 2^-120, exactly: exponent and mantissa moved to bf16's place, the sign to bit 15.
// kSelect spreads the bytes over the halves and replicates their signs above them.
template <uint32_t kSelect>
__device__ __forceinline__ uint32_t spread_e4m3x2(uint32_t word) {
  return (permute<kSelect>(word) << 4) & 0x87f087f0u;
}

// 16 e4m3 to bf16 times 2^(e8m0 - 127), exactly, by one multiplication with 2^(e8m0 - 127 + 120). bf16 has no such
// power above e8m0 134, a scale no quantiser of reasonable data gets near: with kAnyScale the rest is a second factor,
// and NaN for 255.
constexpr uint32_t kLargestScale = 134;

template <bool kAnyScale>
__device__ __forceinline__ void expand_scaled(uint4 packed, uint32_t e8m0, uint4 (&out)[2]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  const uint32_t scale = ((kAnyScale ? min(e8m0, kLargestScale) : e8m0) + 120) * (0x10001u << 7);
  uint32_t wide[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wide[2 * i] = multiply_bf16x2(spread_e4m3x2<0x9180>(words[i]), scale);
    wide[2 * i + 1] = multiply_bf16x2(spread_e4m3x2<0xB3A2>(words[i]), scale);
  }
  if (kAnyScale) {
    const uint32_t over = max(e8m0, kLargestScale) - kLargestScale;
    const uint32_t rest = e8m0 == 255 ? 0x7fc07fc0u : (over + 127) * (0x10001u << 7);
#pragma unroll
    for (int i = 0; i < 8; ++i) wide[i] = multiply_bf16x2(wide[i], rest);
  }
  out[0] = {wide[0], wide[1], wide[2], wide[3]};
  out[1] = {wide[4], wide[5], wide[6], wide[7]};
}

__device__ __forceinline__ bool needs_any_scale(uint2 scales) {
  return (__vcmpgtu4(scales.x, kLargestScale * 0x01010101u) |
          __vcmpgtu4(scales.y & 0xffffffu, kLargestScale * 0x01010101u)) != 0;
}

// Where 8 dimensions of a key lie in a tile, whose rows from this warp's first on are `rows`. The swizzle depends on
// the row of 8 only, which is `key`.
__device__ __forceinline__ uint4* unit_of(uint8_t* rows, int plane, int key, int unit) {
  return reinterpret_cast<uint4*>(rows + plane * kPlaneBytes + key * kRowBytes + 16 * (unit ^ key));
}

// A lane's piece of e4m3, number j of a key, to its place in the tile; its scale is byte j. Rows r and r + 1 of a store
// fill the even and the odd units: no conflicts.
template <bool kAnyScale>
__device__ __forceinline__ void store_e4m3(uint4 packed, uint2 scales, int j, int key, int quarter, uint8_t* rows) {
  uint4 wide[2];
  expand_scaled<kAnyScale>(packed, (j < 4 ? scales.x : scales.y) >> (8 * (j % 4)) & 0xff, wide);
#pragma unroll
  for (int u = 0; u < 2; ++u) *unit_of(rows, j, key, 2 * quarter + u) = wide[u];
}

// A lane's piece j of a key, as bf16, to its place in the tile.
template <bool kAnyScale>
__device__ __forceinline__ void store_piece(uint4 packed, uint2 scales, int j, int key, int quarter, uint8_t* rows) {
  if (j < kScaleTiles) {
    store_e4m3<kAnyScale>(packed, scales, j, key, quarter, rows);
  } else {
    *unit_of(rows, kPlanes - 1, key, quarter + kLanesPerKey * (j - kScaleTiles)) = packed;
  }
}

// A producing lane's copies of packed pieces of fp8_ds_mla, through its part of a ring, always so many pieces ahead of
// those that it converts: from rows that were asked into L2 half a group before, or a whole group ahead.
template <int kAlign, typename Memory>
class Fp8DsMlaCopies {
 public:
  static constexpr int kRegisters = 40;  // of a thread, where they are few
  static constexpr int kAhead = Memory::kPiecesAhead, kAtOnce = Memory::kPiecesAtOnce;
  static constexpr int kBatches = (kPieces + kAtOnce - 1) / kAtOnce;
  static constexpr bool kWholeGroup = kAhead == kPieces;
  static_assert(kWholeGroup || kAhead < kPieces && kAtOnce == 1);

  __device__ Fp8DsMlaCopies(const DecodeArgs& args, Memory& shared, int key, int quarter)
      : ring_(shared.packed[threadIdx.x / 32]),
        ring_scales_(shared.scales[threadIdx.x / 32]),
        nowhere_(static_cast<const uint8_t*>(args.params.q)),
        key_(key),
        quarter_(quarter) {}

  // Turns to group n, of which the next one has key `next`, if there is one: asks for its scales now, for its pieces as
  // the ring has room.
  __device__ __forceinline__ void turn(int n, const Key& next) {
    next_row_ = next.row;
    const bool real = next.row != nullptr;
    real_ = real_ << 1 | real;
    if (quarter_ == 0) {
      copy<kPackedScaleBytes, kAlign>(&ring_scales_[(n + 1) & 1][key_], real ? next.scales : nowhere_, real);
    }
    // Not earlier: rows that are asked for several groups ahead stand in the way of the next one's.
    if (!kWholeGroup && real) {
      prefetch_l2(next.row + 128 * quarter_);
      if (quarter_ == 0) prefetch_l2(next.row + 512);
    }
    ring_begin_ = kWholeGroup ? 0 : n * kPieces;
  }

  // The first pieces of the first group.
  __device__ __forceinline__ void begin() {
    start_row();
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      copy_piece(kPieces + j);
      if (j % kAtOnce == kAtOnce - 1 || j == kPieces - 1) copy_async_commit();
    }
  }

  __device__ bool real() const { return real_ >> 1 & 1; }           // group n has this lane's key
  __device__ void wait() { copy_async_wait<kBatchesAhead - 1>(); }  // for what was asked for first

  // Until group n's scales are here.
  __device__ __forceinline__ void wait_for_scales(int n) {
    wait();
    __syncwarp();  // they came through another lane
    scales_ = ring_scales_[n & 1][key_];
  }

  // Group n, as bf16, to its place in the tile. Two copies of the code, so that the one that runs has no branches:
  // latencies hide in straight lines.
  __device__ __forceinline__ void expand(uint8_t* rows) {
    if (__any_sync(~0u, needs_any_scale(scales_))) {
      expand_group<true>(rows);
    } else {
      expand_group<false>(rows);
    }
  }

 private:
  template <bool kAnyScale>
  __device__ __forceinline__ void expand_group(uint8_t* rows) {
#pragma unroll
    for (int first = 0; first < kPieces; first += kAtOnce) {
      const int end = first + kAtOnce < kPieces ? first + kAtOnce : kPieces;
      wait();
      uint4 packed[kAtOnce];
#pragma unroll
      for (int j = first; j < end; ++j) packed[j - first] = piece(j);
#pragma unroll
      for (int j = first; j < end; ++j) go_on(j);
      copy_async_commit();
#pragma unroll
      for (int j = first; j < end; ++j) store_piece<kAnyScale>(packed[j - first], scales_, j, key_, quarter_, rows);
    }
  }

  __device__ uint4 piece(int j) const { return ring_[place(j)][quarter_ + kLanesPerKey * key_]; }

  // Asks for piece j + kAhead of the group, or of the next one.
  __device__ void go_on(int j) {
    if (j + kAhead == kPieces) start_row();
    copy_piece(j + kAhead);
  }

  static constexpr int kBatchesAhead = (kAhead + kAtOnce - 1) / kAtOnce;

  __device__ void start_row() { row_ = (next_row_ ? next_row_ : nowhere_) + 16 * quarter_; }
  __device__ uint32_t place(int j) const {
    return kWholeGroup ? ring_begin_ + j % kPieces : (ring_begin_ + j) % kAhead;
  }
  __device__ void copy_piece(int j) {  // those past a group's last are the next one's
    copy<16, kAlign>(&ring_[place(j)][quarter_ + kLanesPerKey * key_], row_ + 16 * kLanesPerKey * (j % kPieces),
                     real_ >> (1 - j / kPieces) & 1);
  }

  uint4 (*const ring_)[32];
  uint2 (*const ring_scales_)[kKeysPerWarp];
  const uint8_t* const nowhere_;  // an address for copies of no bytes
  const int key_, quarter_;
  const uint8_t* next_row_;
  const uint8_t* row_;   // that copies are at, from this lane's quarter of the first piece on
  uint32_t real_ = 0;    // bit i: group n + 1 - i has this lane's key
  uint32_t ring_begin_;  // where group n's first piece lies in the ring
  uint2 scales_;         // of group n
};

// A warp has 8 keys of a group, and of each key's 64-dimension tiles a quarter to a lane, all the way from the copy to
// the store: no other thread has to know when the bytes arrive. It fills `group` of every tile.
template <typename Work, typename Copies, typename Memory>
__device__ __forceinline__ void produce(const DecodeArgs& args, Memory& shared, int group) {
  constexpr int kTiles = Memory::kTiles;
  const int warp = threadIdx.x / 32 % kWarps, lane = threadIdx.x % 32;
  const int key = lane / kLanesPerKey, quarter = lane % kLanesPerKey;
  const int word = group * kWarps + warp;  // of `valid`: the 8 rows of a tile that are this warp's
  Keys<Work> keys(args, group);
  Copies copies(args, shared, key, quarter);

  // The first round only fills the pipeline.
  bool more = true;
  for (int n = -1; more; ++n) {
    const Key next = keys.next();
    more = next.group;
    copies.turn(n, next);
    if (n < 0) {
      copies.begin();
      continue;
    }

    // This group's scales are here, and its place in the tile is free.
    const int buffer = n % kTiles;
    uint8_t* const rows = shared.k[buffer][0] + word * (kKeysPerWarp * kRowBytes);
    const uint32_t lanes = __ballot_sync(~0u, copies.real());
    copies.wait_for_scales(n);
    barrier_wait(&shared.free[buffer][group], n / kTiles % 2 ^ 1);
    if (lane == 0) shared.valid[buffer][word] = lanes;
    copies.expand(rows);
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.full[buffer][group]);
  }
}

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_PRODUCER_H_
