"""The tutorial's snippets run, one after another, as a reader runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

sybil = pytest.importorskip("sybil")
from sybil.parsers.markdown import PythonCodeBlockParser  # noqa: E402

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("page", ["tutorial.md", "engines.md"])
def test_snippets(page: str) -> None:
    examples = list(sybil.Sybil([PythonCodeBlockParser()]).parse(DOCS / page).examples())
    assert examples
    for example in examples:
        example.evaluate()
