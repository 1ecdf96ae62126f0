"""Caches, scopes and plans as Python objects: pickled, copied, and sent to another process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits

import jax_dsv4 as dsv4

BLOCK, TOKENS, TOPK = 2, 3, 5


def cache_of(layout: str) -> dsv4.KVCache:
    scale = 2.0**-5 if dsv4.cache.LAYOUTS[layout].codes is not None else 1.0
    arrangement = "inline" if dsv4.cache.LAYOUTS[layout].arrangements else None
    empty = dsv4.KVCache.create(3, BLOCK, layout, scale=scale, arrangement=arrangement)
    noise = np.random.default_rng(0).integers(0, 100, empty.nbytes, dtype=np.uint8)
    return empty.replace(jnp.asarray(noise.view(empty.data.dtype).reshape(empty.data.shape)))


def scope_of(layout: str, *, lengths: bool) -> dsv4.Scope:
    indices = jnp.arange(TOKENS * TOPK, dtype=jnp.int32).reshape(TOKENS, TOPK)
    return dsv4.Scope(cache_of(layout), indices, jnp.arange(TOKENS, dtype=jnp.int32) if lengths else None)


def plan_of(implementation: str | tuple[str, ...] | None, fused: bool | None) -> dsv4.DecodePlan:
    lengths = jnp.arange(TOKENS, dtype=jnp.int32)
    topks = {"swa_topk": TOPK, "extra_topk": TOPK}
    return dsv4.plan_decode(lengths, lengths, num_heads=2, implementation=implementation, fused=fused, **topks)


OBJECTS: dict[str, Callable[[], object]] = {
    **{f"a cache, {layout}": lambda layout=layout: cache_of(layout) for layout in dsv4.cache.LAYOUTS},
    "a scope": lambda: scope_of("fp8_ds_mla", lengths=True),
    "a scope without lengths": lambda: scope_of("bf16", lengths=False),
    "a plan": lambda: plan_of(None, None),
    "a plan for each scope": lambda: plan_of(("cpu", "xla"), False),
    "a tree of them": lambda: {"layers": [cache_of("float32"), (scope_of("aiter_fp8", lengths=True), plan_of("xla", None))], "none": None},
}
LEAVES: dict[str, Callable[[object], object]] = {
    "arrays": lambda x: x,
    "numpy arrays": jax.device_get,
    "shapes": lambda x: jax.eval_shape(lambda: x),
    "specs": lambda x: jax.tree.map(lambda leaf: jax.P("data"), x),
    "numbers": lambda x: jax.tree.map(lambda leaf: 0, x),
    "strings": lambda x: jax.tree.map(lambda leaf: str(leaf.dtype), x),
}


def ways(leaves: str) -> list[Callable[[object], object]]:
    """Every way to copy and pickle an object. JAX's own shapes and specs do not go through pickle's first two protocols."""
    first = 2 if leaves in ("shapes", "specs") else 0
    pickled = [lambda x, n=n: pickle.loads(pickle.dumps(x, protocol=n)) for n in range(first, pickle.HIGHEST_PROTOCOL + 1)]
    return [*pickled, copy.copy, copy.deepcopy]


def assert_same_object(got: object, want: object) -> None:
    """The same types, static fields and leaves."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert type(a) is type(b)
        if isinstance(b, jax.Array | np.ndarray):
            assert_same_bits("leaf", a, b)
        else:
            assert a == b


@pytest.mark.parametrize("leaves", LEAVES)
@pytest.mark.parametrize("name", OBJECTS)
def test_pickled_and_copied(name: str, leaves: str) -> None:
    """In every way, whatever the leaves are: transformations put other things where arrays were."""
    original = LEAVES[leaves](OBJECTS[name]())
    for way in ways(leaves):
        assert_same_object(way(original), original)
    structure = jax.tree.structure(original)
    assert pickle.loads(pickle.dumps(structure)) == structure


def test_copies_share_or_own_their_bytes() -> None:
    cache = cache_of("fp8_ds_mla")
    assert copy.copy(cache).data is cache.data
    own = copy.deepcopy(cache)
    cache.data.delete()
    assert np.asarray(own.data).any()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_copied_in_jit(way: Callable[[object], object]) -> None:
    scope = scope_of("fp8_ds_mla", lengths=True)
    assert_same_object(jax.jit(way)(scope), scope)


def test_still_immutable() -> None:
    restored = pickle.loads(pickle.dumps(cache_of("bf16")))
    with pytest.raises(AttributeError, match="KVCache is immutable"):
        restored.layout = "float32"


def attend_there(connection: Connection, objects: dict[str, object], q: jax.Array) -> None:
    """In the other process: what came back, and what is computed with it."""
    out = dsv4.sparse_mla_decode(q, objects["a scope"], implementation="xla")
    connection.send((objects, out))


def test_sent_to_a_spawned_process_and_back() -> None:
    objects = {name: make() for name, make in OBJECTS.items()}
    q = jnp.ones((TOKENS, 2, 512), jnp.float32)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=attend_there, args=(there, objects, q))
    process.start()
    there.close()  # so that a process that fails ends the wait below
    back, out = here.recv()
    process.join()
    assert process.exitcode == 0
    assert_same_object(back, objects)
    assert_same_bits("out", out, jax.device_get(dsv4.sparse_mla_decode(q, objects["a scope"], implementation="xla")))
