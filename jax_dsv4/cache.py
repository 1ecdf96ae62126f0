"""KVCache and Scope: the latents of cached positions, in paged blocks. This file is the sole definition of their bytes on the JAX side.

Slot s is row `s % block_size` of block `s // block_size`. Layouts, for a latent of 448 "nope" and 64 rope numbers:

`"fp8_ds_mla"`  584 bytes a slot, byte-compatible with FlashMLA's MODEL1 and vLLM. A block is `block_size` rows of 576 bytes (448
                e4m3fn, then 64 bfloat16), then `block_size` groups of 8 bytes (7 ue8m0 scales, one for every 64 nope numbers, and a
                pad byte), then whatever pads it to its stride.
`"mxfp8_528"`   528 bytes a slot: 512 e4m3fn, nope and rope alike, and 16 ue8m0 scales, one for every 32 numbers. FlashMLA's V41.
`"nvfp4_288"`   288 bytes a slot: 512 e2m1 in 256 bytes, number 2k in the low half of byte k, and 32 e4m3fn scales, one for every 16
                numbers. FlashMLA's V41_FP4; for the extra scope only.
`"bf16"`        512 bfloat16 a slot.
`"float32"`     512 float32 a slot, for exactness tests (CPU and XLA).
`"aiter_fp8"`   576 bytes a slot: 512 e4m3fn, nope and rope alike, in units of the cache's one scale, then 64 zeros.
`"aiter_fp8_fnuz"`  the same in e4m3fnuz: half the value of most codes, the largest 240, 0x80 NaN.
`"aiter_bf16"`  1152 bytes a slot: 512 bfloat16, then 64 zeros.

These three are what AITER's persistent kernels read, on gfx942 in e4m3fnuz, on gfx950 in e4m3fn. They also read row 0 for lanes that have
no key, so the first block is zeros and belongs to no slot: slot s is row `block_size + s`.

DeepSeek-V4.1's two, `"mxfp8_528"` and `"nvfp4_288"`, come in two arrangements, which no byte tells apart. `"inline"`: each slot's scales
directly follow its numbers, without padding between slots. `"footer"`: the scales of all slots of a block follow the numbers of all, as in
`"fp8_ds_mla"`.
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
AITER_ROW = 576  # numbers
MXFP8_TILE, NVFP4_TILE = 32, 16
ARRANGEMENTS = ("inline", "footer")


@dataclass(frozen=True)
class Layout:
    """One way of keeping a latent. `code` is `enum class Layout` of ffi/common/params.h."""

    name: str
    code: int
    dtype: Any
    token_bytes: int
    zero_blocks: int = 0  # at the front of `data`, of no slot
    scale_bytes: int = 0  # of token_bytes; where there are any, `data` is [num_blocks, block_stride_bytes]
    stride_multiple: int = 1  # that writers round a block up to whose scales are at its end
    arrangements: tuple[str, ...] = ()  # that a cache may have, where it may have several
    extra_only: bool = False  # not for the sliding window
    codes: Any = None  # of layouts in units of the cache's one scale: the format of their bytes

    @property
    def row(self) -> int:
        """Numbers a slot in `data`, for layouts that keep nothing but rows."""
        return self.token_bytes // jnp.dtype(self.dtype).itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a slot's numbers."""
        return self.token_bytes - self.scale_bytes


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("fp8_ds_mla", 0, jnp.uint8, PACKED_TOKEN_BYTES, scale_bytes=PACKED_SCALE_BYTES, stride_multiple=576),
        Layout("bf16", 1, jnp.bfloat16, 2 * LATENT_DIM),
        Layout("float32", 2, jnp.float32, 4 * LATENT_DIM),
        Layout("aiter_fp8", 3, jnp.uint8, AITER_ROW, zero_blocks=1, codes=jnp.float8_e4m3fn),
        Layout("aiter_bf16", 4, jnp.bfloat16, 2 * AITER_ROW, zero_blocks=1),
        Layout("mxfp8_528", 5, jnp.uint8, 528, scale_bytes=16, stride_multiple=512, arrangements=ARRANGEMENTS),
        Layout("nvfp4_288", 6, jnp.uint8, 288, scale_bytes=32, stride_multiple=512, arrangements=ARRANGEMENTS, extra_only=True),
        Layout("aiter_fp8_fnuz", 7, jnp.uint8, AITER_ROW, zero_blocks=1, codes=jnp.float8_e4m3fnuz),
    )
}


