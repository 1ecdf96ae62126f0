"""`"cpu"`: the C++ kernels of ffi/cpu, on XLA's own threads."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_dsv4 import _ffi
from jax_dsv4._implementations.interface import Availability, KernelCall
from jax_dsv4._implementations.native import append_call, decode_call, plan_call
from jax_dsv4._work import MAX_WORKERS, Geometry, WorkPlan
from jax_dsv4.cache import LATENT_DIM, KVCache


class _CPU:
    name = "cpu"
    platforms: tuple[str, ...] = ("cpu",)
    fuses = True
    batch_invariant = True  # always: a token's keys are summed in segments of its own, wherever the plan cuts it
    # ffi/cpu/launch.h: kLaneBytesFixed, kLaneBytesPerHead + kMergeBytesPerHead, kHeadBlock, kTokenCounters, kMaxSegments,
    # kPartialNumbers, kMaxHeadGroups; 64 bytes more to align.
    lane_bytes_fixed = 272 * 1024 + 64
    lane_bytes_per_head = 7 * 1024 + 64
    head_block = 16
    counters_per_token = 10
    max_segments = 10
    partial_numbers = 2
    # One lane a thread; threads beyond the lanes stay idle. No more than this process may run at once.
    lanes = min(64, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # Of all workspaces together, which XLA asks for in one piece: the allocator gives larger ones back (glibc: from 32 MB), and fresh pages
    # cost time in every call. So tasks have fewer heads where there are many lanes, and partials have what the lanes leave.
    workspace_bytes = 30 * 2**20
    lanes_bytes = 24 * 2**20
    head_groups = 8  # at most

    def availability(self) -> Availability:
        library, detail = _ffi.load("libdsv4_cpu", "cpu")
        if library is None:
            return Availability(False, detail)
        isa = _ffi.cpu_isa(library)
        return Availability(True, f"{isa.name} kernels ({isa.why}), {detail}")

    def exportable(self) -> bool:
        return False  # every process has a CPU: absent means absent

    def unsupported(self, num_heads: int, caches: Sequence[KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        return next((f"it does not read layout {c.layout!r}" for c in caches if c.layout.startswith("aiter_")), None)

    def geometry(self, tokens: int, heads: int = head_block) -> Geometry:
        # Enough tasks for all threads to end at about the same time. Results do not depend on it: a token's keys are summed in segments of
        # its own, wherever the plan cuts it. Partials cost more than dequantising a token's keys for each of its groups of heads: where
        # these are enough, tokens are cut only if their lengths are very uneven. Where they are not enough by far, tokens are cut as finely
        # as can be.
        groups = max(1, min(self.head_groups, heads // self.head_block))
        if tokens * groups >= 2 * self.lanes:
            return Geometry(self.lanes, granularity=64, overhead=2, cut_cost=8)
        many = MAX_WORKERS if 4 * tokens * groups <= self.lanes else -(-self.lanes // groups)
        if tokens == 1 and many > 1:
            return Geometry(many, granularity=64, overhead=0)  # equal parts
        return Geometry(max(min(16, 2 * self.lanes), many), granularity=64, overhead=2)

    def lane_bytes(self, heads: int) -> int:
        blocks, groups = -(-heads // self.head_block), 1

        def with_groups(groups: int) -> int:
            return self.lane_bytes_fixed + self.lane_bytes_per_head * self.head_block * -(-blocks // groups)

        while groups < self.head_groups and self.lanes * with_groups(groups) > self.lanes_bytes:
            groups *= 2
        return with_groups(groups)

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int, segments: int) -> WorkPlan:
        return plan_call(lengths, topks, self.geometry(lengths[0].shape[0], num_heads), segments=max(1, segments))

    def decode(self, call: KernelCall) -> tuple[jax.Array, jax.Array]:
        tokens, heads, _ = call.q.shape
        # A plan for so many workers cuts less tokens than that, and a token that is cut has a row for each of its segments at most. One
        # that gets no rows is not cut.
        geometry = self.geometry(tokens, heads)
        cut = min(tokens, geometry.workers - 1)
        segments = min(self.max_segments, -(-sum(call.topks) // geometry.granularity))
        left = self.workspace_bytes - self.lanes * self.lane_bytes(heads)
        partials = max(1, min(cut * segments, max(segments, left // (4 * LATENT_DIM * heads))))
        workspaces = (
            jax.ShapeDtypeStruct((partials, heads, LATENT_DIM), jnp.float32),  # partial outputs
            jax.ShapeDtypeStruct((partials, heads * self.partial_numbers), jnp.float32),  # partial maxima and sums
            jax.ShapeDtypeStruct((tokens, self.counters_per_token), jnp.int32),  # items not yet done, and rows
            jax.ShapeDtypeStruct((self.lanes, self.lane_bytes(heads)), jnp.uint8),
        )
        return decode_call(call, workspaces)

    def append(self, cache: KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        return append_call(cache, latents, slots)


CPU = _CPU()
