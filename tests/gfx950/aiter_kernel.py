"""AITER's persistent MLA kernels called by hand: where they are, their arguments packed, and what they should answer.

This is the test's own reading of the ABI, independent of the handlers in ffi/rocm.
"""

import dataclasses
import importlib.util
import os
import pathlib
import struct

import ml_dtypes
import numpy as np
from compare import Answer, Tolerance

from jax_dsv4 import reference

ROW = 576  # numbers of a cache row and of a query head; the last 64 are zero
LATENT = 512
F8 = ml_dtypes.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Precision:
    """Of kernels on one format of numbers. The weights are cast to it before the second product, each in units of its row's largest: by
    half a step, which is `relative` of a weight and never less than `least` (`Answer.error`). Results are rounded to bfloat16 besides, and
    are sums in float32."""

    dtype: type
    relative: float
    least: float
    out: Tolerance
    lse: Tolerance


# The cosine: the cast of the weights is by about 2 % of a row's norm at worst; over 28 lengths it never fell under 0.99974.
FP8 = Precision(F8, 2.0**-4, 2.0**-10, Tolerance(abs=1e-5, rel=2.0**-8, cosine=1e-3), Tolerance(abs=1e-3, rel=0, cosine=1e-3))
FNUZ = dataclasses.replace(FP8, dtype=ml_dtypes.float8_e4m3fnuz)  # its smallest steps are half as large
# Outputs and weights in bfloat16 are FlashMLA's own, so the cosine is too (tests/compare.py). lse is that of scores in float32: sums of 512
# products, which pass through numbers of about 2^1 to 2^2, each rounded by 2^-24 of itself. Large scores are rounded by more, and are
# larger (but see test_large_scores).
BF16 = Precision(
    ml_dtypes.bfloat16, 2.0**-8, 0.0, Tolerance(abs=1e-5, rel=2.0**-8, cosine=5e-6), Tolerance(abs=1e-6, rel=1e-6, cosine=1e-12)
)


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A kernel: where it comes from, its file, its head count, and the keys that it works on at a time."""

    source: str  # "wheel" or "tree"
    name: str
    heads: int
    tile: int
    kernarg_bytes: int
    has_lse: bool  # writes the final LSE of an unsplit row
    wraps_at_4gib: bool = False  # computes 32-bit offsets into the pool
    architecture: str = "gfx950"

    @property
    def precision(self) -> Precision:
        return BF16 if "a16w16" in self.name else FP8 if self.architecture == "gfx950" else FNUZ

    @property
    def symbol(self) -> str:
        return f"_ZN5aiter{len(self.name)}{self.name}E"


KERNELS = (
    KernelCase("wheel", "mla_a8w8_qh16_qseqlen1_gqaratio16_ps", 16, 64, 288, False, wraps_at_4gib=True),
    KernelCase("tree", "mla_a8w8_qh16_qseqlen1_gqaratio16_ps", 16, 128, 384, False),
    KernelCase("tree", "mla_a8w8_qh16_qseqlen1_gqaratio16_lse_ps", 16, 128, 384, True),
    KernelCase("tree", "mla_a8w8_qh32_qseqlen1_gqaratio32_lse_ps", 32, 128, 304, False, wraps_at_4gib=True),
    KernelCase("tree", "mla_a8w8_qh16_qseqlen4_gqaratio16_lse_v3_ps", 64, 64, 384, True),
    KernelCase("tree", "mla_a8w8_qh32_qseqlen4_gqaratio32_lse_ps", 128, 64, 384, True),
    KernelCase("wheel", "mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps", 16, 64, 256, False, wraps_at_4gib=True),
    KernelCase("tree", "mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_lse_ps", 16, 64, 352, True, wraps_at_4gib=True),
    KernelCase("tree", "mla_a16w16_qh64_qseqlen1_gqaratio64_lse_v3_ps", 64, 64, 384, True),
    KernelCase("tree", "mla_a16w16_qh32_qseqlen4_gqaratio32_lse_ps", 128, 64, 384, True),
    KernelCase("wheel", "mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps", 16, 64, 256, False, True, "gfx942"),
    KernelCase("wheel", "mla_a8w8_qh16_qseqlen1_gqaratio16_ps", 16, 64, 288, False, True, "gfx942"),
    KernelCase("wheel", "mla_a8w8_qh128_m32x4_n16x2_msk0_ps", 128, 64, 288, False, True, "gfx942"),
)


def wheel_directory() -> pathlib.Path | None:
    """hsa/ of an installed amd-aiter, or of one unpacked where JAX_DSV4_AITER_WHEEL says. Nothing of it is imported."""
    if named := os.environ.get("JAX_DSV4_AITER_WHEEL"):
        return pathlib.Path(named) / "aiter_meta/hsa"
    spec = importlib.util.find_spec("aiter_meta")
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / "hsa"


def tree_directory() -> pathlib.Path | None:
    """hsa/ of the AITER source tree that JAX_DSV4_AITER_SOURCE names."""
    named = os.environ.get("JAX_DSV4_AITER_SOURCE")
    return pathlib.Path(named) / "hsa" if named else None


def find(case: KernelCase) -> pathlib.Path | None:
    root = wheel_directory() if case.source == "wheel" else tree_directory()
    path = root / case.architecture / "mla" / f"{case.name}.co" if root else None
    return path if path and path.exists() else None


@dataclasses.dataclass
class Problem:
    precision: Precision
    q: np.ndarray  # of the precision's dtype: [tokens, heads, 576]
    kv: np.ndarray  # [slots, 576]
    indices: np.ndarray  # int32 [tokens, topk]
    lengths: np.ndarray  # int32 [tokens]
    q_scale: float = 1.0
    kv_scale: float = 1.0
    scale: float = LATENT**-0.5


def make_problem(rng, kernel: KernelCase, lengths, topk: int, slots: int = 0, heads: int = 0) -> Problem:
    """Slot 0 is the zero row that padding lanes read; what no token attends to is NaN."""
    precision = kernel.precision
    q_scale, kv_scale = {BF16: (1.0, 1.0), FP8: (0.02, 0.015), FNUZ: (0.04, 0.03)}[precision]  # nothing overflows
    lengths = np.asarray(lengths, np.int32)
    slots = slots or int(max(lengths.max(initial=1), 1)) * 2 + 8

    def pad(x):
        return np.concatenate([x, np.zeros((*x.shape[:-1], ROW - LATENT))], -1).astype(precision.dtype)

    q = pad(rng.normal(size=(len(lengths), heads or kernel.heads, LATENT)) / q_scale)
    kv = pad(rng.normal(size=(slots, LATENT)) / kv_scale)
    indices = np.full((len(lengths), topk), 2**31 - 1, np.int32)  # garbage past the length
    for t, n in enumerate(lengths):
        indices[t, :n] = rng.choice(np.arange(1, slots), n, replace=False)
    used = np.unique(np.concatenate([indices[t, :n] for t, n in enumerate(lengths)] + [[0]]).astype(int))
    mask = np.ones(slots, bool)
    mask[used] = False
    kv[mask] = np.nan
    kv[0] = 0
    return Problem(precision, q, kv, indices, lengths, q_scale, kv_scale)


def answer(precision: Precision, q, scopes, sink=None, scale: float = LATENT**-0.5) -> Answer:
    """float64 attention [tokens, heads, 512] over `reference.ReferenceScope`s, and the error of out that the cast weights explain."""
    out, lse = reference.decode(q, scopes, sink, scale)
    error = np.zeros_like(out)
    for t in np.flatnonzero(np.isfinite(lse).all(-1)):
        valid = [(s.latents, row[(row >= 0) & (row < len(s.latents))]) for s in scopes for row in [s.indices[t, : max(s.lengths[t], 0)]]]
        keys = np.concatenate([latents[row].astype(np.float64) for latents, row in valid])
        scores = scale * q[t] @ keys.T
        top = scores.max(-1)
        weights = np.exp(scores - top[:, None])
        with np.errstate(over="ignore"):
            total = weights.sum(-1) + (0 if sink is None else np.exp(np.asarray(sink, np.float64) - top))
        error[t] = np.maximum(weights * precision.relative, precision.least) @ np.abs(keys) / total[:, None]
    return Answer(out, lse, error)


def expected(p: Problem) -> Answer:
    """On the rounded operands; the cache's scale is taken out, lest a pool of 4 GiB be multiplied by it."""
    scope = reference.ReferenceScope(p.kv[:, :LATENT], p.indices, p.lengths)
    want = answer(p.precision, p.q[..., :LATENT].astype(np.float64) * p.q_scale, [scope], None, p.scale * p.kv_scale)
    return Answer(want.out * p.kv_scale, want.lse, want.error * p.kv_scale)


