// Tile registers: eight of 16 rows of 64 bytes. Part of decode_amx.cc; tiles_model-inl.h has the same in plain C++.
// Assembly, because a compiler's own intrinsics may not say that they read memory (GCC 12): a store before them would
// be moved behind them.
struct Tiles {
  struct Bytes {
    char bytes[1024];
  };

  // Of this thread, until release().
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  static void release() { asm volatile("tilerelease"); }

  template <int T>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  static void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(from), "r"(int64_t{64}), "i"(T), "m"(*static_cast<const Bytes*>(from)));
  }
  template <int T>
  static void store(void* to) {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*static_cast<Bytes*>(to)) : "r"(to), "r"(int64_t{64}), "i"(T));
  }
  // C[m, n] += sum_k A[m, k] * B[k, n]: C fp32, A 32 bf16 numbers a row, B rows 2k and 2k + 1 number by number.
  template <int C, int A, int B>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
