"""Variants of AITER's Gluon kernel pa_decode_sparse: what is compiled into one, and where it is kept.

`python -m jax_dsv4.build_aiter --heads` compiles them; ffi/rocm/gluon.cc finds them by the same names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jax_dsv4._ffi import gluon_directory

ARCHITECTURE = "gfx950"
# Parts into which the keys of a token may be cut. One part would write no lse.
SPLITS = (2, 4, 8, 16)
# The kernel addresses what it writes, and caches unless compiled to be wide, in 31 bits.
ADDRESSABLE_BYTES = 2**31 - 1
# The most that is gained by knowing that blocks begin at multiples of so many bytes.
MAX_ALIGNMENT = 16


@dataclass(frozen=True)
class Variant:
    """What is compiled in.

    heads        query heads
    scale        of the scores; rounded to float32
    block_sizes  of the cache of each scope, one or two
    alignment    of the caches' block strides: 16, 8, 4 or 2 bytes
    wide         whether a cache may have 2 GiB or more
    splits       parts into which a token's keys are cut
    """

    heads: int
    scale: float
    block_sizes: tuple[int, ...]
    alignment: int = MAX_ALIGNMENT
    wide: bool = False
    splits: int = SPLITS[0]

    @property
    def name(self) -> str:
        bits = int(np.float32(self.scale).view(np.uint32))
        blocks, width = "+".join(map(str, self.block_sizes)), "wide" if self.wide else "narrow"
        return f"pa_decode_sparse-h{self.heads}-s{bits:08x}-b{blocks}-a{self.alignment}-{width}-x{self.splits}"

    @property
    def command(self) -> str:
        """What compiles it, and those that differ in their splits alone."""
        sizes, wide = " ".join(map(str, self.block_sizes)), " --wide" if self.wide else ""
        options = f"--heads {self.heads} --scale {self.scale!r} --block-sizes {sizes} --alignment {self.alignment}{wide}"
        return f"python -m jax_dsv4.build_aiter --source AITER {options}"

    def file(self) -> Path | None:
        """Where it is, if it was compiled. The end of the file's name is the local memory that a launch must ask for."""
        return next(gluon_directory().glob(f"{self.name}-lds*.co"), None)

    def with_splits(self) -> tuple[Variant, ...]:
        return tuple(replace(self, splits=splits) for splits in SPLITS)


def compiled() -> list[str]:
    """The names of the files of all that were compiled."""
    return sorted(path.name for path in gluon_directory().glob("pa_decode_sparse-*.co"))
