"""The CPU's fp32 FMA ceiling, measured."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path


def fma_meter() -> Callable[[], float]:
    """Compiles benchmarks/fma_peak.cc for this machine; returns a function that measures GFLOP/s on all its cores (10 ms a call)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("benchmarks.decode: needs a C++ compiler to measure the FMA peak (apt install g++)")
    source = Path(__file__).with_name("fma_peak.cc")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "fma_peak.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
        peak = ctypes.CDLL(str(library)).fma_gflops
    peak.restype = ctypes.c_double
    threads = len(os.sched_getaffinity(0))
    steps = 100_000
    peak(threads, ctypes.c_long(steps))
    return lambda: max(peak(threads, ctypes.c_long(steps)) for _ in range(4))
