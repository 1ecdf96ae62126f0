"""Serving: blocks and schedule over caches that are played, then the model itself against transformers and one request at a time."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import (
    BLOCK_SIZE,
    PRESETS,
    golden,
    pages,
    serving,
    strict_types,  # noqa: F401
)

# --------------------------------------------------------------------------------------------- the schedule, without a model

KINDS: dict[str, dict[str, Any]] = {
    "published ratios": dict(layers=("swa", "csa", "hca"), sliding_window=128),
    "window beyond a page": dict(layers=("csa", "hca"), hca_ratio=8, sliding_window=300),
    "no indexer": dict(layers=("hca",), hca_ratio=8, sliding_window=32),
    "window alone": dict(layers=("swa",), sliding_window=32),
}
VOCABULARY, END = 500, 7


class Played(serving.Server):
    """A server whose caches hold, for every token and entry, a hash of the text up to there. It is checked at every step that what the
    model would read is there, and that nobody writes what another one holds."""

    requests: list[serving.Request]
    hashes: dict[int, list[int]]

    def played(self, request: serving.Request, tokens: list[int], position: int, shared: int) -> int:
        """Runs tokens over the caches, and returns the last one's hash."""
        known = self.hashes.setdefault(request.number, [])
        text, end = request.text, position + len(tokens)
        assert list(tokens) == text[position:end]
        while len(known) < end:
            known.append(zlib.crc32(text[len(known)].to_bytes(4, "little"), known[-1] if known else 0))
        hashes = np.array(known[:end])
        self.write(request.slot, hashes, position, shared)
        self.check_reads(request.slot, hashes, position)
        return known[end - 1]

    def write(self, slot: int, hashes: np.ndarray, begin: int, shared: int) -> None:
        positions = np.arange(begin, len(hashes))
        self.rows[slot][positions] = hashes[begin:]
        self.put("swa", slot, positions[positions >= shared], hashes)
        for kind in self.compressed:
            ratio = self.config.ratio(kind)
            lasts = np.arange(max(begin, shared) // ratio, len(hashes) // ratio) * ratio + ratio - 1
            lasts = lasts[lasts >= begin]
            if len(lasts):
                needed = slice(max(lasts[0] + 1 - ratio * (2 if kind == "csa" else 1), 0), len(hashes) // ratio * ratio)
                assert (self.rows[slot][needed] == hashes[needed]).all()
                self.put(kind, slot, lasts // ratio, hashes[lasts])

    def place(self, kind: Any, slot: int, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self.tables[kind][slot]
        pages = entries // BLOCK_SIZE[kind]
        return table[pages % len(table) if kind == "swa" else pages], entries % BLOCK_SIZE[kind]

    def put(self, kind: Any, slot: int, entries: np.ndarray, values: np.ndarray) -> None:
        block, offset = self.place(kind, slot, entries)
        assert all(self.blocks.holders[kind][i] == 1 for i in set(block.tolist()))
        self.memory[kind][block, offset] = values[entries] if kind == "swa" else values

    def check_reads(self, slot: int, hashes: np.ndarray, begin: int) -> None:
        window = np.arange(max(begin - self.config.sliding_window + 1, 0), len(hashes))
        assert (self.memory["swa"][self.place("swa", slot, window)] == hashes[window]).all()
        for kind in self.compressed:
            entries = np.arange(len(hashes) // self.config.ratio(kind))
            found = self.memory[kind][self.place(kind, slot, entries)]
            assert (found == hashes[(entries + 1) * self.config.ratio(kind) - 1]).all()

    def run_read(self, slot, number, tokens, position, shared):
        if position == max(shared - self.again, 0):
            self.rows[slot][:] = -1  # another's
        return self.played(self.requests[number], tokens, position, shared) % VOCABULARY

    def run_decode(self, running):
        drawn = np.full((len(self.seats), self.steps), -1)
        for request in running:
            texts, position = list(request.drawn), request.position
            for i in range(min(self.steps, request.left)):
                imagined = dataclasses.replace(request, drawn=texts)
                token = self.played(imagined, texts[-1:], position + i, request.shared) % VOCABULARY
                drawn[request.slot, i] = token
                texts = [*texts, token]
                if token == END:
                    break
        return drawn

    def send_back(self, request):
        assert any(seat and seat.number < request.number for seat in self.seats)  # never the one that came first
        super().send_back(request)

    def check_blocks(self) -> None:
        """Everybody who has a block is counted as its holder, and nobody else."""
        held: Counter[tuple[str, int]] = Counter()
        for request in filter(None, self.seats):
            held.update((kind, block) for kind, numbers in request.blocks.items() for block in numbers.values())
        for page in self.prefixes.pages.values():
            held.update((kind, block) for kind, numbers in page.blocks.items() for block in numbers)
        held.update(("swa", block) for tail in self.prefixes.tails.values() for block in tail)
        for kind, holders in self.blocks.holders.items():
            assert holders == [held[kind, block] for block in range(len(holders))]
            assert sorted(self.blocks.free[kind]) == [block for block, count in enumerate(holders) if not count]
        users = Counter(digest for request in filter(None, self.seats) for digest in request.digests[: request.used])
        assert {digest: page.users for digest, page in self.prefixes.pages.items()} == {d: users[d] for d in self.prefixes.pages}


def play(name: str, seed: int, share: bool, tight: bool) -> Played:
    """A random load, from its first request to its last, on a server of random size: of long texts, or of long answers that are `tight`."""
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(PRESETS["tiny"], eos_token_ids=(END,), vocab_size=VOCABULARY, **KINDS[name])
    server = Played(
        config,
        slots=int(rng.integers(2, 5)),
        max_tokens=1024,
        cache_tokens=1024 if tight else int(rng.choice([1024, 4000])),
        chunk=int(rng.choice([9, 64, 300])),
        steps=int(5 if tight else rng.choice([1, 5])),
        share=share,
    )
    server.requests, server.hashes, server.rows = [], {}, np.zeros((len(server.seats), server.max_tokens), np.int64)
    server.memory = {kind: np.zeros((len(holders), BLOCK_SIZE[kind]), np.int64) for kind, holders in server.blocks.holders.items()}
    texts = [rng.integers(8, VOCABULARY, 800).tolist() for _ in range(2)]
    steps = 0
    while len(server.requests) < 10 or server.busy:
        if len(server.requests) < 10 and (not server.busy or rng.random() < 0.3):
            prompt = (
                texts[rng.integers(2)][: rng.integers(1, 100 if tight else 800)] + rng.integers(8, VOCABULARY, rng.integers(0, 9)).tolist()
            )
            server.requests.append(server.submit(prompt, int(rng.integers(500, 900) if tight else rng.integers(1, 200))))
        server.step()
        if steps % 4 == 0:
            server.check_blocks()
        steps += 1
        assert steps < 100_000
    return server


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_there_and_all_end(name: str, share: bool) -> None:
    total: Counter[str] = Counter()
    for seed in range(4):
        server = play(name, seed, share, tight=seed % 2 == 1)
        total.update(dataclasses.asdict(server.counts))
        for request in server.requests:
            assert request.ended
            assert len(request.drawn) == request.max_new_tokens or request.drawn[-1] == END
        for digest in list(server.prefixes.pages):
            server.prefixes.drop(digest)
        assert all(len(server.blocks.free[kind]) == len(holders) for kind, holders in server.blocks.holders.items())
    assert (total["shared_tokens"] > 0) == share
    assert (total["sent_back"] > 0) == (name != "window alone")  # where no text is kept whole, blocks do not run out


def test_a_block_that_nobody_holds_cannot_be_shared() -> None:
    blocks = pages.Blocks({"swa": 2})
    taken = blocks.take("swa")
    blocks.hold("swa", taken)
    blocks.release("swa", taken)
    assert taken not in blocks.free["swa"]
    blocks.release("swa", taken)
    for use in (blocks.hold, blocks.release):
        with pytest.raises(ValueError, match=f"swa block {taken} must be held by somebody, got a free one"):
            use("swa", taken)


# ----------------------------------------------------------------------------------------------------------- the model itself


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: COMPILED.append(event) if "compile" in event else None)


def create_server(share: bool) -> serving.Server:
    """Of the golden model, with three slots and three pages."""
    config, weights, _ = golden("yarn")
    options: Any = dict(slots=3, max_tokens=640, cache_tokens=768, chunk=64, dtype=jnp.float32, layout="float32")
    server = serving.Server(config, share=share, **options)
    server.start(weights)
    return server


def serve(prompts: list[list[int]], limits: list[int], share: bool, together: int = 100) -> tuple[list[list[int]], serving.Server]:
    """What is drawn for prompts, of which so many at most are there `together`."""
    server = create_server(share)
    COMPILED.clear()
    requests: list[serving.Request] = []
    while len(requests) < len(prompts) or server.busy:
        if len(requests) < len(prompts) and sum(not request.ended for request in requests) < together:
            requests.append(server.submit(prompts[len(requests)], limits[len(requests)]))
        drew = server.step()
        assert all(request.drawn for request in drew)
    return [request.drawn for request in requests], server


def load() -> tuple[list[list[int]], list[int], list[int]]:
    """Prompts and limits: of one beginning, up to a page's end and not, and some that need one more page before they end. transformers'
    own tokens for the first and the last."""
    _, _, answers = golden("yarn")
    text, wanted = answers["prompt"].tolist(), answers["tokens"].tolist()
    prompts = [text, text[:512], [*text[:300], 5, 6, 7], text[:245], text[1:254], text[:256], [9], text]
    return prompts, [64, 5, 9, 30, 20, 12, 30, 64], wanted


@pytest.mark.parametrize("share", [True, False])
def test_tokens_are_those_of_one_request_at_a_time(share: bool) -> None:
    prompts, limits, wanted = load()
    alone, _ = serve(prompts, limits, share=False, together=1)
    found, server = serve(prompts, limits, share)
    assert alone[0] == alone[-1] == wanted
    assert found == alone
    assert server.counts.sent_back > 0
    assert server.counts.rows > server.counts.steps
    assert (server.counts.shared_pages > 0) == share
    assert len(server.blocks.free["csa"]) + sum(len(page.blocks["csa"]) for page in server.prefixes.pages.values()) == 3


def test_nothing_is_compiled_when_requests_come_and_go() -> None:
    prompts, limits, _ = load()
    serve(prompts, limits, share=True)
    assert not COMPILED
    jax.jit(lambda x: x + 1)(1.0)
    assert COMPILED


def test_what_is_shared_is_not_written() -> None:
    """Not even with the same numbers: those that are there are changed first, so that one would see it."""
    text = load()[0][0]
    server = create_server(share=True)
    server.submit(text[:300], 1)
    while server.busy:
        server.step()
    (page,), (tail,) = server.prefixes.pages.values(), server.prefixes.tails.values()

    def shared() -> list[np.ndarray]:
        caches = []
        for layer in server.layers:
            caches += [(layer.swa.data, tail)]
            if layer.compressed is not None:
                kind: Any = "csa" if layer.compressed.indexer else "hca"
                caches += [(layer.compressed.extra.data, page.blocks[kind])]
            if layer.compressed is not None and layer.compressed.indexer is not None:
                caches += [(layer.compressed.indexer.keys, page.blocks["csa"])]
        return [np.asarray(data)[blocks] for data, blocks in caches]

    server.layers = jax.tree.map(lambda array: array + 1, server.layers)
    before = shared()
    server.submit(text[:280], 9)
    while server.busy:
        server.step()
    assert server.counts.shared_pages == 1
    for old, new in zip(before, shared()):
        np.testing.assert_array_equal(old, new)
