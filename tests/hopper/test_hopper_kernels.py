"""The CUDA kernels, from the source that nvcc compiles, on a software Hopper: without a GPU. What needs one is in test_cuda.py."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
import software_hopper
from cases import PACKED, Case, Pair, ScopeCase, in_layouts
from compare import LSE, OUT_BF16, assert_close, assert_same_bits
from conformance import in_pairs
from hostile import KINDS, draw_tile, written
from operands import CASES, Operands, case_named, operands, supported
from software_hopper import MOST_WORKERS, Cache, KernelError, Plan, Scope, SoftwareHopper

from jax_dsv4 import reference

pytestmark = pytest.mark.skipif(bool(software_hopper.missing()), reason=software_hopper.missing())

# Few tokens get clusters with 16 processors; with 3 hardly any do: blocks have several items, and tokens several blocks.
PROCESSORS, FEW_PROCESSORS = 16, 3


@functools.lru_cache(maxsize=1)
def planned(case: Case, seed: int = 0):
    q, scopes, *rest = operands(case, seed)
    return q, scopes, *rest, SoftwareHopper(PROCESSORS).plan(scopes, case.heads)


def hold(case: Case, *, processors: int = PROCESSORS, schedule: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    q, scopes, sink, scale, want, want_lse = operands(case, seed)
    gpu = SoftwareHopper(processors, schedule)
    out, lse = gpu.decode(q, scopes, sink, scale, gpu.plan(scopes, case.heads))
    assert_close(f"{case} lse", lse, want_lse, LSE)
    assert_close(f"{case} out", software_hopper.from_bf16(out), want, OUT_BF16)
    return out, lse


@pytest.mark.parametrize("processors", [FEW_PROCESSORS, PROCESSORS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case, processors: int) -> None:
    hold(case, processors=processors)


@in_pairs
def test_layouts(pair: Pair, case: Case) -> None:
    if not supported(case):
        pytest.skip("the kernels take q in bfloat16")
    for processors in (FEW_PROCESSORS, PROCESSORS):
        hold(in_layouts(case, pair), processors=processors)


@pytest.mark.parametrize("processors", [FEW_PROCESSORS, PROCESSORS])
@pytest.mark.parametrize("name", ["heads5", "heads32", "heads96", "one_token_split"])
def test_nan_scores_are_no_missing_keys(name: str, processors: int) -> None:
    """Of a head whose query holds NaN, out and lse are NaN: an lse of -inf would be passed over in a merge. Others are as without."""
    q, scopes, sink, scale, *_ = operands(case_named(name))
    gpu = SoftwareHopper(processors)
    plan = gpu.plan(scopes, q.shape[1])
    want, want_lse = gpu.decode(q, scopes, sink, scale, plan)
    spoilt = q.copy()
    spoilt[0, 3, 7] = 0x7FC0  # bfloat16 NaN
    out, lse = gpu.decode(spoilt, scopes, sink, scale, plan)
    assert np.isnan(lse[0, 3])
    assert np.isnan(software_hopper.from_bf16(out[0, 3])).all()
    out[0, 3], lse[0, 3] = want[0, 3], want_lse[0, 3]
    assert_same_bits("out", out, want)
    assert_same_bits("lse", lse, want_lse)


@pytest.mark.parametrize("processors", [FEW_PROCESSORS, PROCESSORS])
@pytest.mark.parametrize("name", ["heads5", "heads32", "heads96"])
def test_bits_do_not_depend_on_the_schedule(name: str, processors: int) -> None:
    """In whatever order threads run, as far as barriers let them."""
    first = hold(case_named(name), processors=processors)
    for schedule in (1, 2, 3):
        for got, want in zip(hold(case_named(name), processors=processors, schedule=schedule), first):
            assert_same_bits(f"schedule {schedule}", got, want)


@pytest.mark.parametrize(("heads", "blocks"), [*((8, n) for n in range(2, 17)), *((16, n) for n in (2, 4, 8, 16))])
@pytest.mark.parametrize("lengths", ["full", "hostile"])
def test_every_cluster(heads: int, blocks: int, lengths: str) -> None:
    """A token of as many tiles as the device has multiprocessors has them all, and asks the plan for nothing but its lengths."""
    for seed in range(1 if lengths == "full" else 4):
        case = Case("cluster", heads, 1, ScopeCase(64 * blocks, slots=1024, lengths=lengths))
        q, scopes, sink, scale, want, want_lse = operands(case, seed)
        gpu = SoftwareHopper(blocks)
        plan = gpu.plan(scopes, heads)
        lengths_only = Plan((plan.arrays[0], *map(np.zeros_like, plan.arrays[1:])), plan.workers)
        out, lse = gpu.decode(q, scopes, sink, scale, lengths_only)
        assert_close("lse", lse, want_lse, LSE)
        assert_close("out", software_hopper.from_bf16(out), want, OUT_BF16)


@pytest.mark.parametrize("name", ["heads8", "heads64"])
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_caches_at_odd_addresses(name: str, offset: int) -> None:
    q, scopes, sink, scale, want, want_lse = operands(case_named(name))

    def moved(cache: Cache) -> Cache:
        whole = np.full(cache.data.size + offset, 0xFF, np.uint8)
        whole[offset:] = cache.data.reshape(-1)
        return cache._replace(data=whole[offset:].reshape(cache.data.shape))

    scopes = [s._replace(cache=moved(s.cache)) for s in scopes]
    gpu = SoftwareHopper(PROCESSORS)
    out, lse = gpu.decode(q, scopes, sink, scale, gpu.plan(scopes, q.shape[1]))
    assert_close("lse", lse, want_lse, LSE)
    assert_close("out", software_hopper.from_bf16(out), want, OUT_BF16)


def test_float32_output() -> None:
    q, scopes, sink, scale, want, _, plan = planned(case_named("heads17"))
    out, _ = SoftwareHopper(PROCESSORS).decode(q, scopes, sink, scale, plan, float32_out=True)
    assert_close("out", out, want, OUT_BF16)


@pytest.mark.parametrize("name", ["heads16", "many_tokens", "heads96"])  # clusters; two kernels that follow the plan
@pytest.mark.parametrize("seed", range(12))
def test_garbage_plan(seed: int, name: str) -> None:
    """As in test_cuda.py: the call ends, and is right or NaN where lengths are garbage."""
    q, scopes, sink, scale, want, want_lse, plan = planned(case_named(name))
    rng, field = np.random.default_rng(seed), seed % len(plan.arrays)
    values = np.array([-(2**31), -1, 0, 1, 2, 3, 64, 319, 320, 1000, 2**31 - 1])
    arrays = list(plan.arrays)
    hit = rng.random(arrays[field].shape) < (0.5 if seed // len(arrays) % 2 else 0.02)
    arrays[field] = np.where(hit, rng.choice(values, hit.shape), arrays[field]).astype(np.int32)
    out, lse = SoftwareHopper(PROCESSORS).decode(q, scopes, sink, scale, Plan(tuple(arrays), plan.workers))
    if software_hopper.PLAN_ARRAYS[field] in ("kv_lengths", "reduce_final_map"):
        out, nan = software_hopper.from_bf16(out), np.isnan(lse).any(-1)
        assert np.isnan(out[nan]).all()
        assert_close("out", out[~nan], want[~nan], OUT_BF16)
        assert_close("lse", lse[~nan], want_lse[~nan], LSE)


def repeated(p: Operands, rows: np.ndarray) -> Operands:
    """The tokens `rows`, in this order, some maybe more than once."""
    scopes = [Scope(s.cache, s.indices[rows], s.lengths[rows]) for s in p.scopes]
    return p._replace(q=p.q[rows], scopes=scopes, out=p.out[rows], lse=p.lse[rows])


@pytest.mark.parametrize("name", ["many_tokens", "heads96", "heads17", "one_token_split"])
def test_batch_invariance(name: str) -> None:
    """A token's bits alone, in any batch, at any place, on any number of multiprocessors: tokens of up to five segments."""

    def attend(p: Operands, processors: int) -> tuple[np.ndarray, np.ndarray]:
        gpu = SoftwareHopper(processors)
        plan = gpu.plan(p.scopes, p.q.shape[1], segment=2)
        return gpu.decode(p.q, p.scopes, p.sink, p.scale, plan, batch_invariant=True)

    p, rng = operands(case_named(name)), np.random.default_rng(0)
    want = attend(p, PROCESSORS)
    assert_close("lse", want[1], p.lse, LSE)
    assert_close("out", software_hopper.from_bf16(want[0]), p.out, OUT_BF16)
    tokens = len(p.q)
    for processors, rows in ((3, [0]), (16, [tokens - 1]), (5, rng.integers(0, tokens, 7)), (132, rng.permutation(tokens)[:9])):
        got = attend(repeated(p, np.asarray(rows)), processors)
        for field in (0, 1):
            assert_same_bits(f"tokens {rows} on {processors}", got[field], want[field][rows])


