// A producing lane's copies where a scope's cache has another layout than fp8_ds_mla: mxfp8, nvfp4, bf16, or any two of
// them. Everything becomes bf16 exactly.
#ifndef JAX_DSV4_CUDA_ANY_LAYOUT_H_
#define JAX_DSV4_CUDA_ANY_LAYOUT_H_

#include <cstdint>

#include "cuda/producer.h"

namespace jax_dsv4::cuda {

// A warp's keys of a group that lie in caches of different layouts.
constexpr Layout kMixedLayouts = static_cast<Layout>(0xff);

// Pieces of a lane's quarter of a row: its scales, then 16 bytes of numbers each.
template <Layout kLayout>
constexpr int kPiecesOf = 1 + slot_bytes(kLayout).row / 16 / kLanesPerKey;

// Of a key's scales, what a lane needs: for e4m3, byte j is the scale of its piece j; for nvfp4, half word j has both.
template <Layout kLayout>
__device__ __forceinline__ uint2 lane_scales(const uint8_t* scales, int quarter) {
  if constexpr (kLayout == Layout::kFp8DsMla) {
    const uint2 all = *reinterpret_cast<const uint2*>(scales);
    return {all.x, all.y & 0xffffff};
  } else if constexpr (kLayout == Layout::kMxfp8) {
    const uint4 all = *reinterpret_cast<const uint4*>(scales);
    const int shift = 8 * (quarter / 2);
    return {permute<0x6420>(all.x >> shift, all.y >> shift), permute<0x6420>(all.z >> shift, all.w >> shift)};
  } else {
    const uint16_t* pairs = reinterpret_cast<const uint16_t*>(scales) + quarter;
    return {pairs[0] | uint32_t{pairs[4]} << 16, pairs[8] | uint32_t{pairs[12]} << 16};
  }
}

// e4m3 scales whose product with 2^126 is a bf16: below 4.
constexpr uint32_t kLargestE4m3Scale = 0x47;

// Whether some scale needs a second factor; a lane has those of its pieces.
template <Layout kLayout>
__device__ __forceinline__ bool needs_two_factors(uint2 scales) {
  const uint32_t most = (kLayout == Layout::kNvfp4 ? kLargestE4m3Scale : kLargestScale) * 0x01010101u;
  return (__vcmpgtu4(scales.x, most) | __vcmpgtu4(scales.y, most)) != 0;
}

// Two e2m1, those of byte kByte of `word`, as bf16 times 2^-126, exactly: 0.5 is a subnormal bf16. `lower` is word
// << 4.
template <int kByte>
__device__ __forceinline__ uint32_t spread_e2m1x2(uint32_t word, uint32_t lower) {
  constexpr uint32_t kSelect = 0x80C4 + 0x1111 * kByte;
  return (permute<kSelect>(word, lower) << 2) & 0x81c081c0u;
}

// A lane's piece of e2m1, number j of a key: half a plane of 64 dimensions. Lanes with the same half of different
// planes store its units in another order: no conflicts.
template <bool kTwoFactors>
__device__ __forceinline__ void store_e2m1(uint4 packed, uint32_t scales, int j, int key, int quarter, uint8_t* rows) {
  const bool swap = quarter >= 2;
  const uint32_t words[4] = {swap ? packed.z : packed.x, swap ? packed.w : packed.y, swap ? packed.x : packed.z,
                             swap ? packed.y : packed.w};
  const float2 both = from_e4m3x2(static_cast<uint16_t>(scales));
  const float scale[2] = {swap ? both.y : both.x, swap ? both.x : both.y};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float factor = kTwoFactors ? scale[w / 2] : scale[w / 2] * 0x1p126f;
    const uint32_t last = pack_bf16x2(factor, factor);
    const uint32_t lower = words[w] << 4;
    uint32_t wide[4] = {spread_e2m1x2<0>(words[w], lower), spread_e2m1x2<1>(words[w], lower),
                        spread_e2m1x2<2>(words[w], lower), spread_e2m1x2<3>(words[w], lower)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kTwoFactors) wide[i] = multiply_bf16x2(wide[i], 0x7e807e80u);  // 2^126
      wide[i] = multiply_bf16x2(wide[i], last);
    }
    *unit_of(rows, 2 * j + quarter / 2, key, 4 * (quarter % 2) + (w ^ (swap ? 2 : 0))) = {wide[0], wide[1], wide[2],
                                                                                          wide[3]};
  }
}

