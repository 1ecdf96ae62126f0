// The decode kernel, written once over a vector type and a kind of products. Each instruction set's file defines `Simd`
// in its own namespace, then includes there one of products_*-inl.h and this file, and is compiled with its own flags;
// so nothing here may call an inline function of the standard library (the linker would keep one copy for all, in
// whichever instruction set).
//
// Per tile of up to kTileKeys valid keys, all heads of the task (a segment's first tile starts anew):
//   rows[k, d]   = the tile's latents                                 (scores)
//   s[h, k]      = sum_d q[h, d] * rows[k, d]                         (scores)
//   p[h, k]      = 2^(s * scale * log2(e) - max), running max and sum (softmax)
//   o[h, d]      = o[h, d] * alpha[h] + sum_k p[h, k] * rows[k, d]    (accumulate)
// and after a segment's last tile, of what came before and of it:
//   total[h, d]  = total[h, d] * keep[h] + o[h, d] * take[h]          (merge_maxima, accumulate)
// Scores, softmax and sums are fp32 throughout.

inline V* vector_at(float* numbers) { return reinterpret_cast<V*>(numbers); }

// Attention to some keys of one head, not yet divided by its sum. Without a valid key: -inf, 0, and anything in o.
struct State {
  float max;  // of s, log2 units
  float sum;  // of p
  float* o;   // [512]

  bool empty() const { return sum == 0 && max == -__builtin_inff(); }
};

// Merges in the maxima of what comes after, and says how the sums and o are to be merged. Never inlined, as merge_sums
// and finish: whoever calls them, the bits are the same.
__attribute__((noinline)) void merge_maxima(V* max, V next, V* keep, V* take) {
  const V both = Simd::max(next, *max);
  *keep = exp2(Simd::sub(*max, both));
  *take = exp2(Simd::sub(next, both));
  *max = both;
}

__attribute__((noinline)) void merge_sums(V* sum, V keep, V next, V take) {
  *sum = Simd::merge(*sum, keep, next, take);
}

// Writes out and lse of a head.
__attribute__((noinline)) void finish(const DecodeParams& p, int32_t token, int32_t head, const State& state) {
  const bool empty = state.empty();
  float total = state.sum;  // of the denominator
  if (p.sink != nullptr && !empty) total += exp2f(p.sink[head] * kLog2e - state.max);
  const V inverse = Simd::set1(1 / total);
  for (int d = 0; d < kLatentDim; d += kL) {
    Simd::store(state.o + d, empty ? Simd::set1(0) : Simd::mul(Simd::load(state.o + d), inverse));
  }
  const int64_t row = static_cast<int64_t>(token) * p.heads + head;
  write_out(p, row, state.o);
  p.lse[row] = empty ? -__builtin_inff() : kLn2 * (state.max + log2f(state.sum));
}

// Where the partial buffers keep a head's.
inline float* partial_numbers(const DecodeParams& p, int32_t row, int32_t head) {
  return p.partial_lse + (static_cast<int64_t>(row) * p.heads + head) * kPartialNumbers;
}
inline float* partial_out(const DecodeParams& p, int32_t row, int32_t head) {
  return p.partial_out + (static_cast<int64_t>(row) * p.heads + head) * kLatentDim;
}

inline void store_partial(const DecodeParams& p, int32_t row, int32_t head, const State& state) {
  float* numbers = partial_numbers(p, row, head);
  numbers[0] = state.max;
  numbers[1] = state.sum;
  if (state.empty()) return;
  float* out = partial_out(p, row, head);
  for (int d = 0; d < kLatentDim; d += kL) Simd::storeu(out + d, Simd::load(state.o + d));
}

// Rows whose bytes are fetched before a task begins.
constexpr int kFirstRows = 64;

// The valid keys of a tile, all of one segment.
struct Tile {
  Row rows[kTileKeys];
  int n;  // 0: there is none left
  int32_t segment;
};

inline void next_tile(const DecodeParams& p, const Task& task, KeyCursor* cursor, Tile* tile) {
  tile->n = 0;
  while (tile->n == 0 && cursor->at < task.kv_end) {
    tile->segment = cursor->at / task.segment_keys;
    tile->n =
        next_rows(p, task.token, segments_end(tile->segment + 1, task.segment_keys, task.kv_end), cursor, tile->rows);
  }
}

