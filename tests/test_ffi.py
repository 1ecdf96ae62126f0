"""The boundary to native code: what the targets say to another caller, what Python and C++ both state, and a library that is absent."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import make, tagged

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, _work
from jax_dsv4 import cache as kv
from jax_dsv4._implementations import aiter
from jax_dsv4._implementations.cpu import CPU
from jax_dsv4._implementations.cuda import CUDA

ROOT = Path(__file__).resolve().parents[1]
LIBRARY, DETAIL = _ffi.load("libdsv4_cpu", "cpu")
with_library = pytest.mark.skipif(LIBRARY is None, reason=DETAIL)

INT_MAX = 2**31 - 1
TOKENS, HEADS, WORKERS = 3, 4, 8
LANE = CPU.lane_bytes(HEADS)
i32, f32, bf16, u8 = jnp.int32, jnp.float32, jnp.bfloat16, jnp.uint8

PLAN_ATTRIBUTES = dict(swa_topk=6, extra_topk=5, active_workers=WORKERS, granularity=64, overhead=2, cut_cost=4, segment=0)

# target -> operands, results, attributes of a call that is right. A buffer is (dtype, *shape).
PLAN_ARRAYS = {
    "kv_lengths": (i32, TOKENS),
    "work_indptr": (i32, WORKERS + 1),
    "work_info_set": (i32, TOKENS + WORKERS - 1, 8),
    "reduce_indptr": (i32, TOKENS + 1),
    "reduce_final_map": (i32, TOKENS, 2),
    "reduce_partial_map": (i32, TOKENS + WORKERS - 1),
}
TARGETS: dict[str, tuple[dict, dict, dict]] = {
    "dsv4_plan": (
        {"swa_lengths": (i32, TOKENS), "extra_lengths": (i32, TOKENS)},
        PLAN_ARRAYS,
        {name: np.int32(n) for name, n in PLAN_ATTRIBUTES.items()},
    ),
    "dsv4_decode": (
        {
            "q": (bf16, TOKENS, HEADS, 512),
            "attn_sink": (f32, HEADS),
            "swa.cache": (u8, 2, 4 * 584),
            "swa.indices": (i32, TOKENS, 6),
            "swa.lengths": (i32, TOKENS),
            "extra.cache": (bf16, 2, 4, 512),
            "extra.indices": (i32, TOKENS, 5),
            "extra.lengths": (i32, TOKENS),
            **PLAN_ARRAYS,
        },
        {
            "out": (bf16, TOKENS, HEADS, 512),
            "lse": (f32, TOKENS, HEADS),
            "partial_out": (f32, 2, HEADS, 512),
            "partial_lse": (f32, 2, HEADS * CPU.partial_numbers),
            "counters": (i32, TOKENS, CPU.counters_per_token),
            "workspace": (u8, 2, LANE),
        },
        {
            "scale": np.float32(0.05),
            "has_sink": True,
            "batch_invariant": False,
            "swa_block_size": np.int32(4),
            "swa_layout": np.int32(0),
            "swa_inline": np.int32(0),
            "extra_block_size": np.int32(4),
            "extra_layout": np.int32(1),
            "extra_inline": np.int32(0),
        },
    ),
    "dsv4_append": (
        {"cache": (u8, 2, 4 * 584), "latents": (f32, 3, 512), "slots": (i32, 3)},
        {"updated": (u8, 2, 4 * 584)},
        {"block_size": np.int32(4), "layout": np.int32(0), "inline": np.int32(0)},
    ),
}


def call(target: str, changed: dict[str, object] | None = None):
    """The target with some operands (zeros, or an array), results or attributes changed; an attribute of None is left out."""
    changed = dict(changed or {})
    operands, results, attributes = ({name: changed.pop(name, value) for name, value in part.items()} for part in TARGETS[target])
    attributes |= changed
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in results.values()]
    arrays = [x if isinstance(x, np.ndarray) else jnp.zeros(x[1:], x[0]) for x in operands.values()]
    given = {name: value for name, value in attributes.items() if value is not None}
    return jax.block_until_ready(jax.jit(lambda *a: jax.ffi.ffi_call(target, shapes)(*a, **given))(*arrays))


@with_library
@pytest.mark.parametrize("target", TARGETS)
def test_the_call_that_the_others_change(target: str) -> None:
    results = call(target)
    assert [r.shape for r in results] == [tuple(shape) for _, *shape in TARGETS[target][1].values()]


DECODE = "sparse_mla_decode"
ITEMS = TOKENS + WORKERS - 1
# (target, what is changed, the message)
BAD_CALLS = [
    ("dsv4_decode", {"q": (bf16, TOKENS, 512)}, f"{DECODE}: q must have shape (tokens, heads, 512) = (*, *, 512), got (3, 512)"),
    ("dsv4_decode", {"q": (bf16, 3, 4, 576)}, f"{DECODE}: q must have shape (tokens, heads, 512) = (*, *, 512), got (3, 4, 576)"),
    ("dsv4_decode", {"q": (i32, 3, 4, 512)}, f"{DECODE}: q must have dtype bfloat16, got int32"),
    ("dsv4_decode", {"q": (bf16, 3, 0, 512)}, f"{DECODE}: q must have 1 to 128 heads, got 0"),
    ("dsv4_decode", {"q": (bf16, 3, 129, 512)}, f"{DECODE}: q must have 1 to 128 heads, got 129"),
    ("dsv4_decode", {"has_sink": False}, f"{DECODE}: attn_sink must have shape (0,) = (0,), got (4,)"),
    ("dsv4_decode", {"attn_sink": (f32, 5)}, f"{DECODE}: attn_sink must have shape (heads,) = (4,), got (5,)"),
    ("dsv4_decode", {"attn_sink": (bf16, 4)}, f"{DECODE}: attn_sink must have dtype float32, got bfloat16"),
    ("dsv4_decode", {"swa.cache": (f32, 2, 2336)}, f"{DECODE}: swa.cache must have dtype uint8, got float32"),
    (
        "dsv4_decode",
        {"swa.cache": (u8, 2, 4, 584)},
        f"{DECODE}: swa.cache must have shape (num_blocks, block_stride_bytes) = (*, *), got (2, 4, 584)",
    ),
    (
        "dsv4_decode",
        {"swa.cache": (u8, 2, 2335)},
        f"{DECODE}: swa.cache.block_stride_bytes must be at least block_size * 584 = 2336, got 2335",
    ),
    ("dsv4_decode", {"swa_block_size": np.int32(0)}, f"{DECODE}: swa.cache.block_size must be positive, got 0"),
    ("dsv4_decode", {"swa_block_size": np.int32(-4)}, f"{DECODE}: swa.cache.block_size must be positive, got -4"),
    (
        "dsv4_decode",
        {"swa_block_size": np.int32(INT_MAX)},
        f"{DECODE}: swa.cache.block_stride_bytes must be at least block_size * 584 = {584 * INT_MAX}, got 2336",
    ),
    ("dsv4_decode", {"swa_inline": np.int32(1)}, f"{DECODE}: swa.cache.inline must be 0 in this layout, got 1"),
    ("dsv4_decode", {"swa_layout": np.int32(5), "swa_inline": np.int32(2)}, f"{DECODE}: swa.cache.inline must be 0 or 1, got 2"),
    (
        "dsv4_decode",
        {"swa_layout": np.int32(5), "swa_inline": np.int32(1)},
        f"{DECODE}: swa.cache.block_stride_bytes must be a multiple of 528, an inline slot, got 2336",
    ),
    (
        "dsv4_append",
        {"cache": (u8, 2, 1151), "layout": np.int32(6)},
        "append: cache.block_stride_bytes must be at least block_size * 288 = 1152, got 1151",
    ),
    ("dsv4_decode", {"swa_layout": np.int32(99)}, f"{DECODE}: swa.cache.layout must be one that this platform reads, got 99"),
    ("dsv4_decode", {"extra_layout": np.int32(-1)}, f"{DECODE}: extra.cache.layout must be one that this platform reads, got -1"),
    ("dsv4_decode", {"extra_layout": np.int32(2)}, f"{DECODE}: extra.cache must have dtype float32, got bfloat16"),
    (
        "dsv4_decode",
        {"extra_block_size": np.int32(8)},
        f"{DECODE}: extra.cache must have shape (num_blocks, block_size, 512) = (*, 8, 512), got (2, 4, 512)",
    ),
    ("dsv4_decode", {"swa.indices": (i32, 2, 6)}, f"{DECODE}: swa.indices must have shape (tokens, topk) = (3, *), got (2, 6)"),
    ("dsv4_decode", {"extra.indices": (u8, 3, 5)}, f"{DECODE}: extra.indices must have dtype int32, got uint8"),
    ("dsv4_decode", {"extra.lengths": (i32, 3, 1)}, f"{DECODE}: extra.lengths must have shape (tokens,) = (3,), got (3, 1)"),
    ("dsv4_decode", {"kv_lengths": (i32, 4)}, f"{DECODE}: plan.kv_lengths must have shape (tokens,) = (3,), got (4,)"),
    ("dsv4_decode", {"work_indptr": (i32, 1)}, f"{DECODE}: plan.work_indptr must have at least 2 entries, got 1"),
    ("dsv4_decode", {"work_info_set": (i32, 5, 7)}, f"{DECODE}: plan.work_info_set must have shape (max_items, 8) = (*, 8), got (5, 7)"),
    ("dsv4_decode", {"reduce_indptr": (i32, 3)}, f"{DECODE}: plan.reduce_indptr must have shape (tokens + 1,) = (4,), got (3,)"),
    ("dsv4_decode", {"reduce_final_map": (i32, 3)}, f"{DECODE}: plan.reduce_final_map must have shape (tokens, 2) = (3, 2), got (3,)"),
    ("dsv4_decode", {"reduce_partial_map": (f32, 3)}, f"{DECODE}: plan.reduce_partial_map must have dtype int32, got float32"),
    ("dsv4_decode", {"out": (i32, 3, 4, 512)}, f"{DECODE}: out must have dtype bfloat16, got int32"),
    ("dsv4_decode", {"out": (f32, 3, 4, 256)}, f"{DECODE}: out must have shape (tokens, heads, 512) = (3, 4, 512), got (3, 4, 256)"),
    ("dsv4_decode", {"lse": (f32, 3, 5)}, f"{DECODE}: lse must have shape (tokens, heads) = (3, 4), got (3, 5)"),
    (
        "dsv4_decode",
        {"partial_out": (f32, 2, 3, 512)},
        f"{DECODE}: partial_out must have shape (max_partials, heads, 512) = (*, 4, 512), got (2, 3, 512)",
    ),
    (
        "dsv4_decode",
        {"partial_lse": (f32, 1, 4)},
        f"{DECODE}: partial_lse must have shape (max_partials, heads * numbers) = (2, 8), got (1, 4)",
    ),
    ("dsv4_decode", {"counters": (i32, 3, 1)}, f"{DECODE}: counters must have shape (tokens, counters) = (3, 10), got (3, 1)"),
    ("dsv4_decode", {"workspace": (f32, 2, LANE)}, f"{DECODE}: workspace must have dtype uint8, got float32"),
    ("dsv4_decode", {"workspace": (u8, LANE)}, f"{DECODE}: workspace must have shape (lanes, lane_bytes) = (*, *), got ({LANE},)"),
    ("dsv4_decode", {"workspace": (u8, 1, LANE - 1)}, f"{DECODE}: workspace must have lanes of at least {LANE} bytes, got {LANE - 1}"),
    ("dsv4_plan", {"swa_lengths": (f32, 3)}, "plan_decode: swa_lengths must have dtype int32, got float32"),
    ("dsv4_plan", {"swa_lengths": (i32, 3, 1)}, "plan_decode: swa_lengths must have shape (tokens,) = (*,), got (3, 1)"),
    ("dsv4_plan", {"extra_lengths": (i32, 2)}, "plan_decode: extra_lengths must have shape (tokens,) = (3,), got (2,)"),
    ("dsv4_plan", {"swa_topk": np.int32(-1)}, "plan_decode: swa_topk must not be negative, got -1"),
    ("dsv4_plan", {"extra_topk": np.int32(-1)}, "plan_decode: extra_topk must not be negative, got -1"),
    ("dsv4_plan", {"granularity": np.int32(0)}, "plan_decode: granularity must be positive, got 0"),
    ("dsv4_plan", {"overhead": np.int32(-1)}, "plan_decode: overhead must not be negative, got -1"),
    ("dsv4_plan", {"cut_cost": np.int32(-1)}, "plan_decode: cut_cost must not be negative, got -1"),
    ("dsv4_plan", {"segment": np.int32(-1)}, "plan_decode: segment must not be negative, got -1"),
    (
        "dsv4_plan",
        {"overhead": np.int32(INT_MAX)},
        f"plan_decode: the cost of all items in blocks must fit int32, got {3 * (1 + INT_MAX) + INT_MAX}",
    ),
    ("dsv4_plan", {"swa_topk": np.int32(INT_MAX)}, f"plan_decode: tokens * topk must fit int32, got {3 * (INT_MAX + 5)}"),
    ("dsv4_plan", {"active_workers": np.int32(0)}, "plan_decode: active_workers must be from 1 to workers = 8, got 0"),
    ("dsv4_plan", {"active_workers": np.int32(9)}, "plan_decode: active_workers must be from 1 to workers = 8, got 9"),
    ("dsv4_plan", {"kv_lengths": (i32, 2)}, "plan_decode: plan.kv_lengths must have shape (tokens,) = (3,), got (2,)"),
    (
        "dsv4_plan",
        {"work_info_set": (i32, ITEMS - 1, 8)},
        f"plan_decode: work_info_set must have at least tokens + active_workers - 1 = {ITEMS} rows, got {ITEMS - 1}",
    ),
    ("dsv4_plan", {"reduce_partial_map": (i32, 9)}, "plan_decode: reduce_partial_map must have at least 10 entries, got 9"),
    ("dsv4_append", {"cache": (u8, 2, 100)}, "append: cache.block_stride_bytes must be at least block_size * 584 = 2336, got 100"),
    ("dsv4_append", {"layout": np.int32(3)}, "append: cache.layout must be one that this platform reads, got 3"),
    ("dsv4_append", {"block_size": np.int32(-1)}, "append: cache.block_size must be positive, got -1"),
    ("dsv4_append", {"latents": (f32, 3, 576)}, "append: latents must have shape (count, 512) = (*, 512), got (3, 576)"),
    ("dsv4_append", {"latents": (u8, 3, 512)}, "append: latents must have dtype bfloat16, got uint8"),
    ("dsv4_append", {"slots": (i32, 4)}, "append: slots must have shape (count,) = (3,), got (4,)"),
    ("dsv4_append", {"slots": (f32, 3)}, "append: slots must have dtype int32, got float32"),
    ("dsv4_append", {"updated": (u8, 2, 2335)}, "append: the result must have the cache's size, got 4670"),
]


@with_library
@pytest.mark.parametrize(("target", "changed", "message"), BAD_CALLS, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_bad_call(target: str, changed: dict, message: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call(target, changed)
    assert str(caught.value).splitlines()[0] == f"INVALID_ARGUMENT: {message}"


@with_library
@pytest.mark.parametrize(
    ("target", "changed"),
    [
        ("dsv4_decode", {"scale": 0.05}),  # a Python float is F64
        ("dsv4_decode", {"swa_layout": None}),
        ("dsv4_plan", {"overhead": 2}),  # a Python int is S64
        ("dsv4_plan", {"surplus": np.int32(1)}),
        ("dsv4_append", {"block_size": "4"}),
    ],
)
def test_bad_attributes(target: str, changed: dict) -> None:
    """XLA itself refuses them."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"^INVALID_ARGUMENT: "):
        call(target, changed)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
