"""The cache's bytes: append and dequantize of every implementation against the oracle and a hand-written block."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import packed_example
import pytest
from hostile import KINDS, draw_rows, written
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import every_implementation

import jax_dsv4 as dsv4
from jax_dsv4 import reference

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
# block_size, stride: as small as can be, an odd padding, FlashMLA's own.
SHAPES = ((1, 584), (5, 2921), (64, 37440))
COUNT = 8  # rows an append writes here


@functools.cache
def appender(implementation: str):
    return jax.jit(lambda cache, latents, slots: dsv4.append(cache, latents, slots, implementation=implementation))


@functools.cache
def reader():
    return jax.jit(dsv4.dequantize)


def as_bytes(data: object) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.uint8)


@every_implementation
def test_hand_written_block(implementation: str) -> None:
    block_size, stride = packed_example.BLOCK_SIZE, packed_example.STRIDE
    cache = dsv4.KVCache(jnp.full((1, stride), 0xAA, jnp.uint8), block_size=block_size)
    cache = appender(implementation)(cache, jnp.asarray(packed_example.latents()), jnp.arange(2, dtype=jnp.int32))
    np.testing.assert_array_equal(cache.data, packed_example.packed(padding=0xAA))


def test_dequantize_hand_written_block() -> None:
    cache = dsv4.KVCache(jnp.asarray(packed_example.packed(padding=0xFF)), block_size=packed_example.BLOCK_SIZE)
    with np.errstate(over="ignore"):
        want = packed_example.values().astype(np.float32)  # 448 * 2^127 is infinite in float32
    np.testing.assert_array_equal(reader()(cache), want)


SLOTS = st.sampled_from([0, 1, 2, 3, 4, 5, 63, 64, 100, -1, -5, INT_MIN, INT_MAX, 10**9])


@every_implementation
@pytest.mark.parametrize("layout", ["fp8_ds_mla", "bf16", "float32"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=8, max_size=8),
    slots=st.lists(SLOTS, min_size=COUNT, max_size=COUNT),
)
def test_append(
    implementation: str, layout: str, seed: int, shape: tuple[int, int], dtype: type, kinds: list[str], slots: list[int]
) -> None:
    """Whatever is written wherever: every byte of the cache, written or not, is the oracle's."""
    rng = np.random.default_rng(seed)
    block_size, stride = shape
    before = rng.integers(0, 256, (3, stride), dtype=np.uint8)
    if layout != "fp8_ds_mla":
        before = np.full((3, block_size, 512), np.nan, np.float32).astype(ml_dtypes.bfloat16 if layout == "bf16" else np.float32)
    latents = draw_rows(kinds, rng, COUNT).astype(dtype)
    cache = dsv4.KVCache(jnp.asarray(before), block_size=block_size, layout=layout)
    after = appender(implementation)(cache, jnp.asarray(latents), jnp.asarray(slots, jnp.int32))
    want = written(before, latents, np.array(slots), block_size, layout)
    np.testing.assert_array_equal(as_bytes(after.data), as_bytes(want))


@every_implementation
def test_last_of_many_equal_slots_wins(implementation: str) -> None:
    """Also where rows are enough for several threads."""
    rng = np.random.default_rng(0)
    slots = rng.integers(-1, 7, 1000).astype(np.int32)
    latents = rng.standard_normal((1000, 512)).astype(np.float32)
    cache = appender(implementation)(dsv4.KVCache.create(2, 4), jnp.asarray(latents), jnp.asarray(slots))
    last = np.array([np.flatnonzero(slots == s)[-1] for s in range(7)])
    want = written(np.zeros(cache.data.shape, np.uint8), latents[last], np.arange(7), 4, "fp8_ds_mla")
    np.testing.assert_array_equal(cache.data, want)


@every_implementation
def test_batch_axes_and_no_rows(implementation: str) -> None:
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 512)), jnp.bfloat16)
    slots = jnp.array([[5, -1, 0], [2, 3, 6]], jnp.int32)
    append, cache = appender(implementation), dsv4.KVCache.create(2, 4)
    flat = append(cache, latents.reshape(6, 512), slots.reshape(6))
    np.testing.assert_array_equal(append(cache, latents, slots).data, flat.data)
    one = append(cache, latents[0, 0], slots[0, 0])
    np.testing.assert_array_equal(one.data[1, 576:1152], flat.data[1, 576:1152])
    np.testing.assert_array_equal(append(flat, latents[:0], slots[:0]).data, flat.data)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), shape=st.sampled_from(SHAPES[:2]))
