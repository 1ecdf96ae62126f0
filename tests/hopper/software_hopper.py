"""Builds the kernels of ffi/cuda for this machine's processor, over the machine of this directory, and launches them on NumPy arrays."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_dsv4._work import plan_capacity
from jax_dsv4.cache import LAYOUTS

HERE = Path(__file__).parent
FFI = HERE.parents[1] / "ffi"
FLAGS = ("-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas")
MOST_WORKERS = 132
CLUSTER_MISTAKES = ("no_fence", "no_cluster_wait", "no_wait", "plain")  # of cluster.cc, bits 0, 1, ...


def missing() -> str:
    """Why the software Hopper cannot be built here, or an empty string."""
    return "" if shutil.which("g++") else "the software Hopper needs g++ (C++20)"


def as_cpp(source: str) -> str:
    """CUDA's own syntax as calls."""
    source = source.replace("extern __shared__ __align__(1024) uint8_t memory[];", "uint8_t* const memory = ::hopper::block_memory();")
    source, launches = re.subn(
        r"([\w.]+(?:<\w+>)?)<<<(.*?)>>>\((\w+)\);", r"::hopper::launch_kernel(\2, [&] { \1(\3); });", source, flags=re.DOTALL
    )
    assert launches or "<<<" not in source
    return source


