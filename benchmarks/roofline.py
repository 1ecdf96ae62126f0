"""What a machine can do at most, measured: a CPU's fp32 FMA rate, a GPU's bf16 products and copies."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp


def fma_meter() -> Callable[[], float]:
    """Compiles benchmarks/fma_peak.cc for this machine; returns a function that measures GFLOP/s on all its cores (10 ms a call)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("benchmarks.cpu: needs a C++ compiler to measure the FMA peak (apt install g++)")
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


def gpu_ceilings() -> dict[str, float]:
    """TFLOP/s of a large bf16 product and GB/s, read and written, of a large copy."""
    a, x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16), jnp.zeros(2**28, jnp.float32)

    def seconds(call: Callable[[jax.Array], jax.Array], operand: jax.Array) -> float:
        call(operand).block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(10):
                out = call(operand)
            out.block_until_ready()
            times.append((time.perf_counter() - start) / 10)
        return statistics.median(times)

    product, copy = seconds(jax.jit(lambda a: a @ a), a), seconds(jax.jit(lambda x: x + 1), x)
    return {"tflops": 2 * 8192**3 / product / 1e12, "gbps": 2 * x.nbytes / copy / 1e9}