@dataclasses.dataclass
class Plan:
    work_indptr: np.ndarray
    work_info: np.ndarray
    partials: list  # per token: rows of the partial buffers, or [] when unsplit


def make_plan(p: Problem, workers: int, split_keys: int = 0, split_all: bool = False) -> Plan:
    """Items dealt to workers in turn. Tokens longer than split_keys are cut; split_all gives every item a partial row."""
    topk = p.indices.shape[1]
    items, partials = [], []
    rows = 0
    for t, n in enumerate(p.lengths):
        step = split_keys or max(int(n), 1)
        cuts = [(a, min(a + step, int(n))) for a in range(0, int(n), step)]
        mine = []
        for a, b in cuts:
            row = -1
            if len(cuts) > 1 or split_all:
                row, rows = rows, rows + 1
                mine.append(row)
            items.append([t, row, t, t + 1, t * topk + a, t * topk + b, int(n) - b, 0])
        partials.append(mine)
    order = [[k for k in range(len(items)) if k % workers == w] for w in range(workers)]
    info = np.asarray([items[k] for worker in order for k in worker], np.int32).reshape(-1, 8)
    indptr = np.concatenate([[0], np.cumsum([len(worker) for worker in order])]).astype(np.int32)
    return Plan(indptr, info, partials)


