"""The layer that predicts the token after next: what it computes, and that its drafts change no token."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import (
    EXACT,
    GREEDY,
    PRESETS,
    REJECTED,
    Axes,
    Sampling,
    create_cache,
    decode_loop,
    forward,
    mesh,
    one_layer,
    predict,
    read_streams,
    schema,
    strict_types,  # noqa: F401
    train_tiny,
)
from jax.sharding import PartitionSpec as P

# All kinds of layers, entries of few tokens, and so few words that a guess is right now and then.
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    layers=("csa", "hca", "swa"),
    hca_ratio=8,
    hidden_size=64,
    vocab_size=8,
    q_lora_rank=32,
    o_lora_rank=32,
    moe_intermediate_size=64,
    index_topk=8,
    num_hash_layers=0,
    mtp=True,
)
PROMPTS, LIMITS, CHUNK, MAX_TOKENS = [list(range(8)) * 5, [5, 6]], [60, 37], 16, 128


@cache
def random_weights() -> Any:
    weights = train_tiny.initialise(SMALL)
    # Residual streams in which the last token does not drown: else one word is drawn for ever.
    return {**weights, "head": 3 * weights["head"]}


@cache
def decoded(drafts: bool, axes: str | None, sampling: Sampling) -> list[list[int]]:
    """What `prefill` and `generate` return, of each request."""
    config = dataclasses.replace(SMALL, mtp=drafts)
    over = mesh.create_mesh(mesh.parse_mesh(axes), config, len(PROMPTS)) if axes else None
    programs = mesh.Programs(config, over, sampling, None)
    weights = {name: part for name, part in random_weights().items() if drafts or name != "mtp"}
    put = lambda x, tensor: jax.device_put(x, programs.sharding and programs.sharding(tensor))  # noqa: E731
    weights = jax.tree.map(put, weights, schema(config))
    options = dict(layout="float32", chunk=CHUNK, dtype=jnp.float32)
    caches = [programs.create_cache(len(PROMPTS), MAX_TOKENS, **options), programs.create_ahead(len(PROMPTS), MAX_TOKENS, **options)]
    padded = np.zeros((len(PROMPTS), 3 * CHUNK), np.int32)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    inputs = [programs.place(np.array(x, np.int32), mesh.REQUESTS) for x in (padded, list(map(len, PROMPTS)), LIMITS)]
    inputs += [programs.place(np.uint32(0), P())]
    state = programs.prefill(CHUNK)(weights, caches[0], *inputs, *([caches[1]] if drafts else []))
    first = programs.fetch(state.token)[:, None]
    _, rest = programs.generate(max(LIMITS) - 1)(weights, state)
    return np.concatenate([first, programs.fetch(rest)], axis=1).tolist()


def drawn(rows: list[list[int]]) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in rows]


def test_drafts_change_no_greedy_token() -> None:
    """On a mesh; without drafts on one device."""
    rows = decoded(True, "data=2,context=2", GREEDY)
    assert drawn(rows) == drawn(decoded(False, None, GREEDY))
    assert [len(row) for row in drawn(rows)] == LIMITS


def test_drafts_change_no_draw() -> None:
    """Some drafts are right and some are not."""
    sampling = Sampling(temperature=1.0)
    rows = decoded(True, None, sampling)
    assert drawn(rows) == drawn(decoded(False, None, sampling))
    of_steps = np.array(rows)[:, 1:].reshape(2, -1, 2)
    assert (of_steps[..., 1] == REJECTED).sum() > 5
    assert (of_steps[..., 1] >= 0).sum() > 5


@pytest.mark.parametrize("through", ["e_proj", "h_proj"])
def test_it_is_one_more_layer(through: str) -> None:
    """With one of its two inputs switched off, and of unit size, it computes what a model of that layer alone computes."""
    alone = dataclasses.replace(one_layer(SMALL), eos_token_ids=())
    w = train_tiny.initialise(SMALL, seed=1)
    embed = w["embed"] / jnp.sqrt(jnp.mean(w["embed"] ** 2, axis=-1, keepdims=True))  # which norms leave as it is
    identity, nothing = jnp.eye(SMALL.hidden_size), jnp.zeros((SMALL.hidden_size, SMALL.hidden_size))
    mtp = {**w["mtp"], "e_proj": nothing, "h_proj": nothing, through: identity}
    tokens, counts = jnp.array([[3, 1, 4, 1, 5], [2, 6, 5, 0, 0]], jnp.int32), jnp.array([5, 3], jnp.int32)
    empty = create_cache(alone, 2, 64, layout="float32", chunk=8, dtype=jnp.float32)

    weights = {"embed": embed, "layers": [mtp["layer"]], "hc_head": mtp["hc_head"], "norm": mtp["norm"]}
    x, wanted_cache = forward(weights, empty, tokens, counts, config=alone)
    wanted = read_streams(x, weights, alone)

    other = jax.random.normal(jax.random.key(0), (2, 5, SMALL.hc_mult, SMALL.hidden_size))
    streams = jnp.broadcast_to(embed[tokens][:, :, None], other.shape) if through == "h_proj" else other
    found, cache = predict({"embed": embed, "mtp": mtp}, empty, streams, tokens, counts, SMALL, None, Axes())
    for row, count in enumerate(counts.tolist()):
        np.testing.assert_allclose(found[row, :count], wanted[row, :count], rtol=0, atol=EXACT)
    np.testing.assert_array_equal(cache.position, wanted_cache.position)


def test_the_command_drafts(tmp_path, capsys) -> None:
    """Also up to a token that ends a request. It needs the layer's weights, and reports how many tokens a step drew."""
    config = dataclasses.replace(SMALL, layers=("swa",), eos_token_ids=(0,))
    weights, out = train_tiny.initialise(config), tmp_path / "out.json"
    train_tiny.save(tmp_path, weights, config, ["a"])
    command = ["--checkpoint", str(tmp_path), "--prompt-ids", "4,3;7", "--max-new-tokens", "16", "--temperature", "1"]
    command += ["--json", str(out)]
    reports = []
    for extra in ([], ["--speculate", "--prefill-chunk", "1"]):
        assert decode_loop.main([*command, *extra]) == 0
        reports.append(json.loads(out.read_text()))
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert list(map(len, reports[0]["tokens"])) == [3, 16]
    assert reports[0]["tokens_per_step"] == 1 <= reports[1]["tokens_per_step"] <= 2
    assert f"{reports[1]['tokens_per_step']:.2f}  tokens of a request per step" in capsys.readouterr().out

    del weights["mtp"]
    train_tiny.save(tmp_path, weights, dataclasses.replace(config, mtp=False), ["a"])
    assert decode_loop.main([*command, "--speculate"]) == 2
    assert "tensor mtp.0." in (said := capsys.readouterr().err.splitlines()[-1])
    assert said.endswith(" is missing")


def test_the_scale_of_an_fp8_cache_is_measured(tmp_path) -> None:
    """From the first chunk, of the drafting layer too. Latents have a mean square of 1."""
    config, out = dataclasses.replace(SMALL, layers=("swa",)), tmp_path / "out.json"
    train_tiny.save(tmp_path, train_tiny.initialise(config), config, ["a"])
    command = ["--checkpoint", str(tmp_path), "--prompt-ids", "4,3,5;7", "--max-new-tokens", "6", "--speculate", "--prefill-chunk", "2"]
    command += ["--cache-layout", "aiter_fp8", "--json", str(out)]
    assert decode_loop.main(command) == 0
    report = json.loads(out.read_text())
    assert 1 < report["cache_scale"] * 448 / 2 < 512**0.5
    assert list(map(len, report["tokens"])) == [6, 6]
