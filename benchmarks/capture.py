"""What XLA makes of a whole decode step, by flag: µs a layer and handler calls a step, for layers unrolled in a jit, a `lax.scan` over
layers, the same with all layers' caches as one cache, and unrolled layers inside a `fori_loop` over steps.

    python -m benchmarks.capture

Each set of flags has a process of its own. A layer appends one row per token to its cache, in place, and attends (64 heads, 128 + 512
keys, 8 tokens) under one plan.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4
from benchmarks.measure import Turn, compare, run
from jax_dsv4 import _ffi

LAYERS, TOKENS, HEADS, SWA, EXTRA, STEPS = 32, 8, 64, 128, 512, 8
BLOCKS, EXTRA_BLOCKS, BLOCK = 64, 256, 64  # of a layer's caches
ROUNDS, RUNS = 5, 20
FLAGS = {
    "default": "",
    "size 1": "--xla_gpu_graph_min_graph_size=1",
    "size 1, loops": "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
    "off": "--xla_gpu_enable_command_buffer=",
}


def steps() -> dict[str, tuple[Callable[..., Any], Any, int]]:
    """Name -> a step from queries and caches to the next, its caches, and how many layers it goes through."""
    rng, extra = np.random.default_rng(0), dsv4.KVCache.create(EXTRA_BLOCKS, BLOCK)
    swa_slots = jnp.asarray(rng.integers(0, BLOCKS * BLOCK, (TOKENS, SWA)), jnp.int32)
    extra_slots = jnp.asarray(rng.integers(0, EXTRA_BLOCKS * BLOCK, (TOKENS, EXTRA)), jnp.int32)
    latents, slots = jnp.asarray(rng.standard_normal((TOKENS, 512)), jnp.bfloat16), jnp.arange(TOKENS, dtype=jnp.int32)
    lengths = jnp.full(TOKENS, SWA, jnp.int32), jnp.full(TOKENS, EXTRA, jnp.int32)
    make_plan = partial(dsv4.plan_decode, *lengths, num_heads=HEADS, swa_topk=SWA, extra_topk=EXTRA)

    def layer(plan: Any, q: Any, cache: Any, first: Any = 0) -> tuple[Any, Any]:
        """`first`: the slot at which the layer's part of the cache begins."""
        cache = dsv4.append(cache, latents, slots + first)
        scopes = dsv4.Scope(cache, swa_slots + first, lengths[0]), dsv4.Scope(extra, extra_slots, lengths[1])
        return dsv4.sparse_mla_decode(q, *scopes, plan=plan), cache

    def unrolled(q: Any, caches: Any) -> tuple[Any, Any]:
        plan, done = make_plan(), []
        for cache in caches:
            q, cache = layer(plan, q, cache)
            done.append(cache)
        return q, done

    def scanned(q: Any, caches: Any) -> tuple[Any, Any]:
        return jax.lax.scan(partial(layer, make_plan()), q, caches)

    def scanned_in_place(q: Any, cache: Any) -> tuple[Any, Any]:
        """The cache is carried, not scanned over."""
        plan, firsts = make_plan(), BLOCKS * BLOCK * jnp.arange(LAYERS, dtype=jnp.int32)
        return jax.lax.scan(lambda state, first: (layer(plan, *state, first), None), (q, cache), firsts)[0]

    def looped(q: Any, caches: Any) -> tuple[Any, Any]:
        return jax.lax.fori_loop(0, STEPS, lambda _, state: unrolled(*state), (q, caches))

    each, other, stacked = ([dsv4.KVCache.create(BLOCKS, BLOCK) for _ in range(LAYERS)] for _ in range(3))
    return {
        "unrolled": (unrolled, each, LAYERS),
        "scan": (scanned, jax.tree.map(lambda *data: jnp.stack(data), *stacked), LAYERS),
        "scan, one cache": (scanned_in_place, dsv4.KVCache.create(LAYERS * BLOCKS, BLOCK), LAYERS),
        "loop of steps": (looped, other, LAYERS * STEPS),
    }


def measure() -> None:
    library, _ = _ffi.load("libdsv4_cuda", "CUDA")
    assert library is not None

    def handler_calls() -> int:
        counts = (ctypes.c_int64(), ctypes.c_int64())
        library.dsv4_cuda_calls(*(ctypes.byref(c) for c in counts))
        return counts[0].value

    def prepare(step: Callable[..., Any], caches: Any, layers: int) -> Turn[tuple[float, float]]:
        step = jax.jit(step, donate_argnums=1)
        state = jax.random.normal(jax.random.key(0), (TOKENS, HEADS, 512), jnp.bfloat16), caches

        def turn() -> list[tuple[float, float]]:
            nonlocal state
            before, start = handler_calls(), time.perf_counter()
            for _ in range(RUNS):
                state = step(*state)
            jax.block_until_ready(state)
            return [((time.perf_counter() - start) / RUNS / layers * 1e6, (handler_calls() - before) / RUNS)]

        return turn

    times, failed = compare({name: partial(prepare, *step) for name, step in steps().items()}, ROUNDS)
    for name, turns in times.items():
        us, calls = (statistics.median(found) for found in zip(*turns))
        print(f"{name:15} {us:6.1f} µs a layer, {calls:7.2f} handler calls a run", flush=True)
    for name, message in failed.items():
        print(f"{name:15} failed: {message}", flush=True)
    raise SystemExit(bool(failed))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="in this process, with the flags that it has")
    if parser.parse_args(argv).measure:
        cuda = dsv4.implementations()["cuda"]
        if not cuda.available:
            parser.error(f"needs implementation 'cuda': {cuda.detail}")
        measure()
    failed = False
    for name, flags in FLAGS.items():
        print(f"{name}: {flags or 'no flag'}", flush=True)
        environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        status = subprocess.run([sys.executable, "-m", "benchmarks.capture", "--measure"], env=environment).returncode
        if status == 2:  # as argparse has it: nor can the others
            raise SystemExit(status)
        failed |= bool(status)
    raise SystemExit(failed)


if __name__ == "__main__":
    run(main)
