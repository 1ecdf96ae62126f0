"""Finds and loads the native libraries, registers their handlers with XLA, and states why one is absent."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax

from jax_dsv4 import _checks

TARGETS = ("dsv4_plan", "dsv4_decode", "dsv4_append")
AITER_TARGETS = ("dsv4_aiter_plan", "dsv4_aiter_metadata_plan", "dsv4_aiter_decode", "dsv4_aiter_append")
GLUON_TARGETS = ("dsv4_aiter_gluon_decode", "dsv4_packed_append")
# The CPU kernels' instruction sets, in ascending order (ffi/cpu/choose.h).
CPU_ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


def register() -> None:
    """Registers the handlers of every platform that JAX may have here, so that programs made elsewhere run. Touches no device."""
    load("libdsv4_cpu", "cpu")
    if has_plugin("cuda"):
        load("libdsv4_cuda", "CUDA")
    if has_plugin("rocm"):
        load_rocm()


def has_plugin(platform: str) -> bool:
    """Whether JAX's plugin for `platform` is installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    installed = pkgutil.iter_modules(plugins.submodule_search_locations) if plugins else ()
    return any(platform in module.name for module in installed)  # such as xla_cuda13


def find_library(name: str) -> Path | None:
    """Where `<name>.so` is: in the directory JAX_DSV4_LIBRARY_DIR if that is set, otherwise beside this package."""
    override = os.environ.get("JAX_DSV4_LIBRARY_DIR")
    # An editable install has two directories: the sources, and the one that the libraries were installed to.
    directories = [override] if override else list(sys.modules["jax_dsv4"].__path__)
    return next((path for path in (Path(directory, f"{name}.so") for directory in directories) if path.exists()), None)


def build_command() -> str:
    """What builds the kernels of every platform, with compilers for GPUs from PyPI where the machine has none."""
    sources = Path(__file__).resolve().parents[1]
    if (sources / "ffi").is_dir():
        return f"JAX_DSV4_COMPILERS=pypi pip install -e {sources}"
    return "pip install --force-reinstall --no-deps jax-dsv4, or pip install . in its sources"


@functools.cache
def load(name: str, platform: str) -> tuple[ctypes.CDLL | None, str]:
    """Loads a library and registers its handlers for `platform`.

    Returns:
      (library, where it was found) or (None, why it is absent).
    """
    path = find_library(name)
    if path is None:
        override = os.environ.get("JAX_DSV4_LIBRARY_DIR")
        elsewhere = f"is not in {override}, which JAX_DSV4_LIBRARY_DIR names"
        return None, f"{name}.so {elsewhere if override else f'was not built ({build_command()})'}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"
    if platform == "ROCM":
        directories = aiter_directory(), path.parent, cache_directory()
        library.dsv4_rocm_directories(*(os.fsencode(p) if p else b"" for p in directories))
        library.dsv4_rocm_gluon_directory(os.fsencode(gluon_directory()))
    for target in AITER_TARGETS + GLUON_TARGETS if platform == "ROCM" else TARGETS:
        stages = {"execute": jax.ffi.pycapsule(getattr(library, target))}
        for initialize in (f"{target}_initialize", "dsv4_initialize"):  # what must not happen while a graph is captured
            if hasattr(library, initialize):
                stages["initialize"] = jax.ffi.pycapsule(getattr(library, initialize))
        jax.ffi.register_ffi_target(target, stages, platform=platform)
    isa = os.environ.get("JAX_DSV4_CPU_ISA")
    if platform == "cpu" and isa:
        _checks.require(isa in CPU_ISAS, "jax_dsv4", "the variable JAX_DSV4_CPU_ISA", f"be one of {CPU_ISAS}", isa)
        name_cpu_isa(library, isa)
    return library, str(path)


def load_rocm() -> tuple[ctypes.CDLL | None, str]:
    """The ROCm handlers, which are told where AITER's kernels and our own are. Returns as `load` does."""
    return load("libdsv4_rocm", "ROCM")


def missing_amd_kernels(architecture: str) -> str:
    """Why our own kernels for AMD are absent, or "" where they are there."""
    library = find_library("libdsv4_rocm")
    own = library.with_name(f"dsv4_{architecture}.co") if library else None
    return "" if own and own.exists() else f"{own} was not built ({build_command()})"


def cache_directory() -> Path:
    """Where builds are kept: JAX_DSV4_CACHE_DIR, or jax_dsv4 in the user's cache directory."""
    if named := os.environ.get("JAX_DSV4_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jax_dsv4"


def built_plan_builder(architecture: str) -> Path:
    """Where `python -m jax_dsv4.build_aiter` puts AITER's plan builder; ffi/rocm/launch.cc looks there too."""
    return cache_directory() / f"aiter-{architecture}" / "libaiter_metadata.so"


def gluon_directory() -> Path:
    """Where `python -m jax_dsv4.build_aiter --heads` puts the variants of AITER's Gluon kernel."""
    return cache_directory() / "aiter-gluon-gfx950"


def aiter_plan_builder(architecture: str) -> Path | None:
    """AITER's plan builder, if it was built for an architecture. JAX_DSV4_PLANNER=own leaves it aside."""
    built = built_plan_builder(architecture)
    return built if os.environ.get("JAX_DSV4_PLANNER") != "own" and built.exists() else None


def aiter_directory() -> Path | None:
    """AITER's hsa directory: the one that JAX_DSV4_AITER_HSA names, or that of an installed amd-aiter, which is not imported."""
    if named := os.environ.get("JAX_DSV4_AITER_HSA"):
        return Path(named)
    spec = importlib.util.find_spec("aiter_meta")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (hsa := Path(location) / "hsa").is_dir():
            return hsa
    return None


class CpuIsa(NamedTuple):
    """The instruction set of the CPU kernels that run, and why it is this one."""

    name: str
    why: str


def cpu_isa(library: ctypes.CDLL) -> CpuIsa:
    """The choice for this process, for calls on bf16 numbers."""
    why = ctypes.c_char_p()
    isa = library.dsv4_cpu_isa(ctypes.byref(why))
    return CpuIsa(CPU_ISAS[isa], (why.value or b"").decode())


def choose_cpu_isa(library: ctypes.CDLL, vendor: str, isas: Iterable[str], named: str | None = None, amx_refused: bool = False) -> CpuIsa:
    """The choice on a processor of CPUID's `vendor` that has the instruction sets `isas`, where `named` is asked for.

    amx_refused: it has AMX as well, but the operating system does not permit it.
    """
    why, bits = ctypes.c_char_p(), sum(1 << CPU_ISAS.index(name) for name in {"generic", *isas})
    processor = vendor.encode(), ctypes.c_uint32(bits), ctypes.c_bool(amx_refused)
    isa = library.dsv4_cpu_choose(*processor, ctypes.c_int(_index(named)), ctypes.byref(why))
    return CpuIsa(CPU_ISAS[isa], (why.value or b"").decode())


def name_cpu_isa(library: ctypes.CDLL, name: str | None) -> None:
    """Asks for an instruction set in this process, as JAX_DSV4_CPU_ISA does; None asks for none."""
    library.dsv4_cpu_name_isa(ctypes.c_int(_index(name)))


def _index(isa: str | None) -> int:
    return -1 if isa is None else CPU_ISAS.index(isa)
