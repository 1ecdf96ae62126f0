"""AITER's Gluon kernel pa_decode_sparse on ROCm, layout `"fp8_ds_mla"`; ffi/rocm/gluon_handlers.cc has the other side.

Both scopes are one launch, and nothing is cast to fp8. `python -m jax_dsv4.build_aiter --heads` compiles the kernel, with heads, scale and
block sizes as constants: a call that no compiled variant fits is refused with the command that compiles it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _ffi, _gluon
from jax_dsv4 import cache as kv
from jax_dsv4._gluon import Variant
from jax_dsv4._implementations.interface import Availability, KernelCall
from jax_dsv4._implementations.native import absent_scope, append_call

TILE = 64  # keys that the kernel works on at a time
HEADS = 16  # that a workgroup works on


class Device(ctypes.Structure):
    """dsv4_rocm_device of ffi/rocm/gluon_handlers.cc."""

    _fields_ = (("units", ctypes.c_int32), ("architecture", ctypes.c_char * 32), ("reason", ctypes.c_char * 1024))


@functools.cache
def describe_device() -> Device:
    """The device, or the one that programs are made for. Without `architecture`, and with the reason, if there is none."""
    library, detail = _ffi.load_rocm()
    device = Device()
    if library is None:
        device.reason = detail.encode()
        return device
    library.dsv4_rocm_describe.argtypes = (ctypes.c_char_p, ctypes.POINTER(Device))
    library.dsv4_rocm_describe(os.environ.get("JAX_DSV4_ROCM_ARCHITECTURE", "").encode(), ctypes.byref(device))
    return device


class _AITERGluon:
    name = "aiter_gluon"
    platforms: tuple[str, ...] = ("rocm",)
    fuses = True
    batch_invariant = False  # into how many parts it cuts a token follows from the batch

    def availability(self) -> Availability:
        device = describe_device()
        architecture = device.architecture.decode()
        if not architecture:
            return Availability(False, device.reason.decode())
        if architecture != _gluon.ARCHITECTURE:
            return Availability(False, f"AITER's Gluon kernel is for {_gluon.ARCHITECTURE}; this is {architecture}")
        if missing := _ffi.missing_amd_kernels(architecture):
            return Availability(False, missing)
        variants = len(_gluon.compiled())
        if not variants:
            return Availability(False, "not compiled: python -m jax_dsv4.build_aiter --source AITER --heads 64 (with Triton; seconds)")
        return Availability(True, f"{variants} variants in {_ffi.gluon_directory()} on {architecture}, {device.units} units")

    def exportable(self) -> bool:
        return False  # as AITER's other kernels

    def unsupported(self, num_heads: int, caches: Sequence[kv.KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        if q_dtype is not None and q_dtype != jnp.bfloat16:
            return f"it takes bfloat16 queries, not {jnp.dtype(q_dtype).name}"
        for cache in caches:
            if cache.layout != "fp8_ds_mla":
                return f"it reads layout 'fp8_ds_mla', and the cache's is {cache.layout!r}"
            if cache.data.shape[1] % 2:
                return f"it needs an even block stride, and the cache's is {cache.data.shape[1]} bytes"
        return None

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int, segments: int) -> None:
        return None  # it cuts all tokens alike

    def decode(self, call: KernelCall) -> tuple[jax.Array, jax.Array]:
        q, sink = call.q, call.attn_sink
        tokens, heads, _ = q.shape
        variant = variant_for(call)
        if variant.file() is None:
            raise NotImplementedError(
                f"sparse_mla_decode: implementation 'aiter_gluon' has no kernel compiled for this call. Run: {variant.command}"
            )
        swa, extra = (*call.scopes, absent_scope(call.lengths[0]))[:2]
        i32, f32, splits = jnp.int32, jnp.float32, variant.splits
        shapes = (
            (q.shape, call.out_dtype),  # out
            ((tokens, heads), f32),  # lse
            # The rest are workspaces; ffi/rocm/gluon_params.h says what is in them.
            ((2, tokens), i32),  # counts
            *(shape for s in (swa, extra) for shape in (((tokens + 1,), i32), (s.indices.shape, i32))),  # indptr, slots
            ((tokens, splits, heads), f32),  # partial_max
            ((tokens, splits, heads), f32),  # partial_sum
            ((tokens, splits, heads, kv.LATENT_DIM), f32),  # partial_out
        )
        results = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)
        out, lse, *_ = jax.ffi.ffi_call("dsv4_aiter_gluon_decode", results)(
            q,
            jnp.zeros((0,), f32) if sink is None else sink,
            *(swa.cache.data, swa.indices, swa.lengths),
            *(extra.cache.data, extra.indices, extra.lengths),
            scale=np.float32(call.scale),
            has_sink=sink is not None,
            swa_block_size=np.int32(swa.cache.block_size),
            extra_block_size=np.int32(extra.cache.block_size),
            tokens_per_launch=np.int32(tokens_per_launch(heads, splits)),
        )
        return out, lse

    def append(self, cache: kv.KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        return append_call(cache, latents, slots, target="dsv4_packed_append")


def variant_for(call: KernelCall) -> Variant:
    """What a call needs. A second scope without entries is left out."""
    tokens, heads, _ = call.q.shape
    scopes = [s for i, s in enumerate(call.scopes) if i == 0 or s.indices.shape[1]]
    alignment = math.gcd(_gluon.MAX_ALIGNMENT, *(s.cache.data.shape[1] for s in scopes))
    wide = any(s.cache.nbytes >= _gluon.ADDRESSABLE_BYTES for s in scopes)
    splits = choose_splits(tokens, heads, call.topks, describe_device().units)
    return Variant(heads, call.scale, tuple(s.cache.block_size for s in scopes), alignment, wide, splits)


def choose_splits(tokens: int, heads: int, topks: Sequence[int], units: int) -> int:
    """By AITER's own model of what splits cost, tuned on MI355X (_decode_num_splits of aiter/ops/triton/attention/pa_decode_sparse.py)."""
    workgroups = tokens * math.ceil(heads / HEADS)

    def cost(splits: int) -> float:
        tiles = sum(math.ceil(math.ceil(topk / splits) / TILE) for topk in topks)
        rounds = math.ceil(workgroups * splits / units)
        idle = max(0.0, 1 - workgroups * splits / (0.75 * units)) / splits
        return rounds * tiles + 0.32 * splits + 2.0 * idle

    return min(_gluon.SPLITS, key=cost)


def tokens_per_launch(heads: int, splits: int) -> int:
    """As many as the kernel can address the partial results of; pointers to the rest stay aligned to 16 bytes."""
    return _gluon.ADDRESSABLE_BYTES // (splits * heads * kv.LATENT_DIM * 4) // 4 * 4


AITER_GLUON = _AITERGluon()