@pytest.mark.parametrize("processors", [FEW_PROCESSORS, PROCESSORS, MOST_WORKERS])
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_bits_do_not_depend_on_topk(heads: int, processors: int) -> None:
    """Nor do the kernel and the blocks that a token gets: entries past the lengths may be 0 or 8000."""
    case = Case("lengths", heads, 3, ScopeCase(128, slots=512), ScopeCase(600, slots=1024, lengths="random"))
    p = operands(case)
    answers = []
    for past in (0, 8000):
        scopes = [p.scopes[0], p.scopes[1]._replace(indices=np.pad(p.scopes[1].indices, ((0, 0), (0, past)), constant_values=7))]
        gpu = SoftwareHopper(processors)
        answers.append(gpu.decode(p.q, scopes, p.sink, p.scale, gpu.plan(scopes, heads)))
    assert_close("out", software_hopper.from_bf16(answers[1][0]), p.out, OUT_BF16)
    for got, want in zip(*answers):
        assert_same_bits("topk", got, want)


@pytest.mark.parametrize("tokens", [1, 7, 9, 132, 300, 513, 1025])
def test_plan(tokens: int) -> None:
    rng, topks, overhead, granularity = np.random.default_rng(tokens), (128, 1024), 2, 64
    cache = Cache(np.zeros((1, 584), np.uint8), 1)
    cuts = ((2, 1, 0), (0, 70, 0), (2, 70, 0), (0, 1100, 0), (100, 1100, 0), (0, 0, 0), (2, 0, 0), (1000, 0, 0), (0, 1100, 3), (0, 70, 20))
    for cut_cost, high, segment in cuts:
        # high = 0: all full, or with the last one some empty
        some = (rng.random(tokens) < 0.9) | (cut_cost < 1000)
        lengths = [(rng.integers(-3, high, tokens) if high else topk * some).astype(np.int32) for topk in topks]
        scopes = [Scope(cache, np.zeros((tokens, topk), np.int32), n) for topk, n in zip(topks, lengths)]
        arrays = SoftwareHopper(PROCESSORS).plan(scopes, 64, granularity, overhead, cut_cost, segment).arrays
        got = dict(zip(software_hopper.PLAN_ARRAYS, arrays))
        clamped = sum(np.clip(n, 0, topk) for n, topk in zip(lengths, topks))
        want = reference.plan(clamped.tolist(), sum(topks), PROCESSORS, granularity, overhead, cut_cost=cut_cost, segment=segment)
        np.testing.assert_array_equal(got["kv_lengths"], clamped)
        for name in ("work_indptr", "reduce_indptr"):
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        for name in ("work_info_set", "reduce_partial_map"):
            used = len(want[name])
            np.testing.assert_array_equal(got[name][:used], want[name], err_msg=name)
            assert not got[name][used:].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("block_size", "stride"), [(1, 584), (5, 2921), (64, 37440)])
