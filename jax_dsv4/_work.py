"""Plans as data: the work of kernel calls, what a plan was made for, and how large its arrays are.

The format is AITER's (work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map; see ffi/common/params.h), on
every platform.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp

# A plan's arrays have room for any platform's plan, so that one traced program can be lowered for several.
MAX_WORKERS = 320
# Of one call; ffi/common/params.h.
MAX_HEADS = 128
# Where a batch-invariant plan cuts a token's keys: at multiples of it.
SEGMENT_KEYS = 1280


class WorkPlan(NamedTuple):
    """The work of one kernel call; int32 arrays. Rows past those in use are zeros.

    Args:
      kv_lengths: [tokens] the lengths it was made for, clamped and summed over the call's scopes. A decode whose lengths are others
        answers those tokens with NaN.
      work_indptr: [workers + 1] worker w runs items work_indptr[w] to work_indptr[w + 1].
      work_info_set: [max_items, 8] token, row of the partial buffers or -1, q_start, q_end, kv_start, kv_end, keys of the token after
        kv_end, 0.
      reduce_indptr: [tokens + 1] a token's range in reduce_partial_map; empty where the token is not split.
      reduce_final_map: [tokens, 2] q_start, q_end of split tokens.
      reduce_partial_map: [max_partials] rows of the partial buffers, in kv order.
    """

    kv_lengths: jax.Array
    work_indptr: jax.Array
    work_info_set: jax.Array
    reduce_indptr: jax.Array
    reduce_final_map: jax.Array
    reduce_partial_map: jax.Array


class PlanKey(NamedTuple):
    """What a call must have in common with its plan, besides the lengths themselves."""

    tokens: int
    num_heads: int
    swa_topk: int
    extra_topk: int
    implementation: str | tuple[str, ...] | None
    fused: bool | None
    batch_invariant: bool


@dataclass(frozen=True)
class DecodePlan:
    """A step's plan: a pytree of int32 arrays, and what it was made for.

    `work` holds one WorkPlan, or one per scope where an implementation calls its kernel per scope.
    """

    work: tuple[WorkPlan, ...]
    made_for: PlanKey


@dataclass(frozen=True)
class Geometry:
    """How a platform wants its plans: workers that get work, keys per block, and in blocks the cost of an item, what cutting tokens adds
    to it (0: they are cut where AITER cuts them), and the segments that tokens are cut into (0: they are cut where workers are full)."""

    workers: int
    granularity: int
    overhead: int
    cut_cost: int = 0
    segment: int = 0


def most_segments(topk: int, batch_invariant: bool) -> int:
    """Of a token with `topk` keys in a batch-invariant plan; 0 in others."""
    return max(1, -(-topk // SEGMENT_KEYS)) if batch_invariant else 0


def plan_capacity(tokens: int, workers: int, segments: int = 1) -> tuple[int, int]:
    """(items, partial rows) that a plan for `workers` has at most, with or without so many segments to a token; plan_max_items and
    plan_max_partials of ffi/common/plan.h."""
    partials = min(tokens + workers - 1, 2 * (workers - 1))
    return tokens * segments + workers - 1, max(1, partials, tokens * segments if segments > 1 else 0)


def plan_shapes(tokens: int, workers: int = MAX_WORKERS, segments: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Those of a WorkPlan's arrays, in order."""
    items, partials = plan_capacity(tokens, workers, segments)
    shapes = ((tokens,), (workers + 1,), (items, 8), (tokens + 1,), (tokens, 2), (partials,))
    return tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)


def partial_rows(tokens: int, topk: int, geometry: Geometry, segments: int = 1) -> int:
    """Partial rows that a plan can name at most for a call with `topk` keys a token."""
    _, partials = plan_capacity(tokens, geometry.workers, segments)
    return max(1, min(partials, tokens * -(-topk // geometry.granularity)))


def _encoded_key(aux: tuple[PlanKey]) -> bytes:
    return json.dumps(aux[0]).encode()


def _decoded_key(encoded: bytes) -> tuple[PlanKey]:
    key = PlanKey(*json.loads(encoded))
    # JSON has no tuples.
    return (key._replace(implementation=tuple(key.implementation) if isinstance(key.implementation, list) else key.implementation),)


jax.tree_util.register_dataclass(DecodePlan, data_fields=["work"], meta_fields=["made_for"])
# So that exported functions may take and return plans, and still be serialised.
jax.export.register_namedtuple_serialization(WorkPlan, serialized_name="jax_dsv4.WorkPlan")
jax.export.register_pytree_node_serialization(
    DecodePlan, serialized_name="jax_dsv4.DecodePlan", serialize_auxdata=_encoded_key, deserialize_auxdata=_decoded_key
)
