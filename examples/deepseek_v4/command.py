"""What the example's commands have in common: options, errors as one line, output that arrives, progress."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.export

import jax_dsv4 as dsv4
from deepseek_v4 import memory, processes
from deepseek_v4.config import CheckpointError, Config
from deepseek_v4.mesh import MeshError
from deepseek_v4.tokenizer import Tokenizer, encode_chat
from jax_dsv4.cache import LAYOUTS

TINY = Path(__file__).parent / "tiny"
CACHE_LAYOUTS = [name for name, layout in LAYOUTS.items() if not layout.arrangements]  # those of DeepSeek-V4


class UsageError(Exception):
    """The command cannot be run as given. The message is one line."""


class ModelError(Exception):
    """The model does not compute numbers. The message is one line."""

    def __init__(self, prompt: str, numbers: Iterable[int]):
        named = ", ".join(map(str, numbers))
        super().__init__(f"the model computes NaN or infinite logits for {prompt} {named}: weights or config are damaged")


def exit_status(program: str, run: Callable[[], None]) -> int:
    """Runs a command: 0, or what its error asks for once it has been said in a line. What is not expected is raised."""
    try:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            raise UsageError("programs are compiled ahead of the first step here: leave JAX_DISABLE_JIT unset")
        with jax.numpy_rank_promotion("allow"):  # the model broadcasts [d] against [b, t, d], whatever else this process wants
            run()
    except (UsageError, CheckpointError, MeshError, NotImplementedError, OSError) as error:
        return complain(program, error)
    except ModelError as error:
        return complain(program, error, 1)
    except MemoryError as error:
        return complain(program, f"out of memory: {error}" if str(error) else "out of memory")
    except KeyboardInterrupt:
        return complain(program, "interrupted", processes.INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return complain(program, f"out of memory: {error}")
    except (RuntimeError, AssertionError):
        if (reason := no_devices()) is None:
            raise
        return complain(program, reason)
    return 0


def no_devices() -> str | None:
    """Why JAX has no device at all, such as for a JAX_PLATFORMS that is not here."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts where a platform has no plugin
        return f"JAX has no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}) {error}"
    return None


def complain(program: str, error: object, status: int = 2) -> int:
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


def tolerate_streams() -> None:
    """Lets text be printed that has characters which the terminal lacks, and work be done where stderr is closed."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# ------------------------------------------------------------------------------------------------------------- the options


class Parser(argparse.ArgumentParser):
    """Whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What model, in what form, and how it draws."""
    add = parser.add_argument
    add("--checkpoint", type=Path, default=TINY, metavar="DIR", help="Hugging Face folder: config.json, *.safetensors")
    add("--chat", action="store_true", help="put the prompt as a user's question, in DeepSeek-V4's own form")
    add("--think", action="store_true", help="with --chat: let the model think before it answers")
    add("--cache-layout", metavar="NAME", help=f"{', '.join(CACHE_LAYOUTS)} (default: aiter_bf16 on AMD, fp8_ds_mla elsewhere)")
    add("--implementation", metavar="NAME", help="of jax_dsv4 (default: the platform's best)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default: always the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest tokens of this probability")
    add("--seed", type=int, default=0, metavar="N")
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and activations (default: float32 on CPU, else bfloat16)")
    add(
        "--weights",
        choices=("packed", "bf16"),
        default="bf16",
        help="packed: as published, fp8 and fp4; bf16, the default: dequantised, of --dtype",
    )
    add("--index-keys", choices=("dtype", "fp8"), default="dtype", help="of the indexers: of --dtype, or e4m3 with a scale each")
    add("--json", type=Path, metavar="FILE", help="write tokens, speeds and more")


def check_model_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature must be at least 0, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p must be in (0, 1], got {args.top_p}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be in [0, 2^32), got {args.seed}")
    if args.cache_layout not in (None, *CACHE_LAYOUTS):
        parser.error(f"--cache-layout must be one of {', '.join(CACHE_LAYOUTS)}, got {args.cache_layout!r}")
    if args.think and not args.chat:
        parser.error("--think goes with --chat")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json must name a file in a folder that exists, got {args.json}")
    if args.json and (reason := cannot_write(args.json)):
        parser.error(f"--json {args.json} cannot be written: {reason}")


def set_defaults(args: argparse.Namespace) -> None:
    """The layout and the dtype that suit the platform, where none is given."""
    if args.cache_layout is None:  # what the platform's best kernels read
        args.cache_layout = "aiter_bf16" if jax.export.default_export_platform() == "rocm" else "fp8_ds_mla"
    if args.dtype is None:
        args.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if args.dtype == "float32" and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would multiply TF32


def check_implementation(name: str | None) -> None:
    known = dsv4.implementations()
    if name is not None and name not in known:
        raise UsageError(f"--implementation must be one of {', '.join(known)}, got {name!r}")
    if name is not None and not known[name].available:
        raise UsageError(f"--implementation {name} is not there: {known[name].detail}")


def cannot_write(path: Path) -> str | None:
    """Why `path` cannot be written, as far as opening it tells. It is left as it was."""
    new = not path.exists()
    if not new and not path.is_file():
        return None  # the reader of a pipe would take this for the end
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        return error.strerror
    return None


def encode(tokenizer: Tokenizer, text: str, chat: bool, think: bool, program: str, prompt: str = "the prompt") -> list[int]:
    """A prompt's token ids; says what of it is left out."""
    ids = encode_chat(tokenizer, text, think) if chat else tokenizer.encode(text)
    if left_out := tokenizer.left_out(text):
        complain(program, f"the tokenizer has no token for {left_out!r} of {prompt}: left out")
    return ids