def test_append(block_size: int, stride: int, dtype: str) -> None:
    rng, rows = np.random.default_rng(block_size), 256
    latents = np.stack([np.concatenate([draw_tile(KINDS[(row + t) % len(KINDS)], rng) for t in range(8)]) for row in range(rows)])
    latents = latents.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    before = rng.integers(0, 256, (-(-2 * rows // block_size), stride), dtype=np.uint8)
    slots = rng.integers(-2, 2 * rows + block_size, rows).astype(np.int32)
    bits = latents.view(np.uint16) if dtype == "bfloat16" else latents
    after = SoftwareHopper().append(Cache(before, block_size), bits, slots).data
    np.testing.assert_array_equal(after, written(before, latents, slots, block_size, "fp8_ds_mla"))
    for layout, arrangement in (("mxfp8_528", "inline"), ("mxfp8_528", "footer"), ("nvfp4_288", "inline"), ("nvfp4_288", "footer")):
        before = before[:, : PACKED[layout].stride(block_size, arrangement)].copy()
        cache = SoftwareHopper().append(Cache(before, block_size, layout, arrangement), bits, slots)
        np.testing.assert_array_equal(cache.data, written(before, latents, slots, block_size, layout, arrangement))


@pytest.mark.parametrize("blocks", [1, 2, 16])
@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_clusters(schedule: int, blocks: int) -> None:
    own = np.arange(3 * blocks * 64).reshape(3, blocks, 64)
    np.testing.assert_array_equal(SoftwareHopper(schedule=schedule).neighbours(3, blocks), np.roll(own, 1, axis=1))


@pytest.mark.parametrize(
    ("mistake", "finding"),
    [("no_fence", "no fence"), ("no_cluster_wait", "has waited for the cluster"), ("no_wait", "have all ended")],
)
def test_cluster_mistakes(mistake: str, finding: str) -> None:
    with pytest.raises(KernelError, match=finding):
        SoftwareHopper().neighbours(1, 2, mistake)


def test_clusters_of_a_hopper() -> None:
    with pytest.raises(KernelError, match="not a cluster that a Hopper has"):
        SoftwareHopper().neighbours(1, 17)
