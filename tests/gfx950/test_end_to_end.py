"""jax_dsv4 with implementation="aiter", under jit, through the handlers that we ship and AITER's own kernel."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import software_gpu
from aiter_kernel import LATENT
from calls import GFX950_LAYOUTS, attend, check, create_cache, expected, make_cache, make_q, make_scope, plan_for

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, _work, doctor
from jax_dsv4._implementations import aiter, native
from jax_dsv4.cache import LAYOUTS


def test_holes(rocm, own_planner, layout):
    """Slots that name no row of the cache are passed over: some of a token's, all of a work item's, all of a token's."""
    rng = np.random.default_rng(4)
    cache = make_cache(rng, 100, layout)
    scope = make_scope(rng, cache, 100, [90, 600, 600, 30, 5], 600, holes=0.3)
    indices = np.array(scope.indices)
    indices[1, :] = -1
    indices[2, 20:] = cache.num_slots
    indices[3, :] = -1
    indices[4, :5] = [-1, 3, -1, -7, cache.num_slots]
    work = (plan := plan_for([scope], 16)).work[0]
    workers = itertools.pairwise(np.asarray(work.work_indptr))
    # Without keys the item of token 3 would end its worker, and that of token 4 were lost.
    assert [3, 4] in [list(work.work_info_set[first:end, 0]) for first, end in workers]
    scope = scope._replace(indices=jnp.asarray(indices))
    q = make_q(rng, 5, 16)
    check(attend(q, (scope,), None, plan), expected(q, [scope]), layout)


# What an item says instead, by column: its token, its partial row, q's start and end, the keys' start and end.
BROKEN = {
    "a key is missing": lambda begin, end: {5: end - 1},
    "no key": lambda begin, end: {5: begin},
    "a key is attended to twice": lambda begin, end: {4: begin - 1},
    "before its token": lambda begin, end: {4: -1},
    "behind its token": lambda begin, end: {5: 2**20},
    "another token's": lambda begin, end: {0: 1},
    "no token's": lambda begin, end: {0: 3},
    "a partial row beyond the last": lambda begin, end: {1: 2**20},
}


@pytest.mark.parametrize("what", [*BROKEN, "the map names no partial row", "the map begins before its rows"])
@pytest.mark.parametrize("layout", ["aiter_bf16"])
def test_a_token_with_a_broken_plan_is_nan(bridge, own_planner, layout, what):
    """And no other: AITER's kernel is never given such an item."""
    rng = np.random.default_rng(26)
    scope, q = make_scope(rng, make_cache(rng, 300, layout), 300, [256, 30, 64], 256), make_q(rng, 3, 16)
    plan = plan_for([scope], 16)
    work, info = plan.work[0], np.array(plan.work[0].work_info_set)
    first, last = np.asarray(work.reduce_indptr)[:2]
    assert last - first > 1  # token 0 is cut
    if what in BROKEN:
        for column, value in BROKEN[what](*info[1, 4:6]).items():
            info[1, column] = value
        broken = work._replace(work_info_set=jnp.asarray(info))
    elif what == "the map names no partial row":
        broken = work._replace(reduce_partial_map=work.reduce_partial_map.at[1].set(-1))
    else:
        broken = work._replace(reduce_indptr=work.reduce_indptr.at[0].set(-(2**20)))
    want = attend(q, (scope,), None, plan)
    got = attend(q, (scope,), None, dsv4.DecodePlan((broken,), plan.made_for))
    for a, b in zip(got, want):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isnan(a[0]).all()
        np.testing.assert_array_equal(a[1:], b[1:])


