"""The ops over a mesh of 8 virtual CPU devices: requests, heads, and a context spread over them; what their programs move."""

from __future__ import annotations

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from compare import MERGED, OUT_BF16, OUT_FLOAT32, Tolerance, assert_close, assert_same_bits
from hlo import Collective, collectives
from hostile import draw_parts, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import every_implementation, needs_cpu
from programs import BLOCK, SHARED, TOPK, assert_near, assert_same, attend, copies, jitted

import jax_dsv4 as dsv4
from jax_dsv4 import adapters

MODES = (AxisType.Auto, AxisType.Explicit)
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
DATA, MODEL = 4, 2
# Several a device: of a single head XLA makes a product of another kind, with other rounding.
HEADS = 8
problem = partial(programs.problem, heads=HEADS)


@functools.cache
def mesh_of(mode: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((DATA, MODEL), ("data", "model"), axis_types=(mode,) * 2)


def put(mesh: jax.sharding.Mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def placed(mesh, arguments, batch: tuple, heads: str | None = None):
    """The arguments of a call on a mesh: `batch` names the axes of the batch axes, `heads` that of the heads; caches are replicated."""
    q, swa, extra, sink = arguments
    scopes = [dsv4.Scope(put(mesh, s.cache), put(mesh, s.indices, *batch), put(mesh, s.lengths, *batch)) for s in (swa, extra)]
    return put(mesh, q, *batch, *[None] * (q.ndim - 2 - len(batch)), heads), *scopes, put(mesh, sink, heads)


def without_collectives(function, *operands, donate: tuple[int, ...] = ()):
    """The compiled program of a function, in which devices send each other nothing."""
    program = jax.jit(function, donate_argnums=donate).lower(*operands).compile()
    assert collectives(program) == []
    return program


def in_groups(function, arguments, groups: int):
    """A function of a call's arguments, of each group of its requests alone, one after the other."""
    parts = []
    for i in range(groups):
        take = lambda x: x[i * len(x) // groups : (i + 1) * len(x) // groups]  # noqa: B023, E731
        q, swa, extra, sink = arguments
        parts.append(function(take(q), *(dsv4.Scope(s.cache, take(s.indices), take(s.lengths)) for s in (swa, extra)), sink))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


# --- Requests and heads


@every_mode
@every_implementation
@pytest.mark.parametrize(
    ("batch", "heads"), [(("data",), None), ((None,), "model"), (("data",), "model"), ((("data", "model"),), None)], ids=str
)
def test_requests_and_heads(mode: AxisType, implementation: str, batch: tuple, heads: str | None) -> None:
    """No collective, and one device's bits. XLA's own products of another batch may be rounded otherwise: there, the bits that one device
    gives a device's requests, whichever heads it has."""
    arguments, groups = problem(8), {None: 1, "data": DATA, ("data", "model"): DATA * MODEL}[batch[0]]
    operands = placed(mesh_of(mode), arguments, batch, heads)
    out, lse = without_collectives(partial(attend, implementation), *operands)(*operands)
    assert out.sharding.is_equivalent_to(operands[0].sharding, 3)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh_of(mode), P(*batch, heads)), 2)
    assert_same((out, lse), in_groups(jitted(implementation), arguments, groups))
    if groups == 1 or implementation == "cpu":
        assert_same((out, lse), jitted(implementation)(*arguments))
    assert_near((out, lse), jitted(implementation)(*arguments))


@needs_cpu
@every_mode
@pytest.mark.parametrize(("batch", "heads"), [(("data",), None), (("data",), "model"), ((("data", "model"),), None)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_long_requests(mode: AxisType, batch: tuple, heads: str | None, dtype: jnp.dtype) -> None:
    """That plans cut in several places, elsewhere on 8 devices than on one: one device's bits of out and lse."""
    rng, topk = np.random.default_rng(3), 1500
    q, swa, extra, sink = problem(8)
    indices = jnp.asarray(rng.integers(-1, extra.cache.num_slots, (8, topk)), jnp.int32)
    lengths = jnp.asarray([topk, 0, 700, 640, 641, topk - 1, 64, 65], jnp.int32)
    arguments = q.astype(dtype), swa, dsv4.Scope(extra.cache, indices, lengths), sink
    operands = placed(mesh_of(mode), arguments, batch, heads)
    assert_same(jitted("cpu")(*operands), jitted("cpu")(*arguments))


@every_mode
@every_implementation
def test_two_batch_axes(mode: AxisType, implementation: str) -> None:
    """The second split too, which a reshape to one axis would have to gather."""
    arguments = problem(2, 4)
    operands = placed(mesh_of(mode), arguments, ("model", "data"))
    program = without_collectives(partial(attend, implementation), *operands)
    assert_near(program(*operands), jitted(implementation)(*arguments))


@pytest.mark.parametrize("unplaced", ["q", "q's requests", "indices", "out", "head_dim"])
def test_operands_that_are_not_split_alike(unplaced: str) -> None:
    """In automatic mode the others follow q. What must move is as much as was misplaced, and never a cache."""
    arguments, mesh = problem(8), mesh_of(AxisType.Auto)
    q, swa, extra, sink = placed(mesh, arguments, ("data",), "model")
    whole = placed(mesh, arguments, (None,))
    out_shardings, allowed = None, set()
    if unplaced == "q":
        q = whole[0]
    elif unplaced == "q's requests":
        q = placed(mesh, arguments, (None,), "model")[0]
    elif unplaced == "indices":
        swa = whole[1]
    elif unplaced == "head_dim":
        q, allowed = (
            put(mesh, q, None, None, ("data", "model")),
            {"all-to-all", "all-gather", "collective-permute"},
        )
    else:
        out_shardings, allowed = NamedSharding(mesh, P()), {"all-gather"}
    program = jax.jit(partial(attend, "xla"), out_shardings=out_shardings).lower(q, swa, extra, sink).compile()
    assert {c.kind for c in collectives(program)} <= allowed
    assert not any("u8" in shape for c in collectives(program) for shape in c.shapes)
    assert_near(program(q, swa, extra, sink), jitted("xla")(*arguments))


@every_mode
def test_lengths_left_out(mode: AxisType) -> None:
    q, swa, extra, sink = problem(8)
    arguments = q, *(s._replace(lengths=jnp.full(8, TOPK, jnp.int32)) for s in (swa, extra)), sink
    q, swa, extra, sink = placed(mesh_of(mode), arguments, ("data",), "model")
    operands = q, swa._replace(lengths=None), extra._replace(lengths=None), sink
    assert_same(without_collectives(partial(attend, "xla"), *operands)(*operands), jitted("xla")(*arguments))


@every_mode
@every_implementation
def test_vmap(mode: AxisType, implementation: str) -> None:
    arguments = problem(4, 2)
    operands = placed(mesh_of(mode), arguments, ("data",), "model")
    program = without_collectives(jax.vmap(partial(attend, implementation), (0, SHARED, SHARED, None)), *operands)
    assert_near(program(*operands), jitted(implementation)(*arguments))


@every_implementation
def test_without_jit(implementation: str) -> None:
    operands = placed(mesh_of(AxisType.Explicit), problem(8), ("data",), "model")
    assert_same(attend(implementation, *operands), jitted(implementation)(*operands))


# --- Plans


def planned(implementation: str, layers: int, heads: int, q, swa, extra, sink):
    """A plan, and as many calls with it; each with queries of its own."""
    sizes = dict(num_heads=heads, swa_topk=TOPK, extra_topk=TOPK, implementation=implementation)
    plan = dsv4.plan_decode(swa.lengths, extra.lengths, **sizes)
    options = dict(attn_sink=sink, plan=plan, implementation=implementation, return_lse=True)
    return [dsv4.sparse_mla_decode(q + layer, swa, extra, **options) for layer in range(layers)]


@every_mode
def test_derivative_of_a_split_call(mode: AxisType) -> None:
    """Of q, of the sink, and of a cache that every device has: one device's, within the rounding of sums in another order."""
    q, swa, _, sink = problem(8)
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((3, BLOCK, 512)), jnp.float32)

    def loss(q, swa, latents, sink):
        cache = dsv4.KVCache(latents, block_size=BLOCK, layout="float32")
        out, lse = attend("xla", q, swa._replace(cache=cache), None, sink)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    derivative, mesh = jax.jit(jax.grad(loss, argnums=(0, 2, 3))), mesh_of(mode)
    split_q, split_swa, _, split_sink = placed(mesh, (q, swa, swa, sink), ("data",), "model")
    got = derivative(split_q, split_swa, put(mesh, latents), split_sink)
    if mode == AxisType.Explicit:
        assert got[0].sharding.is_equivalent_to(split_q.sharding, q.ndim)
    for each, want in zip(got, derivative(q, swa, latents, sink)):
        np.testing.assert_allclose(each, want, rtol=1e-5, atol=1e-5)


@every_mode
def test_page_tables_of_split_requests(mode: AxisType) -> None:
    """Each request's page table is where its queries are: no collective, and the slots are split like them."""
    table, positions = np.arange(24, dtype=np.int32).reshape(8, 3), np.arange(-1, 7, dtype=np.int32)
    split = NamedSharding(mesh_of(mode), P("data"))
    operands = [jax.device_put(x, split) for x in (table, positions)]
    window = partial(adapters.window_from_pages, window=4, page_size=2)
    slots, lengths = without_collectives(window, *operands)(*operands)
    assert all(x.sharding.is_equivalent_to(split, x.ndim) for x in (slots, lengths))
    assert_same((slots, lengths), window(table, positions))


@needs_cpu
@every_mode
def test_plan_of_a_split_call(mode: AxisType) -> None:
    """A plan is of one kernel call: devices that have a part of it plan that for themselves, and the plan made for all, with the gather of
    lengths it would need, is not in the program."""
    operands = placed(mesh_of(mode), problem(8), ("data",), "model")
    program = without_collectives(partial(planned, "cpu", 1, HEADS), *operands)
    assert program.as_text().count('custom_call_target="dsv4_plan"') == 1
    assert_same(program(*operands)[0], jitted("cpu")(*operands))


@needs_cpu
@every_mode
def test_plan_of_a_whole_call(mode: AxisType) -> None:
    """Where every device makes the whole call, they use it."""
    arguments = problem(8)
    operands = placed(mesh_of(mode), arguments, (None,))
    program = without_collectives(partial(planned, "cpu", 2, HEADS), *operands)
    assert program.as_text().count('custom_call_target="dsv4_plan"') == 1
    assert_same(program(*operands)[0], jitted("cpu")(*arguments))


@needs_cpu
@every_mode
@pytest.mark.parametrize("implementation", ["cpu", None])
def test_plan_in_shard_map(mode: AxisType, implementation: str | None) -> None:
    """All is local there, the plan too: made once, for the heads and requests of one device."""
    arguments, mesh = problem(8), mesh_of(mode)
    operands = placed(mesh, arguments, ("data",), "model")
    scope = dsv4.Scope(P(), P("data"), P("data"))
    over = partial(jax.shard_map, mesh=mesh, in_specs=(P("data", "model"), scope, scope, P("model")), out_specs=P("data", "model"))
    program = without_collectives(over(partial(planned, implementation, 2, HEADS // MODEL)), *operands)
    assert program.as_text().count('custom_call_target="dsv4_plan"') == 1
    assert_same(program(*operands)[0], jitted("cpu")(*operands))
    with pytest.raises(ValueError, match=r"plan must be made for this call's num_heads = 4, got 8"):
        jax.jit(over(partial(planned, implementation, 2, HEADS)))(*operands)


@every_mode
@pytest.mark.parametrize("implementation", ["cpu", "xla", None])
def test_results_in_shard_map_differ_between_devices(mode: AxisType, implementation: str | None) -> None:
    """As JAX's types have it, where the operands do: else it would take a sum over devices for a product."""
    mesh = mesh_of(mode)

    def body(q, swa, sink, latents):
        out, lse = dsv4.sparse_mla_decode(q, swa, attn_sink=sink, implementation=implementation, return_lse=True)
        cache = dsv4.append(swa.cache, latents, jnp.zeros(1, jnp.int32), implementation=implementation)
        plan = dsv4.plan_decode(swa.lengths, num_heads=HEADS, swa_topk=TOPK, implementation=implementation)
        types = [jax.typeof(x).manual_axis_type.varying for x in (out, lse, cache.data, plan.work[0].kv_lengths)]
        assert types == [{"data"}, {"data"}, {"model"}, {"data"}]
        return out

    q, swa, _, sink = placed(mesh, problem(8), ("data",))
    latents = put(mesh, jnp.ones((2, 512)), "model")
    specs = P("data"), dsv4.Scope(P(), P("data"), P("data")), P(), P("model")
    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("data")), q, swa, sink, latents)


# --- append, loops


@every_mode
@every_implementation
def test_append(mode: AxisType, implementation: str) -> None:
    """To a cache that every device has whole: in place; what moves are the new latents and their slots."""
    mesh, rng = mesh_of(mode), np.random.default_rng(0)
    latents, slots = jnp.asarray(rng.standard_normal((8, 512)), jnp.float32), jnp.arange(-1, 7, dtype=jnp.int32)
    cache = lambda: dsv4.KVCache(jnp.zeros((programs.SWA_BLOCKS, programs.STRIDE), jnp.uint8), block_size=BLOCK)  # noqa: E731
    append = jax.jit(partial(dsv4.append, implementation=implementation), donate_argnums=0)
    operands = [put(mesh, cache()), put(mesh, latents, "data"), put(mesh, slots, "data")]
    program = append.lower(*operands).compile()
    assert collectives(program) == [Collective("all-gather", ("f32[8,512]",)), Collective("all-gather", ("s32[8]",))]
    assert copies(program) == []
    got = program(*operands)
    assert operands[0].data.is_deleted()
    assert got.data.sharding.is_fully_replicated
    assert_same_bits("cache", got.data, append(cache(), latents, slots).data)


@every_mode
@every_implementation
def test_loop(mode: AxisType, implementation: str) -> None:
    """Steps of append, plan and decode with heads split: no collective, no copy of a cache, and one device's bits."""
    mesh = mesh_of(mode)
    caches, latents, slots, q = put(mesh, programs.loop_arguments())
    operands = caches, latents, slots, put(mesh, q, None, "model")
    program = without_collectives(partial(programs.scanned, implementation), *operands, donate=(0,))
    assert copies(program) == []
    got = program(*operands)
    assert all(c.data.is_deleted() for c in caches)
    want = programs.one_by_one(implementation, *programs.loop_arguments())
    assert_same(got[0], want[0])
    assert_close("outs", got[1], np.asarray(want[1], np.float64), OUT_FLOAT32)
    if implementation == "cpu":
        assert_same(got, want)


# --- Export


@needs_cpu
def test_export() -> None:
    """For 8 devices, in explicit mode and of a shard_map; what automatic mode needs while it compiles, JAX does not serialise."""
    scope, both = dsv4.Scope(P(), P("data"), P("data")), P("data", "model")
    over = partial(jax.shard_map, mesh=mesh_of(AxisType.Auto), in_specs=(both, scope, scope, P("model")), out_specs=both)
    call = partial(attend, "cpu")
    for mode, program in ((AxisType.Explicit, call), (AxisType.Auto, over(call))):
        operands = placed(mesh_of(mode), problem(8), ("data",), "model")
        exported = jax.export.export(jax.jit(program), disabled_checks=programs.OUR_CALLS)(*operands)
        assert exported.nr_devices == 8
        assert_same(jax.jit(jax.export.deserialize(exported.serialize()).call)(*operands), jitted("cpu")(*operands))
    with pytest.raises(NotImplementedError, match="serialization of host_callbacks"):
        jax.export.export(jax.jit(call), disabled_checks=programs.OUR_CALLS)(*operands)


# --- What cannot be


@every_mode
@pytest.mark.parametrize("op", ["sparse_mla_decode", "append"])
def test_a_cache_is_never_gathered(mode: AxisType, op: str) -> None:
    """Blocks spread over devices: an error that says what to do."""
    mesh = mesh_of(mode)
    q, swa, extra, sink = placed(mesh, problem(8), ("data",))
    spread = dsv4.KVCache(put(mesh, jnp.zeros((16, programs.STRIDE), jnp.uint8), "data"), block_size=BLOCK)
    name = "swa.cache" if op == "sparse_mla_decode" else "cache"
    message = (
        f"{op}: {name}'s data must be whole on every device here .*under jax.shard_map, with local_scope and merge_over_axis.*, got .*data"
    )
    if op == "append":
        call, operands = dsv4.append, (spread, jnp.ones((1, 512)), jnp.zeros(1, jnp.int32))
    else:
        call, operands = partial(attend, "xla"), (q, swa._replace(cache=spread), extra, sink)
    # In automatic mode it is the partitioner that meets the cache's sharding, and wraps our error in one of its own.
    with pytest.raises(ValueError if mode == AxisType.Explicit else jax.errors.JaxRuntimeError, match=message):
        jax.jit(call)(*operands)
    with pytest.raises(ValueError, match=message):
        call(*operands)


def test_requests_that_do_not_divide_the_mesh() -> None:
    """JAX places no such array; where a program makes one, it is padded, and what the padding holds is nobody's."""
    arguments, mesh = problem(6), mesh_of(AxisType.Auto)
    with pytest.raises(ValueError, match="6"):
        placed(mesh, arguments, ("data",))
    q, swa, extra, sink = placed(mesh, arguments, (None,))
    split = lambda q: jax.lax.with_sharding_constraint(q, NamedSharding(mesh, P("data")))  # noqa: E731
    assert_near(jax.jit(lambda q: attend("xla", split(q), swa, extra, sink))(q), jitted("xla")(*arguments))


def test_a_mesh_of_both_modes() -> None:
    mesh = jax.make_mesh((DATA, MODEL), ("data", "model"), axis_types=MODES)
    message = "sparse_mla_decode: a mesh must be explicit in all of its axes or in none, got data: .*Auto.*, model: .*Explicit"
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(partial(attend, "xla"))(*placed(mesh, problem(8), ("data",)))


# --- shard_map over some axes


@every_implementation
def test_shard_map_over_one_of_two_axes(implementation: str) -> None:
    """The other stays automatic; its operands must be split alike there."""
    arguments, mesh = problem(8), mesh_of(AxisType.Auto)
    scope = dsv4.Scope(P(), P("data"), P("data"))
    specs = P("data"), scope, scope, P()
    over = partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P("data"), axis_names={"data"}, check_vma=False)
    operands = placed(mesh, arguments, ("data",), "model")
    program = without_collectives(over(partial(attend, implementation)), *operands)
    assert_same(program(*operands), jitted(implementation)(*operands))


def test_operands_that_are_not_split_alike_in_such_a_shard_map() -> None:
    mesh = mesh_of(AxisType.Auto)
    q, swa, extra, sink = placed(mesh, problem(8), (None,), "model")

    def inside(q, sink):
        return attend("xla", q, swa, extra, jax.lax.with_sharding_constraint(sink, P()))

    over = jax.shard_map(inside, mesh=mesh, in_specs=(P(), P()), out_specs=P(), axis_names={"data"}, check_vma=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="sparse_mla_decode: operands must be split alike in a shard_map over some"):
        jax.jit(over)(q, sink)


# --- A context spread over devices

DEVICES, BLOCKS = 4, 6  # blocks a device
PLACEMENTS = dsv4.context.PLACEMENTS


def whole_order(placement: str, devices: int, blocks: int) -> np.ndarray:
    """[devices * blocks]: the block of the whole cache that is block b of device d, at d * blocks + b."""
    block = np.arange(devices * blocks)
    return block if placement == "contiguous" else block.reshape(blocks, devices).T.reshape(-1)


@functools.cache
def splitter(devices: int, blocks: int, block_size: int, placement: str):
    """local_scope and local_slots on every device, compiled."""
    cache = dsv4.KVCache(jnp.zeros((blocks, block_size * 584), jnp.uint8), block_size=block_size)

    def split(indices, lengths):
        scope = dsv4.local_scope(dsv4.Scope(cache, indices, lengths), "context", placement=placement)
        return scope.indices, scope.lengths, dsv4.local_slots(cache, indices, "context", placement=placement)

    return jax.jit(jax.vmap(split, in_axes=None, axis_size=devices, axis_name="context"))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.sampled_from([(1, 3, 2, 0), (3, 2, 4, 11), (5, 4, 3, 11), (2, 0, 4, 11)]),
    placement=st.sampled_from(PLACEMENTS),
)
def test_local_scope(seed: int, sizes: tuple[int, int, int, int], placement: str) -> None:
    """Each valid entry on the one device that holds its row, in order and packed; others on none."""
    rng = np.random.default_rng(seed)
    devices, blocks, block_size, topk = sizes
    slots = devices * blocks * block_size
    hostile = np.array([-1, -2, slots, slots + 1, 2**31 - 1, -(2**31)], np.int64)
    indices = np.where(rng.random((3, topk)) < 0.3, rng.choice(hostile, (3, topk)), rng.integers(-1, slots + 1, (3, topk))).astype(np.int32)
    lengths = rng.choice([-5, 0, 1, topk // 2, topk, topk + 3, 2**31 - 1], 3).astype(np.int32)
    packed, counts, elementwise = map(np.asarray, splitter(*sizes[:3], placement)(indices, lengths))
    order = whole_order(placement, devices, blocks).reshape(devices, blocks)
    for device in range(devices):
        # NumPy, a slot at a time: the row of this device that each slot of the whole cache is.
        local = {}
        for block, whole in enumerate(order[device]):
            local |= {int(whole) * block_size + i: block * block_size + i for i in range(block_size)}
        for token in range(3):
            assert elementwise[device, token].tolist() == [local.get(int(s), -1) for s in indices[token]]
            want = [local[int(s)] for s in indices[token, : max(lengths[token], 0)] if int(s) in local]
            assert packed[device, token].tolist() == want + [-1] * (topk - len(want))
            assert counts[device, token] == len(want)


SHARED_OUT = {None: None, -2: 1, 0: 0}  # scatter_dimension, and the dimension in which the shares lie side by side
merge_of_parts = {
    way: jax.jit(jax.vmap(partial(dsv4.merge_over_axis, axis_name="context", scatter_dimension=way), axis_name="context"))
    for way in SHARED_OUT
}


def merged_on_each(way: int | None, outs: np.ndarray, lses: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """out and lse by device; where they are shares, of all of them together."""
    out, lse = (np.asarray(x) for x in merge_of_parts[way](jnp.asarray(outs), jnp.asarray(lses)))
    side = SHARED_OUT[way]
    return list(zip(out, lse)) if side is None else [(np.concatenate(list(out), side), np.concatenate(list(lse), side))]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), parts=st.integers(1, 5), empty=st.sampled_from([0.0, 0.5, 1.0]), spread=st.sampled_from([0.0, 1.0, 1e4]))
def test_merge_over_axis(seed: int, parts: int, empty: float, spread: float) -> None:
    """What merge_scopes makes of the parts, whose empty ones may hold anything, also where the devices do not divide the rows."""
    outs, lses = draw_parts(seed, parts, empty, spread)
    want_out, want_lse = expected(outs, lses)
    first, *others = merged_on_each(None, np.stack(outs), np.stack(lses))
    assert_close("out", first[0], want_out, MERGED)
    assert_close("lse", first[1], want_lse, MERGED)
    for other in others:
        assert_same(other, first)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("way", [-2, 0])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shares_of_a_merge(parts: int, way: int, dtype: jnp.dtype) -> None:
    """Side by side the result that all have without scatter_dimension, to the bit, subnormals and infinities included, and NaN."""
    without_nan = partial(jax.tree.map, lambda x: np.where(np.isnan(x), x.dtype.type(np.nan), x))
    rng = np.random.default_rng(parts)
    lses = rng.standard_normal((parts, 4, 8)).astype(np.float32)
    outs = rng.standard_normal((parts, 4, 8, 6)).astype(np.float32)
    outs[0, 0, 0] = [np.inf, -np.inf, 1e-40, -1e-40, 0, 3e38]
    outs[-1, 1, 2], lses[-1, 1, 2] = np.nan, -np.inf
    lses[:, 2, 3] = -np.inf
    lses[0, 3, 3] = np.nan
    outs = np.asarray(jnp.asarray(outs, dtype))
    whole, *others = merged_on_each(None, outs, lses)
    for other in (*others, *merged_on_each(way, outs, lses)):
        assert_same(without_nan(other), without_nan(whole))
    assert whole[0].dtype == dtype
    np.testing.assert_array_equal(np.isneginf(whole[1]), np.isneginf(lses).all(0))


def test_no_derivative_of_a_merge() -> None:
    merged = jax.vmap(lambda o, n: dsv4.merge_over_axis(o, n, "x")[0], axis_name="x")
    with pytest.raises(NotImplementedError, match=r"^merge_over_axis: it has no derivative; merge_scopes has one"):
        jax.grad(lambda o: merged(o, jnp.zeros((2, 4))).sum())(jnp.ones((2, 4, 8)))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), devices=st.integers(1, 5), topk=st.integers(0, 12))
