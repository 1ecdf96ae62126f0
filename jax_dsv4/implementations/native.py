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
    """How a platform wants its plans: workers that get work, keys per block, and in blocks the cost of an item and what cutting tokens
    adds to it (0: they are cut where AITER cuts them)."""

    workers: int
    granularity: int
    overhead: int
    cut_cost: int = 0


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
    call = jax.ffi.ffi_call(target, plan_shapes(tokens, workers))
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
        )
    )


def partial_rows(tokens: int, scopes: Sequence[kv.Scope], geometry: Geometry) -> int:
    """Partial rows that a plan can name at most for a call on these scopes."""
    _, partials = plan_capacity(tokens, geometry.workers)
    topk = sum(s.indices.shape[1] for s in scopes)
    return max(1, min(partials, tokens * -(-topk // geometry.granularity)))


def decode_call(
    q: jax.Array,
    scopes: Sequence[kv.Scope],
    attn_sink: jax.Array | None,
    scale: float,
    work: WorkPlan,
    out_dtype: jax.typing.DTypeLike,
    workspaces: Sequence[jax.ShapeDtypeStruct],
) -> tuple[jax.Array, jax.Array]:
    """The target dsv4_decode; `workspaces` are the results that a platform's kernels need besides out and lse."""
    tokens, heads, _ = q.shape
    results = (jax.ShapeDtypeStruct(q.shape, out_dtype), jax.ShapeDtypeStruct((tokens, heads), jnp.float32), *workspaces)
    assert scopes[0].lengths is not None
    swa, extra = (*scopes, _absent_scope(scopes[0].lengths))[:2]
    out, lse, *_ = jax.ffi.ffi_call("dsv4_decode", results)(
        q,
        jnp.zeros((0,), jnp.float32) if attn_sink is None else attn_sink,
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


def append_call(cache: kv.KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
    """The target dsv4_append, in place where XLA can."""
    call = jax.ffi.ffi_call("dsv4_append", jax.ShapeDtypeStruct(cache.data.shape, cache.data.dtype), input_output_aliases={0: 0})
    return call(cache.data, latents, slots, block_size=np.int32(cache.block_size), layout=np.int32(kv.LAYOUTS[cache.layout].code))


class _CPU:
    """The C++ kernels of ffi/cpu, on XLA's own threads."""

    name = "cpu"
    platforms: tuple[str, ...] = ("cpu",)
    fuses = True
    # ffi/cpu/launch.h: kLaneBytesFixed, kLaneBytesPerHead + kFoldBytesPerHead, kTokenCounters, kMaxSegments, kPartialNumbers; 64 bytes
    # more to align.
    # One lane a thread; threads beyond the lanes stay idle. No more than this machine has cores: fresh pages cost more than the kernel's
    # work on a small call.
    lanes = min(32, os.cpu_count() or 1)
    lane_bytes_fixed = 160 * 1024 + 64
    lane_bytes_per_head = 7 * 1024 + 64
    counters_per_token = 10
    max_segments = 10
    partial_numbers = 2
    # Of all partials, if one token's take no more: the allocator gives larger blocks back, and fresh pages cost time in every call.
    partial_bytes = 16 * 2**20

    def availability(self) -> Availability:
        library, detail = _ffi.load("libdsv4_cpu", "cpu")
        if library is None:
            return Availability(False, detail)
        return Availability(True, f"{_ffi.cpu_isa(library)} kernels, {detail}")

    def exportable(self) -> bool:
        return False  # every process has a CPU: absent means absent

    def unsupported(self, num_heads: int, caches: Sequence[kv.KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        if any(cache.layout == "aiter_fp8" for cache in caches):
            return "it does not read layout 'aiter_fp8'"
        return None

    def geometry(self, tokens: int) -> Geometry:
        # Enough items for all threads to end at about the same time. Results do not depend on it: a token's keys are summed in segments of
        # its own, wherever the plan cuts it. But partials cost time. More threads than items share an item's heads.
        return Geometry(workers=min(16, max(4 * self.lanes, -(-16 // max(tokens, 1)))), granularity=64, overhead=2)

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int) -> WorkPlan:
        return plan_call(lengths, topks, self.geometry(lengths[0].shape[0]))

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
        # A plan for so many workers cuts less tokens than that, and a token that is cut has a row for each of its segments at most. One
        # that gets no rows is not cut.
        geometry = self.geometry(tokens)
        cut = min(tokens, geometry.workers - 1)
        segments = min(self.max_segments, -(-sum(s.indices.shape[1] for s in scopes) // geometry.granularity))
        partials = max(1, min(cut * segments, max(segments, self.partial_bytes // (4 * kv.LATENT_DIM * heads))))
        f32, i32 = jnp.float32, jnp.int32
        workspaces = (
            jax.ShapeDtypeStruct((partials, heads, kv.LATENT_DIM), f32),  # partial outputs
            jax.ShapeDtypeStruct((partials, heads * self.partial_numbers), f32),  # partial maxima and sums
            jax.ShapeDtypeStruct((tokens, self.counters_per_token), i32),  # items not yet done, and rows
            jax.ShapeDtypeStruct((self.lanes, self.lane_bytes_fixed + self.lane_bytes_per_head * heads), jnp.uint8),
        )
        return decode_call(q, scopes, attn_sink, scale, work, out_dtype, workspaces)

    def append(self, cache: kv.KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        return append_call(cache, latents, slots)


class _CUDA:
    """The Hopper kernels of ffi/cuda."""

    name = "cuda"
    platforms: tuple[str, ...] = ("cuda",)
    fuses = True
    heads_per_block = 64  # ffi/cuda/launch.h: kHeadsPerBlock
    partial_heads = 8  # and kPartialHeads
    few_heads = 32  # up to which narrow_kernel takes all: ffi/cuda/decode.cu
    # Of the largest Hopper, so that a program does not depend on the device; ffi/cuda/handlers.cc plans for the one it runs on.
    multiprocessors = 132

    def availability(self) -> Availability:
        try:
            devices = _cuda_devices()
        except RuntimeError as error:
            return Availability(False, f"JAX has no CUDA device: {error}".splitlines()[0])
        for device in devices:
            if device.compute_capability != "9.0":
                return Availability(
                    False, f"it needs compute capability 9.0 (Hopper); {device.device_kind} has {device.compute_capability}"
                )
        library, detail = _ffi.load("libdsv4_cuda", "CUDA")
        return Availability(library is not None, detail if library is None else f"Hopper kernels, {detail}")

    def exportable(self) -> bool:
        # Where there is a device, what it and the library cannot do is known.
        try:
            return not _cuda_devices()
        except RuntimeError:
            return True

    def unsupported(self, num_heads: int, caches: Sequence[kv.KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        if q_dtype is not None and q_dtype != jnp.bfloat16:
            return f"its kernels take q in bfloat16, not {jnp.dtype(q_dtype).name}"
        for cache in caches:
            if cache.layout != "fp8_ds_mla":
                return f"its kernels read caches in layout 'fp8_ds_mla', not {cache.layout!r}"
        return None

    def geometry(self, num_heads: int) -> Geometry:
        # Items end at multiples of the kernel's tile of 64 keys; starting one costs about as much as two tiles. Partial results, which all
        # multiprocessors write at once, cost more of the tiles of many heads than of few.
        workers = max(1, self.multiprocessors // -(-num_heads // self.heads_per_block))
        return Geometry(workers, granularity=64, overhead=2, cut_cost=2 if num_heads > self.few_heads else 1)

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int) -> WorkPlan:
        return plan_call(lengths, topks, self.geometry(num_heads))

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
        partials = partial_rows(tokens, scopes, self.geometry(heads))
        stored_heads = -(-heads // self.partial_heads) * self.partial_heads
        partials = -(-partials * stored_heads // heads)
        workspaces = (
            jax.ShapeDtypeStruct((partials, heads, kv.LATENT_DIM), jnp.float32),  # partial outputs
            jax.ShapeDtypeStruct((partials, heads), jnp.float32),  # partial lse
            jax.ShapeDtypeStruct((tokens, 0), jnp.int32),  # no counters
        )
        return decode_call(q, scopes, attn_sink, scale, work, out_dtype, workspaces)

    def append(self, cache: kv.KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        return append_call(cache, latents, slots)


def _cuda_devices() -> list[jax.Device]:
    return jax.devices("cuda")


def _absent_scope(lengths: jax.Array) -> kv.Scope:
    """Operands of no bytes, and lengths that are not looked at: zeros would be filled in by a kernel of their own in every call."""
    cache = kv.KVCache(jnp.zeros((0, kv.PACKED_TOKEN_BYTES), jnp.uint8), block_size=1)
    return kv.Scope(cache, jnp.zeros((*lengths.shape, 0), jnp.int32), lengths)


CPU = _CPU()
CUDA = _CUDA()
