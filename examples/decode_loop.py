"""DeepSeek-V4 decodes in JAX: a prompt in, tokens out, `jax_dsv4.sparse_mla_decode` in every attention layer.

    python examples/decode_loop.py                                              the tiny model of this repository
    python examples/decode_loop.py --checkpoint DIR --prompt "Once upon a time"  a Hugging Face folder
    python examples/decode_loop.py --checkpoint DIR --chat --prompt "Who are you?"   a question, in the form of DeepSeek's chats
    python examples/decode_loop.py --prompt-ids "1,2,3;4,5" --json out.json      two requests, as token ids
    python examples/decode_loop.py --memory                                     bytes of weights and caches, by model
    python examples/decode_loop.py --batch 2 --mesh data=2,model=2,context=2     over 8 devices (deepseek_v4/mesh.py)
    … --coordinator HOST:PORT --num-processes 2 --process-id 0                   the same over two processes, one of two

The loop itself is `prefill` and `generate` in deepseek_v4/generate.py, the model deepseek_v4/model.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from deepseek_v4 import command, memory, processes, products
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
    encode,
    exit_status,
    positive,
    printing,
    progress,
    set_defaults,
    tolerate_streams,
)
from deepseek_v4.config import CheckpointError, Config, load_config
from deepseek_v4.generate import NOT_A_TOKEN, REJECTED, Sampling, State
from deepseek_v4.mesh import NAMES, REQUESTS, MeshError, Programs, bytes_per_device, create_mesh, fitting_mesh, parse_mesh
from deepseek_v4.speculate import TOKENS_PER_STEP
from deepseek_v4.tokenizer import Tokenizer, load_tokenizer
from deepseek_v4.weights import fingerprint, load_weights
from jax.sharding import PartitionSpec as P

import jax_dsv4 as dsv4

PROGRAM = "decode_loop.py"
DEFAULT_PROMPT = "A function definition"
SHORTEST_CHUNK, LONGEST_CHUNK = 32, 512  # prompt tokens per step, unless asked for
STEPS_PER_CALL = 4  # tokens of each request between two looks at them


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_status(PROGRAM, lambda: run_together(args) if args.coordinator else run(args))


def run_together(args: argparse.Namespace) -> None:
    """`run`, as one of many processes."""
    try:
        processes.join(args.coordinator, args.num_processes, args.process_id, args.process_timeout)
        run(args)
    except jax.errors.JaxRuntimeError as error:
        complain(PROGRAM, f"process {args.process_id} stops: another one did, or cannot be reached: {error}")
        os._exit(3)  # an orderly shutdown would wait for the other one


def run(args: argparse.Namespace) -> None:
    if args.memory:
        with printing():
            print(memory.table())
        return
    set_defaults(args)
    config, tokenizer, prompts, context, mesh = prepare(args)
    sampling = Sampling(args.temperature, args.top_p)
    programs = Programs(config, mesh, sampling, args.implementation)
    place = programs.place
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # Programs are compiled for buckets, not for every length.
    chunk = min(max(bucket(lengths.max()), SHORTEST_CHUNK), args.prefill_chunk or LONGEST_CHUNK)
    padded = np.zeros((len(prompts), bucket(-(-lengths.max() // chunk)) * chunk), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    measures = args.cache_layout in ("aiter_fp8", "aiter_fp8_fnuz") and args.cache_scale is None
    options = dict(layout=args.cache_layout, scale=1.0 if measures else args.cache_scale, dtype=args.dtype)
    options["fp8_keys"] = args.index_keys == "fp8"
    options["chunk"] = max(chunk, TOKENS_PER_STEP if config.mtp else 1)
    try:
        check_memory(config, mesh, len(prompts), context, options)
    except ValueError as error:
        raise UsageError(error) from None
    with progress(transient=True) as show:
        began = time.perf_counter()
        weights = load_weights(args.checkpoint, config, args.dtype, show.track("loading weights"), programs.sharding)
        load_seconds = time.perf_counter() - began

    with progress() as show:
        limits = np.full(len(prompts), args.max_new_tokens, np.int32)
        if measures:
            with show.spinner("measuring the cache's scale"):
                options["scale"] = measured_scale(programs, weights, padded[:, :chunk], np.minimum(lengths, chunk), args.seed, options)
        cache = programs.create_cache(len(prompts), context, **options)
        ahead = programs.create_ahead(len(prompts), context, **options)
        cache_bytes = memory.nbytes((cache, ahead))
        inputs = (weights, cache, *(place(x, REQUESTS) for x in (padded, lengths, limits)), place(np.uint32(args.seed), P()))
        inputs = (*inputs, ahead) if ahead else inputs

        # Both loops are compiled here, once and ahead of time: an executable cannot be retraced by what follows.
        began = time.perf_counter()
        with show.spinner("compiling prefill"):
            prefill = programs.prefill(chunk)
            prefill_once = prefill.lower(*inputs).compile()
        with show.spinner("compiling decode"):
            generate_more = programs.generate(STEPS_PER_CALL).lower(weights, jax.eval_shape(prefill, *inputs)).compile()
        compile_seconds = time.perf_counter() - began

        with show.spinner("reading the prompt"):
            began = time.perf_counter()
            state: State = jax.block_until_ready(prefill_once(*inputs))
            prefill_seconds = time.perf_counter() - began

    stream = Stream(prompts, tokenizer, args.max_new_tokens, must_arrive=args.json is None, silent=args.process_id > 0)
    stream.add(numbers_only(programs.fetch(state.token)[:, None]))
    began = time.perf_counter()
    while stream.running:
        state, drawn = generate_more(weights, state)
        stream.add(numbers_only(programs.fetch(drawn)))
    decode_seconds = time.perf_counter() - began
    attend = programs.attend(jnp.dtype(args.dtype)).lower(state.cache).compile()
    attention_seconds = time_attention(attend, state)

    tokens = stream.tokens
    decoded = sum(len(row) - 1 for row in tokens)  # prefill drew the first of each
    # With drafts a step draws one token or two, or one and a rejected one.
    steps = [(len(row) - 1 + rejected) / (TOKENS_PER_STEP if config.mtp else 1) for row, rejected in zip(tokens, stream.rejected)]
    report = {
        "prompt_ids": [list(map(int, prompt)) for prompt in prompts],
        "tokens": tokens,
        "text": [tokenizer.decode(row) for row in tokens] if tokenizer else None,
        "tokens_per_second": decoded / decode_seconds if decoded else None,
        "tokens_per_step": decoded / sum(steps) if decoded else None,
        "seconds_per_step": decode_seconds / max(steps) if decoded else None,
        "attention_seconds_per_step": attention_seconds,
        "implementation": attention_implementation(attend.as_text()),
        "compile_seconds": compile_seconds,
        "prefill_seconds": prefill_seconds,
        "prefill_chunk": chunk,
        "load_seconds": load_seconds,
        "cache_bytes": cache_bytes,
        "cache_tokens_per_request": context,
        "weights": args.weights,
        "weights_bytes": memory.nbytes(weights),
        "products": products.in_use(),
        "compiler_options": products.compiler_options(),
        "cache_layout": args.cache_layout,
        "cache_scale": options["scale"],
        "index_keys": args.index_keys,
        "device": jax.devices()[0].device_kind,
        "mesh": dict(mesh.shape) if mesh else None,
        "processes": jax.process_count(),
        "versions": {"jax": jax.__version__, "jax_dsv4": dsv4.__version__},
    }
    if args.process_id == 0:
        deliver(report, args.json, stream.failed)


def measured_scale(programs: Programs, weights: Any, padded: np.ndarray, lengths: np.ndarray, seed: int, options: dict[str, Any]) -> float:
    """The scale for a cache of fp8 numbers, from the latents of the prompts' first chunk, `padded`, in bf16."""
    requests, chunk = padded.shape
    room = requests, chunk + TOKENS_PER_STEP
    layout, options = options["layout"], options | {"layout": "aiter_bf16", "scale": None}
    cache, ahead = programs.create_cache(*room, **options), programs.create_ahead(*room, **options)
    inputs = (*(programs.place(x, REQUESTS) for x in (padded, lengths, np.ones_like(lengths))), programs.place(np.uint32(seed), P()))
    state: State = programs.prefill(chunk)(weights, cache, *inputs, *([ahead] if ahead else []))
    numbers_only(programs.fetch(state.token)[:, None])
    layers = state.cache.layers, state.draft.cache.layers if state.draft else ()
    leaves = jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, dsv4.KVCache))
    largest = jnp.stack([jnp.max(jnp.abs(leaf.data)) for leaf in leaves if isinstance(leaf, dsv4.KVCache)])
    return dsv4.fp8_scale(largest, layout)