def test_split_scope(seed: int, devices: int, topk: int) -> None:
    """Each entry on one device, and no device with two more than another."""
    rng = np.random.default_rng(seed)
    cache = dsv4.KVCache.create(3, 4)
    indices = rng.integers(-1, 12, (2, 4, topk)).astype(np.int32)
    lengths = rng.choice([-5, 0, 1, topk // 2, topk, topk + 3, 2**31 - 1], (2, 4)).astype(np.int32)
    split = jax.vmap(lambda _: dsv4.split_scope(dsv4.Scope(cache, indices, lengths), "x")[1:], axis_name="x")
    mine, counts = (np.asarray(x) for x in split(np.zeros(devices)))
    for token in np.ndindex(2, 4):
        entries = indices[token][: max(lengths[token], 0)]
        for device in range(devices):
            assert mine[(device, *token)][: counts[(device, *token)]].tolist() == entries[device::devices].tolist()


def context_problem(layout: str, placement: str):
    """q, swa, extra, sink: 8 requests whose extra scope is of DEVICES * BLOCKS blocks, hostile in every way."""
    rng = np.random.default_rng(7)
    tokens, topk, slots = 8, 90, DEVICES * BLOCKS * BLOCK
    latents = rng.standard_normal((slots, 512)).astype(np.float32)
    unused = np.arange(slots) % 5 == 3
    latents[unused] = np.nan  # rows that nobody attends to
    usable = np.flatnonzero(~unused)
    cache = dsv4.append(dsv4.KVCache.create(DEVICES * BLOCKS, BLOCK, layout), jnp.asarray(latents), jnp.arange(slots, dtype=jnp.int32))
    indices = rng.choice(usable, (tokens, topk)).astype(np.int32)
    indices[rng.random(indices.shape) < 0.2] = -1
    indices[:, 5::17] = [[slots], [slots + 3], [2**31 - 1], [-(2**31)], [-7], [slots], [-1], [-1]]
    lengths = np.array([topk, 0, 1, 40, topk + 9, -3, topk, 64], np.int32)
    held = np.isin(usable // BLOCK, whole_order(placement, DEVICES, BLOCKS)[:BLOCKS])
    indices[6] = rng.choice(usable[held], topk)  # all on one device
    indices[7] = -1  # none anywhere
    indices[3, 40:] = np.flatnonzero(unused)[0]  # past the length: poison
    _, swa, _, sink = problem(tokens)
    swa = swa._replace(lengths=swa.lengths.at[jnp.array([1, 7])].set(0))  # rows without any key
    q = jnp.asarray(rng.standard_normal((tokens, HEADS, 512)), jnp.float32)
    return q, swa, dsv4.Scope(cache, jnp.asarray(indices), jnp.asarray(lengths)), sink


def over_context(implementation: str, placement: str, way: int | None, q, swa, extra, sink):
    """What a device does. One call takes both scopes: each has a part of the window, too."""
    window, mine = dsv4.split_scope(swa, "context"), dsv4.local_scope(extra, "context", placement=placement)
    out, lse = dsv4.sparse_mla_decode(q, window, mine, implementation=implementation, return_lse=True)
    out, lse = dsv4.merge_over_axis(out, lse, "context", scatter_dimension=way)
    if way == -2:
        sink = jax.lax.dynamic_slice_in_dim(sink, jax.lax.axis_index("context") * out.shape[-2], out.shape[-2])
    return dsv4.apply_attn_sink(out, lse, sink), lse


@every_mode
@every_implementation
@pytest.mark.parametrize(
    ("placement", "layout", "way"),
    [("contiguous", "float32", None), ("interleaved", "fp8_ds_mla", None), ("contiguous", "fp8_ds_mla", -2), ("interleaved", "float32", 0)],
)
def test_context(mode: AxisType, implementation: str, placement: str, layout: str, way: int | None) -> None:
    """Within 4e-6 of one device, of numbers below 4. What moves is the merge: the parts, with their lse, in one all-to-all, and where all
    devices are to have all, the result in all-gathers; nothing of a cache."""
    q, swa, extra, sink = context_problem(layout, placement)
    want = jitted(implementation)(q, swa, extra, sink)
    mesh = jax.make_mesh((2, DEVICES), ("data", "context"), axis_types=(mode,) * 2)
    q, swa, extra, sink = placed(mesh, (q, swa, extra, sink), ("data",))
    spread = put(mesh, extra.cache.data[whole_order(placement, DEVICES, BLOCKS)], "context")
    operands = q, swa, extra._replace(cache=extra.cache.replace(spread)), sink
    specs = jax.tree.map(lambda x: x.sharding.spec, operands)
    out_spec = {None: P("data"), -2: P("data", "context"), 0: P(("data", "context"))}[way]
    over = jax.shard_map(partial(over_context, implementation, placement, way), mesh=mesh, in_specs=specs, out_specs=out_spec)
    program = jax.jit(over).lower(*operands).compile()
    of_device = len(q) // 2 * HEADS
    gathers = [Collective("all-gather", (f"u32[{of_device},512]",)), Collective("all-gather", (f"u32[{of_device}]",))]
    parts = Collective("all-to-all", (f"u32[{DEVICES},{of_device // DEVICES * (512 + 1)}]",))
    assert collectives(program) == [*(gathers if way is None else []), parts]
    out, lse = (np.asarray(x) for x in program(*operands))
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want[1]))
    assert np.isneginf(lse[[1, 7]]).all()
    assert not out[[1, 7]].any()
    np.testing.assert_allclose(out, want[0], rtol=1e-6, atol=4e-6)
    np.testing.assert_allclose(lse, want[1], rtol=1e-6, atol=1e-6)


# What rounding parts to bf16 does: 2^-9 of each, so of the latents at most, which are below 4.
OF_BF16_PARTS = OUT_BF16._replace(abs=2**-7, cosine=3 * OUT_BF16.cosine)


@every_implementation
@pytest.mark.parametrize(
    ("way", "travels", "tolerance"),
    [(None, jnp.float32, OUT_BF16), (0, jnp.float16, OUT_BF16), (0, jnp.bfloat16, OF_BF16_PARTS)],
    ids=["f32", "f16", "bf16"],
)
def test_context_in_bfloat16(implementation: str, way: int | None, travels: jnp.dtype, tolerance: Tolerance) -> None:
    """With parts in float32, or in float16, the result is one device's within FlashMLA's tolerances; it travels in bf16."""
    q, swa, extra, sink = context_problem("fp8_ds_mla", "contiguous")
    q = q.astype(jnp.bfloat16)
    options = dict(implementation=implementation, out_dtype=jnp.float32, return_lse=True)
    want, _ = dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, **options)
    mesh = jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,))

    def device(q, swa, extra, sink):
        out, lse = dsv4.sparse_mla_decode(q, dsv4.split_scope(swa, "context"), dsv4.local_scope(extra, "context"), **options)
        out, lse = dsv4.merge_over_axis(out.astype(travels), lse, "context", scatter_dimension=way, out_dtype=jnp.bfloat16)
        return dsv4.apply_attn_sink(out, lse, sink)

    specs = P(), dsv4.Scope(P(), P(), P()), dsv4.Scope(P("context"), P(), P()), P()
    over = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=P() if way is None else P("context")))
    operands = jax.tree.map(lambda spec, x: put(mesh, x, *spec), specs, (q, swa, extra, sink), is_leaf=lambda x: isinstance(x, P))
    program, rows = over.lower(*operands).compile(), len(q) * HEADS
    word, numbers = ("u32", 512 + 1) if travels == jnp.float32 else ("u16", 512 + 2)
    gathers = [Collective("all-gather", (f"u16[{rows},512]",)), Collective("all-gather", (f"u32[{rows}]",))] if way is None else []
    assert collectives(program) == [*gathers, Collective("all-to-all", (f"{word}[{DEVICES},{rows // DEVICES * numbers}]",))]
    out = program(*operands)
    assert out.dtype == jnp.bfloat16
    assert_close("out", out, np.asarray(want, np.float64), tolerance)


