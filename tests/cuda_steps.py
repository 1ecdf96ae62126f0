"""Decode steps that are captured in CUDA graphs, and the library's count of handler calls."""

from __future__ import annotations

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi


def calls() -> tuple[int, int]:
    """Handler calls so far, and those during capture."""
    library, _ = _ffi.load("libdsv4_cuda", "CUDA")
    counts = (ctypes.c_int64(), ctypes.c_int64())
    library.dsv4_cuda_calls(*(ctypes.byref(c) for c in counts))
    return counts[0].value, counts[1].value


LAYERS = 8


@functools.cache
def decode_step():
    """A step of LAYERS layers under one plan, each of which appends to its cache, in place, and attends."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(q, caches, indices, lengths, latents, slots):
        plan = dsv4.plan_decode(lengths, num_heads=q.shape[1], swa_topk=indices.shape[1])
        caches = [dsv4.append(cache, latents, slots) for cache in caches]
        outs = [dsv4.sparse_mla_decode(q, dsv4.Scope(cache, indices, lengths), plan=plan) for cache in caches]
        return jnp.stack(outs), caches

    return step


def step_arguments(seed: int, tokens: int = 3):
    """q, caches, and four variants of what changes from step to step: slots to read, lengths, what is appended and where."""
    rng = np.random.default_rng(seed)
    rows = jnp.asarray(rng.standard_normal((LAYERS, 640, 512)), jnp.bfloat16)
    caches = [dsv4.append(dsv4.KVCache.create(10, 64), rows[i], jnp.arange(640, dtype=jnp.int32)) for i in range(LAYERS)]
    variants = [
        (
            jnp.asarray(rng.integers(-1, 640, (tokens, 128)), jnp.int32),
            jnp.asarray(rng.integers(1, 129, tokens), jnp.int32),
            jnp.asarray(rng.standard_normal((tokens, 512)), jnp.bfloat16),
            jnp.asarray(rng.permutation(640)[:tokens], jnp.int32),
        )
        for _ in range(4)
    ]
    return jnp.asarray(rng.standard_normal((tokens, 64, 512)), jnp.bfloat16), caches, variants