// A lane's piece j of a key's numbers.
template <Layout kLayout, bool kTwoFactors>
__device__ __forceinline__ void store_numbers(uint4 packed, uint2 scales, int j, int key, int quarter, uint8_t* rows) {
  if constexpr (kLayout == Layout::kFp8DsMla) {
    store_piece<kTwoFactors>(packed, scales, j, key, quarter, rows);
  } else if constexpr (kLayout == Layout::kMxfp8) {
    store_e4m3<kTwoFactors>(packed, scales, j, key, quarter, rows);
  } else {
    store_e2m1<kTwoFactors>(packed, (j < 2 ? scales.x : scales.y) >> (16 * (j % 2)) & 0xffff, j, key, quarter, rows);
  }
}

// Which 16 bytes of a bf16 row piece j of a lane is. Neighbouring keys fill different halves of a plane: no conflicts.
__device__ __forceinline__ int bf16_unit(int j, int key, int quarter) {
  return 8 * (j / 2) + 4 * ((j ^ key) & 1) + quarter;
}
constexpr int kBf16Pieces = 2 * kLatentDim / 16 / kLanesPerKey;

template <int kAlign>
__device__ __forceinline__ uint4 load_piece(const uint8_t* from) {
  if constexpr (kAlign >= 16) return *reinterpret_cast<const uint4*>(from);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) words[i / 4] |= uint32_t{from[i]} << (8 * (i % 4));
  return {words[0], words[1], words[2], words[3]};
}

// As lane_scales, from anywhere.
template <Layout kLayout>
__device__ __forceinline__ uint2 load_lane_scales(const uint8_t* scales, int quarter) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < (kLayout == Layout::kFp8DsMla ? kScaleTiles : 8); ++i) {
    const int at = kLayout == Layout::kFp8DsMla ? i
                   : kLayout == Layout::kMxfp8  ? 2 * i + quarter / 2
                                                : 8 * (i / 2) + 2 * quarter + i % 2;
    words[i / 4] |= uint32_t{scales[at]} << (8 * (i % 4));
  }
  return {words[0], words[1]};
}

template <Layout kLayout, int kAlign>
__device__ __forceinline__ void expand_slowly(KeyRow from, int key, int quarter, uint8_t* rows) {
  const uint2 scales = load_lane_scales<kLayout>(from.scales, quarter);
#pragma unroll 1
  for (int j = 0; j < kPiecesOf<kLayout> - 1; ++j) {
    const uint4 packed = load_piece<kAlign>(from.row + 16 * (quarter + kLanesPerKey * j));
    store_numbers<kLayout, true>(packed, scales, j, key, quarter, rows);
  }
}

// A lane's quarter of a row, whatever its layout, without copies that run ahead: for a warp's keys of two layouts,
// which a token has at most once.
template <int kAlign>
__device__ __forceinline__ void expand_row(KeyRow from, Layout layout, int key, int quarter, uint8_t* rows) {
  if (from.row != nullptr && layout == Layout::kFp8DsMla) {
    expand_slowly<Layout::kFp8DsMla, kAlign>(from, key, quarter, rows);
  } else if (from.row != nullptr && layout == Layout::kMxfp8) {
    expand_slowly<Layout::kMxfp8, kAlign>(from, key, quarter, rows);
  } else if (from.row != nullptr && layout == Layout::kNvfp4) {
    expand_slowly<Layout::kNvfp4, kAlign>(from, key, quarter, rows);
  } else {
#pragma unroll 1
    for (int j = 0; j < kBf16Pieces; ++j) {
      const int unit = bf16_unit(j, key, quarter);
      *unit_of(rows, unit / 8, key, unit % 8) =
          from.row != nullptr ? load_piece<kAlign>(from.row + 16 * unit) : uint4{0, 0, 0, 0};
    }
  }
}

