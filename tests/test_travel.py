"""Programs made in one process and run in another: exported ones, executables, and those of JAX's persistent compilation cache."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from compare import LSE, OUT_FLOAT32, assert_close, assert_same_bits
from jax.experimental import serialize_executable

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi

HEADS, TOPK, BLOCK, BLOCKS = 2, 5, 4, 3
STRIDE = BLOCK * 584 + 40

AVAILABLE = [name for name in ("cpu", "xla") if dsv4.implementations()[name].available]
OUR_CALLS = [jax.export.DisabledSafetyCheck.custom_call(target) for target in _ffi.TARGETS]
export = partial(jax.export.export, disabled_checks=OUR_CALLS)


def operands(tokens: int, blocks: int = BLOCKS) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """data, latents, slots, q, indices."""
    rng = np.random.default_rng(tokens)
    data = dsv4.reference.pack_fp8_ds_mla(rng.standard_normal((blocks * BLOCK, 512)), BLOCK, STRIDE)
    latents, q = (rng.standard_normal(shape).astype(np.float32) for shape in ((tokens, 512), (tokens, HEADS, 512)))
    indices = rng.integers(-1, blocks * BLOCK, (tokens, TOPK)).astype(np.int32)
    return tuple(map(jnp.asarray, (data, latents, np.arange(tokens, dtype=np.int32), q, indices)))  # type: ignore[return-value]


def step(cache: dsv4.KVCache, latents, slots, q, indices, implementation: str | None = None):
    """All three ops."""
    cache = dsv4.append(cache, latents, slots, implementation=implementation)
    swa = dsv4.Scope(cache, indices, 1 + slots % TOPK)
    plan = dsv4.plan_decode(swa.lengths, num_heads=HEADS, swa_topk=TOPK, implementation=implementation)
    return swa, plan, dsv4.sparse_mla_decode(q, swa, plan=plan, implementation=implementation)


def step_of_bytes(data, *rest):
    return step(dsv4.KVCache(data, block_size=BLOCK), *rest)[2]


def run(code: str, *arguments: object, **variables: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Programs as bytes

# Knows the package by its import alone.
ELSEWHERE = """
import pickle, sys
import jax
import jax_dsv4

jax.config.update("jax_num_cpu_devices", 1)  # an error where the import has touched a device

import jax.export
from jax.experimental import serialize_executable

exported, executables, arguments = pickle.load(open(sys.argv[1], "rb"))
results = {}
for name, program in exported.items():
    call = jax.export.deserialize(program).call
    results[name] = call(*arguments[name])
    results[name + ", in jit"] = jax.jit(call)(*arguments[name])
for name, executable in executables.items():
    results[name] = serialize_executable.deserialize_and_load(*executable)(*arguments[name])
pickle.dump(jax.device_get(results), open(sys.argv[2], "wb"))
"""


def test_programs_run_in_a_fresh_process(tmp_path: Path) -> None:
    """Exported functions and executables, of arrays and of our types, on this machine's default implementation and on "xla"."""
    data, *rest = operands(3)
    arrays, ours = (data, *rest), (dsv4.KVCache(data, block_size=BLOCK), *rest)
    functions = {"arrays": (step_of_bytes, arrays), "our types": (step, ours), "xla": (partial(step, implementation="xla"), ours)}
    exported = {name: export(jax.jit(f))(*a).serialize() for name, (f, a) in functions.items()}
    executables = {
        f"executable, {name}": serialize_executable.serialize(jax.jit(f).lower(*a).compile()) for name, (f, a) in functions.items()
    }
    arguments = {name: a for name, (_, a) in functions.items()} | {f"executable, {name}": a for name, (_, a) in functions.items()}
    (tmp_path / "programs").write_bytes(pickle.dumps((exported, executables, arguments)))
    run(ELSEWHERE, tmp_path / "programs", tmp_path / "results")
    results = pickle.loads((tmp_path / "results").read_bytes())
    assert len(results) == 9
    for name, got in results.items():
        function, a = functions[name.removeprefix("executable, ").removesuffix(", in jit")]
        want = jax.jit(function)(*a)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            assert_same_bits(name, x, y)


def test_importing_needs_no_device() -> None:
    assert run("import jax_dsv4; print(jax_dsv4.__name__)", JAX_PLATFORMS="no_such_platform") == "jax_dsv4\n"


# --- Symbolic sizes


