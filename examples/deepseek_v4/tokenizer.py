"""Text to token ids and back: a Hugging Face tokenizer.json, or the plain list of pieces of the tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_v4.config import CheckpointError


class Pieces:
    """A vocabulary of strings; text is cut into the longest piece that fits, again and again."""

    def __init__(self, pieces: Sequence[str]):
        self.pieces = pieces
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.longest = max(map(len, pieces))

    def encode(self, text: str) -> list[int]:
        ids, at = [], 0
        while at < len(text):
            fitting = (text[at : at + n] for n in range(self.longest, 0, -1))
            piece = next((piece for piece in fitting if piece in self.ids), None)
            if piece:
                ids.append(self.ids[piece])
            at += len(piece or " ")  # a character without a piece is left out
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


class HuggingFace:
    """tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError:
            raise CheckpointError(f"{path} needs the package tokenizers: pip install 'jax-dsv4[example]'") from None
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no narrower type
            raise CheckpointError(f"{path}: {error}") from None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))


def load_tokenizer(folder: str | Path) -> Pieces | HuggingFace | None:
    """The tokenizer in `folder`, if there is one."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return HuggingFace(folder / "tokenizer.json")
    if (folder / "pieces.json").exists():
        return Pieces(json.loads((folder / "pieces.json").read_text()))
    return None
