"""KVCache and Scope: the latents of cached positions, in paged blocks. This file is the sole definition of their bytes on the JAX side.

Slot s is row `s % block_size` of block `s // block_size`. Layouts, for a latent of 448 "nope" and 64 rope numbers:

`"fp8_ds_mla"`  584 bytes a slot, byte-compatible with FlashMLA's MODEL1 and vLLM. A block is `block_size` rows of 576 bytes (448
                e4m3fn, then 64 bfloat16), then `block_size` groups of 8 bytes (7 ue8m0 scales, one for every 64 nope numbers, and a
                pad byte), then whatever pads it to its stride.
`"bf16"`        512 bfloat16 a slot.
`"float32"`     512 float32 a slot, for exactness tests (CPU and XLA).
`"aiter_fp8"`   576 bytes a slot: 512 e4m3fn, nope and rope alike, in units of the cache's one scale, then 64 zeros. It is what AITER's
                persistent kernels read. They also read row 0 for lanes that have no key, so the first block is zeros and belongs to no
                slot: slot s is row `block_size + s`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _checks

LATENT_DIM = 512
ROPE_DIM = 64
NOPE_DIM = LATENT_DIM - ROPE_DIM
SCALE_TILE = 64
SCALE_TILES = NOPE_DIM // SCALE_TILE
PACKED_ROW_BYTES = NOPE_DIM + 2 * ROPE_DIM
PACKED_SCALE_BYTES = 8
PACKED_TOKEN_BYTES = PACKED_ROW_BYTES + PACKED_SCALE_BYTES
AITER_ROW_BYTES = 576
# Writers of fp8_ds_mla round a block's bytes up to a multiple of this.
PACKED_STRIDE_MULTIPLE = 576


@dataclass(frozen=True)
class Layout:
    """One way of keeping a latent. `code` is `enum class Layout` of ffi/common/params.h."""

    name: str
    code: int
    dtype: Any
    token_bytes: int
    zero_blocks: int = 0  # at the front of `data`, of no slot

    @property
    def row(self) -> int:
        """Numbers a slot in `data`, for layouts that keep nothing but rows."""
        return self.token_bytes // jnp.dtype(self.dtype).itemsize


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("fp8_ds_mla", 0, jnp.uint8, PACKED_TOKEN_BYTES),
        Layout("bf16", 1, jnp.bfloat16, 2 * LATENT_DIM),
        Layout("float32", 2, jnp.float32, 4 * LATENT_DIM),
        Layout("aiter_fp8", 3, jnp.uint8, AITER_ROW_BYTES, zero_blocks=1),
    )
}


@jax.tree_util.register_pytree_with_keys_class
class KVCache:
    """A paged cache of latents; a pytree whose one leaf is `data`.

    Args:
      data: the bytes, by layout.
        `"fp8_ds_mla"`: uint8 [num_blocks, block_stride_bytes], with any stride of at least block_size * 584. The bytes that another engine
        wrote can be wrapped as they are, also as vLLM sees them: [num_blocks, block_size, 584].
        `"bf16"`, `"float32"`: [num_blocks, block_size, 512] of that dtype.
        `"aiter_fp8"`: uint8 [1 + num_blocks, block_size, 576], the first block zeros.
      block_size: slots in a block.
      layout: `"fp8_ds_mla"`, `"bf16"`, `"float32"` or `"aiter_fp8"`.
      scale: `"aiter_fp8"`: what a stored number is multiplied by, a positive Python float. The largest magnitude that can be kept is
        448 * scale, the smallest that is not rounded to zero scale / 1024. Other layouts: 1.

    Bytes that no valid slot of a call names may be anything, NaN included.

    Raises:
      ValueError: a wrong dtype or shape, a stride that is too small, more slots than int32 can number.
    """

    data: jax.Array
    block_size: int
    layout: str
    scale: float
    __slots__ = ("block_size", "data", "layout", "scale")
    _OP: ClassVar[str] = "KVCache"

    def __init__(self, data: jax.Array, *, block_size: int, layout: str = "fp8_ds_mla", scale: float = 1.0):
        spec = _layout(layout, self._OP)
        block_size = _checks.require_int(block_size, self._OP, "block_size", 1)
        _checks.require_dtype(data, self._OP, "data", spec.dtype)
        if layout == "fp8_ds_mla":
            if data.ndim == 3 and data.shape[1:] == (block_size, PACKED_TOKEN_BYTES):
                data = data.reshape(data.shape[0], block_size * PACKED_TOKEN_BYTES)
            _checks.require_shape(data, self._OP, "data", "(num_blocks, block_stride_bytes)", (None, None))
            least = block_size * PACKED_TOKEN_BYTES
            rule = f"be at least block_size * {PACKED_TOKEN_BYTES} = {least} bytes"
            _checks.require(data.shape[1] >= least, self._OP, "data's block stride", rule, data.shape[1])
        else:
            blocks = "1 + num_blocks" if spec.zero_blocks else "num_blocks"
            names, shape = f"({blocks}, block_size, {spec.row})", (None, block_size, spec.row)
            _checks.require_shape(data, self._OP, "data", names, shape)
        _checks.require(data.shape[0] >= spec.zero_blocks, self._OP, "data", "begin with a block of zeros", data.shape)
        _checks.require_fits_int32(data.shape[0] * block_size, self._OP, "num_blocks * block_size")
        _require_scale(scale, spec, self._OP)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "block_size", block_size)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "scale", float(scale))

    @classmethod
    def create(
        cls,
        num_blocks: int,
        block_size: int,
        layout: str = "fp8_ds_mla",
        *,
        block_stride_bytes: int | None = None,
        scale: float = 1.0,
    ) -> KVCache:
        """A cache of zeros.

        `block_stride_bytes` is for `"fp8_ds_mla"` alone; default: as FlashMLA and vLLM pad a block, to a multiple of 576.
        """
        op = "KVCache.create"
        spec = _layout(layout, op)
        num_blocks = _checks.require_int(num_blocks, op, "num_blocks", 0)
        block_size = _checks.require_int(block_size, op, "block_size", 1)
        _checks.require_fits_int32(num_blocks * block_size, op, "num_blocks * block_size")
        if layout == "fp8_ds_mla":
            if block_stride_bytes is None:
                block_stride_bytes = -(-block_size * PACKED_TOKEN_BYTES // PACKED_STRIDE_MULTIPLE) * PACKED_STRIDE_MULTIPLE
            stride = _checks.require_int(block_stride_bytes, op, "block_stride_bytes", block_size * PACKED_TOKEN_BYTES)
            shape: tuple[int, ...] = (num_blocks, stride)
        else:
            _checks.require(block_stride_bytes is None, op, "block_stride_bytes", f"be left out for layout {layout!r}", block_stride_bytes)
            shape = (spec.zero_blocks + num_blocks, block_size, spec.row)
        return cls(jnp.zeros(shape, spec.dtype), block_size=block_size, layout=layout, scale=scale)

    @property
    def num_blocks(self) -> int:
        """Blocks that hold slots."""
        return self.data.shape[0] - LAYOUTS[self.layout].zero_blocks

    @property
    def num_slots(self) -> int:
        """num_blocks * block_size. Slots are numbered from 0."""
        return self.num_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes of `data`."""
        return int(np.prod(self.data.shape, dtype=np.int64)) * self.data.dtype.itemsize

    def replace(self, data: jax.Array) -> KVCache:
        """The same cache with other bytes."""
        return KVCache(data, block_size=self.block_size, layout=self.layout, scale=self.scale)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"KVCache is immutable; use append() or replace() instead of setting {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        # For copy and pickle. No checks here either: a tree's leaves may be anything.
        return _restored, (self.data, self.block_size, self.layout, self.scale)

    def __repr__(self) -> str:
        kind, shape = getattr(self.data, "dtype", self.data), list(getattr(self.data, "shape", ()))
        return f"KVCache(layout={self.layout!r}, block_size={self.block_size}, data={kind}{shape})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], tuple[int, str, float]]:
        return ((jax.tree_util.GetAttrKey("data"), self.data),), (self.block_size, self.layout, self.scale)

    @classmethod
    def tree_unflatten(cls, aux: tuple[int, str, float], children: Any) -> KVCache:
        # Transformations put placeholders where arrays were: no checks here.
        cache = object.__new__(cls)
        for name, value in zip(("data", "block_size", "layout", "scale"), (*children, *aux)):
            object.__setattr__(cache, name, value)
        return cache


