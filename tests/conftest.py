"""Settings of the whole suite."""

from __future__ import annotations

import jax
import pytest

# The suite compiles hundreds of small programs once each.
jax.config.update("jax_compiler_enable_remat_pass", False)
# Devices of one process, for the tests of meshes; the others use the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def strict_types():
    """The package must not lean on implicit promotion."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
