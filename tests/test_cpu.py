"""The CPU handler, on every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, Problem, make, tagged
from compare import OUT_BF16, assert_close, assert_same_bits
from conformance import NativeConformance, attend, named, one_token, plan_of, with_work
from programs import assert_same

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, _work
from jax_dsv4._implementations import native

LIBRARY, DETAIL = _ffi.load("libdsv4_cpu", "cpu")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=DETAIL)


class TestCPU(NativeConformance):
    implementation = "cpu"


@pytest.fixture(params=_ffi.CPU_ISAS[:-1])
def isa(request):
    """Keeps the kernels from using anything beyond an instruction set."""
    _ffi.limit_cpu_isa(LIBRARY, request.param)
    yield request.param
    _ffi.limit_cpu_isa(LIBRARY, _ffi.CPU_ISAS[-1])


@pytest.mark.parametrize("case", tagged("ci")[::3], ids=str)
def test_lower_instruction_sets(isa: str, case: Case) -> None:
    used = _ffi.cpu_isa(LIBRARY)
    if used != isa:
        pytest.skip(f"this processor has no {isa}: {used} would run again")
    TestCPU().hold(case)


def test_bits_do_not_depend_on_threads(tmp_path: Path) -> None:
    """The same call in a process with one thread gives the same bits, split tokens and head groups included."""
    cases = [named(name) for name in ("one_token_split", "many_tokens", "heads127", "one_scope")]
    script = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import numpy as np\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import cases, conformance\n"
        f"for name in {[c.name for c in cases]!r}:\n"
        "  case = next(c for c in cases.CASES if c.name == name)\n"
        "  out, lse = conformance.attend(cases.make(case), 'cpu')\n"
        f"  np.savez({str(tmp_path)!r} + '/' + name, out=np.asarray(out).view(np.uint16), lse=np.asarray(lse))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    for case in cases:
        alone = np.load(tmp_path / f"{case.name}.npz")
        out, lse = attend(make(case), "cpu")
        assert_same_bits("out", np.asarray(out).view(np.uint16), alone["out"])
        assert_same_bits("lse", lse, alone["lse"])


@pytest.mark.parametrize("topk", [64, 576, 1700])
@pytest.mark.parametrize("isa", _ffi.CPU_ISAS, indirect=True)
def test_bits_do_not_depend_on_the_plan(isa: str, topk: int) -> None:
    """Wherever it cuts, and however often; also where more tokens are cut than there is room for partials of, and for a token alone."""
    if _ffi.cpu_isa(LIBRARY) != isa:
        pytest.skip(f"this processor has no {isa}")
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
