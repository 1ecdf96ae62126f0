"""The indexer's keys and their scores. A cache has keys as they are, or in e4m3 with a scale each, as DeepSeek's own inference keeps them.

A scale is a power of two, as the latents' are: so a key is its codes times it, exactly, and quantising is the only rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

MOST, LEAST = 448.0, 1e-4
"""The largest e4m3. What is taken for a key's largest number, if that is less."""


class Fp8Keys(NamedTuple):
    codes: Array  # e4m3 [..., c, k]
    scale: Array  # float32 [..., c]


Keys = Array | Fp8Keys


def create_keys(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Keys:
    """No keys yet: [..., c, k], of float8_e4m3fn with scales."""
    keys = jnp.zeros(shape, dtype)
    return Fp8Keys(keys, jnp.zeros(shape[:-1], jnp.float32)) if dtype == jnp.float8_e4m3fn else keys


def quantize(key: Array) -> Fp8Keys:
    """float32 [..., k] → codes and scales."""
    least = jnp.maximum(jnp.abs(key).max(axis=-1), LEAST) / MOST
    # The power of two from it on: its exponent, and one more if it has a mantissa.
    scale = lax.bitcast_convert_type((lax.bitcast_convert_type(least, jnp.int32) + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return Fp8Keys((key / scale[..., None]).astype(jnp.float8_e4m3fn), scale)


def write(keys: Keys, row: Array, entry: Array, key: Array) -> Keys:
    """`keys` with key float32 [b, c, k] at [row, entry]; what is past the end is dropped."""
    if isinstance(keys, Fp8Keys):
        return Fp8Keys(*(old.at[row, entry].set(new, mode="drop") for old, new in zip(keys, quantize(key), strict=True)))
    return keys.at[row, entry].set(key.astype(keys.dtype), mode="drop")


def read(keys: Keys, part: Callable[[Array], Array], dtype: jax.typing.DTypeLike) -> Array:
    """The keys of a part of the cache, [..., k] of `dtype`, exactly if that is bfloat16 or more."""
    if isinstance(keys, Fp8Keys):
        return (part(keys.codes).astype(jnp.float32) * part(keys.scale)[..., None]).astype(dtype)
    return part(keys)


def score_entries(q: Array, weight: Array, keys: Keys, visible: Array, table: Array | None = None) -> Array:
    """Scores [b, t, c] of the first `visible` keys [b, c, k], and of some more; the rest are 0.

    By pieces: the scores of all heads, [b, t, h, c], are as large as h caches. With a `table` [b, pages], of keys [blocks, 64, k].
    """

    def score(keys: Array) -> Array:
        products = jnp.einsum("bthk,bck->bthc", q, keys, preferred_element_type=jnp.float32)
        return jnp.einsum("bthc,bth->btc", jax.nn.relu(products), weight)

    def read_some(first: Array | int, size: int) -> Array:
        if table is None:
            return read(keys, lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size, axis=1), q.dtype)
        pages = lax.dynamic_slice_in_dim(table, first // held, size // held, axis=1)
        return read(keys, lambda leaf: leaf[pages].reshape(len(table), size, *leaf.shape[2:]), q.dtype)

    held = jax.tree.leaves(keys)[0].shape[1]
    count, piece = held * (1 if table is None else table.shape[1]), max(2048 // q.shape[1] // 64 * 64, 256)
    if count <= piece:
        return score(read_some(0, count))

    def add_piece(i: Array, scores: Array) -> Array:
        first = jnp.minimum(i * piece, count - piece)
        new = score(read_some(first, piece))
        return lax.dynamic_update_slice_in_dim(scores, new, first, axis=2)

    return lax.fori_loop(0, -(-visible // piece), add_piece, jnp.zeros((*q.shape[:2], count), jnp.float32))
