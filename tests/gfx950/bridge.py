"""Registers the ROCm handlers on platform cpu, where they drive the software gfx950. Test only; see xla_bridge.cc."""

import ctypes
import functools
import os
import pathlib
import shutil

import jax
from compiled import compiled

HERE = pathlib.Path(__file__).parent
FFI = HERE.parents[1] / "ffi"
TARGETS = ("aiter_plan", "aiter_metadata_plan", "aiter_decode", "aiter_append", "aiter_gluon_decode", "packed_append")


def load_handlers(library: pathlib.Path, copy: pathlib.Path, hsa, own, builder=None) -> ctypes.CDLL:
    """The handlers with these directories, from a copy: its process-wide state (HIP, the kernels found) is its own."""
    shutil.copy(library, copy)
    handlers = ctypes.CDLL(str(copy))
    handlers.dsv4_rocm_directories(*(os.fsencode(p) if p else b"" for p in (hsa, own, builder)))
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
