// The machine's fp32 FMA ceiling: independent accumulators in registers, no memory. Built by roofline.py for the
// machine it runs on.
#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

static float chains(long steps) {
  constexpr int kChains = 12;  // enough to cover an FMA's latency twice over
  Vector acc[kChains];
  Vector x, y;
  for (int i = 0; i < kLanes; ++i) x[i] = 0.999f, y[i] = 1e-3f * i;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) acc[c] = y + static_cast<float>(c);
  for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * x + y;
    asm volatile("" : "+m"(steps));
  }
  Vector sum = acc[0];
#pragma GCC unroll 12
  for (int c = 1; c < kChains; ++c) sum += acc[c];
  return sum[0];
}

// GFLOP/s of `threads` threads that each run `steps` rounds.
extern "C" double fma_gflops(int threads, long steps) {
  std::vector<std::thread> pool;
  std::vector<float> sink(threads);
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; ++t) pool.emplace_back([&sink, t, steps] { sink[t] = chains(steps); });
  for (auto& thread : pool) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return 2.0 * 12 * kLanes * steps * threads / seconds / 1e9;
}
