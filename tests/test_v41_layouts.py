"""The bytes of DeepSeek-V4.1's layouts: append and dequantize of every implementation against a packer of these tests, which knows the
formats from ml_dtypes alone, and slots worked out by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import PACKED
from hostile import KINDS, draw_rows, written
from marks import every_implementation
from packed_v41_example import EXAMPLES

import jax_dsv4 as dsv4

E4M3, E2M1, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu
LAYOUTS = pytest.mark.parametrize("layout", EXAMPLES)
ARRANGEMENTS = pytest.mark.parametrize("arrangement", dsv4.cache.ARRANGEMENTS)


@functools.cache
def appender(implementation: str):
    return jax.jit(functools.partial(dsv4.append, implementation=implementation))


def stride_of(layout: str, arrangement: str, block_size: int) -> int:
    """One with padding."""
    return PACKED[layout].stride(block_size, arrangement, 3)


def filled(layout: str, arrangement: str, block_size: int, blocks: int, byte: int) -> dsv4.KVCache:
    data = jnp.full((blocks, stride_of(layout, arrangement, block_size)), byte, jnp.uint8)
    return dsv4.KVCache(data, block_size=block_size, layout=layout, arrangement=arrangement)


def quantised(layout: str, latents: np.ndarray) -> np.ndarray:
    """Latents [count, 512] of bfloat16 to slots [count, bytes of a slot], by division, in float32, as FlashMLA's tests do it."""
    with np.errstate(all="ignore"):
        tile = 32 if layout == "mxfp8_528" else 16
        tiles = latents.astype(np.float32).reshape(len(latents), -1, tile)
        amax = np.abs(tiles).max(-1)
        if layout == "mxfp8_528":
            scales = np.exp2(np.ceil(np.log2(np.maximum(amax, np.float32(1e-4)).astype(np.float64) / 448)))
            scale_bytes = np.where(np.isfinite(amax), scales, np.nan).astype(E8M0).view(np.uint8)
            codes = np.where(np.isfinite(amax)[..., None], tiles / scales[..., None].astype(np.float32), np.nan).astype(E4M3)
            codes = np.where(np.isnan(codes.astype(np.float32)), 0x7F, codes.view(np.uint8)).reshape(-1, 512)
            return np.concatenate([codes, scale_bytes], axis=1)
        as_e4m3 = np.clip(amax / np.float32(6), np.float32(2.0**-9), np.float32(448)).astype(E4M3)
        quotients = np.where(np.isnan(amax)[..., None], 0, np.clip(tiles / as_e4m3.astype(np.float32)[..., None], -6, 6))
        codes = quotients.astype(E2M1).view(np.uint8).reshape(-1, 512) & 15
        scales = np.where(np.isnan(amax), 0x7F, as_e4m3.view(np.uint8))
        return np.concatenate([codes[:, ::2] | codes[:, 1::2] << 4, scales], axis=1)


