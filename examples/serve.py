"""Serves a DeepSeek-V4: requests come when they come, and draw together.

    python examples/serve.py < prompts.txt              a prompt a line; answers are written as they come, with the line's number
    python examples/serve.py --rate 4 --requests 32     a Poisson load of 4 requests a second, and what it measures

The server is deepseek_v4/serving.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pydoc_data.topics
import select
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from deepseek_v4 import memory, processes, products
from deepseek_v4.command import (
    ModelError,
    Parser,
    UsageError,
    add_model_options,
    check_context,
    check_implementation,
    check_model_options,
    check_room,
    complain,
    deliver,
    encode,
    exit_status,
    positive,
    printing,
    progress,
    set_defaults,
    tolerate_streams,
)
from deepseek_v4.config import Config, load_config
from deepseek_v4.generate import Sampling
from deepseek_v4.serving import Request, Server
from deepseek_v4.tokenizer import Tokenizer, load_tokenizer
from deepseek_v4.weights import abstract_weights, load_weights

import jax_dsv4 as dsv4

PROGRAM = "serve.py"
LINE = 100  # characters of an answer that are written together


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_status(PROGRAM, lambda: run(args))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="Serve a DeepSeek-V4 checkpoint, by default a tiny one: prompts from stdin, or a load.")
    add_model_options(parser)
    add = parser.add_argument
    add("--slots", type=positive, default=8, metavar="N", help="requests that draw at the same time (default: 8)")
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="of a request; of a load, the most (default: 128)")
    add("--context", type=positive, metavar="N", help="tokens of a request, prompt included (default: what the model can, up to 4096)")
    add("--cache-tokens", type=positive, metavar="N", help="that there is room for, of all requests (default: half of slots · context)")
    add("--cache-scale", type=float, metavar="S", help="of layout aiter_fp8")
    add("--prefill-chunk", type=positive, default=128, metavar="N", help="prompt tokens read between two steps (default: 128)")
    add("--steps-per-call", type=positive, default=1, metavar="N", help="tokens of each request between two looks at them (default: 1)")
    add("--no-sharing", action="store_true", help="do not share the pages of equal prefixes")
    load = parser.add_argument_group("a load", "prompts are cut from Python's documentation, or random without a tokenizer")
    add = load.add_argument
    add("--rate", type=float, metavar="R", help="requests a second that arrive, at random")
    add("--requests", type=positive, metavar="N", help="in all (default: 32)")
    add("--prompt-tokens", type=positive, metavar="N", help="of a prompt, the most; at least half as many (default: 128)")
    add("--shared-tokens", type=int, metavar="N", help="that all prompts begin with, besides (default: 600)")
    args = parser.parse_args(argv)
    check_model_options(parser, args)
    for name, default in {"requests": 32, "prompt_tokens": 128, "shared_tokens": 600}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.rate is None:
            parser.error(f"--{name.replace('_', '-')} is for a load (--rate), not for prompts from stdin")
    if args.rate is not None and not 0 < args.rate < float("inf"):
        parser.error(f"--rate must be positive, got {args.rate}")
    if args.rate is not None and args.chat:
        parser.error("--chat is for prompts from stdin, not for a load (--rate)")
    if args.shared_tokens < 0:
        parser.error(f"--shared-tokens must be at least 0, got {args.shared_tokens}")
    return args


def run(args: argparse.Namespace) -> None:
    set_defaults(args)
    config = dataclasses.replace(load_config(args.checkpoint), packed=args.weights == "packed")
    tokenizer = load_tokenizer(args.checkpoint)
    check_implementation(args.implementation)
    server = create_server(args, config)
    source: Source = Load(args, tokenizer, config, server.room) if args.rate else Lines(args, tokenizer)
    weights_bytes = memory.nbytes(abstract_weights(config, args.dtype))
    try:
        cache_bytes = memory.nbytes(jax.eval_shape(server.create))
    except ValueError as error:
        raise UsageError(error) from None
    check_room(weights_bytes + cache_bytes)

    with progress(transient=True) as show:
        weights = load_weights(args.checkpoint, config, args.dtype, show.track("loading weights"))
    with progress() as show, show.spinner("compiling both programs"):
        began = time.perf_counter()
        server.start(weights)
        compile_seconds = time.perf_counter() - began

    answers = None if args.rate else Answers(tokenizer)
    served, seconds = serve(server, source, answers)
    report = {
        **measurements(served, seconds, server),
        "compile_seconds": compile_seconds,
        "weights": args.weights,
        "weights_bytes": weights_bytes,
        "products": products.in_use(),
        "compiler_options": products.compiler_options(),
        "cache_bytes": cache_bytes,
        "cache_layout": args.cache_layout,
        "index_keys": args.index_keys,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "jax_dsv4": dsv4.__version__},
        "requests": [request_report(each) for each in served],
    }
    refused = f"{source.refused} of {source.refused + len(served)} prompts could not be served"
    failed = UsageError(refused) if source.refused else None
    deliver(report, args.json, failed, print_report=print_report if args.rate else lambda _: None)


def create_server(args: argparse.Namespace, config: Config) -> Server:
    check_context(args, config)
    context = args.context or min(config.max_position_embeddings, 4096)
    if args.max_new_tokens >= context:
        raise UsageError(f"--max-new-tokens must leave room for a prompt in a context of {context} tokens, got {args.max_new_tokens}")
    return Server(
        config,
        slots=args.slots,
        max_tokens=context,
        cache_tokens=args.cache_tokens or max(args.slots * context // 2, context),
        chunk=min(args.prefill_chunk, context),
        steps=min(args.steps_per_call, context),
        share=not args.no_sharing,
        seed=args.seed,
        sampling=Sampling(args.temperature, args.top_p),
        dtype=args.dtype,
        fp8_keys=args.index_keys == "fp8",
        implementation=args.implementation,
        layout=args.cache_layout,
        scale=args.cache_scale,
    )


# -------------------------------------------------------------------------------------------------------- where requests are from


class Arrival:
    """A prompt, when it came, and when its tokens were drawn: seconds of one clock."""

    def __init__(self, number: int, prompt: list[int], max_new_tokens: int, seconds: float):
        self.number = number  # its line's, or its place in the load; from 1
        self.prompt, self.max_new_tokens, self.seconds = prompt, max_new_tokens, seconds
        self.request: Request | None = None
        self.times: list[float] = []


class Source(Protocol):
    prompt: str  # what a prompt is called, before its number
    refused: int  # prompts that cannot be served

    def arrivals(self, idle: bool) -> list[Arrival] | None:
        """What has come since the last call; None: and nothing will. Waits for something if `idle`."""
        ...


class Lines:
    """Prompts from stdin, as they come."""

    prompt = "line"

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer | None):
        if tokenizer is None:
            raise UsageError(f"{args.checkpoint} has no tokenizer for prompts from stdin: give --rate for a load of random tokens")
        if sys.stdin is None:
            raise UsageError("stdin is closed, and prompts come from there: give --rate for a load")
        self.args, self.tokenizer, self.refused, self.lines, self.rest, self.open = args, tokenizer, 0, 0, b"", True
        if sys.stdin.isatty():
            print("a prompt a line; Ctrl-D ends", file=sys.stderr)

    def arrivals(self, idle: bool) -> list[Arrival] | None:
        if not self.open:
            return None
        # Not by a thread: one that waits for input cannot be stopped.
        if not select.select([sys.stdin], [], [], None if idle else 0)[0]:
            return []
        new = os.read(sys.stdin.fileno(), 1 << 16)
        self.open = bool(new)
        *lines, self.rest = (self.rest + (new or b"\n")).split(b"\n")
        first, self.lines = self.lines + 1, self.lines + len(lines)
        return [self.arrival(i, line.decode(errors="replace").strip()) for i, line in enumerate(lines, first) if line.strip()]

    def arrival(self, number: int, text: str) -> Arrival:
        ids = encode(self.tokenizer, text, self.args.chat, self.args.think, PROGRAM, f"{self.prompt} {number}")
        return Arrival(number, ids, self.args.max_new_tokens, time.perf_counter())


class Load:
    """Requests at random times, of random lengths: a Poisson process."""

    prompt = "request"

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer | None, config: Config, room: int):
        if args.shared_tokens + args.prompt_tokens + args.max_new_tokens > room:
            asked = f"--shared-tokens {args.shared_tokens}, --prompt-tokens {args.prompt_tokens} and --max-new-tokens {args.max_new_tokens}"
            raise UsageError(f"{asked} do not fit a cache of {room} tokens")
        random, count = np.random.default_rng(args.seed), args.requests
        text = self.text(args, tokenizer, config, random)
        shared = text[: args.shared_tokens]

        def up_to(most: int) -> np.ndarray:
            return random.integers(-(-most // 2), most + 1, count)

        lengths, limits = up_to(args.prompt_tokens), up_to(args.max_new_tokens)
        starts = random.integers(len(shared), len(text) - args.prompt_tokens + 1, count)
        prompts = [shared + text[start : start + length] for start, length in zip(starts, lengths)]
        seconds = np.cumsum(random.exponential(1 / args.rate, count))
        self.coming = deque(Arrival(i, *each) for i, each in enumerate(zip(prompts, limits.tolist(), seconds.tolist()), start=1))
        self.began: float | None = None
        self.refused = 0

    @staticmethod
    def text(args: argparse.Namespace, tokenizer: Tokenizer | None, config: Config, random: np.random.Generator) -> list[int]:
        """Tokens to cut prompts from: all may begin alike, and then go on anywhere."""
        count = args.shared_tokens + 20 * args.prompt_tokens
        if tokenizer is None:
            return random.integers(config.vocab_size, size=count).tolist()
        topics = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
        ids = tokenizer.encode(topics[: 8 * count])[:count]
        if len(ids) < args.shared_tokens + args.prompt_tokens:
            raise UsageError(f"Python's documentation has {len(ids)} tokens: --shared-tokens and --prompt-tokens ask for more")
        return ids

    def arrivals(self, idle: bool) -> list[Arrival] | None:
        if not self.coming:
            return None
        self.began = self.began or time.perf_counter()
        if idle:
            left = self.began + self.coming[0].seconds - time.perf_counter()
            time.sleep(min(max(left, 0), 3600))  # more than it can take may be asked for
        come = []
        while self.coming and self.began + self.coming[0].seconds <= time.perf_counter():
            come.append(self.coming.popleft())
            come[-1].seconds += self.began
        return come


# ------------------------------------------------------------------------------------------------------------- the service


def serve(server: Server, source: Source, answers: Answers | None) -> tuple[list[Arrival], float]:
    """Serves until nothing comes any more: what was served, and the seconds from the first arrival on."""
    served: list[Arrival] = []
    more = True
    while more or server.busy:
        come = source.arrivals(idle=not server.busy) if more else []
        more = come is not None
        for arrival in come or ():
            try:
                arrival.request = server.submit(arrival.prompt, arrival.max_new_tokens)
            except ValueError as error:
                complain(PROGRAM, f"{source.prompt} {arrival.number}: {error}")
                source.refused += 1
                continue
            served.append(arrival)
        for request in server.step():
            arrival = served[request.number]
            if request.failed:
                raise ModelError(source.prompt, [arrival.number])
            times = arrival.times
            times += [time.perf_counter()] * (len(request.drawn) - len(times))
            if answers:
                with printing():
                    answers.write(arrival.number, request)
    return served, time.perf_counter() - served[0].seconds if served else 0.0


class Answers:
    """Writes what is drawn, a line of one request at a time, with the number of the prompt's line."""

    def __init__(self, tokenizer: Tokenizer | None):
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.written: dict[int, int] = {}  # characters

    def write(self, number: int, request: Request) -> None:
        text, at = self.tokenizer.decode(request.drawn), self.written.get(number, 0)
        while len(text) - at > LINE or "\n" in text[at:] or (request.ended and at < len(text)):
            line, newline, _ = text[at:].partition("\n")
            if len(line) > LINE:
                line, newline = line[: line.rfind(" ", 1, LINE) % (LINE + 1)], ""  # at the last space, if there is one
            print(f"{number}: {line}")
            at += len(line) + len(newline)
        self.written[number] = at


