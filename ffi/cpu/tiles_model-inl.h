// The tile instructions of tiles_amx-inl.h in plain C++, with the order and the roundings of Intel's manual, so that
// the AMX kernels can be tested on processors without them. Part of decode_amx.cc where JAX_DSV4_AMX_MODEL is defined.
struct Tiles {
  struct alignas(64) Tile {
    uint32_t rows[16][16];
  };
  // A thread's. Unlike the hardware's they must be released before they are configured again.
  static thread_local Tile tiles[8];
  static thread_local bool configured;

  static void configure() {
    if (configured) __builtin_trap();
    configured = true;
    __builtin_memset(tiles, 0, sizeof tiles);
  }
  static void release() { configured = false; }

  template <int T>
  static void zero() {
    __builtin_memset(&tile<T>(), 0, sizeof(Tile));
  }
  template <int T>
  static void load(const void* from) {
    __builtin_memcpy(&tile<T>(), from, sizeof(Tile));
  }
  template <int T>
  static void store(void* to) {
    __builtin_memcpy(to, &tile<T>(), sizeof(Tile));
  }

  // Even and odd products are summed up by themselves, each with one rounding; subnormal numbers count as zero.
  template <int C, int A, int B>
  static void dot() {
    Tile &c = tile<C>(), &a = tile<A>(), &b = tile<B>();
    for (int m = 0; m < 16; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < 16; ++k) {
        const float a_even = normal(a.rows[m][k] << 16), a_odd = normal(a.rows[m][k] & 0xffff0000u);
        for (int n = 0; n < 16; ++n) {
          even[n] = normal(__builtin_fmaf(a_even, normal(b.rows[k][n] << 16), even[n]));
          odd[n] = normal(__builtin_fmaf(a_odd, normal(b.rows[k][n] & 0xffff0000u), odd[n]));
        }
      }
      for (int n = 0; n < 16; ++n) {
        const float sum = normal(normal(c.rows[m][n]) + normal(even[n] + odd[n]));
        __builtin_memcpy(&c.rows[m][n], &sum, sizeof sum);
      }
    }
  }

 private:
  template <int T>
  static Tile& tile() {
    if (!configured) __builtin_trap();
    return tiles[T];
  }
  static float normal(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0 : x; }
  static float normal(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return normal(x);
  }
};
thread_local Tiles::Tile Tiles::tiles[8];
thread_local bool Tiles::configured = false;
