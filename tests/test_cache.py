"""The cache's bytes: append and dequantize of every implementation against the oracle and a hand-written block."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import packed_example
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, reference

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
IMPLEMENTATIONS = [
    pytest.param("cpu", marks=pytest.mark.skipif(_ffi.load("libdsv4_cpu", "cpu")[0] is None, reason="no native CPU library")),
    "xla",
]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# block_size, stride: as small as can be, an odd padding, FlashMLA's own.
SHAPES = ((1, 584), (5, 2921), (64, 37440))
COUNT = 8  # rows an append writes here


@functools.cache
def appender(implementation: str):
    return jax.jit(lambda cache, latents, slots: dsv4.append(cache, latents, slots, implementation=implementation))


@functools.cache
def reader():
    return jax.jit(dsv4.dequantize)


def written(data: np.ndarray, latents: np.ndarray, slots: np.ndarray, block_size: int, layout: str) -> np.ndarray:
    """What append must leave, row by row: the oracle's bytes where a slot is, the old ones elsewhere."""
    data = data.copy()
    for row, slot in zip(latents, slots.tolist()):
        if not 0 <= slot < data.shape[0] * block_size:
            continue
        block, at = divmod(slot, block_size)
        if layout == "fp8_ds_mla":
            packed = reference.pack_fp8_ds_mla(row[None].astype(np.float32), 1, 584)[0]
            data[block, 576 * at : 576 * at + 576] = packed[:576]
            scales = 576 * block_size + 8 * at
            data[block, scales : scales + 8] = packed[576:]
        elif layout == "bf16":
            data[block, at] = reference.float_to_bf16(row.astype(np.float32)).view(data.dtype)
        else:
            data[block, at] = row
    return data


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


def draw_tile(kind: str, rng: np.random.Generator) -> np.ndarray:
    """64 float32 of a kind that some step of the quantiser may get wrong."""
    sign = rng.choice(np.array([-1, 1], np.float32), 64)
    normal = rng.standard_normal(64).astype(np.float32)
    power = np.float32(2.0 ** rng.integers(-30, 118))
    if kind == "zeros":
        return sign * np.float32(0)
    if kind == "denormal":
        return sign * rng.integers(1, 1 << 23, 64).astype(np.uint32).view(np.float32)
    if kind == "tiny":
        return sign * np.float32(1e-4) * np.float32(2.0) ** rng.integers(-40, 2, 64).astype(np.float32)
    if kind == "huge":
        return sign * np.float32(3.4e38) * rng.random(64).astype(np.float32)
    if kind == "scale_boundary":  # an amax of 448 * 2^k, or a float32 next to it
        amax = np.float32(448) * power
        return np.append(normal[1:].clip(-1, 1) * amax * np.float32(0.5), rng.choice([amax, np.nextafter(amax, np.float32(np.inf)), -amax]))
    if kind == "floor_boundary":  # an amax of 1e-4, or a float32 next to it
        floor = np.float32(1e-4)
        return np.append(
            normal[1:].clip(-1, 1) * floor, rng.choice([floor, np.nextafter(floor, np.float32(1)), np.nextafter(floor, np.float32(0))])
        )
    if kind == "ties":  # with amax = 448 * 2^k every number lies midway between two codes, or a float32 beside that
        grid = reference.e4m3_to_float(np.arange(127, dtype=np.uint8)).astype(np.float32)
        middle = rng.choice((grid[1:] + grid[:-1]) / 2, 63)
        middle = np.where(rng.random(63) < 0.5, middle, np.nextafter(middle, rng.choice(np.array([0, np.inf], np.float32), 63)))
        return np.append(sign[1:] * middle, np.float32(448)) * np.float32(2.0 ** rng.integers(-20, 117))
    values = normal * power
    specials = {"infinities": [np.inf, -np.inf], "nan": [np.nan], "all": [np.inf, -np.inf, np.nan, 0.0, -0.0]}
    if kind in specials:
        values[rng.integers(0, 64, 3)] = rng.choice(np.array(specials[kind], np.float32), 3)
    return values


KINDS = ("normal", "zeros", "denormal", "tiny", "huge", "scale_boundary", "floor_boundary", "ties", "infinities", "nan", "all")
SLOTS = st.sampled_from([0, 1, 2, 3, 4, 5, 63, 64, 100, -1, -5, INT_MIN, INT_MAX, 10**9])


@every_implementation
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=8, max_size=8),
    slots=st.lists(SLOTS, min_size=COUNT, max_size=COUNT),
)
def test_append_packed(implementation: str, seed: int, shape: tuple[int, int], dtype: str, kinds: list[str], slots: list[int]) -> None:
    """Whatever is written wherever: every byte of the cache, written or not, is the oracle's."""
    rng = np.random.default_rng(seed)
    block_size, stride = shape
    before = rng.integers(0, 256, (3, stride), dtype=np.uint8)
    latents = np.stack([np.concatenate([draw_tile(kinds[(t + row) % 8], rng) for t in range(8)]) for row in range(COUNT)])
    latents = latents.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    cache = dsv4.KVCache(jnp.asarray(before), block_size=block_size)
    after = appender(implementation)(cache, jnp.asarray(latents), jnp.asarray(slots, jnp.int32))
    want = written(before, latents, np.array(slots), block_size, "fp8_ds_mla")
    np.testing.assert_array_equal(after.data, want)


@every_implementation
@pytest.mark.parametrize("layout", ["bf16", "float32"])
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kinds=st.lists(st.sampled_from(KINDS), min_size=8, max_size=8),
    slots=st.lists(SLOTS, min_size=COUNT, max_size=COUNT),
)
def test_append_unpacked(implementation: str, layout: str, seed: int, kinds: list[str], slots: list[int]) -> None:
    rng = np.random.default_rng(seed)
    before = np.full((3, 2, 512), np.nan, np.float32).astype(ml_dtypes.bfloat16 if layout == "bf16" else np.float32)
    latents = np.stack([np.concatenate([draw_tile(kinds[(t + row) % 8], rng) for t in range(8)]) for row in range(COUNT)])
    cache = dsv4.KVCache(jnp.asarray(before), block_size=2, layout=layout)
    after = appender(implementation)(cache, jnp.asarray(latents), jnp.asarray(slots, jnp.int32))
    np.testing.assert_array_equal(as_bytes(after.data), as_bytes(written(before, latents, np.array(slots), 2, layout)))


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


@every_implementation
def test_append_in_scan(implementation: str) -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((5, 2, 512)).astype(np.float32)
    slots = np.array([[0, 1], [1, 2], [7, -1], [3, 3], [9, 0]], np.int32)

    @jax.jit
    def fill(cache, latents, slots):
        step = lambda cache, row: (dsv4.append(cache, *row, implementation=implementation), None)  # noqa: E731
        return jax.lax.scan(step, cache, (latents, slots))[0]

    after = fill(dsv4.KVCache.create(2, 4), jnp.asarray(latents), jnp.asarray(slots))
    want = written(np.zeros(after.data.shape, np.uint8), latents.reshape(-1, 512), slots.reshape(-1), 4, "fp8_ds_mla")
    np.testing.assert_array_equal(after.data, want)