# ------------------------------------------------------------------------------------------------------------ the numbers


def measurements(served: Sequence[Arrival], seconds: float, server: Server) -> dict[str, Any]:
    counts = server.counts
    first = [each.times[0] - each.seconds for each in served]
    between = np.concatenate([[], *(np.diff(each.times) for each in served)])
    tokens = sum(len(each.times) for each in served)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "first_token_seconds": spread(first),
        "between_tokens_seconds": spread(between),
        "slots": len(server.seats),
        "occupancy": counts.rows / (counts.steps * len(server.seats)) if counts.steps else None,
        "steps": counts.steps,
        "prefill_chunks": counts.chunks,
        "prefill_chunk": server.chunk,
        "steps_per_call": server.steps,
        "page_tokens": server.page,
        "prompt_tokens": counts.text_tokens,
        "prompt_tokens_shared": counts.shared_tokens,
        "pages_shared": counts.shared_pages,
        "sent_back": counts.sent_back,
    }


def spread(seconds: Any) -> dict[str, float] | None:
    if not len(seconds):
        return None
    return {"median": float(np.median(seconds)), "p99": float(np.percentile(seconds, 99))}


def request_report(arrival: Arrival) -> dict[str, Any]:
    assert arrival.request is not None
    return {
        "prompt_ids": arrival.prompt,
        "tokens": arrival.request.drawn,
        "arrived": arrival.seconds,
        "drawn": arrival.times,
    }