def symbolic(sizes: dict[str, str], *constraints: str) -> list[jax.ShapeDtypeStruct]:
    """Shapes of data, q, indices and lengths, with the sizes given by name."""
    shapes = {"tokens": "2", "heads": str(HEADS), "topk": str(TOPK), "blocks": str(BLOCKS)} | sizes
    forms = "{blocks}, " + str(STRIDE), "{tokens}, {heads}, 512", "{tokens}, {topk}", "{tokens}"
    scope = jax.export.SymbolicScope(constraints)
    dtypes = jnp.uint8, jnp.float32, jnp.int32, jnp.int32
    return [jax.ShapeDtypeStruct(jax.export.symbolic_shape(f.format(**shapes), scope=scope), d) for f, d in zip(forms, dtypes)]


def attend(data, q, indices, lengths, implementation: str):
    swa = dsv4.Scope(dsv4.KVCache(data, block_size=BLOCK), indices, lengths)
    return dsv4.sparse_mla_decode(q, swa, implementation=implementation, return_lse=True)


@pytest.mark.parametrize(
    ("implementation", "sizes", "bounds"),
    [(name, {"blocks": "n"}, ("n <= 4096",)) for name in AVAILABLE]
    + [("xla", {"tokens": "b"}, ("b <= 512",)), ("xla", {"tokens": "b", "blocks": "n"}, ("b <= 512", "n <= 4096"))],
)
def test_symbolic_sizes(implementation: str, sizes: dict[str, str], bounds: tuple[str, ...]) -> None:
    """One program for two sizes."""
    program = partial(attend, implementation=implementation)
    exported = jax.export.deserialize(export(jax.jit(program))(*symbolic(sizes, *bounds)).serialize())
    for tokens, blocks in ((2, 3), (5 if "tokens" in sizes else 2, 7 if "blocks" in sizes else 3)):
        data, _, slots, q, indices = operands(tokens, blocks)
        arguments = data, q, indices, slots + 2
        (out, lse), want = exported.call(*arguments), program(*arguments)
        assert_close("out", out, np.asarray(want[0], np.float64), OUT_FLOAT32)
        assert_close("lse", lse, np.asarray(want[1], np.float64), LSE)


@pytest.mark.parametrize("implementation", AVAILABLE)
def test_symbolic_sizes_of_an_append(implementation: str) -> None:
    def write(data, latents, slots):
        return dsv4.append(dsv4.KVCache(data, block_size=BLOCK), latents, slots, implementation=implementation).data

    scope = jax.export.SymbolicScope(["n <= 4096"])
    shapes = [jax.export.symbolic_shape(shape, scope=scope) for shape in (f"n, {STRIDE}", "b, 512", "b")]
    exported = export(jax.jit(write))(*map(jax.ShapeDtypeStruct, shapes, (jnp.uint8, jnp.float32, jnp.int32)))
    for tokens, blocks in ((1, 3), (4, 5)):
        arguments = operands(tokens, blocks)[:3]
        assert_same_bits(f"{tokens} rows", exported.call(*arguments), write(*arguments))


def test_symbolic_sizes_of_dequantize() -> None:
    def read(data, slots):
        return dsv4.dequantize(dsv4.KVCache(data, block_size=BLOCK), slots)

    scope = jax.export.SymbolicScope(["n <= 4096"])
    shapes = [jax.export.symbolic_shape(shape, scope=scope) for shape in (f"n, {STRIDE}", "b")]
    exported = export(jax.jit(read))(*map(jax.ShapeDtypeStruct, shapes, (jnp.uint8, jnp.int32)))
    for tokens, blocks in ((1, 3), (4, 5)):
        data, _, slots, *_ = operands(tokens, blocks)
        assert_same_bits(f"{tokens} rows", exported.call(data, slots), read(data, slots))


UNBOUNDED = "for all sizes: give jax.export's symbolic sizes bounds, such as 'b <= 4096', got"
REFUSED: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    "topk": ({"topk": "k"}, ("k <= 64",), "sparse_mla_decode: swa.indices must have a constant topk, got k"),
    "heads": ({"heads": "h"}, ("h <= 128",), "sparse_mla_decode: q must have a constant number of heads, got h"),
    "tokens without a bound": ({"tokens": "b"}, (), f"tokens * topk must fit int32 (at most 2147483647) {UNBOUNDED} 5*b"),
    "blocks without a bound": ({"blocks": "n"}, (), f"num_blocks * block_size must fit int32 (at most 2147483647) {UNBOUNDED} 4*n"),
    "blocks with too high a bound": ({"blocks": "n"}, ("n <= 2147483647",), f"at most 2147483647) {UNBOUNDED} 4*n"),
}


