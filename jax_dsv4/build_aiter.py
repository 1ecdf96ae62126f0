"""Compiles what AITER has as source, from a source tree of August 2026 or later: `python -m jax_dsv4.build_aiter --source /path/to/aiter`.

AITER's own plan builder, for `implementation="aiter"`. It takes some minutes, once per AITER commit and architecture, and is never done
silently. Until it has been done, our own planner (ffi/common/plan.h) makes the plans; `jax_dsv4.implementations()` says which one is in
use. Needs ROCm's headers with hipcc, or with a clang++ that compiles for AMDGPU.

With `--heads`, AITER's Gluon kernel instead, for `implementation="aiter_gluon"`: some seconds for each variant. Needs `pip install triton`,
and neither ROCm nor a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

from jax_dsv4._ffi import built_plan_builder, cache_directory, gluon_directory
from jax_dsv4._gluon import ARCHITECTURE, Variant

PROGRESS_SECONDS = 10
# The sliding window alone, with a compression of 4, and with one of 128: blocks of 256 positions, compressed.
V4_BLOCK_SIZES = ((64,), (64, 64), (64, 2))


def commit_of(source: Path) -> str:
    """The tree's commit, or a digest of the sources where it is no git checkout or has been edited."""
    sources = source / "csrc/kernels/mla"
    git = ["git", "-C", str(source)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    clean = subprocess.run([*git, "status", "--porcelain", "csrc"], capture_output=True, text=True, check=False)
    if head.returncode == 0 and clean.returncode == 0 and not clean.stdout:
        return head.stdout.strip()[:12]
    digest = hashlib.sha256()
    for path in sorted([*sources.rglob("*.cu*"), *(source / "csrc/include").rglob("*.h")]):
        digest.update(path.read_bytes())
    return "sources-" + digest.hexdigest()[:12]


def find_compiler(rocm: Path | None) -> Path | None:
    roots = [p for p in (rocm, os.environ.get("ROCM_PATH"), "/opt/rocm") if p]
    candidates = [Path(root) / tool for root in roots for tool in ("bin/hipcc", "llvm/bin/clang++", "lib/llvm/bin/clang++")]
    on_path = [shutil.which(name) for name in ("hipcc", "amdclang++", "clang++-22", "clang++-21", "clang++")]
    return next((Path(p) for p in [*candidates, *on_path] if p and Path(p).exists()), None)


def command(source: Path, architecture: str, compiler: Path, rocm: Path | None, extra: list[str], out: Path) -> list[str]:
    here = Path(__file__).parent
    # The shim and its header are installed beside this file; in a checkout they are in ffi.
    ffi = here / "ffi" if (here / "ffi").exists() else here.parent / "ffi"
    return [
        str(compiler),
        *("-x", "hip", f"--offload-arch={architecture}", "-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
        *("-DENABLE_CK=0", "-D__HIP_PLATFORM_AMD__=1", "-DUSE_ROCM", f'-DJAX_DSV4_ARCHITECTURE="{architecture}"'),
        *(f"-I{source / 'csrc/include'}", f"-I{source / 'csrc/kernels/mla'}", f"-I{ffi}"),
        *([f"--rocm-path={rocm}"] if rocm else []),
        *extra,
        str(ffi / "rocm/aiter_metadata.hip"),
        # The HIP runtime is the one that the process has: its symbols are found when the library is loaded.
        *("-o", str(out), "-no-hip-rt", "-Wl,--unresolved-symbols=ignore-all"),
    ]


def build(source: Path, architecture: str, compiler: Path, rocm: Path | None = None, extra: list[str] | None = None) -> Path:
    """Compiles the builder into the cache, unless it is there, and makes it the one in use. Returns the library."""
    builder = source / "csrc/kernels/mla/metadata.cu"
    if not builder.is_file():
        raise SystemExit(f"{source} has no {builder.relative_to(source)}: --source must be an AITER source tree")
    if "aiter_tensor_t" not in builder.read_text():
        raise SystemExit(f"{source}: its plan builder is typed on torch::Tensor; an AITER of August 2026 or later is needed")
    current = built_plan_builder(architecture)
    kept = cache_directory() / f"aiter-{commit_of(source)}-{architecture}" / current.name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            out = Path(scratch) / current.name
            line = command(source, architecture, compiler, rocm, extra or [], out)
            print(" ".join(line), flush=True)
            start = time.monotonic()
            process = subprocess.Popen(line)
            while True:
                try:
                    status = process.wait(timeout=PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    print(f"compiling AITER's plan builder for {architecture}: {time.monotonic() - start:.0f} s", flush=True)
            if status:
                raise SystemExit(f"{compiler} failed with status {status}")
            os.replace(out, kept)
    put_in_use(kept.parent, current.parent)
    return kept


def put_in_use(kept: Path, current: Path) -> None:
    """Makes `current` a link to the directory `kept` beside it, in one step."""
    partial = current.with_name(f"{current.name}.{os.getpid()}")
    partial.symlink_to(kept.name, target_is_directory=True)
    os.replace(partial, current)


GLUON = "aiter.ops.triton._gluon_kernels.gfx950.attention.pa_decode_sparse"


def build_gluon(source: Path, variants: list[Variant]) -> list[Path]:
    """Compiles those variants that are not there, and makes the variants of these sources and this Triton the ones in use."""
    kernel_file = source / f"{GLUON.replace('.', '/')}.py"
    if not kernel_file.exists():
        raise SystemExit(f"{source} has no {kernel_file.relative_to(source)}; an AITER of August 2026 or later is needed")
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("AITER's Gluon kernel is compiled by Triton: pip install triton") from None
    # How it is compiled is in this file.
    digest = hashlib.sha256(kernel_file.read_bytes() + version.encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    current = gluon_directory()
    kept = current.with_name(f"{current.name}-{digest}")
    kept.mkdir(parents=True, exist_ok=True)
    put_in_use(kept, current)
    kernel = None
    for variant in variants:
        if variant.file() is None:
            kernel = kernel or gluon_kernel(source)
            start = time.monotonic()
            code, lds_bytes = compile_gluon(kernel, variant)
            with tempfile.TemporaryDirectory(dir=kept) as scratch:
                out = Path(scratch, f"{variant.name}-lds{lds_bytes}.co")
                out.write_bytes(code)
                os.replace(out, kept / out.name)
            print(f"{out.name}: {time.monotonic() - start:.1f} s", flush=True)
    return [file for variant in variants if (file := variant.file())]


def gluon_kernel(source: Path) -> Any:
    """The kernel's function. AITER's packages import torch; what the kernel's module needs of them does not."""
    packages = [GLUON.rsplit(".", depth)[0] for depth in range(1, GLUON.count(".") + 1)] + ["aiter.ops.triton.utils._triton"]
    for name in packages:
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["aiter.ops.triton.utils"] = types.ModuleType("aiter.ops.triton.utils")
    return importlib.import_module(GLUON)._pa_decode_sparse


def compile_gluon(kernel: Any, variant: Variant) -> tuple[bytes, int]:
    """The variant's code object, and the local memory that a launch must ask for.

    What is constant, and what the arguments are, is as in AITER's _pa_decode_sparse_gfx950_gluon; but all slots are valid ones.
    """
    latent, block_k, heads, splits = 512, 64, variant.heads, variant.splits
    constants = dict(
        scale=float(np.float32(variant.scale)),
        q_stride0=heads * latent,
        q_stride1=latent,
        out_stride0=0,  # a variant of two splits or more writes no output and reads no sink
        out_stride1=0,
        HAS_SINK=False,
        pm_stride0=splits * heads,
        pm_stride_s=heads,
        pa_stride0=splits * heads * latent,
        pa_stride_s=heads * latent,
        pa_stride_h=latent,
        num_heads=heads,
        HEAD_ALIGNED=heads % 16 == 0,
        HAS_EXTRA=len(variant.block_sizes) > 1,
        MAIN_IS_FP8=True,
        EXTRA_IS_FP8=True,
        MAIN_BLOCK_SIZE=variant.block_sizes[0],
        EXTRA_BLOCK_SIZE=variant.block_sizes[-1],
        NOPE_DIM=448,
        ROPE_DIM=64,
        HEAD_SIZE=latent,
        BLOCK_M=16,
        BLOCK_K=block_k,
        MFMA_K=16,
        NUM_SPLITS=splits,
        UNIFORM=False,
        USE_BUFFER_LOAD=not variant.wide,
        HAS_INVALID=False,
        FP8_FNUZ=False,
    )
    caches = {f"{scope}_cache{kind}_ptr": dtype for scope in ("main", "extra") for kind, dtype in (("", "*u8"), ("_bf16", "*bf16"))}
    aligned = {"q_ptr": "*bf16", **caches, "out_ptr": "*bf16", **{f"part_{part}_ptr": "*fp32" for part in ("m", "l", "acc")}}
    strides = {"main_cs0": "i32", "extra_cs0": "i32"}
    others = {"attn_sink_ptr": "*fp32", "main_num_rows": "i32", "extra_num_rows": "i32"}
    others |= {f"{scope}_{part}_ptr": "*i32" for scope in ("main", "extra") for part in ("indices", "indptr")}
    arguments = aligned | strides | others
    if set(kernel.arg_names) != set(arguments) | set(constants):
        raise SystemExit(f"AITER's kernel has other parameters than those known: {', '.join(kernel.arg_names)}")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    divisible = dict.fromkeys(aligned, 16) | dict.fromkeys(strides, variant.alignment)
    made = GluonASTSource(
        kernel,
        signature={name: arguments.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", divisible[name]]] for i, name in enumerate(kernel.arg_names) if name in divisible},
    )
    target = GPUTarget("hip", ARCHITECTURE, 64)
    compiled = triton.compile(made, target=target, options=dict(num_warps=block_k // 16, waves_per_eu=0))
    return compiled.asm["hsaco"], compiled.metadata.shared


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jax_dsv4.build_aiter", description=__doc__)
    parser.add_argument("--source", type=Path, default=os.environ.get("JAX_DSV4_AITER_SOURCE"), help="an AITER source tree")
    parser.add_argument("--architecture", default="gfx950")
    parser.add_argument("--compiler", type=Path, help="hipcc or clang++; default: ROCm's, then what is on the path")
    parser.add_argument("--rocm-path", type=Path, help="where HIP's headers are; default: the compiler's own idea")
    parser.add_argument("extra", nargs="*", help="flags for the compiler, after --")
    gluon = parser.add_argument_group("the Gluon kernel; a call that lacks a variant says which of these it needs")
    gluon.add_argument("--heads", type=int, nargs="+", help="query heads of a call on one device")
    gluon.add_argument("--scale", type=float, default=512**-0.5, help="of the scores")
    gluon.add_argument("--block-sizes", type=int, nargs="+", action="append", help="of each scope's cache; may be repeated; default: V4's")
    gluon.add_argument("--alignment", type=int, choices=(16, 8, 4, 2), default=16, help="of block strides, in bytes")
    gluon.add_argument("--wide", action="store_true", help="for caches of 2 GiB or more")
    arguments = parser.parse_args()
    if arguments.source is None:
        parser.error("--source is needed: git clone https://github.com/ROCm/aiter")
    try:
        run(parser, arguments)
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from None
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.heads:
        if min(arguments.heads) < 1:
            parser.error(f"--heads must be at least 1, got {min(arguments.heads)}")
        if wrong := [sizes for sizes in arguments.block_sizes or () if len(sizes) > 2 or min(sizes) < 1]:
            parser.error(f"--block-sizes must be one or two sizes of at least 1, got {' '.join(map(str, wrong[0]))}")
        if not 0 < arguments.scale < float("inf"):
            parser.error(f"--scale must be positive and finite, got {arguments.scale}")
        shapes = [(h, tuple(sizes)) for h in arguments.heads for sizes in arguments.block_sizes or V4_BLOCK_SIZES]
        asked = [Variant(h, arguments.scale, sizes, arguments.alignment, arguments.wide) for h, sizes in shapes]
        files = build_gluon(arguments.source, [v for variant in asked for v in variant.with_splits()])
        print(f"{len(files)} variants are in {gluon_directory()}")
        return
    compiler = arguments.compiler or find_compiler(arguments.rocm_path)
    if compiler is None:
        parser.error("no hipcc and no clang++ found: install ROCm, or name one with --compiler")
    library = build(arguments.source, arguments.architecture, compiler, arguments.rocm_path, arguments.extra)
    print(f"{library} is in use for {arguments.architecture}")


if __name__ == "__main__":
    main()