def test_what_else_is_in_the_batch(rocm, layout):
    """In bf16 a token's bits do not depend on it, as long as the plan cuts the token's keys alike. In fp8 all of q has one scale."""
    rng = np.random.default_rng(19)
    scope = make_scope(rng, make_cache(rng, 300, layout), 300, [60, 300, 17, 5], 300, holes=0.1)
    q = make_q(rng, 4, 32)
    want = attend(q, (scope,), None, plan := plan_for([scope], 32))
    others = attend(q.at[1:].multiply(1000), (scope._replace(indices=scope.indices.at[1:].set(scope.indices[1:, ::-1])),), None, plan)
    alone = attend(q[:1], (scope._replace(indices=scope.indices[:1], lengths=scope.lengths[:1]),))
    assert not np.diff(plan.work[0].reduce_indptr)[0]  # token 0 is not cut, here or alone
    for got in (others, alone):
        same = all(np.array_equal(np.asarray(a[0]).view(np.uint8), np.asarray(b[0]).view(np.uint8)) for a, b in zip(got, want))
        assert same == (layout == "aiter_bf16")


def test_combine_adds_a_rounding(rocm, layout):
    """To partial results' own error: a split token against the float64 merge of its items, each decoded as a token of its own."""
    rng = np.random.default_rng(25)
    scope, q = make_scope(rng, make_cache(rng, 700, layout), 700, [1000], 1000), make_q(rng, 1, 16)
    work = (plan := plan_for([scope], 16)).work[0]
    cuts = np.asarray(work.work_info_set)[: int(work.work_indptr[-1]), 4:6]
    assert len(cuts) > 2
    pieces = jnp.stack([jnp.roll(scope.indices[0], -begin) for begin, _ in cuts])
    items = dsv4.Scope(scope.cache, pieces, jnp.asarray(cuts[:, 1] - cuts[:, 0], jnp.int32))
    assert not np.diff(plan_for([items], 16).work[0].reduce_indptr).any()  # none is cut again
    out, lse = attend(q, (scope,), None, plan)
    parts, part_lse = (np.asarray(x, np.float64) for x in attend(jnp.repeat(q, len(cuts), 0), (items,)))
    top = part_lse.max(0)
    weights = np.exp(part_lse - top)
    np.testing.assert_allclose(lse[0], top + np.log(weights.sum(0)), rtol=2**-23)
    merged = (weights[..., None] * parts).sum(0) / weights.sum(0)[:, None]
    np.testing.assert_allclose(np.asarray(out[0], np.float64), merged, rtol=2**-8, atol=2**-8 * np.abs(parts).max())  # out is bfloat16


def test_numbers_beyond_64(rocm, layout):
    """One of AITER's kernels puts 0 in their place, and in that of NaN."""
    rng = np.random.default_rng(20)
    cache = create_cache(3, 16, layout, scale=2.0)
    cache = dsv4.append(cache, jnp.asarray(300 * rng.normal(size=(48, LATENT)), jnp.float32), jnp.arange(48), implementation="aiter")
    scope = make_scope(rng, cache, 48, [40, 1, 0], 40)
    q = make_q(rng, 3, 64) / 300
    out, lse = attend(q.at[0, 5].set(jnp.nan), (scope,))
    assert np.isnan(np.asarray(out[0, 5], np.float32)).all()
    assert np.isnan(lse[0, 5])
    check(attend(q, (scope,)), expected(q, [scope]), layout)


# ---- Capture: the bridge captures every call, so what is forbidden there has failed already. Here: replay.


