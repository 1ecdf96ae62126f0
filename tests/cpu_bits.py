"""Results of some calls on each instruction set of the CPU, to be compared between processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cases import make
from conformance import attend, named

from jax_dsv4 import _ffi
from jax_dsv4._implementations import cpu as cpu  # for whom sets its number of lanes

LIBRARY, _ = _ffi.load("libdsv4_cpu", "cpu")
CASES = [named(name) for name in ("one_token_split", "many_tokens", "heads127", "one_scope")]


def save_bits(path: str | Path) -> None:
    """Results of some calls on each instruction set that there is."""
    bits = {}
    for isa in _ffi.CPU_ISAS:
        _ffi.name_cpu_isa(LIBRARY, isa)
        if _ffi.cpu_isa(LIBRARY).name != isa:
            continue
        for case in CASES:
            out, lse = attend(make(case), "cpu")
            bits[f"{isa} {case} out"], bits[f"{isa} {case} lse"] = np.asarray(out).view(np.uint16), np.asarray(lse)
    _ffi.name_cpu_isa(LIBRARY, None)
    np.savez(path, **bits)
