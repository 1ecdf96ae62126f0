"""JAX's debug switches and strict modes: every public function gives under each what it gives without."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType

import jax_dsv4 as dsv4

HEADS, TOKENS, TOPK, BLOCK = 1, 3, 3, 2

IMPLEMENTATIONS = [name for name in ("cpu", "xla") if dsv4.implementations()[name].available]


class Call(NamedTuple):
    function: Callable[..., object]
    arguments: tuple[object, ...] = ()
    fused: bool = False  # whether XLA may round differently where it sees more of the call at once


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def integers(*values: object) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


def filled(layout: str) -> dsv4.KVCache:
    """Of packed ones slot 0 holds NaN, and none attends to it."""
    cache = dsv4.KVCache.create(4, BLOCK, layout, scale=2.0**-6 if layout == "aiter_fp8" else 1.0)
    latents = numbers(cache.num_slots, 512)
    latents = latents if layout == "float32" else latents.at[0].set(np.nan)
    return dsv4.append(cache, latents, jnp.arange(cache.num_slots, dtype=jnp.int32), implementation="xla")


def scope(layout: str = "fp8_ds_mla") -> dsv4.Scope:
    """A token with a hole, an empty one, and one whose length is beyond topk."""
    return dsv4.Scope(filled(layout), integers([5, -1, 0], [3, 3, 3], [1, 2, 99]), integers(2, 0, 7))


def decode(q, swa, extra=None, sink=None, **options):
    return dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, return_lse=True, **options)


def steps(cache, latents, q, implementation: str):
    """A loop as a model has it: write, plan, attend."""

    def step(cache, row):
        index, latent = row
        cache = dsv4.append(cache, latent, index[None], implementation=implementation)
        slots, lengths = jnp.arange(TOPK, dtype=jnp.int32)[None], index[None] + 1
        plan = dsv4.plan_decode(lengths, num_heads=HEADS, swa_topk=TOPK, implementation=implementation)
        return cache, decode(q, dsv4.Scope(cache, slots, lengths), plan=plan, implementation=implementation)

    return jax.lax.scan(step, cache, (jnp.arange(2, dtype=jnp.int32), latents))


def over_axis(function, *arguments):
    """What each of two devices has; an axis of vmap stands for one of a mesh."""
    return jax.vmap(partial(function, axis_name="x"), in_axes=None, axis_name="x", axis_size=2)(*arguments)


def merged_over_mesh(outs, lses):
    """Of two devices, which have attended to a part of the keys each."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    merge = partial(dsv4.merge_over_axis, axis_name="x")
    return jax.jit(jax.shard_map(merge, mesh=mesh, in_specs=(jax.P("x"), jax.P("x")), out_specs=(jax.P(), jax.P())))(outs, lses)


def loss(q, sink, swa):
    return decode(q, swa, sink=sink, implementation="xla")[0].sum()


