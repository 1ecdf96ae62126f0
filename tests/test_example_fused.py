"""The kernels of what is between the products, in Pallas's interpreter: each against the plain model, and whole decode steps."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import (
    PRESETS,
    create_cache,
    forward,
    fused,
    hyper_connection,
    index_keys,
    map_schema,
    model,
    products,
    rms_norm,
    rope_angle,
    rotate,
    score_entries,
    strict_types,  # noqa: F401
    terms,
    turn,
)

F32, BF16 = jnp.float32, jnp.bfloat16
SUMS, ROUNDED = 1e-5, 0.02

SMALL = dataclasses.replace(
    PRESETS["v4-flash"],
    layers=("swa", "csa", "hca"),
    num_hash_layers=1,
    hidden_size=1024,
    num_attention_heads=2,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=64,
    hca_ratio=8,
    moe_intermediate_size=128,
    n_routed_experts=64,
    num_experts_per_tok=3,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=4,
    vocab_size=64,
)


class Interpreted:
    """A module of kernels that run in Pallas's interpreter."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        takes = inspect.isfunction(found) and "interpret" in inspect.signature(found).parameters
        return partial(found, interpret=True) if takes else found


def close(found: Any, wanted: Any, tolerance: float) -> None:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert np.abs(found - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-3)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape).astype(np.float32))


def random_terms(rng: np.random.Generator, tokens: int, hidden: int) -> Any:
    """Two parts with a row too many, three choices of experts of each token; what is of nobody is NaN."""
    dense, experts = normal(rng, 2, tokens + 1, 1, hidden), normal(rng, 2, 3 * tokens + 1, hidden)
    chosen = rng.integers(-1, 5, (tokens, 3)).astype(np.int32)
    experts = experts.at[:, np.append(chosen.reshape(-1) < 0, True)].set(jnp.nan)
    return terms.Terms(dense.at[:, tokens:].set(jnp.nan), terms.Routed(experts, jnp.asarray(chosen), normal(rng, tokens, 3)))


@pytest.mark.parametrize("experts", [False, True], ids=["attention", "experts"])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1024), (2, 3072), (3, 1024), (20, 3072), (130, 1024)])
def test_streams(tokens, hidden, experts):
    """A sublayer's output goes in, and the next one's input comes out, as `write_back`, `hyper_connection` and `rms_norm` make it."""
    rng, config = np.random.default_rng(3), PRESETS["v4-flash"]
    x, y = normal(rng, tokens, 4, hidden).astype(BF16), random_terms(rng, tokens, hidden)
    y = y if experts else terms.Terms(y.dense)
    back = (y, normal(rng, tokens, 4), normal(rng, tokens, 4, 4)) if tokens <= 128 else None
    w, norm = {"fn": 0.05 * normal(rng, 24, 4 * hidden), "base": normal(rng, 24), "scale": normal(rng, 3)}, normal(rng, hidden)
    eps = config.rms_norm_eps, config.hc_eps
    streams, y, post, mix = fused.read_streams(x, back, w, norm, eps, config.hc_sinkhorn_iters, interpret=True)
    if back is not None:
        x = model.write_back(x[None], back[0], *(leaf[None] for leaf in back[1:]))[0]
        close(streams, x, ROUNDED)
    wide = streams[None].astype(F32)
    pre, wanted_post, wanted_mix = hyper_connection(wide, w, config)
    close(y, rms_norm(jnp.einsum("btn,btnd->btd", pre, wide), norm, config)[0], ROUNDED)
    close(post, wanted_post[0], SUMS)
    close(mix, wanted_mix[0], SUMS)


@pytest.mark.parametrize(("requests", "tokens"), [(2, 1), (1, 16)])
@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_scores(requests, tokens, fp8, paged):
    """A token sees what is before its limit, and what is past it may be NaN."""
    rng = np.random.default_rng(4)
    q, keys = normal(rng, requests, tokens, 16, 128).astype(BF16), normal(rng, requests, 192, 128)
    weight = normal(rng, requests, tokens, 16)
    limit = jnp.asarray(np.sort(rng.integers(0, 128, (requests, tokens)), axis=1).astype(np.int32))
    held = index_keys.quantize(keys) if fp8 else keys.astype(BF16)
    here = np.arange(192) < np.asarray(limit)[..., None]
    wanted = np.where(here, score_entries(q, weight, held, np.int32(192)), -np.inf)
    held = jax.tree.map(lambda leaf: leaf.at[:, 128:].set(jnp.nan), held)
    table = None
    if paged:  # no request's pages side by side, and one that nobody has
        order = rng.permutation(3 * requests)
        table = jnp.asarray(np.argsort(order).reshape(requests, 3).astype(np.int32))
        held = jax.tree.map(lambda leaf: jnp.append(leaf.reshape(-1, 64, *leaf.shape[2:])[order], leaf[-1:, -64:], axis=0), held)
    found = fused.score(q, weight, held, limit, table, interpret=True)
    np.testing.assert_array_equal(np.isinf(found), ~here)
    close(np.where(here, found, 0), np.where(here, wanted, 0), SUMS)


