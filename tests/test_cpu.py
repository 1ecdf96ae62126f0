"""The CPU handler, on every instruction set that this machine has."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PACKED, Case, Pair, Problem, in_layouts, make, tagged
from compare import OUT_BF16, assert_close, assert_same_bits
from conformance import NativeConformance, attend, in_pairs, named, one_token, plan_of, with_work
from cpu_bits import save_bits
from programs import assert_same

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, _work
from jax_dsv4._implementations import cpu, native

LIBRARY, DETAIL = _ffi.load("libdsv4_cpu", "cpu")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=DETAIL)


class TestCPU(NativeConformance):
    implementation = "cpu"


@pytest.fixture(params=_ffi.CPU_ISAS)
def isa(request):
    """Has the kernels of an instruction set run."""
    _ffi.name_cpu_isa(LIBRARY, request.param)
    if _ffi.cpu_isa(LIBRARY).name != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _ffi.name_cpu_isa(LIBRARY, None)


@pytest.mark.parametrize("case", tagged("ci")[::3], ids=str)
def test_every_instruction_set(isa: str, case: Case) -> None:
    TestCPU().hold(case)


@in_pairs
def test_layouts_on_all_instruction_sets(pair: Pair, case: Case) -> None:
    for name in _ffi.CPU_ISAS:
        _ffi.name_cpu_isa(LIBRARY, name)
        try:
            TestCPU().hold(in_layouts(case, pair))
        finally:
            _ffi.name_cpu_isa(LIBRARY, None)


BF16 = ["avx2", "avx512", "avx512_bf16"]
AMX = [*BF16, "amx"]


@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("layout", ["fp8_ds_mla", "mxfp8_528"])
def test_every_e4m3_number_at_every_scale(isa: str, layout: str, heads: int) -> None:
    """A token that attends to one latent, twice, gets its numbers as they are: exactly, unless bfloat16 has them as subnormal ones."""
    packing, arrangement = PACKED[layout], None if layout == "fp8_ds_mla" else "inline"
    numbers = 448 if layout == "fp8_ds_mla" else 512
    scales = np.arange(1, 239)  # 0 is no normal float32; with larger ones a float32 does not hold the sum
    tokens = len(scales)
    codes = np.resize(np.setdiff1d(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), numbers)
    codes = np.stack([np.roll(codes, 37 * token) for token in range(tokens)])
    codes[-1, 100] = 0x7F  # NaN
    slots = np.zeros((tokens, packing.row_bytes + packing.scale_bytes), np.uint8)
    slots[:, :numbers], slots[:, -packing.scale_bytes :] = codes, scales[:, None]
    named = () if arrangement is None else (arrangement,)
    packed = np.zeros((tokens, packing.stride(1, arrangement)), np.uint8)
    packed[:, : slots.shape[1]] = slots
    cache = dsv4.KVCache(jnp.asarray(packed), block_size=1, layout=layout, arrangement=arrangement)
    scope = dsv4.Scope(cache, jnp.arange(tokens, dtype=jnp.int32)[:, None].repeat(2, axis=1))
    out = dsv4.sparse_mla_decode(jnp.zeros((tokens, heads, 512), jnp.bfloat16), scope, implementation="cpu")
    out = np.asarray(out, np.float64)
    expected = packing.unpack(packed, 1, *named)[:, None].repeat(heads, axis=1)
    assert np.isnan(out[-1]).all()
    normal = np.abs(expected[:-1]) >= 2.0**-126
    np.testing.assert_array_equal(np.where(normal, out[:-1], 0), np.where(normal, expected[:-1], 0))
    assert np.abs(np.where(normal, 0, out[:-1])).max() <= 2.0**-126


@pytest.mark.parametrize(
    ("vendor", "isas", "named", "chosen", "why"),
    [
        ("AuthenticAMD", [], None, "generic", "this processor's best"),
        ("AuthenticAMD", ["avx2"], None, "avx2", "this processor's best"),
        ("GenuineIntel", ["avx2", "avx512"], None, "avx512", "this processor's best"),
        ("AuthenticAMD", BF16, None, "avx512_bf16", "bf16 products have their full rate on this processor"),
        ("GenuineIntel", BF16, None, "avx512", "this processor's bf16 products are slower than fp32"),
        ("CentaurHauls", BF16, None, "avx512", "bf16 products were not measured on processors of this vendor"),
        ("GenuineIntel", BF16, "avx512_bf16", "avx512_bf16", "JAX_DSV4_CPU_ISA names them"),
        ("AuthenticAMD", BF16, "avx2", "avx2", "JAX_DSV4_CPU_ISA names them"),
        ("AuthenticAMD", ["avx2"], "avx512", "avx2", "this processor's best"),
        ("GenuineIntel", AMX, "avx512_bf16", "avx512_bf16", "JAX_DSV4_CPU_ISA names them"),
        ("GenuineIntel", BF16, "amx", "avx512", "this processor's bf16 products are slower than fp32"),
        ("AuthenticAMD", BF16, "amx", "avx512_bf16", "bf16 products have their full rate on this processor"),
    ],
)
def test_choice(vendor: str, isas: list[str], named: str | None, chosen: str, why: str) -> None:
    assert _ffi.choose_cpu_isa(LIBRARY, vendor, isas, named) == (chosen, why)


@pytest.mark.parametrize("named", [None, "amx"])
@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD", "CentaurHauls"])
def test_choice_of_amx(vendor: str, named: str | None) -> None:
    """Wherever it is permitted; where it is refused, what there is without it, which is told."""
    assert _ffi.choose_cpu_isa(LIBRARY, vendor, AMX, named).name == "amx"
    refused = _ffi.choose_cpu_isa(LIBRARY, vendor, BF16, named, amx_refused=True)
    without = _ffi.choose_cpu_isa(LIBRARY, vendor, BF16, named)
    assert refused == (without.name, "the operating system does not permit AMX")


def test_choice_is_told() -> None:
    isa = _ffi.cpu_isa(LIBRARY)
    assert dsv4.implementations()["cpu"].detail.startswith(f"{isa.name} kernels ({isa.why}), ")


@pytest.mark.parametrize("threads", [1, 2, 5, 16, 64])  # with 64, lanes have no room for all heads of heads127
def test_bits_do_not_depend_on_threads(tmp_path: Path, threads: int) -> None:
    """Calls in a process with so many threads give the same bits on each instruction set, split tokens and head groups included."""
    script = (
        "import sys; import numpy as np\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import cpu_bits\n"
        f"cpu_bits.cpu.CPU.lanes = {threads}\n"
        f"cpu_bits.save_bits({str(tmp_path / 'bits.npz')!r})\n"
    )
    # XLA makes so many threads whatever the machine has.
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": str(threads)})
    save_bits(tmp_path / "here.npz")
    got, want = np.load(tmp_path / "bits.npz"), np.load(tmp_path / "here.npz")
    assert set(got) == set(want)
    for name in want:
        assert_same_bits(name, got[name], want[name])


@pytest.mark.parametrize("topk", [64, 576, 1700])
def test_bits_do_not_depend_on_the_plan(isa: str, topk: int) -> None:
    """Wherever it cuts, and however often; also where more tokens are cut than there is room for partials of, and for a token alone."""
    rng, tokens, heads = np.random.default_rng(0), 30, 5
    cache = dsv4.append(dsv4.KVCache.create(4, 64), jnp.asarray(rng.standard_normal((256, 512)), jnp.float32), jnp.arange(256))

    def scope(topk: int) -> dsv4.Scope:
        indices, lengths = rng.integers(-20, 256, (tokens, topk)), rng.integers(0, topk + 1, tokens)
        return dsv4.Scope(cache, jnp.asarray(indices, jnp.int32), jnp.asarray(lengths, jnp.int32))

    scopes = scope(128), scope(topk)
    q, sink = jnp.asarray(rng.standard_normal((tokens, heads, 512)), jnp.bfloat16), jnp.asarray(rng.standard_normal(heads), jnp.float32)
    p = Problem(q, *scopes, sink, 0.05, out=np.zeros(tokens), lse=np.zeros(tokens))
    plan, want = plan_of(p, "cpu"), attend(p, "cpu")
    for geometry in [(1, 64, 2), (5, 64, 2), (16, 64, 0), (320, 64, 2), (97, 1, 0), (40, 100, 3)]:
        work = native.plan_call([s.lengths for s in scopes], (128, topk), _work.Geometry(*geometry))
        assert_same(attend(p, "cpu", plan=with_work(plan, work)), want)
    for t in range(0, tokens, 7):
        assert_same(attend(one_token(p, t), "cpu"), [x[t : t + 1] for x in want])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one CPU: a lane has no other to move to")
def test_threads_may_run_afterwards_where_they_might_before() -> None:
    """A lane that finds another one on its CPU moves, for the time of a call."""
    p = make(named("many_tokens"))

    def allowed() -> dict[str, str]:
        masks = {}
        for task in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # other threads come and go
                masks[task.name] = re.findall(r"Cpus_allowed:\s*(\S+)", (task / "status").read_text())[0]
        return masks

    attend(p, "cpu")
    before = allowed()
    for _ in range(200):
        attend(p, "cpu")
    for _ in range(100):  # a lane may have a step to do after its call's last task
        after = allowed()
        if not (changed := {task for task in before.keys() & after.keys() if before[task] != after[task]}):
            break
        time.sleep(0.1)
    assert not changed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's instructions")
def test_keys_are_asked_for_ahead() -> None:
    """Each set of kernels has its prefetcht0 or prefetcht1: GCC may take them for nothing to do, and results are the same."""
    path = _ffi.find_library("libdsv4_cpu")
    assert path is not None
    found = re.findall(rb"\x0f\x18[\x08-\x0f\x10-\x17\x48-\x4f\x50-\x57\x88-\x8f\x90-\x97]", path.read_bytes())
    assert len(found) >= 4 * len(_ffi.CPU_ISAS)


@pytest.mark.parametrize("tile_keys", [64, 160])
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
@pytest.mark.parametrize("threads", [2, 16, 32, 64])
def test_threads_share_the_work(threads: int, tokens: int, heads: int, tile_keys: int) -> None:
    """128 + 512 keys a token: tasks for all threads if so many can be had, and at most twice the time of a perfect division."""
    implementation = type(cpu.CPU)()
    implementation.lanes = threads
    lengths = [jnp.full(tokens, n, jnp.int32) for n in (128, 512)]
    work = implementation.plan(lengths, (128, 512), heads, 0)
    items = np.asarray(work.work_info_set)[: int(work.work_indptr[-1])]
    begins, ends = (-(-(items[:, i] - items[:, 0] * 640) // tile_keys) for i in (4, 5))
    segments = (ends - begins)[ends > begins]  # of the items that have any
    assert segments.sum() == tokens * (640 // tile_keys)
    groups = LIBRARY.dsv4_cpu_head_groups(min(len(items), int(segments.sum())), heads, threads)
    finest = int(segments.sum()) * heads // 16
    assert len(segments) * groups >= min(threads, finest)
    free = np.zeros(threads)  # when each thread is
    for item in np.repeat(segments, groups):
        free[free.argmin()] += item / groups
    assert free.max() <= 2 * max(segments.sum() / threads, 16 / heads)


@pytest.mark.parametrize("lanes", [2, 16, 32, 64])
@pytest.mark.parametrize("case", [c for c in tagged("perf") if c.tokens in (1, 16)], ids=str)
def test_workspace_is_small(case: Case, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call needs its inputs, its outputs and less than 32 MB: glibc gives larger blocks back, and their pages are fresh in every call."""
    monkeypatch.setattr(type(cpu.CPU), "lanes", lanes)
    jax.clear_caches()
    cache = jax.eval_shape(lambda: dsv4.KVCache.create(1000, 64))
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    scope = lambda topk: dsv4.Scope(cache, i32(case.tokens, topk), i32(case.tokens))  # noqa: E731
    q = jax.ShapeDtypeStruct((case.tokens, case.heads, 512), jnp.bfloat16)
    call = jax.jit(lambda *a: dsv4.sparse_mla_decode(*a, implementation="cpu"))
    compiled = call.lower(q, scope(case.swa.topk), scope(case.extra.topk)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20


def test_plan_that_contradicts_itself() -> None:
    """Arrays in bounds, and each token covered, but not by items that fit together: NaN there, the others right."""
    p = make(named("many_tokens"))
    plan = plan_of(p, "cpu")
    work = native.plan_call((p.swa.lengths, p.extra.lengths), (128, 256), _work.Geometry(16, 64, 2))
    items, rows = np.array(work.work_info_set), np.array(work.reduce_partial_map)
    split = np.flatnonzero(np.diff(work.reduce_indptr))
    a, b, c = split[:3]
    whole = items[(items[:, 1] == -1) & (items[:, 5] > 0)][0, 0]
    items[items[:, 0] == whole, 1] = 0  # the one item of a token leaves a partial that nobody merges
    first, second = np.flatnonzero(items[:, 0] == a)[:2]
    items[second, 4:6] = items[first, 4], items[first, 4] + items[second, 5] - items[second, 4]  # keys twice, and others never
    items[np.flatnonzero(items[:, 0] == b)[:2], 1] = rows[work.reduce_indptr[b]]  # two partials in one row
    rows[work.reduce_indptr[c]] = rows[work.reduce_indptr[a]]  # merges another token's
    broken = work._replace(work_info_set=jnp.asarray(items), reduce_partial_map=jnp.asarray(rows))
    out = np.asarray(attend(p, "cpu", plan=with_work(plan, broken))[0], np.float64)
    hit = np.isin(np.arange(len(out)), [whole, a, b, c])
    np.testing.assert_array_equal(np.isnan(out).all((1, 2)), hit)
    assert_close("out", out[~hit], p.out[~hit], OUT_BF16)