def test_replay_sees_new_lengths_and_values(bridge, layout):
    """A decode loop whose graphs are captured once: the plan is rebuilt in the same buffers for new lengths, the cache grows, and a
    replay answers for what the buffers hold now. (AITER's own metadata pointers go stale when a buffer moves.)"""
    rng = np.random.default_rng(9)
    steps, heads, topk = 6, 16, 80
    latents = jnp.asarray(rng.normal(size=(steps, LATENT)), jnp.bfloat16)
    q = jnp.asarray(rng.normal(size=(steps, 2, heads, LATENT)), jnp.bfloat16)
    start = make_cache(rng, 40, layout)
    indices = jnp.asarray(rng.permutation(topk)[None].repeat(2, 0) % start.num_slots, jnp.int32)

    def step(cache, i):
        cache = dsv4.append(cache, jax.lax.dynamic_slice_in_dim(latents, i, 1), i[None], implementation="aiter")
        lengths = jnp.stack([7 * i + 30, jnp.where(i % 2, 0, 80 - i)]).astype(jnp.int32)
        scope = dsv4.Scope(cache, indices, lengths)
        plan = dsv4.plan_decode(lengths, num_heads=heads, swa_topk=topk, implementation="aiter")
        return cache, dsv4.sparse_mla_decode(q[i], scope, plan=plan, implementation="aiter", return_lse=True)

    loop = jax.jit(lambda cache: jax.lax.scan(step, cache, jnp.arange(steps)))
    _, want = jax.block_until_ready(loop(start))
    bridge.bridge_replay(1)
    _, got = jax.block_until_ready(loop(start))
    assert bridge.bridge_replayed() >= 3 * (steps - 2)  # XLA's buffers settle in the first rounds
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("planner", ["AITER's", "own"])
def test_nothing_forbidden_under_capture(bridge, gpu, monkeypatch, layout, planner):
    """Every handler: nothing is launched but under capture, and nothing refused there. What may not be part of a graph is refused:
    test_hip.py."""
    if planner == "own":
        monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    elif _ffi.aiter_plan_builder("gfx950") is None:
        pytest.skip("AITER's plan builder is not compiled: python -m jax_dsv4.build_aiter --source AITER (it takes minutes)")
    rng = np.random.default_rng(10)
    for _ in range(2):  # the first round loads code, in the initialize stage
        gpu.counters(), gpu.kernels()
        cache = make_cache(rng, 50, layout)
        scope = make_scope(rng, cache, 50, [30], 30)
        plan = jax.jit(lambda n: dsv4.plan_decode(n, num_heads=16, swa_topk=30, implementation="aiter"))(scope.lengths)
        jax.block_until_ready(attend(make_q(rng, 1, 16), (scope,), None, plan))
    counters, kernels = gpu.counters(), gpu.kernels()
    assert counters["calls_refused_under_capture"] == 0
    assert counters["launches_under_capture"] == counters["launches"]
    ours = {"plan"} if planner == "own" else {"metadata_inputs", "metadata_finish"}
    ours |= {"append", "pack_q", "pack_slots", "check_items", "combine"} | ({"amax"} if layout == "aiter_fp8" else set())
    assert {name.removeprefix("dsv4_") for name in kernels if name.startswith("dsv4_")} == ours
    assert len(kernels) == len(ours) + (1 if planner == "own" else 2)
    assert all(cost.launches == 1 for cost in kernels.values())


def test_our_kernels_wait_for_their_data(rocm, gpu, layout, reports_lse):
    """By the letter of the ISA. AITER's do not, and that is seen too; but for those of 16 heads in bf16, whose one weak wait is mended."""
    rng = np.random.default_rng(18)
    gpu.options(hazards=True)
    cache = make_cache(rng, 300, layout)
    scope = make_scope(rng, cache, 300, [300, 0, 65], 300, holes=0.1)
    jax.block_until_ready(attend(make_q(rng, 3, 32), (scope,)))
    hazards = gpu.hazards()
    assert any("5aiter" in h for h in hazards) == (layout == "aiter_fp8" or reports_lse)  # the wheel has no other for 32 heads
    assert not [h for h in hazards if "5aiter" not in h]


@pytest.mark.parametrize("layout", ["aiter_bf16"])
@pytest.mark.parametrize("latency", [0, 300, 3000])
def test_however_long_loads_take(rocm, gpu, layout, latency):
    """In instructions of a wave. Without the mended wait the kernel of 16 heads is wrong from 300 on (test_timing)."""
    rng = np.random.default_rng(24)
    gpu.options(vm_latency=latency)
    scope = make_scope(rng, make_cache(rng, 300, layout), 300, [300, 64, 129], 300)
    q = make_q(rng, 3, 16)
    check(attend(q, (scope,)), expected(q, [scope]), layout)


def test_buffers_may_move(bridge, layout):
    """The same program on other buffers, graphs kept by address: no address of one call is used in another."""
    rng = np.random.default_rng(11)
    bridge.bridge_replay(1)
    kept = []  # so that every round has buffers of its own
    for _ in range(3):
        cache = make_cache(rng, 50, layout)
        scope = make_scope(rng, cache, 50, [30, 0, 8], 30)
        q = make_q(rng, 3, 16)
        got = attend(q, (scope,))
        check(got, expected(q, [scope]), layout)
        kept.append((q, scope, got))
    assert len({q.unsafe_buffer_pointer() for q, _, _ in kept}) == 3