@every_implementation
def test_append_to_a_spread_cache(implementation: str) -> None:
    """Each device writes the rows that are its own."""
    mesh = jax.make_mesh((DEVICES,), ("context",))
    rng = np.random.default_rng(0)
    latents, slots = jnp.asarray(rng.standard_normal((9, 512)), jnp.float32), rng.integers(0, DEVICES * BLOCKS * BLOCK, 9).astype(np.int32)
    slots[[2, 5]] = -1, DEVICES * BLOCKS * BLOCK
    for placement in PLACEMENTS:

        def append(cache, latents, slots, placement=placement):
            return dsv4.append(
                cache, latents, dsv4.local_slots(cache, slots, "context", placement=placement), implementation=implementation
            )

        cache = dsv4.KVCache.create(DEVICES * BLOCKS, BLOCK)
        over = jax.shard_map(append, mesh=mesh, in_specs=(P("context"), P(), P()), out_specs=P("context"))
        operands = put(mesh, cache, "context"), put(mesh, latents), put(mesh, jnp.asarray(slots))
        program = without_collectives(over, *operands, donate=(0,))
        whole = np.asarray(program(*operands).data)[np.argsort(whole_order(placement, DEVICES, BLOCKS))]
        want = jax.jit(partial(dsv4.append, implementation=implementation))(cache, latents, jnp.asarray(slots))
        np.testing.assert_array_equal(whole, want.data)


