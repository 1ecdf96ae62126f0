"""AITER's own code objects, unmodified, on hand-made plans, against float64 NumPy."""

import aiter_kernel
import numpy as np
import pytest
import software_gpu
from compare import assert_answer

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
PLANS = {"unsplit": {}, "split": {"split_keys": 48}, "all-split": {"split_all": True}}


@pytest.fixture(params=aiter_kernel.KERNELS, ids=lambda c: f"{c.architecture}-{c.source}-{c.name}")
def kernel(request, gpu, monkeypatch):
    monkeypatch.setenv("GFX950_ARCHITECTURE", request.param.architecture)
    if not aiter_kernel.find(request.param):
        pytest.skip(
            "no amd-aiter here: pip install --no-deps amd-aiter, or name an unpacked wheel in JAX_DSV4_AITER_WHEEL"
            if request.param.source == "wheel"
            else "JAX_DSV4_AITER_SOURCE names no AITER source tree with this kernel"
        )
    return request.param


@pytest.fixture
def wheel_kernel(gpu):
    case = aiter_kernel.KERNELS[0]
    if not aiter_kernel.find(case):
        pytest.skip("no amd-aiter here: pip install --no-deps amd-aiter")
    return case


def check(out, lse, problem):
    """`lse` is None where the kernel gives none."""
    want = aiter_kernel.expected(problem)
    assert_answer((out, want.lse if lse is None else lse), want, problem.precision.out, problem.precision.lse)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_kernel(gpu, kernel, plan):
    problem = aiter_kernel.make_problem(np.random.default_rng(0), kernel, LENGTHS, topk=208)
    out, lse = aiter_kernel.run(gpu, kernel, problem, aiter_kernel.make_plan(problem, workers=3, **plan))
    known = np.isfinite(lse)
    assert known.all() == (kernel.has_lse or "split_all" in plan)
    check(out, lse if known.all() else None, problem)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_large_scores(gpu, kernel, plan):
    """Scores of some hundreds, and some near 0 all the same. lse is then as wrong as sums in float32 of a score's 512 products: by up to
    2^-23 of their magnitudes, added up."""
    if kernel.precision is not aiter_kernel.BF16:
        pytest.skip("in fp8 nothing is promised of lse there")
    problem = aiter_kernel.make_problem(np.random.default_rng(11), kernel, LENGTHS, topk=208)
    problem.scale = 4.0
    out, lse = aiter_kernel.run(gpu, kernel, problem, aiter_kernel.make_plan(problem, workers=3, **plan))
    want = aiter_kernel.expected(problem)
    check(out, None, problem)
    q, kv = (np.abs(x[..., : aiter_kernel.LATENT].astype(np.float64)) for x in (problem.q, problem.kv))
    magnitude = np.stack([problem.scale * (q[t] @ kv[problem.indices[t, :n]].T).max(-1) for t, n in enumerate(problem.lengths)])
    known = np.isfinite(lse)
    assert known.all() == (kernel.has_lse or "split_all" in plan)
    assert (np.abs(lse - want.lse) <= 2.0**-23 * magnitude)[known].all()
    assert np.abs(want.lse).max() > 300


@pytest.mark.parametrize("heads", [1, 5, 24, 63, 65, 127])
def test_other_numbers_of_heads(gpu, kernel, heads):
    """The larger bf16 kernels take any number up to their own. Those of 16 heads read what is not there."""
    if kernel.precision is not aiter_kernel.BF16 or not (heads < kernel.heads or kernel.heads == 16):
        pytest.skip("in fp8 and beyond a kernel's heads nothing is promised")
    problem = aiter_kernel.make_problem(np.random.default_rng(8), kernel, LENGTHS, topk=208, heads=heads)
    plan = aiter_kernel.make_plan(problem, workers=3)
    if kernel.heads > 16:
        check(*aiter_kernel.run(gpu, kernel, problem, plan), problem)
    elif heads < 16:
        with pytest.raises(software_gpu.HipError, match="is not live"):
            aiter_kernel.run(gpu, kernel, problem, plan)
    else:
        out, _ = aiter_kernel.run(gpu, kernel, problem, plan)
        with pytest.raises(AssertionError):
            check(out, None, problem)


