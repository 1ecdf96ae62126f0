"""Registers the ROCm handlers on platform cpu, where they drive the software gfx950. Test only; see xla_bridge.cc."""

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess

import jax
import software_gpu

ROOT = pathlib.Path(__file__).parents[2]
TARGETS = ("plan", "metadata_plan", "decode", "append")


def build(name: str, sources, flags=()) -> pathlib.Path:
    """A shared library of these sources, compiled once per state of them and of every header that they may include."""
    headers = [*(ROOT / "ffi").glob("*/*.h"), *pathlib.Path(__file__).parent.glob("*.h")]
    command = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", *flags]
    include = [f"-I{ROOT / 'ffi'}", "-isystem", jax.ffi.include_dir()]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted([*sources, *headers])) + " ".join([*command, jax.__version__]).encode())
    out = software_gpu.cache_directory() / f"{name}-{digest.hexdigest()[:16]}" / f"{name}.so"
    with software_gpu.building(out):
        if out.exists():
            return out
        partial = out.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *command, *include, *map(str, sources), "-ldl", "-o", str(partial)], check=True)
        os.replace(partial, out)
    return out


def load_handlers(library: pathlib.Path, copy: pathlib.Path, hsa, own, builder=None) -> ctypes.CDLL:
    """The handlers with these directories, from a copy: its process-wide state (HIP, the kernels found) is its own."""
    shutil.copy(library, copy)
    handlers = ctypes.CDLL(str(copy))
    handlers.dsv4_rocm_directories(*(os.fsencode(p) if p else b"" for p in (hsa, own, builder)))
    return handlers


@functools.cache
def load() -> ctypes.CDLL:
    bridge = ctypes.CDLL(str(build("xla_bridge", [pathlib.Path(__file__).parent / "xla_bridge.cc"])))
    bridge.bridge_connect.restype = ctypes.c_char_p
    bridge.bridge_replayed.restype = ctypes.c_int64
    return bridge


@functools.cache
def register() -> None:
    for name in TARGETS:
        jax.ffi.register_ffi_target(f"dsv4_aiter_{name}", jax.ffi.pycapsule(getattr(load(), f"on_cpu_{name}")), platform="cpu")


def connect(handlers: pathlib.Path, gpu_library: pathlib.Path) -> ctypes.CDLL:
    """Sends calls to this library of handlers, over that GPU."""
    bridge = load()
    if reason := bridge.bridge_connect(os.fsencode(handlers), os.fsencode(gpu_library)):
        raise RuntimeError(reason.decode())
    register()  # XLA asks a target for its traits at once, and the answer is the handler's
    return bridge
