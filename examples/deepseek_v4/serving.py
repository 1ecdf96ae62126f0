"""Serving: requests join and leave a fixed batch of slots between steps.

`Server` is the host's part: who has which slot and which blocks. On the device are weights and caches alone; the two programs are in
slots.py. Between two chunks of a text there is a step, so that those who draw wait for one chunk at most.

Requests are seated in the order in which they came. If blocks run out, the one that came last is sent back to wait: it will read its text
again, what it had drawn included. So the one that came first is never sent back, and ends; then the next one is first.

What requests share, and why it is right, is in pages.py. The compressors' rows are each slot's own. A request that begins at N, the end of
a page, makes them by running the tokens just before N once more. Nothing of these is written to the caches, where they are already
(`Cache.shared`). One token at least must be run anyway: the last one's logits are needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import Config, Kind
from deepseek_v4.generate import GREEDY, NOT_A_TOKEN, Sampling
from deepseek_v4.model import BLOCK_SIZE, Implementation
from deepseek_v4.pages import Blocks, Prefixes, digest_page
from deepseek_v4.slots import Requests, create_layers, decode, program, read


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and what has been drawn after it."""

    number: int  # in the order in which they came
    prompt: Sequence[int]
    max_new_tokens: int
    drawn: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False
    failed: bool = False  # the model computed NaN or infinity
    # While it has a slot:
    slot: int = -1
    position: int = 0  # tokens in the caches
    shared: int = 0  # of these, tokens at the front that another request has written
    blocks: dict[Kind, dict[int, int]] = dataclasses.field(default_factory=dict)  # by kind and number within the request
    digests: list[bytes] = dataclasses.field(default_factory=list)  # of its text's pages, as far as they were needed
    kept: int = 0  # pages of its text that were found or given to `Prefixes`
    used: int = 0  # of these, pages that are there for it

    @property
    def text(self) -> list[int]:
        return [*self.prompt, *self.drawn]

    @property
    def left(self) -> int:
        return self.max_new_tokens - len(self.drawn)


@dataclasses.dataclass
class Counts:
    """What a server has done."""

    steps: int = 0  # calls of `decode`
    rows: int = 0  # requests in them, all together
    chunks: int = 0  # calls of `read`
    text_tokens: int = 0  # of all texts that were read
    shared_tokens: int = 0  # of these, not run because their pages were there
    shared_pages: int = 0
    sent_back: int = 0