# ---- Cache.


def append_both(cache, latents, slots):
    return [dsv4.append(cache, latents, slots, implementation=name) for name in ("aiter", "xla")]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("layout", "scale"), [("aiter_bf16", 1.0), *(("aiter_fp8", s) for s in (0.03, 1.0, 2.0**-100, 2.0**100))])
def test_append_writes_the_bytes_of_plain_jax(rocm, dtype, layout, scale):
    """Every magnitude, zeros of both signs, subnormals, saturation, infinities, NaNs."""
    rng = np.random.default_rng(12)
    rows = scale * rng.normal(size=(12, LATENT)) * np.exp(3 * rng.normal(size=(12, 1)))
    corners = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 1.0]
    around = [sign * code * scale for code in (2**-10, 3 * 2**-11, 2**-9, 2**-6, 17, 19, 447, 448, 463.9, 464, 480) for sign in (1, -1)]
    rows[0], rows[1], rows[2], rows[3] = 0, np.inf, -np.inf, np.nan
    rows[4, : len(corners)], rows[5, : len(around)] = corners, around
    latents = jnp.asarray(rows.astype(np.float32), dtype)
    ours, plain = append_both(create_cache(2, 8, layout, scale), latents, jnp.arange(12, dtype=jnp.int32))
    bits = np.uint8 if layout == "aiter_fp8" else np.uint16
    ours, plain = (np.asarray(cache.data).view(bits) for cache in (ours, plain))
    np.testing.assert_array_equal(ours, plain)
    codes = ours[1:, :, :LATENT].reshape(16, LATENT)
    if layout == "aiter_fp8":  # infinities saturate
        assert (codes[1] == 0x7E).all()
        assert (codes[2] == 0xFE).all()
        assert (codes[3] == 0x7F).all()


def test_append_slots(rocm, gpu, layout):
    """Slots outside the cache are passed over, of equal ones the last counts and is written alone (the software GPU's workgroups would
    write them in order, a GPU's would not), and the block of zeros stays."""
    rng = np.random.default_rng(16)
    slots = rng.integers(0, 32, 200)
    slots[rng.random(200) < 0.3] = -1
    slots[[3, 50, 77, 199]] = [32, 2**31 - 1, -(2**31), 40]
    latents = jnp.asarray(rng.normal(size=(200, LATENT)), jnp.float32)
    gpu.kernels()
    ours, plain = append_both(create_cache(4, 8, layout), latents, jnp.asarray(slots, jnp.int32))
    written = gpu.kernels()["dsv4_append"].bytes_written
    np.testing.assert_array_equal(ours.data, plain.data)
    assert written == len(set(slots) & set(range(32))) * ours.data[0, 0].nbytes
    assert (np.asarray(ours.data[0]) == 0).all()
    assert (np.asarray(ours.data[..., LATENT:]) == 0).all()


def test_plain_jax_reads_the_layout(layout):
    """Any platform: "xla" on the same bytes, q not rounded; slot 0 is the first row after the block of zeros."""
    rng = np.random.default_rng(15)
    cache = create_cache(4, 8, layout)
    latents = jnp.asarray(rng.normal(size=(32, LATENT)), jnp.float32)
    cache = dsv4.append(cache, latents, jnp.arange(32, dtype=jnp.int32), implementation="xla")
    np.testing.assert_allclose(dsv4.dequantize(cache), latents, rtol=2**-4, atol=0.02 * 2**-10)
    assert (np.asarray(cache.data[0]) == 0).all()
    assert cache.num_slots == 32
    scope = dsv4.Scope(cache, jnp.asarray([[0, 31, -1, 32, 5]], jnp.int32), jnp.asarray([5], jnp.int32))
    q = make_q(rng, 1, 16, jnp.float32)
    got = dsv4.sparse_mla_decode(q, scope, implementation="xla", return_lse=True)
    check(got, expected(q, [scope], round_q=False), layout)