@pytest.mark.parametrize("name", ["libdsv4_cpu", "libdsv4_cuda", "libdsv4_rocm"])
def test_nothing_but_targets_is_exported(name: str) -> None:
    """Symbols of the C++ library, of which jaxlib may bring another, would be mixed with its own."""
    path = _ffi.find_library(name)
    if path is None:
        pytest.skip(f"{name} was not built")
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", path], text=True)
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert "dsv4_" in symbols
    assert not [symbol for symbol in names if not symbol.startswith("dsv4_")]


@with_library
@pytest.mark.parametrize("target", TARGETS)
def test_too_few_buffers(target: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?s)^INVALID_ARGUMENT: .*number of arguments"):
        jax.block_until_ready(jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((), f32))(jnp.zeros(3)))


@with_library
def test_plan_of_zeros() -> None:
    """A plan that plans nothing: a token without keys needs none, the others are NaN."""
    lengths = np.array([0, 5, INT_MAX], np.int32)
    out, lse, *_ = call("dsv4_decode", {"swa.lengths": lengths})
    assert np.isneginf(lse[0]).all()
    assert not np.asarray(out[0]).any()
    assert np.isnan(lse[1:]).all()
    assert np.isnan(np.asarray(out[1:], np.float32)).all()


@with_library
@pytest.mark.parametrize(("fused", "calls"), [(None, 1), (False, 2)])
def test_one_handler_call_per_decode(fused: bool | None, calls: int) -> None:
    """And one plan, or none where it is passed in."""
    p = make(next(c for c in tagged("ci") if c.name == "swa_empty"))
    plan = dsv4.plan_decode(p.swa.lengths, p.extra.lengths, num_heads=16, swa_topk=128, extra_topk=64, fused=fused)
    for given, plans in ((None, calls), (plan, 0)):
        program = jax.jit(lambda *a, plan=given: dsv4.sparse_mla_decode(*a, plan=plan, fused=fused))
        text = program.lower(p.q, p.swa, p.extra).compile().as_text()
        targets = re.findall(r'custom_call_target="(dsv4_\w+)"', text)
        assert sorted(targets) == ["dsv4_decode"] * calls + ["dsv4_plan"] * plans


