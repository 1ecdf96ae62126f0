"""Which blocks of the caches are whose: one allocator for all kinds, and the prefixes that requests share.

On the host, without JAX. A block is `BLOCK_SIZE` slots of a kind, in every layer that has this kind of cache. A page is the fewest tokens
that fill whole blocks of every kind: 256 with the published ratios. What a request must find in the caches to begin at the end N of a page:

    CSA entries, indexer's keys    of all tokens before N: the blocks of the pages, whole
    HCA entries                    likewise
    the window's latents           of the last tokens before N, and of no others: the page's `tail`
    the compressors' running rows  nothing. An HCA entry is made of 128 tokens, which divide N: none is begun. A CSA entry is made of its
                                   own 4 tokens, which divide N, and of the 4 before: the request runs these once more (serving.py)

So blocks are all that is kept. A block is written by the request that took it; to others it is read-only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from deepseek_v4.config import Kind


class Blocks:
    """The blocks of each kind, and how many hold each. One that nobody holds is free."""

    def __init__(self, sizes: Mapping[Kind, int]):
        self.free: dict[Kind, list[int]] = {kind: list(reversed(range(size))) for kind, size in sizes.items()}
        self.holders: dict[Kind, list[int]] = {kind: [0] * size for kind, size in sizes.items()}

    def take(self, kind: Kind) -> int:
        """A free block, which the caller then holds."""
        block = self.free[kind].pop()
        self.holders[kind][block] = 1
        return block

    def hold(self, kind: Kind, block: int) -> None:
        if self.holders[kind][block] < 1:
            raise ValueError(f"hold: {kind} block {block} must be held by somebody, got a free one")
        self.holders[kind][block] += 1

    def release(self, kind: Kind, block: int) -> None:
        if self.holders[kind][block] < 1:
            raise ValueError(f"release: {kind} block {block} must be held by somebody, got a free one")
        self.holders[kind][block] -= 1
        if not self.holders[kind][block]:
            self.free[kind].append(block)


@dataclasses.dataclass
class Page:
    """A page's compressed entries, in blocks that are held for it."""

    blocks: dict[Kind, list[int]]
    users: int = 0  # requests in slots that have read or written it


class Prefixes:
    """Pages that requests may share, by a hash of all tokens up to their end.

    Pages that no request uses are given up when their blocks are needed: those first that were used least recently, and none before a page
    that follows it. Tails are given up by themselves, as the window is most of a page's bytes.
    """

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        self.pages: OrderedDict[bytes, Page] = OrderedDict()  # least recently used first; what precedes a page is never before it
        self.tails: OrderedDict[bytes, list[int]] = OrderedDict()  # likewise

    def find(self, digests: Sequence[bytes]) -> int:
        """How many of these pages, one after the other from the first, a request may begin after."""
        found = 0
        for i, digest in enumerate(digests):
            if digest not in self.pages:
                break
            if digest in self.tails:
                found = i + 1
        return found

    def use(self, digests: Sequence[bytes]) -> None:
        """A request begins after these pages, which have been found."""
        for digest in reversed(digests):
            self.pages[digest].users += 1
            self.pages.move_to_end(digest)
        if digests:
            self.tails.move_to_end(digests[-1])

    def leave(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            self.pages[digest].users -= 1

    def keep(self, digests: Sequence[bytes], used: int, blocks: Mapping[Kind, Sequence[int]], tail: Sequence[int]) -> int:
        """Keeps the last of these pages, which a request has written that uses the first `used` of them, and then this one too.

        Not if it does not use all before it, or if another request has come first: then the tail alone is kept, if it was given up. So who
        uses a page uses all that precede it. Returns how many the request uses now.
        """
        digest = digests[-1]
        new = digest not in self.pages and used == len(digests) - 1
        if new:
            self.pages[digest] = Page({kind: list(numbers) for kind, numbers in blocks.items()}, users=1)
            for kind, numbers in blocks.items():
                for block in numbers:
                    self.blocks.hold(kind, block)
            for before in reversed(digests[:-1]):
                self.pages.move_to_end(before)
        if digest in self.pages and digest not in self.tails:
            self.tails[digest] = list(tail)
            for block in tail:
                self.blocks.hold("swa", block)
        return used + new

    def idle(self, kind: Kind) -> int:
        """Blocks of a compressed kind that are free or would be, if every page without users were given up."""
        return len(self.blocks.free[kind]) + sum(len(page.blocks[kind]) for page in self.pages.values() if not page.users)

    def make_room(self, kind: Kind, count: int) -> bool:
        """Gives up tails or pages until `count` blocks are free; False if there are not so many."""
        free = self.blocks.free[kind]
        if kind == "swa":
            while len(free) < count and self.tails:
                self.drop_tail(next(iter(self.tails)))
        elif len(free) < count <= self.idle(kind):
            for digest in [digest for digest, page in self.pages.items() if not page.users]:
                self.drop(digest)
                if len(free) >= count:
                    break
        return len(free) >= count

    def drop(self, digest: bytes) -> None:
        self.drop_tail(digest)
        for kind, numbers in self.pages.pop(digest).blocks.items():
            for block in numbers:
                self.blocks.release(kind, block)

    def drop_tail(self, digest: bytes) -> None:
        for block in self.tails.pop(digest, ()):
            self.blocks.release("swa", block)


def digest_page(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a page and of all before it. SHA-256, so that a prompt made to collide with another's cannot be had."""
    return hashlib.sha256(before + array("i", tokens).tobytes()).digest()
