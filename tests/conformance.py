"""What every backend must do. A backend's test file subclasses `Conformance` and names its implementation."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make, tagged
from compare import LSE, OUT_BF16, OUT_FLOAT32, assert_close, assert_same_bits

import jax_dsv4 as dsv4


def run(case: Case, implementation: str, *, fused: bool | None = None, planned: bool = False, seed: int = 0, log2_magnitude: int = 0):
    """out and lse of a case, under jit."""
    p = make(case, seed, log2_magnitude)
    return jax.block_until_ready(_compiled(case, implementation, fused, planned)(p.q, p.swa, p.extra, p.attn_sink))


@functools.lru_cache(maxsize=64)
def _compiled(case: Case, implementation: str, fused: bool | None, planned: bool):
    @jax.jit
    def call(q, swa, extra, sink):
        plan = None
        if planned:
            plan = dsv4.plan_decode(
                swa.lengths,
                None if extra is None else extra.lengths,
                num_heads=case.heads,
                swa_topk=swa.indices.shape[-1],
                extra_topk=0 if extra is None else extra.indices.shape[-1],
                implementation=implementation,
                fused=fused,
            )
        return dsv4.sparse_mla_decode(
            q, swa, extra, attn_sink=sink, scale=case.scale, plan=plan, implementation=implementation, fused=fused, return_lse=True
        )

    return call


def check(case: Case, out: object, lse: object, seed: int = 0, log2_magnitude: int = 0) -> None:
    # The call ran before this makes the reference: memory that was reused cannot hold the answer.
    p = make(case, seed, log2_magnitude)
    assert (out.dtype, lse.dtype) == (p.q.dtype, jnp.float32)
    assert_close(f"{case} lse", lse, p.lse, LSE)
    assert_close(f"{case} out", out, p.out, OUT_BF16 if case.dtype == "bfloat16" else OUT_FLOAT32)


class Conformance:
    implementation: ClassVar[str]
    plans: ClassVar[bool] = True
    # Where weights are rounded to bf16 before they meet the latents, FlashMLA's tolerances hold for latents of the size of FlashMLA's
    # own tests (about 2^-3); elsewhere for larger ones too.
    log2_magnitude: ClassVar[int] = 0

    def hold(self, case: Case, seed: int = 0, **options: bool) -> None:
        out, lse = run(case, self.implementation, seed=seed, log2_magnitude=self.log2_magnitude, **options)
        check(case, out, lse, seed, self.log2_magnitude)

    @pytest.mark.parametrize("case", tagged("ci"), ids=str)
    def test_fused(self, case: Case) -> None:
        self.hold(case)

    @pytest.mark.parametrize("case", tagged("flashmla"), ids=str)
    def test_flashmla_grid(self, case: Case) -> None:
        self.hold(case)

    @pytest.mark.parametrize("case", [c for c in tagged("ci") if c.extra is not None][::2], ids=str)
    def test_per_scope(self, case: Case) -> None:
        """A call per scope, merged and given its sink in JAX."""
        self.hold(case, fused=False)

    @pytest.mark.parametrize("case", tagged("corner")[::4], ids=str)
    def test_plan_made_before(self, case: Case) -> None:
        if not self.plans:
            pytest.skip(f"{self.implementation} needs no plan")
        for fused in (True, False):
            for got, want in zip(run(case, self.implementation, fused=fused, planned=True), run(case, self.implementation, fused=fused)):
                assert_same_bits(f"{case}", got, want)

    @pytest.mark.parametrize("seed", range(1, 6))
    def test_seeds(self, seed: int) -> None:
        case = tagged("ci")[seed]
        self.hold(case, seed)

    def test_same_bits_every_time(self) -> None:
        case = next(c for c in tagged("ci") if c.name == "one_token_split")
        first = run(case, self.implementation)
        for _ in range(20):
            for got, want in zip(run(case, self.implementation), first):
                assert_same_bits("rerun", got, want)

    def test_a_token_does_not_see_its_neighbours(self) -> None:
        """Each token alone gives the same result within rounding, whatever the plan made of the batch."""
        case = next(c for c in tagged("ci") if c.name == "heads16")
        p = make(case)
        out, lse = run(case, self.implementation)
        for t in range(case.tokens):
            one = slice(t, t + 1)
            scopes = [dsv4.Scope(s.cache, s.indices[one], s.lengths[one]) for s in (p.swa, p.extra)]
            alone = dsv4.sparse_mla_decode(p.q[one], *scopes, attn_sink=p.attn_sink, implementation=self.implementation, return_lse=True)
            assert_close("lse", alone[1], np.asarray(lse[one], np.float64), LSE)
            assert_close("out", alone[0], np.asarray(out[one]).astype(np.float64), OUT_BF16)
