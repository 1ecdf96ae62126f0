"""The oracle's own check: against ml_dtypes, pure Python, and numbers worked out by hand."""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np
import packed_example
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_dsv4 import reference
from jax_dsv4.reference import ReferenceScope

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal, signs of zeros and places of NaN included."""
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[numbers], np.signbit(want)[numbers])


def test_bf16_to_float() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    same(reference.bf16_to_float(patterns), patterns.view(BF16).astype(np.float32))


def test_float_to_bf16() -> None:
    """At every bfloat16, at every tie between two, and one float32 to either side of both."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = ((np.arange(65536, dtype=np.uint32)[:, None] << 16) | low).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        got, want = reference.float_to_bf16(values).view(BF16), values.astype(BF16)
    same(got.astype(np.float32), want.astype(np.float32))


def test_e4m3_to_float() -> None:
    codes = np.arange(256, dtype=np.uint8)
    same(reference.e4m3_to_float(codes), codes.view(E4M3).astype(np.float64))


def test_float_to_e4m3() -> None:
    """At every code's value, at every tie between two, one float32 to either side of both, and beyond the largest."""
    grid = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float32)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    points = np.concatenate([points, -points])
    same(reference.float_to_e4m3(points).view(E4M3).astype(np.float32), np.clip(points, -448, 448).astype(E4M3).astype(np.float32))
    beyond = np.array([449, 1e30, np.inf, -449, -np.inf, np.nan, -np.nan])
    assert reference.float_to_e4m3(beyond).tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0xFE, 0x7F, 0x7F]


def test_scale_bytes() -> None:
    """Every ue8m0 byte reads as ml_dtypes says; every power of two that can be a scale is written as its byte."""
    bytes_ = np.arange(256, dtype=np.uint8)
    packed = np.zeros((256, 584), np.uint8)
    packed[:, :448] = 0x38  # 1.0
    packed[:, 576:583] = bytes_[:, None]
    want = bytes_.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    same(reference.unpack_fp8_ds_mla(packed, 1)[:, :448], np.repeat(want[:, None], 448, axis=1))
    exponents = np.arange(105, 247, dtype=np.uint8)  # 448 * 2^(246 - 127) is the largest below float32's end
    fullest = (448 * exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)).astype(np.float32)
    rows = np.repeat(fullest[:, None], 512, axis=1)
    np.testing.assert_array_equal(reference.pack_fp8_ds_mla(rows, 1, 584)[:, 576:583], np.repeat(exponents[:, None], 7, axis=1))


def test_hand_written_block() -> None:
    block, stride = packed_example.BLOCK_SIZE, packed_example.STRIDE
    same(reference.unpack_fp8_ds_mla(packed_example.packed(padding=0xFF), block), packed_example.values())
    np.testing.assert_array_equal(reference.pack_fp8_ds_mla(packed_example.latents(), block, stride), packed_example.packed())


def test_several_blocks_of_any_stride() -> None:
    latents = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    packed = reference.pack_fp8_ds_mla(latents, 3, 3 * 584 + 41)
    assert packed.shape == (2, 1793)
    for block in range(2):
        alone = reference.pack_fp8_ds_mla(latents[3 * block : 3 * block + 3], 3, 3 * 584)
        np.testing.assert_array_equal(packed[block], np.append(alone[0], np.zeros(41, np.uint8)))
    values = reference.unpack_fp8_ds_mla(packed, 3)
    # Half an e4m3 step (2^-4 of a value) or half of the smallest code at the largest scale here; bfloat16's half step.
    np.testing.assert_allclose(values[:, :448], latents[:, :448], rtol=2.0**-4, atol=2.0**-10 * 2.0**-6)
    np.testing.assert_allclose(values[:, 448:], latents[:, 448:], rtol=2.0**-8)


def brute_force(q, scopes, sink, scale):
    """Numbers and lists, straight from the definition; no maximum is subtracted."""
    tokens, heads, dim = q.shape
    out, lse = np.zeros((tokens, heads, dim)), np.full((tokens, heads), -math.inf)
    for t in range(tokens):
        keys = []
        for scope in scopes:
            for position, slot in enumerate(scope.indices[t]):
                if position < scope.lengths[t] and 0 <= slot < len(scope.latents):
                    keys.append([float(x) for x in scope.latents[slot]])
        for h in range(heads if keys else 0):
            weights = [math.exp(scale * math.fsum(float(a) * b for a, b in zip(q[t, h], key))) for key in keys]
            lse[t, h] = math.log(math.fsum(weights))
            total = math.fsum(weights) + (0 if sink is None else math.inf if sink[h] == math.inf else math.exp(sink[h]))
            for d in range(dim):
                out[t, h, d] = math.fsum(w * key[d] for w, key in zip(weights, keys)) / total
    return out, lse