def print_report(report: dict[str, Any]) -> None:
    def line(number: str, text: str) -> None:
        print(f"{number:>10}  {text}")

    def times(name: str, text: str) -> None:
        if found := report[name]:
            line(f"{1e3 * found['median']:.1f}", f"ms {text}, median; {1e3 * found['p99']:.1f} at the 99th percentile")

    print()
    line(f"{report['tokens_per_second']:.1f}", f"tokens/s ({len(report['requests'])} requests, {report['tokens']} tokens)")
    times("first_token_seconds", "to a request's first token")
    times("between_tokens_seconds", "between its tokens")
    if report["occupancy"]:
        line(f"{report['occupancy']:.0%}", f"of {report['slots']} slots draw in a step ({report['steps']} steps)")
    not_read = f"{report['prompt_tokens_shared']} of {report['prompt_tokens']} prompt tokens not read"
    line(f"{report['pages_shared']}", f"pages of {report['page_tokens']} tokens shared: {not_read}")
    line(f"{report['prefill_chunks']}", f"chunks of {report['prefill_chunk']} prompt tokens read")
    line(f"{report['sent_back']}", "times a request was sent back to wait for pages")
    line(f"{report['cache_bytes']}", f"bytes of cache ({report['cache_layout']})")
    held = "packed" if report["weights"] == "packed" else "dequantised"
    line(memory.human(report["weights_bytes"]), f"of weights, {held}; multiplied by {report['products']}")
    line(f"{report['compile_seconds']:.1f}", f"s to compile both programs, once; on {report['device']}")


if __name__ == "__main__":
    tolerate_streams()
    processes.leave(main())