def test_append_donates(rocm, layout):
    append = jax.jit(lambda c, x, s: dsv4.append(c, x, s, implementation="aiter"), donate_argnums=0)
    cache = create_cache(4, 8, layout)
    text = append.lower(cache, jnp.zeros((2, LATENT)), jnp.zeros(2, jnp.int32)).compile().as_text()
    assert not [line for line in text.splitlines() if " copy(" in line and "[5,8,576]" in line]


def test_vmap_over_caches(rocm, layout):
    rng = np.random.default_rng(13)
    caches = [make_cache(rng, 30, layout) for _ in range(2)]
    scopes = [make_scope(rng, c, 30, [20, 7], 20, holes=0.2) for c in caches]
    # A slot past one's own cache is a hole, though another cache lies there.
    scopes[0] = scopes[0]._replace(indices=scopes[0].indices.at[0, :3].set(caches[0].num_slots))
    q = make_q(rng, 4, 16).reshape(2, 2, 16, LATENT)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *scopes)
    out, lse = jax.vmap(lambda q, s: dsv4.sparse_mla_decode(q, s, implementation="aiter", return_lse=True))(q, stacked)
    scale_of_all = jnp.max(jnp.abs(q))
    for k in range(2):
        # One scale serves all of q: give each entry the batch's largest number in a token of its own.
        padded = jnp.concatenate([q[k], jnp.full((1, 16, LATENT), scale_of_all)])
        scope = scopes[k]._replace(
            indices=jnp.concatenate([scopes[k].indices, scopes[k].indices[:1]]),
            lengths=jnp.concatenate([scopes[k].lengths, jnp.zeros(1, jnp.int32)]),
        )
        want = expected(padded, [scope])
        check((out[k], lse[k]), want.of(slice(2)), layout)


def test_a_plan_that_decode_has_no_use_for(rocm):
    """plan_decode does not know the cache's layout. Where that sends decode elsewhere, the plan is not used, and not made."""
    names = ("aiter", "xla")
    rng = np.random.default_rng(17)
    cache = dsv4.KVCache.create(4, 16)  # fp8_ds_mla
    latents = jnp.asarray(rng.normal(size=(64, LATENT)), jnp.float32)
    cache = dsv4.append(cache, latents, jnp.arange(64, dtype=jnp.int32), implementation="xla")
    scope = make_scope(rng, cache, 64, [20, 7], 20)._replace(indices=jnp.asarray(rng.integers(0, 64, (2, 20)), jnp.int32))

    def run(q, scope):
        plan = dsv4.plan_decode(scope.lengths, num_heads=16, swa_topk=20, implementation=names)
        return dsv4.sparse_mla_decode(q, scope, plan=plan, implementation=names, return_lse=True)

    q = make_q(rng, 2, 16)
    plan_alone = jax.jit(lambda n: dsv4.plan_decode(n, num_heads=16, swa_topk=20, implementation=names)).lower(scope.lengths)
    assert "dsv4_aiter" in plan_alone.as_text()
    assert "dsv4_aiter" not in jax.jit(run).lower(q, scope).compile().as_text()
    check(jax.jit(run)(q, scope), expected(q, [scope], round_q=False), cache.layout)


# ---- Refusals, each with its reason.