@functools.cache
def calls() -> dict[str, Call]:
    q, swa, sink = numbers(TOKENS, HEADS, 512), scope(), numbers(HEADS)
    one_token = jax.tree.map(lambda x: x[:1], scope("float32"))._replace(cache=filled("float32"))
    latents, slots = numbers(2, 512), integers(4, -1)
    out, lse = numbers(TOKENS, HEADS, 512), numbers(TOKENS, HEADS).at[0, 0].set(-np.inf)
    found = {}
    for name in IMPLEMENTATIONS:
        whole, options = {"implementation": name}, {"implementation": name, "fused": False}
        plain = name == "xla"
        for layout in ("fp8_ds_mla", "float32", *["aiter_fp8"] * plain):
            attended = scope(layout)
            found[f"append, {name}, {layout}"] = Call(partial(dsv4.append, **whole), (attended.cache, latents, slots))
            found[f"decode, {name}, {layout}"] = Call(partial(decode, **whole), (q, attended, attended, sink), fused=plain)
        many = numbers(2, TOKENS, HEADS, 512)
        found |= {
            f"decode per scope, {name}": Call(partial(decode, **options), (q, swa, swa, sink), fused=True),
            f"decode under vmap, {name}": Call(jax.vmap(partial(decode, **whole), (0, None)), (many, swa), fused=plain),
            f"plan, {name}": Call(partial(dsv4.plan_decode, num_heads=HEADS, swa_topk=TOPK, **whole), (swa.lengths,)),
            f"a loop, {name}": Call(partial(steps, **whole), (swa.cache, numbers(2, 1, 512), q[:1]), fused=plain),
        }
    for placement in ("contiguous", "interleaved"):
        slots_here = partial(over_axis, partial(dsv4.local_slots, placement=placement))
        scope_here = partial(over_axis, partial(dsv4.local_scope, placement=placement))
        found[f"local_slots, {placement}"] = Call(slots_here, (swa.cache, swa.indices))
        found[f"local_scope, {placement}"] = Call(scope_here, (swa,))
    return found | {
        "split_scope": Call(partial(over_axis, dsv4.split_scope), (swa,)),
        "merge_over_axis": Call(merged_over_mesh, (numbers(4, HEADS, 512), numbers(4, HEADS)), fused=True),
        "dequantize": Call(dsv4.dequantize, (swa.cache, integers([1, 5], [-1, 99]))),
        "dequantize of a whole cache": Call(dsv4.dequantize, (filled("float32"),)),
        "KVCache.create": Call(lambda: dsv4.KVCache.create(2, BLOCK)),
        "KVCache of vLLM's view": Call(partial(dsv4.KVCache, block_size=BLOCK), (jnp.zeros((1, BLOCK, 584), jnp.uint8),)),
        "merge_scopes": Call(lambda out, lse: dsv4.merge_scopes([out, 2 * out], [lse, lse]), (out, lse), fused=True),
        "merge_scopes of FlashMLA's lse": Call(
            lambda out, lse: dsv4.merge_scopes([out, out], [lse, lse], empty_lse=np.inf), (out, jnp.abs(lse)), fused=True
        ),
        "apply_attn_sink": Call(dsv4.apply_attn_sink, (out, lse, sink), fused=True),
        "derivative": Call(jax.grad(loss, (0, 1)), (q[:1], sink, one_token), fused=True),
    }


NAMES = list(calls())

SWITCHES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "x64": lambda: jax.enable_x64(True),
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "checking_leaks": jax.checking_leaks,
}
STRICT = ("strict promotion", "rank promotion raises")
# (switches, whether under jit)
RUNS = [
    *itertools.product([STRICT, ("x64", *STRICT), ("debug_nans",), ("checking_leaks",)], [False, True]),
    (("x64",), True),
    (("disable_jit",), False),
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A program that a switch leaves as it was is taken from JAX's persistent cache."""
    settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@contextlib.contextmanager
def switched(*switches: str) -> Iterator[None]:
    """With these on, and the suite's own strictness off."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        for switch in switches:
            stack.enter_context(SWITCHES[switch]())
        yield


def results(name: str, jitted: bool, *switches: str) -> list[np.ndarray]:
    function, arguments, _ = calls()[name]
    # A function of its own: what another call traced is not taken.
    with switched(*switches):
        call = jax.jit(lambda *a: function(*a)) if jitted else function
        return [np.asarray(x) for x in jax.tree.leaves(call(*arguments))]


without_switches = functools.cache(results)


@pytest.mark.parametrize(("switches", "jitted"), RUNS, ids=[" and ".join(switches) + ", jit" * jitted for switches, jitted in RUNS])
@pytest.mark.parametrize("name", NAMES)
def test_same_results(name: str, switches: tuple[str, ...], jitted: bool) -> None:
    got, want = results(name, jitted, *switches), without_switches(name, jitted)
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        if switches == ("disable_jit",) and calls()[name].fused:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-5, atol=1e-6, err_msg=f"result {i}")
        else:
            assert_same_bits(f"result {i}", a, b)


def test_debug_nans_stops_at_the_callers_own() -> None:
    cache = filled("fp8_ds_mla")
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        dsv4.dequantize(cache, integers(0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_debug_infs_stops_at_tokens_without_keys(implementation: str) -> None:
    """Their lse is -inf by design; where every token has a key, nothing is infinite."""
    q, swa = numbers(TOKENS, HEADS, 512), scope()
    attend = partial(decode, implementation=implementation)
    with jax.debug_infs(True):
        _, lse = attend(q, swa._replace(lengths=integers(2, 1, 7)))
        assert np.isfinite(np.asarray(lse)).all()
        with pytest.raises(FloatingPointError, match="inf"):
            attend(q, swa)
