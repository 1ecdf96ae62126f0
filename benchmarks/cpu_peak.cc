// A machine's ceilings: products of fp32 vectors, and of bf16 tiles, with independent sums in registers, no memory.
// Built by roofline.py for the machine it runs on.
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

// Each index is a constant, or a compiler may leave the accumulators in memory.
template <int... kChain>
float chains(long steps, std::integer_sequence<int, kChain...>) {
  Vector x, y;
  // No lane tends to zero: on many processors subnormal numbers take a hundred times as long.
  for (int i = 0; i < kLanes; ++i) x[i] = 0.999f, y[i] = 1e-3f * (i + 1);
  Vector acc[] = {(y + static_cast<float>(kChain))...};
  for (long s = 0; s < steps; ++s) {
    ((acc[kChain] = acc[kChain] * x + y), ...);
    asm volatile("" : "+r"(s));
  }
  return (acc[kChain][0] + ...);
}

constexpr int kChains = 12;  // enough to cover an FMA's latency twice over

// GFLOP/s of `threads` threads that each run `steps` rounds of so many operations.
template <typename Run>
double rate(int threads, long steps, double operations, const Run& run) {
  std::vector<std::thread> pool;
  std::vector<float> sink(threads);
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; ++t) pool.emplace_back([&, t] { sink[t] = run(steps); });
  for (auto& thread : pool) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return operations * steps * threads / seconds / 1e9;
}

extern "C" double fma_gflops(int threads, long steps) {
  return rate(threads, steps, 2.0 * kChains * kLanes,
              [](long n) { return chains(n, std::make_integer_sequence<int, kChains>{}); });
}

// Zero: no AMX.
extern "C" double amx_gflops([[maybe_unused]] int threads, [[maybe_unused]] long steps) {
#if defined(__AMX_BF16__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
  return rate(threads, steps, 4.0 * 2 * 16 * 16 * 32, [](long n) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
    for (long s = 0; s < n; ++s) {
      asm volatile(
          "tdpbf16ps %%tmm5, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
          "tdpbf16ps %%tmm5, %%tmm6, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm3" ::);
    }
    asm volatile("tilerelease");
    return 0.f;
  });
#else
  return 0;
#endif
}