// As Fp8DsMlaCopies, and a group's scales are the first of its pieces. Rows of bf16 are copied to their place; these,
// and rows of two layouts, have kAhead pieces of nothing in the ring, the latter but for where a row is. Where the
// next group's rows are, too, is kept in shared memory: registers are few.
template <int kAlign, typename Memory>
class AnyLayoutCopies {
 public:
  static constexpr int kAhead = 4;
  static constexpr int kRegisters = 48;  // of a thread, where they are few
  static_assert(kAhead <= Memory::kPiecesAhead && kAhead <= kPiecesOf<Layout::kNvfp4>);

  __device__ AnyLayoutCopies(const DecodeArgs& args, Memory& shared, int key, int quarter)
      : args_(args),
        ring_(shared.packed[threadIdx.x / 32]),
        key_(key),
        quarter_(quarter),
        next_(reinterpret_cast<const uint8_t* (*)[kKeysPerWarp]>(shared.scales[threadIdx.x / 32])) {
    static_assert(sizeof shared.scales[0] == 2 * kKeysPerWarp * sizeof(void*));
  }

  __device__ __forceinline__ void turn(const DecodeArgs&, int, KeySlot slot) {
    find_lane();
    const KeyRow next = locate(args_, slot);
    const bool real = next.row != nullptr;
    __syncwarp();  // no lane still reads what was there
    if (quarter_ == 0) {
      next_[0][key_] = next.row;
      next_[1][key_] = next.scales;
    }
    flags_ = flags_ << 4 | (real ? kReal : 0) | (slot.group ? kGroup : 0) | (slot.extra ? kExtra : 0);
    const bool swa = __any_sync(~0u, real && !slot.extra), extra = __any_sync(~0u, real && slot.extra);
    const Layout one = layout_of(extra), other = layout_of(extra && !swa);
    layouts_ = layouts_ << 8 | static_cast<uint32_t>(one == other ? one : kMixedLayouts);
    if (real) {
      if (one == other && one != Layout::kBf16) flags_ |= kInRing;
      const int bytes = args_.params.scopes[slot.extra].cache.row_pitch;
      for (int at = 128 * quarter_; at < bytes; at += 128 * kLanesPerKey) prefetch_l2(next.row + at);
    }
    __syncwarp();  // the other lanes of a key read next_
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy_next(i, place(i));
  }

  __device__ bool more() const { return flags_ & kGroup; }      // there is a group n + 1
  __device__ bool real() const { return flags_ >> 4 & kReal; }  // group n has this lane's key
  __device__ __forceinline__ void wait_for_scales(int) {
    wait();
    __syncwarp();  // they came through another lane
  }

  __device__ __forceinline__ void expand(uint8_t* rows) {
    find_lane();
    switch (static_cast<Layout>(layouts_ >> 8 & 0xff)) {
      case Layout::kFp8DsMla:
        return expand_pieces<Layout::kFp8DsMla>(rows);
      case Layout::kMxfp8:
        return expand_pieces<Layout::kMxfp8>(rows);
      case Layout::kNvfp4:
        return expand_pieces<Layout::kNvfp4>(rows);
      case Layout::kBf16:
#pragma unroll
        for (int j = 0; j < kBf16Pieces; ++j) {
          const int unit = bf16_unit(j, key_, quarter_);
          copy<16, kAlign>(unit_of(rows, unit / 8, key_, unit % 8), row_ + 16 * unit, real());
        }
        copy_async_commit();
        break;
      default:
        expand_row<kAlign>(*reinterpret_cast<const KeyRow*>(&ring_[place(0)][lane()]), layout_of(flags_ >> 4 & kExtra),
                           key_, quarter_, rows);
    }
    begin();
    copy_async_wait<kAhead>();
  }

 private:
  static constexpr uint32_t kReal = 1, kGroup = 2, kExtra = 4, kInRing = 8;
  static_assert(sizeof(KeyRow) == sizeof(uint4));

