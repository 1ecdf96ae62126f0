"""`python -m jax_dsv4.build_aiter` with a compiler that only pretends; what the real one makes is tested in test_plans.py."""

import os
import subprocess
import sys
import types

import aiter_kernel
import pytest

from jax_dsv4 import _ffi, _gluon, build_aiter

COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
echo library > "$2"
exit {status}
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(status, new_source) runs the command; -> (exit code, what it printed, the compiler's command lines so far)."""
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(tmp_path / "cache"))
    source, compiler, log = tmp_path / "aiter", tmp_path / "clang++", tmp_path / "log"
    (source / "csrc/kernels/mla").mkdir(parents=True)
    log.touch()

    def run(status=0, text="void get_mla_metadata_v1(aiter_tensor_t&);", tree=source):
        if tree is source:
            (source / "csrc/kernels/mla/metadata.cu").write_text(text)
        compiler.write_text(COMPILER.format(log=log, status=status))
        compiler.chmod(0o755)
        command = [sys.executable, "-m", "jax_dsv4.build_aiter", "--source", str(tree), "--compiler", str(compiler), "--", "-g1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    return run


def test_builds_once_per_state_of_the_sources(build):
    assert _ffi.aiter_plan_builder("gfx950") is None
    code, text, lines = build()
    assert code == 0
    first = _ffi.aiter_plan_builder("gfx950")
    assert first.read_text() == "library\n"
    assert f"{first.resolve()} is in use for gfx950" in text
    (line,) = lines
    assert f"{line}\n" in text  # what is compiled, and how, is shown
    for flag in ("--offload-arch=gfx950", '-DJAX_DSV4_ARCHITECTURE="gfx950"', "-fvisibility=hidden", "-g1", "aiter_metadata.hip"):
        assert flag in line
    assert len(build()[2]) == 1
    first = first.resolve()
    assert len(build(text="void another(aiter_tensor_t&);")[2]) == 2
    assert _ffi.aiter_plan_builder("gfx950").resolve() != first
    assert len(build()[2]) == 2  # back to the first, which was kept
    assert _ffi.aiter_plan_builder("gfx950").resolve() == first


def test_a_failed_compilation_leaves_nothing(build):
    code, text, _ = build(status=3)
    assert code != 0
    assert "failed with status 3" in text
    assert _ffi.aiter_plan_builder("gfx950") is None


def test_sources_typed_on_torch_are_refused(build):
    """As those in amd-aiter's wheel of 2025 are."""
    reason = "its plan builder is typed on torch::Tensor; an AITER of August 2026 or later is needed"
    code, text, lines = build(text="void get_mla_metadata_v1(const torch::Tensor&);")
    assert (code != 0, lines) == (True, [])
    assert reason in text
    if (wheel := aiter_kernel.wheel_directory()) is not None:
        assert reason in build(tree=wheel.parent)[1]


def test_progress_is_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build_aiter, "PROGRESS_SECONDS", 0.1)
    (tmp_path / "csrc/kernels/mla").mkdir(parents=True)
    (tmp_path / "csrc/kernels/mla/metadata.cu").write_text("aiter_tensor_t")
    compiler = tmp_path / "clang++"
    compiler.write_text(COMPILER.format(log="/dev/null", status=0).replace("exit", "sleep 0.5; exit"))
    compiler.chmod(0o755)
    build_aiter.build(tmp_path, "gfx950", compiler)
    assert capfd.readouterr().out.count("compiling AITER's plan builder for gfx950: ") >= 2


def test_other_parameters_of_the_gluon_kernel_are_refused():
    kernel = types.SimpleNamespace(arg_names=["q_ptr", "temperature"])
    with pytest.raises(SystemExit, match="AITER's kernel has other parameters than those known: q_ptr, temperature"):
        build_aiter.compile_gluon(kernel, _gluon.Variant(16, 512**-0.5, (64,)))
