"""The package's layers: pyproject.toml states them, import-linter checks every import against them. And the maps of the modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_layers() -> None:
    cli = pytest.importorskip("importlinter.cli")
    assert cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == cli.EXIT_STATUS_SUCCESS


def modules(folder: str) -> set[str]:
    return {path.name for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"}


def test_the_maps_name_every_module() -> None:
    """That of the package in CONTRIBUTING.md, and that of the example's model in its docstring."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = text[text.index("jax_dsv4/  ") : text.index("ffi/  ")]
    assert modules("jax_dsv4") <= set(re.findall(r"\w+\.py", package))
    assert modules("examples/deepseek_v4") == set(re.findall(r"^\w+\.py", (ROOT / "examples/deepseek_v4/__init__.py").read_text(), re.M))
