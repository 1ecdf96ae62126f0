"""The ops as custom calls. CPU and CUDA have the same targets with the same operands, which ffi/common/bind.h binds and checks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _ffi
from jax_dsv4 import cache as kv
from jax_dsv4.implementations._interface import Availability
from jax_dsv4.plan import WorkPlan

# A plan's arrays have room for any platform's plan, so that one traced program can be lowered for several.
MAX_WORKERS = 320


@dataclass(frozen=True)
class Geometry:
    """How a platform wants its plans: workers that get work, keys per block, and the cost of an item in blocks."""

    workers: int
    granularity: int
    overhead: int


def plan_capacity(tokens: int, workers: int) -> tuple[int, int]:
    """(items, partial rows) that a plan for `workers` has at most; plan_max_partials of ffi/common/plan.h."""
    return tokens + workers - 1, max(1, min(tokens + workers - 1, 2 * (workers - 1)))


def plan_shapes(tokens: int, workers: int = MAX_WORKERS) -> WorkPlan:
    items, partials = plan_capacity(tokens, workers)
    shapes = ((tokens,), (workers + 1,), (items, 8), (tokens + 1,), (tokens, 2), (partials,))
    return WorkPlan(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))  # type: ignore[arg-type]


def plan_call(
    lengths: Sequence[jax.Array],
    topks: Sequence[int],
    geometry: Geometry,
    workers: int = MAX_WORKERS,
    target: str = "dsv4_plan",
) -> WorkPlan:
    """A planner's target; `workers` is the size of work_indptr less one."""
    tokens = lengths[0].shape[0]
    absent = jnp.zeros((tokens,), jnp.int32)
    call = jax.ffi.ffi_call(target, plan_shapes(tokens, workers))
    swa_topk, extra_topk = (*topks, 0)[:2]
    return WorkPlan(
        *call(
            lengths[0],
            lengths[1] if len(lengths) > 1 else absent,
            swa_topk=np.int32(swa_topk),
            extra_topk=np.int32(extra_topk),
            active_workers=np.int32(geometry.workers),
            granularity=np.int32(geometry.granularity),
            overhead=np.int32(geometry.overhead),
        )
    )


class _CPU:
    """The C++ kernels of ffi/cpu, on XLA's own threads."""

    name = "cpu"
    platforms: tuple[str, ...] = ("cpu",)
    fuses = True
    # The plan must not depend on how many threads there are, or results would. 16 workers cut a single token into enough items for
    # a few threads; more threads than items share an item's heads.
    geometry = Geometry(workers=16, granularity=64, overhead=2)
    # ffi/cpu/launch.h: kLaneBytesFixed, kLaneBytesPerHead, kMaxHeadGroups; 64 bytes more to align.
    # One lane a thread; threads beyond the lanes stay idle. No more than this machine has cores: fresh pages cost more than the kernel's
    # work on a small call.
    lanes = min(32, os.cpu_count() or 1)
    lane_bytes_fixed = 160 * 1024 + 64
    lane_bytes_per_head = 5 * 1024
    counters_per_token = 8

    def availability(self) -> Availability:
        library, detail = _ffi.load("libdsv4_cpu", "cpu")
        if library is None:
            return Availability(False, detail)
        return Availability(True, f"{_ffi.cpu_isa(library)} kernels, {detail}")

    def exportable(self) -> bool:
        return False  # every process has a CPU: absent means absent

    def unsupported(self, num_heads: int, caches: Sequence[kv.KVCache]) -> str | None:
        if any(cache.layout == "aiter_fp8" for cache in caches):
            return "it does not read layout 'aiter_fp8'"
        return None

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int) -> WorkPlan:
        return plan_call(lengths, topks, self.geometry)

    def decode(
        self,
        q: jax.Array,
        scopes: Sequence[kv.Scope],
        attn_sink: jax.Array | None,
        scale: float,
        work: WorkPlan | None,
        out_dtype: jax.typing.DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        assert work is not None
        tokens, heads, _ = q.shape
        topk = sum(s.indices.shape[1] for s in scopes)
        _, partials = plan_capacity(tokens, self.geometry.workers)
        partials = max(1, min(partials, tokens * -(-topk // self.geometry.granularity)))
        f32, i32 = jnp.float32, jnp.int32
        results = (
            jax.ShapeDtypeStruct(q.shape, out_dtype),
            jax.ShapeDtypeStruct((tokens, heads), f32),  # lse
            jax.ShapeDtypeStruct((partials, heads, kv.LATENT_DIM), f32),  # workspace: partial outputs
            jax.ShapeDtypeStruct((partials, heads), f32),  # workspace: partial lse
            jax.ShapeDtypeStruct((tokens, self.counters_per_token), i32),  # workspace: partials not yet done
            jax.ShapeDtypeStruct((self.lanes, self.lane_bytes_fixed + self.lane_bytes_per_head * heads), jnp.uint8),
        )
        swa, extra = (*scopes, _absent_scope(tokens))[:2]
        out, lse, *_ = jax.ffi.ffi_call("dsv4_decode", results)(
            q,
            jnp.zeros((heads,), f32) if attn_sink is None else attn_sink,
            *(swa.cache.data, swa.indices, swa.lengths),
            *(extra.cache.data, extra.indices, extra.lengths),
            *work,
            scale=np.float32(scale),
            has_sink=attn_sink is not None,
            swa_block_size=np.int32(swa.cache.block_size),
            swa_layout=np.int32(kv.LAYOUTS[swa.cache.layout].code),
            extra_block_size=np.int32(extra.cache.block_size),
            extra_layout=np.int32(kv.LAYOUTS[extra.cache.layout].code),
        )
        return out, lse

    def append(self, cache: kv.KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        call = jax.ffi.ffi_call("dsv4_append", jax.ShapeDtypeStruct(cache.data.shape, cache.data.dtype), input_output_aliases={0: 0})
        code = kv.LAYOUTS[cache.layout].code
        return call(cache.data, latents, slots, block_size=np.int32(cache.block_size), layout=np.int32(code))


def _absent_scope(tokens: int) -> kv.Scope:
    cache = kv.KVCache(jnp.zeros((0, kv.PACKED_TOKEN_BYTES), jnp.uint8), block_size=1)
    return kv.Scope(cache, jnp.zeros((tokens, 0), jnp.int32), jnp.zeros((tokens,), jnp.int32))


CPU = _CPU()