def numbers_only(tokens: np.ndarray) -> np.ndarray:
    """`tokens`, unless some were drawn from NaN."""
    if bad := sorted({int(request) for request in np.argwhere(tokens == NOT_A_TOKEN)[:, 0]}):
        raise ModelError("request", bad)
    return tokens


def prepare(args: argparse.Namespace) -> tuple[Config, Tokenizer | None, list[Sequence[int]], int, jax.sharding.Mesh | None]:
    """All that can be wrong with the arguments, and between processes, is found here: before anything is loaded, compiled or waited for.

    Returns config, tokenizer, prompts, tokens per request of the cache, and mesh.
    """
    facts = {name: value for name, value in vars(args).items() if name not in ("process_id", "json", "checkpoint")}
    try:
        config = dataclasses.replace(load_config(args.checkpoint), mtp=args.speculate, packed=args.weights == "packed")
        tokenizer = find_tokenizer(args)
        prompts = read_prompts(args, tokenizer, config)
        context = cache_tokens(args, prompts, config)
        check_implementation(args.implementation)
        facts |= {"checkpoint": fingerprint(args.checkpoint), "jax": jax.__version__}
        if jax.process_count() > 1 and args.mesh is None:
            raise UsageError("--num-processes needs a --mesh over all their devices")
        mesh = create_mesh(parse_mesh(args.mesh), config, len(prompts)) if args.mesh is not None else None
    except (UsageError, CheckpointError, MeshError, OSError) as error:
        processes.agree(facts | {"error": str(error)})
        raise
    processes.agree(facts)
    return config, tokenizer, prompts, context, mesh