def _restored(data: Any, *aux: Any) -> KVCache:
    return KVCache.tree_unflatten(aux, (data,))


class Scope(NamedTuple):
    """A cache, and the slots of it that each token attends to.

    Args:
      cache: a KVCache.
      indices: int32 [*batch, topk], slots in any order. An entry that is -1, or any other value outside the cache, is passed over.
      lengths: int32 [*batch], how many leading entries of `indices` count. The rest may be anything. Clamped to [0, topk]; default topk.
    """

    cache: KVCache
    indices: jax.Array
    lengths: jax.Array | None = None


# So that exported functions may take and return them, and still be serialised.
jax.export.register_pytree_node_serialization(
    KVCache,
    serialized_name="jax_dsv4.KVCache",
    serialize_auxdata=lambda aux: json.dumps(aux).encode(),
    deserialize_auxdata=lambda encoded: tuple(json.loads(encoded)),
)
jax.export.register_namedtuple_serialization(Scope, serialized_name="jax_dsv4.Scope")


def dequantize(cache: KVCache, slots: jax.Array | None = None) -> jax.Array:
    """The latents as float32.

    Args:
      cache: what to read.
      slots: int32 of any shape; default: every slot. A slot outside the cache reads as zeros.

    Returns:
      float32 [*slots.shape, 512].
    """
    op = "dequantize"
    _checks.require(isinstance(cache, KVCache), op, "cache", "be a KVCache", type(cache).__name__)
    if slots is None:
        slots = jnp.arange(cache.num_slots, dtype=jnp.int32)
    _checks.require_dtype(slots, op, "slots", jnp.int32)
    _checks.require_same_devices(op, cache=cache, slots=slots)
    return _dequantized(cache, slots)


