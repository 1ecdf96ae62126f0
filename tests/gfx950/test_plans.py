"""Our planner on the software GPU, asked for AITER's granularity, against plans that AITER's own builder made (tests/data), and that
builder itself. tests/test_plan.py compares the same planner with all of the plans on the CPU.
"""

import ctypes
import dataclasses
import functools
import subprocess

import aiter_kernel
import aiter_plans
import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import software_gpu
from calls import attend, check, expected, make_cache, make_q, make_scope, plan_for

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, _work
from jax_dsv4._implementations import aiter as implementation
from jax_dsv4._implementations import native

PLANS = [(case, plan) for case, plan in aiter_plans.load() if case["heads"] == 16]  # its plans do not depend on heads


def describe(case):
    return f"{case['id']}-M{case['M']}-{case['tokens']}x{case['topk']}-{case['kind']}"


def name_of(parameter):
    """A case's name; its arrays have none."""
    return describe(parameter) if "id" in parameter else ""


def items(plan, case):
    return plan["work_info_set"][: plan["work_indptr"][-1]]


def check_coverage(plan, case, lengths):
    """Each token's keys once and in order, by non-empty items; partial rows each once, named by the maps in that order."""
    rows = items(plan, case)
    assert (rows[:, 5] > rows[:, 4]).all()
    for t, length in enumerate(np.minimum(lengths, case["topk"])):
        mine = rows[rows[:, 0] == t]
        edges = np.append(mine[:, 4], mine[-1, 5]) - t * case["topk"] if len(mine) else np.array([0])
        assert edges[0] == 0
        assert edges[-1] == length
        assert (mine[1:, 4] == mine[:-1, 5]).all()
        first, last = plan["reduce_indptr"][t : t + 2]
        np.testing.assert_array_equal(plan["reduce_partial_map"][first:last], mine[:, 1] if len(mine) > 1 else [])
    partials = rows[:, 1][rows[:, 1] >= 0]
    np.testing.assert_array_equal(np.sort(partials), np.arange(len(partials)))


def test_tokens_are_cut_where_aiter_cuts_them(rocm):
    """Or not at all: the kernels' plan has no other cuts to offer."""
    lengths, geometry = jnp.ones(3, jnp.int32), _work.Geometry(8, 64, 2, cut_cost=2)
    with pytest.raises(Exception, match="plan_decode: cut_cost must be 0: tokens are cut where AITER cuts them, got 2"):
        native.plan_call([lengths], [64], geometry, target="dsv4_aiter_plan")


def test_planner_is_the_common_one(rocm):
    """The HIP planner against the same plan.h on the CPU, whose plans tests/test_plan.py holds against AITER's and the oracle's."""
    if not dsv4.implementations()["cpu"].available:
        pytest.skip(dsv4.implementations()["cpu"].detail)
    rng = np.random.default_rng(8)
    calls = [(aiter["lengths"], case["topk"], aiter_plans.geometry(case), case["M"]) for case, aiter in PLANS]
    for tokens in (1, 5, 300):
        lengths = rng.integers(-2, 700, tokens) * (rng.random(tokens) < 0.8)
        for geometry in (_work.Geometry(8, 64, 3), _work.Geometry(256, 16, 16), _work.Geometry(1, 128, 0)):
            calls.append((lengths, 600, geometry, _work.MAX_WORKERS))
    for lengths, topk, geometry, workers in calls:
        plan = functools.partial(native.plan_call, [jnp.asarray(lengths, jnp.int32)], [topk], geometry, workers)
        ours, cpu = plan(target="dsv4_aiter_plan"), plan()
        for name, a, b in zip(ours._fields, ours, cpu):
            np.testing.assert_array_equal(a, b, err_msg=f"{name} of {len(lengths)} tokens, {geometry}")


FORMS = {"items": "3", "tiles": "4", "slowest worker": "2", "imbalance": "5.2f", "partial KiB": "5"}