def test_a_page_of_another_size_is_refused():
    q, keys, table = jnp.zeros((1, 1, 16, 128), BF16), jnp.zeros((3, 128, 128), BF16), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="score: a page must have 64 entries, got 128"):
        fused.score(q, jnp.zeros((1, 1, 16)), keys, jnp.zeros((1, 1), jnp.int32), table, interpret=True)


def test_fp8_keys():
    """A key comes back within half a step of e4m3, with a scale that is the least power of two that will do."""
    key = normal(np.random.default_rng(6), 50, 128) * jnp.exp2(jnp.arange(-25, 25, dtype=F32))[:, None]
    held = index_keys.quantize(key.at[0].set(0))
    back = np.asarray(index_keys.read(held, lambda leaf: leaf, F32))
    assert (back[0] == 0).all()
    most = np.abs(np.asarray(key)).max(axis=1)
    scale = np.asarray(held.scale)
    assert (np.log2(scale) % 1 == 0).all()
    assert ((most[15:] / scale[15:] <= 448) & (most[15:] / scale[15:] > 224)).all()
    error = np.abs(back - np.asarray(key))[15:]
    assert (error <= np.maximum(np.abs(np.asarray(key))[15:] / 16, scale[15:, None] * 2.0**-10) * 1.0001).all()
    np.testing.assert_array_equal(index_keys.read(held, lambda leaf: leaf, BF16).astype(F32), back)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_write(fp8):
    """As `index_keys.write`; what is past the end, of entries or of rows, is dropped."""
    rng = np.random.default_rng(12)
    old, key = normal(rng, 3, 64, 128), normal(rng, 5, 1, 128)
    held = index_keys.quantize(old) if fp8 else old.astype(BF16)
    row, entry = jnp.asarray([[2], [0], [1], [1], [3]], jnp.int32), jnp.asarray([[63], [64], [5], [0], [0]], jnp.int32)
    found = jax.jit(partial(fused.write, interpret=True))(held, row, entry, key)
    jax.tree.map(np.testing.assert_array_equal, found, index_keys.write(held, row, entry, key))


