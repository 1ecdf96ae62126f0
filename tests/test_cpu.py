"""The CPU handler, on every instruction set that this machine has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make, plan_of, tagged
from compare import LSE, OUT_BF16, assert_close, assert_same_bits
from conformance import Conformance, check, run

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, _work
from jax_dsv4._implementations import cpu, native
from jax_dsv4._implementations.interface import KernelCall

LIBRARY, DETAIL = _ffi.load("libdsv4_cpu", "cpu")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=DETAIL)


class TestCPU(Conformance):
    implementation = "cpu"

    @pytest.mark.parametrize("case", tagged("flashmla-large"), ids=str)
    def test_flashmla_grid_large(self, case: Case) -> None:
        check(case, *run(case, "cpu"))


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
    check(case, *run(case, "cpu"))


BF16 = ["avx2", "avx512", "avx512_bf16"]
AMX = [*BF16, "amx"]


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


BIT_CASES = [c for c in tagged("ci") if c.name in ("one_token_split", "many_tokens", "heads127", "one_scope")]


@pytest.mark.parametrize("threads", [1, 2, 5, 16, 64])  # with 64, lanes have no room for all heads of heads127
def test_bits_do_not_depend_on_threads(tmp_path: Path, threads: int) -> None:
    """Calls in a process with so many threads give the same bits on each instruction set, split tokens and head groups included."""
    script = (
        "import sys; import numpy as np\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cpu\n"
        f"test_cpu.cpu.CPU.lanes = {threads}\n"
        f"test_cpu.save_bits({str(tmp_path / 'bits.npz')!r})\n"
    )
    # XLA makes so many threads whatever the machine has.
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": str(threads)})
    save_bits(tmp_path / "here.npz")
    got, want = np.load(tmp_path / "bits.npz"), np.load(tmp_path / "here.npz")
    assert set(got) == set(want)
    for name in want:
        assert_same_bits(name, got[name], want[name])


def save_bits(path: str | Path) -> None:
    """Results of some calls on each instruction set that there is."""
    bits = {}
    for isa in _ffi.CPU_ISAS:
        _ffi.name_cpu_isa(LIBRARY, isa)
        if _ffi.cpu_isa(LIBRARY).name != isa:
            continue
        for case in BIT_CASES:
            out, lse = run(case, "cpu")
            bits[f"{isa} {case} out"], bits[f"{isa} {case} lse"] = np.asarray(out).view(np.uint16), np.asarray(lse)
    _ffi.name_cpu_isa(LIBRARY, None)
    np.savez(path, **bits)


@pytest.mark.parametrize("topk", [64, 576, 1700])
def test_bits_do_not_depend_on_the_plan(isa: str, topk: int) -> None:
    """Wherever it cuts, and however often; also where more tokens are cut than there is room for partials of, and for a token alone."""
    rng, tokens, heads = np.random.default_rng(0), 30, 5
    cache = dsv4.append(dsv4.KVCache.create(4, 64), jnp.asarray(rng.standard_normal((256, 512)), jnp.float32), jnp.arange(256))

    def scope(topk: int) -> dsv4.Scope:
        indices, lengths = rng.integers(-20, 256, (tokens, topk)), rng.integers(0, topk + 1, tokens)
        return dsv4.Scope(cache, jnp.asarray(indices, jnp.int32), jnp.asarray(lengths, jnp.int32))

    def attend(q, scopes, work):
        return cpu.CPU.decode(KernelCall(q, tuple(scopes), sink, work, 0.05, q.dtype))

    scopes = scope(128), scope(topk)
    q, sink = jnp.asarray(rng.standard_normal((tokens, heads, 512)), jnp.bfloat16), jnp.asarray(rng.standard_normal(heads), jnp.float32)
    call, lengths = jax.jit(attend), [s.lengths for s in scopes]
    want = call(q, scopes, cpu.CPU.plan(lengths, (128, topk), heads))
    for geometry in [(1, 64, 2), (5, 64, 2), (16, 64, 0), (320, 64, 2), (97, 1, 0), (40, 100, 3)]:
        got = call(q, scopes, native.plan_call(lengths, (128, topk), _work.Geometry(*geometry)))
        for name, one, expected in zip(("out", "lse"), got, want):
            assert_same_bits(f"{name}, {geometry}", one, expected)
    for t in range(0, tokens, 7):
        alone = tuple(dsv4.Scope(cache, s.indices[t : t + 1], s.lengths[t : t + 1]) for s in scopes)
        got = call(q[t : t + 1], alone, cpu.CPU.plan([s.lengths for s in alone], (128, topk), heads))
        for name, one, expected in zip(("out", "lse"), got, want):
            assert_same_bits(f"{name} of token {t}", one, expected[t : t + 1])


@pytest.mark.parametrize("tile_keys", [64, 160])
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
@pytest.mark.parametrize("threads", [2, 16, 32, 64])
def test_threads_share_the_work(threads: int, tokens: int, heads: int, tile_keys: int) -> None:
    """128 + 512 keys a token: tasks for all threads if so many can be had, and at most twice the time of a perfect division."""
    implementation = type(cpu.CPU)()
    implementation.lanes = threads
    lengths = [jnp.full(tokens, n, jnp.int32) for n in (128, 512)]
    work = implementation.plan(lengths, (128, 512), heads)
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


@pytest.mark.parametrize("case", [c for c in tagged("perf") if c.tokens == 16], ids=str)
def test_workspace_is_small(case: Case) -> None:
    """A call needs its inputs, its outputs and less than 64 MB."""
    cache = jax.eval_shape(lambda: dsv4.KVCache.create(1000, 64))
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    scope = lambda topk: dsv4.Scope(cache, i32(case.tokens, topk), i32(case.tokens))  # noqa: E731
    q = jax.ShapeDtypeStruct((case.tokens, case.heads, 512), jnp.bfloat16)
    call = jax.jit(lambda *a: dsv4.sparse_mla_decode(*a, implementation="cpu"))
    compiled = call.lower(q, scope(case.swa.topk), scope(case.extra.topk)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_a_call_is_its_custom_calls() -> None:
    """What is absent (sink, scope) costs no instruction of its own."""
    p = make(next(c for c in tagged("ci") if c.name == "one_scope"))

    def call(q, swa):
        return dsv4.sparse_mla_decode(q, swa, implementation="cpu", return_lse=True)

    text = jax.jit(call).lower(p.q, p.swa).compile().as_text()
    operations = re.findall(r" = .*? ([a-z][a-z-]*)\(", text)
    assert operations.count("custom-call") == 2
    assert set(operations) <= {"custom-call", "parameter", "constant", "get-tuple-element", "tuple", "bitcast"}


def test_stale_plan_is_answered_with_nan() -> None:
    """A plan made for other lengths never reaches the kernel: those tokens are NaN, the others right."""
    case = next(c for c in tagged("ci") if c.name == "many_tokens")
    p = make(case)
    plan = plan_of(p)
    shorter = jnp.maximum(jnp.clip(p.swa.lengths, 0, 128) - 1, 0)
    changed = shorter != jnp.clip(p.swa.lengths, 0, 128)
    stale = dsv4.sparse_mla_decode(p.q, p.swa._replace(lengths=shorter), p.extra, attn_sink=p.attn_sink, plan=plan)
    fresh = dsv4.sparse_mla_decode(p.q, p.swa, p.extra, attn_sink=p.attn_sink, plan=plan)
    assert 0 < int(changed.sum()) < changed.size
    np.testing.assert_array_equal(np.isnan(np.asarray(stale, np.float32)).all((1, 2)), changed)
    assert_same_bits("unchanged tokens", np.asarray(stale)[~changed], np.asarray(fresh)[~changed])


@pytest.mark.parametrize("seed", range(30))
def test_garbage_plan(seed: int) -> None:
    """Whatever one of the plan's arrays holds, the call returns, and each token is right or NaN."""
    rng = np.random.default_rng(seed)
    case = next(c for c in tagged("ci") if c.name == "heads16")
    p = make(case)
    plan = plan_of(p)
    values = np.array([-(2**31), -1, 0, 1, 2, 3, 64, 319, 320, 1000, 2**31 - 1])
    work = plan.work[0]
    field = work._fields[seed % len(work)]
    array = np.array(getattr(work, field))
    hit = rng.random(array.shape) < (0.5 if seed % 2 else 0.02)
    array = np.where(hit, rng.choice(values, array.shape), array).astype(np.int32)
    broken = dsv4.DecodePlan((work._replace(**{field: jnp.asarray(array)}),), plan.made_for)
    answer = dsv4.sparse_mla_decode(p.q, p.swa, p.extra, attn_sink=p.attn_sink, plan=broken, return_lse=True)
    out, lse = (np.asarray(x, np.float64) for x in answer)
    nan = np.isnan(lse).any(-1)
    assert np.isnan(out[nan]).all()
    assert np.isnan(lse[nan]).all()
    assert_close("out", out[~nan], p.out[~nan], OUT_BF16)
    assert_close("lse", lse[~nan], p.lse[~nan], LSE)


def test_plan_that_contradicts_itself() -> None:
    """Arrays in bounds, and each token covered, but not by items that fit together: NaN there, the others right."""
    case = next(c for c in tagged("ci") if c.name == "many_tokens")
    p = make(case)
    plan = plan_of(p)
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
    out = np.asarray(
        dsv4.sparse_mla_decode(p.q, p.swa, p.extra, attn_sink=p.attn_sink, plan=dsv4.DecodePlan((broken,), plan.made_for)), np.float64
    )
    hit = np.isin(np.arange(case.tokens), [whole, a, b, c])
    np.testing.assert_array_equal(np.isnan(out).all((1, 2)), hit)
    assert_close("out", out[~hit], p.out[~hit], OUT_BF16)
