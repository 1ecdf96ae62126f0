"""jit, loops, vmap, donation, export, derivatives: what a program may do around the ops."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from marks import every_implementation, needs_cpu
from programs import BLOCK, HEADS, OUR_CALLS, SHARED, TOPK, assert_near, assert_same, attend, copies, jitted, problem

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi
from jax_dsv4._implementations import cuda

# --- Loops


def while_looped(implementation: str, caches, latents, slots, q):
    def body(carry):
        i, caches, q, outs = carry
        caches, q = programs.step(implementation, caches, latents[i], slots[i], q)
        return i + 1, caches, q, outs.at[i].set(q)

    outs = jnp.zeros((len(slots), *q.shape), q.dtype)
    _, caches, _, outs = jax.lax.while_loop(lambda carry: carry[0] < len(slots), body, (0, caches, q, outs))
    return caches, outs


def reads_the_old_cache(implementation: str, caches, latents, slots, q):
    """What a program must not do: the old bytes are wanted after the new ones are there."""

    def body(carry, row):
        (swa, extra), q = carry
        new = dsv4.append(swa, row[0], row[1], implementation=implementation)
        entries = jnp.arange(TOPK, dtype=jnp.int32)[None]
        out = sum(dsv4.sparse_mla_decode(q, dsv4.Scope(c, entries), implementation=implementation) for c in (new, swa))
        return ((new, extra), out), out

    (caches, _), outs = jax.lax.scan(body, (caches, q), (latents, slots))
    return caches, outs


def compiled(program, implementation: str):
    return jax.jit(partial(program, implementation), donate_argnums=0).lower(*programs.loop_arguments()).compile()


@every_implementation
@pytest.mark.parametrize("program", [programs.scanned, while_looped])
def test_loops(program, implementation: str) -> None:
    """With the caches in the carry and donated: the bits of the steps one by one, in the caches' own memory, without a copy of them."""
    arguments, loop = programs.loop_arguments(), compiled(program, implementation)
    addresses = {c.data.unsafe_buffer_pointer() for c in arguments[0]}
    got = loop(*arguments)
    assert all(c.data.is_deleted() for c in arguments[0])
    assert {c.data.unsafe_buffer_pointer() for c in got[0]} == addresses
    assert copies(loop) == []
    # Run after, so that no memory holds the answer.
    assert_same(got, programs.one_by_one(implementation, *programs.loop_arguments()))


@needs_cpu
def test_copies_are_seen() -> None:
    assert copies(compiled(reads_the_old_cache, "cpu"))


# --- jit


@every_implementation
def test_jit_and_eager_agree(implementation: str) -> None:
    arguments = problem(3)
    assert_same(jitted(implementation)(*arguments), attend(implementation, *arguments))


@needs_cpu
@pytest.mark.parametrize("fused", [None, False])
def test_plan_and_decode_in_one_jit(fused: bool | None) -> None:
    q, swa, extra, sink = problem(5)
    make = lambda a, b: dsv4.plan_decode(a, b, num_heads=HEADS, swa_topk=TOPK, extra_topk=TOPK, fused=fused)  # noqa: E731
    decode = lambda plan: dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, plan=plan, fused=fused, return_lse=True)  # noqa: E731
    in_one = jax.jit(lambda a, b: decode(make(a, b)))(swa.lengths, extra.lengths)
    plan = jax.jit(make)(swa.lengths, extra.lengths)
    assert_same(in_one, jax.jit(decode)(plan))
    assert_same(in_one, jax.jit(lambda: decode(None))())


@every_implementation
def test_zero_tokens(implementation: str) -> None:
    for batch in ((0,), (2, 0)):
        q, swa, extra, sink = problem(*batch)
        out, lse = jitted(implementation)(q, swa, extra, sink)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:-1], jnp.float32)
    for batch in ((2, 0), (0, 2)):
        every = 0, dsv4.Scope(None, 0, 0), dsv4.Scope(None, 0, 0), None
        out, _ = jax.vmap(partial(attend, implementation), every)(*problem(*batch))
        assert out.shape == (*batch, HEADS, 512)


# --- vmap


@every_implementation
def test_vmap_with_one_cache(implementation: str) -> None:
    """One more batch axis, by vmap: to the bit the op on that axis."""
    arguments = problem(3, 4)
    got = jax.jit(jax.vmap(partial(attend, implementation), (0, SHARED, SHARED, None)))(*arguments)
    assert_same(got, jitted(implementation)(*arguments))


