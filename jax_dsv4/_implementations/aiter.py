"""AITER's persistent MLA decode kernels on ROCm, layouts `"aiter_bf16"`, `"aiter_fp8"` and `"aiter_fp8_fnuz"`; ffi/rocm has the other side.

The kernels are AITER's own code objects, found where it is installed. The cache is in the kernel's format already, so no step casts a
cache. q is written in that format in the same call, in fp8 with one scale for all of it. Each scope is a call. fp8 is e4m3fnuz on gfx942,
e4m3fn on gfx950: each architecture has kernels for two of the three.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _ffi
from jax_dsv4 import cache as kv
from jax_dsv4._implementations.interface import Availability, KernelCall
from jax_dsv4._implementations.native import plan_call
from jax_dsv4._work import MAX_WORKERS, Geometry, WorkPlan, partial_rows, plan_shapes
from jax_dsv4.merge import apply_attn_sink

AMAX_BLOCKS = 64  # ffi/rocm/params.h
LAYOUTS = ("aiter_bf16", "aiter_fp8", "aiter_fp8_fnuz")


class Choice(ctypes.Structure):
    """dsv4_rocm_choice of ffi/rocm/handlers.cc: the kernel that a call runs."""

    _fields_ = (
        ("kernel_heads", ctypes.c_int32),
        ("tile", ctypes.c_int32),
        ("reports_lse", ctypes.c_int32),
        ("units", ctypes.c_int32),
        ("kernarg_bytes", ctypes.c_int32),
        ("architecture", ctypes.c_char * 32),
        ("text", ctypes.c_char * 2048),
    )

    @property
    def found(self) -> bool:
        return self.kernel_heads > 0

    def head_passes(self, heads: int) -> int:
        """How many times the kernel runs over a token to cover its heads."""
        return -(-heads // self.kernel_heads)


@functools.cache
def choose_kernel(layout: str, heads: int, pool_bytes: int = 0) -> Choice:
    """The kernel for a call on a cache of this layout and size; not `found`, with the reason in `text`, if there is none."""
    library, detail = _ffi.load_rocm()
    choice = Choice()
    if library is None:
        choice.text = detail.encode()
        return choice
    integers = kv.LAYOUTS[layout].code, heads, pool_bytes
    library.dsv4_rocm_choose.argtypes = (ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.POINTER(Choice))
    library.dsv4_rocm_choose(_named_architecture().encode(), *integers, ctypes.byref(choice))
    return choice


def _named_architecture() -> str:
    """The architecture that programs are made for where there is no such device, or ""."""
    return os.environ.get("JAX_DSV4_ROCM_ARCHITECTURE", "")


class _AITER:
    name = "aiter"
    platforms: tuple[str, ...] = ("rocm",)
    fuses = False
    batch_invariant = False  # AITER's plans cut tokens where workers are full

    def availability(self) -> Availability:
        choices = {layout: choose_kernel(layout, 16) for layout in LAYOUTS}
        choice = next((c for c in choices.values() if c.found), choices[LAYOUTS[0]])
        if not choice.found:
            return Availability(False, choice.text.decode())
        if missing := _ffi.missing_amd_kernels(choice.architecture.decode()):
            return Availability(False, missing)
        device = f"{choice.architecture.decode()}, {choice.units} units"
        if _named_architecture():
            device += " (for export: JAX_DSV4_ROCM_ARCHITECTURE)"
        kernels = "; ".join(f"{layout!r}: {c.text.decode()}" for layout, c in choices.items())
        return Availability(True, f"{device}, {planner(choice)}, layouts {kernels}")

    def exportable(self) -> bool:
        return False  # sizes come from the device and the kernels found, unless JAX_DSV4_ROCM_ARCHITECTURE makes it available

    def unsupported(self, num_heads: int, caches: Sequence[kv.KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        for cache in caches:
            if cache.layout not in LAYOUTS:
                return f"it reads layouts {LAYOUTS}, and the cache's is {cache.layout!r}"
        choices = [choose_kernel(cache.layout, num_heads, cache.nbytes) for cache in caches] or _choices(num_heads)
        return next((choice.text.decode() for choice in choices if not choice.found), None)

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int, segments: int) -> WorkPlan:
        geometry = _geometry(num_heads)
        if _builder(_choices(num_heads)[0]) is None:
            return plan_call(lengths, topks, geometry, target="dsv4_aiter_plan")
        return _aiters_plan(lengths[0], topks[0], geometry)

    def decode(self, call: KernelCall) -> tuple[jax.Array, jax.Array]:
        ((cache, indices, lengths),) = call.scopes
        q, work = call.q, call.planned
        tokens, heads, _ = q.shape
        topk = indices.shape[1]
        choice = choose_kernel(cache.layout, heads, cache.nbytes)
        geometry = _geometry(heads)
        workers = geometry.workers
        passes = choice.head_passes(heads)
        padded = passes * choice.kernel_heads
        max_items = work.work_info_set.shape[0]
        partials = partial_rows(tokens, topk, geometry) + tokens + 1
        i32, f32 = jnp.int32, jnp.float32
        shapes = (
            (q.shape, call.out_dtype),  # out
            ((tokens, heads), f32),  # lse
            # The rest are workspaces; ffi/rocm/params.h says what is in them.
            ((tokens, padded, kv.AITER_ROW), cache.data.dtype),  # q_packed
            ((tokens, max(topk, 1)), i32),  # rows
            ((tokens, 3), i32),  # state
            ((passes * workers + 1,), i32),  # own_indptr
            ((passes * max_items, 8), i32),  # own_items
            ((tokens * passes + 1,), i32),  # qo_indptr
            ((4,), i32),  # work_pointers
            ((2,), f32),  # scales
            ((AMAX_BLOCKS,), f32),  # amax
            ((partials, padded, kv.LATENT_DIM), f32),  # partial_out
            ((partials, padded), f32),  # partial_lse
        )
        results = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
        out, lse, *_ = jax.ffi.ffi_call("dsv4_aiter_decode", results)(
            *(q, cache.data, indices, lengths, *work),
            scale=np.float32(call.scale),
            cache_scale=np.float32(cache.scale),
            block_size=np.int32(cache.block_size),
            workers=np.int32(workers),
            kernel_heads=np.int32(choice.kernel_heads),
            layout=_code(cache),
        )
        return (out if call.attn_sink is None else apply_attn_sink(out, lse, call.attn_sink)), lse

    def append(self, cache: kv.KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        call = jax.ffi.ffi_call("dsv4_aiter_append", jax.ShapeDtypeStruct(cache.data.shape, cache.data.dtype), input_output_aliases={0: 0})
        attributes = dict(block_size=np.int32(cache.block_size), cache_scale=np.float32(cache.scale), layout=_code(cache))
        return call(cache.data, latents, slots, **attributes)


def _code(cache: kv.KVCache) -> np.int32:
    return np.int32(kv.LAYOUTS[cache.layout].code)


def _builder(choice: Choice) -> Path | None:
    """AITER's plan builder for the device. It plans for the units that it finds, so programs made elsewhere take ours."""
    return None if _named_architecture() else _ffi.aiter_plan_builder(choice.architecture.decode())


