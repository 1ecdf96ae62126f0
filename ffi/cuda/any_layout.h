// A producing lane's copies where a scope's cache has another layout than fp8_ds_mla. Everything becomes bf16 exactly.
#ifndef JAX_DSV4_CUDA_ANY_LAYOUT_H_
#define JAX_DSV4_CUDA_ANY_LAYOUT_H_

#include <cstdint>

#include "cuda/producer.h"

namespace jax_dsv4::cuda {

// Layouts that the rows of a kernel may have, a bit each.
template <Layout kLayout>
constexpr uint32_t kLayoutBit = 1u << static_cast<uint32_t>(kLayout);
constexpr uint32_t kV41Layouts = kLayoutBit<Layout::kMxfp8> | kLayoutBit<Layout::kNvfp4>;
constexpr uint32_t kBf16Layout = kLayoutBit<Layout::kBf16>;
constexpr uint32_t kAnyLayouts = kLayoutBit<Layout::kFp8DsMla> | kV41Layouts | kBf16Layout;

// Pieces of a lane's quarter of a row, 16 bytes each.
template <Layout kLayout>
constexpr int kPiecesOf = slot_bytes(kLayout).row / 16 / kLanesPerKey;

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

// As Fp8DsMlaCopies, for rows of some of kLayouts. Rows of bf16 are copied to their place in the tile; of others the
// first pieces are on their way before their group's turn. Lanes whose keys lie in caches of different layouts part
// ways, which a token's lanes do at most once.
template <uint32_t kLayouts, int kAlign, typename Memory>
class LayoutCopies {
 public:
  static constexpr int kAhead = 4;
  static constexpr int kRegisters = kLayouts == kAnyLayouts ? 48 : 40;  // of a thread, where they are few
  static_assert(kAhead <= Memory::kPiecesAhead && kAhead <= kPiecesOf<Layout::kNvfp4>);

  __device__ LayoutCopies(const DecodeArgs& args, Memory& shared, int key, int quarter)
      : ring_(shared.packed[threadIdx.x / 32]),
        all_scales_(reinterpret_cast<uint8_t*>(shared.scales[threadIdx.x / 32])),
        nowhere_(static_cast<const uint8_t*>(args.params.q)),
        lane_(threadIdx.x % 32),
        key_(key),
        quarter_(quarter) {
    static_assert(sizeof shared.scales[0] >= kKeysPerWarp * kMostScaleBytes);
  }

  __device__ __forceinline__ void turn(int, const Key& next) {
    const bool real = next.row != nullptr;
    next_row_ = real ? next.row : nowhere_;
    next_scales_ = real ? next.scales : nowhere_;
    flags_ = flags_ << kFlagBits | static_cast<uint32_t>(next.layout) << 1 | real;
    find_lane();
    const int lines = may_be<Layout::kNvfp4>(flags_) ? 3 : is_bf16(flags_) ? 8 : 5;  // of 128 bytes, with scales
    if (real && quarter_ < lines) prefetch_l2(next.row + 128 * quarter_);
    if (real && quarter_ + kLanesPerKey < lines) prefetch_l2(next.row + 128 * (quarter_ + kLanesPerKey));
  }

  __device__ __forceinline__ void begin() {
    copy_scales();
    row_ = next_row_;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy_next(i);
  }

  __device__ bool real() const { return flags_ >> kFlagBits & kReal; }  // group n has this lane's key

  // Until group n's scales are here. The next one's take their place.
  __device__ __forceinline__ void wait_for_scales(int) {
    if constexpr (kLayouts == kBf16Layout) return;
    find_lane();
    wait();
    __syncwarp();  // they came through another lane
    const uint32_t layout = flags_ >> kFlagBits;
    if (may_be<Layout::kNvfp4>(layout)) {
      scales_ = lane_scales<Layout::kNvfp4>(scales_of_key(), quarter_);
    } else if (may_be<Layout::kMxfp8>(layout)) {
      scales_ = lane_scales<Layout::kMxfp8>(scales_of_key(), quarter_);
    } else if (may_be<Layout::kFp8DsMla>(layout)) {
      scales_ = lane_scales<Layout::kFp8DsMla>(scales_of_key(), quarter_);
    }
    __syncwarp();
    copy_scales();
  }

  __device__ __forceinline__ void expand(uint8_t* rows) {
    find_lane();
    const uint32_t layout = flags_ >> kFlagBits;
    if (may_be<Layout::kNvfp4>(layout)) {
      expand_numbers<Layout::kNvfp4>(rows);
    } else if (may_be<Layout::kMxfp8>(layout)) {
      expand_numbers<Layout::kMxfp8>(rows);
    } else if (may_be<Layout::kFp8DsMla>(layout)) {
      expand_numbers<Layout::kFp8DsMla>(rows);
    } else if (may_be<Layout::kBf16>(layout)) {
      copy_bf16(rows);
    }
    __syncwarp();
  }

 private:
  static constexpr uint32_t kReal = 1, kFlagBits = 4;  // and three of the layout
  static constexpr int kMostScaleBytes = kNvfp4ScaleBytes;
  // Whether each group asks for its successor's pieces in their order.
  static constexpr bool kInOrder = !(kLayouts & kLayoutBit<Layout::kFp8DsMla>);

