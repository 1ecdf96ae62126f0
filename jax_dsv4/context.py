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

import jax
import jax.numpy as jnp

from jax_dsv4 import _checks
from jax_dsv4._checks import AxisName
from jax_dsv4.cache import KVCache, Scope

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
    return _local_slots("local_slots", cache, slots, axis_name, placement)


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
    cache, indices, lengths = scope
    slots = _local_slots(op, cache, indices, axis_name, placement)
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
    """This device's part of a scope whose cache every device has whole: with n devices each n-th entry of a token, so that all have as
    many, but for one. Then `merge_over_axis`, as with `local_scope`.

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


def _local_slots(op: str, cache: KVCache, slots: jax.Array, axis_name: AxisName, placement: str) -> jax.Array:
    _checks.require(isinstance(cache, KVCache), op, "cache", "be a KVCache", type(cache).__name__)
    _checks.require_dtype(slots, op, "slots", jnp.int32)
    rule = "be one of " + ", ".join(repr(p) for p in PLACEMENTS)
    _checks.require(placement in PLACEMENTS, op, "placement", rule, repr(placement))
    devices = _checks.require_axis(axis_name, op)
    _checks.require_fits_int32(devices * cache.num_slots, op, "slots of all devices")
    block, offset = jnp.divmod(slots, cache.block_size)
    blocks = max(cache.num_blocks, 1)
    device, mine = jnp.divmod(block, blocks) if placement == "contiguous" else reversed(jnp.divmod(block, devices))
    here = (device == jax.lax.axis_index(axis_name)) & (slots >= 0) & (mine < cache.num_blocks)
    return jnp.where(here, mine * cache.block_size + offset, -1)