void attend(const DecodeParams& p, const Task& task, uint8_t* bytes) {
  const int32_t heads = task.head_end - task.head_begin;
  const int32_t room = padded_heads(heads);
  Scratch s = carve(bytes, room);
  // Segments are merged if they are the token's first ones. The first is summed up in place.
  const bool merges = task.kv_begin == 0;
  float* total = reinterpret_cast<float*>(bytes + kLaneBytesFixed + kLaneBytesPerHead * static_cast<size_t>(room));
  float *max = total + room * kLatentDim, *sum = max + room, *keep = sum + room, *take = keep + room;
  static_assert(sizeof(float) * (kLatentDim + 4) <= kMergeBytesPerHead, "per head");
  if (!merges) {
    const State none{-__builtin_inff(), 0, nullptr};
    const int32_t segments = segments_before(task.kv_end - task.kv_begin, task.segment_keys);
    for (int32_t i = 0; i < segments; ++i) {
      for (int32_t h = task.head_begin; h < task.head_end; ++h) store_partial(p, task.row + i, h, none);
    }
  }

  Tile tiles[2];
  KeyCursor cursor = first_key(p, task.token, task.kv_begin);
  next_tile(p, task, &cursor, &tiles[0]);
  for (int k = 0; k < tiles[0].n && k < kFirstRows; ++k) prefetch_row(tiles[0].rows[k]);
  load_queries(p, static_cast<int64_t>(task.token) * p.heads + task.head_begin, heads, s);
  bool empty = true, first = true;  // nothing is merged yet; the segment's first tile
  float* const own = s.o;
  alignas(64) float one[kLatentDim];
  if (merges) s.o = total;
  for (int now = 0; tiles[now].n > 0; now ^= 1) {
    const Tile& tile = tiles[now];
    Tile& next = tiles[now ^ 1];
    next_tile(p, task, &cursor, &next);
    scores(tile.rows, tile.n, next.rows, next.n, s, heads);
    softmax(s, heads, tile.n, p.scale * kLog2e, first);
    const bool last = next.n == 0 || next.segment != tile.segment;
    Merge merge;
    if (merges && last && !empty) {
      for (int32_t h = 0; h < heads; h += kL) {
        merge_maxima(vector_at(max + h), Simd::load(s.max + h), vector_at(keep + h), vector_at(take + h));
      }
      merge = {total, keep, take};
    }
    accumulate(s, heads, tile.n, first, merge, next.rows, next.n);
    // Only now: s.sum may become known beside the products.
    if (merge.total != nullptr) {
      for (int32_t h = 0; h < heads; h += kL) {
        merge_sums(vector_at(sum + h), Simd::load(keep + h), Simd::load(s.sum + h), Simd::load(take + h));
      }
    }
    first = last;
    if (!last) continue;
    if (!merges) {
      const int32_t row = task.row + tile.segment - task.kv_begin / task.segment_keys;
      for (int32_t h = 0; h < heads; ++h) {
        store_partial(p, row, task.head_begin + h, {s.max[h], s.sum[h], numbers_of(s.o, h, one)});
      }
    } else if (empty) {
      for (int32_t h = 0; h < heads; ++h) max[h] = s.max[h], sum[h] = s.sum[h];
      s.o = own;
      empty = false;
    }
  }
  if (!merges) return;
  for (int32_t h = 0; h < heads; ++h) {
    State state{-__builtin_inff(), 0, numbers_of(total, h, one)};
    if (!empty) state.max = max[h], state.sum = sum[h];
    if (task.row < 0) {
      finish(p, task.token, task.head_begin + h, state);
    } else {
      store_partial(p, task.row, task.head_begin + h, state);
    }
  }
}

void combine(const DecodeParams& p, int32_t token, int32_t row, int32_t count, int32_t head_begin, int32_t head_end) {
  for (int32_t h = head_begin; h < head_end; ++h) {
    alignas(64) float o[kLatentDim];
    State state{-__builtin_inff(), 0, o};
    for (int32_t i = row; i < row + count; ++i) {
      const float *numbers = partial_numbers(p, i, h), *out = partial_out(p, i, h);
      const State part{numbers[0], numbers[1], nullptr};
      if (part.empty()) continue;
      if (state.empty()) {
        for (int d = 0; d < kLatentDim; d += kL) Simd::store(o + d, Simd::loadu(out + d));
        state.max = part.max;
        state.sum = part.sum;
        continue;
      }
      V max = Simd::set1(state.max), sum = Simd::set1(state.sum), keep, take;
      merge_maxima(&max, Simd::set1(part.max), &keep, &take);
      merge_sums(&sum, keep, Simd::set1(part.sum), take);
      state.max = Simd::first(max);
      state.sum = Simd::first(sum);
      for (int d = 0; d < kLatentDim; d += kL) {
        Simd::store(o + d, Simd::merge(Simd::load(o + d), keep, Simd::loadu(out + d), take));
      }
    }
    finish(p, token, h, state);
  }
}
