"""merge_scopes and apply_attn_sink: how attention over parts of the keys combines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make
from compare import LSE, MERGED, OUT_FLOAT32, assert_close
from conformance import named
from hostile import SHAPE, draw_parts, expected
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_dsv4 as dsv4

merge = jax.jit(dsv4.merge_scopes)
apply = jax.jit(dsv4.apply_attn_sink)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    parts=st.integers(1, 4),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
    spread=st.sampled_from([0.0, 1.0, 10.0, 1e4]),
)
def test_merge(seed: int, parts: int, empty: float, spread: float) -> None:
    outs, lses = draw_parts(seed, parts, empty, spread)
    out, lse = merge([jnp.asarray(o) for o in outs], [jnp.asarray(n) for n in lses])
    want_out, want_lse = expected(outs, lses)
    assert_close("lse", lse, want_lse, MERGED)
    assert_close("out", out, want_out, MERGED)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_merge_is_associative_and_commutative(seed: int) -> None:
    outs, lses = draw_parts(seed, 3)
    first = merge(outs[:2], lses[:2])
    in_two_steps = merge([first[0], outs[2]], [first[1], lses[2]])
    at_once, backwards = merge(outs, lses), merge(outs[::-1], lses[::-1])
    for other in (in_two_steps, backwards):
        assert_close("lse", other[1], np.asarray(at_once[1], np.float64), MERGED)
        assert_close("out", other[0], np.asarray(at_once[0], np.float64), MERGED)


def test_one_part_is_itself() -> None:
    """To the bit: exp(0) = 1."""
    (out,), (lse,) = draw_parts(0, 1, empty=0)
    got = merge([out], [lse])
    np.testing.assert_array_equal(got[0], out)
    np.testing.assert_array_equal(got[1], lse)


def test_nan_is_not_hidden() -> None:
    """NaN in an out that counts, or in any lse, reaches the result, and only there."""
    outs, lses = draw_parts(0, 2, empty=0, spread=0)
    outs[0][0, 0, 0] = np.nan
    lses[1][1, 1] = np.nan
    out, lse = (np.asarray(x) for x in merge(outs, lses))
    where_out = np.zeros(SHAPE, bool)
    where_out[0, 0, 0] = where_out[1, 1] = True
    np.testing.assert_array_equal(np.isnan(out), where_out)
    np.testing.assert_array_equal(np.isnan(lse), where_out[..., 1] & (np.arange(3) == 1)[:, None])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), sinks=st.lists(st.sampled_from([-np.inf, np.inf, 0.0, -200.0, 200.0, 1.5]), min_size=4, max_size=4))
def test_sink(seed: int, sinks: list[float]) -> None:
    """out * exp(lse) / (exp(lse) + exp(sink)), the row's own head's sink."""
    (out,), (lse,) = draw_parts(seed, 1)
    out = np.where(np.isneginf(lse)[..., None], 0, out).astype(np.float32)
    got = apply(jnp.asarray(out), jnp.asarray(lse), jnp.asarray(sinks, jnp.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        share = 1 / (1 + np.exp(np.array(sinks)[None] - lse.astype(np.float64)))
    want = out * np.where(np.isneginf(lse), 0, share)[..., None]
    # A sink of 200 leaves numbers whose squares underflow: no cosine.
    assert_close("out", got, want, MERGED._replace(cosine=2.0))


def test_infinite_sinks_to_the_bit() -> None:
    """-inf: no sink. +inf: zeros, whatever out holds. An empty row: zeros under any sink."""
    (out,), (lse,) = draw_parts(0, 1, empty=0)
    out[0, 1], lse[1] = np.nan, -np.inf
    got = np.asarray(apply(out, lse, jnp.array([-jnp.inf, jnp.inf, -jnp.inf, 0.0])))
    np.testing.assert_array_equal(got[0::2, [0, 2]], out[0::2, [0, 2]])
    assert not got[:, 1].any()
    assert not got[1].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype(dtype: jnp.dtype) -> None:
    """The result has the parts' dtype, rounded once from float32."""
    outs, lses = draw_parts(1, 2, empty=0)
    low = [jnp.asarray(o).astype(dtype) for o in outs]
    out, lse = merge(low, lses)
    exact, _ = merge([o.astype(jnp.float32) for o in low], lses)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(exact.astype(dtype)))
    assert apply(out, lse, jnp.zeros(4)).dtype == dtype


@pytest.mark.parametrize("name", ["heads17", "swa_empty", "infinite_sinks", "float32-q_float32", "all_empty"])
def test_equals_the_fused_op(name: str) -> None:
    """Scopes attended to one at a time, merged and given the sink, against one call of both.

    In float32, for bfloat16 parts are rounded twice."""
    p = make(named(name))

    @jax.jit
    def both_ways(q, swa, extra, sink):
        decode = lambda *scopes, **options: dsv4.sparse_mla_decode(q, *scopes, scale=p.scale, return_lse=True, **options)  # noqa: E731
        out, lse = dsv4.merge_scopes(*zip(decode(swa), decode(extra)))
        return (dsv4.apply_attn_sink(out, lse, sink), lse), decode(swa, extra, attn_sink=sink)

    (out, lse), (fused_out, fused_lse) = both_ways(p.q.astype(jnp.float32), p.swa, p.extra, p.attn_sink)
    assert_close("lse", lse, np.asarray(fused_lse, np.float64), LSE)
    assert_close("out", out, np.asarray(fused_out, np.float64), OUT_FLOAT32)


@pytest.mark.parametrize("rows", [1, 130])
def test_nan_in_a_part_is_nan_in_both(rows: int) -> None:
    """Not zeros and -inf, whatever the size and whichever part."""
    outs = [jnp.full((rows, 64, 8), value, jnp.float32) for value in (jnp.nan, 1.0)]
    lses = [jnp.full((rows, 64), value, jnp.float32) for value in (jnp.nan, -1.25)]
    for order in (slice(None), slice(None, None, -1)):
        for merge in (dsv4.merge_scopes, jax.jit(dsv4.merge_scopes)):
            out, lse = merge(outs[order], lses[order])
            assert jnp.isnan(out).all()
            assert jnp.isnan(lse).all()
