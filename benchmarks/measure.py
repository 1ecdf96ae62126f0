"""What the benchmarks share: their options, the times of contenders that take turns, and a report that grows as they are measured."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Name = TypeVar("Name")
Time = TypeVar("Time")
Turn = Callable[[], Sequence[Time]]  # a contender's turn: one or more times, in a unit of its own
Prepare = Callable[[], Turn[Time]]  # what comes before: compiling, verifying


def options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds of every case (default {rounds})")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything measured to this file, as far as it has come")
    return parser


def run(main: Callable[[], None]) -> NoReturn:
    """A benchmark as a command: interrupted, or with nobody left to read what it prints, it ends without a traceback."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # what compiles in another thread does not stop, and would crash
    except BrokenPipeError:
        os._exit(141)  # as shells have it
    sys.exit()


def new_file(text: str) -> Path:
    """An argument that names a file: what cannot be written is told before anything is measured."""
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must name a file in a folder that can be written, got {text}")
    return path


def select(parser: argparse.ArgumentParser, argv: Sequence[str] | None, names: Collection[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the names that they select: with `--only TEXT` those that contain TEXT."""
    parser.add_argument("--only", default="", metavar="TEXT", help="measure only what has TEXT in its name")
    arguments = parser.parse_args(argv)
    selected = [name for name in names if arguments.only in name]
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if not selected:
        parser.error(f"--only must be part of a name, such as {next(iter(names))}, got {arguments.only!r}")
    return arguments, selected


def compare(
    contenders: Mapping[Name, Prepare[Time]], rounds: int, between: Callable[[], object] = lambda: None
) -> tuple[dict[Name, list[Time]], dict[Name, str]]:
    """The times of each contender, and what stopped those that failed.

    All are prepared. Then they take turns, so that a slow spell of the machine hits them alike: a round to warm up, and `rounds` that
    count. The order changes from round to round, and `between` is called before each. One that fails, in preparation or in a turn, is left
    out from then on; the others go on.
    """
    failed: dict[Name, str] = {}

    def attempt(name: Name, call: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return otherwise if name in failed else call()
        except Exception as error:
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return otherwise

    turns: dict[Name, Turn[Time]] = {name: attempt(name, prepare, None) for name, prepare in contenders.items()}
    times: dict[Name, list[Time]] = {name: [] for name in turns}
    order = list(turns)
    for counted in [False] + [True] * rounds:
        between()
        order = order[1:] + order[:1]
        for name in order:
            found = attempt(name, turns[name], ())
            times[name] += found if counted else ()
    return {name: found for name, found in times.items() if name not in failed}, failed


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


class Report:
    """What a run found, and on what. The file is written anew with each result, so that a run that is cut off keeps what it had."""

    def __init__(self, path: Path | None, argv: Sequence[str] | None, device: str, **parts: Any) -> None:
        command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *(sys.argv[1:] if argv is None else argv)]
        packages = [name for name in ("jax", "jaxlib", "torch") if name in sys.modules]
        self.path = path
        self.found: dict[str, Any] = {
            "device": device,
            "versions": {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in packages}},
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join(command),
            **parts,
            "failed": {},
        }

    def __str__(self) -> str:
        return "; ".join(str(self.found[key]) for key in ("device", "versions", "date", "command"))

    def note(self, case: str, numbers: Mapping[str, float], failed: Mapping[str, str]) -> None:
        """Prints a case's numbers and which of its contenders failed, and writes the file."""
        print(f"{case:22}", *(f"{name} {number:<7.4g}" for name, number in numbers.items()), flush=True)
        for name, message in failed.items():
            print(f"{case}: {name} failed: {message}", file=sys.stderr, flush=True)
            self.found["failed"].setdefault(case, {})[name] = message
        if self.path:
            unfinished = self.path.with_name(self.path.name + ".part")
            unfinished.write_text(json.dumps(self.found, indent=1) + "\n")
            os.replace(unfinished, self.path)

    def end(self) -> None:
        """Exits with an error if anything failed."""
        if self.found["failed"]:
            raise SystemExit("failed: " + "; ".join(f"{case}: {', '.join(names)}" for case, names in self.found["failed"].items()))


def medians(times: Mapping[Name, Sequence[float]]) -> dict[Name, float]:
    return {name: statistics.median(found) for name, found in times.items()}


def ratios(values: Sequence[float]) -> str:
    mean = math.exp(statistics.fmean(map(math.log, values)))
    return f"geomean {mean:.2f}x over {len(values)} cases, from {min(values):.2f}x to {max(values):.2f}x"
