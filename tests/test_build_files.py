"""BUILD compiles what ffi/CMakeLists.txt compiles: the same sources with the same flags, whichever of the two was edited last."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from build_files import ROOT, Flags, cmake

TARGETS = ("dsv4_plan", "dsv4_decode", "dsv4_append")


def bazel_targets(processor: str) -> dict[str, dict[str, Any]]:
    """BUILD is Python but for the functions that it calls."""
    targets: dict[str, dict[str, Any]] = {}

    def rule(*, name: str, **attributes: Any) -> None:
        targets[name] = attributes

    def select(branches: dict[str, Any]) -> Any:
        return branches.get(f"@platforms//cpu:{processor}", branches["//conditions:default"])

    def glob(patterns: list[str]) -> list[str]:
        return [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)]

    functions = {"cc_library": rule, "cc_binary": rule, "select": select, "glob": glob}
    exec((ROOT / "BUILD").read_text(), functions | dict.fromkeys(("load", "package"), lambda *_, **__: None))
    return targets


def bazel(processor: str = "x86_64") -> dict[str, Flags]:
    targets = bazel_targets(processor)

    def compiled(target: dict[str, Any]) -> Flags:
        flags = {source: target["copts"] for source in target.get("srcs", [])}
        for name in target.get("deps", []):
            flags |= compiled(targets.get(name.removeprefix(":"), {}))
        return flags

    return {name.removesuffix(".so"): compiled(target) for name, target in targets.items() if name.endswith(".so")}


def test_same_libraries_sources_and_flags() -> None:
    assert bazel() == cmake()


def test_instruction_set_flags_are_for_their_processor_only() -> None:
    assert not [flag for flags in bazel("aarch64")["libdsv4_cpu"].values() for flag in flags if flag.startswith("-m")]


def test_every_header_is_declared() -> None:
    declared = {file for target in bazel_targets("x86_64").values() for file in (*target.get("hdrs", []), *target.get("textual_hdrs", []))}
    # Bazel compiles each source where it sees the declared headers only.
    assert declared >= {str(path.relative_to(ROOT)) for part in ("common", "cpu") for path in (ROOT / "ffi" / part).glob("*.h")}


@pytest.mark.skipif(
    shutil.which("bazel") is None, reason="no bazel on PATH: see bazel.build, or apt install bazel-bootstrap bazel-rules-java"
)
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="the FFI headers come from jaxlib: pip install jax")
def test_bazel_builds_the_library() -> None:
    def bazel(*arguments: str) -> str:
        command = ["bazel", "--max_idle_secs=60", *arguments]  # its server would stay for hours
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-8000:]}"
        return done.stdout.strip()

    # No bazel-* links in the source tree: pytest would follow them.
    options = ["-c", "opt", "--symlink_prefix=/", f"--repo_env=JAX_DSV4_PYTHON={sys.executable}"]
    debian_rules_java = Path("/usr/share/bazel/rules/java")
    if bazel("--version") == "bazel no_version" and debian_rules_java.exists():  # Debian's would download them
        options.append(f"--override_repository=rules_java={debian_rules_java}")
    bazel("build", *options, "//:libdsv4_cpu.so")
    library = ctypes.CDLL(f"{bazel('info', *options, 'bazel-bin')}/libdsv4_cpu.so")
    for target in TARGETS:
        assert getattr(library, target), target