# Compiled as one also outside of jit, where JAX would otherwise see what no result holds: NaN of a row that stands in for none.
@partial(jax.jit, inline=True)
def _dequantized(cache: KVCache, slots: jax.Array) -> jax.Array:
    valid = valid_slots(cache, slots)
    return jnp.where(valid[..., None], read_rows(cache, jnp.where(valid, slots, 0)), 0)


def valid_slots(cache: KVCache, slots: jax.Array) -> jax.Array:
    return (slots >= 0) & (slots < cache.num_slots)


def read_rows(cache: KVCache, slots: jax.Array) -> jax.Array:
    """The latents of valid slots as float32 [*slots.shape, 512]."""
    if cache.num_slots == 0:
        return jnp.zeros((*slots.shape, LATENT_DIM), jnp.float32)
    block, offset = slots // cache.block_size, slots % cache.block_size
    if cache.layout == "aiter_fp8":
        codes = cache.data[LAYOUTS[cache.layout].zero_blocks + block, offset, :LATENT_DIM]
        return _from_e4m3(codes) * jnp.float32(cache.scale)
    if cache.layout != "fp8_ds_mla":
        return cache.data[block, offset].astype(jnp.float32)
    rows = _gather_bytes(cache.data, block, offset * PACKED_ROW_BYTES, PACKED_ROW_BYTES)
    scale_bytes = _gather_bytes(cache.data, block, cache.block_size * PACKED_ROW_BYTES + offset * PACKED_SCALE_BYTES, SCALE_TILES)
    nope = _from_e4m3(rows[..., :NOPE_DIM]).reshape(*slots.shape, SCALE_TILES, SCALE_TILE) * _from_ue8m0(scale_bytes)[..., None]
    rope = _from_bf16(rows[..., NOPE_DIM:].reshape(*slots.shape, ROPE_DIM, 2))
    return jnp.concatenate([nope.reshape(*slots.shape, NOPE_DIM), rope], axis=-1)


