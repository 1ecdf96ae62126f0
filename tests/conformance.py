"""What every backend must do.

A backend's test file subclasses `Conformance`, or `NativeConformance` if its kernels follow plans, and names its implementation.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PAIRS, Case, Pair, Problem, in_layouts, make, tagged
from compare import LSE, OUT_BF16, OUT_FLOAT32, Answer, Tolerance, assert_answer, assert_same_bits

import jax_dsv4 as dsv4


def plan_of(p: Problem, implementation: str, fused: bool | None = None) -> dsv4.DecodePlan:
    topks = dict(swa_topk=p.swa.indices.shape[-1], extra_topk=0 if p.extra is None else p.extra.indices.shape[-1])
    lengths = p.swa.lengths, None if p.extra is None else p.extra.lengths
    options = dict(num_heads=p.q.shape[-2], **topks, implementation=implementation, fused=fused)
    return jax.jit(lambda *lengths: dsv4.plan_decode(*lengths, **options))(*lengths)


def with_work(plan: dsv4.DecodePlan, first: object) -> dsv4.DecodePlan:
    return dsv4.DecodePlan((first, *plan.work[1:]), plan.made_for)


def attend(p: Problem, implementation: str, fused: bool | None = None, plan: dsv4.DecodePlan | None = None):
    call = _compiled(implementation, p.scale, fused)
    return jax.block_until_ready(call(p.q, p.swa, p.extra, attn_sink=p.attn_sink, plan=plan))


@functools.lru_cache(maxsize=64)
def _compiled(implementation: str, scale: float, fused: bool | None):
    options = dict(scale=scale, implementation=implementation, fused=fused, return_lse=True)
    return jax.jit(functools.partial(dsv4.sparse_mla_decode, **options))


def one_token(p: Problem, t: int) -> Problem:
    scopes = (None if s is None else dsv4.Scope(s.cache, s.indices[t : t + 1], s.lengths[t : t + 1]) for s in (p.swa, p.extra))
    return Problem(p.q[t : t + 1], *scopes, p.attn_sink, p.scale, p.out[t : t + 1], p.lse[t : t + 1])


def named(name: str) -> Case:
    return next(c for c in tagged("ci", "flashmla") if c.name == name)


# Cases whose plans are filled with garbage. On Hopper: a token to a cluster; then two kernels that follow the plan, which cuts tokens.
GARBLED = ("heads16", "many_tokens", "flashmla-b4q3h128k576x2048bs2")


# Every pair of layouts with a share of the cases, which all together are all of them; with JAX_DSV4_TEST_EVERY_PAIR each with every case.
EVERY_PAIR = bool(os.environ.get("JAX_DSV4_TEST_EVERY_PAIR"))
OF_PAIRS = [case for case in tagged("ci", *["flashmla"] * EVERY_PAIR) if case.swa.layout == "fp8_ds_mla" and case.extra]
SHARE = 1 if EVERY_PAIR else len(PAIRS)
IN_PAIRS = [(pair, case) for i, pair in enumerate(PAIRS) for case in OF_PAIRS[i % SHARE :: SHARE]]


def _name(parameter: Pair | Case) -> str:
    return parameter.name if isinstance(parameter, Case) else "+".join("-".join(filter(None, form)) for form in parameter)


in_pairs = pytest.mark.parametrize(("pair", "case"), IN_PAIRS, ids=_name)


class Conformance:
    implementation: ClassVar[str]
    # Of every cache, where the backend has one of its own.
    layout: ClassVar[str | None] = None
    # Where weights are rounded to bf16 before they meet the latents, FlashMLA's tolerances hold for latents of the size of FlashMLA's
    # own tests (about 2^-3); elsewhere for larger ones too.
    log2_magnitude: ClassVar[int] = 0
    out_tolerance: ClassVar[dict[str, Tolerance]] = {"bfloat16": OUT_BF16, "float32": OUT_FLOAT32}
    lse_tolerance: ClassVar[Tolerance] = LSE
    # Whether it takes both scopes in one kernel call.
    fuses: ClassVar[bool] = True
    reruns: ClassVar[int] = 20

    def refusal(self, case: Case) -> str | None:
        """Why the backend is not held to a case; such a test is skipped, visibly."""

    def answer(self, p: Problem) -> Answer:
        """What it must give: float64 on the operands as the backend rounds them."""
        return Answer(p.out, p.lse)

    def make(self, case: Case, seed: int = 0) -> Problem:
        if reason := self.refusal(case):
            pytest.skip(f"{self.implementation}: {reason}")
        if self.layout is not None:
            own = dict(layout=self.layout, arrangement=None, stride_extra_bytes=0)
            scopes = (s and dataclasses.replace(s, **own) for s in (case.swa, case.extra))
            case = dataclasses.replace(case, **dict(zip(("swa", "extra"), scopes)))
        return make(case, seed, self.log2_magnitude)

    def run(self, p: Problem, fused: bool | None = None, plan: dsv4.DecodePlan | None = None):
        return attend(p, self.implementation, fused, plan)

    def check(self, p: Problem, out: object, lse: object) -> None:
        assert (out.dtype, lse.dtype) == (p.q.dtype, jnp.float32)
        assert_answer((out, lse), self.answer(p), self.out_tolerance[p.q.dtype.name], self.lse_tolerance)

    def hold(self, case: Case, seed: int = 0, fused: bool | None = None) -> None:
        p = self.make(case, seed)
        self.check(p, *self.run(p, fused))

    @pytest.mark.parametrize("case", tagged("ci"), ids=str)
    def test_case(self, case: Case) -> None:
        self.hold(case)

    @pytest.mark.parametrize("case", tagged("flashmla"), ids=str)
    def test_flashmla_grid(self, case: Case) -> None:
        self.hold(case)

    @pytest.mark.parametrize("case", [c for c in tagged("ci") if c.extra is not None][::2], ids=str)
    def test_per_scope(self, case: Case) -> None:
        """A call per scope, merged and given its sink in JAX."""
        if not self.fuses:
            pytest.skip(f"{self.implementation}: it always does so")
        self.hold(case, fused=False)

    @in_pairs
    def test_layouts(self, pair: Pair, case: Case) -> None:
        if self.layout is not None:
            pytest.skip(f"{self.implementation}: it has a layout of its own")
        self.hold(in_layouts(case, pair))

    @pytest.mark.parametrize("seed", range(1, 6))
    def test_seeds(self, seed: int) -> None:
        self.hold(tagged("ci")[seed], seed)

    @pytest.mark.parametrize("name", ["one_token_split", "few_long_tokens"])
    def test_same_bits_every_time(self, name: str) -> None:
        p = self.make(named(name))
        first = self.run(p)
        for _ in range(self.reruns):
            for got, want in zip(self.run(p), first):
                assert_same_bits("rerun", got, want)

    def test_a_token_does_not_see_its_neighbours(self) -> None:
        """Each token alone is right, as it is with them."""
        p = self.make(named("heads16"))
        for t in range(len(p.out)):
            alone = one_token(p, t)
            self.check(alone, *self.run(alone))

    def test_nan_stays_in_its_head(self) -> None:
        p = self.make(named("heads16"))
        out, lse = (np.array(x) for x in self.run(p._replace(q=p.q.at[0, 3, 7].set(jnp.nan))))
        assert np.isnan(out[0, 3].astype(np.float32)).all()
        assert np.isnan(lse[0, 3])  # not -inf, as if it had no key: a merge would pass over it
        want = self.answer(p._replace(q=p.q.at[0, 3, 7].set(0)))
        out[0, 3], lse[0, 3] = want.out[0, 3], want.lse[0, 3]
        assert_answer((out, lse), want, self.out_tolerance[p.q.dtype.name], self.lse_tolerance)


class NativeConformance(Conformance):
    """Of kernels that follow a plan."""

    # The arrays of a plan whose garbage never gives a wrong number, only NaN (None: all). Whatever any of them holds, the call returns.
    guarded: ClassVar[tuple[str, ...] | None] = None
    garbled: ClassVar[tuple[str, ...]] = GARBLED

    @pytest.mark.parametrize("case", tagged("flashmla-large"), ids=str)
    def test_flashmla_grid_large(self, case: Case) -> None:
        self.hold(case)

    @pytest.mark.parametrize("case", tagged("corner")[::4], ids=str)
    def test_plan_made_before(self, case: Case) -> None:
        p = self.make(case)
        for fused in (True, False) if self.fuses else (False,):
            planned = self.run(p, fused, plan_of(p, self.implementation, fused))
            for got, want in zip(planned, self.run(p, fused)):
                assert_same_bits(f"{case}", got, want)

    def test_a_call_is_its_custom_calls(self) -> None:
        """No kernel beside ours: nothing is copied, and what is absent (sink, scope) costs nothing."""
        p = self.make(named("one_scope"))
        options = dict(implementation=self.implementation, return_lse=True)
        text = jax.jit(lambda q, swa: dsv4.sparse_mla_decode(q, swa, **options)).lower(p.q, p.swa).compile().as_text()
        operations = re.findall(r" = .*? ([a-z][a-z-]*)\(", text)
        assert operations.count("custom-call") == 2
        assert set(operations) <= {"custom-call", "parameter", "constant", "get-tuple-element", "tuple", "bitcast"}

    @pytest.mark.parametrize("tokens", [70, 5])  # on Hopper, 5: a token to a cluster, which does not follow the plan
    def test_stale_plan_is_answered_with_nan(self, tokens: int) -> None:
        """A plan made for other lengths never reaches a key: those tokens are NaN, the others right."""
        p = self.make(dataclasses.replace(named("many_tokens"), tokens=tokens))
        lengths = jnp.clip(p.swa.lengths, 0, p.swa.indices.shape[1])
        shorter = jnp.maximum(lengths - 1, 0)
        changed = np.asarray(shorter != lengths)
        assert 0 < changed.sum() < changed.size
        plan = plan_of(p, self.implementation)
        stale = self.run(p._replace(swa=p.swa._replace(lengths=shorter)), plan=plan)
        for got, want in zip(stale, self.run(p, plan=plan)):
            nan = np.isnan(np.asarray(got, np.float32)).reshape(tokens, -1)
            np.testing.assert_array_equal(nan.all(1), changed)
            assert_same_bits("unchanged tokens", np.asarray(got)[~changed], np.asarray(want)[~changed])

    @pytest.mark.parametrize("name", GARBLED)
    @pytest.mark.parametrize("seed", range(6))
    def test_garbage_plan(self, seed: int, name: str) -> None:
        """Whatever a plan's arrays hold, the call returns and leaves everything else alone (sanitizers see the rest)."""
        if name not in self.garbled:
            pytest.skip(f"{self.implementation}: held to {', '.join(self.garbled)} with garbage in the plan")
        rng, p = np.random.default_rng(seed), self.make(named(name))
        want, plan = self.answer(p), plan_of(p, self.implementation)
        values = np.array([-(2**31), -1, 0, 1, 2, 3, 64, 319, 320, 1000, 2**31 - 1])

        def garble(x: jax.Array) -> jax.Array:
            hit = rng.random(x.shape) < (0.5 if seed % 2 else 0.02)
            return jnp.asarray(np.where(hit, rng.choice(values, x.shape), x), jnp.int32)

        work = plan.work[0]
        for field in work._fields:
            broken = work._replace(**{field: garble(getattr(work, field))})
            with np.errstate(invalid="ignore"):  # with a garbage plan a number may be anything, signalling NaN included
                out, lse = (np.array(x, np.float64) for x in self.run(p, plan=with_work(plan, broken)))
            if self.guarded is None or field in self.guarded:
                nan = np.isnan(lse).any(-1)
                assert np.isnan(out[nan]).all()
                assert np.isnan(lse[nan]).all()
                assert_answer((out[~nan], lse[~nan]), want.of(~nan), self.out_tolerance[p.q.dtype.name], self.lse_tolerance)
        self.run(p, plan=with_work(plan, jax.tree.map(garble, work)))
        self.check(p, *self.run(p, plan=plan))
