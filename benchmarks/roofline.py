"""What a machine can do at most, measured: a CPU's products, a GPU's bf16 products and copies."""

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


def cpu_meters() -> dict[str, Callable[[], float]]:
    """Compiles benchmarks/cpu_peak.cc for this machine; returns functions that measure GFLOP/s on all its cores: of "fma", fp32, and where
    there is one of "amx", bf16 (some 4 ms, the best of four)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("benchmarks.cpu: needs a C++ compiler to measure the FMA peak (apt install g++)")
    source = Path(__file__).with_name("cpu_peak.cc")
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "cpu_peak.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
        peaks = ctypes.CDLL(str(library))
    threads = len(os.sched_getaffinity(0))
    peaks.fma_gflops.restype = peaks.amx_gflops.restype = ctypes.c_double
    meters = {
        "fma": lambda: max(peaks.fma_gflops(threads, ctypes.c_long(2_000_000)) for _ in range(4)),
        "amx": lambda: max(peaks.amx_gflops(threads, ctypes.c_long(200_000)) for _ in range(4)),
    }
    return {name: meter for name, meter in meters.items() if meter() > 0}


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