def run(gpu, case: KernelCase, p: Problem, plan: Plan, code: bytes | None = None):
    """Launches the kernel; returns out fp32 and lse with partials combined in NumPy, NaN lse where the kernel gives none."""
    tokens, heads = p.q.shape[:2]
    rows = max(1, sum(map(len, plan.partials)))
    function = gpu.function(code or find(case).read_bytes(), case.symbol)
    buffers = {
        "partial_out": np.full((rows, heads, LATENT), np.nan, np.float32),
        "partial_lse": np.full((rows, heads), np.nan, np.float32),
        "q": p.q.view(np.uint8),
        "kv": p.kv.view(np.uint8),
        "kv_indptr": np.concatenate([[0], np.cumsum(p.lengths)]).astype(np.int32),
        "kv_indices": p.indices,
        "last_page": np.ones(tokens, np.int32),
        "qo_indptr": np.arange(tokens + 1, dtype=np.int32),
        "work_indptr": plan.work_indptr,
        "work_info": plan.work_info,
        "out": np.full((tokens, heads, LATENT), np.nan).astype(ml_dtypes.bfloat16).view(np.uint16),
        "lse": np.full((tokens, heads), np.nan, np.float32),
        "q_scale": np.float32([p.q_scale]),
        "kv_scale": np.float32([p.kv_scale]),
    }
    device = {name: gpu.array(value) if value.nbytes < 2**32 else gpu.in_place(value) for name, value in buffers.items()}
    device["work"] = gpu.array(np.uint64([device["work_indptr"].pointer, device["work_info"].pointer]))
    at = {name: b.pointer for name, b in device.items()}
    arguments = pack(case, at, p, heads)
    try:
        gpu.launch(function, len(plan.work_indptr) - 1, 256, arguments)
        result = {name: device[name].read() for name in ("partial_out", "partial_lse", "out", "lse")}
    finally:
        for b in device.values():
            b.free()
    out = result["out"].view(ml_dtypes.bfloat16).astype(np.float32)
    lse = result["lse"]
    for t, mine in enumerate(plan.partials):
        if mine:
            part = result["partial_lse"][mine]
            top = part.max(0)
            weights = np.exp(part - top)
            lse[t] = top + np.log(weights.sum(0))
            out[t] = (weights[..., None] * result["partial_out"][mine]).sum(0) / weights.sum(0)[:, None]
    return out, lse


def pack(case: KernelCase, at: dict, p: Problem, heads: int) -> bytes:
    row = ROW * p.kv.itemsize
    slots = [
        at["partial_out"], at["partial_lse"], at["q"], at["kv"], at["kv_indptr"], at["kv_indices"], at["last_page"],
        float(p.scale), heads, 1, heads * row, row, 0, at["qo_indptr"], at["work"], at["out"], at["q_scale"], at["kv_scale"],
        1, at["lse"], 0, 1, 0, 0,
    ]  # fmt: skip
    packed = b"".join(struct.pack("<fxxxxxxxxxxxx", s) if isinstance(s, float) else struct.pack("<Qxxxxxxxx", s) for s in slots)
    return packed[: case.kernarg_bytes]