# ------------------------------------------------------------------------------------------------------------- the input


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="Decode with a DeepSeek-V4 checkpoint, by default a tiny one of this repository.")
    add_model_options(parser)
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text; needs the checkpoint's tokenizer")
    prompt.add_argument("--prompt-ids", metavar="IDS", help='token ids: "1,2,3;4,5" is two requests')
    add("--batch", type=positive, metavar="N", help="requests; prompts are repeated in turn (default: one of each)")
    add("--max-new-tokens", type=positive, default=128, metavar="N")
    add("--context", type=positive, metavar="N", help="tokens per request that the cache holds (default: as many as needed)")
    add("--prefill-chunk", type=positive, metavar="N", help="prompt tokens per step, at most (default: as the prompt is long, 32 to 512)")
    add("--cache-scale", type=float, metavar="S", help="of aiter_fp8 and its _fnuz (default: measured from the prompts' first latents)")
    add("--speculate", action="store_true", help="draft with the checkpoint's layer mtp.0: the same tokens, in fewer steps")
    add("--memory", action="store_true", help="print the bytes of weights and caches of each model, and stop")
    add("--mesh", metavar="AXES", help='devices for each of "data=2,model=2,context=2": requests, heads, cached context; experts over all')
    many = parser.add_argument_group("many processes", "the same command for each, but for its id; their devices make one mesh")
    add = many.add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    add("--num-processes", type=positive, default=1, metavar="N")
    add("--process-id", type=int, default=0, metavar="I", help="from 0")
    add(
        "--process-timeout",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="after which a silent one is taken for dead (default: 60)",
    )
    args = parser.parse_args(argv)

    check_model_options(parser, args)
    if args.chat and args.prompt_ids is not None:
        parser.error("--chat is for text: it goes with --prompt, not with --prompt-ids")
    if bool(args.coordinator) != (args.num_processes > 1):
        parser.error("--coordinator and --num-processes of at least 2 go together")
    if not 0 <= args.process_id < args.num_processes:
        parser.error(f"--process-id must be in [0, {args.num_processes}), got {args.process_id}")
    return args


