"""`"cuda"`: the Hopper kernels of ffi/cuda."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_dsv4 import _ffi
from jax_dsv4._implementations.interface import Availability, KernelCall
from jax_dsv4._implementations.native import append_call, decode_call, plan_call
from jax_dsv4._work import SEGMENT_KEYS, Geometry, WorkPlan, most_segments, partial_rows
from jax_dsv4.cache import LATENT_DIM, KVCache


class _CUDA:
    name = "cuda"
    platforms: tuple[str, ...] = ("cuda",)
    fuses = True
    batch_invariant = True
    # ffi/cuda/launch.h: kHeadsPerBlock, kFewHeads, kPartialHeads, kMostProcessors.
    heads_per_block = 64
    few_heads = 32
    partial_heads = 8
    # Of the largest Hopper, so that a program does not depend on the device; ffi/cuda/handlers.cc plans for the one it runs on.
    multiprocessors = 132
    # So many to a worker are left whole: where they are placed follows from sums alone, and no worker has much more than another.
    whole_tokens = 32

    def availability(self) -> Availability:
        try:
            devices = _devices()
        except RuntimeError as error:
            reason = f"JAX has no CUDA device: {error}".splitlines()[0]
            return Availability(False, reason if _ffi.has_plugin("cuda") else f"{reason} (pip install 'jax[cuda13]')")
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
            return not _devices()
        except RuntimeError:
            return True

    def unsupported(self, num_heads: int, caches: Sequence[KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        if q_dtype is not None and q_dtype != jnp.bfloat16:
            return f"its kernels take q in bfloat16, not {jnp.dtype(q_dtype).name}"
        for cache in caches:
            if cache.layout == "float32" or cache.layout.startswith("aiter_"):
                return f"its kernels do not read layout {cache.layout!r}"
        return None

    def geometry(self, num_heads: int, batch_invariant: bool = False) -> Geometry:
        # Items end at multiples of the kernel's tile of 64 keys; starting one costs about as much as two tiles. Partial results, which all
        # multiprocessors write at once, cost more of the tiles of many heads than of few.
        workers = max(1, self.multiprocessors // -(-num_heads // self.heads_per_block))
        cut_cost, segment = 2 if num_heads > self.few_heads else 1, SEGMENT_KEYS // 64 if batch_invariant else 0
        return Geometry(workers, granularity=64, overhead=2, cut_cost=cut_cost, segment=segment)

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int, segments: int) -> WorkPlan:
        geometry = self.geometry(num_heads, segments > 0)
        if segments == 0 and lengths[0].shape[0] >= self.whole_tokens * geometry.workers:
            geometry = replace(geometry, segment=max(1, -(-sum(topks) // geometry.granularity)))
        return plan_call(lengths, topks, geometry, segments=max(1, segments))

    def decode(self, call: KernelCall) -> tuple[jax.Array, jax.Array]:
        tokens, heads, _ = call.q.shape
        stored_heads = -(-heads // self.partial_heads) * self.partial_heads
        segments = max(1, most_segments(sum(call.topks), call.batch_invariant))
        partials = -(-partial_rows(tokens, sum(call.topks), self.geometry(heads), segments) * stored_heads // heads)
        workspaces = (
            jax.ShapeDtypeStruct((partials, heads, LATENT_DIM), jnp.float32),  # partial outputs
            jax.ShapeDtypeStruct((partials, heads), jnp.float32),  # partial lse
            jax.ShapeDtypeStruct((tokens, 0), jnp.int32),  # no counters
        )
        return decode_call(call, workspaces)

    def append(self, cache: KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        return append_call(cache, latents, slots)


def _devices() -> list[jax.Device]:
    try:
        return jax.devices("cuda")
    except AssertionError:  # of JAX 0.10, for JAX_PLATFORMS=cuda where the plugin is not installed
        raise RuntimeError(f"no backend for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}") from None


CUDA = _CUDA()
