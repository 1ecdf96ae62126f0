"""Hostile data beside tests/cases.py: rows for append, with the bytes that it must leave; partial results, with what they merge to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cases import PACKED

from jax_dsv4 import reference

# --- Rows to append

KINDS = ("normal", "zeros", "denormal", "tiny", "huge", "scale_boundary", "floor_boundary", "ties", "infinities", "nan", "all")


def draw_tile(kind: str, rng: np.random.Generator) -> np.ndarray:
    """64 float32 of a kind that some step of the quantiser may get wrong."""
    sign = rng.choice(np.array([-1, 1], np.float32), 64)
    normal = rng.standard_normal(64).astype(np.float32)
    power = np.float32(2.0 ** rng.integers(-30, 118))
    if kind == "zeros":
        return sign * np.float32(0)
    if kind == "denormal":
        return sign * rng.integers(1, 1 << 23, 64).astype(np.uint32).view(np.float32)
    if kind == "tiny":
        return sign * np.float32(1e-4) * np.float32(2.0) ** rng.integers(-40, 2, 64).astype(np.float32)
    if kind == "huge":
        return sign * np.float32(3.4e38) * rng.random(64).astype(np.float32)
    if kind == "scale_boundary":  # an amax of 448 * 2^k, or a float32 next to it
        amax = np.float32(448) * power
        return np.append(normal[1:].clip(-1, 1) * amax * np.float32(0.5), rng.choice([amax, np.nextafter(amax, np.float32(np.inf)), -amax]))
    if kind == "floor_boundary":  # an amax of 1e-4, or a float32 next to it
        floor = np.float32(1e-4)
        return np.append(
            normal[1:].clip(-1, 1) * floor, rng.choice([floor, np.nextafter(floor, np.float32(1)), np.nextafter(floor, np.float32(0))])
        )
    if kind == "ties":  # with amax = 448 * 2^k every number lies midway between two codes, or a float32 beside that
        grid = reference.e4m3_to_float(np.arange(127, dtype=np.uint8)).astype(np.float32)
        middle = rng.choice((grid[1:] + grid[:-1]) / 2, 63)
        middle = np.where(rng.random(63) < 0.5, middle, np.nextafter(middle, rng.choice(np.array([0, np.inf], np.float32), 63)))
        return np.append(sign[1:] * middle, np.float32(448)) * np.float32(2.0 ** rng.integers(-20, 117))
    values = normal * power
    specials = {"infinities": [np.inf, -np.inf], "nan": [np.nan], "all": [np.inf, -np.inf, np.nan, 0.0, -0.0]}
    if kind in specials:
        values[rng.integers(0, 64, 3)] = rng.choice(np.array(specials[kind], np.float32), 3)
    return values


def draw_rows(kinds: Sequence[str], rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count, 512], the kinds in turn."""
    return np.stack([np.concatenate([draw_tile(kinds[(row + t) % len(kinds)], rng) for t in range(8)]) for row in range(count)])


def written(
    data: np.ndarray, latents: np.ndarray, slots: np.ndarray, block_size: int, layout: str, arrangement: str | None = None
) -> np.ndarray:
    """What append must leave, row by row: the oracle's bytes where a slot is, the old ones elsewhere."""
    data = data.copy()
    for row, slot in zip(latents, slots.tolist()):
        if not 0 <= slot < data.shape[0] * block_size:
            continue
        block, at = divmod(slot, block_size)
        if layout in PACKED:
            packing, named = PACKED[layout], () if arrangement is None else (arrangement,)
            alone = packing.pack(row[None].astype(np.float32), 1, packing.row_bytes + packing.scale_bytes, *named)[0]
            data[block, packing.slot_bytes(block_size, arrangement)[at]] = alone
        elif layout == "bf16":
            data[block, at] = reference.float_to_bf16(row.astype(np.float32)).view(data.dtype)
        else:
            data[block, at] = row
    return data


# --- Partial results

SHAPE = (3, 4, 8)  # tokens, heads, dim


def draw_parts(seed: int, parts: int, empty: float = 0.3, spread: float = 10) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Partial results; an empty part has lse -inf and anything, NaN included, in its out."""
    rng = np.random.default_rng(seed)
    outs, lses = [], []
    for _ in range(parts):
        lse = (rng.standard_normal(SHAPE[:2]) * spread).astype(np.float32)
        lse[rng.random(SHAPE[:2]) < empty] = -np.inf
        out = rng.standard_normal(SHAPE).astype(np.float32)
        out[np.isneginf(lse)] = np.nan
        outs.append(out)
        lses.append(lse)
    return outs, lses


def expected(outs: list[np.ndarray], lses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The oracle, which wants zeros where a part is empty."""
    return reference.merge([np.where(np.isneginf(lse)[..., None], 0, out) for out, lse in zip(outs, lses)], lses)
