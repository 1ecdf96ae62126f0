"""The suite's cases that the CUDA kernels take, as the software Hopper wants them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from cases import Case, make, tagged
from software_hopper import Cache, Scope


class Operands(NamedTuple):
    q: np.ndarray
    scopes: list[Scope]
    sink: np.ndarray | None
    scale: float
    out: np.ndarray  # what is right
    lse: np.ndarray


def supported(case: Case) -> bool:
    return case.dtype == "bfloat16" and all(s is None or s.layout != "float32" for s in (case.swa, case.extra))


CASES = [case for case in tagged("ci") if supported(case)]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def operands(case: Case, seed: int = 0) -> Operands:
    p = make(case, seed, log2_magnitude=-3)  # as test_cuda.py; conformance.py says why

    def scope(s) -> Scope:
        data = np.asarray(s.cache.data)
        blocks = np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1)
        return Scope(Cache(blocks, s.cache.block_size, s.cache.layout, s.cache.arrangement), np.asarray(s.indices), np.asarray(s.lengths))

    scopes = [scope(s) for s in (p.swa, p.extra) if s is not None]
    return Operands(
        np.asarray(p.q).view(np.uint16), scopes, None if p.attn_sink is None else np.asarray(p.attn_sink), p.scale, p.out, p.lse
    )