def test_a_pool_beyond_4_gib(gpu, kernel):
    """Rows past 2^32 bytes: the wheel's kernel and the 32-head one read others instead, and silently; the rest are right."""
    problem = aiter_kernel.make_problem(np.random.default_rng(9), kernel, [70, 3], topk=70)
    rows = 2**32 // (aiter_kernel.ROW * problem.kv.itemsize)
    small, problem.kv = problem.kv, np.zeros((rows + 1000, aiter_kernel.ROW), problem.kv.dtype)  # mapped, but for what is written
    first = rows + 1
    problem.kv[first : first + len(small)] = small
    problem.indices += first  # what lies past the lengths wraps, and is garbage all the same
    out, lse = aiter_kernel.run(gpu, kernel, problem, aiter_kernel.make_plan(problem, workers=2, split_all=True))
    if kernel.wraps_at_4gib:
        assert (out == 0).all()  # of rows that nobody asked for
    else:
        check(out, lse, problem)


def test_cost(gpu, kernel, table):
    """Wave-instructions per (token, 16 heads, 64 keys) and what a work item costs besides. Printed."""
    spent = {}
    for keys in (128, 640):
        problem = aiter_kernel.make_problem(np.random.default_rng(1), kernel, [keys], topk=640)
        gpu.counters()
        aiter_kernel.run(gpu, kernel, problem, aiter_kernel.make_plan(problem, workers=1))
        spent[keys] = gpu.counters()
    per = {k: (spent[640][k] - spent[128][k]) / 8 for k in ("instructions", "matrix", "bytes_read")}
    fixed = spent[128]["instructions"] - 2 * per["instructions"]
    folds = kernel.heads / 16
    row = problem.kv[0].nbytes
    table(
        f"{kernel.name} of AITER's {kernel.source}",
        [
            f"  {per['instructions'] / folds:6.0f} wave-instructions per 64 keys and 16 heads, {per['matrix'] / folds:.0f} of them matrix",
            f"  {fixed:6.0f} per work item besides",
            f"  {per['bytes_read'] / 64:6.0f} bytes read per key (a row is {row})",
        ],
    )
    assert 0 < per["matrix"] < per["instructions"]
    assert per["bytes_read"] / 64 < 2 * row


# ---- Negative proof: what must not go unnoticed does not.


def test_an_empty_item_ends_its_worker(gpu, kernel):
    """Trap 1: the items behind an empty one are never computed. The planner must emit none."""
    problem = aiter_kernel.make_problem(np.random.default_rng(2), kernel, [20, 20, 20], topk=32)
    plan = aiter_kernel.make_plan(problem, workers=1)
    plan.work_info[1, 5] = plan.work_info[1, 4]  # kv_end = kv_start
    out, _ = aiter_kernel.run(gpu, kernel, problem, plan)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1:]).all()


def test_a_broken_plan_is_caught(gpu, kernel):
    problem = aiter_kernel.make_problem(np.random.default_rng(3), kernel, [20, 20], topk=32)
    plan = aiter_kernel.make_plan(problem, workers=1)
    plan.work_info[0, 4:6] = [1 << 24, (1 << 24) + 20]  # keys that do not exist
    with pytest.raises(software_gpu.HipError, match="is not live"):
        aiter_kernel.run(gpu, kernel, problem, plan)


def test_an_invalid_slot_is_caught(gpu, kernel):
    """Trap 2: -1 inside the range is read as an address."""
    problem = aiter_kernel.make_problem(np.random.default_rng(4), kernel, [20, 20], topk=32)
    problem.indices[0, 3] = -1
    with pytest.raises(software_gpu.HipError, match="is not live"):
        aiter_kernel.run(gpu, kernel, problem, aiter_kernel.make_plan(problem, workers=1))


def test_a_nan_in_row_0_is_caught(gpu, kernel):
    """Padding lanes of the last tile read row 0, whoever owns it. One kernel hides what they read."""
    problem = aiter_kernel.make_problem(np.random.default_rng(5), kernel, [20], topk=32)
    problem.kv[0, 7] = np.nan
    out, _ = aiter_kernel.run(gpu, kernel, problem, aiter_kernel.make_plan(problem, workers=1))
    assert np.isnan(out).any() == (kernel.name != "mla_a16w16_qh64_qseqlen1_gqaratio64_lse_v3_ps")