def test_other_layouts_are_refused(rocm):
    cache = dsv4.KVCache.create(4, 64)
    scope = dsv4.Scope(cache, jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(
        NotImplementedError, match=r"it reads layouts \('aiter_bf16', 'aiter_fp8', 'aiter_fp8_fnuz'\), and the cache's is 'fp8_ds_mla'"
    ):
        dsv4.sparse_mla_decode(jnp.zeros((1, 16, LATENT)), scope, implementation="aiter")


def test_fp8_of_gfx942_is_refused(rocm):
    reason = "AITER's fp8 kernels take e4m3fn on gfx950, layout aiter_fp8"
    scope = dsv4.Scope(create_cache(2, 16, "aiter_fp8_fnuz"), jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(NotImplementedError, match=reason):
        dsv4.sparse_mla_decode(jnp.zeros((1, 16, LATENT)), scope, implementation="aiter")
    with pytest.raises(NotImplementedError, match=reason):
        dsv4.append(scope.cache, jnp.zeros((1, LATENT)), jnp.zeros(1, jnp.int32), implementation="aiter")


def test_a_pool_beyond_4_gib_never_meets_a_kernel_that_wraps(rocm, layout, reports_lse):
    """The wheel's kernels wrap, and the newer bf16 one of 16 heads: there the one of 128 takes its place."""
    choice = aiter.choose_kernel(layout, 16, 2**32)
    assert choice.found == reports_lse
    assert not choice.found or layout == "aiter_fp8" or b"qh32_qseqlen4_gqaratio32" in choice.text
    if not choice.found:
        dtype = jnp.uint8 if layout == "aiter_fp8" else jnp.bfloat16
        data = jax.ShapeDtypeStruct((2**17, 64, 576), dtype)
        cache = dsv4.KVCache(data, block_size=64, layout=layout, scale=create_cache(0, 64, layout).scale)
        assert "wraps at 4 GiB" in aiter.AITER.unsupported(16, (cache,))


def test_kernel_choice(rocm, layout, reports_lse):
    choices = {heads: aiter.choose_kernel(layout, heads) for heads in (1, 16, 32, 48, 64, 96, 128)}
    chosen = {heads: (c.kernel_heads, c.head_passes(heads), c.tile) for heads, c in choices.items()}
    if not reports_lse:  # the wheel
        assert chosen == {heads: (16, -(-heads // 16), 64) for heads in choices}
    elif layout == "aiter_bf16":  # beyond 16 as many heads as there are; never the kernel of 64, which loses numbers beyond 64
        assert chosen == {heads: (max(heads, 16), 1, 64) for heads in choices}
    else:  # 32 heads: AITER's kernel for them writes no lse and wraps at 4 GiB
        few = {heads: (16, -(-heads // 16), 128) for heads in (1, 16, 32, 48, 96)}
        assert chosen == few | {64: (64, 1, 64), 128: (128, 1, 64)}


def test_handler_checks_in_the_words_of_python(rocm):
    def append(shape=(2, 8, 576), scale=1.0, layout="aiter_fp8"):
        call = jax.ffi.ffi_call("dsv4_aiter_append", jax.ShapeDtypeStruct(shape, jnp.uint8))
        rows = jnp.zeros((1, 512)), jnp.zeros(1, jnp.int32)
        attributes = dict(block_size=np.int32(8), cache_scale=np.float32(scale), layout=np.int32(LAYOUTS[layout].code))
        jax.block_until_ready(call(jnp.zeros(shape, jnp.uint8), *rows, **attributes))

    append()
    append(layout="aiter_fp8_fnuz")  # the bytes do not say
    with pytest.raises(Exception, match="append: cache must have dtype bfloat16, got uint8"):
        append(layout="aiter_bf16")
    with pytest.raises(Exception, match=r"append: cache.layout must be aiter_bf16, aiter_fp8 or aiter_fp8_fnuz, got 0"):
        append(layout="fp8_ds_mla")
    with pytest.raises(
        Exception, match=r"append: cache must have shape \(1 \+ num_blocks, block_size, 576\) = \(\*, 8, 576\), got \(2, 8, 512\)"
    ):
        append(shape=(2, 8, 512))
    for scale in (0, -1, np.nan, np.inf, 2.0**-101):
        with pytest.raises(Exception, match=r"append: cache.scale must be positive, from 2\*\*-100 to 2\*\*100, got"):
            append(scale=scale)


@pytest.mark.parametrize(("units", "lengths"), [(256, [600]), (256, [600, 130, 64]), (8, [*range(100, 580, 20)])],
                         ids=["1 token", "3 tokens", "24 tokens"])  # fmt: skip
def test_cost_of_a_call(bridge, gpu, table, monkeypatch, layout, units, lengths):
    """Launches, instructions, imbalance and traffic of a decode: a cost model against which changes to plan and layout can be judged
    without hardware. The same on a plan of AITER's granularity, which cuts small batches into fractions of tiles. Printed."""
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    monkeypatch.setenv("GFX950_UNITS", str(units))
    aiter.choose_kernel.cache_clear()
    rng = np.random.default_rng(14)
    topk = 5120  # so that there are partial rows enough for any granularity
    scope = make_scope(rng, make_cache(rng, 700, layout), 700, lengths, topk)
    q = make_q(rng, len(lengths), 16)
    plan = plan_for([scope], 16)
    fine = native.plan_call([scope.lengths], [topk], _work.Geometry(units, granularity=16, overhead=16), target="dsv4_aiter_plan")

    def cost_on(plan):
        gpu.kernels()
        check(attend(q, (scope,), None, plan), expected(q, [scope]), layout)
        return {("AITER's" if "aiter" in name else name): cost for name, cost in gpu.kernels().items()}

    cost, fine_cost = cost_on(plan), cost_on(dsv4.DecodePlan((fine,), plan.made_for))
    kernel, fine_kernel = cost["AITER's"], fine_cost["AITER's"]
    combine, fine_combine = cost["dsv4_combine"], fine_cost["dsv4_combine"]
    keys, tile, row = sum(lengths), aiter.choose_kernel(layout, 16).tile, scope.cache.data[0, 0].nbytes
    items, fine_items = (int(work.work_indptr[-1]) for work in (plan.work[0], fine))
    lines = [f"  {'':16} workgroups  wave-instructions  busiest over mean  KiB read  written"]
    for name, c in cost.items():
        kib = f"{c.bytes_read / 1024:8.1f} {c.bytes_written / 1024:8.1f}"
        lines.append(f"  {name:16} {c.workgroups:10} {c.instructions:18} {c.imbalance:18.2f}  {kib}")
    total = sum(c.instructions for c in cost.values())
    lines += [
        f"  {len(cost)} launches, {total} wave-instructions; AITER's: {64 * kernel.instructions / keys:.0f} per 64 keys, all included",
        f"  {kernel.bytes_read / keys:.0f} bytes read per key by AITER's kernel; a row is {row}",
        f"  at AITER's granularity: {fine_items} items instead of {items}, {fine_kernel.instructions} wave-instructions in its kernel, "
        f"{fine_kernel.busiest:.0f} instead of {kernel.busiest:.0f} in the busiest workgroup,",
        f"    {fine_combine.bytes_read / 1024:.1f} KiB read by combine",
    ]
    table(f"a decode of {len(lengths)} tokens, {keys} keys, 16 heads, {layout}, {units} units, tiles of {tile} keys", lines)
    assert all(c.launches == 1 for c in cost.values())
    assert kernel.bytes_read < 5 * row * keys  # a whole tile is fetched ahead of an item's last
    # At the end of a full tile the kernel fetches one more: 12 %. In bf16 it works on 16 or 32 keys at a time: finer cuts would be done
    # sooner, and combine pays.
    assert kernel.busiest < (1.2 if layout == "aiter_fp8" else 2) * fine_kernel.busiest
    if units == 256:
        assert items < fine_items
        assert kernel.instructions < fine_kernel.instructions
        assert combine.bytes_read < fine_combine.bytes_read


def test_doctor(bridge, short_doctor, capsys):
    doctor.main(["--json"])  # its status is of all that is here
    report = json.loads(capsys.readouterr().out)
    facts = "\n".join(report["rocm"])
    assert f"HIP: {software_gpu.library()}, version 70125424" in facts
    assert "dsv4_gfx950.co" in facts
    assert "aiter_bf16, 16 heads: 1 x 16 heads" in facts
    tests = report["implementations"]["aiter"]["self_tests"]
    cases = itertools.product(GFX950_LAYOUTS, (16, 64, 128))
    assert [(test["layout"], test["heads"], test["ok"]) for test in tests] == [(*case, True) for case in cases]
    assert min(test["cosine"] for test in tests if test["layout"] == "aiter_bf16") > 0.99999
