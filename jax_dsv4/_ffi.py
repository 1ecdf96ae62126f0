"""Finds and loads the native libraries, registers their handlers with XLA, and states why one is absent."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

import jax

from jax_dsv4 import _checks

TARGETS = ("dsv4_plan", "dsv4_decode", "dsv4_append")
AITER_TARGETS = ("dsv4_aiter_plan", "dsv4_aiter_metadata_plan", "dsv4_aiter_decode", "dsv4_aiter_append")
# The CPU kernels' instruction sets, in ascending order (ffi/cpu/decode.cc).
CPU_ISAS = ("generic", "avx2", "avx512", "avx512_bf16")


def find_library(name: str) -> Path | None:
    """Where `<name>.so` is: in the directory JAX_DSV4_LIBRARY_DIR if that is set, otherwise beside this package."""
    import jax_dsv4

    override = os.environ.get("JAX_DSV4_LIBRARY_DIR")
    # An editable install has two directories: the sources, and the one that the libraries were installed to.
    directories = [override] if override else list(jax_dsv4.__path__)
    for directory in directories:
        path = Path(directory) / f"{name}.so"
        if path.exists():
            return path
    return None


@functools.cache
def load(name: str, platform: str) -> tuple[ctypes.CDLL | None, str]:
    """Loads a library and registers its handlers for `platform`.

    Returns:
      (library, where it was found) or (None, why it is absent).
    """
    path = find_library(name)
    if path is None:
        compiler = "nvcc" if platform == "CUDA" else "a C++17 compiler"
        return None, f"{name}.so was not built; reinstall the package from source with {compiler} (see README.md)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"
    for target in TARGETS:
        stages = {"execute": jax.ffi.pycapsule(getattr(library, target))}
        if hasattr(library, "dsv4_initialize"):  # what must not happen while a graph is captured
            stages["initialize"] = jax.ffi.pycapsule(library.dsv4_initialize)
        jax.ffi.register_ffi_target(target, stages, platform=platform)
    isa = os.environ.get("JAX_DSV4_CPU_ISA")
    if platform == "cpu" and isa:
        _checks.require(isa in CPU_ISAS, "jax_dsv4", "the variable JAX_DSV4_CPU_ISA", f"be one of {CPU_ISAS}", isa)
        limit_cpu_isa(library, isa)
    return library, str(path)


@functools.cache
def load_rocm() -> tuple[ctypes.CDLL | None, str]:
    """Loads the ROCm handlers, tells them where AITER's kernels and our own are, and registers them. Returns as `load` does."""
    path = find_library("libdsv4_rocm")
    if path is None:
        return None, "libdsv4_rocm.so was not built; reinstall the package from source with a C++17 compiler (see README.md)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"
    aiter = aiter_directory()
    builder = aiter_plan_builder()
    library.dsv4_rocm_directories(*(os.fsencode(p) if p else b"" for p in (aiter, path.parent, builder)))
    for target in AITER_TARGETS:
        stages = {"initialize": f"{target}_initialize", "execute": target}
        handlers = {stage: jax.ffi.pycapsule(getattr(library, symbol)) for stage, symbol in stages.items()}
        jax.ffi.register_ffi_target(target, handlers, platform="ROCM")
    return library, str(path)


def aiter_plan_builder() -> Path | None:
    """AITER's plan builder, if `python -m jax_dsv4.build_aiter` has compiled it. JAX_DSV4_PLANNER=own leaves it aside."""
    from jax_dsv4.build_aiter import built_library

    return None if os.environ.get("JAX_DSV4_PLANNER") == "own" else built_library("gfx950")


def aiter_directory() -> Path | None:
    """AITER's hsa directory: the one that JAX_DSV4_AITER_HSA names, or that of an installed amd-aiter, which is not imported."""
    if named := os.environ.get("JAX_DSV4_AITER_HSA"):
        return Path(named)
    spec = importlib.util.find_spec("aiter_meta")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (hsa := Path(location) / "hsa").is_dir():
            return hsa
    return None


def cpu_isa(library: ctypes.CDLL) -> str:
    """The instruction set that the CPU kernels use on this machine."""
    library.dsv4_cpu_isa.restype = ctypes.c_char_p
    return library.dsv4_cpu_isa().decode()


def limit_cpu_isa(library: ctypes.CDLL, name: str) -> None:
    """Keeps the CPU kernels from using anything beyond `name`, for this process."""
    library.dsv4_cpu_limit_isa(ctypes.c_int(CPU_ISAS.index(name)))