# --- What is stated twice


def constants(*headers: str) -> dict[str, int]:
    """Every `constexpr <integer> kName = <expression>;`, and the codes of enum Layout."""
    values: dict[str, int] = {}
    for header in headers:
        text = re.sub(r"//[^\n]*", "", (ROOT / "ffi" / header).read_text())
        for name, expression in re.findall(r"constexpr (?:int|size_t|int32_t|int64_t) (k\w+) = ([^;{]+);", text):
            values[name] = eval(expression.replace("/", "//"), {}, values)
        for body in re.findall(r"enum class Layout[^{]*\{([^}]*)\}", text):
            values |= {f"Layout::{name}": int(code) for name, code in re.findall(r"(k\w+) = (\d+)", body)}
    return values


def test_python_and_cpp_state_the_same() -> None:
    cpp = constants("common/params.h", "cpu/launch.h")
    expected = {
        "kMaxHeads": _work.MAX_HEADS,
        "kLatentDim": kv.LATENT_DIM,
        "kRopeDim": kv.ROPE_DIM,
        "kNopeDim": kv.NOPE_DIM,
        "kScaleTile": kv.SCALE_TILE,
        "kScaleTiles": kv.SCALE_TILES,
        "kPackedRowBytes": kv.PACKED_ROW_BYTES,
        "kPackedScaleBytes": kv.PACKED_SCALE_BYTES,
        "kPackedTokenBytes": kv.PACKED_TOKEN_BYTES,
        "kMxfp8Tile": kv.MXFP8_TILE,
        "kNvfp4Tile": kv.NVFP4_TILE,
        "kPlanKeys": CPU.geometry(1).granularity,
        "kLaneBytesFixed": CPU.lane_bytes_fixed - 64,  # Python's has room to align
        "kLaneBytesPerHead": CPU.lane_bytes_per_head - cpp["kMergeBytesPerHead"],
        "kHeadBlock": CPU.head_block,
        "kMaxHeadGroups": CPU.head_groups,
        "kTokenCounters": CPU.counters_per_token,
        "kMaxSegments": CPU.max_segments,
        "kPartialNumbers": CPU.partial_numbers,
    }
    assert {name: cpp[name] for name in expected} == expected
    of_cuda = {
        "kHeadsPerBlock": CUDA.heads_per_block,
        "kKeyTile": CUDA.geometry(1).granularity,
        "kPartialHeads": CUDA.partial_heads,
        "kFewHeads": CUDA.few_heads,
        "kMostProcessors": CUDA.multiprocessors,
    }
    assert constants("cuda/launch.h") == of_cuda
    of_rocm = {
        "kRowNumbers": kv.AITER_ROW,
        "kZeroBlocks": kv.LAYOUTS["aiter_fp8"].zero_blocks,
        "kAmaxBlocks": aiter.AMAX_BLOCKS,
    }
    assert constants("rocm/params.h").items() >= of_rocm.items()
    assert (kv.NOPE_DIM, kv.PACKED_ROW_BYTES, kv.PACKED_TOKEN_BYTES) == (448, 576, 584)
    for name, layout in (("Mxfp8", kv.LAYOUTS["mxfp8_528"]), ("Nvfp4", kv.LAYOUTS["nvfp4_288"])):
        assert (cpp[f"k{name}RowBytes"], cpp[f"k{name}ScaleBytes"]) == (layout.row_bytes, layout.scale_bytes)
    spelled = {"fp8_ds_mla": "kFp8DsMla", "bf16": "kBf16", "float32": "kFloat32", "aiter_fp8": "kAiterFp8"}
    spelled |= {"aiter_bf16": "kAiterBf16", "mxfp8_528": "kMxfp8", "nvfp4_288": "kNvfp4", "aiter_fp8_fnuz": "kAiterFp8Fnuz"}
    assert {name: cpp[f"Layout::{spelled[name]}"] for name in kv.LAYOUTS} == {name: layout.code for name, layout in kv.LAYOUTS.items()}