@pytest.mark.parametrize("limits", [(0, 3), (5, 200), (256, 33)], ids=str)
def test_best(limits):
    """As a stable sort: the entries that score best, and of equal ones the earlier; all of them where there are no more than are wanted."""
    rng, topk = np.random.default_rng(7), 32
    score = np.round(rng.standard_normal((2, 1, 256)), 1).astype(np.float32)  # many are equal
    score[:, :, 3] = -0.0
    limit = np.array(limits, np.int32)[:, None]
    score[np.arange(256) >= limit[..., None]] = -np.inf
    table = rng.permutation(8).astype(np.int32).reshape(2, 4)
    found = np.array(fused.best(jnp.asarray(score), jnp.asarray(limit), jnp.asarray(table), topk, interpret=True))
    for request in range(2):
        count = min(topk, int(limit[request, 0]))
        order = np.argsort(-score[request, 0], kind="stable")[:count]
        slots = table[request, order // 64] * 64 + order % 64
        if limit[request, 0] <= topk:
            order, found[request, 0, :count] = np.sort(order), np.sort(found[request, 0, :count])
            slots = np.sort(slots)
        np.testing.assert_array_equal(found[request, 0, :count], slots)


@pytest.mark.parametrize("given", [False, True], ids=["by score", "by token"])
def test_route(given):
    rng, count, k = np.random.default_rng(8), 48, 3
    parts, bias, ids = normal(rng, 2, 4, 1, count), normal(rng, count), jnp.asarray([5, -1, 7], jnp.int32)
    named = jnp.asarray(np.stack([rng.permutation(count)[:k] for _ in ids]).astype(np.int32))
    chosen, weight = fused.route(parts, k, *((None, named) if given else (bias, None)), ids, 2.5, interpret=True)
    score = jnp.sqrt(jax.nn.softplus(parts.sum(axis=0)[:3, 0]))
    wanted = named if given else jax.lax.top_k(score + bias, k)[1]
    w = jnp.take_along_axis(score, wanted, axis=-1)
    np.testing.assert_array_equal(chosen, jnp.where(ids[:, None] < 0, -1, wanted))
    close(weight, 2.5 * w / w.sum(axis=-1, keepdims=True), SUMS)


@pytest.mark.parametrize("numbers", [3, 2, 0])
def test_route_passes_over_nan(numbers):
    """Experts whose score is NaN are not chosen; where no others are left, none is."""
    parts = jnp.full((1, 1, 1, 48), jnp.nan).at[..., 10 : 10 + numbers].set(1.0)
    chosen, weight = fused.route(parts, 3, jnp.zeros(48), None, jnp.zeros(1, jnp.int32), 1.0, interpret=True)
    np.testing.assert_array_equal(chosen[0], [10, 11, 12][:numbers] + [-1] * (3 - numbers))
    np.testing.assert_allclose(weight[0], [1 / max(numbers, 1)] * numbers + [0] * (3 - numbers), rtol=1e-6)


@pytest.mark.parametrize("kind", ["swa", "csa", "hca"])
def test_project(kind):
    """Entries that are complete, one of them the text's first; a request that has ended. As `rms_norm`, `rotate` and `compress` make it."""
    rng, low, b = np.random.default_rng(11), 128, 3
    position, valid = jnp.array([15, 7, 5], jnp.int32), jnp.array([True, True, False])
    ratio = SMALL.ratio(kind) if kind != "swa" else 1
    dims, overlap = {"swa": [], "csa": [512, 128], "hca": [512]}[kind], 2 if kind == "csa" else 1
    heads = 64 if kind == "csa" else 0
    ws = [{"ape": normal(rng, ratio, overlap * dim), "norm": normal(rng, dim)} for dim in dims]
    rows = [normal(rng, b, overlap * ratio + 2, 2, overlap * dim) for dim in dims]
    widths = [low, 512, *(overlap * dim for dim in dims for _ in range(2)), *([heads] if heads else [])]
    parts, q_norm, kv_norm = normal(rng, 2, b, 1, sum(widths)), normal(rng, low), normal(rng, 512)
    number = position[:, None] // ratio
    complete = valid[:, None] & ((position[:, None] + 1) % ratio == 0)
    turns = (turn(rope_angle(at, "compress", SMALL)) for at in (position, number[:, 0] * ratio))
    settings = [fused.Compressor(w["ape"], w["norm"], row) for w, row in zip(ws, rows, strict=True)]
    q, latent, weight, entries, new = fused.project(
        parts, q_norm, kv_norm, settings, heads, 0.5, position, valid, complete[:, 0], *turns, SMALL.rms_norm_eps, BF16, interpret=True
    )
    ends = np.cumsum(widths)
    columns = [parts.sum(axis=0)[:, 0, end - width : end] for end, width in zip(ends, widths, strict=True)]
    close(q, rms_norm(columns[0], q_norm, SMALL), ROUNDED)
    close(latent, rotate(rms_norm(columns[1], kv_norm, SMALL), rope_angle(position, "compress", SMALL)), ROUNDED)
    if heads:
        close(weight, 0.5 * columns[-1], SUMS)
    step = SimpleNamespace(entries={kind: SimpleNamespace(number=number)}, position=position[:, None], valid=valid[:, None])
    for i, w in enumerate(ws):
        projected = [column[:, None] for column in columns[2 + 2 * i : 4 + 2 * i]]
        entry, wanted = model.compress(projected, w, rows[i], step, kind, SMALL)
        close(new[i], wanted, SUMS)
        close(entries[i][:2], entry[:2, 0], ROUNDED)


def test_queries():
    rng = np.random.default_rng(9)
    parts, angle = normal(rng, 2, 3, 1, 2 * 256 + 4 * 128), normal(rng, 3, 32)
    q, index_q = fused.queries(parts, 2, 256, 128, turn(angle), 1e-6, BF16, interpret=True)
    total = parts.sum(axis=0)[:, 0].astype(BF16)
    close(q, rotate(rms_norm(total[:, :512].reshape(3, 2, 256), None, SMALL), angle[:, None]), ROUNDED)
    close(index_q, rotate(total[:, 512:].reshape(3, 4, 128), angle[:, None]), ROUNDED)


def random_weights(config: Any) -> Any:
    rng = np.random.default_rng(10)

    def make(tensor: Any) -> jax.Array:
        if tensor.below:
            return jnp.asarray(rng.integers(0, tensor.below, tensor.shape).astype(tensor.dtype))
        scale = 0.5 if len(tensor.shape) == 1 else tensor.shape[-1] ** -0.5
        return (scale * normal(rng, *tensor.shape)).astype(tensor.dtype or BF16)

    return map_schema(make, config)


def in_halves(x: jax.Array, *ws: jax.Array) -> jax.Array:
    """As `kernels.dense_parts`, with a row more than there are tokens, which nobody may read."""
    w, half = jnp.concatenate(ws, axis=1), x.shape[-1] // 2
    halves = (slice(None, half), slice(half, None))
    parts = jnp.stack([jnp.einsum("sgc,grc->sgr", x[..., part], w[..., part], preferred_element_type=F32) for part in halves])
    return jnp.pad(parts, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=jnp.nan)


def dense(x: jax.Array, *ws: jax.Array, dtype: Any) -> list[jax.Array]:
    return [jnp.einsum("sgc,grc->sgr", x, w, preferred_element_type=F32).astype(dtype) for w in ws]


def few_experts(x: jax.Array, chosen: jax.Array, w: Any, activate: Any) -> jax.Array:
    """As `kernels.few_experts`, in two parts."""
    w1, w3, w2 = (w[name][chosen.reshape(-1)].astype(F32) for name in ("w1", "w3", "w2"))
    rows = jnp.repeat(x.astype(F32), chosen.shape[1], axis=0)
    gate, up = (jnp.einsum("pd,pid->pi", rows, each) for each in (w1, w3))
    halves = activate(gate, up).reshape(len(rows), 2, -1), w2.reshape(*w2.shape[:2], 2, -1)
    return jnp.pad(jnp.einsum("pni,pdni->npd", *halves), ((0, 0), (0, 1), (0, 0)), constant_values=jnp.nan)


def test_decode_steps(monkeypatch):
    """Steps of one token with all kernels and fp8 keys, of an empty request, one that is inside its text, and one that has ended.

    Products are XLA's, which compile in half the time: those of the kernels are in test_example_products.py.
    """
    config = dataclasses.replace(SMALL, layers=("csa",), num_hash_layers=0)
    weights, counts = random_weights(config), jnp.array([1, 1, 0], jnp.int32)
    sizes = dict(MOST_TOKENS=128, FMA_TOKENS=0, FEW_TOKENS=16)
    xla = SimpleNamespace(takes=lambda w: True, dense=dense, dense_parts=in_halves, few_experts=few_experts, **sizes)
    found: dict[bool, Any] = {}
    calls: list[str] = []
    for own in (False, True):
        jax.clear_caches()  # the model's functions are traced once for what the machine has
        if own:
            monkeypatch.setattr(products, "kernels", lambda: xla)
            for place in (products, model):
                monkeypatch.setattr(place, "fused", lambda tokens=0: calls.append("") or Interpreted(fused))

        def step(cache: Any, tokens: Any) -> Any:
            return forward(weights, cache, tokens, counts, config=config)

        run, xs = jax.jit(step), []
        cache = create_cache(config, 3, 64, layout="float32", fp8_keys=True)
        cache = cache._replace(position=jnp.array([0, 9, 5], jnp.int32))
        for i in range(9):
            x, cache = run(cache, jnp.array([[i], [i + 20], [0]], jnp.int32))
            xs.append(np.asarray(x[:2], np.float32))
        found[own] = np.stack(xs), jax.tree.map(np.asarray, cache)
    assert calls
    # What is rounded elsewhere is another bfloat16, and may choose another expert: most of the streams must agree.
    off = np.abs(found[True][0] - found[False][0]) / np.abs(found[False][0]).max()
    assert np.median(off) < 0.005
    assert np.quantile(off, 0.9) < 0.05
    compressed = [cache.layers[0].compressed for _, cache in found.values()]
    rows = [each.rows for each in compressed]
    assert np.abs(rows[0] - rows[1]).max() < 0.1 * np.abs(rows[0]).max()
    assert compressed[1].indexer.keys.codes.any()
    jax.clear_caches()
