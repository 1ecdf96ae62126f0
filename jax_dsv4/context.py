"""Context parallelism: one cache's blocks spread over a mesh axis, each device attending to those that it holds.

Inside `jax.shard_map`, with the mesh axis "context":

    window = dsv4.split_scope(swa, "context")  # each device has it whole
    mine = dsv4.local_scope(dsv4.Scope(my_blocks, slots, lengths), "context")
    out, lse = dsv4.sparse_mla_decode(q, window, mine, out_dtype=jnp.float32, return_lse=True)
    out, lse = dsv4.merge_over_axis(out, lse, "context")
    out = dsv4.apply_attn_sink(out, lse, attn_sink).astype(q.dtype)

Slots number the whole cache; which device holds one is a matter of its block's number alone. With n devices of m blocks each:

`"contiguous"`   block b is block b % m of device b // m: the blocks of an array that is split over its first axis.
`"interleaved"`  block b is block b // n of device b % n: neighbours are on different devices, so that the newest blocks, or those of one
                 request, are not all on one.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_dsv4 import _checks
from jax_dsv4._checks import AxisName
from jax_dsv4._sharding import varying_axes
from jax_dsv4.cache import KVCache, Scope, require_scope
from jax_dsv4.merge import merge_parts

PLACEMENTS = ("contiguous", "interleaved")


def local_slots(cache: KVCache, slots: jax.Array, axis_name: AxisName, *, placement: str = "contiguous") -> jax.Array:
    """This device's slots of those that number the whole cache, such as `append` needs.

    Args:
      cache: what this device holds of the cache; every device holds as many blocks.
      slots: int32 of any shape, the same on every device of the axis.
      axis_name: the mesh axis, or axes, over which the cache's blocks are spread.
      placement: `"contiguous"` or `"interleaved"`.

    Returns:
      int32 like `slots`: the slot in `cache`; -1 for one that another device holds, and for one outside the whole cache.

    Raises:
      ValueError: a wrong dtype or placement; no such axis here; more slots in all than int32 can number.
    """
    return _local_slots("local_slots", cache, "slots", slots, axis_name, placement)


def local_scope(scope: Scope, axis_name: AxisName, *, placement: str = "contiguous") -> Scope:
    """The part of a scope that this device holds: what to attend to here, before `merge_over_axis`.

    Takes O(topk) a token. Make it once where layers share their slots.

    Args:
      scope: this device's blocks of the cache, and each token's slots in the whole of it, the same on every device of the axis.
      axis_name, placement: as in `local_slots`.

    Returns:
      A Scope with indices [*batch, topk] in this device's blocks: the valid ones first, in their order, and -1 after them; and with the
      lengths that count these. A device that holds none of a token's slots has length 0 there.

    Raises:
      ValueError: as `local_slots`, or shapes that do not fit.
    """
    op = "local_scope"
    require_scope(scope, op, "scope")
    cache, indices, lengths = scope
    slots = _local_slots(op, cache, "indices", indices, axis_name, placement)
    _checks.require(slots.ndim >= 1, op, "indices", "have shape (*batch, topk)", slots.shape)
    *batch, topk = slots.shape
    mine = (slots >= 0).reshape(math.prod(batch), topk)
    if lengths is not None:
        _checks.require_dtype(lengths, op, "lengths", jnp.int32)
        _checks.require_shape(lengths, op, "lengths", "(*batch,)", batch)
        mine &= jnp.arange(topk, dtype=jnp.int32)[None] < lengths.reshape(-1, 1)
    place = jnp.where(mine, jnp.cumsum(mine, axis=1, dtype=jnp.int32) - 1, topk)  # past the end: dropped
    token = jnp.arange(mine.shape[0], dtype=jnp.int32)[:, None]
    packed = jnp.full(mine.shape, -1, jnp.int32).at[token, place].set(slots.reshape(mine.shape), mode="drop")
    count = jnp.sum(mine, axis=1, dtype=jnp.int32)
    return Scope(cache, packed.reshape(*batch, topk), count.reshape(batch))


def split_scope(scope: Scope, axis_name: AxisName) -> Scope:
    """This device's part of a scope whose cache every device has whole: of n devices, each takes every n-th entry of a token.

    Devices have equal numbers of entries, or one more. Then `merge_over_axis`, as with `local_scope`.

    Args:
      scope: a cache and each token's slots in it, the same on every device of the axis.
      axis_name: the mesh axis, or axes, over which to divide each token's entries.

    Returns:
      A Scope with indices [*batch, ceil(topk / n)]: entry i of device d is entry i * n + d of the token, -1 where there is none; and with
      the lengths that count those before the token's length.

    Raises:
      ValueError: a wrong dtype; shapes that do not fit; no such axis here.
    """
    op = "split_scope"
    require_scope(scope, op, "scope")
    cache, indices, lengths = scope
    _checks.require_dtype(indices, op, "indices", jnp.int32)
    _checks.require(indices.ndim >= 1, op, "indices", "have shape (*batch, topk)", tuple(indices.shape))
    *batch, topk = indices.shape
    if lengths is None:
        lengths = jnp.full(batch, topk, jnp.int32)
    _checks.require_dtype(lengths, op, "lengths", jnp.int32)
    _checks.require_shape(lengths, op, "lengths", "(*batch,)", batch)
    devices = _checks.require_axis(axis_name, op)
    device, share = jax.lax.axis_index(axis_name), -(-topk // devices)
    padded = jnp.pad(indices, [(0, 0)] * len(batch) + [(0, share * devices - topk)], constant_values=-1)
    mine = jax.lax.dynamic_index_in_dim(padded.reshape(*batch, share, devices), device, axis=len(batch) + 1, keepdims=False)
    return Scope(cache, mine, (jnp.clip(lengths, 0, topk) - device + devices - 1) // devices)


def merge_over_axis(
    out: jax.Array,
    lse: jax.Array,
    axis_name: AxisName,
    *,
    scatter_dimension: int | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`merge_scopes` across devices: each has attended to the part of the keys that it holds. For use in `jax.shard_map`.

    Each device merges its share of the rows: one all-to-all brings it every device's `out` and `lse` of them, as they are, side by side
    in one array; then it is `merge_scopes` in the order of the devices. Of n devices each sends (n - 1) / n of its `out` and `lse`.

    Without `scatter_dimension` the merged shares are then gathered, `out` and `lse` each in an all-gather, of (n - 1) / n of the result.
    Shares are of all rows of the flattened [*batch, heads], padded where n does not divide them: there is no other path.

    With it, nothing more moves: a device keeps its share, for what comes next to go on with, such as its part of the output projection.
    The results are then laid out like those of `jax.lax.psum_scatter(..., tiled=True)`: an `out_specs` with the axis in that dimension
    puts them together. Heads can be shared out (-2) as well as any batch axis (0, ...).

    Apply the sink to the result, once; to a share of heads that share of the sink.

    Parts travel in `out`'s dtype, and nothing is rounded on the way. Parts that were rounded before are another matter: where parts of
    opposite sign cancel, bfloat16 ones miss FlashMLA's tolerances in rare numbers. `sparse_mla_decode(..., out_dtype=jnp.float32)` makes
    parts that do not, of twice the bytes. Cast to float16, they are as short as in bfloat16 and eight times as exact; but what exceeds
    65504 becomes infinite.

    Args:
      out: [*batch, heads, dim] float32, bfloat16 or float16, this device's part, normalised over its own keys (without sink).
      lse: float32 [*batch, heads], natural log; -inf on a device without keys, whose `out` is then not looked at.
      axis_name: the mesh axis, or axes, over which the keys are spread.
      scatter_dimension: a batch axis or the heads of `out`, whose size n divides; not its last dimension.
      out_dtype: of the merged `out`, which is rounded once, and before it is gathered. Default: as it came.

    Returns:
      `out` in `out_dtype` and `lse` float32: the same on every device of the axis, or the i-th n-th of `scatter_dimension` on its i-th
      device. Where every part is empty: zeros and -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit; no such axis here; a dimension that cannot be shared out.
      NotImplementedError: a derivative.
    """
    op = "merge_over_axis"
    _checks.require_dtype(out, op, "out", *_checks.PARTS)
    _checks.require(out.ndim >= 2, op, "out", "have shape (*batch, heads, dim)", tuple(out.shape))
    _checks.require_shape(lse, op, "lse", "(*batch, heads)", out.shape[:-1])
    _checks.require_dtype(lse, op, "lse", jnp.float32)
    dtype = jnp.dtype(out.dtype if out_dtype is None else out_dtype)
    _checks.require(dtype in _checks.PARTS, op, "out_dtype", "be float32 or bfloat16 or float16", dtype.name)
    devices = _checks.require_axis(axis_name, op)
    rows = lse.shape
    if scatter_dimension is None:
        shares = _shares_of_rows(out.reshape(-1, out.shape[-1]), devices), _shares_of_rows(lse.reshape(-1), devices)
        merged = _merge_shares(*shares, axis_name, dtype)
        out, lse = (_gather(each, axis_name)[: math.prod(rows)].reshape(*rows, *each.shape[1:]) for each in merged)
        return out, lse
    _checks.require_int(scatter_dimension, op, "scatter_dimension", -out.ndim, out.ndim - 1)
    dimension = scatter_dimension % out.ndim
    _checks.require(dimension < lse.ndim, op, "scatter_dimension", "be a batch axis or the heads of out", scatter_dimension)
    rule = f"be divided by the {devices} devices of the axis"
    _checks.require(rows[dimension] % devices == 0, op, f"out.shape[{scatter_dimension}]", rule, rows[dimension])
    split = (*rows[:dimension], devices, rows[dimension] // devices, *rows[dimension + 1 :])
    shares = jnp.moveaxis(out.reshape(*split, out.shape[-1]), dimension, 0), jnp.moveaxis(lse.reshape(split), dimension, 0)
    return _merge_shares(*shares, axis_name, dtype)


def _shares_of_rows(rows: jax.Array, devices: int) -> jax.Array:
    """[rows, ...] as [devices, share, ...]; rows that are missing in the last share are zeros."""
    share = -(-len(rows) // devices)
    padding = [(0, share * devices - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(devices, share, *rows.shape[1:])


def _merge_shares(outs: jax.Array, lses: jax.Array, axis_name: AxisName, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """out [*share, dim] and lse [*share] of this device's share, from [devices, *share, dim] and [devices, *share]: every device's part
    of every device's share."""

    # Both in one array, or there would be two collectives. As integers: a float of 32 bits is no two numbers of 16.
    @jax.custom_jvp
    def exchange(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
        count, numbers = len(outs), math.prod(outs.shape[1:])
        packed = jnp.concatenate([_bits(x, outs.dtype).reshape(count, -1) for x in (outs, lses)], axis=1)
        received = jax.lax.all_to_all(packed, axis_name, 0, 0, tiled=True)
        halves = lses.dtype.itemsize // outs.dtype.itemsize
        lse_bits = received[:, numbers:].reshape(*lses.shape, *[halves] * (halves > 1))
        return tuple(
            jax.lax.bitcast_convert_type(bits, like.dtype)
            for bits, like in ((received[:, :numbers].reshape(outs.shape), outs), (lse_bits, lses))
        )  # type: ignore[return-value]

    @exchange.defjvp
    def derivative(*_: Any) -> Any:
        raise NotImplementedError("merge_over_axis: it has no derivative; merge_scopes has one")

    outs, lses = exchange(outs, lses)
    return merge_parts(list(outs), list(lses), dtype)


def _gather(share: jax.Array, axis_name: AxisName) -> jax.Array:
    """All devices' shares, side by side, as bits: to gather numbers of 16 bits a CPU makes them twice as long."""
    # Types that say so where they say that the shares differ: results are the same on all devices.
    varying = set(axis_name if isinstance(axis_name, tuple) else (axis_name,)) <= varying_axes(share)
    gathered = jax.lax.all_gather(_bits(share, share.dtype), axis_name, tiled=True, to="invarying" if varying else "varying")
    return jax.lax.bitcast_convert_type(gathered, share.dtype)


def _bits(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x as integers of dtype's size; with one more dimension if x's numbers are longer."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else jnp.uint32)


def _local_slots(op: str, cache: KVCache, argument: str, slots: jax.Array, axis_name: AxisName, placement: str) -> jax.Array:
    _checks.require(isinstance(cache, KVCache), op, "cache", "be a KVCache", type(cache).__name__)
    _checks.require_dtype(slots, op, argument, jnp.int32)
    rule = "be one of " + ", ".join(repr(p) for p in PLACEMENTS)
    _checks.require(placement in PLACEMENTS, op, "placement", rule, repr(placement))
    devices = _checks.require_axis(axis_name, op)
    _checks.require_fits_int32(devices * cache.num_slots, op, "slots of all devices")
    block, offset = jnp.divmod(slots, cache.block_size)
    blocks = max(cache.num_blocks, 1)
    device, mine = jnp.divmod(block, blocks) if placement == "contiguous" else reversed(jnp.divmod(block, devices))
    here = (device == jax.lax.axis_index(axis_name)) & (slots >= 0) & (mine < cache.num_blocks)
    return jnp.where(here, mine * cache.block_size + offset, -1)