  // `flags` from a group's on. Asked in the order of expand(): the last layout that there can be needs no test.
  template <Layout kLayout>
  __device__ static bool may_be(uint32_t flags) {
    constexpr uint32_t kBefore = kLayout == Layout::kNvfp4      ? 0
                                 : kLayout == Layout::kMxfp8    ? kLayoutBit<Layout::kNvfp4>
                                 : kLayout == Layout::kFp8DsMla ? kV41Layouts
                                                                : kAnyLayouts & ~kBf16Layout;
    if constexpr (!(kLayouts & kLayoutBit<kLayout>)) return false;
    if constexpr ((kLayouts & ~kBefore) == kLayoutBit<kLayout>) return true;
    return (flags >> 1 & 7) == static_cast<uint32_t>(kLayout);
  }

  // Addresses computed ahead of the loop would take more registers than there are.
  __device__ __forceinline__ void find_lane() {
    lane_ = opaque(lane_);
    key_ = lane_ / kLanesPerKey;
    quarter_ = lane_ % kLanesPerKey;
  }
  __device__ uint8_t* scales_of_key() const { return all_scales_ + kMostScaleBytes * key_; }

  __device__ static bool is_bf16(uint32_t flags) {
    if constexpr (kLayouts == kBf16Layout) return true;
    if constexpr (!(kLayouts & kBf16Layout)) return false;
    return (flags >> 1 & 7) == static_cast<uint32_t>(Layout::kBf16);
  }

  // Two copies of the code, so that the one that runs has no branches; but not where copies are slow anyway.
  template <Layout kLayout>
  __device__ __forceinline__ void expand_numbers(uint8_t* rows) {
    if (kAlign < 16 || needs_two_factors<kLayout>(scales_)) {
      expand_pieces<kLayout, true>(rows);
    } else {
      expand_pieces<kLayout, false>(rows);
    }
  }

  template <Layout kLayout, bool kTwoFactors>
  __device__ __forceinline__ void expand_pieces(uint8_t* rows) {
    constexpr int kPieces = kPiecesOf<kLayout>;
    if (!kInOrder) copy_async_wait<0>();
    uint4 packed = ring_[0][lane_];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      // The next one is read before this one is converted.
      uint4 next;
      if (i + 1 < kPieces) {
        copy_async_wait<kAhead - 2>();
        next = ring_[(i + 1) % kAhead][lane_];
      }
      if (i + kAhead < kPieces) {
        copy_piece(i + kAhead, real());
      } else {
        if (i + kAhead == kPieces) row_ = next_row_;
        copy_next(i % kAhead);
      }
      store_numbers<kLayout, kTwoFactors>(packed, scales_, i, key_, quarter_, rows);
      packed = next;
    }
  }

  __device__ __forceinline__ void copy_bf16(uint8_t* rows) {
#pragma unroll
    for (int j = 0; j < kPiecesOf<Layout::kBf16>; ++j) {
      const int unit = bf16_unit(j, key_, quarter_);
      copy<16, kAlign>(unit_of(rows, unit / 8, key_, unit % 8), row_ + 16 * unit, real());
    }
    copy_async_commit();
    row_ = next_row_;
    if constexpr (kLayouts == kBf16Layout) {
      copy_async_wait<0>();
    } else {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) copy_next(i);
      copy_async_wait<kAhead>();
    }
  }

  __device__ void wait() { copy_async_wait<kAhead - 1>(); }  // for the piece that was asked for first

  // Asks for piece i of a row, to its place in the ring.
  __device__ __forceinline__ void copy_piece(int i, bool real) {
    copy<16, kAlign>(&ring_[i % kAhead][lane_], row_ + 16 * (quarter_ + kLanesPerKey * i), real);
    copy_async_commit();
  }
  __device__ __forceinline__ void copy_next(int i) {
    if (is_bf16(flags_)) {
      copy_async_commit();
    } else {
      copy_piece(i, flags_ & kReal);
    }
  }

  // Asks for the next group's scales: 16 bytes of them to a lane.
  __device__ __forceinline__ void copy_scales() {
    const bool real = flags_ & kReal;
    if (may_be<Layout::kNvfp4>(flags_)) {
      if (quarter_ < 2) copy<16, kAlign>(scales_of_key() + 16 * quarter_, next_scales_ + 16 * quarter_, real);
    } else if (may_be<Layout::kMxfp8>(flags_)) {
      if (quarter_ == 0) copy<16, kAlign>(scales_of_key(), next_scales_, real);
    } else if (may_be<Layout::kFp8DsMla>(flags_)) {
      if (quarter_ == 0) copy<kPackedScaleBytes, kAlign>(scales_of_key(), next_scales_, real);
    }
  }

  uint4 (*const ring_)[32];
  uint8_t* const all_scales_;
  const uint8_t* const nowhere_;  // an address for copies of no bytes
  uint32_t lane_;
  int key_, quarter_;
  const uint8_t *next_row_, *next_scales_;
  const uint8_t* row_ = nullptr;  // that copies are at
  uint32_t flags_ = 0;            // kReal, ... of group n + 1, and above them of group n
  uint2 scales_;                  // of group n
};

template <int kAlign, typename Memory>
using V41Copies = LayoutCopies<kV41Layouts, kAlign, Memory>;
template <int kAlign, typename Memory>
using Bf16Copies = LayoutCopies<kBf16Layout, kAlign, Memory>;
template <int kAlign, typename Memory>
using AnyLayoutCopies = LayoutCopies<kAnyLayouts, kAlign, Memory>;

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_ANY_LAYOUT_H_