def test_dequantize(seed: int, shape: tuple[int, int]) -> None:
    """Any bytes at all read as the oracle reads them; a slot outside the cache as zeros."""
    block_size, stride = shape
    data = np.random.default_rng(seed).integers(0, 256, (3, stride), dtype=np.uint8)
    with np.errstate(over="ignore"):
        want = reference.unpack_fp8_ds_mla(data, block_size).astype(np.float32)
    cache = dsv4.KVCache(jnp.asarray(data), block_size=block_size)
    got = np.asarray(reader()(cache))
    # XLA on CPU takes what is below float32's normal range for zero, the smallest scale (2^-127) included.
    np.testing.assert_allclose(got, want, rtol=0, atol=448 * 2.0**-127)
    slots = np.array([[0, cache.num_slots - 1], [-1, cache.num_slots], [INT_MIN, INT_MAX]], np.int32)
    some = np.asarray(reader()(cache, jnp.asarray(slots)))
    np.testing.assert_array_equal(some[0], got[[0, -1]])
    np.testing.assert_array_equal(some[1:], np.zeros((2, 2, 512), np.float32))


def test_foreign_bytes_with_a_stride_of_their_own() -> None:
    """Blocks cut from another engine's buffer, attended to and appended to where they lie."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((8, 512)).astype(np.float32)
    foreign = reference.pack_fp8_ds_mla(latents, 4, 4 * 584 + 1000)
    foreign[:, 4 * 584 :] = 0xFF
    cache = dsv4.KVCache(jnp.asarray(foreign), block_size=4, layout="fp8_ds_mla")
    assert (cache.num_blocks, cache.num_slots, cache.nbytes) == (2, 8, 2 * 3336)
    np.testing.assert_array_equal(dsv4.dequantize(cache), reference.unpack_fp8_ds_mla(foreign, 4).astype(np.float32))
    for implementation in ("cpu", "xla") if dsv4.implementations()["cpu"].available else ("xla",):
        after = appender(implementation)(cache, jnp.asarray(latents[:1]), jnp.array([7], jnp.int32))
        np.testing.assert_array_equal(after.data, written(foreign, latents[:1], np.array([7]), 4, "fp8_ds_mla"))


@pytest.mark.parametrize(
    ("layout", "block_size", "shape", "nbytes"),
    [
        ("fp8_ds_mla", 64, (3, 37440), 3 * 37440),  # 64 * 584 = 37376, up to a multiple of 576
        ("fp8_ds_mla", 72, (3, 42048), 3 * 42048),  # 72 * 584 is such a multiple
        ("bf16", 4, (3, 4, 512), 3 * 4 * 1024),
        ("float32", 4, (3, 4, 512), 3 * 4 * 2048),
    ],
)
def test_create(layout: str, block_size: int, shape: tuple[int, ...], nbytes: int) -> None:
    cache = dsv4.KVCache.create(3, block_size, layout)
    assert (cache.data.shape, cache.nbytes, cache.num_blocks, cache.num_slots) == (shape, nbytes, 3, 3 * block_size)
    assert not np.asarray(cache.data).any()
    assert dsv4.KVCache.create(1, 2, block_stride_bytes=1169).data.shape == (1, 1169)


def test_pytree() -> None:
    cache = dsv4.KVCache.create(2, 4)
    leaves, tree = jax.tree.flatten(cache)
    assert len(leaves) == 1
    assert leaves[0] is cache.data
    back = jax.tree.unflatten(tree, leaves)
    assert (back.data is cache.data, back.block_size, back.layout) == (True, 4, "fp8_ds_mla")
    assert jax.tree_util.tree_leaves_with_path(cache)[0][0] == (jax.tree_util.GetAttrKey("data"),)
    assert tree == jax.tree.structure(dsv4.KVCache.create(7, 4))  # sizes are the leaf's
    assert tree != jax.tree.structure(dsv4.KVCache.create(2, 5))
    shapes = jax.eval_shape(lambda: dsv4.KVCache.create(2, 4))
    assert (shapes.num_slots, shapes.nbytes) == (8, cache.nbytes)
    assert jax.tree.map(lambda x: x[:1], cache).num_blocks == 1
    with pytest.raises(AttributeError, match=r"KVCache is immutable; use append\(\) or replace\(\) instead of setting block_size"):
        cache.block_size = 5
    assert repr(cache) == "KVCache(layout='fp8_ds_mla', block_size=4, data=uint8[2, 2880])"


@every_implementation
def test_append_donated(implementation: str) -> None:
    append = jax.jit(lambda c, x, s: dsv4.append(c, x, s, implementation=implementation), donate_argnums=0)
    latents = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    slots = np.array([6, -1, 1], np.int32)
    cache = dsv4.KVCache.create(2, 4)
    old, address = cache.data, cache.data.unsafe_buffer_pointer()
    after = append(cache, jnp.asarray(latents), jnp.asarray(slots))
    assert old.is_deleted()
    assert after.data.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(after.data, written(np.zeros(after.data.shape, np.uint8), latents, slots, 4, "fp8_ds_mla"))


@every_implementation
def test_append_keeps_what_is_not_donated(implementation: str) -> None:
    cache = dsv4.KVCache.create(2, 4)
    after = appender(implementation)(cache, jnp.ones((1, 512), jnp.float32), jnp.zeros(1, jnp.int32))
    assert not np.asarray(cache.data).any()
    assert np.asarray(after.data).any()
