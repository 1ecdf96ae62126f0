"""How results are compared: NaN and infinities first, then abs-or-rel, then cosine, with the place of the worst miss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """A value passes if |got - want| <= abs or <= rel * |want|; all together, if 1 - cosine <= cosine."""

    abs: float
    rel: float
    cosine: float


# FlashMLA's, for bf16 outputs: 2.01 bf16 ulps at worst (an ulp is 2^-8 to 2^-7 of a value), or 1e-3 where values are small.
OUT_BF16 = Tolerance(abs=1e-3, rel=2.01 / 128, cosine=5e-6)
# fp32 arithmetic over at most some thousand keys: 512 products of order 1 accumulate about 512 * 2^-24.
OUT_FLOAT32 = Tolerance(abs=2e-5, rel=1e-4, cosine=1e-9)
LSE = Tolerance(abs=1e-5, rel=8.01 / 65536, cosine=1e-9)


def assert_close(name: str, got: object, want: np.ndarray, tolerance: Tolerance) -> None:
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differs = test(got) != test(want)
        assert not differs.any(), (
            f"{name}: {kind} at {_first(differs)}: got {got[differs][0]}, expected {want[differs][0]} ({differs.sum()} in all)"
        )
    finite = np.isfinite(want)
    got, want = np.where(finite, got, 0), np.where(finite, want, 0)
    error = np.abs(got - want)
    bad = (error > tolerance.abs) & (error > tolerance.rel * np.abs(want))
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(bad, error, -1)), error.shape)
        place = tuple(int(i) for i in worst)
        raise AssertionError(f"{name}: {bad.sum()} of {bad.size} off; worst at {place}: got {got[worst]}, expected {want[worst]}")
    norms = float((got * got).sum() + (want * want).sum())
    cosine = 1 - 2 * float((got * want).sum()) / norms if norms else 0.0
    assert cosine <= tolerance.cosine, f"{name}: cosine difference {cosine:.3g}, allowed {tolerance.cosine:.3g}"


def assert_same_bits(name: str, got: object, want: object) -> None:
    a, b = np.asarray(got), np.asarray(want)
    assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{name}: {a.dtype}{a.shape}, expected {b.dtype}{b.shape}"
    bits = f"u{a.dtype.itemsize}"
    differs = a.view(bits) != b.view(bits)
    assert not differs.any(), f"{name}: {differs.sum()} of {differs.size} differ, first at {_first(differs)}"


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])
