"""The shapes and the hostile data that every backend is held to. Read by the tests and by the benchmarks.

Tags: `ci` runs everywhere; `corner` the odd ones; `flashmla` FlashMLA's own test grid
(`flashmla-large` its larger batches); `perf` what benchmarks time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jax_dsv4 as dsv4
from jax_dsv4 import reference

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


class Packing(NamedTuple):
    """A layout with scales, as the oracle has it, and where it has a slot's bytes."""

    pack: Callable[..., np.ndarray]
    unpack: Callable[..., np.ndarray]
    row_bytes: int
    scale_bytes: int
    stride_multiple: int

    def stride(self, block_size: int, arrangement: str | None, extra_bytes: int = 0) -> int:
        """A block's, at least `extra_bytes` more than `KVCache.create` gives it."""
        multiple = self.row_bytes + self.scale_bytes
        if arrangement == "inline":
            return (block_size + -(-extra_bytes // multiple)) * multiple
        return -(-block_size * multiple // self.stride_multiple) * self.stride_multiple + extra_bytes

    def slot_bytes(self, block_size: int, arrangement: str | None) -> np.ndarray:
        """[block_size, bytes of a slot]: each slot's numbers, then its scales."""
        in_order = np.arange(block_size * (self.row_bytes + self.scale_bytes))
        if arrangement == "inline":
            return in_order.reshape(block_size, -1)
        return np.concatenate([part.reshape(block_size, -1) for part in np.split(in_order, [block_size * self.row_bytes])], axis=1)


PACKED = {
    "fp8_ds_mla": Packing(reference.pack_fp8_ds_mla, reference.unpack_fp8_ds_mla, 576, 8, 576),
    "mxfp8_528": Packing(reference.pack_mxfp8_528, reference.unpack_mxfp8_528, 512, 16, 512),
    "nvfp4_288": Packing(reference.pack_nvfp4_288, reference.unpack_nvfp4_288, 256, 32, 512),
}


@dataclass(frozen=True)
class ScopeCase:
    """One scope: `slots` cached positions in blocks of `block_size` (the last one part empty), `topk` entries a token."""

    topk: int
    slots: int = 640
    block_size: int = 64
    layout: str = "fp8_ds_mla"
    arrangement: str | None = None
    stride_extra_bytes: int = 0  # in whole slots where those are inline
    lengths: str = "hostile"  # full, random, hostile, gaps, zero
    holes: float = 0.1  # share of entries that name no slot
    twice: bool = False  # the first entry is the last one too


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


_WINDOW = {"layout": "mxfp8_528", "arrangement": "inline", "block_size": 32}
_ENTRIES = {"layout": "nvfp4_288", "arrangement": "inline"}
# Every pair of caches that one call may have: (layout, arrangement) of the window's and of the entries'.
Pair = tuple[tuple[str, str | None], tuple[str, str | None]]
_FORMS = (("fp8_ds_mla", None), ("bf16", None), ("mxfp8_528", "inline"), ("mxfp8_528", "footer"))
PAIRS: list[Pair] = [(swa, extra) for swa in _FORMS for extra in (*_FORMS, ("nvfp4_288", "inline"), ("nvfp4_288", "footer"))]


def in_layouts(case: Case, pair: Pair) -> Case:
    """The case with other caches."""
    scopes = [
        scope and dataclasses.replace(scope, layout=layout, arrangement=arrangement)
        for scope, (layout, arrangement) in zip((case.swa, case.extra), pair)
    ]
    return dataclasses.replace(case, swa=scopes[0], extra=scopes[1])


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
    for layout in ("fp8_ds_mla", "bf16", "float32"):  # AITER's precision is another: tests/gfx950
        for dtype in ("bfloat16", "float32"):
            swa, extra = ScopeCase(128, layout=layout), ScopeCase(90, block_size=2, layout=layout)
            cases.append(Case(f"{layout}-q_{dtype}", 16, 6, swa, extra, dtype=dtype))
    cases += [
        Case("mixed_layouts", 16, 4, ScopeCase(128, layout="bf16"), ScopeCase(128), tags=("ci", "corner")),
        # DeepSeek-V4.1: a window of 133 keys where a draft model adds 5; 6 query tokens a request, one of its entries attended to
        # twice; and 100 entries of 128 heads.
        Case("v4.1-draft", 64, 6, ScopeCase(133, **_WINDOW)),
        Case("v4.1-verify", 64, 12, ScopeCase(128, **_WINDOW), ScopeCase(512, slots=1500, twice=True, **_ENTRIES)),
        Case("v4.1-topk100", 128, 4, ScopeCase(128, **_WINDOW), ScopeCase(100, slots=512, block_size=5, **_ENTRIES)),
        Case("v4.1-float32", 8, 3, ScopeCase(133, **_WINDOW), ScopeCase(100, block_size=16, **_ENTRIES), dtype="float32"),
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
    for tokens, topk in ((1, 512), (4, 512), (16, 512), (64, 512), (16, 1024)):
        for heads in (16, 64, 128):
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
    if case.twice:
        indices[:, -1] = indices[:, 0]
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
    if case.layout in PACKED:
        packing = PACKED[case.layout]
        named = () if case.arrangement is None else (case.arrangement,)
        stride = packing.stride(case.block_size, case.arrangement, case.stride_extra_bytes)
        packed = np.full((blocks, stride), 0xFF, np.uint8)
        slots = np.full((len(attended), packing.row_bytes + packing.scale_bytes), 0xFF, np.uint8)
        values = np.full(latents.shape, np.nan)
        if attended.any():  # in blocks of their own: packing all slots of a large cache takes a long time
            alone = packing.pack(latents[attended], 1, packing.stride(1, case.arrangement), *named)
            slots[attended] = alone[:, packing.slot_bytes(1, case.arrangement)[0]]
            values[attended] = packing.unpack(alone, 1, *named)
        packed[:, packing.slot_bytes(case.block_size, case.arrangement)] = slots.reshape(blocks, case.block_size, -1)
        cache = dsv4.KVCache(jnp.asarray(packed), block_size=case.block_size, layout=case.layout, arrangement=case.arrangement)
        return cache, values
    if case.layout == "aiter_fp8":
        scale = rng.uniform(0.012, 0.03)
        codes = np.where(attended[:, None], latents / scale, np.nan).astype(ml_dtypes.float8_e4m3fn)
        data = np.full((1 + blocks, case.block_size, 576), 0x7F, np.uint8)
        data[0], data[1:, :, :512], data[1:, :, 512:] = 0, codes.view(np.uint8).reshape(blocks, case.block_size, 512), 0
        cache = dsv4.KVCache(jnp.asarray(data), block_size=case.block_size, layout=case.layout, scale=scale)
        return cache, codes.astype(np.float64) * scale
    dtype = np.float32 if case.layout == "float32" else ml_dtypes.bfloat16
    data = np.where(attended[:, None], latents, np.nan).astype(dtype)
    if case.layout == "aiter_bf16":
        rows = np.zeros((1 + blocks, case.block_size, 576), dtype)
        rows[1:, :, :512] = data.reshape(blocks, case.block_size, 512)
        return dsv4.KVCache(jnp.asarray(rows), block_size=case.block_size, layout=case.layout), data.astype(np.float64)
    cache = dsv4.KVCache(jnp.asarray(data.reshape(blocks, case.block_size, 512)), block_size=case.block_size, layout=case.layout)
    return cache, data.astype(np.float64)
