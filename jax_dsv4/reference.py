"""The oracle: NumPy, float64, bit by bit, sharing no code with the rest of the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def bf16_to_float(bits: Array) -> Array:
    """uint16 bfloat16 patterns to float32, exactly."""
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def float_to_bf16(values: Array) -> Array:
    """float32 to uint16 bfloat16 patterns, to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def e4m3_to_float(code: Array) -> Array:
    """uint8 e4m3fn patterns to float64: bias 7, no infinities, S.1111.111 is NaN."""
    code = np.asarray(code, np.uint8).astype(np.int64)
    sign, exponent, mantissa = np.where(code >= 128, -1.0, 1.0), (code // 8) % 16, code % 8
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return sign * np.where((exponent == 15) & (mantissa == 7), np.nan, magnitude)


def float_to_e4m3(values: Array) -> Array:
    """float64 to the nearest e4m3fn pattern (ties to even); saturates at 448; NaN gives 0x7f."""
    values = np.asarray(values, np.float64)
    grid = e4m3_to_float(np.arange(127, dtype=np.uint8))
    magnitude = np.minimum(np.abs(values), 448.0)
    above = np.clip(np.searchsorted(grid, magnitude), 1, 126)
    low, high = grid[above - 1], grid[above]
    middle = (low + high) / 2
    take_high = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    code = np.where(take_high, above, above - 1) + np.where(np.signbit(values), 128, 0)
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)


def pack_fp8_ds_mla(latents: Array, block_size: int, block_stride_bytes: int) -> Array:
    """Latents float [num_blocks * block_size, 512] to uint8 [num_blocks, block_stride_bytes]; padding is zero."""
    latents = np.asarray(latents, np.float32)
    blocks = len(latents) // block_size
    tiles = latents[:, :448].astype(np.float64).reshape(-1, 7, 64)
    amax = np.max(np.where(np.isnan(tiles), 0, np.abs(tiles)), axis=-1)
    # The smallest k with amax <= 448 * 2^k: frexp gives amax / 448 = mantissa * 2^k with mantissa in [0.5, 1).
    mantissa, exponent = np.frexp(np.clip(amax, float(np.float32(1e-4)), 448 * 2.0**127) / 448)
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    rows = np.empty((len(latents), 576), np.uint8)
    rows[:, :448] = float_to_e4m3(tiles / 2.0 ** exponent[..., None]).reshape(-1, 448)
    rows[:, 448:] = float_to_bf16(latents[:, 448:]).view(np.uint8)
    groups = np.zeros((len(latents), 8), np.uint8)
    groups[:, :7] = exponent + 127
    packed = np.zeros((blocks, block_stride_bytes), np.uint8)
    packed[:, : block_size * 576] = rows.reshape(blocks, -1)
    packed[:, block_size * 576 : block_size * 584] = groups.reshape(blocks, -1)
    return packed


def unpack_fp8_ds_mla(packed: Array, block_size: int) -> Array:
    """uint8 [num_blocks, block_stride_bytes] to float64 [num_blocks * block_size, 512]."""
    packed = np.asarray(packed, np.uint8)
    blocks = packed.shape[0]
    rows = packed[:, : block_size * 576].reshape(blocks * block_size, 576)
    groups = packed[:, block_size * 576 : block_size * 584].reshape(blocks * block_size, 8)[:, :7]
    scales = np.where(groups == 255, np.nan, 2.0 ** (groups.astype(np.float64) - 127))
    nope = e4m3_to_float(rows[:, :448]) * np.repeat(scales, 64, axis=1)
    with np.errstate(invalid="ignore"):  # signalling NaN
        rope = bf16_to_float(np.ascontiguousarray(rows[:, 448:]).view(np.uint16)).astype(np.float64)
    return np.concatenate([nope, rope], axis=1)


