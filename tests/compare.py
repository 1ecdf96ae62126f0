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
# fp32 exponentials of differences of order 10: some ulps of their argument.
MERGED = Tolerance(abs=1e-6, rel=1e-5, cosine=1e-10)


class Answer(NamedTuple):
    """What a decode must give, and how far each number of `out` may be off besides the tolerance."""

    out: np.ndarray  # [tokens, heads, 512]
    lse: np.ndarray  # [tokens, heads]
    error: np.ndarray | float = 0.0

    def of(self, tokens: object) -> Answer:
        return Answer(self.out[tokens], self.lse[tokens], np.broadcast_to(self.error, self.out.shape)[tokens])


def assert_answer(got: tuple, want: Answer, out: Tolerance, lse: Tolerance = LSE) -> None:
    """Each token for itself, as one that is off does not show among many in a cosine; exact zeros where there is no key."""
    assert_close("lse", got[1], want.lse, lse)
    values = np.asarray(got[0]).astype(np.float64)
    assert values.shape == want.out.shape, f"out: shape {values.shape}, expected {want.out.shape}"
    for token, value in enumerate(values):
        one = want.of(token)
        assert_close(f"out of token {token}", value, one.out, out, one.error)
    assert not values[np.isneginf(want.lse)].any(), "out: not zero where there is no key"


def assert_close(name: str, got: object, want: np.ndarray, tolerance: Tolerance, error: np.ndarray | float = 0.0) -> None:
    """`error`: by how much each value may be off besides."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differs = test(got) != test(want)
        assert not differs.any(), (
            f"{name}: {kind} at {_first(differs)}: got {got[differs][0]}, expected {want[differs][0]} ({differs.sum()} in all)"
        )
    finite = np.isfinite(want)
    got, want = np.where(finite, got, 0), np.where(finite, want, 0)
    off = np.abs(got - want) - error
    bad = (off > tolerance.abs) & (off > tolerance.rel * np.abs(want))
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(bad, off, -1)), off.shape)
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