def find_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The checkpoint's tokenizer. Token ids can do without: then one that is broken is mentioned, and no text is shown."""
    try:
        return load_tokenizer(args.checkpoint)
    except CheckpointError as error:
        if args.prompt_ids is None:
            raise
        complain(PROGRAM, f"tokens alone, no text: {error}")
        return None


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer | None, config: Config) -> list[Sequence[int]]:
    """Token ids of each request."""
    if args.prompt_ids is not None:
        try:
            prompts = [[int(token) for token in request.split(",")] for request in args.prompt_ids.split(";")]
        except ValueError:
            raise UsageError(f'--prompt-ids must be like "1,2,3;4,5", got {args.prompt_ids!r}') from None
    elif tokenizer is None:
        raise UsageError(f"{args.checkpoint} has no tokenizer: give --prompt-ids")
    else:
        text = DEFAULT_PROMPT if args.prompt is None else args.prompt
        prompts = [encode(tokenizer, text, args.chat, args.think, PROGRAM)]
    for prompt in prompts:
        if not prompt:
            raise UsageError("a prompt must have at least one token")
        if bad := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise UsageError(f"token ids must be in [0, {config.vocab_size}), got {bad[0]}")
    batch = args.batch or len(prompts)
    if batch < len(prompts):
        raise UsageError(f"--batch must be at least the number of prompts = {len(prompts)}, got {batch}")
    return [prompts[i % len(prompts)] for i in range(batch)]


def cache_tokens(args: argparse.Namespace, prompts: list[Sequence[int]], config: Config) -> int:
    """How many tokens per request the cache must hold; checks that they fit."""
    check_context(args, config)
    longest = max(map(len, prompts))
    needed = longest + args.max_new_tokens
    limit = args.context or config.max_position_embeddings
    if needed > limit:
        raise UsageError(
            f"a prompt of {longest} tokens and {args.max_new_tokens} new ones do not fit a cache of {limit} tokens per request"
        )
    return args.context or needed


