"""Programs of many calls of the op on a GPU, as a decode step of many layers has them, and how a run of one is timed."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4

SWA = 128
BLOCK = 64
BLOCKS = {"swa": 1024, "extra": 2048}  # together 115 MB of rows: more than the L2 holds
RUNS = 4  # of a program, enqueued together
CALLS = 16  # with slots of their own


class Mix(NamedTuple):
    """What a server's requests may be: contexts drawn log-uniformly, of which a layer keeps an entry for every so many positions."""

    extra: int  # topk
    positions: int  # an entry stands for
    longest: int  # context
    shortest: int = 1024


MIXES = {"csa": Mix(512, 4, 2**17), "hca": Mix(1024, 128, 2**17), "hca1M": Mix(8192, 128, 2**20)}


class Shape(NamedTuple):
    heads: int
    tokens: int
    extra: int
    mix: str = ""  # of MIXES; "": all lengths are full
    queries: int = 1  # tokens of a request, which follow one another

    def __str__(self) -> str:
        if self.mix:
            return f"{self.mix}-t{self.tokens}h{self.heads}" + f"q{self.queries}" * (self.queries > 1)
        return f"t{self.tokens}h{self.heads}k{SWA}+{self.extra}"

    @property
    def extra_lengths(self) -> np.ndarray:
        if not self.mix:
            return np.full(self.tokens, self.extra)
        mix = MIXES[self.mix]
        rng = np.random.default_rng(self.tokens)
        contexts = np.exp(rng.uniform(np.log(mix.shortest), np.log(mix.longest), -(-self.tokens // self.queries)))
        positions = np.repeat(contexts.astype(int), self.queries)[: self.tokens] + np.arange(self.tokens) % self.queries
        return np.minimum(positions // mix.positions, self.extra)

    @property
    def keys(self) -> int:
        return self.tokens * SWA + int(self.extra_lengths.sum())

    def floor_us(self, ceilings: dict[str, float]) -> float:
        return max(self.flop / ceilings["tflops"] / 1e6, self.nbytes / ceilings["gbps"] / 1e3)

    @property
    def flop(self) -> int:
        return 2 * self.heads * self.keys * 1024

    @property
    def nbytes(self) -> int:
        return self.keys * 584 + self.tokens * self.heads * 2048


class Inputs(NamedTuple):
    """What all contenders of a shape are given; every call has indices of its own."""

    caches: dict[str, dsv4.KVCache]
    q: jax.Array
    sink: jax.Array
    lengths: dict[str, jax.Array]
    indices: list[dict[str, jax.Array]]


class Program(NamedTuple):
    run: Callable[[], Callable[[], object]]  # enqueues it; what that returns waits for its end
    calls: int  # that a run makes
    output: Callable[[], np.ndarray]  # of its first call, in float32; of a program of plans or layers, of its last

    def turn(self) -> list[float]:
        """Microseconds a call: from the end of the first of several runs to the end of the last."""
        waits = [self.run() for _ in range(RUNS)]
        waits[0]()
        start = time.perf_counter()
        waits[-1]()
        return [(time.perf_counter() - start) / (RUNS - 1) / self.calls * 1e6]


@partial(jax.jit, static_argnums=(0, 1))
def make_cache(blocks: int, seed: int) -> dsv4.KVCache:
    rows = jax.random.normal(jax.random.key(seed), (blocks * BLOCK, 512), jnp.bfloat16)
    return dsv4.append(dsv4.KVCache.create(blocks, BLOCK), rows, jnp.arange(blocks * BLOCK, dtype=jnp.int32))


def make_inputs(rng: np.random.Generator, caches: dict[str, dsv4.KVCache], queries: np.ndarray, shape: Shape) -> Inputs:
    topks = {"swa": SWA} | ({"extra": shape.extra} if shape.extra else {})

    def draw(name: str) -> jax.Array:
        return jnp.asarray(rng.integers(0, BLOCKS[name] * BLOCK, (shape.tokens, topks[name])), jnp.int32)

    return Inputs(
        {name: caches[name] for name in topks},
        jnp.asarray(queries[: shape.tokens, : shape.heads], jnp.bfloat16),
        jnp.asarray(rng.standard_normal(shape.heads), jnp.float32),
        {"swa": jnp.full(shape.tokens, SWA, jnp.int32)} | ({"extra": jnp.asarray(shape.extra_lengths, jnp.int32)} if shape.extra else {}),
        [{name: draw(name) for name in topks} for _ in range(CALLS)],
    )


def make_plan(lengths: dict[str, jax.Array], indices: dict[str, jax.Array], heads: int, **options: Any) -> dsv4.DecodePlan:
    swa_topk, extra_topk = (indices[name].shape[1] if name in indices else 0 for name in BLOCKS)
    return dsv4.plan_decode(lengths["swa"], lengths.get("extra"), num_heads=heads, swa_topk=swa_topk, extra_topk=extra_topk, **options)


@partial(jax.jit, static_argnames=("implementation", "fused", "batch_invariant"))  # traced once for all calls of a program
def attend(q: Any, caches: Any, indices: Any, lengths: Any, sink: Any, plan: Any, **options: Any) -> Any:
    scopes = [dsv4.Scope(caches[name], indices[name], lengths[name]) for name in BLOCKS if name in indices]
    return dsv4.sparse_mla_decode(q, *scopes, attn_sink=sink, plan=plan, **options)


def calls_program(inputs: Inputs, steps: int, *, planned: bool, **options: Any) -> Program:
    """Makes the first call, then `steps` times all calls. Compiled here, by whichever thread.

    A call's queries are the call before's output, as in a model. With `planned` one plan serves all calls, without every call makes its
    own. XLA must not do once, ahead of the loop, what a model does in every call: so a call's lengths come from the plan before (clamped,
    they are the same), and plain XLA's indices depend on the queries.
    """

    def run(inputs: Inputs) -> Any:
        caches, q, sink, lengths, indices = inputs
        shared = make_plan(lengths, indices[0], q.shape[1], **options) if planned else None

        def call(state: Any, indices: Any) -> Any:
            q, swa_lengths = state
            if options["implementation"] == "xla":
                indices = {name: i + (q[0, 0, 0] > 3e38).astype(jnp.int32) for name, i in indices.items()}
            now = lengths | {"swa": swa_lengths}
            plan = shared
            if plan is None:
                plan = make_plan(now, indices, q.shape[1], **options)
                swa_lengths = plan.work[0].kv_lengths
            return attend(q, caches, indices, now, sink, plan, **options), swa_lengths

        def step(_: Any, state: Any) -> Any:
            for i in indices:
                state = call(state, i)
            return state

        first = call((q, lengths["swa"]), indices[0])
        return first[0], jax.lax.fori_loop(0, steps, step, first)[0]

    compiled, calls = jax.jit(run).lower(inputs).compile(), len(inputs.indices)
    if options["implementation"] == "cuda":
        scopes = 1 if options.get("fused", True) else len(inputs.caches)
        before, everywhere = (custom_calls(compiled, entry) for entry in (True, False))
        assert before == {"dsv4_plan": scopes, "dsv4_decode": scopes}, before
        looped = collections.Counter(dsv4_plan=0 if planned else scopes * calls, dsv4_decode=scopes * calls)
        assert everywhere - before == looped, everywhere
    return Program(
        lambda: partial(jax.block_until_ready, compiled(inputs)),
        steps * calls + 1,
        lambda: np.asarray(compiled(inputs)[0], np.float32),
    )


def plans_program(shape: Shape, steps: int) -> Program:
    """`steps` times CALLS plans and nothing else: each from the lengths of the one before."""

    def step(_: Any, swa: jax.Array) -> jax.Array:
        for _ in range(CALLS):
            plan = dsv4.plan_decode(swa, extra, num_heads=shape.heads, swa_topk=SWA, extra_topk=shape.extra, implementation="cuda")
            swa = plan.work[0].kv_lengths
        return swa

    swa, extra = (jnp.full(shape.tokens, topk, jnp.int32) for topk in (SWA, shape.extra))
    compiled = jax.jit(lambda swa: jax.lax.fori_loop(0, steps, step, swa)).lower(swa).compile()
    assert custom_calls(compiled, entry=False)["dsv4_plan"] == CALLS
    return Program(lambda: compiled(swa).block_until_ready, steps * CALLS, lambda: np.asarray(compiled(swa), np.float32))


def layers_program(inputs: Inputs, layers: int, *, donated: bool) -> Program:
    """One plan and `layers` calls, unrolled. Its queries are the run before's output: its own buffer, if `donated`."""

    def step(inputs: Inputs, q: jax.Array) -> jax.Array:
        plan = make_plan(inputs.lengths, inputs.indices[0], q.shape[1], implementation="cuda")
        for i in range(layers):
            q = attend(q, inputs.caches, inputs.indices[i % CALLS], inputs.lengths, inputs.sink, plan, implementation="cuda")
        return q

    compiled = jax.jit(step, donate_argnums=(1,) if donated else ()).lower(inputs, inputs.q).compile()
    state = inputs.q + 0

    def run() -> Callable[[], object]:
        nonlocal state
        state = compiled(inputs, state)
        return state.block_until_ready

    return Program(run, layers, lambda: np.asarray(compiled(inputs, inputs.q + 0), np.float32))


def custom_calls(compiled: jax.stages.Compiled, entry: bool) -> collections.Counter[str]:
    """How many calls of ours a compiled program has, in its entry computation or in all of it."""
    hlo = compiled.as_text() or ""
    return collections.Counter(re.findall(r'custom_call_target="(dsv4_\w+)"', hlo[hlo.index("\nENTRY") :] if entry else hlo))
