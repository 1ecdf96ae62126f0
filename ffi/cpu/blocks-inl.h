// Heads and keys in register blocks. Part of decode-inl.h, which see.

template <int kSize, typename Block>
inline void run_block(int size, int at, const Block& block) {
  if constexpr (kSize > 1) {
    if (size < kSize) return run_block<kSize - 1>(size, at, block);
  }
  block.template run<kSize>(at);
}

// Calls block.run<size>(at) for all of 0 .. n, sizes at most kMax, as evenly as can be.
template <int kMax, typename Block>
inline void for_blocks(int n, const Block& block) {
  for (int at = 0; at < n;) {
    const int blocks = (n - at + kMax - 1) / kMax, size = (n - at + blocks - 1) / blocks;
    run_block<kMax>(size, at, block);
    at += size;
  }
}