OUT, OUT_LSE = jnp.ones((2, 3, 4)), jnp.ones((2, 3))
NO_AXIS = "axis_name must be an axis of the jax.shard_map around it, got"
CONTEXT_ERRORS = (
    (lambda c, s: dsv4.local_slots(c, s, "context"), f"local_slots: {NO_AXIS} 'context'"),
    (lambda c, s: dsv4.local_scope(dsv4.Scope(c, s), "y"), f"local_scope: {NO_AXIS} 'y'"),
    (lambda c, s: dsv4.split_scope(dsv4.Scope(c, s), "y"), f"split_scope: {NO_AXIS} 'y'"),
    (lambda c, s: dsv4.merge_over_axis(OUT, OUT_LSE, "y"), f"merge_over_axis: {NO_AXIS} 'y'"),
    (
        lambda c, s: dsv4.local_slots(c, s, "x", placement="y"),
        "local_slots: placement must be one of 'contiguous', 'interleaved', got 'y'",
    ),
    (lambda c, s: dsv4.local_slots(c, s.astype(jnp.int8), "x"), "local_slots: slots must have dtype int32, got int8"),
    (lambda c, s: dsv4.local_slots(s, s, "x"), "local_slots: cache must be a KVCache, got"),
    (lambda c, s: dsv4.local_scope(c, "x"), "local_scope: scope must be a Scope, got KVCache"),
    (lambda c, s: dsv4.split_scope((c, s), "x"), "split_scope: scope must be a Scope, got tuple"),
    (lambda c, s: dsv4.local_scope(dsv4.Scope(c, s, s), "x"), "local_scope: lengths must have shape (*batch,) = (2,), got (2, 3)"),
    (lambda c, s: dsv4.split_scope(dsv4.Scope(c, s, s), "x"), "split_scope: lengths must have shape (*batch,) = (2,), got (2, 3)"),
    (lambda c, s: dsv4.merge_over_axis(OUT, jnp.ones(2), "x"), "merge_over_axis: lse must have shape"),
    (lambda c, s: dsv4.merge_over_axis(s, s, "x"), "merge_over_axis: out must have dtype float32 or bfloat16 or float16, got int32"),
    *(
        (lambda c, s, way=way: dsv4.merge_over_axis(OUT, OUT_LSE, "x", scatter_dimension=way), f"merge_over_axis: {message}")
        for way, message in (
            (-2, "out.shape[-2] must be divided by the 2 devices of the axis, got 3"),
            (-1, "scatter_dimension must be a batch axis or the heads of out, got -1"),
            (3, "scatter_dimension must be from -3 to 2, got 3"),
        )
    ),
)