@jax.tree_util.register_pytree_with_keys_class
class KVCache:
    """A paged cache of latents; a pytree whose one leaf is `data`.

    Args:
      data: the bytes, by layout.
        `"fp8_ds_mla"`: uint8 [num_blocks, block_stride_bytes], with any stride of at least block_size * 584. The bytes that another engine
        wrote can be wrapped as they are, also as vLLM sees them: [num_blocks, block_size, 584].
        `"mxfp8_528"`, `"nvfp4_288"`: likewise with 528 and 288. An inline block's stride is a multiple of these.
        `"bf16"`, `"float32"`: [num_blocks, block_size, 512] of that dtype.
        `"aiter_bf16"`, `"aiter_fp8"`, `"aiter_fp8_fnuz"`: bfloat16 or uint8 [1 + num_blocks, block_size, 576], the first block zeros.
      block_size: slots in a block.
      layout: `"fp8_ds_mla"`, `"mxfp8_528"`, `"nvfp4_288"`, `"bf16"`, `"float32"`, `"aiter_bf16"`, `"aiter_fp8"` or
        `"aiter_fp8_fnuz"`. Bytes of one of the last two, read as the other, give wrong numbers and no error.
      arrangement: `"mxfp8_528"` and `"nvfp4_288"`: where the scales are, `"inline"` or `"footer"`. Bytes read in the wrong one give wrong
        numbers and no error. Other layouts: None.
      scale: `"aiter_fp8"`, `"aiter_fp8_fnuz"`: what a stored number is multiplied by, a positive Python float. The largest magnitude that
        can be kept is 448 (240) * scale, the smallest that is not rounded to zero scale / 1024 (2048). There is no default: `fp8_scale`
        measures one. Other layouts have none.

    Bytes that no valid slot of a call names may be anything, NaN included.

    Raises:
      ValueError: a wrong dtype or shape, a stride that is too small or no multiple of an inline slot, an arrangement or a scale that is
        missing, unknown or out of place, more slots than int32 can number.
    """

    data: jax.Array
    block_size: int
    layout: str
    scale: float
    arrangement: str | None
    __slots__ = ("arrangement", "block_size", "data", "layout", "scale")
    _OP: ClassVar[str] = "KVCache"
    _AUX: ClassVar[tuple[str, ...]] = ("block_size", "layout", "scale", "arrangement")

    def __init__(
        self, data: jax.Array, *, block_size: int, layout: str = "fp8_ds_mla", scale: float | None = None, arrangement: str | None = None
    ):
        spec = _layout(layout, self._OP)
        block_size = _checks.require_int(block_size, self._OP, "block_size", 1)
        _checks.require_dtype(data, self._OP, "data", spec.dtype)
        _require_arrangement(arrangement, spec, self._OP)
        if spec.scale_bytes:
            token = spec.token_bytes
            if data.ndim == 3 and data.shape[1:] == (block_size, token):
                flat = data.shape[0], block_size * token
                data = data.update(shape=flat) if isinstance(data, jax.ShapeDtypeStruct) else data.reshape(flat)
            names = f"(num_blocks, block_size, {token}) = (*, {block_size}, {token}) or (num_blocks, block_stride_bytes)"
            _checks.require_shape(data, self._OP, "data", names, (None, None))
            rule = f"be at least block_size * {token} = {block_size * token} bytes"
            _checks.require(data.shape[1] >= block_size * token, self._OP, "data's block stride", rule, data.shape[1])
            _require_pitch(data.shape[1], spec, arrangement, self._OP, "data's block stride")
        else:
            blocks = "1 + num_blocks" if spec.zero_blocks else "num_blocks"
            names, shape = f"({blocks}, block_size, {spec.row})", (None, block_size, spec.row)
            _checks.require_shape(data, self._OP, "data", names, shape)
        _checks.require(data.shape[0] >= spec.zero_blocks, self._OP, "data", "begin with a block of zeros", data.shape)
        _checks.require_fits_int32(data.shape[0] * block_size, self._OP, "num_blocks * block_size")
        scale = _checked_scale(scale, spec, self._OP)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "block_size", block_size)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "arrangement", arrangement)

    @classmethod
    def create(
        cls,
        num_blocks: int,
        block_size: int,
        layout: str = "fp8_ds_mla",
        *,
        block_stride_bytes: int | None = None,
        scale: float | None = None,
        arrangement: str | None = None,
    ) -> KVCache:
        """A cache of zeros. `scale` is for `"aiter_fp8"` and `"aiter_fp8_fnuz"` alone, and has to be given there.

        `block_stride_bytes` is for layouts with scales; default: as FlashMLA and vLLM pad a block, to a multiple of 576 bytes
        (`"fp8_ds_mla"`) or 512 (footers), and inline blocks not at all.
        """
        op = "KVCache.create"
        spec = _layout(layout, op)
        scale = _checked_scale(scale, spec, op)
        num_blocks = _checks.require_int(num_blocks, op, "num_blocks", 0)
        block_size = _checks.require_int(block_size, op, "block_size", 1)
        _checks.require_fits_int32(num_blocks * block_size, op, "num_blocks * block_size")
        _require_arrangement(arrangement, spec, op)
        if spec.scale_bytes:
            multiple = 1 if arrangement == "inline" else spec.stride_multiple
            if block_stride_bytes is None:
                block_stride_bytes = -(-block_size * spec.token_bytes // multiple) * multiple
            stride = _checks.require_int(block_stride_bytes, op, "block_stride_bytes", block_size * spec.token_bytes)
            _require_pitch(stride, spec, arrangement, op, "block_stride_bytes")
            shape: tuple[int, ...] = (num_blocks, stride)
        else:
            _checks.require(block_stride_bytes is None, op, "block_stride_bytes", f"be left out for layout {layout!r}", block_stride_bytes)
            shape = (spec.zero_blocks + num_blocks, block_size, spec.row)
        return cls(jnp.zeros(shape, spec.dtype), block_size=block_size, layout=layout, scale=scale, arrangement=arrangement)

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
        return KVCache(data, **{name: getattr(self, name) for name in self._AUX})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"KVCache is immutable; use append() or replace() instead of setting {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        # For copy and pickle. No checks here either: a tree's leaves may be anything.
        return _restored, (self.data, *self._aux)

    def __repr__(self) -> str:
        kind, shape = getattr(self.data, "dtype", self.data), list(getattr(self.data, "shape", ()))
        arrangement = f", arrangement={self.arrangement!r}" if self.arrangement else ""
        return f"KVCache(layout={self.layout!r}{arrangement}, block_size={self.block_size}, data={kind}{shape})"

    @property
    def _aux(self) -> tuple[Any, ...]:
        return self.block_size, self.layout, self.scale, self.arrangement  # of _AUX; every call of a jitted function asks

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], tuple[Any, ...]]:
        return ((jax.tree_util.GetAttrKey("data"), self.data),), self._aux

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Any, ...]]:
        return (self.data,), self._aux

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: Any) -> KVCache:
        # Transformations put placeholders where arrays were: no checks here.
        cache = object.__new__(cls)
        for name, value in zip(("data", *cls._AUX), (*children, *aux)):
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


