"""Outside of jit: what is compiled, which caches live, and where operands may be."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits
from jax.sharding import AxisType

import jax_dsv4 as dsv4

HEADS, TOKENS, TOPK, BLOCK = 2, 2, 4, 8

AVAILABLE = [name for name in ("cpu", "xla") if dsv4.implementations()[name].available]
# None: the default.
IMPLEMENTATIONS = [None, *AVAILABLE]


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def lengths() -> jax.Array:
    return jnp.full(TOKENS, TOPK, jnp.int32)


def scope(layout: str = "fp8_ds_mla", *, with_lengths: bool = True) -> dsv4.Scope:
    cache = dsv4.append(
        dsv4.KVCache.create(2, BLOCK, layout), numbers(BLOCK, 512), jnp.arange(BLOCK, dtype=jnp.int32), implementation="xla"
    )
    indices = jnp.arange(TOKENS * TOPK, dtype=jnp.int32).reshape(TOKENS, TOPK)
    return dsv4.Scope(cache, indices, lengths() if with_lengths else None)


def parts() -> tuple[jax.Array, jax.Array]:
    return numbers(TOKENS, HEADS, 512), numbers(TOKENS, HEADS)


# What is made anew in each call: the function, its static arguments and its operands.
CALLS: dict[str, Callable[[], object]] = {
    "dequantize": lambda: dsv4.dequantize(scope().cache, jnp.zeros(3, jnp.int32)),
    "dequantize of a whole cache": lambda: dsv4.dequantize(scope("bf16").cache),
    "KVCache.create": lambda: dsv4.KVCache.create(2, BLOCK),
    "KVCache of vLLM's view": lambda: dsv4.KVCache(jnp.zeros((2, BLOCK, 584), jnp.uint8), block_size=BLOCK),
    "merge_scopes": lambda: dsv4.merge_scopes(*zip(parts(), parts())),
    "merge_scopes of FlashMLA's lse": lambda: dsv4.merge_scopes(*zip(parts(), parts()), empty_lse=np.inf),
    "apply_attn_sink": lambda: dsv4.apply_attn_sink(*parts(), numbers(HEADS)),
    "derivative": lambda: jax.grad(lambda q: dsv4.sparse_mla_decode(q, scope(), implementation="xla").sum())(parts()[0]),
}
for name in IMPLEMENTATIONS:
    decode = partial(dsv4.sparse_mla_decode, implementation=name)
    plan = partial(dsv4.plan_decode, num_heads=HEADS, swa_topk=TOPK, implementation=name)
    append = partial(dsv4.append, implementation=name)
    CALLS |= {
        f"decode, {name}": lambda decode=decode: decode(parts()[0], scope(), scope("float32"), attn_sink=numbers(HEADS)),
        f"decode per scope, {name}": lambda decode=decode: decode(parts()[0], scope(), scope(), fused=False, return_lse=True),
        f"decode without lengths, {name}": lambda decode=decode: decode(parts()[0], scope(with_lengths=False)),
        f"decode with a plan, {name}": lambda decode=decode, plan=plan: decode(parts()[0], scope(), plan=plan(lengths())),
        f"decode under vmap, {name}": lambda decode=decode: jax.vmap(lambda q: decode(q, scope()))(numbers(3, TOKENS, HEADS, 512)),
        f"append, {name}": lambda append=append: append(scope().cache, numbers(TOKENS, 512), lengths()),
        f"plan, {name}": lambda plan=plan: plan(lengths(), lengths(), extra_topk=TOPK),
    }


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """JAX's steps from a function to a program, as they happen: traced, lowered, compiled."""
    seen: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event.startswith("/jax/core/compile/"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_compiled_twice(name: str, compilations: list[str]) -> None:
    CALLS[name]()
    first = len(compilations)
    CALLS[name]()
    assert compilations[first:] == []


def test_another_shape_is_compiled_once(compilations: list[str]) -> None:
    """The events that the test above counts do happen."""
    cache = dsv4.KVCache.create(3, BLOCK + 1)
    before = len(compilations)
    for _ in range(3):
        dsv4.dequantize(cache)
    assert [event.rsplit("/", 1)[1] for event in compilations[before:]].count("backend_compile_duration") <= 2  # the slots, and the rest
    assert len(compilations) > before


@pytest.mark.parametrize("implementation", AVAILABLE)
def test_a_loop_of_appends_keeps_the_callers_caches_and_one(implementation: str) -> None:
    """No reference cycle keeps old ones until garbage is collected."""
    cache = dsv4.KVCache.create(5, BLOCK, block_stride_bytes=BLOCK * 584 + 88)  # no other array has this shape
    latents, shape = numbers(3, 512), cache.data.shape
    cache = dsv4.append(cache, latents, jnp.arange(3, dtype=jnp.int32), implementation=implementation)
    kept = cache  # the caller's second one
    gc.collect()
    gc.disable()
    try:
        alive = []
        for i in range(12):
            cache = dsv4.append(cache, latents, jnp.arange(i, i + 3, dtype=jnp.int32), implementation=implementation)
            alive.append(sum(x.shape == shape for x in jax.live_arrays()))
    finally:
        gc.enable()
    assert max(alive) <= 3
    assert_same_bits("slot 13", dsv4.dequantize(cache, jnp.array([13], jnp.int32)), dsv4.dequantize(kept, jnp.array([2], jnp.int32)))


@pytest.mark.parametrize("implementation", AVAILABLE)
def test_a_call_over_an_automatic_mesh(implementation: str) -> None:
    """Split as in jit: results lie where their requests do."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    q, swa = parts()[0], scope()
    out = dsv4.sparse_mla_decode(
        jax.device_put(q, split), jax.device_put(swa, dsv4.Scope(whole, split, split)), implementation=implementation
    )
    assert out.sharding.is_equivalent_to(split, out.ndim)
    np.testing.assert_allclose(out, dsv4.sparse_mla_decode(q, swa, implementation=implementation), rtol=1e-6, atol=1e-6)


FIRST, SECOND = 0, 1


def on(device: int, tree: object) -> object:
    return jax.device_put(tree, jax.devices()[device])


# (call, operands and where they are)
SPLIT_CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "sparse_mla_decode: a cache apart": (
        lambda: dsv4.sparse_mla_decode(on(FIRST, parts()[0]), on(SECOND, scope(with_lengths=False))),
        "q on cpu:0, swa.cache.data on cpu:1, swa.indices on cpu:1",
    ),
    "sparse_mla_decode: a sink apart": (
        lambda: dsv4.sparse_mla_decode(parts()[0], on(FIRST, scope())._replace(lengths=None), attn_sink=on(SECOND, numbers(HEADS))),
        "attn_sink on cpu:1, swa.cache.data on cpu:0, swa.indices on cpu:0",
    ),
    "append": (
        lambda: dsv4.append(on(FIRST, scope().cache), on(SECOND, numbers(TOKENS, 512)), lengths()),
        "cache.data on cpu:0, latents on cpu:1",
    ),
    "plan_decode": (
        lambda: dsv4.plan_decode(on(FIRST, lengths()), on(SECOND, lengths()), num_heads=HEADS, swa_topk=TOPK, extra_topk=TOPK),
        "extra_lengths on cpu:1, swa_lengths on cpu:0",
    ),
    "dequantize": (
        lambda: dsv4.dequantize(on(SECOND, scope().cache), on(FIRST, lengths())),
        "cache.data on cpu:1, slots on cpu:0",
    ),
    "merge_scopes": (
        lambda: dsv4.merge_scopes([on(FIRST, parts()[0]), on(SECOND, parts()[0])], [parts()[1]] * 2),
        "outs.0 on cpu:0, outs.1 on cpu:1",
    ),
    "apply_attn_sink": (
        lambda: dsv4.apply_attn_sink(*on(FIRST, parts()), on(SECOND, numbers(HEADS))),
        "attn_sink on cpu:1, lse on cpu:0, out on cpu:0",
    ),
}


@pytest.mark.parametrize("name", SPLIT_CALLS)
def test_operands_on_two_devices(name: str) -> None:
    call, places = SPLIT_CALLS[name]
    op, rule = name.split(":")[0], "operands must be on the same devices (jax.device_put moves them)"
    with pytest.raises(ValueError, match="^" + re.escape(f"{op}: {rule}, got {places}") + "$"):
        call()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_operands_that_were_put_nowhere_follow_the_others(implementation: str | None) -> None:
    q, swa = parts()[0], scope()
    out = dsv4.sparse_mla_decode(q, swa._replace(cache=on(SECOND, swa.cache)), implementation=implementation)
    assert out.devices() == {jax.devices()[SECOND]}
    assert_same_bits("out", out, dsv4.sparse_mla_decode(q, swa, implementation=implementation))
