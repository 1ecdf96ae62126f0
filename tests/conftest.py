"""Settings of the whole suite."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

# The suite compiles hundreds of small programs once each.
jax.config.update("jax_compiler_enable_remat_pass", False)
# Devices of one process, for the tests of meshes; the others use the first.
jax.config.update("jax_num_cpu_devices", 8)
# Where there is a GPU, it is for the tests that are marked so. All others are of the CPU.
HAS_CUDA = Path("/dev/nvidiactl").exists() and any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
if HAS_CUDA and "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu,cuda")


def pytest_configure(config):
    """Warnings of the tests' own modules are errors, as pyproject.toml has it for the rest of our code."""
    modules = "|".join(sorted({path.stem for path in Path(__file__).parent.rglob("*.py")}))
    config.addinivalue_line("filterwarnings", rf"error:::({modules})(\.|$)")


@pytest.fixture(autouse=True)
def device(request):
    """The default one, for the time of a test."""
    gpu = HAS_CUDA and "cuda" in request.keywords
    with jax.default_device(jax.devices("cuda")[0] if gpu else None):
        yield


@pytest.fixture(autouse=True)
def strict_types():
    """The package must not lean on implicit promotion."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def pytest_terminal_summary(terminalreporter):
    """Prints the tables of tests/gfx950: here, because pytest-xdist's first process looks no deeper for it."""
    reports = [r for r in terminalreporter.stats.get("passed", ()) if r.when == "call"]
    texts = [text for r in sorted(reports, key=lambda r: r.nodeid) for name, text in r.user_properties if name == "table"]
    if texts:
        terminalreporter.section("cost model, from the software gfx950")
        terminalreporter.write_line("\n\n".join(texts))