@pytest.mark.parametrize("implementation", AVAILABLE)
@pytest.mark.parametrize("name", REFUSED)
def test_symbolic_sizes_that_are_refused(name: str, implementation: str) -> None:
    sizes, bounds, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        export(jax.jit(partial(attend, implementation=implementation)))(*symbolic(sizes, *bounds))


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="no native CPU library")
def test_symbolic_tokens_of_native_implementations_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=re.escape("cpu: it needs constant batch axes, not b tokens")):
        export(jax.jit(partial(attend, implementation="cpu")))(*symbolic({"tokens": "b"}, "b <= 512"))


def test_symbolic_lengths_of_a_plan_are_refused() -> None:
    lengths = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), jnp.int32)
    with pytest.raises(ValueError, match="plan_decode: swa_lengths must have a constant shape, got b"):
        export(jax.jit(partial(dsv4.plan_decode, num_heads=HEADS, swa_topk=TOPK)))(lengths)


# --- The persistent compilation cache

# Prints for each kind of mesh, and for automatic ones for two scales, whether the program was found, and the sum of what it computed.
FINDER = """
import json
import jax, jax.numpy as jnp, numpy as np
import jax_dsv4 as dsv4
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 2)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))
rng = np.random.default_rng(0)
q = rng.standard_normal((4, 2, 512), np.float32)
cache = dsv4.KVCache.create(2, 4, "float32").replace(jnp.asarray(rng.standard_normal((2, 4, 512)), jnp.float32))
swa = dsv4.Scope(cache, np.arange(12, dtype=np.int32).reshape(4, 3) % 8, np.full(4, 3, np.int32))


def attend(scale, q, swa):
    return dsv4.sparse_mla_decode(q, swa, scale=scale)


def mesh(kind):
    return jax.make_mesh((2,), ("x",), axis_types=(kind,))


def placed(mesh):
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    return put(q, "x"), dsv4.Scope(jax.tree.map(put, swa.cache), put(swa.indices, "x"), put(swa.lengths, "x"))


def found(function, *arguments):
    events.clear()
    out = jax.block_until_ready(jax.jit(function)(*arguments))
    # A program's own compilation comes first; JAX may look up others while it partitions.
    return [next(e for e in events if e in ("cache_hits", "cache_misses")) == "cache_hits", float(np.abs(out).sum(dtype=np.float64))]


specs = P("x"), dsv4.Scope(P(), P("x"), P("x"))
by_hand = jax.shard_map(lambda q, swa: attend(1.0, q, swa), mesh=mesh(AxisType.Auto), in_specs=specs, out_specs=P("x"))
explicit = placed(mesh(AxisType.Explicit))
automatic = placed(mesh(AxisType.Auto))
results = {
    "one device": found(lambda q, swa: attend(1.0, q, swa), q, swa),
    "shard_map": found(by_hand, q, swa),
    "explicit": found(lambda q, swa: attend(1.0, q, swa), *explicit),
    "automatic": found(lambda q, swa: attend(1.0, q, swa), *automatic),
    "automatic, another scale": found(lambda q, swa: attend(0.01, q, swa), *automatic),
}
print(json.dumps(results))
"""
AUTOMATIC = ("automatic", "automatic, another scale")


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., dict[str, tuple[bool, float]]]:
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return lambda **variables: {name: tuple(found) for name, found in json.loads(run(FINDER, **settings, **variables)).items()}


def test_programs_are_found_in_the_persistent_cache(find: Callable[..., dict[str, tuple[bool, float]]]) -> None:
    """But for automatic meshes: JAX's key has a pointer then. Without pointers it has the call, and two calls are still two."""
    first, second = find(), find()
    assert {name: hit for name, (hit, _) in first.items()} == dict.fromkeys(first, False)
    assert {name: hit for name, (hit, _) in second.items()} == {name: name not in AUTOMATIC for name in first}
    flag = {"JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1"}
    third, fourth = find(**flag), find(**flag)
    assert not any(third[name][0] for name in AUTOMATIC)
    assert all(hit for hit, _ in fourth.values())
    for results in (second, third, fourth):
        assert [total for _, total in results.values()] == [total for _, total in first.values()]
    assert len({total for _, total in first.values()}) == 2  # a scale each
