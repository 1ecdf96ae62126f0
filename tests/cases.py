"""The shapes and the hostile data that every backend is held to. Read by the tests and by the benchmarks.

Tags: `ci` runs everywhere; `corner` the odd ones; `flashmla` FlashMLA's own test grid
(`flashmla-large` its larger batches); `perf` what benchmarks time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jax_dsv4 as dsv4
from jax_dsv4 import reference

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class ScopeCase:
    """One scope: `slots` cached positions in blocks of `block_size` (the last one part empty), `topk` entries a token."""

    topk: int
    slots: int = 640
    block_size: int = 64
    layout: str = "fp8_ds_mla"
    stride_extra_bytes: int = 0
    lengths: str = "hostile"  # full, random, hostile, gaps, zero
    holes: float = 0.1  # share of entries that name no slot


@dataclass(frozen=True)
class Case:
    name: str
    heads: int
    tokens: int
    swa: ScopeCase
    extra: ScopeCase | None = None
    sink: str | None = "normal"  # normal, infinite, None
    dtype: str = "bfloat16"
    scale: float = 512**-0.5
    tags: tuple[str, ...] = ("ci",)

    def __str__(self) -> str:
        return self.name


class Problem(NamedTuple):
    """A case's arguments and its answer."""

    q: object
    swa: dsv4.Scope
    extra: dsv4.Scope | None
    attn_sink: object
    scale: float
    out: np.ndarray
    lse: np.ndarray


def _grid() -> list[Case]:
    cases = []
    # Every head count at which some kernel changes its blocking, and both scopes, with everything hostile.
    for heads in (1, 2, 5, 8, 16, 17, 32, 63, 64, 96, 127, 128):
        cases.append(Case(f"heads{heads}", heads, 3, ScopeCase(128), ScopeCase(192)))
    for topk in (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 300):
        cases.append(Case(f"topk{topk}", 16, 5, ScopeCase(topk), ScopeCase(topk + 3, block_size=53), tags=("ci", "corner")))
    for block_size in (1, 2, 53, 61, 69, 256, 576):
        swa = ScopeCase(128, slots=700, block_size=block_size, stride_extra_bytes=block_size % 7 * 64)
        extra = ScopeCase(100, slots=1000, block_size=2, stride_extra_bytes=408)
        cases.append(Case(f"block{block_size}", 8, 4, swa, extra, tags=("ci", "corner")))
    for layout in [name for name in dsv4.cache.LAYOUTS if name != "aiter_fp8"]:  # AITER's precision is another: tests/gfx950
        for dtype in ("bfloat16", "float32"):
            swa, extra = ScopeCase(128, layout=layout), ScopeCase(90, block_size=2, layout=layout)
            cases.append(Case(f"{layout}-q_{dtype}", 16, 6, swa, extra, dtype=dtype))
    cases += [
        Case("mixed_layouts", 16, 4, ScopeCase(128, layout="bf16"), ScopeCase(128), tags=("ci", "corner")),
        Case("one_scope", 16, 7, ScopeCase(128)),
        Case("one_scope_no_sink", 64, 2, ScopeCase(640), sink=None),
        Case("infinite_sinks", 16, 6, ScopeCase(128), ScopeCase(64), sink="infinite", tags=("ci", "corner")),
        Case("all_empty", 16, 4, ScopeCase(128, lengths="zero"), ScopeCase(64, lengths="zero"), tags=("ci", "corner")),
        Case("all_holes", 16, 4, ScopeCase(128, holes=1.0), ScopeCase(64, holes=1.0), tags=("ci", "corner")),
        Case("swa_empty", 16, 4, ScopeCase(128, lengths="zero"), ScopeCase(64), tags=("ci", "corner")),
        Case("extra_empty", 16, 4, ScopeCase(128), ScopeCase(64, lengths="zero"), tags=("ci", "corner")),
        Case("topk_zero", 8, 3, ScopeCase(0), ScopeCase(64), tags=("ci", "corner")),
        Case("no_keys_at_all", 8, 3, ScopeCase(0), tags=("ci", "corner")),
        Case("one_token_split", 128, 1, ScopeCase(128, lengths="full"), ScopeCase(1024, slots=2048, lengths="full")),
        Case("few_long_tokens", 16, 3, ScopeCase(600), ScopeCase(500)),
        # More than get clusters on Hopper, and cut there.
        Case("many_tokens", 16, 70, ScopeCase(128), ScopeCase(256)),
        Case("many_tokens_of_32_heads", 32, 40, ScopeCase(128), ScopeCase(256)),
        Case("flat_scores", 16, 4, ScopeCase(128), ScopeCase(64), scale=1e-6, tags=("ci", "corner")),
        Case("sharp_scores", 16, 4, ScopeCase(128), ScopeCase(64), scale=2.0, tags=("ci", "corner")),
        Case("no_tokens", 16, 0, ScopeCase(128), ScopeCase(64), tags=("ci", "corner")),
        Case("odd_stride", 16, 4, ScopeCase(128, stride_extra_bytes=1), ScopeCase(100, block_size=5), tags=("ci", "corner")),
        Case("empty_first_last_and_between", 16, 13, ScopeCase(150, lengths="gaps")),
        Case("odd_strides_many_tokens", 128, 24, ScopeCase(64, stride_extra_bytes=4), ScopeCase(128, stride_extra_bytes=3)),
    ]
    # FlashMLA's tests (tests/test_flash_mla_sparse_decoding.py), MODEL1: batch, heads, query length, (keys, topk, block size).
    grid = [(512, 64, b) for b in (2, 64, 69)] + [(1024, 576, b) for b in (2, 61)] + [(2046, 2048, b) for b in (2, 64, 576)]
    for batch, query_length, heads in ((4, 1, 64), (4, 3, 128), (74, 1, 128), (74, 3, 64), (321, 1, 64)):
        # The larger the batch, the fewer of the grid's shapes; each shape and each batch occurs.
        for i, (keys, topk, block_size) in enumerate(grid if batch == 4 else grid[:4:3] if batch == 74 else grid[:1]):
            swa = ScopeCase(topk, slots=keys, block_size=block_size, holes=0.05)
            x_keys, x_topk, x_block = grid[(i + 3) % len(grid)] if batch == 4 else grid[2]
            extra = ScopeCase(x_topk, slots=x_keys, block_size=x_block, holes=0.05) if i % 2 else None
            name = f"flashmla-b{batch}q{query_length}h{heads}k{topk}x{x_topk if extra else 0}bs{block_size}"
            cases.append(Case(name, heads, batch * query_length, swa, extra, tags=("flashmla" if batch == 4 else "flashmla-large",)))
    # What benchmarks/cpu.py times.
    for heads in (16, 64, 128):
        for tokens in (1, 4, 16):
            for topk in (512, 1024):
                swa = ScopeCase(128, slots=16384, lengths="full", holes=0)
                extra = ScopeCase(topk, slots=65536, lengths="full", holes=0)
                cases.append(Case(f"perf-t{tokens}h{heads}k128+{topk}", heads, tokens, swa, extra, tags=("perf",)))
    return cases


