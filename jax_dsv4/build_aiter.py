"""Compiles AITER's own plan builder for this machine: `python -m jax_dsv4.build_aiter --source /path/to/aiter`.

It takes some minutes, once per AITER commit and architecture, and is never done silently. Until it has been done, our own planner
(ffi/common/plan.h) makes the plans; `jax_dsv4.implementations()` says which one is in use. Needs an AITER source tree of August 2026 or
later, and ROCm's headers with hipcc, or with a clang++ that compiles for AMDGPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from jax_dsv4._ffi import built_plan_builder, cache_directory

PROGRESS_SECONDS = 10


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
        *("-DENABLE_CK=0", "-D__HIP_PLATFORM_AMD__=1", "-DUSE_ROCM"),
        *(f"-I{source / 'csrc/include'}", f"-I{source / 'csrc/kernels/mla'}", f"-I{ffi}"),
        *([f"--rocm-path={rocm}"] if rocm else []),
        *extra,
        str(ffi / "rocm/aiter_metadata.hip"),
        # The HIP runtime is the one that the process has: its symbols are found when the library is loaded.
        *("-o", str(out), "-no-hip-rt", "-Wl,--unresolved-symbols=ignore-all"),
    ]


def build(source: Path, architecture: str, compiler: Path, rocm: Path | None = None, extra: list[str] | None = None) -> Path:
    """Compiles the builder into the cache, unless it is there, and makes it the one in use. Returns the library."""
    if "aiter_tensor_t" not in (source / "csrc/kernels/mla/metadata.cu").read_text():
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
    partial = current.parent.with_name(f"{current.parent.name}.{os.getpid()}")
    partial.symlink_to(kept.parent.name, target_is_directory=True)
    os.replace(partial, current.parent)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jax_dsv4.build_aiter", description=__doc__)
    parser.add_argument("--source", type=Path, default=os.environ.get("JAX_DSV4_AITER_SOURCE"), help="an AITER source tree")
    parser.add_argument("--architecture", default="gfx950")
    parser.add_argument("--compiler", type=Path, help="hipcc or clang++; default: ROCm's, then what is on the path")
    parser.add_argument("--rocm-path", type=Path, help="where HIP's headers are; default: the compiler's own idea")
    parser.add_argument("extra", nargs="*", help="flags for the compiler, after --")
    arguments = parser.parse_args()
    if arguments.source is None:
        parser.error("--source is needed: git clone https://github.com/ROCm/aiter")
    compiler = arguments.compiler or find_compiler(arguments.rocm_path)
    if compiler is None:
        parser.error("no hipcc and no clang++ found: install ROCm, or name one with --compiler")
    library = build(arguments.source, arguments.architecture, compiler, arguments.rocm_path, arguments.extra)
    print(f"{library} is in use for {arguments.architecture}")


if __name__ == "__main__":
    main()
