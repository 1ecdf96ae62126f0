"""Each bad input: a Python exception at trace time that names the op, the argument, the rule, what was expected and what came."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import needs_cpu

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi
from jax_dsv4._implementations import REGISTRY
from jax_dsv4._implementations.aiter import AITER


def array(dtype: object, *shape: int) -> jax.ShapeDtypeStruct:
    """A traced argument: nothing below may depend on its values, or allocate it."""
    return jax.ShapeDtypeStruct(shape, dtype)


i32 = lambda *shape: array(jnp.int32, *shape)  # noqa: E731
f32 = lambda *shape: array(jnp.float32, *shape)  # noqa: E731
bf16 = lambda *shape: array(jnp.bfloat16, *shape)  # noqa: E731
u8 = lambda *shape: array(jnp.uint8, *shape)  # noqa: E731

# 8 slots; q of 4 tokens and 16 heads; a window of 6 entries.
CACHE = dsv4.KVCache(u8(2, 4 * 584), block_size=4)
ENTRIES = dsv4.KVCache(u8(2, 4 * 288), block_size=4, layout="nvfp4_288", arrangement="inline")
scope = partial(dsv4.Scope, CACHE)
Q, SWA = bf16(4, 16, 512), scope(i32(4, 6), i32(4))
DECODE, APPEND, PLAN = "sparse_mla_decode", "append", "plan_decode"


def decode(q=Q, swa=SWA, extra=None, attn_sink=None, **static):
    # What is no array or pytree of arrays must be closed over: jit would refuse it before the op sees it.
    if isinstance(swa, str) or isinstance(q, str):
        return dsv4.sparse_mla_decode(q, swa, **static)
    return jax.eval_shape(lambda *a: dsv4.sparse_mla_decode(*a[:3], attn_sink=a[3], **static), q, swa, extra, attn_sink)


def append(cache=CACHE, latents=f32(3, 512), slots=i32(3), **static):  # noqa: B008
    if not isinstance(cache, dsv4.KVCache):
        return dsv4.append(cache, latents, slots)
    return jax.eval_shape(lambda *a: dsv4.append(*a, **static), cache, latents, slots)


def plan(swa_lengths=i32(4), extra_lengths=None, *, num_heads=16, swa_topk=6, **static):  # noqa: B008
    make = lambda *a: dsv4.plan_decode(*a, num_heads=num_heads, swa_topk=swa_topk, **static)  # noqa: E731
    return jax.eval_shape(make, swa_lengths, extra_lengths)


def decode_with_plan(**made_for):
    made = {"num_heads": 16, "swa_topk": 6, "implementation": "xla"} | made_for
    tokens = made.pop("tokens", 4)
    return decode(plan=dsv4.plan_decode(jnp.zeros(tokens, jnp.int32), **made), implementation="xla")


KNOWN = ", ".join(repr(name) for name in dsv4.implementations())
INT32 = "at most 2147483647"
TRACED = "a traced value (name it in jax.jit's static_argnames)"

# (call, the whole message)
VALUE_ERRORS: tuple[tuple[Callable[[], object], str], ...] = (
    # q
    (lambda: decode(q="q"), f"{DECODE}: q must be an array, got str"),
    (lambda: decode(q=array(jnp.float16, 4, 16, 512)), f"{DECODE}: q must have dtype bfloat16 or float32, got float16"),
    (lambda: decode(q=bf16(512)), f"{DECODE}: q must have shape (*batch, heads, 512), got (512,)"),
    (lambda: decode(q=bf16(4, 16, 576)), f"{DECODE}: q must have shape (*batch, heads, 512) = (4, 16, 512), got (4, 16, 576)"),
    (lambda: decode(q=bf16(4, 0, 512)), f"{DECODE}: q must have 1 to 128 heads, got 0"),
    (lambda: decode(q=bf16(4, 129, 512)), f"{DECODE}: q must have 1 to 128 heads, got 129"),
    # scopes
    (lambda: decode(swa="swa"), f"{DECODE}: swa must be a Scope, got str"),
    (lambda: decode(swa=tuple(SWA[:2])), f"{DECODE}: swa must be a Scope, got tuple"),
    (
        lambda: decode(extra=dsv4.Scope(u8(2, 4 * 584), i32(4, 6), i32(4))),
        f"{DECODE}: extra.cache must be a KVCache, got DynamicJaxprTracer",
    ),
    (
        lambda: decode(swa=scope(array(jnp.uint32, 4, 6))),
        f"{DECODE}: swa.indices must have dtype int32, got uint32; write swa.indices.astype('int32')",
    ),
    (lambda: decode(swa=scope(i32(4, 1, 6))), f"{DECODE}: swa.indices must have shape (*batch, topk) = (4, 6), got (4, 1, 6)"),
    (lambda: decode(swa=scope(i32())), f"{DECODE}: swa.indices must have shape (*batch, topk) = (4, 0), got ()"),
    (lambda: decode(extra=scope(i32(5, 6))), f"{DECODE}: extra.indices must have shape (*batch, topk) = (4, 6), got (5, 6)"),
    (lambda: decode(swa=scope(i32(4, 6), f32(4))), f"{DECODE}: swa.lengths must have dtype int32, got float32"),
    (lambda: decode(extra=scope(i32(4, 6), i32(4, 1))), f"{DECODE}: extra.lengths must have shape (*batch,) = (4,), got (4, 1)"),
    (lambda: decode(swa=scope(i32(4, 2**29), i32(4))), f"{DECODE}: tokens * topk must fit int32 ({INT32}), got 2147483648"),
    # the rest of a decode
    (lambda: decode(attn_sink=bf16(16)), f"{DECODE}: attn_sink must have dtype float32, got bfloat16"),
    (lambda: decode(attn_sink=f32(15)), f"{DECODE}: attn_sink must have shape (heads,) = (16,), got (15,)"),
    (lambda: decode(scale="1"), f"{DECODE}: scale must be a Python float, got str '1'"),
    (lambda: decode(scale=True), f"{DECODE}: scale must be a Python float, got bool True"),
    (lambda: decode(scale=0.0), f"{DECODE}: scale must be positive and finite, got 0.0"),
    (lambda: decode(scale=float("nan")), f"{DECODE}: scale must be positive and finite, got nan"),
    (lambda: decode(scale=float("inf")), f"{DECODE}: scale must be positive and finite, got inf"),
    (lambda: jax.eval_shape(dsv4.sparse_mla_decode, Q, SWA, scale=1.0), f"{DECODE}: scale must be a Python float, got {TRACED}"),
    (lambda: jax.eval_shape(dsv4.sparse_mla_decode, Q, SWA, return_lse=True), f"{DECODE}: return_lse must be a Python bool, got {TRACED}"),
    (lambda: decode(return_lse="no"), f"{DECODE}: return_lse must be a Python bool, got str 'no'"),
    (lambda: decode(fused="no"), f"{DECODE}: fused must be a Python bool, got str 'no'"),
    (lambda: decode(batch_invariant=None), f"{DECODE}: batch_invariant must be a Python bool, got NoneType None"),
    (lambda: decode(implementation="triton"), f"{DECODE}: implementation must be None or name {KNOWN}, got 'triton'"),
    (lambda: decode(implementation=()), f"{DECODE}: implementation must be None or name {KNOWN}, got ()"),
    (lambda: decode(implementation=7), f"{DECODE}: implementation must be None or name {KNOWN}, got 7"),
    (lambda: decode(implementation={"xla"}), f"{DECODE}: implementation must be None or name {KNOWN}, got {{'xla'}}"),
    (lambda: decode(implementation=[["xla"]]), f"{DECODE}: implementation must be None or name {KNOWN}, got ['xla']"),
    (lambda: decode(implementation=("xla", "triton")), f"{DECODE}: implementation must be None or name {KNOWN}, got 'triton'"),
    # plans
    (lambda: decode(plan=()), f"{DECODE}: plan must be a DecodePlan, got tuple"),
    (lambda: decode_with_plan(tokens=3), f"{DECODE}: plan must be made for this call's tokens = 4, got 3"),
    (lambda: decode_with_plan(num_heads=8), f"{DECODE}: plan must be made for this call's num_heads = 16, got 8"),
    (lambda: decode_with_plan(swa_topk=7), f"{DECODE}: plan must be made for this call's swa_topk = 6, got 7"),
    (
        lambda: decode_with_plan(extra_lengths=jnp.zeros(4, jnp.int32), extra_topk=2),
        f"{DECODE}: plan must be made for this call's extra_topk = 0, got 2",
    ),
    (lambda: decode_with_plan(implementation=None), f"{DECODE}: plan must be made for this call's implementation = 'xla', got None"),
    (lambda: decode_with_plan(fused=False), f"{DECODE}: plan must be made for this call's fused = None, got False"),
    (lambda: plan(f32(4)), f"{PLAN}: swa_lengths must have dtype int32, got float32"),
    (lambda: plan(i32(4), f32(4)), f"{PLAN}: extra_lengths must have dtype int32, got float32"),
    (lambda: plan(i32(4), i32(5), extra_topk=3), f"{PLAN}: extra_lengths must have shape (*batch,) of swa_lengths = (4,), got (5,)"),
    (lambda: plan(extra_topk=3), f"{PLAN}: extra_topk must be 0 without extra_lengths, got 3"),
    (lambda: plan(num_heads=129), f"{PLAN}: num_heads must be from 1 to 128, got 129"),
    (lambda: plan(num_heads=16.0), f"{PLAN}: num_heads must be a Python int, got float 16.0"),
    (lambda: plan(swa_topk=-1), f"{PLAN}: swa_topk must be from 0 to 2147483647, got -1"),
    (lambda: plan(i32(4), i32(4), extra_topk=-1), f"{PLAN}: extra_topk must be from 0 to 2147483647, got -1"),
    (lambda: plan(swa_topk=2**29), f"{PLAN}: tokens * (swa_topk + extra_topk) must fit int32 ({INT32}), got 2147483648"),
    (lambda: plan(implementation="triton"), f"{PLAN}: implementation must be None or name {KNOWN}, got 'triton'"),
    (lambda: plan(fused=1), f"{PLAN}: fused must be a Python bool, got int 1"),
    (lambda: plan(batch_invariant="yes"), f"{PLAN}: batch_invariant must be a Python bool, got str 'yes'"),
    # caches
    (
        lambda: dsv4.KVCache.create(1, 1, "fp4"),
        "KVCache.create: layout must be one of " + ", ".join(map(repr, dsv4.cache.LAYOUTS)) + ", got 'fp4'",
    ),
    (
        lambda: dsv4.KVCache(u8(1, 584), block_size=1, layout=0),
        "KVCache: layout must be one of " + ", ".join(map(repr, dsv4.cache.LAYOUTS)) + ", got 0",
    ),
    (lambda: dsv4.KVCache(u8(1, 584), block_size=-64), "KVCache: block_size must be from 1 to 2147483647, got -64"),
    (lambda: dsv4.KVCache.create(1, 0), "KVCache.create: block_size must be from 1 to 2147483647, got 0"),
    (lambda: dsv4.KVCache(u8(1, 584), block_size=1.0), "KVCache: block_size must be a Python int, got float 1.0"),
    (lambda: dsv4.KVCache.create(1, True), "KVCache.create: block_size must be a Python int, got bool True"),
    (lambda: dsv4.KVCache.create(-1, 64), "KVCache.create: num_blocks must be from 0 to 2147483647, got -1"),
    (lambda: dsv4.KVCache([0], block_size=1), "KVCache: data must be an array, got list"),
    (lambda: dsv4.KVCache(array(jnp.int8, 1, 584), block_size=1), "KVCache: data must have dtype uint8, got int8"),
    (
        lambda: dsv4.KVCache(u8(1, 2, 584), block_size=1),
        "KVCache: data must have shape (num_blocks, block_size, 584) = (*, 1, 584) or (num_blocks, block_stride_bytes) = (*, *),"
        " got (1, 2, 584)",
    ),
    (
        lambda: dsv4.KVCache(u8(3, 64 * 584 - 1), block_size=64),
        "KVCache: data's block stride must be at least block_size * 584 = 37376 bytes, got 37375",
    ),
    (
        lambda: dsv4.KVCache.create(3, 64, block_stride_bytes=37375),
        "KVCache.create: block_stride_bytes must be from 37376 to 2147483647, got 37375",
    ),
    (
        lambda: dsv4.KVCache.create(3, 64, "bf16", block_stride_bytes=65536),
        "KVCache.create: block_stride_bytes must be left out for layout 'bf16', got 65536",
    ),
    (
        lambda: dsv4.KVCache.create(3, 64, "aiter_fp8"),
        "KVCache.create: scale must be given for layout 'aiter_fp8' (fp8_scale measures one), got None",
    ),
    (
        lambda: dsv4.fp8_scale(jnp.ones(512), "aiter_bf16"),
        "fp8_scale: layout must be 'aiter_fp8' or 'aiter_fp8_fnuz', got 'aiter_bf16'",
    ),
    (lambda: dsv4.KVCache.create(3, 64, "aiter_bf16", scale=2.0), "KVCache.create: scale must be 1 for layout 'aiter_bf16', got 2.0"),
    (
        lambda: dsv4.fp8_scale(jnp.full((2, 512), jnp.nan)),
        "fp8_scale: latents must have a finite number other than 0, got a largest magnitude of 0.0",
    ),
    (
        lambda: dsv4.KVCache(bf16(3, 32, 512), block_size=64, layout="bf16"),
        "KVCache: data must have shape (num_blocks, block_size, 512) = (*, 64, 512), got (3, 32, 512)",
    ),
    (lambda: dsv4.KVCache.create(2**25, 64), f"KVCache.create: num_blocks * block_size must fit int32 ({INT32}), got 2147483648"),
    (
        lambda: dsv4.KVCache(u8(2**25, 64 * 584), block_size=64),
        f"KVCache: num_blocks * block_size must fit int32 ({INT32}), got 2147483648",
    ),
    # DeepSeek-V4.1's caches
    (
        lambda: decode(swa=dsv4.Scope(ENTRIES, i32(4, 6), i32(4))),
        f"{DECODE}: swa.cache must have a layout of the sliding window ('nvfp4_288' is for extra only), got 'nvfp4_288'",
    ),
    (
        lambda: dsv4.KVCache(u8(1, 528), block_size=1, layout="mxfp8_528"),
        "KVCache: arrangement must be 'inline' or 'footer' for layout 'mxfp8_528', got None",
    ),
    (
        lambda: dsv4.KVCache.create(1, 4, "nvfp4_288", arrangement="interleaved"),
        "KVCache.create: arrangement must be 'inline' or 'footer' for layout 'nvfp4_288', got 'interleaved'",
    ),
    (
        lambda: dsv4.KVCache(u8(1, 584), block_size=1, arrangement="footer"),
        "KVCache: arrangement must be left out for layout 'fp8_ds_mla', got 'footer'",
    ),
    (
        lambda: dsv4.KVCache(u8(2, 4 * 528 + 16), block_size=4, layout="mxfp8_528", arrangement="inline"),
        "KVCache: data's block stride must be a multiple of 528 bytes, an inline slot of layout 'mxfp8_528', got 2128",
    ),
    (
        lambda: dsv4.KVCache.create(2, 4, "nvfp4_288", arrangement="inline", block_stride_bytes=1280),
        "KVCache.create: block_stride_bytes must be a multiple of 288 bytes, an inline slot of layout 'nvfp4_288', got 1280",
    ),
    (
        lambda: dsv4.KVCache(u8(2, 1151), block_size=4, layout="nvfp4_288", arrangement="footer"),
        "KVCache: data's block stride must be at least block_size * 288 = 1152 bytes, got 1151",
    ),
    (
        lambda: dsv4.KVCache(u8(2, 4, 584), block_size=4, layout="mxfp8_528", arrangement="inline"),
        "KVCache: data must have shape (num_blocks, block_size, 528) = (*, 4, 528) or (num_blocks, block_stride_bytes) = (*, *),"
        " got (2, 4, 584)",
    ),
    # append and dequantize
    (lambda: append("cache"), f"{APPEND}: cache must be a KVCache, got str"),
    (lambda: append(latents=array(jnp.float16, 3, 512)), f"{APPEND}: latents must have dtype bfloat16 or float32, got float16"),
    (lambda: append(latents=f32(3, 576)), f"{APPEND}: latents must have shape (*batch, 512) = (3, 512), got (3, 576)"),
    (lambda: append(slots=array(jnp.uint32, 3)), f"{APPEND}: slots must have dtype int32, got uint32; write slots.astype('int32')"),
    (lambda: append(slots=i32(3, 1)), f"{APPEND}: slots must have shape (*batch,) = (3,), got (3, 1)"),
    (lambda: append(implementation="triton"), f"{APPEND}: implementation must be None or name {KNOWN}, got 'triton'"),
    (lambda: dsv4.dequantize("cache"), "dequantize: cache must be a KVCache, got str"),
    (lambda: jax.eval_shape(dsv4.dequantize, CACHE, f32(3)), "dequantize: slots must have dtype int32, got float32"),
    # merging
    (lambda: dsv4.merge_scopes([], []), "merge_scopes: outs and lses must be as many, at least one, got (0, 0)"),
    (lambda: dsv4.merge_scopes([f32(4, 16, 512)], []), "merge_scopes: outs and lses must be as many, at least one, got (1, 0)"),
    (
        lambda: dsv4.merge_scopes([f32(4, 16, 512), f32(4, 15, 512)], [f32(4, 16)] * 2),
        "merge_scopes: outs[1] must have shape outs[0].shape = (4, 16, 512), got (4, 15, 512)",
    ),
    (
        lambda: dsv4.merge_scopes([f32(4, 16, 512)] * 2, [f32(4, 16), f32(16, 4)]),
        "merge_scopes: lses[1] must have shape (*batch, heads) = (4, 16), got (16, 4)",
    ),
    (
        lambda: dsv4.merge_scopes([i32(4, 16, 512)], [f32(4, 16)]),
        "merge_scopes: outs[0] must have dtype float32 or bfloat16 or float16, got int32",
    ),
    (
        lambda: dsv4.merge_scopes([f32(4, 16, 512), bf16(4, 16, 512)], [f32(4, 16)] * 2),
        "merge_scopes: outs[1] must have dtype float32, got bfloat16",
    ),
    (lambda: dsv4.merge_scopes([f32(4, 16, 512)], [bf16(4, 16)]), "merge_scopes: lses[0] must have dtype float32, got bfloat16"),
    (
        lambda: dsv4.merge_scopes([f32(4, 16, 512)], [f32(4, 16)], empty_lse=None),
        "merge_scopes: empty_lse must be a Python float, got NoneType None",
    ),
    (lambda: dsv4.apply_attn_sink(f32(4, 16, 512), bf16(4, 16), f32(16)), "apply_attn_sink: lse must have dtype float32, got bfloat16"),
    (lambda: dsv4.apply_attn_sink(f32(4, 16, 512), f32(4, 16), i32(16)), "apply_attn_sink: attn_sink must have dtype float32, got int32"),
    (lambda: dsv4.apply_attn_sink(f32(512), f32(), f32(1)), "apply_attn_sink: out must have shape (*batch, heads, dim), got (512,)"),
    (lambda: dsv4.apply_attn_sink(1.0, 1.0, 1.0), "apply_attn_sink: out must be an array, got float"),
    (
        lambda: dsv4.apply_attn_sink(f32(4, 16, 512), f32(4), f32(16)),
        "apply_attn_sink: lse must have shape (*batch, heads) = (4, 16), got (4,)",
    ),
    (
        lambda: dsv4.apply_attn_sink(f32(4, 16, 512), f32(4, 16), f32(1)),
        "apply_attn_sink: attn_sink must have shape (heads,) = (16,), got (1,)",
    ),
)


@pytest.mark.parametrize(("call", "message"), VALUE_ERRORS, ids=[message for _, message in VALUE_ERRORS])
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_the_same_calls_pass_without_the_fault() -> None:
    """So that each row above fails for its one fault."""
    assert decode().shape == Q.shape
    assert decode(extra=SWA, attn_sink=f32(16), scale=1).shape == Q.shape
    assert decode(extra=dsv4.Scope(ENTRIES, i32(4, 6), i32(4))).shape == Q.shape
    assert decode_with_plan().shape == Q.shape
    assert append().data.shape == CACHE.data.shape
    assert plan(i32(4), i32(4), extra_topk=3).made_for.extra_topk == 3


@pytest.mark.parametrize("implementation", ["cpu", "cuda", "aiter_gluon"])
@pytest.mark.parametrize("layout", ["aiter_bf16", "aiter_fp8", "aiter_fp8_fnuz"])
def test_no_other_reads_aiters(implementation: str, layout: str) -> None:
    cache = dsv4.KVCache.create(1, 4, layout, scale=0.5 if layout.startswith("aiter_fp8") else None)
    assert repr(layout) in str(REGISTRY[implementation].unsupported(16, [cache], jnp.bfloat16))


@pytest.mark.parametrize("layout", ["mxfp8_528", "nvfp4_288"])
def test_aiter_does_not_read_these(layout: str) -> None:
    cache = dsv4.KVCache.create(1, 4, layout, arrangement="inline")
    assert (
        AITER.unsupported(16, [cache]) == f"it reads layouts ('aiter_bf16', 'aiter_fp8', 'aiter_fp8_fnuz'), and the cache's is {layout!r}"
    )


@needs_cpu
@pytest.mark.parametrize("name", ["dsv4", "AVX2", "sse"])
def test_unknown_instruction_set(name: str) -> None:
    script = "import jax_dsv4; jax_dsv4.implementations()"
    environment = os.environ | {"JAX_DSV4_CPU_ISA": name, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    expected = f"ValueError: jax_dsv4: the variable JAX_DSV4_CPU_ISA must be one of {_ffi.CPU_ISAS}, got {name}"
    assert result.stderr.strip().splitlines()[-1] == expected


@needs_cpu
def test_no_derivative_of_native_code() -> None:
    q, latents = jnp.ones((1, 1, 512)), jnp.ones((1, 512))
    cache = dsv4.KVCache.create(1, 4, "float32")
    attend = lambda q: dsv4.sparse_mla_decode(q, dsv4.Scope(cache, jnp.zeros((1, 1), jnp.int32)), implementation="cpu").sum()  # noqa: E731
    write = lambda x: dsv4.append(cache, x, jnp.zeros(1, jnp.int32), implementation="cpu").data.sum()  # noqa: E731
    for op, function, x in ((DECODE, attend, q), (APPEND, write, latents)):
        expected = f"{op}: native implementations have no derivative; pass implementation='xla' to differentiate"
        for derivative in (jax.grad(function), jax.jit(jax.grad(function)), lambda x, f=function: jax.jvp(f, (x,), (x,))):
            with pytest.raises(NotImplementedError, match=re.escape(expected)):
                derivative(x)
    assert np.isfinite(attend(q))
