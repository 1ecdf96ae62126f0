"""Safetensors files as dictionaries of NumPy arrays, with the 8-bit floats that DeepSeek's checkpoints use.

The format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data. The tensors follow one
another in the data without gaps and without overlap, so that most damage to a header shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of `path`, mapped rather than read: a page is fetched when it is looked at.

    A tensor of a dtype that is not in `DTYPES` is its bytes, with `dtype_name(array)` as the file has it.

    Raises ValueError where the bytes are not a whole safetensors file, OSError where they cannot be read.
    """
    with open(path, "rb") as file:
        size = Path(path).stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("not a whole safetensors file: the header runs past the end")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError("not a safetensors file: the header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file: the header is not a JSON object")
    header.pop("__metadata__", None)
    # An empty file cannot be mapped, and a header without tensors is legal.
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)

    tensors, ends = {}, []
    for name, entry in header.items():
        kind, shape, (begin, end) = _parse_entry(name, entry)
        dtype = np.dtype(DTYPES[kind]) if kind in DTYPES else np.dtype([(kind, np.uint8)])
        if begin > end or end > data.size or (kind in DTYPES and end - begin != math.prod(shape) * dtype.itemsize):
            raise ValueError(f"not a whole safetensors file: the bytes of {name} run past the end or do not fit")
        tensors[name] = data[begin:end].view(dtype).reshape(shape if kind in DTYPES else -1)
        ends.append((begin, end))
    at = 0
    for begin, end in sorted(ends):
        if begin != at:
            raise ValueError(f"not a whole safetensors file: a tensor begins at byte {begin} of the data, and the one before ends at {at}")
        at = end
    if at != data.size:
        raise ValueError(f"not a whole safetensors file: its tensors are {at} bytes, and it has {data.size}")
    return tensors


def _parse_entry(name: str, entry: Any) -> tuple[str, list[int], list[int]]:
    """dtype, shape and offsets of a header's entry."""

    def are_sizes(value: object) -> TypeGuard[list[int]]:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)

    if isinstance(entry, dict):
        kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if isinstance(kind, str) and kind and are_sizes(shape) and are_sizes(offsets) and len(offsets) == 2:
            return kind, shape, offsets
    raise ValueError(f"not a safetensors file: the header's entry of {name!r} must have a dtype, a shape and two data_offsets")


def dtype_name(array: np.ndarray) -> str:
    """Its dtype's name; of an unknown one, that of the file."""
    return array.dtype.names[0] if array.dtype.names else str(array.dtype)


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `tensors` to `path`, widest dtype first so that every tensor is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, offset = {}, 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(np.ascontiguousarray(tensor).tobytes())