def write_rows(cache: KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
    """`cache.data` with latents [count, 512] at slots [count], in plain JAX."""
    # Scatter does not say which of equal slots wins: keep the last of each run of a stable sort, and drop the others.
    order = jnp.argsort(slots, stable=True)
    in_order = slots[order]
    last = jnp.concatenate([in_order[1:] != in_order[:-1], jnp.ones(min(1, slots.shape[0]), bool)])
    keep = jnp.zeros(slots.shape, bool).at[order].set(last) & valid_slots(cache, slots)
    block = jnp.where(keep, slots // cache.block_size, cache.num_blocks)  # past the end: dropped
    offset = slots % cache.block_size
    if cache.layout == "aiter_fp8":
        codes = jnp.pad(_to_e4m3(latents.astype(jnp.float32) * _inverse(cache.scale)), ((0, 0), (0, AITER_ROW_BYTES - LATENT_DIM)))
        return cache.data.at[LAYOUTS[cache.layout].zero_blocks + block, offset].set(codes, mode="drop")
    if cache.layout != "fp8_ds_mla":
        return cache.data.at[block, offset].set(latents.astype(cache.data.dtype), mode="drop")
    rows, scales = quantize(latents)
    data = _scatter_bytes(cache.data, block, offset * PACKED_ROW_BYTES, rows)
    return _scatter_bytes(data, block, cache.block_size * PACKED_ROW_BYTES + offset * PACKED_SCALE_BYTES, scales)


def quantize(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents [count, 512] to uint8 rows [count, 576] and scale groups [count, 8] of `"fp8_ds_mla"`."""
    latents = latents.astype(jnp.float32)
    tiles = latents[:, :NOPE_DIM].reshape(-1, SCALE_TILES, SCALE_TILE)
    amax = jnp.max(jnp.where(jnp.isnan(tiles), 0, jnp.abs(tiles)), axis=-1)
    # The smallest k with amax <= 448 * 2^k, from amax's bits: amax = 1.m * 2^e and 448 = 1.75 * 2^8.
    bits = jax.lax.bitcast_convert_type(jnp.maximum(amax, jnp.float32(1e-4)), jnp.int32)
    k = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    k = jnp.where(jnp.isinf(amax), 127, k)
    # 2^-k in two factors, for no factor may be subnormal (XLA may flush it).
    half = k // 2
    power = jax.lax.bitcast_convert_type(jnp.stack([127 - half, 127 - (k - half)]) << 23, jnp.float32)[..., None]
    nope = _to_e4m3(tiles * power[0] * power[1])
    rope = _to_bf16(latents[:, NOPE_DIM:])
    rows = jnp.concatenate([nope.reshape(-1, NOPE_DIM), rope.reshape(-1, 2 * ROPE_DIM)], axis=-1)
    return rows, jnp.pad((k + 127).astype(jnp.uint8), ((0, 0), (0, PACKED_SCALE_BYTES - SCALE_TILES)))


def _to_e4m3(values: jax.Array) -> jax.Array:
    """Codes of e4m3fn, saturated; 0x7F for NaN."""
    codes = jax.lax.bitcast_convert_type(jnp.clip(values, -448, 448).astype(jnp.float8_e4m3fn), jnp.uint8)
    return jnp.where(jnp.isnan(values), jnp.uint8(0x7F), codes)


def _from_e4m3(codes: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


# Bytes and bfloat16 by shifts: a program that is exported with symbolic sizes cannot be run where a bitcast changes the number of numbers.


def _to_bf16(values: jax.Array) -> jax.Array:
    """The two bytes of each, the lower first, along one more dimension."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return jnp.stack([bits, bits >> jnp.uint16(8)], axis=-1).astype(jnp.uint8)


def _from_bf16(codes: jax.Array) -> jax.Array:
    low, high = (codes[..., i].astype(jnp.uint32) for i in range(2))
    return jax.lax.bitcast_convert_type((low | high << jnp.uint32(8)) << jnp.uint32(16), jnp.float32)


def _from_ue8m0(codes: jax.Array) -> jax.Array:
    """2^(code - 127), and NaN for 255: the code is float32's exponent, but for the two that float32 has for something else."""
    bits = codes.astype(jnp.int32) << 23
    bits = jnp.where(codes == 0, jnp.int32(1 << 22), jnp.where(codes == 255, jnp.int32(0x7FC00000), bits))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _inverse(scale: float) -> np.float32:
    """As the kernels compute it, so that appends agree to the bit."""
    return np.float32(1) / np.float32(scale)


def _gather_bytes(data: jax.Array, block: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """data[block, start : start + count] for every entry of `block` and `start`."""
    dims = jax.lax.GatherDimensionNumbers(offset_dims=(block.ndim,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    return jax.lax.gather(data, jnp.stack([block, start], axis=-1), dims, (1, count), mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _scatter_bytes(data: jax.Array, block: jax.Array, start: jax.Array, values: jax.Array) -> jax.Array:
    """data[block, start : start + values.shape[1]] = values, rows whose block is out of range dropped."""
    dims = jax.lax.ScatterDimensionNumbers(update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1))
    return jax.lax.scatter(data, jnp.stack([block, start], axis=-1), values, dims, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def _require_scale(scale: float, spec: Layout, op: str) -> None:
    is_number = isinstance(scale, (int, float, np.floating)) and not isinstance(scale, bool)
    _checks.require(is_number, op, "scale", "be a Python float", f"{type(scale).__name__} {scale!r}")
    # Within these neither the scale nor its inverse is subnormal in float32.
    _checks.require(2.0**-100 <= scale <= 2.0**100, op, "scale", "be positive, from 2**-100 to 2**100", scale)
    _checks.require(spec.name == "aiter_fp8" or scale == 1, op, "scale", f"be 1 for layout {spec.name!r}", scale)


def _layout(name: str, op: str) -> Layout:
    rule = "be one of " + ", ".join(repr(n) for n in LAYOUTS)
    _checks.require(isinstance(name, str) and name in LAYOUTS, op, "layout", rule, repr(name))
    return LAYOUTS[name]
