"""Other engines' forms, each beside its definition in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import OUT_BF16, assert_close

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, adapters, reference
from jax_dsv4.cache import LAYOUTS

INT32 = np.iinfo(np.int32)


def slots_of(table, indices, page_size):
    """By definition: one table and its indices."""
    pages = [table[i // page_size] if 0 <= i < page_size * len(table) else -1 for i in map(int, indices)]
    return [page * page_size + i % page_size if page >= 0 else -1 for page, i in zip(map(int, pages), map(int, indices))]


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_slots_from_pages(page_size):
    rng = np.random.default_rng(page_size)
    table = rng.permutation(35).reshape(5, 7).astype(np.int32)
    table[1, 3] = -1
    table[4] = INT32.min
    indices = rng.integers(-2, 8 * page_size, (5, 40)).astype(np.int32)
    indices[0, :3] = INT32.min, INT32.max, -1
    want = [slots_of(*each, page_size) for each in zip(table, indices)]
    got = jax.jit(adapters.slots_from_pages, static_argnums=2)(table, indices, page_size)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(adapters.slots_from_pages(table, indices, page_size), want)  # of NumPy's arrays
    # Batch axes, and rows that share tables.
    batched = adapters.slots_from_pages(jnp.asarray(table[None]), jnp.asarray(indices[None]), page_size)
    np.testing.assert_array_equal(batched, [want])
    requests = np.array([3, 0, -1, 5, 1, 1, INT32.min, INT32.max], np.int32)
    rows = rng.integers(0, 7 * page_size, (8, 11)).astype(np.int32)
    want = [slots_of(table[r], each, page_size) if 0 <= r < 5 else [-1] * 11 for r, each in zip(requests, rows)]
    np.testing.assert_array_equal(
        adapters.slots_from_pages(*map(jnp.asarray, (table, rows)), page_size, requests=jnp.asarray(requests)), want
    )


def test_no_pages():
    for shape in ((2, 0), (0, 3)):
        rows, table = jnp.zeros((2, 4), jnp.int32), jnp.zeros(shape, jnp.int32)
        slots = adapters.slots_from_pages(table, rows, 8, requests=jnp.zeros(2, jnp.int32))
        np.testing.assert_array_equal(slots, jnp.full((2, 4), -1))
    np.testing.assert_array_equal(adapters.slots_from_pages(jnp.zeros((2, 0), jnp.int32), rows, 8), jnp.full((2, 4), -1))


def test_a_page_beyond_int32():
    """A page whose slots are no int32 numbers is not there, rather than a slot elsewhere."""
    last = INT32.max // 64
    table = jnp.asarray([[last, last - 1, INT32.max]], jnp.int32)
    slots = adapters.slots_from_pages(table, jnp.asarray([[63, 64 + 63, 128]], jnp.int32), 64)
    np.testing.assert_array_equal(slots, [[INT32.max, last * 64 - 1, -1]])


def test_window_from_pages():
    rng = np.random.default_rng(0)
    page_size, window = 4, 6
    table = rng.permutation(15).reshape(3, 5).astype(np.int32)
    positions = np.array([0, 3, 17, 19, -1, INT32.min], np.int32)
    requests = np.array([0, 1, 2, 0, 1, -1], np.int32)
    slots, lengths = adapters.window_from_pages(*map(jnp.asarray, (table, positions)), window, page_size, requests=jnp.asarray(requests))
    for request, position, got, length in zip(requests, map(int, positions), slots, lengths):
        keys = range(max(position - window + 1, 0), position + 1)
        assert length == len(keys)
        assert list(got[:length]) == slots_of(table[request], keys, page_size)


@pytest.mark.parametrize("kv_lens", [None, [10, 7, 30, INT32.max]])
def test_ragged_rows(kv_lens):
    queries = [3, 0, 2, 1]
    cu = np.concatenate([[0], np.cumsum(queries)])
    want = [(r, (kv_lens[r] - n if kv_lens else 0) + i) for r, n in enumerate(queries) for i in range(n)] + [(-1, -1)] * 2
    lens = None if kv_lens is None else jnp.asarray(kv_lens, jnp.int32)
    got = adapters.ragged_rows(jnp.asarray(cu, jnp.int32), 8, kv_lens=lens)
    np.testing.assert_array_equal(np.stack(got, axis=1), want)
    # Fewer requests, and garbage beyond them.
    cu[4] = -7
    got = jax.jit(lambda *x: adapters.ragged_rows(x[0], 8, kv_lens=lens, num_requests=x[1]))(jnp.asarray(cu, jnp.int32), jnp.int32(3))
    np.testing.assert_array_equal(np.stack(got, axis=1), [*want[:5], *[(-1, -1)] * 3])


def test_residuals():
    """A window attended to elsewhere, merged with ours, is the attention over both."""
    rng = np.random.default_rng(1)
    scores, values = rng.normal(size=(4, 2, 30)) * 9, rng.normal(size=(30, 512))
    m = scores.max(axis=-1)
    weights = np.exp(scores - m[..., None])
    acc, l = weights @ values, weights.sum(axis=-1)  # noqa: E741
    acc[1], l[1], m[1] = np.nan, 0, -np.inf
    acc[2], m[2] = rng.normal(size=(2, 512)), -0.7 * np.finfo(np.float32).max  # as kernels leave a row that is all masked
    residuals = [jnp.asarray(x, jnp.float32) for x in (acc, l, m)]
    out, lse = adapters.from_residuals(*residuals)
    np.testing.assert_array_equal(np.isneginf(lse), np.isin([[0], [1], [2], [3]], [1, 2]) | np.zeros((4, 2), bool))
    np.testing.assert_array_equal(out[1:3], 0)
    for row in (0, 3):
        np.testing.assert_allclose(out[row], acc[row] / l[row][..., None], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[row], m[row] + np.log(l[row]), rtol=1e-6)
    again = adapters.from_residuals(*adapters.to_residuals(out, lse))
    for got, want in zip(again, (out, lse)):
        np.testing.assert_array_equal(got, want)
    acc, l, m = adapters.to_residuals(out, lse)  # noqa: E741
    assert all(bool(jnp.isfinite(x).all()) for x in (acc, l, m))
    with jax.enable_x64(True):
        assert [x.dtype for x in adapters.to_residuals(out, lse)] == [jnp.float32] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_from_latents(layout):
    """The bytes that append writes."""
    latents = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5, 512)), jnp.bfloat16)
    options = {"scale": 0.02} if layout.startswith("aiter_fp8") else {"arrangement": next(reversed(LAYOUTS[layout].arrangements), None)}
    got = adapters.cache_from_latents(latents, layout, **options)
    empty = dsv4.KVCache.create(3, 5, layout, **options)
    want = dsv4.append(empty, latents.reshape(-1, 512), jnp.arange(15, dtype=jnp.int32), implementation="xla")
    np.testing.assert_array_equal(got.data, want.data)
    assert got.block_size == 5


def tokamax_cache(rng, pages, page_size):
    """tokamax's two arrays with random codes, and their float64 values, from the definition of its layout."""
    codes = rng.integers(0, 256, (pages, page_size, 448)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    scales = rng.integers(120, 130, (pages, page_size, 64)).astype(np.uint8)
    rope = reference.float_to_bf16(rng.normal(size=(pages, page_size, 64)))
    data = np.concatenate([codes, scales], axis=-1).reshape(pages, page_size, 4, 128)
    nope = np.ascontiguousarray(np.moveaxis(data, 2, 3)).view(np.int32)[..., 0]
    words = np.stack([rope[..., :32], rope[..., 32:]], axis=-1).view(np.int32)[..., 0]
    numbers = reference.e4m3_to_float(codes) * np.tile(2.0 ** (scales.astype(np.float64) - 127), 7)
    return nope, words.reshape(pages, page_size // 4, 128), np.concatenate([numbers, reference.bf16_to_float(rope)], axis=-1)


def test_cache_from_tokamax():
    nope, rope, want = tokamax_cache(np.random.default_rng(3), 3, 8)
    exact = adapters.cache_from_tokamax(jnp.asarray(nope), jnp.asarray(rope), "bf16")
    np.testing.assert_array_equal(np.asarray(exact.data, np.float64), want)
    packed = adapters.cache_from_tokamax(jnp.asarray(nope), jnp.asarray(rope))
    np.testing.assert_array_equal(packed.data, adapters.cache_from_latents(exact.data).data)


def tokamax_arguments(rng, heads=8, topk=128):
    """Requests of 1, 1 and 3 new tokens, two rows of padding, and a cache with NaN in the pages that no request has."""
    pages, page_size, new = 12, 8, (1, 1, 3)
    nope, rope, latents = tokamax_cache(rng, pages, page_size)
    tokens, per_request = sum(new) + 2, 3
    tables = np.arange(per_request * len(new), dtype=np.int32).reshape(len(new), per_request)
    nope[per_request * len(new) :] = -1
    latents = latents.reshape(-1, 512)
    indices = rng.integers(0, per_request * page_size, (tokens, topk)).astype(np.int32)
    indices[:, 40:] = -1
    indices[2, :] = -1
    indices[3, 3:20] = -1  # holes
    q = rng.normal(size=(tokens, heads, 512)) * 0.2
    window = rng.normal(size=(tokens, heads, 512)), rng.random((tokens, heads)) + 1, rng.normal(size=(tokens, heads))
    cu = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    f32 = np.float32
    arguments = (
        *(jnp.asarray(q, jnp.bfloat16), nope, rope, indices, tables.reshape(-1), cu, np.array([2, 2, 3], np.int32)),
        *(rng.normal(size=heads).astype(f32), jnp.asarray(window[0], jnp.bfloat16), window[1].astype(f32), window[2].astype(f32)),
    )
    return tuple(map(jnp.asarray, arguments)), latents, sum(new)


def test_tokamax_sparse_mla():
    arguments, latents, tokens = tokamax_arguments(np.random.default_rng(4))
    q, _, _, indices, tables, cu, _, sink, *window = (np.asarray(x, np.float64) for x in arguments)
    scale = 512**-0.5
    requests = np.repeat(np.arange(3), np.diff(cu).astype(int))
    tables, indices = tables.reshape(3, -1).astype(int), indices.astype(int)
    slots = np.array([slots_of(tables[r], row, 8) for r, row in zip(requests, indices)])
    topk = np.full(tokens, slots.shape[1])
    out, lse = reference.decode(q[:tokens], [reference.ReferenceScope(latents, slots, topk)], None, scale)
    acc, l, m = (x[:tokens] for x in window)  # noqa: E741
    out, lse = reference.merge([out, acc / l[..., None]], [lse, m + np.log(l)])
    want = out / (1 + np.exp(sink - lse))[..., None]
    got = jax.jit(adapters.tokamax_sparse_mla, static_argnames="sm_scale")(*arguments, sm_scale=scale)
    assert_close("out", got[:tokens], want, OUT_BF16)
    assert np.isfinite(np.asarray(got, np.float64)).all()


def test_tokamax_sparse_mla_for_hopper():
    """Lowered on this machine for CUDA it is a call of our kernels on a packed cache."""
    arguments, _, _ = tokamax_arguments(np.random.default_rng(4))
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in _ffi.TARGETS]
    exported = jax.export.export(jax.jit(adapters.tokamax_sparse_mla), platforms=("cuda",), disabled_checks=checks)(*arguments)
    (call,) = (line for line in exported.mlir_module().splitlines() if "@dsv4_decode(" in line)
    assert f"swa_layout = {LAYOUTS['fp8_ds_mla'].code} : i32" in call


@pytest.mark.parametrize(("call", "message"), [
    (lambda i: adapters.slots_from_pages(i(2, 3), i(3, 4), 8), r"slots_from_pages: page_table must have shape .*, got \(2, 3\)"),
    (lambda i: adapters.slots_from_pages(i(2, 3), i(2, 4), 0), r"slots_from_pages: page_size must be from 1 to \d+, got 0"),
    (lambda i: adapters.slots_from_pages(i(2, 3), i(2, 4).astype(jnp.float32), 8), "logical_indices must have dtype int32"),
    (lambda i: adapters.window_from_pages(i(2, 3), i(3), 4, 8), r"window_from_pages: page_table must have shape .*, got \(2, 3\)"),
    (lambda i: adapters.ragged_rows(i(3), 8, num_requests=1.5), "ragged_rows: num_requests must be a Python int, got float 1.5"),
    (lambda i: adapters.ragged_rows(i(3), 8, num_requests=-1), r"ragged_rows: num_requests must be from 0 to \d+, got -1"),
    (lambda i: adapters.ragged_rows(i(3), 8, num_requests=i(1)), r"ragged_rows: num_requests must have shape .*, got \(1,\)"),
    (lambda i: adapters.from_residuals(i(2, 3, 4), i(2, 3), i(2, 3)), "acc must have dtype float32 or bfloat16 or float16, got int32"),
    (lambda i: adapters.ragged_rows(i(1), 8), r"ragged_rows: cu_q_lens must have shape \(max_requests \+ 1,\), got \(1,\)"),
    (lambda i: adapters.from_residuals(*(i(*n).astype(jnp.float32) for n in ((2, 3, 4), (2, 3), (3, 3)))), "m must have shape"),
    (lambda i: adapters.cache_from_latents(i(2, 4, 512)), "cache_from_latents: latents must have dtype bfloat16 or float32, got int32"),
    (lambda i: adapters.cache_from_tokamax(i(2, 6, 128), i(2, 1, 128)), "cache_kv_nope must have a page_size of a multiple of 4, got 6"),
    (lambda i: adapters.cache_from_tokamax(i(2, 8, 128), i(2, 1, 128)), r"cache_kv_rope must have shape .* = \(2, 2, 128\)"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda *shape: jnp.zeros(shape, jnp.int32))
