"""Our planner, asked for AITER's granularity, against plans that AITER's own builder made (data/aiter_plans.npz).

The plans were made from ROCm/aiter e404860 (get_mla_metadata_v1, fast mode, sparse, fp8), its kernel executed in software. They are
results, not code. A test here runs our HIP planner on the software GPU.
"""

import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

ARRAYS = ("lengths", "work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")
# The cost of an item in AITER's builder, in blocks.
OVERHEAD = 16


def load():
    with np.load(pathlib.Path(__file__).parent / "data/aiter_plans.npz") as data:
        cases = json.loads(str(data["cases_json"]))
        return [(c, {name: data[f"c{c['id']:03d}_{name}"] for name in ARRAYS}) for c in cases]


PLANS = load()


def describe(case):
    return f"{case['id']}-M{case['M']}-{case['tokens']}x{case['topk']}-{case['kind']}"


def name_of(parameter):
    """A case's name; its arrays have none."""
    return describe(parameter) if "id" in parameter else ""


def active_workers(case):
    """max_split_per_batch bounds the number of workers that get any work."""
    bound = case["max_split_per_batch"] * case["tokens"]
    return case["M"] if bound < 0 else min(case["M"], bound)


def ours(case, aiter, granularity, overhead):
    from jax_dsv4.implementations import native

    geometry = native.Geometry(active_workers(case), granularity, overhead)
    work = native.plan_call([jnp.asarray(aiter["lengths"])], [case["topk"]], geometry, workers=case["M"], target="dsv4_aiter_plan")
    return {name: np.asarray(value) for name, value in work._asdict().items()}


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


@pytest.mark.parametrize(("case", "aiter"), [p for p in PLANS if p[0]["zero_items"] == 0], ids=name_of)
def test_equal_where_aiters_is_well_defined(rocm, case, aiter):
    """No token is empty: item for item the same plan."""
    plan = ours(case, aiter, case["kv_granularity"], OVERHEAD)
    np.testing.assert_array_equal(plan["work_indptr"], aiter["work_indptr"])
    np.testing.assert_array_equal(items(plan, case), aiter["work_info_set"])
    np.testing.assert_array_equal(plan["reduce_indptr"], aiter["reduce_indptr"])
    np.testing.assert_array_equal(plan["reduce_partial_map"][: len(aiter["reduce_partial_map"])], aiter["reduce_partial_map"])
    split = np.diff(plan["reduce_indptr"]) > 0
    np.testing.assert_array_equal(plan["reduce_final_map"][split], aiter["reduce_final_map"])
    check_coverage(plan, case, aiter["lengths"])


@pytest.mark.parametrize(("case", "aiter"), [p for p in PLANS if p[0]["zero_items"] > 0], ids=name_of)
def test_empty_tokens_get_no_item(rocm, case, aiter):
    """Where AITER emits an item for every empty token, which ends the worker that meets it, ours emits none."""
    assert (aiter["work_info_set"][:, 4] == aiter["work_info_set"][:, 5]).sum() == case["zero_items"]
    check_coverage(ours(case, aiter, case["kv_granularity"], OVERHEAD), case, aiter["lengths"])


