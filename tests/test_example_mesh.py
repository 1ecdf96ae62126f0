"""The example's loop over a mesh of 8 virtual CPU devices, and over processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from example_support import (
    GREEDY,
    PRESETS,
    ROOT,
    Sampling,
    State,
    Tensor,
    decode_loop,
    dequantize,
    golden,
    golden_folder,
    load_weights,
    map_schema,
    mesh,
    safetensors,
    scaling_model,
    schema,
    strict_types,  # noqa: F401
    weights_module,
)
from hlo import collectives
from jax.sharding import PartitionSpec as P

# Small, for it is compiled for many meshes; entries of every 8 tokens, so that short texts have several.
SMALL = dataclasses.replace(
    PRESETS["tiny"],
    layers=("csa", "hca"),
    hca_ratio=8,
    hidden_size=64,
    vocab_size=96,
    q_lora_rank=32,
    o_lora_rank=32,
    moe_intermediate_size=64,
    index_topk=8,
    num_hash_layers=1,
)
PROMPTS = [list(range(1, 70)), [5, 6], [7] * 40, [90, 3, 1, 4], [8], [9, 1] * 20, [30], [2, 60, 3]]
MAX_TOKENS, CHUNK, NEW_TOKENS = 128, 16, 40


@cache
def random_weights() -> dict:
    rng = np.random.default_rng(0)

    def draw(tensor: Tensor) -> np.ndarray:
        if tensor.below is not None:
            return rng.integers(0, tensor.below, tensor.shape).astype(np.int32)
        scale = 1 if len(tensor.shape) < 2 else tensor.shape[-1] ** -0.5
        return (rng.standard_normal(tensor.shape) * scale + ("norm" in tensor.name)).astype(np.float32)

    return map_schema(draw, SMALL)


@cache
def decoded(axes: str | None, sampling: Sampling, prompts: bool, fp8_keys: bool = False) -> list[list[int]]:
    """Tokens of each request, on a mesh or on one device: after its prompt, or from a first token on, which compiles one program less."""
    over = mesh.create_mesh(mesh.parse_mesh(axes), SMALL, len(PROMPTS)) if axes else None
    programs = mesh.Programs(SMALL, over, sampling, None)
    put = lambda x, tensor: jax.device_put(x, programs.sharding and programs.sharding(tensor))  # noqa: E731
    weights = jax.tree.map(put, random_weights(), schema(SMALL))
    options = dict(layout="float32", chunk=CHUNK if prompts else 1, dtype=jnp.float32, fp8_keys=fp8_keys)
    cache = programs.create_cache(len(PROMPTS), MAX_TOKENS, **options)
    place = lambda x: programs.place(np.array(x, np.int32), mesh.REQUESTS)  # noqa: E731
    limits = place([NEW_TOKENS] * len(PROMPTS))
    if prompts:
        padded = np.zeros((len(PROMPTS), MAX_TOKENS), np.int32)
        for row, prompt in zip(padded, PROMPTS, strict=True):
            row[: len(prompt)] = prompt
        inputs = place(padded), place([len(prompt) for prompt in PROMPTS]), limits, programs.place(np.uint32(0), P())
        state = programs.prefill(CHUNK)(weights, cache, *inputs)
    else:
        keys = jax.random.split(jax.random.key(0), len(PROMPTS))
        keys = jax.device_put(keys, jax.sharding.NamedSharding(over, mesh.REQUESTS)) if over else keys
        state = State(cache, place([prompt[-1] for prompt in PROMPTS]), limits, keys)
    first = programs.fetch(state.token)[:, None]
    _, rest = programs.generate(NEW_TOKENS - 1)(weights, state)
    return np.concatenate([first, programs.fetch(rest)], axis=1).tolist()


@pytest.mark.parametrize("axes", ["model=2", "context=2", "context=8", "data=8", "data=4,model=2", "data=2,model=2,context=2"])
def test_tokens_are_one_device_s(axes: str) -> None:
    prompts = axes.count("=") > 1
    want = decoded(None, GREEDY, prompts)
    assert len({token for row in want for token in row}) > 10
    assert decoded(axes, GREEDY, prompts) == want


def test_draws_are_one_device_s() -> None:
    sampling = Sampling(temperature=1.0)
    want = decoded(None, sampling, False)
    assert len({token for row in want for token in row}) > 40
    assert decoded("data=4", sampling, False) == want


def test_fp8_keys_are_one_device_s() -> None:
    assert decoded("data=2,model=2", GREEDY, False, fp8_keys=True) == decoded(None, GREEDY, False, fp8_keys=True)


# --- What moves


@pytest.mark.parametrize("axes", ["data=8", "model=2", "context=2", "data=4,model=2", "data=2,model=2,context=2"])
def test_what_moves_is_what_the_scaling_model_says(axes: str) -> None:
    """The collectives of a compiled decode step, by kind, number and bytes; so nothing of a cache or of the weights is among them."""
    sizes = mesh.parse_mesh(axes)
    count = len(PROMPTS)
    programs = mesh.Programs(SMALL, mesh.create_mesh(sizes, SMALL, count), GREEDY, None)
    struct = lambda tensor: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype or jnp.float32)  # noqa: E731
    cache = jax.eval_shape(lambda: programs.create_cache(count, MAX_TOKENS, layout="float32", dtype=jnp.float32))
    requests = jax.ShapeDtypeStruct((count,), jnp.int32)
    state = State(cache, requests, requests, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)))
    program = programs.generate(2).lower(map_schema(struct, SMALL), state).compile()

    found = Counter()
    for moved in collectives(program):
        found.update((moved.kind, hlo.shape_bytes(shape)) for shape in moved.shapes)
    want = Counter()
    for modelled in scaling_model.collectives(SMALL, sizes, count, MAX_TOKENS, activation_bytes=4):
        want[modelled.kind, modelled.nbytes] += modelled.times
    assert found == want


def test_tables_are_those_of_the_docs() -> None:
    assert scaling_model.tables() in (ROOT / "docs" / "scaling.md").read_text()


# --- The weights


def test_each_device_loads_its_part() -> None:
    config, whole, _ = golden("yarn")
    programs = mesh.Programs(config, mesh.create_mesh(mesh.parse_mesh("data=2,model=2"), config, 2), GREEDY, None)
    tensors = jax.tree.leaves(schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor))
    parts = load_weights(golden_folder("yarn"), config, jnp.float32, sharding=programs.sharding)
    for tensor, part, all_of_it in zip(tensors, jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(part), np.asarray(all_of_it))
        size = list(tensor.shape)
        if tensor.split is not None:
            size[tensor.split] //= 4 if "*" in tensor.name else 2
        assert {shard.data.shape for shard in part.addressable_shards} == {tuple(size)}
    assert sum(tensor.split is not None for tensor in tensors) > len(tensors) // 4


def test_loading_reads_no_more_than_the_part(monkeypatch) -> None:
    """File after file; of a split tensor only the rows of this process's devices, and what several devices share only once."""
    config, _, _ = golden("yarn")
    one_device = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 4, 1), mesh.NAMES)
    reads = []
    fill = weights_module._fill

    def noted(out, tensors, tensor, folder, index):
        reads.append((tensor, index))
        fill(out, tensors, tensor, folder, index)

    monkeypatch.setattr(weights_module, "_fill", noted)
    monkeypatch.setattr(weights_module, "WORKERS", 1)
    programs = mesh.Programs(config, one_device, GREEDY, None)
    load_weights(golden_folder("yarn"), config, jnp.float32, sharding=programs.sharding)
    stored = json.loads((golden_folder("yarn") / "model.safetensors.index.json").read_text())["weight_map"]
    file_of = {weights_module.published_name(name): file for name, file in stored.items()}
    heads = [index for tensor, index in reads if tensor.name == "layers.0.attn.wq_b.weight"]
    rows = config.num_attention_heads * config.head_dim // 4
    assert [(index[0].start, index[0].stop) for index in heads] == [(i * rows, (i + 1) * rows) for i in range(4)]
    assert len([1 for tensor, _ in reads if tensor.name == "embed.weight"]) == 1
    files = [file_of[tensor.name] for tensor, _ in reads if tensor.name in file_of]
    assert sum(a != b for a, b in itertools.pairwise(files)) == len(set(files)) - 1


