// A producing lane's copies where a scope's cache has another layout than fp8_ds_mla: mxfp8, nvfp4, bf16, or any two of
// them. Everything becomes bf16 exactly.
#ifndef JAX_DSV4_CUDA_ANY_LAYOUT_H_
#define JAX_DSV4_CUDA_ANY_LAYOUT_H_

#include <cstdint>

#include "cuda/producer.h"

namespace jax_dsv4::cuda {

// A warp's keys of a group that lie in caches of different layouts.
constexpr Layout kMixedLayouts = static_cast<Layout>(-1);

// Pieces of a lane's quarter of a row: its scales, then 16 bytes of numbers each.
constexpr int pieces_of(Layout layout) { return 1 + slot_bytes(layout).row / 16 / kLanesPerKey; }

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

template <Layout kLayout, int kAlign>
__device__ __forceinline__ void expand_slowly(KeyRow from, int key, int quarter, uint8_t* rows) {
  __align__(16) uint8_t all[32];
#pragma unroll 1
  for (int i = 0; i < slot_bytes(kLayout).scales; ++i) all[i] = from.scales[i];
  const uint2 scales = lane_scales<kLayout>(all, quarter);
#pragma unroll 1
  for (int j = 0; j < pieces_of(kLayout) - 1; ++j) {
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
// and rows of two layouts, have kAhead pieces of nothing in the ring.
template <int kAlign, typename Memory>
class AnyLayoutCopies {
 public:
  static constexpr int kAhead = 4;
  static_assert(kAhead <= Memory::kPiecesAhead && kAhead <= pieces_of(Layout::kNvfp4));

  __device__ AnyLayoutCopies(const DecodeArgs& args, Memory& shared, int key, int quarter)
      : scopes_(args.params.scopes),
        ring_(shared.packed[threadIdx.x / 32]),
        nowhere_(static_cast<const uint8_t*>(args.params.q)),
        key_(key),
        quarter_(quarter) {}

  __device__ __forceinline__ void turn(const DecodeArgs& args, int, KeySlot slot) {
    now_ = next_;
    layout_ = next_layout_;
    next_ = locate(args, slot);
    const bool real = next_.row != nullptr;
    real_ = real_ << 1 | real;
    more_ = more_ << 1 | slot.group;
    extra_ = extra_ << 1 | slot.extra;
    const bool any[2] = {__any_sync(~0u, real && !slot.extra) != 0, __any_sync(~0u, real && slot.extra) != 0};
    const Layout layouts[2] = {scopes_[0].cache.layout, scopes_[1].cache.layout};
    next_layout_ = any[0] && any[1] && layouts[0] != layouts[1] ? kMixedLayouts : layouts[any[1]];
    if (real) {
      const int bytes = scopes_[slot.extra].cache.row_pitch;
      for (int at = 128 * quarter_; at < bytes; at += 128 * kLanesPerKey) prefetch_l2(next_.row + at);
    }
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy_next(i, place(i));
  }

  __device__ bool more() const { return more_ & 1; }       // there is a group n + 1
  __device__ bool real() const { return real_ >> 1 & 1; }  // group n has this lane's key
  __device__ __forceinline__ void wait_for_scales(int) {
    wait();
    __syncwarp();  // they came through another lane
  }

  __device__ __forceinline__ void expand(uint8_t* rows) {
    switch (layout_) {
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
          copy<16, kAlign>(unit_of(rows, unit / 8, key_, unit % 8), real() ? now_.row + 16 * unit : nowhere_, real());
        }
        copy_async_commit();
        break;
      default:
        expand_row<kAlign>(now_, scopes_[extra_ >> 1 & 1].cache.layout, key_, quarter_, rows);
    }
    begin();
    copy_async_wait<kAhead>();
  }

 private:
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
    begin_ += pieces_of(kLayout);
  }

  template <Layout kLayout, bool kTwoFactors>
  __device__ __forceinline__ void expand_scaled_pieces(uint2 scales, uint8_t* rows) {
    constexpr int kAll = pieces_of(kLayout);
    go_on<kAll>(0);
#pragma unroll
    for (int i = 1; i < kAll; ++i) {
      wait();
      const uint4 packed = ring_[place(i)][lane()];
      go_on<kAll>(i);
      store_numbers<kLayout, kTwoFactors>(packed, scales, i - 1, key_, quarter_, rows);
    }
  }

  __device__ void wait() { copy_async_wait<kAhead - 1>(); }  // for the piece that was asked for first
  __device__ int lane() const { return quarter_ + kLanesPerKey * key_; }
  __device__ uint32_t place(int i) const { return (begin_ + i) % kAhead; }

  // Asks for piece i + kAhead of a group that has so many, or of the next one, at piece i's place.
  template <int kAll>
  __device__ __forceinline__ void go_on(int i) {
    if (i + kAhead >= kAll) return copy_next(i + kAhead - kAll, place(i));
    copy_numbers(now_.row, i + kAhead, place(i), real());
    copy_async_commit();
  }

  // Piece i of the next group.
  __device__ __forceinline__ void copy_next(int i, uint32_t at) {
    const bool real = real_ & 1;
    if (next_layout_ != Layout::kBf16 && next_layout_ != kMixedLayouts) {
      if (i > 0) {
        copy_numbers(next_.row, i, at, real);
      } else if (next_layout_ == Layout::kFp8DsMla) {
        if (quarter_ == 0) copy<kPackedScaleBytes, kAlign>(&ring_[at][lane()], real ? next_.scales : nowhere_, real);
      } else if (quarter_ < (next_layout_ == Layout::kMxfp8 ? kMxfp8ScaleBytes : kNvfp4ScaleBytes) / 16) {
        copy<16, kAlign>(&ring_[at][lane()], real ? next_.scales + 16 * quarter_ : nowhere_, real);
      }
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void copy_numbers(const uint8_t* row, int i, uint32_t at, bool real) {
    copy<16, kAlign>(&ring_[at][lane()], real ? row + 16 * (quarter_ + kLanesPerKey * (i - 1)) : nowhere_, real);
  }

  const Scope (&scopes_)[2];
  uint4 (*const ring_)[32];
  const uint8_t* const nowhere_;  // an address for copies of no bytes
  const int key_, quarter_;
  KeyRow now_ = {}, next_ = {};                                          // of groups n and n + 1
  Layout layout_ = Layout::kFp8DsMla, next_layout_ = Layout::kFp8DsMla;  // of all keys of a warp, or kMixedLayouts
  uint32_t real_ = 0, more_ = 0, extra_ = 0;  // bit i: group n + 1 - i has this lane's key; there is such a group; the
                                              // key is the extra scope's
  uint32_t begin_ = 0;                        // where group n's first piece lies in the ring
};

}  // namespace jax_dsv4::cuda

#endif  // JAX_DSV4_CUDA_ANY_LAYOUT_H_
