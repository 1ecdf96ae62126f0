"""The targets that CPU and CUDA share, with the same operands: ffi/common/bind.h binds and checks them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import cache as kv
from jax_dsv4._implementations.interface import KernelCall
from jax_dsv4._work import MAX_WORKERS, Geometry, WorkPlan, plan_shapes


def plan_call(
    lengths: Sequence[jax.Array],
    topks: Sequence[int],
    geometry: Geometry,
    workers: int = MAX_WORKERS,
    segments: int = 1,
    target: str = "dsv4_plan",
) -> WorkPlan:
    """A planner's target; `workers` is the size of work_indptr less one, `segments` what there is room for of a token."""
    call = jax.ffi.ffi_call(target, plan_shapes(lengths[0].shape[0], workers, segments))
    swa_topk, extra_topk = (*topks, 0)[:2]
    return WorkPlan(
        *call(
            lengths[0],
            lengths[-1],  # of a scope that is absent: not looked at
            swa_topk=np.int32(swa_topk),
            extra_topk=np.int32(extra_topk),
            active_workers=np.int32(geometry.workers),
            granularity=np.int32(geometry.granularity),
            overhead=np.int32(geometry.overhead),
            cut_cost=np.int32(geometry.cut_cost),
            segment=np.int32(geometry.segment),
        )
    )


def decode_call(call: KernelCall, workspaces: Sequence[jax.ShapeDtypeStruct]) -> tuple[jax.Array, jax.Array]:
    """The target dsv4_decode; `workspaces` are the results that a platform's kernels need besides out and lse."""
    q, sink = call.q, call.attn_sink
    results = (jax.ShapeDtypeStruct(q.shape, call.out_dtype), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32), *workspaces)
    swa, extra = (*call.scopes, absent_scope(call.lengths[0]))[:2]
    out, lse, *_ = jax.ffi.ffi_call("dsv4_decode", results)(
        q,
        jnp.zeros((0,), jnp.float32) if sink is None else sink,
        *(swa.cache.data, swa.indices, swa.lengths),
        *(extra.cache.data, extra.indices, extra.lengths),
        *call.planned,
        scale=np.float32(call.scale),
        has_sink=sink is not None,
        batch_invariant=call.batch_invariant,
        swa_block_size=np.int32(swa.cache.block_size),
        swa_layout=np.int32(kv.LAYOUTS[swa.cache.layout].code),
        swa_inline=np.int32(swa.cache.arrangement == "inline"),
        extra_block_size=np.int32(extra.cache.block_size),
        extra_layout=np.int32(kv.LAYOUTS[extra.cache.layout].code),
        extra_inline=np.int32(extra.cache.arrangement == "inline"),
    )
    return out, lse


def append_call(cache: kv.KVCache, latents: jax.Array, slots: jax.Array, target: str = "dsv4_append") -> jax.Array:
    """An append's target, in place where XLA can."""
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(cache.data.shape, cache.data.dtype), input_output_aliases={0: 0})
    updated: jax.Array = call(
        *(cache.data, latents, slots),
        block_size=np.int32(cache.block_size),
        layout=np.int32(kv.LAYOUTS[cache.layout].code),
        inline=np.int32(cache.arrangement == "inline"),
    )
    return updated


def absent_scope(lengths: jax.Array) -> kv.Scope:
    """Operands of no bytes, and lengths that are not looked at: zeros would be filled in by a kernel of their own in every call."""
    cache = kv.KVCache(jnp.zeros((0, kv.PACKED_TOKEN_BYTES), jnp.uint8), block_size=1)
    return kv.Scope(cache, jnp.zeros((*lengths.shape, 0), jnp.int32), lengths)