def check_context(args: argparse.Namespace, config: Config) -> None:
    if args.context and args.context > config.max_position_embeddings:
        raise UsageError(f"--context must be at most max_position_embeddings = {config.max_position_embeddings}, got {args.context}")


def check_room(needed: int) -> None:
    """That weights and cache fit: said before they are loaded, since a program that takes too much is ended without a word."""
    room = memory.room()
    if room and needed > room:
        raise UsageError(f"weights and cache take {memory.human(needed)}, and {memory.human(room)} are free")


# ------------------------------------------------------------------------------------------------------------ the output


def deliver(
    report: dict[str, Any], file: Path | None, failed: UsageError | None = None, *, print_report: Callable[[dict[str, Any]], None]
) -> None:
    """Writes the report to `file` and prints its numbers: each even if the other fails, or something has `failed` before."""
    if file:
        try:
            file.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            failed = UsageError(f"--json {file} cannot be written: {error.strerror}")
    with printing():
        print_report(report)
    if failed:
        raise failed


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Sees to it that what is printed arrives, or that one line says why not."""
    if sys.stdout is None:
        raise UsageError("the output cannot be written: it is closed")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Else Python would try again, and complain, on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UsageError(f"the output cannot be written: {error.strerror}") from None


class Progress:
    """Progress bars where rich is installed (the `example` extra), else a line per stage; on stderr."""

    def __init__(self, start: Callable[[str], None], bar: Any = None):
        self.start, self.bar = start, bar

    def track(self, label: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
        """A function that yields the items of a sequence and shows how far it is."""

        def items(sequence: Sequence[Any]) -> Iterable[Any]:
            self.start(label)
            return self.bar.track(sequence, description=label) if self.bar else sequence

        return items

    @contextlib.contextmanager
    def spinner(self, label: str) -> Iterator[None]:
        for _ in self.track(label)([None]):
            yield


@contextlib.contextmanager
def progress(transient: bool = False) -> Iterator[Progress]:
    """Shows stages while it is entered; a transient one leaves nothing behind."""
    try:
        from rich import console, progress
    except ImportError:
        yield Progress(lambda label: None if transient else print(f"{label} …", file=sys.stderr))
        return
    columns = (progress.SpinnerColumn(), *progress.Progress.get_default_columns(), progress.TimeElapsedColumn())
    stderr = console.Console(stderr=True)
    hidden = transient and not stderr.is_terminal  # where nothing can be taken back, a transient bar is not shown
    with progress.Progress(*columns, console=stderr, transient=transient, disable=hidden) as bar:
        yield Progress(lambda label: None, bar)
