"""One decode step on packed caches: append to both, plan once, attend in several layers, all under one jit.

    python examples/decode_step.py

Every request has its own blocks of one cache; the step writes the new latent of each, then each layer attends to the last 128 positions
and to a selection of compressed entries. examples/decode_loop.py is the same inside a whole model.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4
from jax_dsv4 import reference

REQUESTS, HEADS, LAYERS = 4, 64, 8
WINDOW, TOPK = 128, 512
SWA_BLOCKS, EXTRA_BLOCKS, BLOCK = 2, 16, 64  # per request


def step(
    caches: list[tuple[dsv4.KVCache, dsv4.KVCache]],
    queries: jax.Array,
    latents: jax.Array,
    position: jax.Array,
    selected: jax.Array,
    sink: jax.Array,
) -> tuple[jax.Array, list[tuple[dsv4.KVCache, dsv4.KVCache]]]:
    """caches: a (swa, extra) pair a layer. queries [layers, requests, heads, 512], latents [layers, requests, 512], position [requests]."""
    requests = jnp.arange(REQUESTS, dtype=jnp.int32)
    window = requests[:, None] * (SWA_BLOCKS * BLOCK) + jnp.arange(WINDOW, dtype=jnp.int32)  # a ring: position p lives in entry p % 128
    swa_lengths = jnp.minimum(position + 1, WINDOW)
    extra_lengths = jnp.full(REQUESTS, TOPK, jnp.int32)
    # Lengths differ from step to step: the plan is made here, on the device, once for all layers.
    plan = dsv4.plan_decode(swa_lengths, extra_lengths, num_heads=HEADS, swa_topk=WINDOW, extra_topk=TOPK)
    outs, updated = [], []
    for layer, (swa, extra) in enumerate(caches):
        swa = dsv4.append(swa, latents[layer], requests * (SWA_BLOCKS * BLOCK) + position % WINDOW)
        scopes = dsv4.Scope(swa, window, swa_lengths), dsv4.Scope(extra, selected, extra_lengths)
        outs.append(dsv4.sparse_mla_decode(queries[layer], *scopes, attn_sink=sink, plan=plan))
        updated.append((swa, extra))
    return jnp.stack(outs), updated


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    def filled(blocks: int) -> dsv4.KVCache:
        cache = dsv4.KVCache.create(blocks, BLOCK)
        return dsv4.append(cache, normal(cache.num_slots, 512), jnp.arange(cache.num_slots, dtype=jnp.int32))

    caches = [(filled(REQUESTS * SWA_BLOCKS), filled(REQUESTS * EXTRA_BLOCKS)) for _ in range(LAYERS)]
    queries, latents = normal(LAYERS, REQUESTS, HEADS, 512), normal(LAYERS, REQUESTS, 512)
    position = jnp.array([5, 100, 127, 3000], jnp.int32)
    chosen = np.stack([rng.permutation(EXTRA_BLOCKS * BLOCK)[:TOPK] + r * EXTRA_BLOCKS * BLOCK for r in range(REQUESTS)])
    selected, sink = jnp.asarray(chosen, jnp.int32), jnp.zeros(HEADS)

    jitted = jax.jit(step, donate_argnums=0)  # donated caches are written in place
    out, caches = jitted(caches, queries, latents, position, selected, sink)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        out, caches = jax.block_until_ready(jitted(caches, queries, latents, position, selected, sink))
        times.append(time.perf_counter() - start)

    swa, extra = caches[-1]
    lengths = np.minimum(np.asarray(position) + 1, WINDOW)
    window = np.arange(REQUESTS)[:, None] * (SWA_BLOCKS * BLOCK) + np.arange(WINDOW)
    want, _ = reference.decode(
        np.asarray(queries[-1], np.float64),
        [
            reference.ReferenceScope(reference.unpack_fp8_ds_mla(swa.data, BLOCK), window, lengths),
            reference.ReferenceScope(reference.unpack_fp8_ds_mla(extra.data, BLOCK), np.asarray(selected), np.full(REQUESTS, TOPK)),
        ],
        np.asarray(sink),
    )
    print(f"platform   {jax.default_backend()}; " + "; ".join(f"{n}: {a.detail}" for n, a in dsv4.implementations().items()))
    print(f"caches     {LAYERS} layers x ({swa}, {extra})")
    print(f"out        {out.dtype}{list(out.shape)} (layers, requests, heads, 512)")
    print(f"time       {np.median(times) / LAYERS * 1e6:.0f} us a layer, {np.median(times) * 1e3:.2f} ms a step")
    print(f"max error  {np.abs(np.asarray(out[-1], np.float64) - want).max():.2e} against float64 (bf16 results: 2^-9 of a value)")


if __name__ == "__main__":
    main()
