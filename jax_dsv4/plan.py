"""plan_decode: who computes what in a step, made on the device from the step's lengths.

The format is AITER's (work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map; see ffi/common/params.h), on
every platform. A plan is good for every call of the step that has the same lengths, head count and topk: one per kind of layer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from jax_dsv4 import _checks


class WorkPlan(NamedTuple):
    """The work of one kernel call; int32 arrays. Rows past those in use are zeros.

    kv_lengths          [tokens] the lengths it was made for (clamped; summed over the call's scopes). A decode whose lengths are
                        others answers those tokens with NaN.
    work_indptr         [workers + 1] worker w runs items work_indptr[w] to work_indptr[w + 1]
    work_info_set       [max_items, 8] token, row of the partial buffers or -1, q_start, q_end, kv_start, kv_end, keys of the token
                        after kv_end, 0
    reduce_indptr       [tokens + 1] a token's range in reduce_partial_map; empty where the token is not split
    reduce_final_map    [tokens, 2] q_start, q_end of split tokens
    reduce_partial_map  [max_partials] rows of the partial buffers, in kv order
    """

    kv_lengths: jax.Array
    work_indptr: jax.Array
    work_info_set: jax.Array
    reduce_indptr: jax.Array
    reduce_final_map: jax.Array
    reduce_partial_map: jax.Array


@dataclass(frozen=True)
class DecodePlan:
    """A step's plan: a pytree of int32 arrays, and what it was made for.

    `work` holds one WorkPlan, or one per scope where an implementation calls its kernel per scope.
    """

    work: tuple[WorkPlan, ...]
    made_for: PlanKey


class PlanKey(NamedTuple):
    """What a call must have in common with its plan, besides the lengths themselves."""

    tokens: int
    num_heads: int
    swa_topk: int
    extra_topk: int
    implementation: str | tuple[str, ...] | None
    fused: bool | None


jax.tree_util.register_dataclass(DecodePlan, data_fields=["work"], meta_fields=["made_for"])


def _decoded_key(encoded: bytes) -> tuple[PlanKey]:
    key = PlanKey(*json.loads(encoded))
    # JSON has no tuples.
    return (key._replace(implementation=tuple(key.implementation) if isinstance(key.implementation, list) else key.implementation),)


# So that exported functions may take and return plans, and still be serialised.
jax.export.register_namedtuple_serialization(WorkPlan, serialized_name="jax_dsv4.WorkPlan")
jax.export.register_pytree_node_serialization(
    DecodePlan,
    serialized_name="jax_dsv4.DecodePlan",
    serialize_auxdata=lambda aux: json.dumps(aux[0]).encode(),
    deserialize_auxdata=_decoded_key,
)


def plan_decode(
    swa_lengths: jax.Array,
    extra_lengths: jax.Array | None = None,
    *,
    num_heads: int,
    swa_topk: int,
    extra_topk: int = 0,
    implementation: str | tuple[str, ...] | None = None,
    fused: bool | None = None,
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
      implementation, fused: as they will be given to `sparse_mla_decode`.

    Returns:
      A DecodePlan.

    Raises:
      ValueError: a wrong shape or dtype, or sizes beyond int32.
      NotImplementedError: no such implementation here.
    """
    op = "plan_decode"
    _checks.require_dtype(swa_lengths, op, "swa_lengths", jnp.int32)
    _checks.require_int(num_heads, op, "num_heads", 1, 128)
    _checks.require_int(swa_topk, op, "swa_topk", 0)
    _checks.require_int(extra_topk, op, "extra_topk", 0)
    batch = tuple(swa_lengths.shape)
    lengths = [swa_lengths]
    if extra_lengths is None:
        _checks.require(extra_topk == 0, op, "extra_topk", "be 0 without extra_lengths", extra_topk)
    else:
        _checks.require_dtype(extra_lengths, op, "extra_lengths", jnp.int32)
        _checks.require_shape(extra_lengths, op, "extra_lengths", "(*batch,) of swa_lengths", batch)
        lengths.append(extra_lengths)
    tokens = math.prod(batch)
    _checks.require_fits_int32(tokens * (swa_topk + extra_topk), op, "tokens * (swa_topk + extra_topk)")
    from jax_dsv4.implementations import plan_work, spelling  # they build on this module

    topks = (swa_topk, extra_topk)[: len(lengths)]
    key = PlanKey(tokens, num_heads, swa_topk, extra_topk, spelling(implementation), fused)
    return DecodePlan(plan_work(lengths, topks, key), key)