CASES = _grid()


def tagged(*tags: str) -> list[Case]:
    return [case for case in CASES if any(tag in case.tags for tag in tags)]


@functools.lru_cache(maxsize=8)
def make(case: Case, seed: int = 0, log2_magnitude: int = 0) -> Problem:
    """The arguments, hostile as the case says, and the reference's answer. What no token attends to is NaN throughout.

    Latents have standard deviations of up to 2^log2_magnitude.
    """
    rng = np.random.default_rng([seed, *case.name.encode()])
    q = rng.standard_normal((case.tokens, case.heads, 512)).astype(np.float32)
    q = q.astype(ml_dtypes.bfloat16) if case.dtype == "bfloat16" else q
    sink = None
    if case.sink is not None:
        sink = rng.standard_normal(case.heads).astype(np.float32) * 2
        if case.sink == "infinite":
            sink = np.where(np.arange(case.heads) % 3 == 0, np.inf, np.where(np.arange(case.heads) % 3 == 1, -np.inf, sink))
            sink = sink.astype(np.float32)
    scopes, reference_scopes = [], []
    for scope_case in (case.swa, case.extra):
        if scope_case is not None:
            scope, reference_scope = _make_scope(scope_case, case.tokens, rng, log2_magnitude)
            scopes.append(scope)
            reference_scopes.append(reference_scope)
    out, lse = reference.decode(q.astype(np.float64), reference_scopes, sink, case.scale)
    arrays = [dsv4.Scope(cache, jnp.asarray(i), jnp.asarray(n)) for cache, i, n in scopes]
    as_array = None if sink is None else jnp.asarray(sink)
    return Problem(jnp.asarray(q), arrays[0], arrays[1] if len(arrays) > 1 else None, as_array, case.scale, out, lse)