def draw_latents(rng: np.random.Generator, count: int) -> np.ndarray:
    """Every kind that some step of a quantiser may get wrong, ties of e2m1 at every scale among them."""
    rows = draw_rows(KINDS, rng, count).astype(ml_dtypes.bfloat16)
    scales = rng.integers(1, 127, (count // 2, 32, 1)).astype(np.uint8).view(E4M3).astype(np.float32)
    middles = rng.choice(np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]), (count // 2, 32, 16)) * scales
    middles[..., 0] = 6 * scales[..., 0]  # so that this is the scale
    signs = rng.choice(np.array([-1, 1]), middles.shape)
    rows[: count // 2] = (middles * signs).reshape(-1, 512).astype(ml_dtypes.bfloat16)
    return rows


@every_implementation
@LAYOUTS
@ARRANGEMENTS
def test_hand_written_slot(implementation: str, layout: str, arrangement: str) -> None:
    example, block_size = EXAMPLES[layout], 3
    cache = filled(layout, arrangement, block_size, 2, byte=0xAA)
    cache = appender(implementation)(cache, jnp.asarray(example.latents()), jnp.array([4], jnp.int32))
    want = np.full(cache.data.shape, 0xAA, np.uint8)
    size = len(example.slot())
    row = size - example.scale_bytes
    if arrangement == "inline":
        want[1, size : 2 * size] = example.slot()
    else:
        want[1, row : 2 * row] = example.slot()[:row]
        want[1, 3 * row + example.scale_bytes : 3 * row + 2 * example.scale_bytes] = example.slot()[row:]
    np.testing.assert_array_equal(cache.data, want)
    read = np.asarray(dsv4.dequantize(cache, jnp.array([4], jnp.int32)))
    np.testing.assert_array_equal(read, example.values())
    np.testing.assert_array_equal(np.signbit(read[~np.isnan(read)]), np.signbit(example.values()[~np.isnan(read)]))


@every_implementation
@LAYOUTS
@ARRANGEMENTS
@pytest.mark.parametrize("block_size", [1, 2, 5, 64])
def test_append(implementation: str, layout: str, arrangement: str, block_size: int) -> None:
    """Every byte, written or not; bfloat16 latents against the packer of this file, float32 ones against the oracle."""
    rng = np.random.default_rng(block_size)
    count = 80
    blocks = -(-2 * count // block_size)
    before = rng.integers(0, 256, (blocks, stride_of(layout, arrangement, block_size)), dtype=np.uint8)
    slots = rng.permutation(blocks * block_size)[:count].astype(np.int32)
    slots[:3] = -1, blocks * block_size, np.iinfo(np.int32).max
    latents = draw_latents(rng, count)
    cache = dsv4.KVCache(jnp.asarray(before), block_size=block_size, layout=layout, arrangement=arrangement)
    after = appender(implementation)(cache, jnp.asarray(latents), jnp.asarray(slots))
    want, at = before.copy(), PACKED[layout].slot_bytes(block_size, arrangement)
    for slot, row in zip(slots[3:].tolist(), quantised(layout, latents)[3:]):
        want[slot // block_size, at[slot % block_size]] = row
    np.testing.assert_array_equal(after.data, want)
    exact = np.nextafter(latents.astype(np.float32), rng.choice(np.array([-np.inf, np.inf], np.float32), latents.shape))
    after = appender(implementation)(cache, jnp.asarray(exact), jnp.asarray(slots))
    np.testing.assert_array_equal(after.data, written(before, exact, slots, block_size, layout, arrangement))


@LAYOUTS
@ARRANGEMENTS
def test_oracle_packs_as_the_packer_of_this_file(layout: str, arrangement: str) -> None:
    latents, packing = draw_latents(np.random.default_rng(0), 400), PACKED[layout]
    packed = packing.pack(latents.astype(np.float32), 5, packing.stride(5, arrangement), arrangement)
    np.testing.assert_array_equal(packed[:, packing.slot_bytes(5, arrangement)].reshape(400, -1), quantised(layout, latents))


@LAYOUTS
@ARRANGEMENTS
def test_dequantize(layout: str, arrangement: str) -> None:
    """Any bytes at all read as ml_dtypes reads them."""
    data = np.random.default_rng(0).integers(0, 256, (7, stride_of(layout, arrangement, 5)), dtype=np.uint8)
    slots = data[:, PACKED[layout].slot_bytes(5, arrangement)].reshape(35, -1)
    if layout == "mxfp8_528":
        numbers, scales = slots[:, :512].view(E4M3), slots[:, 512:].view(E8M0)
    else:
        numbers = np.stack([slots[:, :256] & 15, slots[:, :256] >> 4], axis=-1).reshape(-1, 512).view(E2M1)
        scales = np.ascontiguousarray(slots[:, 256:]).view(E4M3)
    with np.errstate(all="ignore"):
        factors = np.repeat(scales.astype(np.float32), 512 // scales.shape[1], axis=1)
        want = numbers.astype(np.float32) * factors
    cache = dsv4.KVCache(jnp.asarray(data), block_size=5, layout=layout, arrangement=arrangement)
    # XLA on CPU takes what is below float32's normal range for zero, the smallest scale (2^-127) included.
    np.testing.assert_allclose(dsv4.dequantize(cache), want, rtol=0, atol=448 * 2.0**-127)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(PACKED[layout].unpack(data, 5, arrangement).astype(np.float32), want)


@pytest.mark.parametrize(
    ("layout", "arrangement", "block_size", "stride"),
    [
        ("mxfp8_528", "inline", 32, 32 * 528),
        ("mxfp8_528", "footer", 5, 3072),  # 5 * 528 = 2640, up to a multiple of 512
        ("nvfp4_288", "inline", 5, 5 * 288),
        ("nvfp4_288", "footer", 64, 64 * 288),  # which is such a multiple
    ],
)
def test_create(layout: str, arrangement: str, block_size: int, stride: int) -> None:
    cache = dsv4.KVCache.create(3, block_size, layout, arrangement=arrangement)
    assert (cache.data.shape, cache.nbytes, cache.num_slots) == ((3, stride), 3 * stride, 3 * block_size)
    assert not np.asarray(cache.data).any()
    assert f"layout='{layout}', arrangement='{arrangement}'" in repr(cache)
    assert jax.tree.structure(cache.replace(cache.data)) == jax.tree.structure(cache)
    # As an engine that sees a slot as a row hands it over.
    view = jnp.zeros((3, block_size, PACKED[layout].row_bytes + PACKED[layout].scale_bytes), jnp.uint8)
    wrapped = dsv4.KVCache(view, block_size=block_size, layout=layout, arrangement=arrangement)
    assert wrapped.data.shape == (3, view.shape[1] * view.shape[2])


def test_no_bytes_tell_the_arrangement() -> None:
    """Why the caller has to name it."""
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((8, 512)), jnp.float32)
    inline = dsv4.append(dsv4.KVCache.create(2, 4, "mxfp8_528", arrangement="inline"), latents, jnp.arange(8, dtype=jnp.int32))
    footer = dsv4.KVCache(inline.data, block_size=4, layout="mxfp8_528", arrangement="footer")
    right, wrong = dsv4.dequantize(inline), np.asarray(dsv4.dequantize(footer))
    np.testing.assert_allclose(right, latents, rtol=2.0**-4, atol=2.0**-10)
    assert wrong.shape == right.shape
    assert not np.allclose(wrong, right, atol=0.1, equal_nan=True)