  template <Layout kLayout>
  __device__ __forceinline__ void expand_pieces(uint8_t* rows) {
    const uint2 scales =
        lane_scales<kLayout>(reinterpret_cast<const uint8_t*>(&ring_[place(0)][kLanesPerKey * key_]), quarter_);
    __syncwarp();  // before others come to their place
    if (__any_sync(~0u, needs_two_factors<kLayout>(scales))) {
      expand_scaled_pieces<kLayout, true>(scales, rows);
    } else {
      expand_scaled_pieces<kLayout, false>(scales, rows);
    }
    begin_ += kPiecesOf<kLayout>;
  }

  template <Layout kLayout, bool kTwoFactors>
  __device__ __forceinline__ void expand_scaled_pieces(uint2 scales, uint8_t* rows) {
    constexpr int kAll = kPiecesOf<kLayout>;
    go_on<kAll>(0);
#pragma unroll
    for (int i = 1; i < kAll; ++i) {
      wait();
      const uint4 packed = ring_[place(i)][lane()];
      go_on<kAll>(i);
      store_numbers<kLayout, kTwoFactors>(packed, scales, i - 1, key_, quarter_, rows);
    }
  }

  // Addresses of all layouts, computed ahead of the loop, would take more registers than there are: what would be kept
  // in memory instead is computed when it is needed.
  __device__ __forceinline__ void find_lane() {
    const int thread = opaque(static_cast<int>(threadIdx.x)) % 32;
    key_ = thread / kLanesPerKey;
    quarter_ = thread % kLanesPerKey;
  }

  __device__ void wait() { copy_async_wait<kAhead - 1>(); }  // for the piece that was asked for first
  __device__ int lane() const { return quarter_ + kLanesPerKey * key_; }
  __device__ uint32_t place(int i) const { return (begin_ + i) % kAhead; }
  __device__ Layout layout_of(bool extra) const { return args_.params.scopes[extra].cache.layout; }

  // Asks for piece i + kAhead of a group that has so many, or of the next one, at piece i's place.
  template <int kAll>
  __device__ __forceinline__ void go_on(int i) {
    if (i + kAhead >= kAll) return copy_next(i + kAhead - kAll, place(i));
    copy_numbers(i + kAhead, place(i), real());
    copy_async_commit();
  }

  // Piece i of the next group.
  __device__ __forceinline__ void copy_next(int i, uint32_t at) {
    const Layout layout = static_cast<Layout>(layouts_ & 0xff);
    if (i > 0) {
      copy_numbers(i, at, flags_ & kInRing);
    } else {
      const bool real = flags_ & kReal;
      const auto nowhere = static_cast<const uint8_t*>(args_.params.q);  // an address for copies of no bytes
      row_ = real ? next_[0][key_] : nowhere;
      if (layout == kMixedLayouts) {
        *reinterpret_cast<KeyRow*>(&ring_[at][lane()]) = {next_[0][key_], next_[1][key_]};
      } else if (layout == Layout::kFp8DsMla) {
        if (quarter_ == 0) copy<kPackedScaleBytes, kAlign>(&ring_[at][lane()], real ? next_[1][key_] : nowhere, real);
      } else if (quarter_ < (layout == Layout::kMxfp8 ? 1 : layout == Layout::kNvfp4 ? 2 : 0)) {
        copy<16, kAlign>(&ring_[at][lane()], (real ? next_[1][key_] : nowhere) + 16 * quarter_, real);
      }
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void copy_numbers(int i, uint32_t at, bool real) {
    copy<16, kAlign>(&ring_[at][lane()], row_ + 16 * (quarter_ + kLanesPerKey * (i - 1)), real);
  }

  const DecodeArgs& args_;
  uint4 (*const ring_)[32];
  int key_, quarter_;
  const uint8_t* (*const next_)[kKeysPerWarp];  // rows of group n + 1, and scales
  const uint8_t* row_ = nullptr;                // that copies are at
  uint32_t flags_ = 0;                          // kReal, ... of group n + 1, and above them of group n
  uint32_t layouts_ = 0;  // of all keys of a warp, or kMixedLayouts: group n + 1's, and above it group n's
  uint32_t begin_ = 0;    // where group n's first piece lies in the ring
};

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_ANY_LAYOUT_H_
