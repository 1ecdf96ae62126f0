"""Safetensors files as dictionaries of NumPy arrays, with the 8-bit floats that DeepSeek's checkpoints use.

The format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

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
    "I8": np.int8,
    "U8": np.uint8,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of `path`, mapped rather than read: a page is fetched when it is looked at.

    Raises ValueError where the bytes are not a whole safetensors file, OSError where they cannot be read.
    """
    with open(path, "rb") as file:
        size = Path(path).stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("not a whole safetensors file: the header runs past the end")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError("not a safetensors file: the header is not JSON") from None
    header.pop("__metadata__", None)
    # An empty file cannot be mapped, and a header without tensors is legal.
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)

    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} has dtype {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[entry["dtype"]])
        if not 0 <= begin <= end <= data.size or end - begin != int(np.prod(entry["shape"])) * dtype.itemsize:
            raise ValueError(f"not a whole safetensors file: the bytes of {name} run past the end or do not fit")
        tensors[name] = data[begin:end].view(dtype).reshape(entry["shape"])
    return tensors


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