def judge(plan, tile, heads=16):
    """What a plan costs when the kernel works on whole tiles and an item costs three of them besides."""
    used = plan["work_info_set"][: plan["work_indptr"][-1]]
    tiles = -(-(used[:, 5] - used[:, 4]) // tile)
    cost = np.append(0, np.cumsum(tiles + 3))
    workers = np.diff(cost[plan["work_indptr"]])
    return {
        "items": len(used),
        "tiles": int(tiles.sum()),
        "slowest worker": int(workers.max()),
        "imbalance": float(workers.max() / workers.mean()),
        "partial KiB": int(plan["reduce_indptr"][-1]) * heads * (512 + 1) * 4 // 1024,
    }


def test_knowing_the_tile_is_better(rocm, table):
    """With the kernel's tile as granularity the slowest worker has no more to do, no tile is computed twice, and fewer partials are
    written and merged. Printed."""
    tile = implementation._geometry(16).granularity
    chosen = [p for p in PLANS if p[0]["M"] == 256 and p[0]["max_split_per_batch"] == -1 and p[0]["kv_granularity"] == 16]
    chosen = [p for p in chosen if p[0]["kind"] in ("full", "random", "short")]
    assert len(chosen) >= 5
    lines = []
    for case, aiter in chosen:
        geometry = dataclasses.replace(aiter_plans.geometry(case), granularity=tile, overhead=3)
        ours = native.plan_call([jnp.asarray(aiter["lengths"])], [case["topk"]], geometry, case["M"], target="dsv4_aiter_plan")
        theirs, own = judge(aiter, tile), judge({name: np.asarray(x) for name, x in ours._asdict().items()}, tile)
        shown = (f"{name} {theirs[name]:{form}} -> {own[name]:{form}}" for name, form in FORMS.items())
        lines.append(f"  {case['tokens']:3} tokens x {case['topk']:4} {case['kind']:6}  " + "  ".join(shown))
        assert own["items"] < theirs["items"]
        assert own["tiles"] <= theirs["tiles"]
        assert own["slowest worker"] <= theirs["slowest worker"]
        assert own["partial KiB"] < theirs["partial KiB"]
    title = f"AITER's plans -> ours: 256 workers, 16 heads, tiles of {tile} keys; a worker's cost in tiles, an item three; imbalance"
    table(f"{title} of all 256, idle ones included", lines)


# ---- AITER's own builder, compiled by build_aiter from a source tree, on the software GPU.


@pytest.fixture
def builder(rocm):
    if _ffi.aiter_plan_builder("gfx950") is None:
        pytest.skip("AITER's plan builder is not compiled: python -m jax_dsv4.build_aiter --source AITER (it takes minutes)")


@pytest.mark.parametrize(("case", "aiter"), [p for p in aiter_plans.load() if p[0]["max_split_per_batch"] == -1][::5], ids=name_of)
def test_aiters_builder(builder, monkeypatch, case, aiter):
    """Through our bridge: the plans that were recorded from it, items of empty tokens included."""
    monkeypatch.setenv("GFX950_UNITS", str(case["M"]))
    geometry = _work.Geometry(case["M"], case["kv_granularity"], aiter_plans.OVERHEAD)
    work = implementation._aiters_plan(jnp.asarray(aiter["lengths"]), case["topk"], geometry, case["heads"])
    plan = {name: np.asarray(value) for name, value in work._asdict().items()}
    np.testing.assert_array_equal(plan["kv_lengths"], np.minimum(aiter["lengths"], case["topk"]))
    np.testing.assert_array_equal(plan["work_indptr"][: case["M"] + 1], aiter["work_indptr"])
    assert (plan["work_indptr"][case["M"] :] == aiter["work_indptr"][-1]).all()
    np.testing.assert_array_equal(items(plan, case), aiter["work_info_set"])
    np.testing.assert_array_equal(plan["reduce_indptr"], aiter["reduce_indptr"])
    np.testing.assert_array_equal(plan["reduce_partial_map"][: len(aiter["reduce_partial_map"])], aiter["reduce_partial_map"])


LENGTHS = ([5, 600, 128, 64, 1, 350], [0, 390, 0, 0, 17, 64], [0] * 6, [2048] * 3, [1] * 300, [2047, *[0] * 8, 63])


@pytest.mark.parametrize("granularity", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{len(n)} tokens from {n[0]}")
def test_builder_and_ours_agree(builder, monkeypatch, granularity, lengths):
    """At the kernels' tiles, which is how decode asks for a plan: both cover every token; the same plan if none is empty."""
    units, topk = 48, 2048
    monkeypatch.setenv("GFX950_UNITS", str(units))
    geometry = _work.Geometry(units, granularity, aiter_plans.OVERHEAD)
    lengths = jnp.asarray(lengths, jnp.int32)
    own = native.plan_call([lengths], [topk], geometry, target="dsv4_aiter_plan")
    made = implementation._aiters_plan(lengths, topk, geometry, 16)
    own, made = ({name: np.array(value) for name, value in work._asdict().items()} for work in (own, made))
    if (lengths > 0).all():
        for name in ("kv_lengths", *aiter_plans.ARRAYS):
            np.testing.assert_array_equal(made[name], own[name], err_msg=name)
    for plan in (own, made):
        rows = plan["work_info_set"]
        plan["work_info_set"] = rows[: plan["work_indptr"][-1]]
        plan["work_info_set"] = plan["work_info_set"][plan["work_info_set"][:, 5] > plan["work_info_set"][:, 4]]
        plan["work_indptr"] = np.array([0, len(plan["work_info_set"])])
        check_coverage(plan, {"topk": topk}, np.asarray(lengths))


def test_the_builders_errors_return(builder, gpu):
    """Its checks abort the process unless they are told to throw; through the bridge they return their text."""

    class Metadata(ctypes.Structure):  # ffi/rocm/aiter_metadata.h
        _fields_ = (("pointers", ctypes.c_void_p * 9), ("numbers", ctypes.c_int32 * 8))

    ctypes.CDLL(str(software_gpu.library()), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(_ffi.aiter_plan_builder("gfx950")))
    text = ctypes.create_string_buffer(512)
    tokens, heads, topk, granularity, units = 1, 16, 64, 48, 8
    arguments = Metadata(numbers=(tokens, heads, topk, granularity, units, 8, 16, 0))
    assert library.dsv4_aiter_metadata(ctypes.byref(arguments), None, text, ctypes.c_size_t(len(text))) == 1
    assert "kv_granularity Must be power of 2" in text.value.decode()


STAND_IN = """
int dsv4_aiter_metadata_abi() {{ return 2; }}
const char* dsv4_aiter_metadata_architecture() {{ return "{}"; }}
int dsv4_aiter_metadata(const void* arguments, void* stream, char* error, unsigned long bytes) {{
  for (int i = 0; i < 5; ++i) error[i] = "asked"[i];
  return {:d};
}}
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(folder, architecture, fails) puts a builder there that says so, and plans nothing."""
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(tmp_path))

    def compile_stand_in(folder, compiled_for, fails=True):
        path, source = _ffi.built_plan_builder(folder), tmp_path / "builder.c"
        source.write_text(STAND_IN.format(compiled_for, fails))
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source], check=True)
        bridge.forget()

    return compile_stand_in