class Server:
    """Draws tokens for requests that come and go.

    Args:
        slots: requests that draw at the same time.
        max_tokens: of each request, prompt included.
        cache_tokens: that the compressed caches have room for, of all requests together.
        chunk: tokens of a text per call of `read`.
        steps: per call of `decode`: tokens of each request between two looks at them.
        share: whether requests share the pages of equal prefixes.
        dtype: of the indexer's keys, unless fp8_keys: then e4m3, with a scale each.
        latents: layout and scale of the caches.
    """

    def __init__(
        self,
        config: Config,
        *,
        slots: int,
        max_tokens: int,
        cache_tokens: int,
        chunk: int,
        steps: int = 1,
        share: bool = True,
        seed: int = 0,
        sampling: Sampling = GREEDY,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        fp8_keys: bool = False,
        implementation: Implementation = None,
        **latents: Any,
    ):
        self.config, self.chunk, self.steps, self.share = config, chunk, steps, share
        self.span: dict[Kind, int] = {"swa": BLOCK_SIZE["swa"]}  # tokens that a block is for
        self.span |= {kind: BLOCK_SIZE[kind] * config.ratio(kind) for kind in sorted(set(config.layers) - {"swa"})}
        self.compressed: list[Kind] = [kind for kind in self.span if kind != "swa"]
        self.page = math.lcm(*self.span.values())
        # What a request runs once more: the tokens before its first entry that the entry is made of, one at least.
        self.again = config.csa_ratio if "csa" in self.span else 1
        self.back = config.sliding_window - 1 + self.again  # how far they look back

        def window(count: int) -> int:
            """The most blocks that `count` tokens and those they look back on are in."""
            return -(-(self.back + count - 1) // self.span["swa"]) + 1

        self.max_tokens, ring = max_tokens, window(max(chunk, steps))
        pages = {kind: -(-max_tokens // span) for kind, span in self.span.items()} | {"swa": ring}
        sizes = {kind: -(-cache_tokens // span) for kind, span in self.span.items()}
        # Every slot finds blocks for its window, of which one reads. As many as all slots need to draw can be tails besides.
        sizes["swa"] = ring + (2 * slots - 1) * window(steps)
        self.blocks = Blocks(sizes)
        self.prefixes = Prefixes(self.blocks)
        self.tables = {kind: np.zeros((slots, n), np.int32) for kind, n in pages.items()}
        self.create = partial(create_layers, config, slots, sizes, chunk, dtype, fp8_keys, **latents)
        self.seed = np.uint32(seed)
        options: Any = dict(config=config, sampling=sampling, implementation=implementation)
        self.read_chunk, self.decode_step = program(read, **options), program(decode, steps=steps, **options)

        self.waiting: deque[Request] = deque()
        self.seats: list[Request | None] = [None] * slots
        self.reading: Request | None = None
        self.submitted = 0
        self.counts = Counts()

    def start(self, weights: Any) -> None:
        """Creates the caches, and compiles both programs by running them over nothing."""
        self.weights, self.layers = weights, jax.jit(self.create)()
        self.run_read(0, 0, [], 0, 0)
        self.run_decode([])

    @property
    def room(self) -> int:
        """Tokens that a request may have, prompt included."""
        return min([self.max_tokens, *(len(self.blocks.holders[kind]) * self.span[kind] for kind in self.compressed)])

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.seats)

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> Request:
        """A new request, which waits for a slot. Raises ValueError if it would not fit even alone."""
        if not prompt:
            raise ValueError("a prompt must have at least one token")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(prompt) + max_new_tokens > self.room:
            raise ValueError(f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit a cache of {self.room} tokens")
        request = Request(self.submitted, list(prompt), max_new_tokens)
        self.submitted += 1
        self.waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """Runs a chunk of a text if one is to be read, and a step if there is who draws. Returns the requests that have drawn."""
        if self.reading is None and self.waiting:
            self.seat(self.waiting[0])
        drew = self.read() if self.reading else []
        return [*drew, *self.decode()]

    # -------------------------------------------------------------------------------------------------------- reading

    def seat(self, request: Request) -> None:
        """Gives a request a slot and blocks for its text, if there are."""
        if None not in self.seats:
            return
        text = request.text
        seated = sum(seat is not None for seat in self.seats)
        found = self.prefixes.find(self.digests(request, text)) if self.share else 0
        self.prefixes.use(request.digests[:found])
        shared = found * self.page
        wanted = {kind: -(-len(text) // span) - shared // span for kind, span in self.span.items() if kind != "swa"}
        # A block for each of the others to grow: else the next one to need it would send this one back.
        if not all(self.prefixes.make_room(kind, count + seated) for kind, count in wanted.items()):
            self.prefixes.leave(request.digests[:found])
            return

        self.waiting.popleft()
        request.slot = self.seats.index(None)
        request.kept = request.used = found
        request.shared, request.position = shared, max(shared - self.again, 0)
        request.blocks = {kind: {} for kind in self.span}
        for i, digest in enumerate(request.digests[:found]):
            for kind, numbers in self.prefixes.pages[digest].blocks.items():
                for j, block in zip(self.blocks_of(kind, i), numbers):
                    self.assign(request, kind, j, block, held=True)
        if found:
            tail = self.prefixes.tails[request.digests[found - 1]]
            for page, block in enumerate(tail, start=shared // self.span["swa"] - len(tail)):
                self.assign(request, "swa", page, block, held=True)
        for kind in wanted:
            self.grow(request, kind, len(text))
        self.seats[request.slot] = self.reading = request
        self.counts.text_tokens += len(text)
        self.counts.shared_tokens += request.position
        self.counts.shared_pages += found

    def read(self) -> list[Request]:
        request = self.reading
        assert request is not None
        text, begin = request.text, request.position
        count = min(self.chunk, len(text) - begin)
        self.slide(request, begin + count)
        token = self.run_read(request.slot, request.number, text[begin : begin + count], begin, request.shared)
        self.counts.chunks += 1
        request.position += count
        self.keep_pages(request)
        if request.position < len(text):
            return []
        self.reading = None
        self.add(request, [token])
        return [request]

    def run_read(self, slot: int, number: int, tokens: Sequence[int], position: int, shared: int) -> int:
        padded = np.zeros((1, self.chunk), np.int32)
        padded[0, : len(tokens)] = tokens
        tables = {kind: table[slot : slot + 1] for kind, table in self.tables.items()}
        request = Requests(tables, *np.array([[number], [position], [shared]], np.int32))
        data = np.int32(slot), padded, np.int32(len(tokens)), self.seed
        self.layers, token = self.read_chunk(self.weights, self.layers, request, *data)
        return int(np.asarray(token)[0])

    # -------------------------------------------------------------------------------------------------------- drawing

    def decode(self) -> list[Request]:
        for request in self.drawing():
            if request.slot >= 0:  # not sent back for an older one
                self.make_way(request)
        running = self.drawing()
        if not running:
            return []
        drawn = self.run_decode(running)
        self.counts.steps += 1
        self.counts.rows += len(running)
        for request in running:
            tokens = [int(token) for token in drawn[request.slot] if token != -1]
            request.position += len(tokens)
            self.add(request, tokens)
        return running

    def drawing(self) -> list[Request]:
        """Those whose text is read, in the order in which they came."""
        seated = (seat for seat in self.seats if seat is not None and seat is not self.reading)
        return sorted(seated, key=lambda request: request.number)

    def make_way(self, request: Request) -> None:
        """Blocks for a request's next tokens; as long as there are none, sends back the request that came last, be it this one."""
        end = request.position + min(self.steps, request.left)
        for kind in self.compressed:
            while not self.prefixes.make_room(kind, -(-end // self.span[kind]) - len(request.blocks[kind])):
                last = max((seat for seat in self.seats if seat), key=lambda seat: seat.number)
                self.send_back(last)
                if last is request:
                    return
            self.grow(request, kind, end)
        self.slide(request, end)

    def run_decode(self, running: Sequence[Request]) -> np.ndarray:
        number, token, position, shared, left = np.zeros((5, len(self.seats)), np.int32)
        for request in running:
            i = request.slot
            number[i], token[i], position[i] = request.number, request.drawn[-1], request.position
            shared[i], left[i] = request.shared, request.left
        requests = Requests(self.tables, number, position, shared)
        self.layers, drawn = self.decode_step(self.weights, self.layers, requests, token, left, self.seed)
        return np.asarray(drawn)

    def add(self, request: Request, tokens: list[int]) -> None:
        request.failed = NOT_A_TOKEN in tokens
        request.drawn += [token for token in tokens if token != NOT_A_TOKEN]
        request.ended = request.failed or not request.left or tokens[-1] in self.config.eos_token_ids
        if not request.failed:
            self.keep_pages(request)
        if request.ended:
            self.leave(request)

    def leave(self, request: Request) -> None:
        """Frees a request's slot and blocks; pages that are kept for others stay."""
        for kind, numbers in request.blocks.items():
            for block in numbers.values():
                self.blocks.release(kind, block)
        self.prefixes.leave(request.digests[: request.used])
        self.seats[request.slot] = None
        request.slot, request.used, request.blocks = -1, 0, {}
        if self.reading is request:
            self.reading = None

    def send_back(self, request: Request) -> None:
        self.leave(request)
        self.waiting.appendleft(request)
        self.counts.sent_back += 1

    # --------------------------------------------------------------------------------------------------------- blocks

    def assign(self, request: Request, kind: Kind, page: int, block: int, held: bool = False) -> None:
        if held:
            self.blocks.hold(kind, block)
        request.blocks[kind][page] = block
        table = self.tables[kind][request.slot]
        table[page % len(table)] = block  # the window's is a ring

    def grow(self, request: Request, kind: Kind, end: int) -> None:
        """Takes blocks of a compressed kind for tokens up to `end`; room has been made."""
        for page in range(len(request.blocks[kind]), -(-end // self.span[kind])):
            self.assign(request, kind, page, self.blocks.take(kind))

    def slide(self, request: Request, end: int) -> None:
        """The window's blocks for tokens from `position` to `end`: those that nothing looks back on are freed, and new ones taken.

        A block that slides out may be another request's, or a tail's, so that the new one is not written over it.
        """
        span, mine = self.span["swa"], request.blocks["swa"]
        for page in [page for page in mine if (page + 1) * span <= request.position - self.back]:
            self.blocks.release("swa", mine.pop(page))
        for page in range(request.position // span, -(-end // span)):
            if page not in mine:
                if not self.prefixes.make_room("swa", 1):
                    raise AssertionError("there are blocks for every slot's window")
                self.assign(request, "swa", page, self.blocks.take("swa"))

    def digests(self, request: Request, text: Sequence[int]) -> list[bytes]:
        """Of the pages that `text` fills."""
        for i in range(len(request.digests), len(text) // self.page):
            page = text[i * self.page : (i + 1) * self.page]
            request.digests.append(digest_page(request.digests[-1] if i else b"", page))
        return request.digests

    def keep_pages(self, request: Request) -> None:
        """Keeps for others the pages that the request has filled since it was asked last."""
        if not self.share:
            return
        span = self.span["swa"]
        for page in range(request.kept, request.position // self.page):
            digests = self.digests(request, request.text)[: page + 1]
            mine = request.blocks
            blocks = {kind: [mine[kind][i] for i in self.blocks_of(kind, page)] for kind in self.compressed}
            end = (page + 1) * self.page
            tail = [mine["swa"][i] for i in range(max(end - self.back, 0) // span, end // span)]
            request.used = self.prefixes.keep(digests, request.used, blocks, tail)
            request.kept = page + 1

    def blocks_of(self, kind: Kind, page: int) -> range:
        """The numbers of a page's blocks within the request."""
        count = self.page // self.span[kind]
        return range(page * count, (page + 1) * count)