def planner(choice: Choice) -> str:
    """Which one makes the plans for a kernel's architecture."""
    command = f"python -m jax_dsv4.build_aiter --architecture {choice.architecture.decode()}"
    if builder := _builder(choice):
        return f"AITER's plan builder {builder}"
    return "our own planner" if _named_architecture() else f"our own planner ({command} compiles AITER's)"


def _aiters_plan(lengths: jax.Array, topk: int, geometry: Geometry, heads: int = 16) -> WorkPlan:
    """From get_mla_metadata_v1. It gives an empty token an item of no keys, which decode's check of the items takes out. For any of the
    numbers of heads that it plans in one tile it makes the same plan."""
    (tokens,) = lengths.shape
    # What it reads besides: qo_indptr, kv_indptr, last_page_lens, and where it writes its two addresses, which nobody reads.
    inputs = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (tokens + 1, tokens + 1, tokens, 4)]
    call = jax.ffi.ffi_call("dsv4_aiter_metadata_plan", (*plan_shapes(tokens), *inputs))
    plan = call(
        lengths,
        topk=np.int32(topk),
        units=np.int32(geometry.workers),
        granularity=np.int32(geometry.granularity),
        heads=np.int32(heads),
    )
    return WorkPlan(*plan[: len(WorkPlan._fields)])


def _geometry(heads: int) -> Geometry:
    """The plan's workers are shared out among the passes over a token's heads: each runs the same plan.

    A plan is for caches of any layout: for the kernel with the fewest passes, cut as the one with the smallest tile likes it.
    """
    choices = _choices(heads)
    # AITER's builder always plans for every unit.
    sharing = 1 if _builder(choices[0]) else min(choice.head_passes(heads) for choice in choices)
    workers = max(1, min(MAX_WORKERS, choices[0].units // sharing))
    # An item costs 4,100 wave-instructions and 64 keys of 16 heads 1,374 (the wheel's fp8 kernel) or 693: three blocks' worth. In bf16 it
    # costs one to two, which makes little difference.
    return Geometry(workers=workers, granularity=min(choice.tile for choice in choices), overhead=3)


def _choices(heads: int) -> list[Choice]:
    """Of the layouts that there are kernels for; if there are none, one that says why."""
    choices = [choose_kernel(layout, heads) for layout in LAYOUTS]
    return [choice for choice in choices if choice.found] or choices[:1]


AITER = _AITER()
