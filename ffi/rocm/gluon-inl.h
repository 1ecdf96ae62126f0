// Our own kernels around AITER's Gluon kernel, and of its layout. A part of kernels.hip.

namespace jax_dsv4::rocm {

// ---- Slots: valid ones to the front, token after token. AITER's kernel reads row 0 where a full tile of keys has a
// hole, and a NaN there would spoil the token; and it does not look whether a slot is beyond the cache.

namespace {

__device__ bool names_a_row(const Scope& scope, int32_t slot) {
  return slot >= 0 && slot < scope.cache.num_blocks * scope.cache.block_size;
}

}  // namespace

// One wave per token and scope.
JAX_DSV4_KERNEL void dsv4_count_slots(GluonDecodeParams p) {
  const int lane = thread_id() % kWave;
  const uint32_t row = group_id(kWave), tokens = p.tokens;
  if (row >= tokens * scopes_of(p)) return;
  const GluonScope& s = p.scopes[row / tokens];
  const int32_t token = row % tokens, length = clamped_length(s.scope, token);
  const int32_t* slots = s.scope.indices + static_cast<int64_t>(token) * s.scope.topk;
  int32_t valid = 0;
  for (int32_t first = 0; first < length; first += kWave) {
    const bool keep = first + lane < length && names_a_row(s.scope, slots[first + lane]);
    valid += __builtin_popcountll(__builtin_amdgcn_ballot_w64(keep));
  }
  if (lane == 0) s.counts[token] = valid;
}

// One workgroup per token and scope.
JAX_DSV4_KERNEL void dsv4_gather_slots(GluonDecodeParams p) {
  __shared__ int32_t in_wave[kThreads / kWave];
  const int t = thread_id();
  const uint32_t tokens = p.tokens;
  const GluonScope& s = p.scopes[block_id() / tokens];
  const int32_t token = block_id() % tokens, length = clamped_length(s.scope, token);
  int64_t before = 0;
  for (int32_t other = t; other < token; other += kThreads) before += s.counts[other];
  int32_t to = static_cast<int32_t>(sum_over_threads(before));
  if (t == 0) {
    s.indptr[token] = to;
    if (token == p.tokens - 1) s.indptr[p.tokens] = to + s.counts[token];
  }
  const int32_t* slots = s.scope.indices + static_cast<int64_t>(token) * s.scope.topk;
  for (int32_t first = 0; first < length; first += kThreads) {
    const int32_t slot = first + t < length ? slots[first + t] : -1;
    const uint64_t kept = __builtin_amdgcn_ballot_w64(names_a_row(s.scope, slot));
    if (t % kWave == 0) in_wave[t / kWave] = __builtin_popcountll(kept);
    barrier();
    int32_t at = to + __builtin_amdgcn_mbcnt_hi(kept >> 32, __builtin_amdgcn_mbcnt_lo(kept, 0));
    for (int wave = 0; wave < kThreads / kWave; ++wave) {
      if (wave < t / kWave) at += in_wave[wave];
      to += in_wave[wave];
    }
    if (names_a_row(s.scope, slot)) s.slots[at] = slot;
    barrier();
  }
}

// ---- Combine: the splits of a token, and the sink. Half a workgroup per token and head, four numbers a thread.

JAX_DSV4_KERNEL void dsv4_combine_splits(GluonDecodeParams p) {
  const uint32_t t = thread_id() % kThreadsPerRow;
  const uint32_t row = group_id(kThreadsPerRow), heads = p.heads;
  if (row >= p.tokens * heads) return;
  const int64_t first = static_cast<int64_t>(row / heads) * p.splits * heads + row % heads;  // the first split's row
  // A split without keys has sum 0, and a maximum that means nothing.
  float top = -infinity();
  for (int32_t i = 0; i < p.splits; ++i) {
    const int64_t partial = first + static_cast<int64_t>(i) * heads;
    if (p.partial_sum[partial] != 0 && p.partial_max[partial] > top) top = p.partial_max[partial];
  }
  Four sum = {};
  float total = 0;
  for (int32_t i = 0; i < p.splits; ++i) {
    const int64_t partial = first + static_cast<int64_t>(i) * heads;
    if (p.partial_sum[partial] == 0) continue;
    const float weight = __builtin_amdgcn_exp2f(p.partial_max[partial] - top);
    total += weight * p.partial_sum[partial];
    const Four mine = reinterpret_cast<const Four*>(p.partial_out + partial * kLatentDim)[t];
    for (int k = 0; k < 4; ++k) sum.values[k] += weight * mine.values[k];
  }
  const bool empty = total == 0;
  const float sink = p.sink ? __builtin_amdgcn_exp2f(p.sink[row % heads] * kLog2e - top) : 0;
  const float inverse = empty ? 0 : 1 / (total + sink);
  for (float& value : sum.values) value *= inverse;
  store_four(p.out, p.out_dtype, static_cast<int64_t>(row) * kLatentDim + 4 * t, sum);
  if (t == 0) p.lse[row] = empty ? -infinity() : (top + __builtin_amdgcn_logf(total)) * kLn2;
}

// ---- Append: one wave per latent, eight numbers a lane.

JAX_DSV4_KERNEL void dsv4_append_packed(AppendParams p) {
  constexpr uint32_t kLanesPerTile = kScaleTile / 8, kRopeLane = kScaleTiles * kLanesPerTile;
  const uint32_t lane = thread_id() % kWave;
  const int64_t row = group_id(kWave);
  if (row >= p.count) return;
  const int32_t slot = p.slots[row], block_size = p.cache.block_size;
  if (slot < 0 || slot / block_size >= p.cache.num_blocks || superseded(p.slots, p.count, row)) return;
  const Eight eight = load_eight(p.latents, p.dtype, row * kWave + lane);
  float top = 0;  // a NaN stays below
  for (float value : eight.values) {
    const float magnitude = __builtin_fabsf(value);
    if (magnitude > top) top = magnitude;
  }
  const uint8_t scale = ue8m0_scale_of(max_over_wave(top, kLanesPerTile));
  const float inverse = ue8m0_to_float(static_cast<uint8_t>(254 - scale));  // 2^-k exactly, subnormal included
  uint8_t* block = p.data_out + slot / block_size * p.cache.block_stride_bytes;
  uint8_t *data = block + p.cache.row_at(slot % block_size), *scales = block + p.cache.scales_at(slot % block_size);
  // A block is aligned to two bytes.
  if (lane < kRopeLane) {
    uint16_t* to = reinterpret_cast<uint16_t*>(data + 8 * lane);
    for (int k = 0; k < 4; ++k) {
      to[k] = float_to_e4m3(eight.values[2 * k] * inverse) | float_to_e4m3(eight.values[2 * k + 1] * inverse) << 8;
    }
  } else {
    uint16_t* to = reinterpret_cast<uint16_t*>(data + kNopeDim) + 8 * (lane - kRopeLane);
    for (int k = 0; k < 8; ++k) to[k] = float_to_bf16(eight.values[k]);
  }
  if (lane % kLanesPerTile == 0) scales[lane / kLanesPerTile] = lane < kRopeLane ? scale : 0;  // the eighth is padding
}

}  // namespace jax_dsv4::rocm
