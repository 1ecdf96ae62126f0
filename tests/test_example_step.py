"""What the example's decode step compiles to and costs, and that full-size models trace and lower without weights."""

from __future__ import annotations

import gc
import re
from collections import Counter
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import (
    PRESETS,
    Sampling,
    abstract_weights,
    create_cache,
    generate,
    golden,
    memory,
    prefill,
    strict_types,  # noqa: F401
)

import jax_dsv4 as dsv4

PROMPT = np.arange(32, dtype=np.int32)[None]
native_cpu = pytest.mark.skipif(not dsv4.implementations()["cpu"].available, reason="the native CPU library was not built")


@pytest.fixture(scope="module")
def decoding():
    """(compiled one-token generate, weights, a state with a long way to go, config)."""
    config, weights, _ = golden("yarn")
    cache = create_cache(config, 1, 1024, chunk=32, dtype=jnp.float32)
    one = np.ones(1, np.int32)
    state = prefill(weights, cache, PROMPT, 32 * one, 900 * one, jnp.uint32(0), config=config, chunk=32)
    return generate.lower(weights, state, config=config, steps=1).compile(), weights, state, config


@native_cpu
def test_step_calls_each_handler_once_per_layer(decoding):
    compiled, _, _, config = decoding
    calls = Counter(re.findall(r'custom_call_target="(dsv4_\w+)"', compiled.as_text()))
    compressed = sum(kind != "swa" for kind in config.layers)
    assert calls == {
        "dsv4_plan": len(set(config.layers)),  # one per kind of layer
        "dsv4_append": len(config.layers) + compressed,  # one per scope
        "dsv4_decode": len(config.layers),  # fused: both scopes and the sink in one call
    }


@native_cpu
def test_step_copies_no_cache(decoding):
    compiled, _, state, _ = decoding
    copied = set(re.findall(r"= (\w+\[[\d,]*\])\S* copy(?:-start)?\(", compiled.as_text()))
    short = {"uint8": "u8", "float32": "f32"}
    caches = {f"{short[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(state.cache.layers)}
    assert "u8[4,1728]" in caches  # HCA pages: two slots, padded to 3 · 576 bytes
    assert not copied & caches


def test_step_200_is_step_20s_program_and_leaves_nothing_more_behind(decoding):
    """Nothing compiles, and what lives stays the same: a step costs the same however many came before (benchmarks time it)."""
    compiled, weights, state, _ = decoding
    compilations, lives = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compilations.append(event) if "backend_compile" in event else None
    )
    for step in range(201):
        state, _ = jax.block_until_ready(compiled(weights, state))
        if step in (20, 200):
            gc.collect()
            lives.append(sum(x.nbytes for x in jax.live_arrays()))
    assert not compilations
    assert lives[0] == lives[1] > 0


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro"])
def test_full_size_lowers_for_gpus_without_weights(name):
    config = PRESETS[name]
    weights = abstract_weights(config)
    cache = jax.eval_shape(partial(create_cache, config, 4, 128 * 1024))
    ids = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    read = partial(prefill, config=config, sampling=Sampling(temperature=0.6, top_p=0.95))
    state = jax.eval_shape(read, weights, cache, ids((4, 1)), ids((4,)), ids((4,)), jax.ShapeDtypeStruct((), jnp.uint32))
    step = partial(generate, config=config, steps=16, sampling=Sampling(temperature=0.6, top_p=0.95))
    _, tokens = jax.eval_shape(step, weights, state)
    assert tokens.shape == (4, 16)
    if name == "v4-flash":
        checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in ("dsv4_plan", "dsv4_append", "dsv4_decode")]
        options = dict(config=config, steps=16)
        exported = jax.export.export(generate, platforms=["cuda", "rocm"], disabled_checks=checks)(weights, state, **options)
        assert set(exported.platforms) == {"cuda", "rocm"}


def test_memory_table_counts_published_sizes():
    """284B and 1.6T parameters; at 1M tokens HCA layers hold 8192 entries and CSA layers 262144."""
    weights = {name: memory.nbytes(abstract_weights(PRESETS[name])) / 2 for name in ("v4-flash", "v4-pro")}
    assert weights["v4-flash"] == pytest.approx(284e9, rel=0.01)
    assert weights["v4-pro"] == pytest.approx(1.6e12, rel=0.02)
    flash = PRESETS["v4-flash"]
    grows = memory.cache_bytes(flash, 2**20, "fp8_ds_mla") - memory.cache_bytes(flash, 2**19, "fp8_ds_mla")
    per_entry = 65 * 576 / 64  # a block of 64 slots of 584 bytes, padded to a multiple of 576
    hca_entry = 3 * 576 / 2
    assert grows == 21 * 2**17 * (per_entry + 2 * 128) + 20 * 2**12 * hca_entry + 4 * (2**11 + 2**11)
    assert memory.table().count("\n") == 5
