"""Weights as DeepSeek publishes them: fp4 experts and fp8 projections, in blocks that have a power of two for a scale.

A number is a code times its block's scale. In bfloat16 that is exact. deepseek_v4/products.py multiplies with them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

FEWEST, MOST = 40, 158
"""Of a scale's exponent, plus 127: so every number is a normal bfloat16 or zero, and so is what the kernels make of it on the way."""


class Fp8(NamedTuple):
    """Matrices [..., r, c] of e4m3, with a scale for each 128 × 128 of a matrix.

    A word has a number of column j of 128 in its low byte, one of column 64 + j in its high one.
    """

    codes: Array  # uint16 [..., r, c / 2]
    scale: Array  # uint8 [..., ⌈r / 128⌉, c / 128]: 2^(scale − 127)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


class Fp4(NamedTuple):
    """Matrices [..., r, c] of e2m1, with a scale for each 32 numbers of a row.

    A word has numbers of columns j, 32 + j, 64 + j and 96 + j of 128. `FP4_BITS` says which of its bits, so that few instructions make
    bfloat16 of them. What 128 columns have of the rows is one piece of memory: rows are its tiles.
    """

    codes: Array  # uint16 [..., c / 128, r, 32]
    scale: Array  # uint32 [..., c / 128, r]: four bytes, the lowest that of the first 32 columns: 2^(byte − 127)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, steps, rows, _ = self.codes.shape
        return (*lead, rows, 128 * steps)


FP4_BITS = ((15, 6), (12, 3), (13, 0), (14, 9))
"""Of each of a word's four codes: the sign's bit, and the lowest of the three of its magnitude."""

Packed = Fp4 | Fp8


def fp8_values(codes: Array) -> Array:
    """float32 of uint8 codes."""
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


def fp4_values(words: Array, place: int) -> Array:
    """float32 of the codes in one place of uint16 words."""
    words, (sign, lowest) = words.astype(jnp.uint32), FP4_BITS[place]
    # Twice 0, 0.5, 1, 1.5, 2, 3, 4, 6 are the hexadecimal digits of a constant.
    twice = (jnp.uint32(0xC8643210) >> (4 * (words >> lowest & 7))) & 15
    return jnp.where((words >> sign & 1) == 1, -0.5, 0.5) * twice.astype(jnp.int32).astype(jnp.float32)


def powers(scale: Array) -> Array:
    """2^(scale − 127), exactly."""
    return lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)


def byte(words: Array, place: int) -> Array:
    return words >> (8 * place) & 0xFF


def unpack(w: Array | Packed, dtype: jax.typing.DTypeLike) -> Array:
    """The matrices' numbers; an array is left as it is."""
    if isinstance(w, Fp8):
        *lead, rows, columns = w.shape
        codes = jnp.stack([byte(w.codes, place).astype(jnp.uint8) for place in (0, 1)], axis=-1)
        values = jnp.swapaxes(fp8_values(codes).reshape(*lead, rows, columns // 128, 64, 2), -1, -2)
        scale = jnp.repeat(powers(w.scale), 128, axis=-2)[..., :rows, :]
        return (values * scale[..., None, None]).astype(dtype).reshape(w.shape)
    if isinstance(w, Fp4):
        values = jnp.stack([fp4_values(w.codes, i) * powers(byte(w.scale, i))[..., None] for i in range(4)], axis=-2)  # [..., r, 4, 32]
        return jnp.moveaxis(values.astype(dtype), -4, -3).reshape(w.shape)
    return w


def pack_fp8(codes: Array, scale: Array) -> Fp8:
    """From published bytes: uint8 [..., r, c], c a multiple of 128, and their scales."""
    halves = codes.reshape(*codes.shape[:-1], -1, 2, 64).astype(jnp.uint16)
    return Fp8((halves[..., 0, :] | halves[..., 1, :] << 8).reshape(*codes.shape[:-1], -1), scale)


def pack_fp4(codes: Array, scale: Array) -> Fp4:
    """From published bytes: uint8 [..., r, c / 2], c a multiple of 128, of two numbers side by side, and scales uint8 [..., r, c / 32]."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 4, 16).astype(jnp.uint16)  # [..., r, c / 128, 4, 16]
    numbers = jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], 32)
    words = jnp.zeros((*numbers.shape[:-2], 32), jnp.uint16)
    for i, (sign, lowest) in enumerate(FP4_BITS):
        words |= (numbers[..., i, :] >> 3) << sign | (numbers[..., i, :] & 7) << lowest
    scales = lax.bitcast_convert_type(scale.reshape(*scale.shape[:-1], -1, 4), jnp.uint32)
    return Fp4(jnp.swapaxes(words, -2, -3), jnp.swapaxes(scales, -1, -2))


def published_shapes(shape: tuple[int, ...], stored: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the bytes and the scales of matrices that are published as `stored`, "fp8" or "fp4"."""
    *lead, rows, columns = shape
    if stored == "fp8":
        return (*lead, rows, columns), (*lead, -(-rows // 128), -(-columns // 128))
    return (*lead, rows, columns // 2), (*lead, rows, columns // 32)


@cache
def packed_form(shape: tuple[int, ...], stored: str) -> Any:
    """Shapes and dtypes of matrices that are published as `stored`, once they are packed; None: they are not."""
    if stored not in ("fp4", "fp8") or shape[-1] % 128:
        return None
    parts = (jax.ShapeDtypeStruct(part, jnp.uint8) for part in published_shapes(shape, stored))
    return jax.eval_shape(pack_fp8 if stored == "fp8" else pack_fp4, *parts)
