"""JAX's own ROCm plugin, unmodified wheels of PyPI, over the software GPU.

    pip install --no-deps jax-rocm7-pjrt==0.10.2 jax-rocm7-plugin==0.10.2
    PYTHONPATH=tests python tests/gfx950/plugin.py examples/decode_step.py    # or -m and a module

The plugin links HIP, for which hip.cc and hip_for_xla.cc stand in, and libraries that only come with ROCm (rocBLAS, MIOpen, RCCL...).
Of these a library each is made here, whose functions all fail: XLA then compiles what it might have asked them for.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tempfile

import jaxlib
import software_gpu
from compiled import compiled
from jax._src import hardware_utils

# For a GPU that is slow: few units, no timing of kernels against each other, and products compiled as loops (as Triton unrolls them
# without that timing, LLVM takes minutes).
UNITS = 8
XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_gemm_rewrite_size_threshold=2000000000"
# XLA compiles nothing without a handle of MIOpen.
SUCCEEDS = ("miopenCreateWithStream",)


def library() -> pathlib.Path | None:
    """The plugin, if it is installed."""
    spec = importlib.util.find_spec("jax_plugins")
    directories = (spec.submodule_search_locations or ()) if spec else ()
    return next((path for d in directories for path in pathlib.Path(d).glob("xla_rocm*/xla_rocm_plugin.so")), None)


def missing() -> str:
    """Why the plugin cannot be used here, or an empty string."""
    if library() is None:
        return f"JAX's ROCm plugin is not installed: pip install --no-deps jax-rocm7-{{pjrt,plugin}}=={jaxlib.__version__}"
    if (version := importlib.metadata.version("jax-rocm7-pjrt")) != jaxlib.__version__:
        return f"jax-rocm7-pjrt is {version}, jaxlib {jaxlib.__version__}"
    return software_gpu.missing()


def _output(*command: str | pathlib.Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _load_stubs(plugin: pathlib.Path, gpu: ctypes.CDLL) -> None:
    """The libraries that the plugin links and a machine without ROCm has not, by their names, with the functions that it wants of them."""
    linked = re.findall(r"NEEDED.*\[(.*)\]", _output("readelf", "-d", plugin))
    wanted = re.findall(r" U (\w+)(?:@(?!GLIBC|GCC|CXXABI)\S+)?$", _output("nm", "-D", "--undefined-only", plugin), re.MULTILINE)
    functions = [f"int {name}() {{ return {int(name not in SUCCEEDS)}; }}" for name in wanted if not hasattr(gpu, name)]
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch, "stubs.c")
        source.write_text("\n".join(functions))
        for name in linked:
            if not re.match(r"lib(amdhip64|c|dl|gcc_s|m|pthread|rt|stdc\+\+)\.so|ld-", name):
                command = ["gcc", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{name}"]
                ctypes.CDLL(str(compiled(name, command, [source], [])), os.RTLD_GLOBAL)


@functools.cache
def connect() -> ctypes.CDLL:
    """Lets JAX find software GPUs, GFX950_DEVICES of them, when it looks for devices. -> the stand-in for HIP"""
    os.environ.setdefault("GFX950_UNITS", str(UNITS))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    gpu = ctypes.CDLL(str(software_gpu.library()), os.RTLD_GLOBAL)  # by its own name, libamdhip64.so.7, the plugin finds it loaded
    _load_stubs(library(), gpu)
    hardware_utils.num_available_amd_gpus = lambda stop_at=None: int(os.environ.get("GFX950_DEVICES", "1"))  # it asks the kernel's driver
    return gpu


if __name__ == "__main__":
    connect()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
