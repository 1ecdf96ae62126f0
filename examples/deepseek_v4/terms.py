"""A sublayer's output that is left to be summed: where the residual streams take it in, a kernel of deepseek_v4/fused.py sums it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Routed(NamedTuple):
    """What experts say to s tokens, left to be weighed."""

    experts: Array  # float32 [parts, s · k or more, d]; garbage where a pair of a token and a choice has no expert
    chosen: Array  # int32 [s, k]; −1 is no expert
    weight: Array  # float32 [s, k]


class Terms(NamedTuple):
    """What a sublayer says to s tokens: the sum of all."""

    dense: Array  # [parts, s or more, 1, d]
    routed: Routed | None = None

    @classmethod
    def of(cls, y: Array | Terms) -> Terms:
        """An array [b, t, d] is one term."""
        return y if isinstance(y, Terms) else cls(y.reshape(1, -1, 1, y.shape[-1]))


def total(y: Array | Terms, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
    """[b, t, d] of `dtype`; an array is left as it is."""
    if not isinstance(y, Terms):
        return y
    found = y.dense[:, : shape[0] * shape[1], 0].sum(axis=0, dtype=jnp.float32)
    if y.routed is not None:
        experts, chosen, weight = y.routed
        each = experts[:, : chosen.size].sum(axis=0).reshape(*chosen.shape, -1)
        found += jnp.where(chosen[..., None] >= 0, each * weight[..., None], 0).sum(axis=1)
    return found.reshape(shape).astype(dtype)
