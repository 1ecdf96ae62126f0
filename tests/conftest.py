"""Settings of the whole suite."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

# The suite compiles hundreds of small programs once each.
jax.config.update("jax_compiler_enable_remat_pass", False)
# Devices of one process, for the tests of meshes; the others use the first.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """Warnings of the tests' own modules are errors, as pyproject.toml has it for the rest of our code."""
    modules = "|".join(sorted({path.stem for path in Path(__file__).parent.rglob("*.py")}))
    config.addinivalue_line("filterwarnings", rf"error:::({modules})(\.|$)")


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
