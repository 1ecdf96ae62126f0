"""Marks of tests that need the CPU's native library, and of those that run on each implementation that a CPU has."""

from __future__ import annotations

import pytest

import jax_dsv4 as dsv4

AVAILABLE, DETAIL = dsv4.implementations()["cpu"]
needs_cpu = pytest.mark.skipif(not AVAILABLE, reason=DETAIL)
every_implementation = pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_cpu), "xla"])
