"""The plans that AITER's own builder made: data/aiter_plans.npz, which data/README.md describes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from jax_dsv4._work import Geometry

ARRAYS = ("work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")
# What AITER's builder counts an item as, in blocks.
OVERHEAD = 16

Plan = dict[str, np.ndarray]


@functools.cache
def load() -> tuple[tuple[dict[str, Any], Plan], ...]:
    """(case, plan) of each. The plan holds the rows in use of ARRAYS, and `lengths` as the builder was given them."""
    names = ("lengths", *ARRAYS)
    with np.load(Path(__file__).parent / "data" / "aiter_plans.npz") as data:
        cases = json.loads(str(data["cases_json"]))
        arrays = {name: data[name] for name in names}
    plans, at = [], dict.fromkeys(names, 0)
    for number, case in enumerate(cases):
        plan = {}
        for name, rows in zip(names, case["sizes"]):
            columns = {"work_info_set": 8, "reduce_final_map": 2}.get(name, 1)
            flat = arrays[name][at[name] : at[name] + rows * columns]
            plan[name] = flat.reshape(columns, rows).T if columns > 1 else flat
            at[name] += rows * columns
        plans.append((case | {"id": number}, plan))
    return tuple(plans)


def geometry(case: dict[str, Any]) -> Geometry:
    """What AITER's builder was asked for. max_split_per_batch, unless negative, bounds the number of workers that get any work."""
    bound = case["max_split_per_batch"] * case["tokens"]
    workers = case["M"] if bound < 0 else min(case["M"], bound)
    return Geometry(workers, case["kv_granularity"], OVERHEAD)
