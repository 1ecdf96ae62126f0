// The machine's fp32 FMA ceiling: independent accumulators in registers, no memory. Built by roofline.py for the
// machine it runs on.
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

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
  for (int i = 0; i < kLanes; ++i) x[i] = 0.999f, y[i] = 1e-3f * i;
  Vector acc[] = {(y + static_cast<float>(kChain))...};
  for (long s = 0; s < steps; ++s) {
    ((acc[kChain] = acc[kChain] * x + y), ...);
    asm volatile("" : "+r"(s));
  }
  return (acc[kChain][0] + ...);
}

constexpr int kChains = 12;  // enough to cover an FMA's latency twice over

// GFLOP/s of `threads` threads that each run `steps` rounds.
extern "C" double fma_gflops(int threads, long steps) {
  std::vector<std::thread> pool;
  std::vector<float> sink(threads);
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&sink, t, steps] { sink[t] = chains(steps, std::make_integer_sequence<int, kChains>{}); });
  for (auto& thread : pool) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return 2.0 * kChains * kLanes * steps * threads / seconds / 1e9;
}
