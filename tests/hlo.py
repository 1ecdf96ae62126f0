"""What a compiled program moves between devices."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast|ragged-all-to-all"
ITEM_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


class Collective(NamedTuple):
    kind: str
    shapes: tuple[str, ...]  # of its results: "f32[2,4]"


def shape_bytes(shape: str) -> int:
    dtype, sizes = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()  # type: ignore[union-attr]
    return ITEM_BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled program's optimised HLO, each where it stands, sorted. On a CPU the result of an all-to-all is a
    tuple, of what came from each device; it is given as the array that they make together. One among groups of one device moves nothing:
    it is left out."""
    found = []
    for result, kind, rest in re.findall(rf"= (.+?) ({KINDS})(?:-start)?(\(.*)", compiled.as_text()):
        if _of_single_devices(rest):
            continue
        shapes = re.findall(r"\w+\[[\d,]*\]", result)
        if kind == "all-to-all" and len(shapes) > 1:
            assert set(shapes) == {shapes[0]}
            shapes = [shapes[0].replace("[1,", f"[{len(shapes)},")]
        found.append(Collective(kind, tuple(shapes)))
    return sorted(found)


def _of_single_devices(attributes: str) -> bool:
    """Whether each of replica_groups, in any of the three ways in which XLA writes them, is one device."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(axis.split("=") for axis in named[1].split(","))
        return all(sizes[axis] == "1" for axis in named[2].split(",") if axis)
    return re.search(r"replica_groups=(\{(\{\d+\},?)+\}|\[\d+,1\])", attributes) is not None
