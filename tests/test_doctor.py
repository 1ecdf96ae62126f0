"""The command that says what is here and whether it works."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import io_callback
from marks import needs_cpu

import jax_dsv4 as dsv4
from jax_dsv4 import doctor, reference
from jax_dsv4._implementations import REGISTRY
from jax_dsv4._implementations.interface import Availability


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.0)


@needs_cpu
def test_json(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["versions"]["jax-dsv4"] == dsv4.__version__
    assert {name: (each["available"], each["detail"]) for name, each in report["implementations"].items()} == dsv4.implementations()
    for name in ("cpu", "xla"):
        (test,) = report["implementations"][name]["self_tests"]
        assert test["runs_alike"]
        assert 0 < test["out_error"] < 0.01
        assert test["lse_error"] < 1e-4
        assert test["us"] > 0


@needs_cpu
def test_one_screen(capsys):
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    for name, (available, detail) in dsv4.implementations().items():
        (line,) = (line for line in lines if line.startswith(name + " "))
        assert line.split()[1] == ("yes" if available else "no")
        assert line.endswith(detail[:60]) or detail[:20] in line


def test_a_wrong_result_fails(monkeypatch, capsys):
    decode = reference.decode
    monkeypatch.setattr(reference, "decode", lambda *operands: [np.roll(x, 1, axis=1) for x in decode(*operands)])
    assert doctor.main([]) == 1
    assert "WRONG: fp8_ds_mla, 64 heads" in capsys.readouterr().out


@needs_cpu
def test_runs_that_differ_fail(monkeypatch):
    """By as little as they may."""
    decode, runs = dsv4.sparse_mla_decode, itertools.count()

    def unsteady(*operands, **options):
        out, lse = decode(*operands, **options)
        noise = io_callback(lambda: np.float32(1e-5 * (next(runs) == 3)), jax.ShapeDtypeStruct((), np.float32))
        return out, lse + noise

    monkeypatch.setattr(dsv4, "sparse_mla_decode", unsteady)
    test = doctor.self_test("cpu", "fp8_ds_mla", 16)
    assert (test["runs_alike"], test["ok"]) == (False, False)
    assert test["lse_error"] < 1e-4
    assert "5 runs NOT alike" in doctor.verdict(test)


def test_an_exception_fails(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "self_test", fail)
    assert doctor.main([]) == 1
    assert "FAILED: fp8_ds_mla, 64 heads: RuntimeError: no such thing" in capsys.readouterr().out


def test_a_device_without_its_implementation_fails(monkeypatch, capsys):
    monkeypatch.setattr(REGISTRY["cpu"], "availability", lambda: Availability(False, "it was not built (a command)"))
    assert doctor.main([]) == 1
    assert "cpu         MISSING it was not built (a command)" in capsys.readouterr().out


@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_no_device_at_all_fails(platform):
    """It is said, with the variable that is to blame, as all else is."""
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-m", "jax_dsv4.doctor"], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"devices             none (JAX_PLATFORMS={platform})" in done.stdout
    assert "\nxla         yes" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_an_output_that_cannot_be_written():
    """Exits 2 with one line, also where it only shows when the last of it is written."""
    script = "import sys; from jax_dsv4 import doctor; doctor.SECONDS = 0; doctor.REGISTRY = {}; sys.exit(doctor.main([]))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "python -m jax_dsv4.doctor: the output cannot be written: No space left on device\n"


INTERRUPTED = """
import runpy, jax_dsv4

def interrupt():
    raise KeyboardInterrupt

jax_dsv4.implementations = interrupt
runpy.run_module("jax_dsv4.doctor", run_name="__main__")
"""


def test_an_interrupt_is_one_line():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "python -m jax_dsv4.doctor: interrupted\n")