def tiles_of_slowest_worker(plan, tile):
    """Tiles that the busiest worker computes, each item's fixed cost counted as three (jax_dsv4/implementations/aiter.py)."""
    rows, indptr = plan["work_info_set"], plan["work_indptr"]
    cost = -(-(rows[:, 5] - rows[:, 4]) // tile) + 3
    return max(cost[a:b].sum() for a, b in itertools.pairwise(indptr))


def test_knowing_the_tile_is_better(rocm, capsys):
    """With the kernel's tile as granularity no case is slower, and small batches stop paying for fractions of tiles. Printed."""
    from jax_dsv4.implementations import aiter as implementation

    choice = implementation.choose_kernel(16, 0)
    chosen = [p for p in PLANS if p[0]["M"] == 256 and p[0]["max_split_per_batch"] == -1 and p[0]["kind"] in ("full", "random")]
    lines = []
    for case, aiter in chosen:
        plan = ours(case, aiter, choice.tile, 3)
        slowest = [tiles_of_slowest_worker(p, choice.tile) for p in (aiter, plan)]
        computed = [int((-(-(p["work_info_set"][:n, 5] - p["work_info_set"][:n, 4]) // choice.tile)).sum()) for p, n in
                    ((aiter, len(aiter["work_info_set"])), (plan, plan["work_indptr"][-1]))]  # fmt: skip
        partials = [len(aiter["reduce_partial_map"]), int(plan["reduce_indptr"][-1])]
        changes = zip(("slowest worker", "tiles", "partials"), (slowest, computed, partials))
        lines.append(f"{describe(case):32} " + "  ".join(f"{name} {a:4} -> {b:4}" for name, (a, b) in changes))
        assert computed[1] <= computed[0]
    with capsys.disabled():
        print(f"\nAITER's plan -> ours, at 256 workers and tiles of {choice.tile}", *lines, sep="\n")


# ---- AITER's own builder, compiled by build_aiter from a source tree, on the software GPU.


@pytest.fixture
def builder(rocm):
    from jax_dsv4 import _ffi

    if _ffi.aiter_plan_builder() is None:
        pytest.skip("AITER's plan builder is not compiled: python -m jax_dsv4.build_aiter --source AITER (it takes minutes)")


@pytest.mark.parametrize(("case", "aiter"), [p for p in PLANS if p[0]["max_split_per_batch"] == -1][::3], ids=name_of)
def test_aiters_builder(builder, monkeypatch, case, aiter):
    """Through our bridge: the plans that were recorded from it, items of empty tokens included."""
    from jax_dsv4.implementations import aiter as implementation
    from jax_dsv4.implementations import native

    monkeypatch.setenv("GFX950_UNITS", str(case["M"]))
    geometry = native.Geometry(case["M"], case["kv_granularity"], OVERHEAD)
    work = implementation._aiters_plan(jnp.asarray(aiter["lengths"]), case["topk"], geometry, case["heads"])
    plan = {name: np.asarray(value) for name, value in work._asdict().items()}
    np.testing.assert_array_equal(plan["kv_lengths"], np.minimum(aiter["lengths"], case["topk"]))
    np.testing.assert_array_equal(plan["work_indptr"][: case["M"] + 1], aiter["work_indptr"])
    assert (plan["work_indptr"][case["M"] :] == aiter["work_indptr"][-1]).all()
    np.testing.assert_array_equal(items(plan, case), aiter["work_info_set"])
    np.testing.assert_array_equal(plan["reduce_indptr"], aiter["reduce_indptr"])
    np.testing.assert_array_equal(plan["reduce_partial_map"][: len(aiter["reduce_partial_map"])], aiter["reduce_partial_map"])


def test_decode_on_aiters_plan(builder, monkeypatch):
    """Empty tokens first and between, a split one: the plan with empty items is harmless, and the answer that of our own plan."""
    import jax
    from test_end_to_end import attend, check, make_cache, make_q, make_scope, plan_for, reference

    import jax_dsv4 as dsv4

    rng = np.random.default_rng(0)
    cache = make_cache(rng, 400)
    scope = make_scope(rng, cache, 400, [0, 390, 0, 0, 17, 64], 400)
    q = make_q(rng, 6, 32)
    rows = plan_for([scope], 32).work[0].work_info_set
    assert (np.asarray(rows)[:6, 4] == np.asarray(rows)[:6, 5]).any()  # AITER's, with its items of no keys
    check(attend(q, (scope,)), reference(q, [scope]))
    jax.clear_caches()
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    check(jax.jit(lambda *a: dsv4.sparse_mla_decode(a[0], a[1], implementation="aiter", return_lse=True))(q, scope), reference(q, [scope]))
