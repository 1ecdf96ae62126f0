"""The form that tokamax's sparse_mla takes, beside tokamax's own reference, with the arguments and the tolerance of its own tests and the
shapes of its benchmarks that decode."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tokamax", reason="no tokamax here: pip install tokamax==0.0.17, for Python 3.12 and later")

import jax
import jax.numpy as jnp
from tokamax._src.ops.sparse_mla import api, test_base
from tokamax._src.ops.sparse_mla.arg_specs import ARG_SPECS

from jax_dsv4 import adapters

REQUESTS = 8  # of a benchmark's
DECODING = {spec.name: spec.args for spec in ARG_SPECS if spec.name.startswith("decode_b256")}  # the other one's cache has 8 GB


@pytest.fixture(autouse=True)
def tokamaxs_rules():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # tokamax's own code is of neither
        yield


@pytest.mark.parametrize(("topk", "pad_tokens"), [(128, False), (512, True)])
def test_sparse_mla(topk, pad_tokens):
    arguments, tokens = test_base.make_inputs(batch_size=6, topk=topk, pad_tokens=pad_tokens)
    got = api.sparse_mla(*arguments, implementation=adapters.tokamax_sparse_mla)
    test_base.assert_matches_reference(got, arguments, tokens)


@pytest.mark.parametrize("name", DECODING)
def test_a_benchmarks_shapes(name):
    """A token of each request, all of whose topk positions are in a long context of pages of the benchmark's size."""
    spec, rng = DECODING[name], np.random.default_rng(0)
    heads, page_size, topk = spec["q"].shape[1], spec["cache_kv_nope"].shape[1], spec["topk_indices"].shape[1]
    pages = len(spec["page_indices"]) // spec["q"].shape[0]
    made, _ = test_base.make_inputs(batch_size=2 * REQUESTS, num_heads=heads, page_size=page_size, topk=topk)
    # Its caches are too small, and its rounding makes some numbers NaN: e4m3's 0x7f. The scales are the last byte of the last 64 words.
    nope, rope = (np.resize(cache, (REQUESTS * pages, *cache.shape[1:])) for cache in made[1:3])
    codes = nope.view(np.uint8).reshape(*nope.shape, 4)
    nan = codes & 0x7F == 0x7F
    nan[..., 64:, 3] = False
    codes[nan] -= 1
    picked = rng.integers(0, spec["topk_indices"].maxval, (REQUESTS, topk))
    tables = rng.permutation(REQUESTS * pages)
    counts = np.arange(REQUESTS + 1), np.full(3, REQUESTS)
    integers = (jnp.asarray(x, jnp.int32) for x in (picked, tables, *counts))
    arguments = (made[0][:REQUESTS], jnp.asarray(nope), jnp.asarray(rope), *integers, made[7], *(x[:REQUESTS] for x in made[8:]))
    got = api.sparse_mla(*arguments, implementation=adapters.tokamax_sparse_mla)
    assert np.isfinite(got).all()
    test_base.assert_matches_reference(got, arguments, REQUESTS)
