"""How softmax attention over disjoint sets of keys combines: scopes, and shards of a context."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_dsv4 import _checks


def merge_scopes(outs: Sequence[jax.Array], lses: Sequence[jax.Array], *, empty_lse: float = -math.inf) -> tuple[jax.Array, jax.Array]:
    """The attention over a union of keys, from the attention over each of its disjoint parts.

        lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) * out_i

    Args:
      outs: arrays [*batch, heads, dim] of one dtype, float32, bfloat16 or float16, one a part, normalised over its own keys (without sink).
      lses: float32 arrays [*batch, heads], natural log; -inf for a part without keys, whose `out` is then not looked at.
      empty_lse: what `lses` have for a part without keys. -inf, as everywhere in this package, or +inf, as FlashMLA and vLLM write it.

    Returns:
      `out` in the parts' dtype and `lse` float32. Where every part is empty: zeros and -inf, whatever `empty_lse` is.

    Raises:
      ValueError: shapes, dtypes or numbers of parts that do not fit; an `empty_lse` that is no infinity.
    """
    op = "merge_scopes"
    _checks.require(len(outs) > 0 and len(outs) == len(lses), op, "outs and lses", "be as many, at least one", (len(outs), len(lses)))
    _checks.require_dtype(outs[0], op, "outs[0]", *_checks.PARTS)
    for i, (out, lse) in enumerate(zip(outs, lses)):
        _checks.require_dtype(out, op, f"outs[{i}]", outs[0].dtype)
        _checks.require_shape(out, op, f"outs[{i}]", "outs[0].shape", outs[0].shape)
        _checks.require_dtype(lse, op, f"lses[{i}]", jnp.float32)
        _checks.require_shape(lse, op, f"lses[{i}]", "(*batch, heads)", outs[0].shape[:-1])
    _checks.require_same_devices(op, outs=list(outs), lses=list(lses))
    empty_lse = _checks.require_float(empty_lse, op, "empty_lse")
    _checks.require(math.isinf(empty_lse), op, "empty_lse", "be -inf or +inf", empty_lse)
    if empty_lse > 0:
        lses = [jnp.where(jnp.isposinf(lse), -jnp.inf, lse) for lse in lses]
    return merge_parts(outs, lses, outs[0].dtype)


def merge_parts(outs: Sequence[jax.Array], lses: Sequence[jax.Array], dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    # Not jnp.max over them as one array: XLA's loses NaN in large ones on a CPU, and the row would pass for empty.
    top = functools.reduce(jnp.maximum, [lse.astype(jnp.float32) for lse in lses])
    first, *others = (_weighed(out, lse, top) for out, lse in zip(outs, lses))
    out, total = first
    for other_out, weight in others:
        out, total = out + other_out, total + weight
    return _normalised(out, total, top, dtype)


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
      out: [*batch, heads, dim] attention without sink, float32, bfloat16 or float16.
      lse: float32 [*batch, heads], natural log.
      attn_sink: float32 [heads], not scaled. -inf: no sink; +inf: the result is zero.

    Returns:
      Like `out`; zeros where lse is -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    op = "apply_attn_sink"
    _checks.require_dtype(out, op, "out", *_checks.PARTS)
    _checks.require(out.ndim >= 2, op, "out", "have shape (*batch, heads, dim)", tuple(out.shape))
    _checks.require_dtype(lse, op, "lse", jnp.float32)
    _checks.require_shape(lse, op, "lse", "(*batch, heads)", out.shape[:-1])
    _checks.require_dtype(attn_sink, op, "attn_sink", jnp.float32)
    _checks.require_shape(attn_sink, op, "attn_sink", "(heads,)", out.shape[-2:-1])
    _checks.require_same_devices(op, out=out, lse=lse, attn_sink=attn_sink)
    sink = jnp.where(jnp.isneginf(lse), 0, jnp.broadcast_to(attn_sink, lse.shape))
    factor = jax.nn.sigmoid(lse - sink)
    scaled = (out.astype(jnp.float32) * factor[..., None]).astype(out.dtype)
    return jnp.where((factor == 0)[..., None], jnp.zeros((), out.dtype), scaled)
