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
from cases import Case, make, tagged
from compare import assert_same_bits
from conformance import Conformance, check, run

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi

LIBRARY, DETAIL = _ffi.load("libdsv4_cpu", "cpu")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=DETAIL)


class TestCPU(Conformance):
    implementation = "cpu"

    @pytest.mark.parametrize("case", tagged("flashmla-large"), ids=str)
    def test_flashmla_grid_large(self, case: Case) -> None:
        check(case, *run(case, "cpu"))


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
    check(case, *run(case, "cpu"))


def test_bits_do_not_depend_on_threads(tmp_path: Path) -> None:
    """The same call in a process with one thread gives the same bits, split tokens and head groups included."""
    cases = [c for c in tagged("ci") if c.name in ("one_token_split", "many_tokens", "heads127", "one_scope")]
    script = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import numpy as np\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import cases, conformance\n"
        f"for name in {[c.name for c in cases]!r}:\n"
        "  case = next(c for c in cases.CASES if c.name == name)\n"
        "  out, lse = conformance.run(case, 'cpu')\n"
        f"  np.savez({str(tmp_path)!r} + '/' + name, out=np.asarray(out).view(np.uint16), lse=np.asarray(lse))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    for case in cases:
        alone = np.load(tmp_path / f"{case.name}.npz")
        out, lse = run(case, "cpu")
        assert_same_bits("out", np.asarray(out).view(np.uint16), alone["out"])
        assert_same_bits("lse", lse, alone["lse"])


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


def test_stale_plan_is_answered_with_nan() -> None:
    """A plan made for other lengths never reaches the kernel: those tokens are NaN, the others right."""
    case = next(c for c in tagged("ci") if c.name == "many_tokens")
    p = make(case)
    plan = dsv4.plan_decode(p.swa.lengths, p.extra.lengths, num_heads=case.heads, swa_topk=128, extra_topk=64)
    shorter = jnp.maximum(jnp.clip(p.swa.lengths, 0, 128) - 1, 0)
    changed = shorter != jnp.clip(p.swa.lengths, 0, 128)
    stale = dsv4.sparse_mla_decode(p.q, p.swa._replace(lengths=shorter), p.extra, attn_sink=p.attn_sink, plan=plan)
    fresh = dsv4.sparse_mla_decode(p.q, p.swa, p.extra, attn_sink=p.attn_sink, plan=plan)
    assert 0 < int(changed.sum()) < changed.size
    np.testing.assert_array_equal(np.isnan(np.asarray(stale, np.float32)).all((1, 2)), changed)
    assert_same_bits("unchanged tokens", np.asarray(stale)[~changed], np.asarray(fresh)[~changed])


@pytest.mark.parametrize("seed", range(20))
def test_garbage_plan_does_not_fault(seed: int) -> None:
    """Whatever the plan's arrays hold, the call returns, and a token is right or NaN unless its items overlap."""
    rng = np.random.default_rng(seed)
    case = next(c for c in tagged("ci") if c.name == "heads16")
    p = make(case)
    plan = dsv4.plan_decode(p.swa.lengths, p.extra.lengths, num_heads=16, swa_topk=128, extra_topk=192)
    values = np.array([-(2**31), -1, 0, 1, 2, 3, 64, 319, 320, 1000, 2**31 - 1])
    work = plan.work[0]
    field = work._fields[seed % len(work)]
    array = np.array(getattr(work, field))
    hit = rng.random(array.shape) < (0.5 if seed % 2 else 0.02)
    array = np.where(hit, rng.choice(values, array.shape), array).astype(np.int32)
    broken = dsv4.DecodePlan((work._replace(**{field: jnp.asarray(array)}),), plan.made_for)
    out = dsv4.sparse_mla_decode(p.q, p.swa, p.extra, attn_sink=p.attn_sink, plan=broken)
    assert out.shape == p.q.shape
    jax.block_until_ready(out)
