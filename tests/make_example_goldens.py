"""Writes tests/data/example_{name}/: two random models of transformers as checkpoints, and what they answer.

    python tests/make_example_goldens.py        (needs the `oracle` extra)

`answers.npz` holds the exact answers (as `hf_oracle.answers` returns them) and, under `fp8_…`, those over a simulated fp8 cache
(`hf_oracle.packed_answers`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import hf_oracle
import numpy as np

GOLDEN = ("yarn", "hca")  # every layer kind, hash layers (yarn has one), full 128-token windows


def main() -> None:
    for name in GOLDEN:
        folder = Path(__file__).parent / "data" / f"example_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        model, prompt = hf_oracle.make_model(name), hf_oracle.prompt_ids(name)
        # Two shards, so that the plain suite reads an index too.
        hf_oracle.save(model, folder, max_shard_size="512KB")
        answers = hf_oracle.answers(model, prompt)
        fp8 = hf_oracle.packed_answers(model, prompt)
        np.savez_compressed(folder / "answers.npz", **answers, **{f"fp8_{key}": value for key, value in fp8.items()})
        print(folder, sum(file.stat().st_size for file in folder.iterdir()) // 1024, "KiB")


if __name__ == "__main__":
    main()