@pytest.fixture
def drive(gpu, rocm_library, tmp_path, monkeypatch):
    """drive(architecture): `implementation="aiter"` on platform cpu, with handlers of its own."""
    if (hsa := aiter_kernel.wheel_directory()) is None:
        pytest.skip("no amd-aiter here: pip install --no-deps amd-aiter")

    def start(architecture):
        path = tmp_path / "libdsv4_rocm.so"
        handlers = bridge.load_handlers(rocm_library, path, hsa, rocm_library.parent)
        return bridge.drive(monkeypatch, implementation.AITER, handlers, path, architecture)

    return start


@pytest.mark.parametrize(("device", "other"), [("gfx950", "gfx942"), ("gfx942", "gfx950")])
def test_a_builder_for_another_architecture(install, drive, device, other):
    """Its device code is for one: on another device ours plans, and a builder that lies in the other's folder is refused."""

    def plan():
        return dsv4.plan_decode(jnp.ones(1, jnp.int32), num_heads=16, swa_topk=8, implementation="aiter").work[0].work_info_set

    for _ in drive(device):
        install(other, other)
        command = f"python -m jax_dsv4.build_aiter --architecture {device}"
        assert f"our own planner ({command} compiles AITER's)" in dsv4.implementations()["aiter"].detail
        assert np.asarray(plan())[0, 5] == 1
        install(device, other)
        with pytest.raises(Exception, match=f"libaiter_metadata.so was compiled for {other}; run {command}"):
            jax.block_until_ready(plan())
        install(device, device)
        assert f"AITER's plan builder {_ffi.built_plan_builder(device)}" in dsv4.implementations()["aiter"].detail
        with pytest.raises(Exception, match="AITER's plan builder: asked"):
            jax.block_until_ready(plan())


def test_programs_made_elsewhere_are_planned_by_ours(install, drive, monkeypatch):
    """They run on any number of units, and AITER's builder plans for those that it finds."""
    for _ in drive("gfx950"):
        install("gfx950", "gfx950")
        monkeypatch.setenv("JAX_DSV4_ROCM_ARCHITECTURE", "gfx950")
        bridge.forget()
        plan = jax.jit(lambda n: dsv4.plan_decode(n, num_heads=16, swa_topk=8, implementation="aiter"))
        assert "dsv4_aiter_plan" in plan.lower(jnp.ones(1, jnp.int32)).as_text()


def test_the_builder_is_not_asked_for_other_heads(install, drive):
    for _ in drive("gfx950"):
        install("gfx950", "gfx950", fails=False)
        for heads in (16, 64, 128):
            jax.block_until_ready(implementation._aiters_plan(jnp.ones(3, jnp.int32), 64, _work.Geometry(8, 64, 0), heads))
        with pytest.raises(Exception, match="plan_decode: heads must be 16, 64 or 128, got 48"):
            implementation._aiters_plan(jnp.ones(3, jnp.int32), 64, _work.Geometry(8, 64, 0), 48)


def test_decode_on_aiters_plan(builder, monkeypatch, layout):
    """Empty tokens first and between, a split one: the plan with empty items is harmless, and the answer that of our own plan."""

    rng = np.random.default_rng(0)
    cache = make_cache(rng, 400, layout)
    scope = make_scope(rng, cache, 400, [0, 390, 0, 0, 17, 64], 400)
    q = make_q(rng, 6, 32)
    rows = plan_for([scope], 32).work[0].work_info_set
    assert (np.asarray(rows)[:6, 4] == np.asarray(rows)[:6, 5]).any()  # AITER's, with its items of no keys
    check(attend(q, (scope,)), expected(q, [scope]), layout)
    jax.clear_caches()
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    check(
        jax.jit(lambda *a: dsv4.sparse_mla_decode(a[0], a[1], implementation="aiter", return_lse=True))(q, scope),
        expected(q, [scope]),
        layout,
    )