def pack_mxfp8_528(latents: Array, block_size: int, block_stride_bytes: int, arrangement: str) -> Array:
    """Latents float [num_blocks * block_size, 512] to uint8 [num_blocks, block_stride_bytes]; padding is zero.

    512 e4m3fn and 16 ue8m0 scales, one for every 32 numbers: all NaN where one of these is not finite. `arrangement`: "inline", each slot's
    scales after its numbers, or "footer", all scales after all numbers.
    """
    tiles = np.asarray(latents, np.float32).astype(np.float64).reshape(-1, 16, 32)
    amax = np.max(np.abs(tiles), axis=-1)
    finite = np.isfinite(amax)
    mantissa, exponent = np.frexp(np.where(finite, np.maximum(amax, float(np.float32(1e-4))), 1) / 448)
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    codes = np.where(finite[..., None], float_to_e4m3(tiles / 2.0 ** exponent[..., None]), 0x7F)
    return _in_blocks(codes.reshape(-1, 512), np.where(finite, exponent + 127, 255), block_size, block_stride_bytes, arrangement)


def unpack_mxfp8_528(packed: Array, block_size: int, arrangement: str) -> Array:
    """uint8 [num_blocks, block_stride_bytes] to float64 [num_blocks * block_size, 512]."""
    codes, scales = _out_of_blocks(packed, block_size, 512, 16, arrangement)
    factors = np.where(scales == 255, np.nan, 2.0 ** (scales.astype(np.float64) - 127))
    return e4m3_to_float(codes) * np.repeat(factors, 32, axis=1)


def e2m1_to_float(code: Array) -> Array:
    """e2m1 patterns 0 to 15 to float64."""
    code = np.asarray(code).astype(np.int64)
    exponent, mantissa = code // 2 % 4, code % 2
    return np.where(code >= 8, -1.0, 1.0) * np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def pack_nvfp4_288(latents: Array, block_size: int, block_stride_bytes: int, arrangement: str) -> Array:
    """As `pack_mxfp8_528`: 512 e2m1, the even one of two in the lower half of a byte, and 32 e4m3fn scales, one for every 16 numbers.

    A scale is that of amax / 6, from 2^-9 to 448: NaN where a number is; what is too large for it saturates.
    """
    tiles = np.asarray(latents, np.float32).astype(np.float64).reshape(-1, 32, 16)
    amax = np.max(np.abs(tiles), axis=-1)
    nan = np.isnan(amax)
    scales = float_to_e4m3(np.where(nan, amax, np.clip(amax / 6, 2.0**-9, 448)))
    quotients = np.where(nan[..., None], 0, tiles) / np.where(nan, 1, e4m3_to_float(scales))[..., None]
    grid = e2m1_to_float(np.arange(8))
    distance = np.abs(np.minimum(np.abs(quotients), 6)[..., None] - grid)
    nearest = distance == distance.min(axis=-1, keepdims=True)
    # Of two equally near the even one: it counts as nearer.
    codes = np.argmax(nearest * (2 - np.arange(8) % 2), axis=-1) + 8 * np.signbit(quotients)
    pairs = codes.reshape(-1, 256, 2)
    return _in_blocks(pairs[..., 0] + 16 * pairs[..., 1], scales, block_size, block_stride_bytes, arrangement)


