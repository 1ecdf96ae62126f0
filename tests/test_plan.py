"""The native planner against the oracle's, against plans that AITER's own builder made, and against what any plan must hold."""

from __future__ import annotations

import functools
import math

import aiter_plans
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aiter_plans import Plan
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import needs_cpu

import jax_dsv4 as dsv4
from jax_dsv4 import _work, reference
from jax_dsv4._implementations import cpu, native
from jax_dsv4._work import Geometry

pytestmark = needs_cpu

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


@functools.cache
def planner(topks: tuple[int, ...], geometry: Geometry, workers: int):
    return jax.jit(lambda lengths: native.plan_call(lengths, topks, geometry, workers, segments_of(topks, geometry)))


def segments_of(topks: tuple[int, ...], geometry: Geometry) -> int:
    """Most items of a token that a plan of segments has."""
    return max(1, -(-sum(topks) // (geometry.segment * geometry.granularity))) if geometry.segment else 1


def make_plan(lengths: list[np.ndarray], topks: tuple[int, ...], geometry: Geometry, workers: int) -> Plan:
    """The native plan, cut to the rows in use (the oracle's form) once the rest is seen to be zeros, and kv_lengths."""
    work = planner(topks, geometry, workers)([jnp.asarray(n, jnp.int32) for n in lengths])
    plan = {name: np.asarray(array) for name, array in work._asdict().items()}
    tokens = len(lengths[0])
    items, partials = _work.plan_capacity(tokens, workers, segments_of(topks, geometry))
    assert plan["work_info_set"].shape == (items, 8)
    assert plan["reduce_partial_map"].shape == (partials,)
    used, used_partials = plan["work_indptr"][-1], plan["reduce_indptr"][-1]
    split = np.diff(plan["reduce_indptr"]) > 0
    assert not plan["work_info_set"][used:].any()
    assert not plan["reduce_partial_map"][used_partials:].any()
    assert not plan["reduce_final_map"][~split].any()
    cut = {"work_info_set": plan["work_info_set"][:used], "reduce_partial_map": plan["reduce_partial_map"][:used_partials]}
    return plan | cut | {"reduce_final_map": plan["reduce_final_map"][split]}


def assert_same_plan(got: Plan, want: Plan) -> None:
    for name in aiter_plans.ARRAYS:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def assert_sound(plan: Plan, lengths: np.ndarray, stride: int, geometry: Geometry, workers: int) -> None:
    """Whoever carries the plan out computes every token, once, within the buffers that there are."""
    items, indptr = plan["work_info_set"], plan["work_indptr"]
    np.testing.assert_array_equal(plan["kv_lengths"], lengths)
    assert len(indptr) == workers + 1
    assert indptr[0] == 0
    assert (np.diff(indptr) >= 0).all()
    assert indptr[geometry.workers] == indptr[-1] == len(items)
    capacity = _work.plan_capacity(len(lengths), geometry.workers)
    assert len(items) <= capacity[0]
    assert len(plan["reduce_partial_map"]) <= capacity[1]
    np.testing.assert_array_equal(plan["reduce_partial_map"], np.arange(len(plan["reduce_partial_map"])))
    # Items lie in order of token and key, and those of a token cover its keys from the first to the last.
    np.testing.assert_array_equal(items[:, 0], np.sort(items[:, 0]))
    for token, length in enumerate(lengths):
        mine = items[items[:, 0] == token]
        begins, ends = mine[:, 4] - token * stride, mine[:, 5] - token * stride
        assert (begins < ends).all(), "an empty item"
        np.testing.assert_array_equal(np.append(0, ends), np.append(begins, length))
        assert (begins % geometry.granularity == 0).all()
        rows = plan["reduce_partial_map"][plan["reduce_indptr"][token] : plan["reduce_indptr"][token + 1]]
        np.testing.assert_array_equal(mine[:, 1], rows if len(mine) > 1 else np.full(len(mine), -1))
        np.testing.assert_array_equal(mine[:, 2:4], np.tile([token, token + 1], (len(mine), 1)))
        np.testing.assert_array_equal(mine[:, 6], length - ends)
        assert not mine[:, 7].any()
    split = np.flatnonzero(np.diff(plan["reduce_indptr"]))
    np.testing.assert_array_equal(plan["reduce_final_map"], np.stack([split, split + 1], axis=1))
    # No worker has more than its share of the cost, which is rounded up and leaves room for one item more; and for what whole tokens may
    # take besides.
    blocks = -(-lengths // geometry.granularity)
    share = -(-int((blocks + geometry.overhead)[lengths > 0].sum()) // geometry.workers) + geometry.overhead
    if geometry.cut_cost:
        share += geometry.cut_cost * (2 - (-int((lengths > 0).sum()) // geometry.workers))
        share = max(share, math.isqrt((int(blocks.max()) + geometry.overhead) // 6) + 1 + geometry.overhead)
    cost = np.append(0, np.cumsum(-(-(items[:, 5] - items[:, 4]) // geometry.granularity) + geometry.overhead))
    assert (np.diff(cost[indptr]) <= share).all()


@pytest.mark.parametrize("workers", sorted({case["M"] for case, _ in aiter_plans.load()}))
def test_aiter_plans(workers: int) -> None:
    """Where no token is empty, the very arrays. AITER gives an empty token an item, and its cost: we leave it out."""
    for case, want in aiter_plans.load():
        if case["M"] != workers:
            continue
        geometry, lengths = aiter_plans.geometry(case), np.minimum(want["lengths"], case["topk"])
        got = make_plan([lengths], (case["topk"],), geometry, workers)
        assert_sound(got, lengths, case["topk"], geometry, workers)
        if (lengths > 0).all():
            assert_same_plan(got, want)
        else:
            kept, items = np.flatnonzero(lengths), want["work_info_set"]
            assert (items[:, 4] == items[:, 5]).sum() == (lengths == 0).sum()
            assert_same_plan(without_empty(got, kept, case["topk"]), make_plan([lengths[kept]], (case["topk"],), geometry, workers))


def without_empty(plan: Plan, kept: np.ndarray, stride: int) -> Plan:
    """The plan in terms of the kept tokens alone, renumbered."""
    number = np.zeros(len(plan["kv_lengths"]), np.int32)
    number[kept] = np.arange(len(kept))
    items = plan["work_info_set"].copy()
    token = items[:, 0].copy()
    items[:, 0] = items[:, 2] = number[token]
    items[:, 3] = items[:, 2] + 1
    items[:, 4:6] += ((number[token] - token) * stride)[:, None]
    final = number[plan["reduce_final_map"][:, :1]] + np.array([[0, 1]], np.int32)
    return plan | {"work_info_set": items, "reduce_final_map": final, "reduce_indptr": plan["reduce_indptr"][np.append(0, kept + 1)]}


def test_aiter_cases_are_all_there() -> None:
    assert len(aiter_plans.load()) == 275
    assert sum(bool((plan["lengths"] > 0).all()) for _, plan in aiter_plans.load()) == 225


LENGTHS = st.one_of(st.integers(0, 70), st.integers(0, 3000), st.sampled_from([0, 0, 0, 1, INT_MIN, -5, INT_MAX, 10**9, 64, 128]))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=12),
    topks=st.sampled_from([(0,), (128,), (2048,), (128, 512), (0, 64), (64, 0)]),
    active=st.integers(1, 12),
    idle=st.integers(0, 3),
    granularity=st.sampled_from([1, 16, 64, 1000]),
    overhead=st.sampled_from([0, 1, 2, 16]),
    cut_cost=st.sampled_from([0, 1, 4, 100, INT_MAX]),
)
@example([(INT_MAX, INT_MAX)] * 12, (128, 512), 12, 3, 1, 0, 0)
@example([(INT_MIN, INT_MIN)] * 12, (128, 512), 12, 3, 16, 16, 4)
@example([(128, 512)] * 11 + [(128, 400)], (128, 512), 5, 0, 64, 2, 4)
@example([(1, 0)] * 2 + [(INT_MAX, 0)] * 3, (429_000_000,), 1, 0, 1, 0, 0)  # a room of more than 2^30, twice
def test_any_lengths(
    lengths: list[tuple[int, int]],
    topks: tuple[int, ...],
    active: int,
    idle: int,
    granularity: int,
    overhead: int,
    cut_cost: int,
) -> None:
    columns = [np.array(column, np.int32) for column in zip(*lengths)][: len(topks)]
    geometry, stride = Geometry(active, granularity, overhead, cut_cost), sum(topks)
    clamped = sum(np.clip(column, 0, topk) for column, topk in zip(columns, topks))
    plan = make_plan(columns, topks, geometry, active + idle)
    assert_sound(plan, clamped, stride, geometry, active + idle)
    assert_same_plan(plan, reference.plan(clamped.tolist(), stride, active + idle, granularity, overhead, active, cut_cost))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=12),
    topks=st.sampled_from([(0,), (128,), (2048,), (128, 512), (64, 0)]),
    active=st.integers(1, 12),
    idle=st.integers(0, 3),
    granularity=st.sampled_from([1, 16, 64, 1000]),
    overhead=st.sampled_from([0, 1, 16]),
    segment=st.sampled_from([1, 3, 20, 10**6]),
)
@example([(INT_MAX, INT_MAX)] * 12, (128, 512), 12, 3, 1, 0, 1)
def test_segments(
    lengths: list[tuple[int, int]], topks: tuple[int, ...], active: int, idle: int, granularity: int, overhead: int, segment: int
) -> None:
    """A plan of segments: the oracle's, and a token's items are those that it has alone."""
    columns = [np.array(column, np.int32) for column in zip(*lengths)][: len(topks)]
    geometry, stride = Geometry(active, granularity, overhead, segment=segment), sum(topks)
    clamped = sum(np.clip(column, 0, topk) for column, topk in zip(columns, topks))
    plan = make_plan(columns, topks, geometry, active + idle)
    want = reference.plan(clamped.tolist(), stride, active + idle, granularity, overhead, active, segment=segment)
    assert_same_plan(plan, want)
    for token, length in enumerate(clamped):
        mine = plan["work_info_set"][plan["work_info_set"][:, 0] == token][:, 4:6] - token * stride
        begins = np.arange(0, length, segment * granularity)
        np.testing.assert_array_equal(mine, np.stack([begins, np.minimum(begins + segment * granularity, length)], axis=1))
    assert plan["work_indptr"][active] == len(plan["work_info_set"])


@pytest.mark.parametrize(
    ("tokens", "cut_cost", "cut"),
    [(100, 0, 50), (100, 1, 50), (100, 2, 0), (130, 2, 0), (132, 2, 0), (64, 1, 60), (64, 2, 0), (1000, 2, 0), (40, 2, 40)],
)
def test_tokens_are_left_whole(tokens: int, cut_cost: int, cut: int) -> None:
    """Where the workers' even share is little less than whole tokens, those, though one is shorter."""
    geometry = Geometry(66 if tokens == 100 else 132, granularity=64, overhead=2, cut_cost=cut_cost)
    for shorter in (0, 100):
        lengths = np.full(tokens, 640)
        lengths[tokens // 3] -= shorter
        plan = make_plan([np.minimum(lengths, 128), np.maximum(lengths - 128, 0)], (128, 512), geometry, 132)
        assert_sound(plan, lengths, 640, geometry, 132)
        split = np.count_nonzero(np.diff(plan["reduce_indptr"]))
        assert split == 0 if cut == 0 else split >= cut, split


def test_capacity_is_reached() -> None:
    """Two equal tokens on three workers, at no cost an item: both are cut, into as many items and partials as there is room for."""
    plan = make_plan([np.array([48, 48])], (48,), Geometry(3, 16, 0), 3)
    assert _work.plan_capacity(2, 3) == (len(plan["work_info_set"]), len(plan["reduce_partial_map"])) == (4, 4)


def test_plan_decode_is_the_planner_at_full_size() -> None:
    """Arrays have room for any platform's workers; batch axes are flattened; the scopes' lengths are clamped and summed."""
    swa = np.array([[128, 1000, -3], [7, INT_MAX, 0]], np.int32)
    extra = np.array([[512, 64, -1], [0, 10**9, INT_MIN]], np.int32)
    plan = dsv4.plan_decode(jnp.asarray(swa), jnp.asarray(extra), num_heads=64, swa_topk=128, extra_topk=512, implementation="cpu")
    (work,) = plan.work
    assert [tuple(a.shape) for a in work] == [tuple(a.shape) for a in _work.plan_shapes(6)]
    assert work.work_indptr.shape == (_work.MAX_WORKERS + 1,)
    lengths = np.array([640, 192, 0, 7, 640, 0])
    np.testing.assert_array_equal(work.kv_lengths, lengths)
    geometry = cpu.CPU.geometry(6, 64)
    costs = geometry.granularity, geometry.overhead, geometry.workers, geometry.cut_cost
    want = reference.plan(lengths.tolist(), 640, _work.MAX_WORKERS, *costs)
    used = len(want["work_info_set"])
    np.testing.assert_array_equal(work.work_info_set[:used], want["work_info_set"])
    np.testing.assert_array_equal(work.work_indptr, want["work_indptr"])
    np.testing.assert_array_equal(work.reduce_indptr, want["reduce_indptr"])
    assert (plan.made_for.tokens, plan.made_for.num_heads, plan.made_for.implementation) == (6, 64, "cpu")


def test_plan_per_scope() -> None:
    """Without fusing, each scope has a plan of its own."""
    lengths = jnp.array([5, 100], jnp.int32)
    plan = dsv4.plan_decode(lengths, 2 * lengths, num_heads=8, swa_topk=64, extra_topk=512, implementation="cpu", fused=False)
    np.testing.assert_array_equal([work.kv_lengths for work in plan.work], [[5, 64], [10, 200]])


def test_no_tokens() -> None:
    plan = dsv4.plan_decode(jnp.zeros((2, 0), jnp.int32), num_heads=8, swa_topk=64, implementation="cpu")
    assert not any(np.asarray(a).any() for a in plan.work[0])
    assert plan.made_for.tokens == 0


@pytest.mark.parametrize(("tokens", "length"), [(1, 640), (1, 128), (4, 640), (4, 1152), (16, 192)])
def test_fewer_items_than_aiter_on_small_batches(tokens: int, length: int) -> None:
    """Each item reads whole tiles of 64 keys and each partial is merged: AITER's cuts at 16 keys for 256 workers cost both."""
    lengths = np.full(tokens, length)
    ours, theirs = cpu.CPU.geometry(tokens), Geometry(256, 16, aiter_plans.OVERHEAD)
    mine = make_plan([lengths], (length,), ours, ours.workers)
    aiter = make_plan([lengths], (length,), theirs, theirs.workers)
    assert len(mine["work_info_set"]) < len(aiter["work_info_set"])
    tiles = lambda plan: int((-(-(plan["work_info_set"][:, 5] - plan["work_info_set"][:, 4]) // 64)).sum())  # noqa: E731
    assert tiles(mine) == tokens * -(-length // 64) <= tiles(aiter)


def test_batch_invariance_is_promised_or_refused() -> None:
    """The CPU's bits never depend on the batch, so nothing changes; plain JAX cannot promise it. A plan is for one or the other."""
    cache, lengths = dsv4.KVCache.create(2, 64), jnp.array([3, 100], jnp.int32)
    scope = dsv4.Scope(cache, jnp.zeros((2, 128), jnp.int32), lengths)
    q = jnp.ones((2, 4, 512), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="xla: its bits may change with the batch, and batch_invariant=True was asked for"):
        dsv4.sparse_mla_decode(q, scope, implementation="xla", batch_invariant=True)
    plan = dsv4.plan_decode(lengths, num_heads=4, swa_topk=128, implementation="cpu", batch_invariant=True)
    with pytest.raises(ValueError, match=r"plan must be made for this call's batch_invariant = False, got True"):
        dsv4.sparse_mla_decode(q, scope, implementation="cpu", plan=plan)
    out = dsv4.sparse_mla_decode(q, scope, implementation="cpu", plan=plan, batch_invariant=True)
    np.testing.assert_array_equal(out, dsv4.sparse_mla_decode(q, scope, implementation="cpu"))


def test_segments_have_room() -> None:
    """A batch-invariant plan's arrays have room for all segments of all tokens, whichever implementation fills them."""
    lengths = jnp.full(5, 10**6, jnp.int32)
    (work,) = dsv4.plan_decode(
        lengths, lengths, num_heads=64, swa_topk=128, extra_topk=3000, implementation="cpu", batch_invariant=True
    ).work
    assert [tuple(a.shape) for a in work] == [tuple(a.shape) for a in _work.plan_shapes(5, segments=3)]
    assert work.work_info_set.shape == (15 + _work.MAX_WORKERS - 1, 8)
