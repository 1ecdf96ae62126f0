"""Programs around the ops that tests of transforms and of meshes share: a hostile call, a loop of steps, and what they compile to."""

from __future__ import annotations

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from compare import LSE, OUT_FLOAT32, assert_close, assert_same_bits

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi

HEADS, TOPK, BLOCK = 2, 70, 8
# No other array of these programs has a cache's shape.
SWA_BLOCKS, EXTRA_BLOCKS = 13, 17
STRIDE = BLOCK * 584 + 16


def problem(*batch: int, seed: int = 0, caches: tuple[int, ...] = (), heads: int = HEADS):
    """q, swa, extra and sink, of the given batch axes; with `caches`, leading axes of the caches."""
    rng = np.random.default_rng(seed)

    def scope(blocks: int) -> dsv4.Scope:
        latents = rng.standard_normal((*caches, blocks * BLOCK, 512)).astype(np.float32).reshape(-1, 512)
        packed = dsv4.reference.pack_fp8_ds_mla(latents, BLOCK, STRIDE).reshape(*caches, blocks, STRIDE)
        data = jnp.asarray(packed)
        cache = jax.tree.unflatten(jax.tree.structure(dsv4.KVCache.create(1, BLOCK)), [data])
        indices = rng.integers(-2, blocks * BLOCK + 2, (*batch, TOPK)).astype(np.int32)
        lengths = rng.integers(-3, TOPK + 3, batch).astype(np.int32)
        return dsv4.Scope(cache, jnp.asarray(indices), jnp.asarray(lengths))

    q = jnp.asarray(rng.standard_normal((*batch, heads, 512)), jnp.float32)
    return q, scope(SWA_BLOCKS), scope(EXTRA_BLOCKS), jnp.asarray(rng.standard_normal(heads), jnp.float32)


# vmap axes of a scope: batched indices and lengths, one cache.
SHARED = dsv4.Scope(None, 0, 0)


def attend(implementation: str, q, swa, extra, sink):
    return dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, implementation=implementation, return_lse=True)


@functools.cache
def jitted(implementation: str):
    return jax.jit(partial(attend, implementation))


def assert_same(got: object, want: object) -> None:
    """Two trees of arrays, to the bit."""
    for i, (a, b) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        assert_same_bits(f"result {i}", a, b)


def assert_near(got: tuple, want: tuple) -> None:
    """(out, lse) in float32, of a batch that may be planned otherwise: the same within rounding."""
    assert_close("out", got[0], np.asarray(want[0], np.float64), OUT_FLOAT32)
    assert_close("lse", got[1], np.asarray(want[1], np.float64), LSE)


# --- Loops


def step(implementation: str, caches, latents, slots, q):
    """A token: write to both caches, plan, attend twice (as two layers of one kind would)."""
    swa, extra = (dsv4.append(c, latents, slots, implementation=implementation) for c in caches)
    entries = jnp.arange(TOPK, dtype=jnp.int32)[None]
    lengths = jnp.maximum(slots + 1, 0)
    plan = dsv4.plan_decode(lengths, lengths, num_heads=HEADS, swa_topk=TOPK, extra_topk=TOPK, implementation=implementation)
    scopes = dsv4.Scope(swa, entries, lengths), dsv4.Scope(extra, entries, lengths)
    for _ in range(2):
        q = dsv4.sparse_mla_decode(q, *scopes, plan=plan, implementation=implementation)
    return (swa, extra), q


def one_by_one(implementation: str, caches, latents, slots, q):
    outs, one = [], jax.jit(partial(step, implementation))
    for x, s in zip(latents, slots):
        caches, q = one(caches, x, s, q)
        outs.append(q)
    return caches, jnp.stack(outs)


def scanned(implementation: str, caches, latents, slots, q):
    def body(carry, row):
        caches, q = step(implementation, carry[0], *row, carry[1])
        return (caches, q), q

    (caches, _), outs = jax.lax.scan(body, (caches, q), (latents, slots))
    return caches, outs


def loop_arguments():
    rng = np.random.default_rng(0)
    caches = tuple(dsv4.KVCache(jnp.zeros((n, STRIDE), jnp.uint8), block_size=BLOCK) for n in (SWA_BLOCKS, EXTRA_BLOCKS))
    latents = jnp.asarray(rng.standard_normal((4, 1, 512)), jnp.float32)
    slots = jnp.array([[0], [1], [-1], [2]], jnp.int32)
    return caches, latents, slots, jnp.asarray(rng.standard_normal((1, HEADS, 512)), jnp.float32)


def copies(program) -> list[str]:
    """Lines of a compiled program's HLO that copy a whole cache."""
    shape = rf"u8\[(?:{SWA_BLOCKS}|{EXTRA_BLOCKS}),{STRIDE}\]"
    assert re.search(shape, program.as_text())
    return re.findall(rf".*= \(?{shape}\S* (?:copy|copy-start)\(.*", program.as_text())


# --- Export

OUR_CALLS = [jax.export.DisabledSafetyCheck.custom_call(target) for target in _ffi.TARGETS]
