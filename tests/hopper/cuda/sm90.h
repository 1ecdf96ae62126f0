// Stands in for ffi/cuda/sm90.h: the same functions over machine.h.
#ifndef JAX_DSV4_CUDA_SM90_H_
#define JAX_DSV4_CUDA_SM90_H_

#include <cmath>
#include <cstdint>

#include "common/fp8.h"
#include "cuda_runtime.h"

namespace jax_dsv4::sm90 {

inline uint32_t smem_address(const void* p) { return ::hopper::shared_address(p); }

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) { ::hopper::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() { ::hopper::barrier_init_fence(); }
inline void barrier_arrive(uint64_t* barrier) { ::hopper::barrier_arrive(barrier); }
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) { ::hopper::barrier_expect(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { ::hopper::barrier_wait(barrier, parity); }
inline void named_barrier_sync(int id, int threads) { ::hopper::sync_block(id, threads); }

inline int cluster_rank() { return ::hopper::cluster_rank(); }
inline int cluster_size() { return ::hopper::cluster_size(); }
inline void cluster_arrive() { ::hopper::cluster_arrive(); }
inline void cluster_wait() { ::hopper::cluster_wait(); }
inline void store_cluster(float4* to, uint64_t* barrier, int rank, float4 value) {
  ::hopper::store_cluster(to, barrier, rank, &value, sizeof value);
}
inline void store_cluster(float2* to, uint64_t* barrier, int rank, float2 value) {
  ::hopper::store_cluster(to, barrier, rank, &value, sizeof value);
}

inline void fence_proxy_async() { ::hopper::fence_proxy_async(); }

template <int kBytes>
void copy_async(void* dst, const void* src, uint32_t bytes) {
  ::hopper::copy_async(dst, src, kBytes, static_cast<int>(bytes));
}
inline void copy_async_commit() { ::hopper::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  ::hopper::wait_for_copies(kPending);
}
inline void copy_async_wait_all() {
  ::hopper::commit_copies();
  ::hopper::wait_for_copies(0);
}
inline void prefetch_l2(const void*) {}

template <int kFrom, int kTo>
void registers_change() {
  static_assert(kTo % 8 == 0 && kTo >= 24 && kTo <= 256);
}

inline uint32_t opaque(uint32_t x) { return x; }
inline uint32_t pack_bf16x2(float low, float high) {
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  auto product = [&](int shift) {
    return bf16_to_float(static_cast<uint16_t>(a >> shift)) * bf16_to_float(static_cast<uint16_t>(b >> shift));
  };
  return pack_bf16x2(product(0), product(16));
}
template <uint32_t kSelect>
uint32_t permute(uint32_t a, uint32_t b = 0) {
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = kSelect >> (4 * i) & 0xf;
    uint32_t byte = ((select & 7) < 4 ? a : b) >> (8 * (select & 3)) & 0xff;
    if (select & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign, replicated
    d |= byte << (8 * i);
  }
  return d;
}
inline float without_denormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
inline float exp2_approx(float x) { return without_denormal(exp2f(x)); }
inline float log2_approx(float x) { return log2f(without_denormal(x)); }
inline float reciprocal_approx(float x) { return without_denormal(1 / without_denormal(x)); }
inline uint16_t to_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(float_to_e4m3(low) | float_to_e4m3(high) << 8);
}

inline float2 from_e4m3x2(uint16_t bytes) {
  return {e4m3_to_float(static_cast<uint8_t>(bytes)), e4m3_to_float(static_cast<uint8_t>(bytes >> 8))};
}

// kMatrices of 8 x 8 numbers of 16 bits.
template <int kMatrices>
void store_matrices_of(uint32_t address, const uint32_t (&values)[kMatrices], bool transposed) {
  uint64_t rows[32];
  ::hopper::gather(address, rows);
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4, column = 2 * (lane % 4);
  for (int i = 0; i < kMatrices; ++i) {
    for (int c = 0; c < 2; ++c) {
      const int to = transposed ? column + c : row, at = transposed ? row : column + c;
      const auto begin = static_cast<uint32_t>(rows[8 * i + to]);
      if (begin % 16 != 0) ::hopper::fail("a row of a stored matrix is not aligned");
      *reinterpret_cast<uint16_t*>(::hopper::at_shared_address(begin + 2 * at, 2)) =
          static_cast<uint16_t>(values[i] >> (16 * c));
    }
  }
}
inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices_of<4>(address, {a, b, c, d}, false);
}
inline void store_transposed(uint32_t address, uint32_t a, uint32_t b) { store_matrices_of<2>(address, {a, b}, true); }
inline void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices_of<4>(address, {a, b, c, d}, true);
}

inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | uint64_t{1} << 62;
}
inline uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return descriptor >> 32 << 32 | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

inline void wgmma_fence() {}
inline void wgmma_commit() { ::hopper::commit_products(); }
template <int kPending>
void wgmma_wait() {
  ::hopper::wait_for_products(kPending);
}
inline void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  ::hopper::multiply(d, 64, {a, false}, {b, false}, accumulate);
}
template <int kFirst, int kSize>
void wgmma_m64n128k16(float (&d)[kSize], uint64_t a, uint64_t b, bool accumulate) {
  ::hopper::multiply(d + kFirst, 128, {a, false}, {b, true}, accumulate);
}
template <int kTransposedA, int kSize>
void wgmma_m64k16(float (&d)[kSize], uint64_t a, uint64_t b, bool accumulate) {
  ::hopper::multiply(d, 2 * kSize, {a, kTransposedA != 0}, {b, false}, accumulate);
}

}  // namespace jax_dsv4::sm90

#endif  // JAX_DSV4_CUDA_SM90_H_