@pytest.mark.parametrize("stored", ["fp8", "fp4"])
def test_a_part_of_a_quantised_matrix(stored: str) -> None:
    """What the whole one has there, also where the part begins or ends inside a block of the scales."""
    rng = np.random.default_rng(0)
    rows, columns = 300, 288
    if stored == "fp8":
        packed = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
        scale = (2.0 ** rng.integers(-3, 4, (3, 3))).astype(np.float32)
    else:
        packed = rng.integers(0, 256, (rows, columns // 2)).astype(np.uint8)
        scale = rng.integers(120, 134, (rows, columns // 32)).astype(np.uint8)
    whole = dequantize(packed, scale)
    assert whole.shape == (rows, columns)
    for _ in range(30):
        (top, bottom), (left, right) = (np.sort(rng.choice(n + 1, 2, replace=False)) for n in (rows, columns))
        np.testing.assert_array_equal(dequantize(packed, scale, np.s_[top:bottom, left:right]), whole[top:bottom, left:right])
    np.testing.assert_array_equal(dequantize(packed, scale, np.s_[:, 32:]), whole[:, 32:])


# --- Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "dat=2"], "a mesh has the axes data, model, context, got 'dat' in 'dat=2'"),
        (["--mesh", ""], "a mesh has the axes data, model, context, got '' in ''"),
        (["--mesh", "data=0"], "the axis data must have a size of at least 1, as in data=2, got 'data=0'"),
        (["--mesh", "model"], "the axis model must have a size of at least 1, as in model=2, got 'model'"),
        (["--mesh", "data=2,data=2"], "each axis must be named once, got 'data=2,data=2'"),
        (["--mesh", "data=2"], "the axis data=2 must divide the 1 requests"),
        (["--mesh", "model=3"], "the axis model=3 must divide the 4 query heads"),
        (["--mesh", "model=4"], "the axis model=4 must divide the 2 groups of the output projection"),
        (["--mesh", "context=3"], "the axis context=3 must divide the 128 numbers inside an expert"),
        (["--mesh", "data=3", "--batch", "3"], "the axis data=3 must divide the 8 experts"),
        (["--mesh", "data=8,context=2", "--batch", "8"], "the product of the axes data=8, context=2 must divide the 8 experts"),
        (
            ["--mesh", "data=4,model=2", "--batch", "4"],
            "the mesh data=4,model=2,context=1 needs 8 devices, and there are 4; "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes virtual ones",
        ),
        (["--num-processes", "2"], "--coordinator and --num-processes of at least 2 go together"),
        (["--coordinator", "localhost:1"], "--coordinator and --num-processes of at least 2 go together"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"], "--process-id must be in [0, 2), got 2"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 4)  # the tiny model's 8 experts fit no mesh of more devices than tests have
    try:
        code = decode_loop.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err) == (2, "", f"decode_loop.py: {message}\n")


# --- Processes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small model, for it is compiled in each process."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = json.loads((golden_folder("hca") / "config.json").read_text())
    names = ["hidden_size", "vocab_size", "q_lora_rank", "o_lora_rank", "moe_intermediate_size", "num_attention_heads", "o_groups"]
    names += ["n_routed_experts", "num_experts_per_tok", "routed_scaling_factor"]
    names += ["index_n_heads", "index_topk", "index_head_dim", "sliding_window"]
    config |= {name: getattr(SMALL, name) for name in names}
    config |= {"layer_types": ["compressed_sparse_attention"], "num_hidden_layers": 1}
    config.pop("mlp_layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | {"num_hash_layers": 0}))
    model = decode_loop.load_config(folder)
    rng = np.random.default_rng(0)
    tensors = {}
    for tensor in jax.tree.leaves(schema(model), is_leaf=lambda leaf: isinstance(leaf, Tensor)):
        values = (rng.standard_normal(tensor.shape) * max(tensor.shape[-1], 4) ** -0.5 + ("norm" in tensor.name)).astype(np.float32)
        each = {tensor.name.replace("*", str(i)): v for i, v in enumerate(values)} if "*" in tensor.name else {tensor.name: values}
        tensors |= each
    safetensors.write(folder / "model.safetensors", tensors)
    return folder


class Processes:
    """The loop as two processes of two devices each."""

    def __init__(self, folder: Path, checkpoint: Path, timeout: int, *options: tuple[str, ...]):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(ROOT / "examples" / "decode_loop.py"), "--checkpoint", str(checkpoint)]
        command += ["--cache-layout", "float32", "--coordinator", f"localhost:{port}", "--num-processes", "2"]
        command += ["--process-timeout", str(timeout), "--prompt-ids", "1,2,3;4,5"]
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
        self.folder = folder
        self.started = []
        for i, extra in enumerate(options):
            with open(folder / f"{i}.out", "w") as out, open(folder / f"{i}.err", "w") as error:
                arguments = [*command, "--process-id", str(i), *extra]
                self.started.append(subprocess.Popen(arguments, env=environment, stdout=out, stderr=error, cwd=folder))

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; a process that has not ended by then is killed, and fails the test."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.started]
        finally:
            for process in self.started:
                process.kill()
                process.wait()

    def said(self, process: int) -> str:
        return (self.folder / f"{process}.err").read_text()


@pytest.mark.parametrize("axes", ["model=2,context=2", "data=2,context=2"])
def test_two_processes(axes, tmp_path, checkpoint) -> None:
    """Two devices each make one mesh; tokens are one device's, and process 0 reports."""
    options = ("--max-new-tokens", "6", "--mesh", axes, "--json", "out.json")
    assert Processes(tmp_path, checkpoint, 60, options, options).wait(240) == [0, 0]
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["processes"], report["mesh"]) == (2, mesh.parse_mesh(axes))
    alone = tmp_path / "one.json"
    arguments = ["--checkpoint", str(checkpoint), "--cache-layout", "float32", "--prompt-ids", "1,2,3;4,5", "--max-new-tokens", "6"]
    assert decode_loop.main([*arguments, "--json", str(alone)]) == 0
    assert report["tokens"] == json.loads(alone.read_text())["tokens"]


def test_unequal_processes(tmp_path, checkpoint) -> None:
    """One error, in both, before anything is loaded."""
    options = ("--max-new-tokens", "6", "--mesh", "data=2,model=2")
    processes = Processes(tmp_path, checkpoint, 60, options, (*options, "--seed", "1"))
    assert processes.wait(120) == [2, 2]
    message = "every process must be started with the same seed: process 1 has 1, and process 0 has 0"
    assert [processes.said(i) for i in range(2)] == [f"decode_loop.py: {message}\n"] * 2


def test_a_process_without_its_checkpoint(tmp_path, checkpoint) -> None:
    options = ("--max-new-tokens", "6", "--mesh", "data=2,model=2")
    processes = Processes(tmp_path, checkpoint, 60, options, (*options, "--checkpoint", "/nowhere"))
    assert processes.wait(120) == [2, 2]
    message = "/nowhere: no config.json there; expected a Hugging Face checkpoint folder"
    assert [processes.said(i) for i in range(2)] == [f"decode_loop.py: process 1: {message}\n"] * 2


def test_a_process_that_dies(tmp_path, checkpoint) -> None:
    """Mid-run: the other one says so and ends, within its time-out."""
    timeout = 10
    options = ("--max-new-tokens", "3000", "--mesh", "data=2,model=2")
    processes = Processes(tmp_path, checkpoint, timeout, options, options)
    deadline = time.monotonic() + 120
    # gloo says when they are connected, which is for their agreement; the first step is seconds of compilation later.
    while "connected" not in (tmp_path / "0.out").read_text() and time.monotonic() < deadline:
        assert processes.started[0].poll() is None
        time.sleep(0.1)
    processes.started[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, _ = processes.wait(10 * timeout)
    assert code != 0
    # Heartbeats are looked at now and then, and a machine under load is late: what JAX promises is about the time-out.
    assert time.monotonic() - killed < 3 * timeout
    assert re.search("process 0 stops: another one did, or cannot be reached|indicates that another task died", processes.said(0))
