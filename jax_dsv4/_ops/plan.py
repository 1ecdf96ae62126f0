"""plan_decode: who computes what in a step, made on the device from the step's lengths.

A plan is good for every call of the step that has the same lengths, head count and topk: one per kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_dsv4 import _checks
from jax_dsv4._implementations import Chosen, cannot_fuse, choose, fuses, names, varies
from jax_dsv4._implementations.interface import Implementation
from jax_dsv4._sharding import Dims
from jax_dsv4._transforms import apply, dispatch
from jax_dsv4._work import MAX_HEADS, DecodePlan, PlanKey, WorkPlan, most_segments, plan_shapes

_OP = "plan_decode"


def plan_decode(
    swa_lengths: jax.Array,
    extra_lengths: jax.Array | None = None,
    *,
    num_heads: int,
    swa_topk: int,
    extra_topk: int = 0,
    implementation: str | Sequence[str] | None = None,
    fused: bool | None = None,
    batch_invariant: bool = False,
) -> DecodePlan:
    """Plans a step on the device, from its current lengths.

    Make it once per step and kind of layer and pass it to every `sparse_mla_decode` of that kind; without `plan=` each call plans for
    itself. It is cheap, and under jit it costs no host round trip. A plan is of one kernel call: inside `jax.shard_map`, of one device's.

    Args:
      swa_lengths: [*batch] int32, the `lengths` of the swa scope. Any value; clamped to [0, swa_topk].
      extra_lengths: the same for the extra scope, if there is one.
      num_heads: query heads, 1 to 128.
      swa_topk: last dimension of the swa scope's indices.
      extra_topk: last dimension of the extra scope's indices; 0 without extra scope.
      implementation, fused, batch_invariant: as they will be given to `sparse_mla_decode`.

    Returns:
      A DecodePlan.

    Raises:
      ValueError: a wrong shape or dtype, or sizes beyond int32.
      NotImplementedError: no such implementation here.
    """
    _checks.require_dtype(swa_lengths, _OP, "swa_lengths", jnp.int32)
    num_heads = _checks.require_int(num_heads, _OP, "num_heads", 1, MAX_HEADS)
    swa_topk = _checks.require_int(swa_topk, _OP, "swa_topk", 0)
    extra_topk = _checks.require_int(extra_topk, _OP, "extra_topk", 0)
    fused = None if fused is None else _checks.require_bool(fused, _OP, "fused")
    batch_invariant = _checks.require_bool(batch_invariant, _OP, "batch_invariant")
    batch = tuple(swa_lengths.shape)
    _checks.require_constant(_OP, "swa_lengths", "shape", *batch)
    lengths = [swa_lengths]
    if extra_lengths is None:
        _checks.require(extra_topk == 0, _OP, "extra_topk", "be 0 without extra_lengths", extra_topk)
    else:
        _checks.require_dtype(extra_lengths, _OP, "extra_lengths", jnp.int32)
        _checks.require_shape(extra_lengths, _OP, "extra_lengths", "(*batch,) of swa_lengths", batch)
        lengths.append(extra_lengths)
    tokens = math.prod(batch)
    _checks.require_fits_int32(tokens * (swa_topk + extra_topk), _OP, "tokens * (swa_topk + extra_topk)")
    _checks.require_same_devices(_OP, swa_lengths=swa_lengths, extra_lengths=extra_lengths)
    key = PlanKey(tokens, num_heads, swa_topk, extra_topk, names(_OP, implementation), fused, batch_invariant)
    chosen = choose(_OP, implementation, lambda i: cannot_fuse(i, fused) or varies(i, batch_invariant) or i.unsupported(num_heads, ()))
    op = _Plan(chosen, (swa_topk, extra_topk)[: len(lengths)], key)
    arrays = op.blank() * op.count if tokens == 0 else apply(op, tuple(lengths))
    fields = len(WorkPlan._fields)
    return DecodePlan(tuple(WorkPlan(*arrays[i : i + fields]) for i in range(0, len(arrays), fields)), key)


@dataclass(frozen=True)
class _Plan:
    """The op with its static arguments. Its operands are the lengths of each scope, its results the arrays of `count` WorkPlans."""

    chosen: Chosen
    topks: tuple[int, ...]
    key: PlanKey
    name: str = _OP

    @property
    def count(self) -> int:
        """All platforms' plans have one structure: as many WorkPlans as the one that calls most often needs, blank ones for the others."""
        return 1 if all(fuses(i, self.key.fused) for i in self.chosen.implementations) else len(self.topks)

    @property
    def segments(self) -> int:
        """Of a token, over both scopes: one WorkPlan has the same shape whether it is of one scope or of both."""
        return most_segments(self.key.swa_topk + self.key.extra_topk, self.key.batch_invariant)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return plan_shapes(self.key.tokens, segments=max(1, self.segments))

    def blank(self) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(x.shape, x.dtype) for x in self.shapes())

    def on_device(self, lengths: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return dispatch(self.chosen, self._plan, tuple(n.reshape(-1) for n in lengths))

    def _plan(self, implementation: Implementation, lengths: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        fused = fuses(implementation, self.key.fused)
        calls = [(lengths, self.topks)] if fused else [((n,), (k,)) for n, k in zip(lengths, self.topks)]
        made = [implementation.plan(*call, self.key.num_heads, self.segments) or self.blank() for call in calls]
        return sum(made, ()) + self.blank() * (self.count - len(made))

    def dims(self, lengths: tuple[jax.Array, ...]) -> tuple[Sequence[Dims], Sequence[Dims]]:
        """A plan is of a whole call, so of all its lengths; a device that has a part of the call plans that for itself (decode.py)."""
        return [Dims.unsplit(n) for n in lengths], [Dims.unsplit(x) for x in self.shapes()] * self.count

    def batch(
        self, size: int, lengths: tuple[jax.Array, ...], batched: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, ...], Callable[..., tuple[jax.Array, ...]]]:
        raise NotImplementedError(f"{_OP}: lengths must not be batched by vmap: a plan is of one call, made for all its tokens at once")
