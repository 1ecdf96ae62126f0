"""The decode loop's text, greedy and from an fp8 cache, on every instruction set of the CPU kernels."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
from example_support import decode_loop, strict_types  # noqa: F401

from jax_dsv4 import _ffi

LIBRARY, DETAIL = _ffi.load("libdsv4_cpu", "cpu")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=DETAIL)


@functools.cache
def text(isa: str) -> str:
    _ffi.name_cpu_isa(LIBRARY, isa)
    try:
        if _ffi.cpu_isa(LIBRARY).name != isa:
            pytest.skip(f"this processor has no {isa}")
        with tempfile.TemporaryDirectory() as directory:
            report = Path(directory) / "out.json"
            assert decode_loop.main(["--json", str(report)]) == 0
            return json.loads(report.read_text())["text"][0]
    finally:
        _ffi.name_cpu_isa(LIBRARY, None)


@pytest.mark.parametrize("isa", _ffi.CPU_ISAS[1:])
def test_text_is_the_same(isa: str) -> None:
    """The example's model is float32 on a CPU: where the kernels multiply bf16, such calls run the AVX-512 ones."""
    assert text(isa) == text("generic")
