"""What XLA makes of a whole decode step, by flag: µs a layer and handler calls a step, for layers unrolled in a jit, a `lax.scan` over
layers, the same with all layers' caches as one cache, and unrolled layers inside a `fori_loop` over steps.

    python -m benchmarks.capture

Each set of flags has a process of its own. A layer appends one row per token to its cache, in place, and attends (64 heads, 128 + 512
keys, 8 tokens) under one plan.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

LAYERS, TOKENS, HEADS, TOPK, STEPS = 32, 8, 64, 512, 8
FLAGS = {
    "default": "",
    "size 1": "--xla_gpu_graph_min_graph_size=1",
    "size 1, loops": "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
    "off": "--xla_gpu_enable_command_buffer=",
}


def measure() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jax_dsv4 as dsv4
    from jax_dsv4 import _ffi

    rng = np.random.default_rng(0)
    assert dsv4.implementations()["cuda"].available
    library, _ = _ffi.load("libdsv4_cuda", "CUDA")

    def calls() -> int:
        counts = (ctypes.c_int64(), ctypes.c_int64())
        library.dsv4_cuda_calls(*(ctypes.byref(c) for c in counts))
        return counts[0].value

    swa_slots = jnp.asarray(rng.integers(0, 64 * 64, (TOKENS, 128)), jnp.int32)
    extra_slots = jnp.asarray(rng.integers(0, 256 * 64, (TOKENS, TOPK)), jnp.int32)
    latents = jnp.asarray(rng.standard_normal((TOKENS, 512)), jnp.bfloat16)
    slots = jnp.arange(TOKENS, dtype=jnp.int32)
    lengths = (jnp.full(TOKENS, 128, jnp.int32), jnp.full(TOKENS, TOPK, jnp.int32))
    extra = dsv4.KVCache.create(256, 64)

    def layer(q, cache, plan):  # type: ignore[no-untyped-def]
        cache = dsv4.append(cache, latents, slots)
        scopes = dsv4.Scope(cache, swa_slots, lengths[0]), dsv4.Scope(extra, extra_slots, lengths[1])
        return dsv4.sparse_mla_decode(q, *scopes, plan=plan), cache

    def make_plan():  # type: ignore[no-untyped-def]
        return dsv4.plan_decode(*lengths, num_heads=HEADS, swa_topk=128, extra_topk=TOPK)

    def unrolled(q, caches):  # type: ignore[no-untyped-def]
        plan, done = make_plan(), []
        for cache in caches:
            q, cache = layer(q, cache, plan)
            done.append(cache)
        return q, done

    def scanned(q, data):  # type: ignore[no-untyped-def]
        plan = make_plan()

        def body(q, data):  # type: ignore[no-untyped-def]
            q, cache = layer(q, dsv4.KVCache(data, block_size=64), plan)
            return q, cache.data

        return jax.lax.scan(body, q, data)

    def scanned_in_place(q, cache):  # type: ignore[no-untyped-def]
        """The cache is carried, not scanned over: a layer's slots are offset to its own part of it."""
        plan = make_plan()

        def body(state, first):  # type: ignore[no-untyped-def]
            q, cache = state
            cache = dsv4.append(cache, latents, slots + first)
            scopes = dsv4.Scope(cache, swa_slots + first, lengths[0]), dsv4.Scope(extra, extra_slots, lengths[1])
            return (dsv4.sparse_mla_decode(q, *scopes, plan=plan), cache), None

        return jax.lax.scan(body, (q, cache), 64 * 64 * jnp.arange(LAYERS, dtype=jnp.int32))[0]

    def looped(q, caches):  # type: ignore[no-untyped-def]
        return jax.lax.fori_loop(0, STEPS, lambda _, state: unrolled(*state), (q, caches))

    q = jnp.asarray(rng.standard_normal((TOKENS, HEADS, 512)), jnp.bfloat16)
    for name, step, layers in (
        ("unrolled", unrolled, LAYERS),
        ("scan", scanned, LAYERS),
        ("scan, one cache", scanned_in_place, LAYERS),
        ("loop of steps", looped, LAYERS * STEPS),
    ):
        step = jax.jit(step, donate_argnums=1)
        caches = [dsv4.KVCache.create(64, 64) for _ in range(LAYERS)]
        state = {"scan": jnp.stack([c.data for c in caches]), "scan, one cache": dsv4.KVCache.create(LAYERS * 64, 64)}.get(name, caches)
        for _ in range(10):
            out, state = step(q, state)
        jax.block_until_ready(out)
        before, times = calls(), []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(20):
                out, state = step(q, state)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - start) / 20 / layers * 1e6)
        print(f"{name:15} {sorted(times)[2]:6.1f} µs a layer, {(calls() - before) / 100:7.2f} handler calls a run", flush=True)


def main() -> None:
    if len(sys.argv) > 1:
        measure()
        return
    for name, flags in FLAGS.items():
        print(f"{name}: {flags or 'no flag'}", flush=True)
        environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        subprocess.run([sys.executable, "-m", "benchmarks.capture", "measure"], env=environment, check=True)


if __name__ == "__main__":
    main()
