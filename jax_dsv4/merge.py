"""How softmax attention over disjoint sets of keys combines: scopes, and shards of a context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_dsv4 import _checks
from jax_dsv4._checks import AxisName
from jax_dsv4._sharding import varying_axes


def merge_scopes(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The attention over a union of keys, from the attention over each of its disjoint parts.

        lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) * out_i

    Args:
      outs: arrays [*batch, heads, dim], one a part, normalised over its own keys (without sink).
      lses: float32 arrays [*batch, heads], natural log; -inf for a part without keys, whose `out` is then not looked at.

    Returns:
      `out` in the parts' dtype and `lse` float32. Where every part is empty: zeros and -inf.

    Raises:
      ValueError: shapes or numbers of parts that do not fit.
    """
    op = "merge_scopes"
    _checks.require(len(outs) > 0 and len(outs) == len(lses), op, "outs and lses", "be as many, at least one", (len(outs), len(lses)))
    for i, (out, lse) in enumerate(zip(outs, lses)):
        _checks.require_shape(out, op, f"outs[{i}]", "outs[0].shape", outs[0].shape)
        _checks.require_shape(lse, op, f"lses[{i}]", "(*batch, heads)", outs[0].shape[:-1])
    return _merge(outs, lses, outs[0].dtype)


def _merge(outs: Sequence[jax.Array], lses: Sequence[jax.Array], dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    top = jnp.max(jnp.stack([lse.astype(jnp.float32) for lse in lses]), axis=0)
    first, *others = (_weighed(out, lse, top) for out, lse in zip(outs, lses))
    out, total = first
    for other_out, weight in others:
        out, total = out + other_out, total + weight
    return _normalised(out, total, top, dtype)


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
    floats = jnp.float32, jnp.bfloat16, jnp.float16
    _checks.require_dtype(out, op, "out", *floats)
    _checks.require(out.ndim >= 2, op, "out", "have shape (*batch, heads, dim)", tuple(out.shape))
    _checks.require_shape(lse, op, "lse", "(*batch, heads)", out.shape[:-1])
    _checks.require_dtype(lse, op, "lse", jnp.float32)
    dtype = jnp.dtype(out.dtype if out_dtype is None else out_dtype)
    _checks.require(dtype in floats, op, "out_dtype", "be float32 or bfloat16 or float16", dtype.name)
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
    return _merge(list(outs), list(lses), dtype)


def _gather(share: jax.Array, axis_name: AxisName) -> jax.Array:
    """All devices' shares, side by side, as bits: to gather numbers of 16 bits a CPU makes them twice as long."""
    # Types that say so where they say that the shares differ: results are the same on all devices.
    varying = set(axis_name if isinstance(axis_name, tuple) else (axis_name,)) <= varying_axes(share)
    gathered = jax.lax.all_gather(_bits(share, share.dtype), axis_name, tiled=True, to="invarying" if varying else "varying")
    return jax.lax.bitcast_convert_type(gathered, share.dtype)


def _bits(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x as integers of dtype's size; with one more dimension if x's numbers are longer."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else jnp.uint32)


def _weighed(out: jax.Array, lse: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A part's sum of exp(score - top) * latent, and of exp(score - top); `top` is the greatest lse of all parts."""
    weight = jnp.exp(lse.astype(jnp.float32) - jnp.where(jnp.isneginf(top), 0, top))
    return jnp.where((weight == 0)[..., None], 0, weight[..., None] * out.astype(jnp.float32)), weight


def _normalised(out: jax.Array, weight: jax.Array, top: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """The attention and its lse, from all parts' sums."""
    empty = jnp.isneginf(top)
    weight = jnp.where(empty, 1, weight)
    return (out / weight[..., None]).astype(dtype), jnp.where(empty, -jnp.inf, top + jnp.log(weight))


def apply_attn_sink(out: jax.Array, lse: jax.Array, attn_sink: jax.Array) -> jax.Array:
    """Adds exp(attn_sink) to the softmax's denominator: out * 1 / (1 + exp(attn_sink - lse)).

    Args:
      out: [*batch, heads, dim] attention without sink.
      lse: float32 [*batch, heads], natural log.
      attn_sink: float32 [heads], not scaled. -inf: no sink; +inf: the result is zero.

    Returns:
      Like `out`; zeros where lse is -inf.

    Raises:
      ValueError: shapes that do not fit.
    """
    op = "apply_attn_sink"
    _checks.require_array(out, op, "out")
    _checks.require_shape(lse, op, "lse", "(*batch, heads)", out.shape[:-1])
    _checks.require_shape(attn_sink, op, "attn_sink", "(heads,)", out.shape[-2:-1])
    sink = jnp.where(jnp.isneginf(lse), 0, jnp.broadcast_to(attn_sink, lse.shape))
    factor = jax.nn.sigmoid(lse - sink)
    scaled = (out.astype(jnp.float32) * factor[..., None]).astype(out.dtype)
    return jnp.where((factor == 0)[..., None], jnp.zeros((), out.dtype), scaled)