def bucket(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (int(count) - 1).bit_length()


def check_memory(config: Config, mesh: jax.sharding.Mesh | None, requests: int, context: int, options: dict[str, Any]) -> None:
    """That weights and cache fit: said before they are loaded, and with the mesh that would do."""
    sizes = dict(mesh.shape) if mesh else dict.fromkeys(NAMES, 1)
    needed = sum(bytes_per_device(config, sizes, requests, context, options))
    count, human = int(np.prod(list(sizes.values()))), memory.human
    room = memory.room()
    if jax.default_backend() != "cpu":
        if room and needed > room:
            better = fitting_mesh(room, config, requests, context, options)
            advice = "no mesh spreads them over such devices"
            if better:
                named = ",".join(f"{name}={size}" for name, size in better.items() if size > 1)
                advice = f"--mesh {named} would fit, on {np.prod(list(better.values()))} of them"
            if not config.packed:
                kept = sum(bytes_per_device(dataclasses.replace(config, packed=True), sizes, requests, context, options))
                advice += f"; --weights packed would take {human(kept)}"
            raise UsageError(f"weights and cache take {human(needed)} on each of {count} devices with {human(room)}; {advice}")
    elif jax.process_count() == 1:
        check_room(count * needed)


# ------------------------------------------------------------------------------------------------------------ the output


def time_attention(attend: Callable[[Any], Any], state: State) -> float:
    """Seconds that one step spends in plans and sparse_mla_decode, timed alone at the positions decoding ended at."""

    def timed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(attend(state.cache))
        return time.perf_counter() - began

    timed()
    return statistics.median(timed() for _ in range(11))


def attention_implementation(program: str) -> str:
    """Which of `jax_dsv4.implementations()` is in a compiled program."""
    if found := re.search(r'custom_call_target="dsv4_(aiter_)?decode', program):
        return "aiter" if found[1] else "cpu" if jax.default_backend() == "cpu" else "cuda"
    return "xla"


class Stream:
    """Prints what is drawn as it comes: requests one after the other, as all of them are drawn at a time."""

    def __init__(self, prompts: list[Sequence[int]], tokenizer: Tokenizer | None, limit: int, must_arrive: bool, silent: bool):
        self.prompts, self.tokenizer, self.limit, self.must_arrive, self.silent = prompts, tokenizer, limit, must_arrive, silent
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.ended = [False for _ in prompts]
        self.rejected = [0 for _ in prompts]
        self.failed: UsageError | None = None  # what kept the text from being written
        self.at = 0  # the request that is being printed
        self.written = ""  # of its text

    @property
    def running(self) -> bool:
        return not all(self.ended)

    def add(self, drawn: np.ndarray) -> None:
        """Takes the next tokens of each request [b, n], as `generate` returns them."""
        for i, new in enumerate(drawn):
            self.tokens[i] += [int(token) for token in new if token >= 0]
            self.ended[i] |= len(self.tokens[i]) == self.limit or bool(np.any(new == -1))
            self.rejected[i] += int(np.sum(new == REJECTED))
        if self.silent or self.failed:
            return
        try:
            with printing():
                self.write()
        except UsageError as error:
            if self.must_arrive:
                raise
            self.failed = error

    def write(self) -> None:
        while self.at < len(self.tokens):
            text, ended = self.text(self.at), self.ended[self.at]
            if ended or not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character's other bytes are in the next token
                print(text[len(self.written) :], end="", flush=True)
                self.written = text
            if not ended:
                return
            print()
            self.at, self.written = self.at + 1, ""

    def text(self, i: int) -> str:
        if self.tokenizer is None:
            return "\n" + ",".join(map(str, self.tokens[i]))
        return f"\n{self.tokenizer.decode(self.prompts[i])}{self.tokenizer.decode(self.tokens[i])}"


def print_report(report: dict[str, Any]) -> None:
    step, attention, prefill = report["seconds_per_step"], report["attention_seconds_per_step"], report["prefill_seconds"]
    batch, read = len(report["tokens"]), sum(map(len, report["prompt_ids"]))
    print()
    if step:
        print(f"{report['tokens_per_second']:10.1f}  tokens/s ({batch} requests, {1e3 * step:.2f} ms per step)")
        print(f"{report['tokens_per_step']:10.2f}  tokens of a request per step")
        print(f"{1e3 * attention:10.3f}  ms per step in attention, timed alone ({attention / step:.0%}); by {report['implementation']}")
    print(f"{prefill:10.3f}  s to read {read} tokens of prompts ({read / prefill:.1f} tokens/s, in chunks of {report['prefill_chunk']})")
    room = f"{report['cache_tokens_per_request']} tokens per request, {report['cache_layout']}"
    print(f"{report['cache_bytes']:10d}  bytes of cache ({room})")
    held = f"{memory.human(report['weights_bytes'])} of weights, {'packed' if report['weights'] == 'packed' else 'dequantised'}"
    print(f"{report['load_seconds']:10.1f}  s to load {held}; multiplied by {report['products']}")
    print(f"{report['compile_seconds']:10.1f}  s to compile prefill and decode, once; on {report['device']}")


deliver = partial(command.deliver, print_report=print_report)


if __name__ == "__main__":
    tolerate_streams()
    processes.leave(main())