def require_scope(scope: Scope, op: str, name: str) -> None:
    """Checks a scope's own form; its arrays are the caller's to check."""
    _checks.require(isinstance(scope, tuple) and len(scope) == 3, op, name, "be a Scope", type(scope).__name__)
    _checks.require(isinstance(scope[0], KVCache), op, f"{name}.cache", "be a KVCache", type(scope[0]).__name__)


# So that exported functions may take and return them, and still be serialised.
jax.export.register_pytree_node_serialization(
    KVCache,
    serialized_name="jax_dsv4.KVCache",
    serialize_auxdata=lambda aux: json.dumps(aux).encode(),
    deserialize_auxdata=lambda encoded: tuple(json.loads(encoded)),
)
jax.export.register_namedtuple_serialization(Scope, serialized_name="jax_dsv4.Scope")


def fp8_scale(latents: jax.Array, layout: str = "aiter_fp8") -> float:
    """A scale for a cache, measured from the first latents: the layout's largest number, times it, is twice the largest among them.

    Args:
      latents: [*any] bfloat16 or float32, numbers at hand: a cache's scale is a constant of the programs that use it. Infinities and NaN
        are passed over.
      layout: `"aiter_fp8"` or `"aiter_fp8_fnuz"`.

    Raises:
      ValueError: a traced array, a wrong dtype, no number but zeros, or a layout without a scale.
    """
    op = "fp8_scale"
    spec = _layout(layout, op)
    scaled = " or ".join(repr(name) for name, each in LAYOUTS.items() if each.codes is not None)
    _checks.require(spec.codes is not None, op, "layout", f"be {scaled}", repr(layout))
    rule = "be an array at hand, not traced by jit"
    _checks.require(not isinstance(latents, jax.core.Tracer), op, "latents", rule, latents)
    _checks.require_dtype(latents, op, "latents", jnp.bfloat16, jnp.float32)
    magnitudes = jnp.abs(latents.astype(jnp.float32))
    largest = float(jnp.max(magnitudes, initial=0, where=jnp.isfinite(magnitudes)))
    _checks.require(largest > 0, op, "latents", "have a finite number other than 0", f"a largest magnitude of {largest}")
    return 2 * largest / float(jnp.finfo(spec.codes).max)


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
    spec = LAYOUTS[cache.layout]
    if not spec.scale_bytes:
        numbers = cache.data[spec.zero_blocks + block, offset, :LATENT_DIM]
        return numbers.astype(jnp.float32) if spec.codes is None else _from_e4m3(numbers, spec.codes) * jnp.float32(cache.scale)
    row_at, scales_at = _places(cache, offset)
    rows, scales = _gather_bytes(cache.data, block, row_at, spec.row_bytes), _gather_bytes(cache.data, block, scales_at, spec.scale_bytes)
    return _UNPACK[cache.layout](rows, scales)