@contextlib.contextmanager
def _building(out: Path) -> Iterator[None]:
    """One process at a time, so that pytest-xdist's workers do not all compile the same thing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def library(sanitize: str = "", edit: tuple[str, str, str] | None = None) -> Path:
    """Compiles the kernels once per state of the sources (20 s) and returns the library's path.

    sanitize: "thread", "address" or "address,undefined". What the machine itself does is not watched by the former, only what kernels do.
    edit: a file of ffi/cuda, a text that it has once or more, and what to compile instead.
    """
    inputs = [*sorted(HERE.rglob("*.h")), *sorted(HERE.glob("*.cc")), *sorted(FFI.glob("c*/*.h")), *sorted(FFI.glob("cuda/*.cu"))]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in inputs) + repr((FLAGS, sanitize, edit)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("JAX_DSV4_TEST_CACHE", Path(tempfile.gettempdir()) / "jax_dsv4_tests"))
    out = cache / f"hopper-{digest}" / "libhopper.so"
    with _building(out):
        if not out.exists():
            with tempfile.TemporaryDirectory() as scratch:
                _build(Path(scratch), sanitize, edit)
                # Renamed into place, so that a run beside this one never loads half a library.
                partial = out.with_suffix(f".{os.getpid()}")
                shutil.copy(Path(scratch) / "libhopper.so", partial)
                os.replace(partial, out)
    return out


def _build(scratch: Path, sanitize: str, edit: tuple[str, str, str] | None) -> None:
    for folder in ("common", "cuda"):
        shutil.copytree(FFI / folder, scratch / "ffi" / folder)
    (scratch / "ffi/cuda/sm90.h").unlink()  # there is one here
    if edit:
        edited = scratch / "ffi/cuda" / edit[0]
        assert edit[1] in edited.read_text(), f"{edit[0]} has no {edit[1]!r}"
        edited.write_text(edited.read_text().replace(*edit[1:]))
    watch = ["-O1", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if sanitize else ["-O2"]
    strict = ["-Wall", "-Wextra", "-Werror"]
    sources = [
        (HERE / "entry.cc", watch),
        (HERE / "cluster.cc", watch),
        (HERE / "machine.cc", strict + (["-O2"] if sanitize == "thread" else watch)),
    ]
    for source in (*scratch.glob("ffi/cuda/*.cu"), *scratch.glob("ffi/cuda/*.h")):
        source.write_text(as_cpp(source.read_text()))
    kernels = scratch / "kernels.cc"  # in one piece: their headers take g++ longer than they do
    kernels.write_text("".join(f'#include "cuda/{source.name}"\n' for source in sorted(scratch.glob("ffi/cuda/*.cu"))))
    sources.append((kernels, watch))
    objects = [scratch / f"{path.stem}.o" for path, _ in sources]
    compiling = [
        subprocess.Popen(
            ["g++", *FLAGS, *flags, f"-I{HERE}", f"-I{scratch}/ffi", "-include", "cuda_runtime.h", "-c", str(path), "-o", str(to)]
        )
        for (path, flags), to in zip(sources, objects)
    ]
    codes = [process.wait() for process in compiling]
    if any(codes):
        raise RuntimeError("the kernels did not compile for this machine; g++ says why above")
    subprocess.run(["g++", *watch, "-shared", "-o", str(scratch / "libhopper.so"), *map(str, objects)], check=True)


I32, I64, F32, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
PLAN_ARRAYS = ("kv_lengths", "work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")
PLAN_SIZES = ("workers", "max_items", "max_partials")


def _struct(*fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type("Struct", (ctypes.Structure,), {"_fields_": list(fields)})


# ffi/common/params.h and plan.h
_Cache = _struct(
    *(("data", POINTER), ("num_blocks", I64), ("block_stride_bytes", I64), ("block_size", I32), ("layout", I32)),
    *(("scales_begin", I64), ("row_pitch", I32), ("scale_pitch", I32)),
)
_Scope = _struct(("cache", _Cache), ("indices", POINTER), ("lengths", POINTER), ("topk", I32))
_Plan = _struct(*((name, POINTER) for name in PLAN_ARRAYS), *((name, I32) for name in PLAN_SIZES))
_PlanParams = _struct(
    *(("lengths", POINTER * 2), ("topk", I32 * 2), ("tokens", I32), ("workers", I32), ("active_workers", I32)),
    *(("granularity", I32), ("overhead", I32), ("cut_cost", I32), ("segment", I32), ("max_items", I32), ("max_partials", I32)),
    *((name, POINTER) for name in PLAN_ARRAYS),
)
_DecodeParams = _struct(
    *(("q", POINTER), ("sink", POINTER), ("scopes", _Scope * 2), ("plan", _Plan), ("out", POINTER), ("lse", POINTER)),
    *(("partial_out", POINTER), ("partial_lse", POINTER), ("counters", POINTER)),
    *(("tokens", I32), ("heads", I32), ("scale", F32), ("q_dtype", I32), ("out_dtype", I32)),
    ("batch_invariant", ctypes.c_bool),
)
_AppendParams = _struct(
    *(("latents", POINTER), ("slots", POINTER), ("cache", _Cache), ("data_out", POINTER), ("count", I64), ("dtype", I32))
)


class Cache(NamedTuple):
    data: np.ndarray  # [blocks, stride] uint8
    block_size: int
    layout: str = "fp8_ds_mla"
    arrangement: str | None = None


class Scope(NamedTuple):
    cache: Cache
    indices: np.ndarray  # [tokens, topk] int32
    lengths: np.ndarray  # [tokens] int32


class Plan(NamedTuple):
    arrays: tuple[np.ndarray, ...]  # PLAN_ARRAYS
    workers: int


class KernelError(RuntimeError):
    """A launch failed: threads that wait for ever, or something that the machine does not allow."""


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _at(array: np.ndarray | None) -> int | None:
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.ctypes.data


class SoftwareHopper:
    """processors: multiprocessors of the device. schedule: 0, or a seed of the order in which threads run."""

    def __init__(self, processors: int = MOST_WORKERS, schedule: int = 0, path: Path | None = None):
        self.lib = ctypes.CDLL(str(path or library()))
        self.lib.hopper_error.restype = ctypes.c_char_p
        assert self.lib.hopper_options(processors, schedule) == 0
        self.processors = processors
        sizes = (ctypes.c_size_t * 3)()
        self.lib.hopper_sizes(sizes)
        assert list(sizes) == [ctypes.sizeof(s) for s in (_PlanParams, _DecodeParams, _AppendParams)], "the structs differ from params.h"

    def _call(self, name: str, params: ctypes.Structure) -> None:
        code = getattr(self.lib, f"hopper_{name}")(ctypes.byref(params))
        if code:
            raise KernelError(f"{name}: {code}, {self.lib.hopper_error().decode()}")

    def plan(
        self, scopes: Sequence[Scope], heads: int, granularity: int = 64, overhead: int = 2, cut_cost: int = 0, segment: int = 0
    ) -> Plan:
        """With tokens cut wherever they can be, for what that takes is to be seen; native.py cuts fewer."""
        tokens, workers = len(scopes[0].lengths), self.processors
        segments = -(-sum(s.indices.shape[1] for s in scopes) // (segment * granularity)) if segment else 1
        items, partials = plan_capacity(tokens, workers, segments)
        shapes = ((tokens,), (workers + 1,), (items, 8), (tokens + 1,), (tokens, 2), (partials,))
        arrays = tuple(np.full(shape, -7, np.int32) for shape in shapes)
        params = _PlanParams(
            (POINTER * 2)(*(_at(s.lengths) for s in scopes)),
            (I32 * 2)(*(s.indices.shape[1] for s in scopes)),
            *(tokens, workers, max(1, workers // -(-heads // 64)), granularity, overhead, cut_cost, segment, items, partials),
            *map(_at, arrays),
        )
        self._call("plan", params)
        return Plan(arrays, workers)

    def decode(
        self,
        q: np.ndarray,  # [tokens, heads, 512] bf16, as uint16
        scopes: Sequence[Scope],
        sink: np.ndarray | None,
        scale: float,
        plan: Plan,
        float32_out: bool = False,
        batch_invariant: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """-> out (bf16 as uint16, or float32), lse."""
        tokens, heads, _ = q.shape
        partials = len(plan.arrays[-1])
        out = np.full(q.shape, np.nan, np.float32) if float32_out else np.full(q.shape, 0x7FC0, np.uint16)
        lse = np.full((tokens, heads), np.nan, np.float32)
        partial_out = np.full((partials, -(-heads // 8) * 8, 512), np.nan, np.float32)
        partial_lse = np.full((partials, heads), np.nan, np.float32)
        absent = _Scope(_Cache(None, 0, 584, 1), None, None, 0)
        params = _DecodeParams(
            *(_at(q), _at(sink)),
            (_Scope * 2)(*[*(_Scope(_cache(s.cache), _at(s.indices), _at(s.lengths), s.indices.shape[1]) for s in scopes), absent][:2]),
            _Plan(*map(_at, plan.arrays), plan.workers, len(plan.arrays[2]), partials),
            *(_at(out), _at(lse), _at(partial_out), _at(partial_lse), None),
            *(tokens, heads, scale, 0, int(float32_out), batch_invariant),
        )
        self._call("decode", params)
        return out, lse

    def append(self, cache: Cache, latents: np.ndarray, slots: np.ndarray) -> Cache:
        """latents: [count, 512] float32, or bf16 as uint16."""
        written = cache._replace(data=cache.data.copy())
        params = _AppendParams(_at(latents), _at(slots), _cache(written), _at(written.data), len(slots), int(latents.dtype == np.float32))
        self._call("append", params)
        return written

    def neighbours(self, clusters: int, blocks: int, mistake: str = "") -> np.ndarray:
        """cluster.cc, with one of CLUSTER_MISTAKES. -> [clusters, blocks, 64]: what the block before has sent, its threads' numbers."""
        out = np.full((clusters, blocks, 64), -1, np.float32)
        mistakes = 1 << CLUSTER_MISTAKES.index(mistake) if mistake else 0
        if code := self.lib.hopper_neighbours(mistakes, clusters, blocks, POINTER(_at(out))):
            raise KernelError(f"neighbours: {code}, {self.lib.hopper_error().decode()}")
        return out


def _cache(cache: Cache) -> ctypes.Structure:
    layout = LAYOUTS[cache.layout]
    slot, row, scales = layout.token_bytes, layout.row_bytes, layout.scale_bytes
    places = (row, slot, slot) if cache.arrangement == "inline" else (cache.block_size * row, row, scales)
    return _Cache(_at(cache.data), *cache.data.shape, cache.block_size, layout.code, *places)
