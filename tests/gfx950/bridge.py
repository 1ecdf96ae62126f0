"""Registers the ROCm handlers on platform cpu, where they drive the software gfx950. Test only; see xla_bridge.cc.

Where JAX's ROCm plugin is installed it runs what it can (fixture `rocm`). It loads the handlers once, for one architecture, one AITER and
one number of units, and puts workspaces side by side. So these stay here: AITER's kernels from another place than the process has them
from (a source tree), gfx942, absent or damaged files, corrupt plans, other numbers of units, and AITER's Gluon kernel. So does everything
on a machine without that plugin.
"""

import ctypes
import functools
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import pytest
import software_gpu
from compiled import compiled

from jax_dsv4 import _ffi
from jax_dsv4._implementations import aiter, aiter_gluon

HERE = pathlib.Path(__file__).parent
FFI = HERE.parents[1] / "ffi"
TARGETS = ("aiter_plan", "aiter_metadata_plan", "aiter_decode", "aiter_append", "aiter_gluon_decode", "packed_append")


def load_handlers(library: pathlib.Path, copy: pathlib.Path, hsa, own) -> ctypes.CDLL:
    """The handlers with these directories, from a copy: its process-wide state (HIP, the kernels found) is its own."""
    shutil.copy(library, copy)
    handlers = ctypes.CDLL(str(copy))
    handlers.dsv4_rocm_directories(*(os.fsencode(p) if p else b"" for p in (hsa, own, _ffi.cache_directory())))
    return handlers


@functools.cache
def load() -> ctypes.CDLL:
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{FFI}", "-ldl"]
    include = ["-isystem", jax.ffi.include_dir()]
    headers = [*FFI.glob("*/*.h"), *HERE.glob("*.h")]
    bridge = ctypes.CDLL(str(compiled("xla_bridge", [*command, *include], [HERE / "xla_bridge.cc"], headers, jax.__version__)))
    bridge.bridge_connect.restype = ctypes.c_char_p
    bridge.bridge_replayed.restype = ctypes.c_int64
    return bridge


@functools.cache
def register() -> None:
    for name in TARGETS:
        jax.ffi.register_ffi_target(f"dsv4_{name}", jax.ffi.pycapsule(getattr(load(), f"on_cpu_{name}")), platform="cpu")


def connect(handlers: pathlib.Path, gpu_library: pathlib.Path) -> ctypes.CDLL:
    """Sends calls to this library of handlers, over that GPU."""
    bridge = load()
    if reason := bridge.bridge_connect(os.fsencode(handlers), os.fsencode(gpu_library)):
        raise RuntimeError(reason.decode())
    register()  # XLA asks a target for its traits at once, and the answer is the handler's
    return bridge


def forget() -> None:
    """What was found on another device, and programs that were made for it."""
    aiter.choose_kernel.cache_clear()
    aiter_gluon.describe_device.cache_clear()
    jax.clear_caches()


def drive(
    monkeypatch: pytest.MonkeyPatch, implementation: Any, handlers: ctypes.CDLL, path: pathlib.Path, architecture: str = "gfx950"
) -> Iterator[ctypes.CDLL]:
    """For the time of a test an implementation is on platform cpu, and these handlers, of the library `path`, run over a software GPU of 8
    units. Yields the bridge (xla_bridge.cc)."""
    for name, value in (("ARCHITECTURE", architecture), ("UNITS", "8")):
        monkeypatch.setenv(f"GFX950_{name}", value)
    monkeypatch.setenv("JAX_DSV4_HIP_LIBRARY", str(software_gpu.library()))
    monkeypatch.setattr(_ffi, "load_rocm", lambda: (handlers, str(path)))
    monkeypatch.setattr(implementation, "platforms", ("cpu",))
    forget()
    connected = connect(path, software_gpu.library())
    connected.bridge_replay(0)
    yield connected
    connected.bridge_replay(0)
    forget()