@every_implementation
def test_vmap_of_vmap_over_other_axes(implementation: str) -> None:
    """Nested, and over an axis that is not the first."""
    arguments = problem(3, 2, 4)
    inner = jax.vmap(partial(attend, implementation), (0, SHARED, SHARED, None))
    middle = dsv4.Scope(None, 1, 1)
    got = jax.jit(jax.vmap(inner, (1, middle, middle, None), out_axes=1))(*arguments)
    want = jitted(implementation)(*arguments)
    # The outer axis comes first in the call that vmap makes, so tokens are planned in another order.
    assert_near(got, want)


def entry(i: int, axes: tuple, operands: tuple, *, batched: bool = True) -> tuple:
    """Entry i of the operands that have a vmapped axis, or of those that have none."""
    take = lambda axis, part: jax.tree.map(lambda x: x[i], part) if (axis == 0) == batched else part  # noqa: E731
    return jax.tree.map(take, axes, operands, is_leaf=lambda axis: axis is None)


@every_implementation
@pytest.mark.parametrize(
    "axes",
    [(0, None, None, None), (0, 0, 0, None), (0, 0, SHARED, None), (None, None, None, 0)],
    ids=["q", "a cache each", "a cache each in one scope", "sink"],
)
def test_vmap_of_some_operands(implementation: str, axes: tuple) -> None:
    """Each entry as a call of its own: a slot outside its own cache names no row of its neighbour's."""
    *operands, sink = problem(3, 4, caches=(3,))
    operands = entry(0, axes, (*operands, jnp.stack([sink, jnp.full(HEADS, -jnp.inf), jnp.full(HEADS, jnp.inf)])), batched=False)
    got = jax.jit(jax.vmap(partial(attend, implementation), axes))(*operands)
    for i in range(3):
        assert_near((got[0][i], got[1][i]), jitted(implementation)(*entry(i, axes, operands)))
    assert axes[3] is None or not np.asarray(got[0][2]).any()


@needs_cpu
def test_plan_under_vmap() -> None:
    q, swa, _, _ = problem(3, 4)
    plan = dsv4.plan_decode(swa.lengths[0], num_heads=HEADS, swa_topk=TOPK)
    decode = lambda q, swa: dsv4.sparse_mla_decode(q, swa, plan=plan)  # noqa: E731
    message = "sparse_mla_decode: plan must be left out under vmap, or made for all tokens at once: give q one more batch axis instead"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        jax.vmap(decode, (0, SHARED))(q, swa)
    message = "plan_decode: lengths must not be batched by vmap: a plan is of one call, made for all its tokens at once"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        jax.vmap(lambda n: dsv4.plan_decode(n, num_heads=HEADS, swa_topk=TOPK))(swa.lengths)


@every_implementation
def test_append_under_vmap(implementation: str) -> None:
    """To the byte the appends one by one; slots outside their own cache are skipped, also those that a neighbour's would be."""
    rng = np.random.default_rng(0)
    caches = jax.tree.map(lambda x: jnp.stack([x] * 3), dsv4.KVCache.create(2, 4))
    latents = jnp.asarray(rng.standard_normal((3, 5, 512)), jnp.float32)
    slots = jnp.array([[0, 8, 3, 3, -1], [7, 9, -8, -1, 1], [16, 2, 15, 4, 2**31 - 1]], jnp.int32)
    append = lambda *a: dsv4.append(*a, implementation=implementation)  # noqa: E731
    got = jax.jit(jax.vmap(append))(caches, latents, slots)
    shared = jax.jit(jax.vmap(append, (0, None, 0)))(caches, latents[0], slots)
    one = jax.jit(append)
    for i in range(3):
        mine = jax.tree.map(lambda x: x[i], caches)  # noqa: B023
        np.testing.assert_array_equal(got.data[i], one(mine, latents[i], slots[i]).data)
        np.testing.assert_array_equal(shared.data[i], one(mine, latents[0], slots[i]).data)


@needs_cpu
def test_append_to_one_cache_under_vmap() -> None:
    message = "append: under vmap the cache must be batched too: every entry writes to its own"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        jax.vmap(lambda x, s: dsv4.append(dsv4.KVCache.create(2, 4), x, s))(jnp.zeros((3, 1, 512)), jnp.zeros((3, 1), jnp.int32))


# --- Export