def _make_scope(
    case: ScopeCase, tokens: int, rng: np.random.Generator, log2_magnitude: int
) -> tuple[tuple[dsv4.KVCache, np.ndarray, np.ndarray], reference.ReferenceScope]:
    blocks = -(-case.slots // case.block_size)
    slots = blocks * case.block_size
    indices = rng.integers(0, case.slots, (tokens, case.topk), dtype=np.int64)
    nowhere = np.array([-1, -1, -1, -2, INT_MIN, INT_MAX, slots, slots + 1, 10**9])
    holes = rng.random(indices.shape) < case.holes
    indices = np.where(holes, rng.choice(nowhere, indices.shape), indices)
    lengths = {
        "full": np.full(tokens, case.topk),
        "random": rng.integers(0, case.topk + 1, tokens),
        "gaps": np.where(np.arange(tokens) % 3, 37 * np.arange(tokens) % (case.topk + 1), 0),
        "zero": np.zeros(tokens, np.int64),
        "hostile": rng.choice(np.array([case.topk, case.topk, case.topk // 2, 1, 0, -5, 10**9, INT_MIN, INT_MAX, case.topk - 1]), tokens),
    }[case.lengths]
    if case.lengths == "hostile" and tokens:
        lengths[0] = case.topk  # so that no such case is empty throughout
    inside = np.arange(case.topk)[None] < lengths[:, None]
    # Past the length anything may stand, a slot that holds NaN included.
    indices = np.where(inside, indices, rng.choice(np.append(nowhere, case.slots - 1), indices.shape))
    attended = np.zeros(slots, bool)
    used = indices[inside & (indices >= 0) & (indices < slots)]
    attended[used] = True
    # Different from tile to tile, so that scales differ.
    spread = np.exp2(log2_magnitude + rng.integers(-8, 1, (slots, 8))).repeat(64, axis=1)
    latents = (rng.standard_normal((slots, 512)) * spread).astype(np.float32)
    cache, values = _make_cache(case, latents, attended, blocks, rng)
    as_int32 = (indices.astype(np.int32), lengths.astype(np.int32))
    return (cache, *as_int32), reference.ReferenceScope(values, *as_int32)


def _make_cache(
    case: ScopeCase, latents: np.ndarray, attended: np.ndarray, blocks: int, rng: np.random.Generator
) -> tuple[dsv4.KVCache, np.ndarray]:
    """The cache with every byte that nobody attends to set (NaN in every format), and its values in float64."""
    if case.layout == "fp8_ds_mla":
        stride = -(-case.block_size * 584 // 576) * 576 + case.stride_extra_bytes
        packed = reference.pack_fp8_ds_mla(latents, case.block_size, stride)
        rows = packed[:, : case.block_size * 576].reshape(blocks, case.block_size, 576)
        groups = packed[:, case.block_size * 576 : case.block_size * 584].reshape(blocks, case.block_size, 8)
        unattended = ~attended.reshape(blocks, case.block_size)
        rows[unattended], groups[unattended], groups[..., 7] = 0xFF, 0xFF, 0xFF
        packed[:, case.block_size * 584 :] = 0xFF
        packed[:, : case.block_size * 576] = rows.reshape(blocks, -1)
        packed[:, case.block_size * 576 : case.block_size * 584] = groups.reshape(blocks, -1)
        cache = dsv4.KVCache(jnp.asarray(packed), block_size=case.block_size)
        return cache, reference.unpack_fp8_ds_mla(packed, case.block_size)
    if case.layout == "aiter_fp8":
        scale = rng.uniform(0.012, 0.03)
        codes = np.where(attended[:, None], latents / scale, np.nan).astype(ml_dtypes.float8_e4m3fn)
        data = np.full((1 + blocks, case.block_size, 576), 0x7F, np.uint8)
        data[0], data[1:, :, :512], data[1:, :, 512:] = 0, codes.view(np.uint8).reshape(blocks, case.block_size, 512), 0
        cache = dsv4.KVCache(jnp.asarray(data), block_size=case.block_size, layout=case.layout, scale=scale)
        return cache, codes.astype(np.float64) * scale
    dtype = ml_dtypes.bfloat16 if case.layout == "bf16" else np.float32
    data = np.where(attended[:, None], latents, np.nan).astype(dtype)
    cache = dsv4.KVCache(jnp.asarray(data.reshape(blocks, case.block_size, 512)), block_size=case.block_size, layout=case.layout)
    return cache, data.astype(np.float64)
