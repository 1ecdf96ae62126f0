"""Libraries that tests compile, once per state of their sources, in a folder that processes share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path


def compiled(name: str, command: Iterable[str], sources: Iterable[Path], headers: Iterable[Path], depends_on: str = "") -> Path:
    """`<name>.so`, which `command -o <name>.so sources` makes; `depends_on`: on what else its content depends."""
    command, sources = list(command), list(sources)
    content = b"".join(path.read_bytes() for path in [*sources, *sorted(headers)])
    digest = hashlib.sha256(content + " ".join([*command, depends_on]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("JAX_DSV4_TEST_CACHE", Path(tempfile.gettempdir()) / "jax_dsv4_tests"))
    out = cache / f"{name}-{digest}" / f"{name}.so"
    out.parent.mkdir(parents=True, exist_ok=True)
    # One process at a time, so that pytest-xdist's workers do not all compile the same thing; the library is renamed into place, so that
    # none of them loads half of it.
    with open(out.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            partial = out.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial), *map(str, sources)], check=True)
            partial.rename(out)
    return out