def draw_scope(rng: np.random.Generator, tokens: int, topk: int, dim: int) -> ReferenceScope:
    latents = rng.standard_normal((5, dim))
    indices = rng.choice(np.array([0, 1, 2, 3, 4, 4, -1, -(2**31), 5, 2**31 - 1]), (tokens, topk))
    lengths = rng.choice(np.array([topk, topk, max(topk - 1, 0), 1, 0, -5, 10**9]), tokens)
    # What is not attended to is NaN: it must not be touched.
    inside = np.arange(topk)[None] < lengths[:, None]
    attended = np.isin(np.arange(5), indices[inside])
    return ReferenceScope(np.where(attended[:, None], latents, np.nan), indices, lengths)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(0, 4),
    heads=st.integers(1, 3),
    topks=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    with_sink=st.booleans(),
)
def test_decode(seed: int, tokens: int, heads: int, topks: list[int], scale: float, with_sink: bool) -> None:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((tokens, heads, 4))
    scopes = [draw_scope(rng, tokens, topk, 4) for topk in topks]
    sink = rng.choice(np.array([-np.inf, np.inf, 0.0, -3.0, 3.0]), heads) if with_sink else None
    got, want = reference.decode(q, scopes, sink, scale), brute_force(q, scopes, sink, scale)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-12, atol=1e-13)
    # Scopes attended to one by one and merged are the scopes attended to together.
    parts = [reference.decode(q, [scope], None, scale) for scope in scopes]
    together = reference.decode(q, scopes, None, scale)
    merged = reference.merge(*zip(*parts))
    np.testing.assert_allclose(merged[0], together[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(merged[1], together[1], rtol=1e-12, atol=1e-13)


def test_scores_beyond_exp() -> None:
    """Where exp overflows float64 the largest score is subtracted first: weights e^0 and e^-1."""
    scope = ReferenceScope(np.array([[1000.0], [999.0]]), np.array([[0, 1]]), np.array([2]))
    out, lse = reference.decode(np.ones((1, 1, 1)), [scope], None, scale=1.0)
    assert lse[0, 0] == pytest.approx(1000 + math.log(1 + math.exp(-1)), abs=1e-12)
    assert out[0, 0, 0] == pytest.approx((1000 + 999 * math.exp(-1)) / (1 + math.exp(-1)), abs=1e-9)


def test_lengths_left_out() -> None:
    latents, indices = np.eye(3, 512), np.array([[0, 2], [1, -1]])
    q = np.ones((2, 1, 512))
    full = ReferenceScope(latents, indices, np.array([2, 2]))
    for got, want in zip(reference.decode(q, [ReferenceScope(latents, indices)]), reference.decode(q, [full])):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("q", "indices", "lengths", "message"),
    [
        ((1, 512), (1, 2), (1,), "q must have shape (tokens, heads, 512), got (1, 512)"),
        ((2, 1, 1, 512), (2, 1, 3), (2, 1), "q must have shape (tokens, heads, 512), got (2, 1, 1, 512)"),
        ((2, 1, 512), (2, 1, 3), (2,), "indices must have one row for each of 2 tokens, got batch axes (2, 1)"),
        ((2, 1, 512), (2, 3), (1,), "lengths must have one row for each of 2 tokens, got batch axes (1,)"),
    ],
)
def test_shapes_that_do_not_fit(q: tuple, indices: tuple, lengths: tuple, message: str) -> None:
    scope = ReferenceScope(np.zeros((4, 512)), np.zeros(indices, int), np.zeros(lengths, int))
    with pytest.raises(ValueError, match=f"^{re.escape(f'reference.decode: {message}')}$"):
        reference.decode(np.zeros(q), [scope])


def test_plan_by_hand() -> None:
    """3 tokens of 5, 0 and 2 blocks of 16 keys on 2 workers, 1 block of cost an item.

    Costs: (5 + 1) + 0 + (2 + 1) = 9; a worker gets ceil(9 / 2) + 1 = 6. Token 0 fills worker 0; token 2 has worker 1's 3.
    """
    made = reference.plan([80, 0, 20], stride=100, workers=2, granularity=16, overhead=1)
    assert made["work_indptr"].tolist() == [0, 1, 2]
    assert made["work_info_set"].tolist() == [[0, -1, 0, 1, 0, 80, 0, 0], [2, -1, 2, 3, 200, 220, 0, 0]]
    assert made["reduce_indptr"].tolist() == [0, 0, 0, 0]
    assert (len(made["reduce_final_map"]), len(made["reduce_partial_map"])) == (0, 0)
    # On 3 workers each has ceil(9 / 3) + 1 = 4: 3 blocks and the item. Token 0: 48 keys, then 32 (a cost of 3); the 1 left of worker 1 has
    # no room for a block, so token 2 goes to worker 2.
    made = reference.plan([80, 0, 20], stride=100, workers=3, granularity=16, overhead=1)
    assert made["work_indptr"].tolist() == [0, 1, 2, 3]
    assert made["work_info_set"].tolist() == [
        [0, 0, 0, 1, 0, 48, 32, 0],
        [0, 1, 0, 1, 48, 80, 0, 0],
        [2, -1, 2, 3, 200, 220, 0, 0],
    ]
    assert made["reduce_indptr"].tolist() == [0, 2, 2, 2]
    assert (made["reduce_final_map"].tolist(), made["reduce_partial_map"].tolist()) == ([[0, 1]], [0, 1])
