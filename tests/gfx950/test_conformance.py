"""The cases that every backend is held to (tests/cases.py), in AITER's layout and to its precision, through its kernels."""

import dataclasses

import numpy as np
import pytest
from aiter_kernel import weights_in_fp8
from cases import make, tagged
from compare import assert_same_bits
from conformance import run
from test_end_to_end import Answer, check, round_to_fp8

import jax_dsv4 as dsv4
from jax_dsv4 import reference


def in_aiters_layout(case):
    scopes = {
        name: dataclasses.replace(scope, layout="aiter_fp8", stride_extra_bytes=0)
        for name, scope in (("swa", case.swa), ("extra", case.extra))
        if scope is not None
    }
    return dataclasses.replace(case, **scopes)


# Of the cases that differ in their layouts alone, one; and one with q in float32.
CASES = [in_aiters_layout(c) for c in tagged("ci") if not c.name.startswith(("bf16-", "float32-", "mixed_layouts"))]


def answer(case, seed=0):
    """float64, on q as the handler rounds it."""
    p = make(case, seed)
    q = round_to_fp8(p.q)
    scopes = [s for s in (p.swa, p.extra) if s is not None]
    scopes = [
        reference.ReferenceScope(np.asarray(dsv4.dequantize(c), np.float64), np.asarray(indices), np.asarray(lengths))
        for c, indices, lengths in scopes
    ]
    sink = None if p.attn_sink is None else np.asarray(p.attn_sink, np.float64)
    out, lse = reference.decode(q, scopes, sink, case.scale)
    error = np.zeros_like(out)
    for t in range(case.tokens):
        keys = [s.latents[row[(row >= 0) & (row < len(s.latents))]] for s in scopes if len(row := s.indices[t, : max(s.lengths[t], 0)])]
        if keys and len(keys := np.concatenate(keys)):
            weights = np.exp(case.scale * q[t] @ keys.T - lse[t][:, None])  # sum to 1
            largest = weights.max(-1, keepdims=True)
            error[t] = largest * weights_in_fp8(weights / largest, keys)
    return Answer(out, lse, error)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(rocm, case):
    got = run(case, "aiter")
    check(got, answer(case))


@pytest.mark.parametrize("case", CASES[::9], ids=str)
def test_plan_made_before(rocm, case):
    for got, want in zip(run(case, "aiter", planned=True), run(case, "aiter")):
        assert_same_bits(f"{case}", got, want)


@pytest.mark.parametrize("seed", [1, 2])
def test_seeds(rocm, seed):
    case = CASES[5 * seed]
    check(run(case, "aiter", seed=seed), answer(case, seed))