def whole_step(data, latents, slots, q, indices):
    """All three ops, of arrays alone."""
    cache = dsv4.append(dsv4.KVCache(data, block_size=BLOCK), latents, slots)
    lengths = jnp.full(slots.shape, TOPK, jnp.int32)
    plan = dsv4.plan_decode(lengths, num_heads=HEADS, swa_topk=TOPK)
    return cache.data, dsv4.sparse_mla_decode(q, dsv4.Scope(cache, indices, lengths), plan=plan, return_lse=True)


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("rocm",), ("cpu", "cuda", "rocm")], ids="+".join)
def test_export(platforms: tuple[str, ...]) -> None:
    """From a machine without the other platforms; what is for this one runs, after a round trip through bytes, with the same bits."""
    q, swa, _, _ = problem(3)
    q, rng = q.astype(jnp.bfloat16), np.random.default_rng(1)
    arguments = (swa.cache.data, jnp.asarray(rng.standard_normal((3, 512)), jnp.float32), jnp.arange(3, dtype=jnp.int32), q, swa.indices)
    program = jax.jit(whole_step)
    exported = jax.export.export(program, platforms=platforms, disabled_checks=OUR_CALLS)(*arguments)
    assert exported.platforms == platforms
    back = jax.export.deserialize(exported.serialize())
    assert (back.platforms, back.in_avals, back.out_avals) == (platforms, exported.in_avals, exported.out_avals)
    present = dsv4.implementations()
    ours = {"cpu": present["cpu"].available, "cuda": present["cuda"].available or cuda.CUDA.exportable(), "rocm": False}
    targets = sum(exported.mlir_module().count(f"custom_call @{target}") for target in _ffi.TARGETS)
    assert targets == len(_ffi.TARGETS) * sum(ours[platform] for platform in platforms)
    if "cuda" in platforms and ours["cuda"]:  # for whichever device it will run on
        assert f"active_workers = {cuda.CUDA.multiprocessors} : i32" in exported.mlir_module()
    if "cpu" in platforms:
        assert_same(jax.jit(back.call)(*arguments), program(*arguments))


@pytest.mark.parametrize("implementation", [None, "xla", ("cpu", "xla")], ids=str)
def test_exported_functions_take_and_return_our_types(implementation) -> None:
    """Caches, scopes and plans go through an exported function's bytes with what they are made for."""
    q, swa, extra, _ = problem(3)
    options = {"num_heads": HEADS, "swa_topk": TOPK, "extra_topk": extra.indices.shape[1], "implementation": implementation}
    make = jax.jit(lambda a, b: dsv4.plan_decode(a, b, **options))
    decode = partial(dsv4.sparse_mla_decode, implementation=implementation)
    attend = jax.jit(lambda q, swa, extra, plan: (swa.cache, decode(q, swa, extra, plan=plan)))
    plan = make(swa.lengths, extra.lengths)

    def through_bytes(program, *arguments):
        exported = jax.export.export(program, disabled_checks=OUR_CALLS)(*arguments)
        return jax.export.deserialize(exported.serialize()).call(*arguments)

    again = through_bytes(make, swa.lengths, extra.lengths)
    assert again.made_for == plan.made_for
    assert_same(again, plan)
    cache, out = through_bytes(attend, q, swa, extra, again)
    assert (cache.block_size, cache.layout, cache.scale) == (swa.cache.block_size, swa.cache.layout, swa.cache.scale)
    assert_same(out, attend(q, swa, extra, plan)[1])


def test_numpys_numbers_are_pythons_in_a_plan() -> None:
    """What a plan was made for is a part of an exported function's bytes, where NumPy's types have no place."""
    of_numpy = {"num_heads": np.int64(HEADS), "swa_topk": np.int32(TOPK), "batch_invariant": np.bool_(True)}
    of_python = {name: value.item() for name, value in of_numpy.items()}
    made, lengths = ({**each, "implementation": ("cpu", "cuda")} for each in (of_numpy, of_python)), jnp.zeros(3, jnp.int32)
    exported = [jax.export.export(jax.jit(partial(dsv4.plan_decode, **each)), disabled_checks=OUR_CALLS)(lengths) for each in made]
    blobs = [each.serialize() for each in exported]
    assert jax.export.deserialize(blobs[0]).out_tree == jax.export.deserialize(blobs[1]).out_tree


# --- Derivatives ("cpu": test_errors.py)


def test_derivative_of_xla_composes() -> None:
    """grad under jit, vmap and scan, in q and the sink, of packed caches."""
    q, swa, extra, sink = problem(2, 1)
    loss = lambda q, swa, extra, sink: attend("xla", q, swa, extra, sink)[0].sum()  # noqa: E731
    together = jax.jit(jax.grad(lambda q, sink: loss(q, swa, extra, sink), (0, 1)))(q, sink)
    each = jax.jit(jax.vmap(jax.grad(loss, (0, 3)), (0, SHARED, SHARED, None)))(q, swa, extra, sink)
    np.testing.assert_allclose(each[0], together[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(each[1].sum(0), together[1], rtol=1e-4, atol=1e-3)
    assert np.abs(np.asarray(together[1])).max() > 1e-2