def unpack_nvfp4_288(packed: Array, block_size: int, arrangement: str) -> Array:
    """uint8 [num_blocks, block_stride_bytes] to float64 [num_blocks * block_size, 512]."""
    pairs, scales = _out_of_blocks(packed, block_size, 256, 32, arrangement)
    numbers = e2m1_to_float(np.stack([pairs % 16, pairs // 16], axis=-1).reshape(-1, 512))
    return numbers * np.repeat(e4m3_to_float(scales), 16, axis=1)


def _byte_places(block_size: int, row_bytes: int, scale_bytes: int, arrangement: str) -> tuple[Array, Array]:
    """Where in a block each slot's numbers are, and its scales."""
    slot = np.arange(block_size)[:, None]
    whole = row_bytes + scale_bytes
    if arrangement == "inline":
        return whole * slot + np.arange(row_bytes), whole * slot + np.arange(row_bytes, whole)
    return row_bytes * slot + np.arange(row_bytes), row_bytes * block_size + scale_bytes * slot + np.arange(scale_bytes)


def _in_blocks(rows: Array, scales: Array, block_size: int, block_stride_bytes: int, arrangement: str) -> Array:
    packed = np.zeros((len(rows) // block_size, block_stride_bytes), np.uint8)
    for part, at in zip((rows, scales), _byte_places(block_size, rows.shape[1], scales.shape[1], arrangement)):
        packed[:, at] = part.reshape(len(packed), *at.shape)
    return packed


def _out_of_blocks(packed: Array, block_size: int, row_bytes: int, scale_bytes: int, arrangement: str) -> tuple[Array, Array]:
    packed = np.asarray(packed, np.uint8)
    rows_at, scales_at = _byte_places(block_size, row_bytes, scale_bytes, arrangement)
    return packed[:, rows_at].reshape(-1, row_bytes), packed[:, scales_at].reshape(-1, scale_bytes)


class ReferenceScope(NamedTuple):
    """latents float [num_slots, 512]; indices int [tokens, topk]; lengths int [tokens], topk if left out."""

    latents: Array
    indices: Array
    lengths: Array | None = None


def decode(q: Array, scopes: Sequence[ReferenceScope], attn_sink: Array | None = None, scale: float = 512**-0.5) -> tuple[Array, Array]:
    """One softmax over the valid keys of all scopes, token by token and in float64.

    Args:
      q: float [tokens, heads, 512].
      scopes: the keys.
      attn_sink: float [heads], added to the denominator only.
      scale: of the scores.

    Returns:
      out float64 [tokens, heads, 512] and lse float64 [tokens, heads] (natural log, sink excluded); 0 and -inf without a valid key.

    Raises:
      ValueError: other shapes.
    """
    q = np.asarray(q, np.float64)
    if q.ndim != 3:
        raise ValueError(f"reference.decode: q must have shape (tokens, heads, 512), got {q.shape}")
    for _, indices, lengths in scopes:
        for name, shape in (("indices", np.shape(indices)[:-1]), ("lengths", (len(q),) if lengths is None else np.shape(lengths))):
            if shape != (len(q),):
                raise ValueError(f"reference.decode: {name} must have one row for each of {len(q)} tokens, got batch axes {shape}")
    tokens, heads, dim = q.shape
    out, lse = np.zeros((tokens, heads, dim)), np.full((tokens, heads), -np.inf)
    for token in range(tokens):
        keys = []
        for latents, indices, lengths in scopes:
            count = indices.shape[1] if lengths is None else min(max(int(lengths[token]), 0), indices.shape[1])
            keys += [latents[s] for s in indices[token, :count].tolist() if 0 <= s < len(latents)]
        if not keys:
            continue
        rows = np.asarray(keys, np.float64)
        scores = scale * q[token] @ rows.T
        top = scores.max(axis=1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=1)
        lse[token] = top[:, 0] + np.log(total)
        if attn_sink is not None:
            with np.errstate(over="ignore"):
                total = total + np.exp(np.asarray(attn_sink, np.float64) - top[:, 0])
        out[token] = weights @ rows / total[:, None]
    return out, lse


def merge(outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Attention over a union of disjoint key sets, float64: lse = log sum exp lse_i; out = sum exp(lse_i - lse) out_i."""
    stacked = np.asarray(lses, np.float64)
    lse = np.logaddexp.reduce(stacked, axis=0)
    weights = np.where(np.isneginf(stacked), 0.0, np.exp(stacked - np.where(np.isneginf(lse), 0.0, lse)))
    return sum(w[..., None] * np.asarray(o, np.float64) for w, o in zip(weights, outs)), lse


def plan(
    lengths: Sequence[int],
    stride: int,
    workers: int,
    granularity: int,
    overhead: int,
    active_workers: int | None = None,
    cut_cost: int = 0,
    segment: int = 0,
) -> dict[str, Array]:
    """The plan of one kernel call, as AITER's get_mla_metadata_v1 makes it (fast, sparse mode), empty tokens left out.

    Workers are filled in order with a payload of equal cost. A token costs its blocks plus `overhead`; what does not fit goes on with
    the next worker, cut at a block boundary.

    With `cut_cost` the payload may be larger: that of as many tokens, each of the largest cost, as a worker has to take for all to be
    taken. So it is if the difference is no more than `cut_cost` times two more than these tokens. Then no token is cut.

    Args:
      lengths: keys of each token, clamped.
      stride: key numbers between tokens (topk).
      workers: entries of work_indptr less one.
      granularity: keys per block.
      overhead: an item's cost in blocks.
      active_workers: how many workers share the work; default all.
      cut_cost: what cutting tokens adds to an item's cost, in blocks; 0: nothing, as in AITER's plans. Otherwise no payload is so small
        that six times its square is less than the largest token's cost.
      segment: tokens are cut at multiples of so many blocks and nowhere else, and an item goes to the worker in whose even share of the
        cost it begins; 0: as above.

    Returns:
      The arrays of `WorkPlan` without kv_lengths, cut to the rows in use; reduce_final_map has the split tokens' rows only.
    """
    blocks = [-(-n // granularity) for n in lengths]
    costs = [b + overhead for b in blocks if b]
    sharing = active_workers or workers
    payload = max(1, -(-sum(costs) // sharing))
    if cut_cost > 0:
        payload = max(payload, math.isqrt(max(0, -(-max(costs, default=0) // 6) - 1)) + 1)
    tokens = -(-len(costs) // sharing)
    without_cuts = max(1, tokens * max(costs, default=0))
    whole = cut_cost > 0 and without_cuts - payload <= cut_cost * (tokens + 2)
    payload = (without_cuts if whole else payload) + overhead
    queues: list[list[list[int]]] = [[]]
    left = payload
    reduce_indptr: list[int] = [0]
    final: list[list[int]] = []
    partial: list[int] = []
    if segment > 0:
        queues = [[] for _ in range(workers)]
        payload = max(1, -(-sum(b + overhead * -(-b // segment) for b in blocks) // sharing))
    cost = 0
    for token, (length, todo) in enumerate(zip(lengths, blocks)):
        pieces: list[tuple[int, int, int]] = []
        done = 0
        while segment > 0 and done < todo:
            take = min(segment, todo - done)
            pieces.append((cost // payload, done * granularity, min((done + take) * granularity, length)))
            done += take
            cost += take + overhead
        while done < todo:
            room = left - overhead
            if room <= 0 or (whole and room < todo):
                queues.append([])
                left = payload
                continue
            take = min(room, todo - done)
            pieces.append((len(queues) - 1, done * granularity, min((done + take) * granularity, length)))
            done += take
            left -= take + overhead
            if done < todo:
                queues.append([])
                left = payload
        for worker, begin, end in pieces:
            row = -1
            if len(pieces) > 1:
                row = len(partial)
                partial.append(row)
            base = token * stride
            queues[worker].append([token, row, token, token + 1, base + begin, base + end, length - end, 0])
        if len(pieces) > 1:
            final.append([token, token + 1])
        reduce_indptr.append(len(partial))
    counts = [len(queue) for queue in queues] + [0] * (workers - len(queues))
    as_int = lambda rows, width: np.asarray(rows, np.int32).reshape(-1, width)  # noqa: E731
    return {
        "work_indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        "work_info_set": as_int([item for queue in queues for item in queue], 8),
        "reduce_indptr": np.asarray(reduce_indptr, np.int32),
        "reduce_final_map": as_int(final, 2),
        "reduce_partial_map": np.asarray(partial, np.int32),
    }