def _places(cache: KVCache, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where in its block a slot's numbers begin, and where its scales; ffi/common/params.h has the same."""
    spec = LAYOUTS[cache.layout]
    if cache.arrangement == "inline":
        return offset * spec.token_bytes, offset * spec.token_bytes + spec.row_bytes
    return offset * spec.row_bytes, cache.block_size * spec.row_bytes + offset * spec.scale_bytes


def write_rows(cache: KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
    """`cache.data` with latents [count, 512] at slots [count], in plain JAX."""
    # Scatter does not say which of equal slots wins: keep the last of each run of a stable sort, and drop the others.
    order = jnp.argsort(slots, stable=True)
    in_order = slots[order]
    last = jnp.concatenate([in_order[1:] != in_order[:-1], jnp.ones(min(1, slots.shape[0]), bool)])
    keep = jnp.zeros(slots.shape, bool).at[order].set(last) & valid_slots(cache, slots)
    block = jnp.where(keep, slots // cache.block_size, cache.num_blocks)  # past the end: dropped
    offset = slots % cache.block_size
    spec = LAYOUTS[cache.layout]
    if not spec.scale_bytes:
        scaled = latents.astype(jnp.float32) * _inverse(cache.scale)
        numbers = latents.astype(spec.dtype) if spec.codes is None else _to_e4m3(scaled, spec.codes)
        numbers = jnp.pad(numbers, ((0, 0), (0, spec.row - LATENT_DIM)))
        return cache.data.at[spec.zero_blocks + block, offset].set(numbers, mode="drop")
    rows, scales = _PACK[cache.layout](latents.astype(jnp.float32))
    row_at, scales_at = _places(cache, offset)
    return _scatter_bytes(_scatter_bytes(cache.data, block, row_at, rows), block, scales_at, scales)


# Latents float32 [count, 512] to uint8 rows [count, row_bytes] and scales [count, scale_bytes], and back with any leading axes.


def _pack_fp8_ds_mla(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    tiles = latents[:, :NOPE_DIM].reshape(-1, SCALE_TILES, SCALE_TILE)
    nope, scales = _to_scaled_e4m3(tiles)
    rope = _to_bf16(latents[:, NOPE_DIM:])
    rows = jnp.concatenate([nope.reshape(-1, NOPE_DIM), rope.reshape(-1, 2 * ROPE_DIM)], axis=-1)
    return rows, jnp.pad(scales, ((0, 0), (0, PACKED_SCALE_BYTES - SCALE_TILES)))


def _unpack_fp8_ds_mla(rows: jax.Array, scales: jax.Array) -> jax.Array:
    nope = _scaled(_from_e4m3(rows[..., :NOPE_DIM]), _from_ue8m0(scales[..., :SCALE_TILES]))
    rope = _from_bf16(rows[..., NOPE_DIM:].reshape(*rows.shape[:-1], ROPE_DIM, 2))
    return jnp.concatenate([nope, rope], axis=-1)


def _pack_mxfp8(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    tiles = latents.reshape(-1, LATENT_DIM // MXFP8_TILE, MXFP8_TILE)
    codes, scales = _to_scaled_e4m3(tiles)
    finite = jnp.all(jnp.isfinite(tiles), axis=-1)
    codes = jnp.where(finite[..., None], codes, jnp.uint8(0x7F))
    return codes.reshape(-1, LATENT_DIM), jnp.where(finite, scales, jnp.uint8(0xFF))


def _unpack_mxfp8(rows: jax.Array, scales: jax.Array) -> jax.Array:
    return _scaled(_from_e4m3(rows), _from_ue8m0(scales))


def _pack_nvfp4(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Numbers are compared with the middles between values, not divided: exact, where a quotient would be rounded twice, and on some devices
    # not to nearest.
    tiles = latents.reshape(-1, LATENT_DIM // NVFP4_TILE, NVFP4_TILE)
    magnitudes, nan = jnp.abs(tiles), jnp.any(jnp.isnan(tiles), axis=-1)
    amax = _largest(magnitudes)
    codes = jnp.arange(2, 127, dtype=jnp.uint8)[None, None]
    scales = 1 + _reached(amax[..., None], (_from_e4m3(codes - 1) + _from_e4m3(codes)) / 2 * 6, codes)
    codes = jnp.arange(1, 8, dtype=jnp.uint8)[None, None, None]
    middles = (_from_e2m1(codes - 1) + _from_e2m1(codes)) / 2 * _from_e4m3(scales)[..., None, None]
    codes = _reached(magnitudes[..., None], middles, codes) | jnp.signbit(tiles).astype(jnp.uint8) << jnp.uint8(3)
    codes = jnp.where(nan[..., None], jnp.uint8(0), codes).reshape(-1, LATENT_DIM // 2, 2)
    return codes[..., 0] | codes[..., 1] << jnp.uint8(4), jnp.where(nan, jnp.uint8(0x7F), scales)


def _reached(values: jax.Array, middles: jax.Array, codes: jax.Array) -> jax.Array:
    """How many of the codes, each above a middle, are reached: at the middle itself the even ones."""
    reached = (values > middles) | ((values == middles) & (codes % 2 == 0))
    return jnp.sum(reached, axis=-1, dtype=jnp.uint8)


def _unpack_nvfp4(rows: jax.Array, scales: jax.Array) -> jax.Array:
    codes = jnp.stack([rows & jnp.uint8(15), rows >> jnp.uint8(4)], axis=-1).reshape(*rows.shape[:-1], LATENT_DIM)
    return _scaled(_from_e2m1(codes), _from_e4m3(scales))


_PACK = {"fp8_ds_mla": _pack_fp8_ds_mla, "mxfp8_528": _pack_mxfp8, "nvfp4_288": _pack_nvfp4}
_UNPACK = {"fp8_ds_mla": _unpack_fp8_ds_mla, "mxfp8_528": _unpack_mxfp8, "nvfp4_288": _unpack_nvfp4}


def _scaled(numbers: jax.Array, scales: jax.Array) -> jax.Array:
    """Numbers [..., count], each times the scale of its tile, [..., tiles]."""
    tiles = numbers.reshape(*scales.shape, numbers.shape[-1] // scales.shape[-1])
    return (tiles * scales[..., None]).reshape(numbers.shape)


def _largest(magnitudes: jax.Array) -> jax.Array:
    """Of each tile; NaN is passed over, as XLA's maximum does in some places and not in others."""
    return jnp.max(jnp.where(jnp.isnan(magnitudes), 0, magnitudes), axis=-1)


def _to_scaled_e4m3(tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes of tiles [..., tiles, numbers], and their scales as ue8m0."""
    amax = _largest(jnp.abs(tiles))
    # The smallest k with amax <= 448 * 2^k, from amax's bits: amax = 1.m * 2^e and 448 = 1.75 * 2^8.
    bits = jax.lax.bitcast_convert_type(jnp.maximum(amax, jnp.float32(1e-4)), jnp.int32)
    k = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    k = jnp.where(jnp.isinf(amax), 127, k)
    # 2^-k in two factors, for no factor may be subnormal (XLA may flush it).
    half = k // 2
    power = jax.lax.bitcast_convert_type(jnp.stack([127 - half, 127 - (k - half)]) << 23, jnp.float32)[..., None]
    return _to_e4m3(tiles * power[0] * power[1]), (k + 127).astype(jnp.uint8)


def _to_e4m3(values: jax.Array, dtype: Any = jnp.float8_e4m3fn) -> jax.Array:
    """Codes of e4m3fn or e4m3fnuz, saturated; 0x7F or 0x80 for NaN."""
    largest, nan = (448, 0x7F) if dtype == jnp.float8_e4m3fn else (240, 0x80)
    codes = jax.lax.bitcast_convert_type(jnp.clip(values, -largest, largest).astype(dtype), jnp.uint8)
    return jnp.where(jnp.isnan(values), jnp.uint8(nan), codes)


def _from_e4m3(codes: jax.Array, dtype: Any = jnp.float8_e4m3fn) -> jax.Array:
    return jax.lax.bitcast_convert_type(codes, dtype).astype(jnp.float32)


def _from_e2m1(codes: jax.Array) -> jax.Array:
    """A sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    magnitudes, half = (codes & jnp.uint8(7)).astype(jnp.uint32), jnp.uint32(126 << 23)
    bits = jnp.where(magnitudes < 2, magnitudes * half, (magnitudes << 22) + half)
    return jax.lax.bitcast_convert_type(bits | (codes & jnp.uint8(8)).astype(jnp.uint32) << 28, jnp.float32)


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


def _checked_scale(scale: float | None, spec: Layout, op: str) -> float:
    if scale is None:
        rule = f"be given for layout {spec.name!r} (fp8_scale measures one)"
        _checks.require(spec.codes is None, op, "scale", rule, scale)
        return 1.0
    scale = _checks.require_float(scale, op, "scale")
    # Within these neither the scale nor its inverse is subnormal in float32.
    _checks.require(2.0**-100 <= scale <= 2.0**100, op, "scale", "be positive, from 2**-100 to 2**100", scale)
    _checks.require(spec.codes is not None or scale == 1, op, "scale", f"be 1 for layout {spec.name!r}", scale)
    return scale


def _require_arrangement(arrangement: str | None, spec: Layout, op: str) -> None:
    wanted = " or ".join(map(repr, spec.arrangements))
    rule = f"be {wanted} for layout {spec.name!r}" if wanted else f"be left out for layout {spec.name!r}"
    _checks.require(arrangement in (spec.arrangements or (None,)), op, "arrangement", rule, repr(arrangement))


def _require_pitch(stride: int, spec: Layout, arrangement: str | None, op: str, argument: str) -> None:
    rule = f"be a multiple of {spec.token_bytes} bytes, an inline slot of layout {spec.name!r}"
    _checks.require(arrangement != "inline" or stride % spec.token_bytes == 0, op, argument, rule, stride)


def _layout(name: str, op: str) -> Layout:
    rule = "be one of " + ", ".join(repr(n) for n in LAYOUTS)
    _checks.require(isinstance(name, str) and name in LAYOUTS, op, "layout", rule, repr(name))
    return LAYOUTS[name]