@pytest.mark.parametrize("workers", [1, 2, 16, 256, _work.MAX_WORKERS])
@pytest.mark.parametrize("tokens", [1, 7, 2048])
def test_plan_capacity(tokens: int, workers: int) -> None:
    """The C++ planner's own formulas (test_bad_call has what it answers to less)."""
    items, partials = _work.plan_capacity(tokens, workers)
    assert items == tokens + workers - 1
    assert partials == max(1, min(items, 2 * (workers - 1)))


@with_library
def test_instruction_sets_have_the_names_that_python_gives_them() -> None:
    enumerated = re.search(r"enum Isa : int \{([^}]*)\}", (ROOT / "ffi/cpu/choose.h").read_text())
    kernels = re.search(r"kKernels\[kIsas\] = \{([^}]*)\}", (ROOT / "ffi/cpu/decode.cc").read_text())
    assert enumerated is not None
    assert kernels is not None
    assert re.findall(r"k(\w+)", enumerated[1]) == [*(name.title().replace("_", "") for name in _ffi.CPU_ISAS), "Isas"]
    assert tuple(re.findall(r"&(\w+)_kernels", kernels[1])) == _ffi.CPU_ISAS


# --- A library that is absent


def test_a_library_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that builds it, unless a variable says where it should be."""
    monkeypatch.delenv("JAX_DSV4_LIBRARY_DIR", raising=False)
    library, detail = _ffi.load.__wrapped__("libdsv4_nowhere", "cpu")
    assert library is None
    assert re.fullmatch(r"libdsv4_nowhere.so was not built \((JAX_DSV4_COMPILERS=pypi )?pip install .*", detail)


ABSENT = """
import jax, jax.numpy as jnp, jax_dsv4 as dsv4
here, reason = dsv4.implementations()["cpu"]
print(here, reason, sep="|")
cache = dsv4.KVCache.create(1, 4, "float32")
q, scope = jnp.ones((1, 2, 512)), dsv4.Scope(cache, jnp.zeros((1, 1), jnp.int32))
calls = [
    lambda **i: dsv4.sparse_mla_decode(q, scope, **i),
    lambda **i: dsv4.append(cache, q[0], jnp.zeros(2, jnp.int32), **i),
    lambda **i: dsv4.plan_decode(jnp.zeros(1, jnp.int32), num_heads=2, swa_topk=1, **i),
]
for call in calls:
    call(), call(implementation=("cpu", "xla"))
    try:
        call(implementation="cpu")
    except NotImplementedError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"libdsv4_cpu.so is not in .*, which JAX_DSV4_LIBRARY_DIR names"),
        ("no library", r".*libdsv4_cpu.so cannot be loaded: .*"),
    ],
)
def test_absent_library(tmp_path: Path, content: str | None, reason: str) -> None:
    """It says why, to whoever asks and to whoever insists; everybody else gets the next implementation."""
    if content is not None:
        (tmp_path / "libdsv4_cpu.so").write_text(content)
    environment = os.environ | {"JAX_DSV4_LIBRARY_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    first, *errors = result.stdout.strip().splitlines()
    assert re.fullmatch(f"False\\|{reason}", first)
    said = first.split("|")[1]
    (warning,) = re.findall("UserWarning: jax_dsv4: no implementation 'cpu' for cpu, another runs: (.*). See", result.stderr)
    assert warning == said
    ops = ("sparse_mla_decode", "append", "plan_decode")
    assert errors == [f"{op}: implementation='cpu' cannot run this call. cpu: {said}" for op in ops]
