"""The AMX kernels on a processor without AMX: a C++ model of the tile instructions in their place, built and tested here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.ffi
import numpy as np
import pytest
from build_files import ROOT, cmake
from compare import assert_same_bits

from jax_dsv4 import _ffi

LIBRARY, DETAIL = _ffi.load("libdsv4_cpu", "cpu")
# What the model needs, too: AVX-512 and GFNI.
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "gfni")
# The suite, without what it does on other instruction sets.
OTHERS = ("large", "generic", "avx2", "avx512", "choice", "all_instruction_sets", "share_the_work", "workspace")
SELECTED = " and ".join(f"not {name}" for name in OTHERS)


def missing() -> str:
    """Why there is nothing to be done here; nothing if there is."""
    if shutil.which("g++") is None:
        return "the model is built with g++"
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    absent = [flag for flag in NEEDED if flag not in flags]
    return f"this processor has no {', '.join(absent)}" if absent else ""


pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.skipif(LIBRARY is None, reason=DETAIL)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a process which takes libdsv4_cpu as CMake builds it with JAX_DSV4_AMX_MODEL."""
    directory = tmp_path_factory.mktemp("amx_model")
    common = ["-fPIC", "-w", "-DJAX_DSV4_AMX_MODEL", f"-I{ROOT}/ffi", "-isystem", jax.ffi.include_dir()]

    def compile_source(source: str, flags: list[str]) -> str:
        target = str(directory / f"{Path(source).stem}.o")
        subprocess.run(["g++", *flags, *common, "-c", str(ROOT / source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, *zip(*cmake()["libdsv4_cpu"].items())))
    subprocess.run(["g++", "-shared", "-o", str(directory / "libdsv4_cpu.so"), *objects], check=True)
    return os.environ | {"JAX_DSV4_LIBRARY_DIR": str(directory), "JAX_DSV4_CPU_ISA": "amx", "JAX_PLATFORMS": "cpu"}


def test_suite_on_the_model(environment: dict[str, str]) -> None:
    """tests/test_cpu.py with the AMX kernels as the choice."""
    script = "from jax_dsv4 import _ffi; print(_ffi.cpu_isa(_ffi.load('libdsv4_cpu', 'cpu')[0]).name)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True, env=environment) == "amx\n"
    suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/test_cpu.py"), "-k", SELECTED]
    done = subprocess.run(suite, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-8000:]


def test_model_has_the_bits_of_the_hardware(environment: dict[str, str], tmp_path: Path) -> None:
    here = environment | {"JAX_DSV4_LIBRARY_DIR": str(Path(DETAIL).parent)}
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import cpu_bits; cpu_bits.save_bits(sys.argv[1])"
    bits = []
    for name, process in (("model", environment), ("hardware", here)):
        path = tmp_path / f"{name}.npz"
        subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, check=True, env=process)
        bits.append({key: value for key, value in np.load(path).items() if key.startswith("amx ")})
    model, hardware = bits
    assert model
    if not hardware:
        pytest.skip("this machine has no AMX to compare with")
    for name, want in hardware.items():
        assert_same_bits(name, model[name], want)
