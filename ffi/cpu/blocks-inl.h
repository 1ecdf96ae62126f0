// Heads in register blocks. Part of decode-inl.h, which see.

// Calls Block<H> for all heads, H at most kMax, as evenly as can be.
template <int kMax, typename Block>
inline void for_head_blocks(int32_t heads, const Block& block) {
  int32_t h = 0;
  while (h < heads) {
    const int32_t blocks = (heads - h + kMax - 1) / kMax;
    const int32_t size = (heads - h + blocks - 1) / blocks;
    switch (size) {
      case 1:
        block.template run<1>(h);
        break;
      case 2:
        block.template run<2>(h);
        break;
      case 3:
        block.template run<3>(h);
        break;
      case 4:
        block.template run<4>(h);
        break;
      case 5:
        block.template run<(kMax >= 5 ? 5 : 1)>(h);
        break;
      default:
        block.template run<(kMax >= 6 ? 6 : 1)>(h);
        break;
    }
    h += size;
  }
}