def test_lost_numbers_are_caught(gpu, kernel):
    """The bf16 kernel of 64 heads answers 0 for every number beyond 64."""
    problem = aiter_kernel.make_problem(np.random.default_rng(10), kernel, [40, 1], topk=40)
    if kernel.precision is not aiter_kernel.BF16:
        problem.kv_scale *= 100
    else:
        problem.kv = (problem.kv.astype(np.float32) * 100).astype(problem.kv.dtype)
    problem.scale /= 100
    want = aiter_kernel.expected(problem).out
    assert np.abs(want).max() > 100
    out, _ = aiter_kernel.run(gpu, kernel, problem, aiter_kernel.make_plan(problem, workers=2))
    lost = (out == 0) & (np.abs(want) > 65)
    assert (lost == (np.abs(want) > 65)).all() if "qh64" in kernel.name else not lost.any()


def test_missing_padding_is_caught(gpu, wheel_kernel):
    """Trap 3: rows of 512 instead of 576 are read shifted, and the last one past the end."""
    problem = aiter_kernel.make_problem(np.random.default_rng(6), wheel_kernel, [8], topk=8, slots=9)
    problem.kv = np.ascontiguousarray(problem.kv[:, :512])
    with pytest.raises(software_gpu.HipError, match="is not live"):
        aiter_kernel.run(gpu, wheel_kernel, problem, aiter_kernel.make_plan(problem, workers=1))


def test_weak_waits_are_found(gpu, wheel_kernel):
    """The wheel's kernel passes two barriers with LDS writes still under way: lgkmcnt(4) where 2 is needed."""
    gpu.options(hazards=True)
    problem = aiter_kernel.make_problem(np.random.default_rng(7), wheel_kernel, [300], topk=300)
    aiter_kernel.run(gpu, wheel_kernel, problem, aiter_kernel.make_plan(problem, workers=1))
    weak = [h for h in gpu.hazards() if "would have to be lgkmcnt(2)" in h]
    assert {address for h in weak for address in ("0x3AB8", "0x4E18") if f"lgkmcnt(4) at {address}" in h} == {"0x3AB8", "0x4E18"}


# Instructions until a load arrives, and with which of them a kernel is wrong.
GLOBAL, LDS = (0, 20, 160, 300, 600, 3000), (0, 4, 8, 16, 30, 1000)
WRONG = {
    ("gfx950", "a8w8", "wheel", 16): ((), ()),
    ("gfx950", "a8w8", "tree", 16): ((600,), (16, 30, 1000)),
    ("gfx950", "a8w8", "tree", 32): ((600,), (16, 30, 1000)),
    ("gfx950", "a8w8", "tree", 64): ((300, 600, 3000), (0, 4, 30, 1000)),
    ("gfx950", "a8w8", "tree", 128): ((), (1000,)),
    ("gfx950", "a16w16", "wheel", 16): ((300, 600, 3000), ()),
    ("gfx950", "a16w16", "tree", 16): ((300, 600, 3000), ()),
    ("gfx950", "a16w16", "tree", 64): ((600, 3000), (30, 1000)),
    ("gfx950", "a16w16", "tree", 128): ((3000,), (30, 1000)),
    ("gfx942", "a16w16", "wheel", 16): ((300, 600, 3000), ()),
    ("gfx942", "a8w8", "wheel", 16): ((), ()),
    ("gfx942", "a8w8", "wheel", 128): ((600, 3000), ()),
}


def test_timing(gpu, kernel, table):
    """Whether a kernel's answers depend on how long loads take: its waits and barriers are too weak then, and it counts on being lucky. So
    does the machine's default: with loads that land at once the 64-head kernel is wrong. Printed."""
    problem = aiter_kernel.make_problem(np.random.default_rng(1), kernel, [300, 64, 129], topk=300)
    plan = aiter_kernel.make_plan(problem, workers=2, split_all=True)

    def is_right(**options):
        gpu.options(**options)
        out, lse = aiter_kernel.run(gpu, kernel, problem, plan)
        try:
            check(out, lse, problem)
        except AssertionError:
            return False
        return True

    with np.errstate(invalid="ignore"):
        wrong = (
            tuple(n for n in GLOBAL if not is_right(vm_latency=n)),
            tuple(n for n in LDS if not is_right(lds_latency=n, exact_lgkm=True)),
        )
    lines = [f"  {what}: {tried}; wrong at {bad or 'none'}" for what, tried, bad in zip(("global memory", "LDS"), (GLOBAL, LDS), wrong)]
    table(f"instructions until a load arrives, {kernel.architecture}: {kernel.name} of AITER's {kernel.source}", lines)
    assert wrong == WRONG[kernel.architecture, kernel.name.split("_")[1], kernel.source, kernel.heads]
