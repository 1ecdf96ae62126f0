"""BUILD builds what ffi/CMakeLists.txt builds: the same libraries, sources and flags, whichever of the two was edited last."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("dsv4_plan", "dsv4_decode", "dsv4_append")
# Both sides choose flags by processor, so both are read as seen from one with the extra instruction sets and one without.
PROCESSORS = ("x86_64", "aarch64")

Library = dict[str, tuple[str, ...]]  # source, from the top of the repository -> the flags it is compiled with, in order


# --- CMake: an interpreter of the few commands that decide what is compiled, and how.

# Commands that change no source and no compile flag of ours. Any other unknown one is an error: it may do either.
CMAKE_IRRELEVANT = {
    *("cmake_minimum_required", "project", "enable_language", "check_language", "option", "message", "install"),
    *("find_package", "find_program", "find_path", "execute_process"),
    *("target_include_directories", "target_link_libraries", "set_property"),
    "add_subdirectory",  # ffi/cuda: what nvcc compiles is CMake's alone
}


@dataclasses.dataclass(frozen=True)
class Command:
    name: str
    args: tuple[str, ...]  # a quoted one keeps its quotes


def cmake_commands(text: str) -> list[Command]:
    tokens = re.findall(r'#[^\n]*|"[^"]*"|[()]|[^\s()"#]+', text)
    words = iter([token for token in tokens if not token.startswith("#")])
    commands = []
    for name in words:
        assert next(words) == "(", f"CMakeLists.txt: expected ( after {name}"
        args, depth = [], 1
        for word in words:
            depth += {"(": 1, ")": -1}.get(word, 0)
            if not depth:
                break
            args.append(word)
        commands.append(Command(name.lower(), tuple(args)))
    return commands


class CMake:
    """Runs CMakeLists.txt for one processor; afterwards `libraries` has what it would build.

    A condition on the processor, or on a variable that the file itself sets, is decided. Any other depends on the machine: all of its
    branches run, so that a library that needs an optional toolchain is seen.
    """

    def __init__(self, text: str, processor: str) -> None:
        self.variables: dict[str, list[str]] = {"CMAKE_SYSTEM_PROCESSOR": [processor], "CMAKE_CURRENT_SOURCE_DIR": ["ffi"]}
        self.functions: dict[str, tuple[list[str], list[Command]]] = {}
        self.sources: dict[str, list[str]] = {}
        self.target_flags: dict[str, list[str]] = {}
        self.source_flags: dict[str, list[str]] = {}
        self.run(cmake_commands(text))

    @property
    def libraries(self) -> dict[str, Library]:
        return {
            name: {
                f"ffi/{source}": (*self.standard_flags, *self.target_flags.get(name, []), *self.source_flags.get(source, []))
                for source in sources
            }
            for name, sources in self.sources.items()
        }

    @property
    def standard_flags(self) -> list[str]:
        """What CMake makes of CMAKE_CXX_* and CMAKE_VISIBILITY_*; extensions are on unless asked otherwise, hence gnu++."""
        assert "CMAKE_CXX_EXTENSIONS" not in self.variables, "teach standard_flags CMAKE_CXX_EXTENSIONS"
        return [
            *(f"-std=gnu++{n}" for n in self.variables.get("CMAKE_CXX_STANDARD", [])),
            *(f"-fvisibility={v}" for v in self.variables.get("CMAKE_CXX_VISIBILITY_PRESET", [])),
            *("-fvisibility-inlines-hidden" for v in self.variables.get("CMAKE_VISIBILITY_INLINES_HIDDEN", []) if v == "ON"),
        ]

    def expand(self, args: tuple[str, ...]) -> list[str]:
        def value(match: re.Match[str]) -> str:
            return ";".join(self.variables.get(match[1], []))

        values: list[str] = []
        for arg in args:
            text = re.sub(r"\$\{(\w+)\}", value, arg)
            values += [text[1:-1]] if arg.startswith('"') else [part for part in text.split(";") if part]
        return values

    def condition(self, args: tuple[str, ...]) -> bool | None:
        match args:
            case ("CMAKE_SYSTEM_PROCESSOR", "MATCHES", pattern):
                return re.search(pattern.strip('"'), self.variables["CMAKE_SYSTEM_PROCESSOR"][0]) is not None
            case (name,) if name in self.variables:
                return any(value not in ("", "OFF", "0") for value in self.variables[name])
            case _:
                return None

    def run(self, commands: list[Command]) -> None:
        todo: Iterator[Command] = iter(commands)
        branches: list[list[bool]] = []  # of each `if` that is open: does this branch run, was one decided to be the one
        for command in todo:
            if command.name in ("if", "elseif", "else"):
                if command.name == "if":
                    branches.append([True, False])
                taken = branches[-1][1]
                holds = None if command.name == "else" else self.condition(command.args)
                branches[-1] = [not taken and holds is not False, taken or holds is True]
            elif command.name == "endif":
                branches.pop()
            elif all(runs for runs, _ in branches):
                self.call(command, todo)

    def call(self, command: Command, following: Iterator[Command]) -> None:
        if command.name == "function":
            name, *parameters = command.args
            body = []
            for line in following:
                if line.name == "endfunction":
                    break
                body.append(line)
            self.functions[name.lower()] = (parameters, body)
            return
        args = self.expand(command.args)
        if command.name in self.functions:
            parameters, body = self.functions[command.name]
            outer = dict(self.variables)
            self.variables.update({name: [value] for name, value in zip(parameters, args, strict=False)}, ARGN=args[len(parameters) :])
            self.run(body)
            self.variables = outer
            return
        match command.name, args:
            case "set", [name, *values]:
                self.variables[name] = values[: values.index("CACHE")] if "CACHE" in values else values
            case "list", ["APPEND", name, *values]:
                self.variables[name] = self.variables.get(name, []) + values
            case "add_library", [name, "MODULE" | "SHARED", *sources]:
                self.sources[name] = sources
            case "target_sources", [name, "PRIVATE", *sources]:
                self.sources[name] = self.sources[name] + sources
            case "target_compile_options", [name, "PRIVATE", *flags]:
                self.target_flags[name] = self.target_flags.get(name, []) + flags
            case "set_source_files_properties", [*sources, "PROPERTIES", "COMPILE_OPTIONS", flags]:
                self.source_flags.update({source: flags.split(";") for source in sources})
            case "set_target_properties", [_, "PROPERTIES", "PREFIX", ""]:  # Bazel's target has the whole file name
                pass
            case name, _ if name not in CMAKE_IRRELEVANT:
                raise AssertionError(f"tests/test_build_files.py does not know what {name}({' '.join(args)}) compiles: teach it")


# --- Bazel: BUILD is Python but for the functions it calls.

BAZEL_ATTRIBUTES = frozenset(
    {"srcs", "hdrs", "textual_hdrs", "copts", "deps", "includes", "visibility", "linkshared", "linkstatic", "alwayslink"}
)


class Bazel:
    """Runs BUILD for one processor; afterwards `libraries` has what it would build."""

    def __init__(self, text: str, processor: str) -> None:
        self.targets: dict[str, dict[str, Any]] = {}

        def rule(*, name: str, **attributes: Any) -> None:
            unknown = attributes.keys() - BAZEL_ATTRIBUTES
            assert not unknown, f"tests/test_build_files.py does not know what {unknown} of {name} in BUILD compile: teach it"
            self.targets[name] = attributes

        def select(branches: dict[str, Any]) -> Any:
            return next((value for label, value in branches.items() if label.endswith(f":{processor}")), branches["//conditions:default"])

        def glob(patterns: list[str]) -> list[str]:
            return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))

        def nothing(*_: Any, **__: Any) -> None:
            pass

        functions: dict[str, Callable[..., Any]] = {"cc_library": rule, "cc_binary": rule, "select": select, "glob": glob}
        functions |= dict.fromkeys(("load", "package", "exports_files"), nothing)
        exec(compile(text, "BUILD", "exec"), dict(functions))

    @property
    def libraries(self) -> dict[str, Library]:
        shared = [name for name, attributes in self.targets.items() if attributes.get("linkshared")]
        return {name.removesuffix(".so"): self.compiled(name) for name in shared}

    def compiled(self, name: str) -> Library:
        attributes = self.targets[name]
        result: Library = dict.fromkeys(attributes.get("srcs", []), tuple(attributes.get("copts", [])))
        for label in attributes.get("deps", []):
            if label.startswith(":"):
                dependency = self.compiled(label[1:])
                assert not result.keys() & dependency.keys(), f"BUILD: {name} compiles a source twice"
                result |= dependency
        return result


# --- The tests.


@pytest.mark.parametrize("processor", PROCESSORS)
def test_same_libraries_sources_and_flags(processor: str) -> None:
    cmake = CMake((ROOT / "ffi/CMakeLists.txt").read_text(), processor).libraries
    bazel = Bazel((ROOT / "BUILD").read_text(), processor).libraries
    assert "libdsv4_cpu" in cmake  # what is read is not empty

    def lines(libraries: dict[str, Library]) -> set[str]:
        return {f"{name}: {source} {' '.join(flags)}" for name, library in libraries.items() for source, flags in library.items()}

    only_cmake, only_bazel = (sorted(lines(a) - lines(b)) for a, b in ((cmake, bazel), (bazel, cmake)))
    assert bazel == cmake, "\n".join([f"on {processor}, only CMakeLists.txt has", *only_cmake, "only BUILD has", *only_bazel])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        pytest.param("ffi/CMakeLists.txt", "cpu/append.cc", "cpu/append.cc cpu/new.cc", id="cmake-source"),
        pytest.param("ffi/CMakeLists.txt", "-Wextra -O3", "-Wextra -O2", id="cmake-library-flag"),
        pytest.param("ffi/CMakeLists.txt", "-mfma ", "", id="cmake-file-flag"),
        pytest.param("ffi/CMakeLists.txt", "STANDARD 17", "STANDARD 20", id="cmake-standard"),
        pytest.param("ffi/CMakeLists.txt", "MODULE ${ARGN}", "MODULE x.cc ${ARGN}", id="cmake-all"),
        pytest.param("BUILD", '"ffi/cpu/append.cc",', "", id="bazel-source"),
        pytest.param("BUILD", '"-O3",', "", id="bazel-library-flag"),
        pytest.param("BUILD", '"-mfma",', "", id="bazel-file-flag"),
        pytest.param("BUILD", '":cpu_avx2",', "", id="bazel-instruction-set"),
    ],
)
def test_an_edit_of_one_side_is_seen(file: str, old: str, new: str) -> None:
    texts = {name: (ROOT / name).read_text() for name in ("ffi/CMakeLists.txt", "BUILD")}
    assert old in texts[file]
    texts[file] = texts[file].replace(old, new)
    assert CMake(texts["ffi/CMakeLists.txt"], "x86_64").libraries != Bazel(texts["BUILD"], "x86_64").libraries


def test_instruction_set_flags_are_for_their_processor_only() -> None:
    library = Bazel((ROOT / "BUILD").read_text(), "aarch64").libraries["libdsv4_cpu"]
    assert not [flag for flags in library.values() for flag in flags if flag.startswith("-m")]


def test_every_header_is_declared() -> None:
    targets = Bazel((ROOT / "BUILD").read_text(), "x86_64").targets.values()
    declared = {file for target in targets for file in (*target.get("hdrs", []), *target.get("textual_hdrs", []))}
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
