"""Builds the documentation: `sphinx-build -W --keep-going docs docs/_build`, with the `docs` extra installed."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from types import ModuleType

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

import jax_dsv4

ROOT = Path(__file__).resolve().parent.parent
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = METADATA["name"]
author = METADATA["authors"][0]["name"]
project_copyright = author
release = jax_dsv4.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # so that links to headings work here as they do on GitHub
default_role = "code"  # docstrings put code in single backticks
autodoc_typehints = "none"  # docstrings state shapes and dtypes
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"{project} {release}"

# The files at the repository's root that have a page here.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def site_links(text: str, folder: Path) -> str:
    """Markdown of a file in `folder`, with its links to files of the repository as they must read in a page of this folder.

    Files that have no page become downloads. Links to what does not exist are left alone, and Sphinx warns of them.
    """

    def link(match: re.Match[str]) -> str:
        target, anchor = match.groups(default="")
        path = os.path.relpath(folder / target, ROOT)
        if not (ROOT / path).is_file():
            return match[0]
        page = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else f"path:../{path}")
        return f"]({page}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)


def read_page(app: Sphinx, name: str, content: list[str]) -> None:
    content[0] = site_links(content[0], ROOT / "docs")


def read_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    content[0] = site_links(content[0], (ROOT / "docs" / path).resolve().parent)


def read_docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are written to be read as plain text: an asterisk is an asterisk, an indented paragraph an equation or code, and what is
    before a colon in "Returns" no type."""
    text = "\n".join(lines)
    # Outside of backticks and of indented paragraphs.
    parts = re.split(r"(`[^`]*`|(?<=\n\n)(?: {4,}.*\n?)+)", text)
    parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
    parts[1::2] = [part if part.startswith("`") else f"::\n\n{part}\n" for part in parts[1::2]]
    text = "".join(parts).replace("Returns:\n  ", "Returns:\n  \\ \n  ")  # napoleon looks for a type in the first line: it has none
    lines[:] = text.split("\n")


def check_api_page(app: Sphinx, config: Config) -> None:
    """Every public name of the package has its place in the API page."""
    named = set(re.findall(r"auto\w+:: jax_dsv4\.(\w+)", (ROOT / "docs" / "api.md").read_text()))
    # Modules become attributes of the package by being imported; `reference` and `adapters` are public.
    public = {n for n, value in vars(jax_dsv4).items() if not n.startswith("_") and not isinstance(value, ModuleType)} | {
        "reference",
        "adapters",
    }
    if named != public:
        raise ConfigError(f"docs/api.md must name what jax_dsv4 exports: missing {public - named}, too many {named - public}")


def setup(app: Sphinx) -> None:
    app.connect("config-inited", check_api_page)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon
