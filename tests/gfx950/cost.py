"""What a decode costs by each of AITER's kernels, in instructions of the software GPU: `pytest tests/gfx950/cost.py` (minutes).

Not collected with the tests. 128 window entries and 1024 compressed ones a token, all valid, and a sink; 256 units. A unit's load counts
the workgroups that it gets if they are dealt in turn.
"""

import gluon
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import GFX950_LAYOUTS, create_cache

import jax_dsv4 as dsv4
from jax_dsv4._implementations import aiter, aiter_gluon

UNITS = 256
TOPKS = (128, 1024)
TITLE = "   heads tokens  launches  wave-instructions of all, of AITER's kernel  busiest unit, over mean   KiB read, written"


def scopes_of(rng, cache, tokens):
    return [dsv4.Scope(cache, jnp.asarray(rng.integers(0, cache.num_slots, (tokens, k)), jnp.int32)) for k in TOPKS]


def measured(gpu, call, *operands):
    """The cost of each kernel of a call."""
    jax.block_until_ready(call(*operands))  # loads code
    gpu.kernels()
    jax.block_until_ready(call(*operands))
    return gpu.kernels()


def row(kernels, heads, tokens, times=1):
    """One line, for kernels that are launched as often as here on `times` as many tokens."""
    theirs = [cost for name, cost in kernels.items() if not name.startswith("dsv4_")]
    launches = sum(cost.launches for cost in kernels.values())
    everything, in_theirs = (times * sum(c.instructions for c in costs) for costs in (kernels.values(), theirs))
    busiest = sum(c.launches * -(-times * c.workgroups // c.launches // UNITS) * c.busiest for c in theirs)
    read, written = (times * sum(getattr(c, f"bytes_{way}") for c in kernels.values()) / 1024 for way in ("read", "written"))
    return (
        f"{heads:8} {tokens:6} {launches:9} {everything:22} {in_theirs:23} {busiest:15.0f} {busiest * UNITS / in_theirs:11.2f} "
        f"{read:15.0f} {written:9.0f}"
    )


@pytest.mark.parametrize("layout", GFX950_LAYOUTS)
def test_assembly(bridge, gpu, table, monkeypatch, layout):
    monkeypatch.setenv("GFX950_UNITS", str(UNITS))
    aiter.choose_kernel.cache_clear()
    rng = np.random.default_rng(0)
    cache = create_cache(16, 128, layout)

    @jax.jit
    def call(q, scopes, sink, plan):
        return dsv4.sparse_mla_decode(q, *scopes, attn_sink=sink, plan=plan, implementation="aiter")

    lines = [TITLE]
    for heads in (16, 64, 128):
        for tokens in (1, 16, 128):
            scopes, q = scopes_of(rng, cache, tokens), jnp.ones((tokens, heads, 512), jnp.bfloat16)
            lengths = [jnp.full(tokens, k, jnp.int32) for k in TOPKS]
            options = dict(num_heads=heads, swa_topk=TOPKS[0], extra_topk=TOPKS[1], implementation="aiter")
            plan = dsv4.plan_decode(*lengths, **options)
            lines.append(row(measured(gpu, call, q, scopes, jnp.zeros(heads), plan), heads, tokens))
    kind = aiter.choose_kernel(layout, 16).text.decode()
    table(f"assembly kernels, {layout}, such as {kind}", lines)


def test_gluon(on_gluon, gpu, table, monkeypatch):
    """All tokens cost alike, so one is run with the splits of each number of tokens."""
    monkeypatch.setenv("GFX950_UNITS", str(UNITS))
    aiter_gluon.describe_device.cache_clear()
    rng = np.random.default_rng(0)
    cache = dsv4.KVCache.create(32, 64)
    lines = [TITLE]
    chosen = aiter_gluon.choose_splits
    for heads in (16, 64, 128):
        for tokens in (1, 16, 128):
            scopes, q = scopes_of(rng, cache, 1), jnp.ones((1, heads, 512), jnp.bfloat16)
            splits = chosen(tokens, heads, TOPKS, UNITS)
            monkeypatch.setattr(aiter_gluon, "choose_splits", lambda *_, splits=splits: splits)
            jax.clear_caches()
            gluon.compile_for(q, scopes)
            lines.append(f"{row(measured(gpu, gluon.attend, q, scopes, jnp.zeros(heads)), heads, tokens, tokens)}  {splits} splits")
    table("Gluon kernel, fp8_ds_mla", lines)
