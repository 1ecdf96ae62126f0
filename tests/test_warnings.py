"""Which warnings are errors in this suite: those of our own code and of JAX through it, and no others (pyproject.toml, conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PLUGIN = """
import warnings

def pytest_configure(config):
    config.issue_config_time_warning(UserWarning("while configuring"), 2)

def pytest_sessionstart():
    warnings.warn("at the start")

def pytest_collection_modifyitems():
    warnings.warn("after collection", DeprecationWarning)

def pytest_runtest_setup():
    warnings.warn("before a test", FutureWarning)
"""


def warn_from(module: str) -> None:
    warnings.warn_explicit("a warning", DeprecationWarning, f"{module}.py", 1, module)


def our_modules() -> list[str]:
    """By the names that they are imported by."""
    package = [path.relative_to(ROOT) for folder in ("jax_dsv4", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    examples = [path.relative_to(ROOT / "examples") for path in (ROOT / "examples").rglob("*.py")]
    tests = [Path(path.name) for path in Path(__file__).parent.rglob("*.py")]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in (*package, *examples, *tests)]


@pytest.mark.parametrize("module", ["jax", "jax._src.core", "jaxlib.mlir.ir", *our_modules()])
def test_ours_are_errors(module: str) -> None:
    with pytest.raises(DeprecationWarning):
        warn_from(module)


@pytest.mark.parametrize("module", ["pytest_benchmark.logger", "jaxtyping", "hypothesis.core", "torch.cases", "flatbuffers.compat"])
def test_others_are_not(module: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warn_from(module)
    assert len(caught) == 1


def test_a_plugin_that_warns(tmp_path: Path) -> None:
    """At every stage: the tests run and pass, and the warnings are shown."""
    (tmp_path / "plugin_that_warns.py").write_text(PLUGIN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "plugin_that_warns", "-p", "no:cacheprovider", "tests/test_reference.py"]
    done = subprocess.run(
        [*command, "-k", "plan_by_hand"], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert "1 passed" in done.stdout
    for warning in ("while configuring", "at the start", "after collection", "before a test"):
        assert warning in shown