@pytest.mark.parametrize(("call", "message"), CONTEXT_ERRORS, ids=[message for _, message in CONTEXT_ERRORS])
def test_context_errors(call, message: str) -> None:
    cache, slots = dsv4.KVCache.create(2, 4), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jax.vmap(lambda _: call(cache, slots), axis_name="x")(jnp.arange(2))


@pytest.mark.parametrize("call", [call for call, message in CONTEXT_ERRORS if NO_AXIS in message])
def test_context_outside_shard_map(call) -> None:
    with pytest.raises(ValueError, match=NO_AXIS):
        call(dsv4.KVCache.create(2, 4), jnp.zeros((2, 3), jnp.int32))


def test_more_slots_than_int32_can_number() -> None:
    cache = jax.eval_shape(lambda: dsv4.KVCache.create(2**28, 4, "fp8_ds_mla"))
    split = jax.vmap(lambda _: dsv4.local_slots(cache, jnp.zeros(1, jnp.int32), "x"), axis_name="x")
    with pytest.raises(ValueError, match="local_slots: slots of all devices must fit int32"):
        split(jnp.arange(2))


@every_mode
@pytest.mark.parametrize("tables", [None, "data"])
def test_slots_of_tokens_that_are_split(mode, tables):
    """Tokens over the mesh look up their requests' page tables, wherever these are."""
    mesh, rng = mesh_of(mode), np.random.default_rng(0)
    table = rng.integers(-1, 9, (2 * DATA, 3)).astype(np.int32)
    positions = rng.integers(-4, 3 * 8 + 4, (4 * DATA, 5)).astype(np.int32)
    requests = rng.integers(-1, 2 * DATA + 1, 4 * DATA).astype(np.int32)
    want = adapters.slots_from_pages(jnp.asarray(table), jnp.asarray(positions), 8, requests=jnp.asarray(requests))
    with jax.set_mesh(mesh):
        look_up = jax.jit(lambda t, p, r: adapters.slots_from_pages(t, p, 8, requests=r))
        got = look_up(put(mesh, table, tables), put(mesh, positions, "data"), put(mesh, requests, "data"))
        np.testing.assert_array_equal(got, want)
        tokens = put(mesh, requests, "data")
        windows, lengths = adapters.window_from_pages(put(mesh, table, tables), tokens, 4, 8, requests=tokens)
    assert (windows.shape, lengths.shape) == ((4 * DATA, 4), (4 * DATA,))
