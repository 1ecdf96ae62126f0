"""Reading checkpoints: dialects of names, quantised tensors, and the one line that each kind of bad folder gets."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from example_support import (
    FP8,
    PRESETS,
    RENAMES,
    ROOT,
    CheckpointError,
    Config,
    dequantize,
    golden,
    golden_folder,
    leaves,
    load_config,
    load_weights,
    open_checkpoint,
    parse_config,
    published_name,
    quantised_checkpoint,
    safetensors,
    strict_types,  # noqa: F401
)

QUANTISED = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=160,  # not a multiple of 128: the last block of a row is a part
    q_lora_rank=64,
    vocab_size=32,
    layers=("swa", "csa"),
    n_routed_experts=2,
    moe_intermediate_size=96,
    yarn=None,
)


def test_quantised_checkpoint_is_dequantised_on_load(tmp_path):
    tensors = quantised_checkpoint(QUANTISED)
    safetensors.write(tmp_path / "model.safetensors", tensors)
    weights = load_weights(tmp_path, QUANTISED, jnp.float32)

    fp8, scale = (tensors[f"layers.1.attn.wq_a.{kind}"].astype(np.float32) for kind in ("weight", "scale"))
    expected = np.array([[fp8[i, j] * scale[i // 128, j // 128] for j in range(160)] for i in range(64)])
    np.testing.assert_array_equal(weights["layers"][1]["attn"]["wq_a"], expected)

    fp4, scale = (tensors[f"layers.1.ffn.experts.1.w3.{kind}"] for kind in ("weight", "scale"))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

    def e2m1(i: int, j: int) -> float:
        nibble = (int(fp4[i, j // 2]) & 255) >> 4 * (j % 2) & 15
        return values[nibble & 7] * (-1 if nibble & 8 else 1) * float(scale[i, j // 32])

    expected = np.array([[e2m1(i, j) for j in range(160)] for i in range(96)], np.float32)
    np.testing.assert_array_equal(weights["layers"][1]["ffn"]["experts"]["w3"][1], expected)


def test_shards_and_the_layer_that_predicts_further_change_nothing(sound, tmp_path):
    """As DeepSeek publishes: many files with an index, and the weights of `mtp.0`, which decoding does not read."""
    tensors, weight_map = quantised_checkpoint(QUANTISED), {}
    further = dataclasses.replace(QUANTISED, mtp=True)
    spare = {name: tensor for name, tensor in quantised_checkpoint(further).items() if name.startswith("mtp.0.")}
    names = sorted(tensors | spare)
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        safetensors.write(tmp_path / file, {name: (tensors | spare)[name] for name in names[i::3]})
        weight_map |= dict.fromkeys(names[i::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert not is_refused(tmp_path, sound[1])
    found = load_weights(tmp_path, further, jnp.float32)["mtp"]
    np.testing.assert_array_equal(found["enorm"], spare["mtp.0.enorm.weight"].astype(np.float32))
    for stored, loaded in (("h_proj", found["h_proj"]), ("ffn.experts.1.w2", found["layer"]["ffn"]["experts"]["w2"][1])):
        wanted = dequantize(spare[f"mtp.0.{stored}.weight"], spare[f"mtp.0.{stored}.scale"])
        np.testing.assert_array_equal(loaded, wanted)


def test_scales_may_be_floats_or_bytes():
    values = np.arange(4, dtype=np.float32).reshape(2, 2).astype(FP8)
    for scale in (np.float32(0.25), np.uint8(125), np.array(0.25, ml_dtypes.float8_e8m0fnu)):
        np.testing.assert_array_equal(dequantize(values, np.full((1, 1), scale)), values.astype(np.float32) / 4)


def test_dtype_is_of_the_matrices_alone():
    config, _, _ = golden("hca")
    weights = load_weights(golden_folder("hca"), config)
    layer = weights["layers"][0]
    assert layer["attn"]["wq_a"].dtype == weights["embed"].dtype == jnp.bfloat16
    assert layer["attn"]["sink"].dtype == layer["attn_hc"]["fn"].dtype == layer["attn_norm"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("transformers_name", "published"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.layers.7.self_attn.q_a_norm.weight", "layers.7.attn.q_norm.weight"),
        ("model.layers.7.self_attn.o_b_proj.weight_scale_inv", "layers.7.attn.wo_b.scale"),
        ("model.layers.7.attn.norm.weight", "layers.7.attn.kv_norm.weight"),
        ("model.layers.7.self_attn.compressor.gate_proj.weight", "layers.7.attn.compressor.wgate.weight"),
        ("model.layers.7.self_attn.compressor.indexer.kv_norm.weight", "layers.7.attn.indexer.compressor.norm.weight"),
        ("model.layers.7.self_attn.compressor.indexer.q_b_proj.weight", "layers.7.attn.indexer.wq_b.weight"),
        (
            "model.layers.7.self_attn.compressor.indexer.scorer.weights_proj.weight",
            "layers.7.attn.indexer.weights_proj.weight",
        ),
        ("model.layers.7.ffn_hc.scale", "layers.7.hc_ffn_scale"),
        ("model.layers.7.mlp.gate.e_score_correction_bias", "layers.7.ffn.gate.bias"),
        ("model.layers.7.mlp.experts.3.down_proj.weight", "layers.7.ffn.experts.3.w2.weight"),
        ("model.layers.7.mlp.shared_experts.gate_proj.weight", "layers.7.ffn.shared_experts.w1.weight"),
    ],
)
def test_transformers_names(transformers_name, published):
    assert published_name(transformers_name) == published
    assert published_name(published) == published


def test_published_names_are_left_alone():
    for preset in ("tiny", "v4-flash"):
        for tensor in leaves(PRESETS[preset]):
            assert published_name(tensor.name) == tensor.name
    assert len(RENAMES) == len(dict(RENAMES))


def test_published_config_dialect():
    raw = json.loads((golden_folder("yarn").parents[2] / "examples/deepseek_v4/tiny/config.json").read_text())
    assert parse_config(raw) == PRESETS["tiny"]
    # As published: one more ratio, of the layer that predicts the token after next.
    assert parse_config({**raw, "compress_ratios": [*raw["compress_ratios"], 0]}) == PRESETS["tiny"]


def write(folder, tensors, config_from):
    safetensors.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text((config_from / "config.json").read_text())


@pytest.fixture
def broken(tmp_path):
    """A function from an edit of the hca checkpoint's tensors to the message that loading it gives."""

    def message(edit) -> str:
        tensors = {name: np.asarray(array) for name, array in open_checkpoint(golden_folder("hca")).items()}
        edit(tensors)
        write(tmp_path, tensors, golden_folder("hca"))
        with pytest.raises(CheckpointError) as caught:
            load_weights(tmp_path, load_config(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


def test_a_missing_tensor_is_named(broken):
    assert "tensor layers.2.attn.wkv.weight is missing" in broken(lambda t: t.pop("layers.2.attn.wkv.weight"))


def test_a_missing_expert_is_named(broken):
    assert "tensor layers.1.ffn.experts.3.w2.weight is missing" in broken(lambda t: t.pop("layers.1.ffn.experts.3.w2.weight"))


def test_a_shape_that_does_not_fit_is_named(broken):
    message = broken(lambda t: t.update({"head.weight": t["head.weight"][:-1]}))
    assert message.endswith("tensor head.weight must have shape (96, 32), got (95, 32)")


def test_a_missing_scale_is_named(broken):
    name = "layers.0.attn.wkv.weight"
    message = broken(lambda t: t.update({name: t[name].astype(FP8)}))
    assert "tensor layers.0.attn.wkv.scale is missing" in message


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"head.weight": "model-00001.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors: named in model\.safetensors\.index\.json but not there"):
        open_checkpoint(tmp_path)


# --- Damaged files


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a checkpoint of every dtype, and its weights."""
    folder = tmp_path_factory.mktemp("sound")
    safetensors.write(folder / "model.safetensors", quantised_checkpoint(QUANTISED))
    return folder, load_weights(folder, QUANTISED, jnp.float32)


def is_refused(folder, wanted) -> bool:
    """Whether loading is refused, in one line. What is loaded must be `wanted`."""
    try:
        found = load_weights(folder, QUANTISED, jnp.float32)
    except CheckpointError as error:
        message = str(error)
    else:
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        return False
    assert "\n" not in message
    return True


def byte_classes(header: bytes) -> dict[str, list[int]]:
    """Places in a file, by what is at them; the header begins at 8."""
    places = {"length": list(range(8))}
    for name, pattern in {
        "brace": rb"[{}]",
        "bracket": rb"[\[\]]",
        "quote": rb'"',
        "colon or comma": rb"[:,]",
        "tensor name": rb"layers\.\d[\w.]*",
        "key": rb"dtype|shape|data_offsets",
        "dtype": rb'(?<="dtype":")\w+',
        "shape": rb'(?<="shape":\[)[\d,]+',
        "offset": rb'(?<="data_offsets":\[)[\d,]+',
    }.items():
        places[name] = [8 + at for match in re.finditer(pattern, header) for at in range(*match.span())]
    return places


def test_a_damaged_header_is_refused_or_does_no_harm(sound, tmp_path):
    """8 places of each class, up to 5 other bytes at each."""
    folder, wanted = sound
    whole = (folder / "model.safetensors").read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    random = np.random.default_rng(0)
    refused: Counter[bool] = Counter()
    for name, places in byte_classes(header).items():
        assert places, name
        for at in random.choice(places, min(len(places), 8), replace=False):
            for byte in {whole[at] ^ 1, whole[at] ^ 0x80, ord(" "), ord("0"), ord("]")} - {whole[at]}:
                damaged = bytearray(whole)
                damaged[at] = byte
                (tmp_path / "model.safetensors").write_bytes(damaged)
                refused[is_refused(tmp_path, wanted)] += 1
    assert refused == {True: 387}


@pytest.mark.parametrize("name", ["hca", "yarn", "tiny"])
def test_a_file_that_is_cut_off_is_refused(name, tmp_path):
    """At 20 places of each file: in its length, its header, its data, and one byte before the end."""
    folder = golden_folder(name) if name != "tiny" else ROOT / "examples" / "deepseek_v4" / "tiny"
    for file in folder.glob("*.safetensors"):
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        ends = [0, 1, 7, 8, *np.linspace(9, header, 6), *np.linspace(header + 1, len(whole) - 1, 10)]
        assert len({int(end) for end in ends}) == 20
        for end in ends:
            (tmp_path / "model.safetensors").write_bytes(whole[: int(end)])
            with pytest.raises(CheckpointError, match=r"not a (whole )?safetensors file"):
                open_checkpoint(tmp_path)
    if name != "tiny":
        text = (folder / "model.safetensors.index.json").read_text().rstrip()
        for end in np.linspace(0, len(text) - 1, 20).astype(int):
            (tmp_path / "model.safetensors.index.json").write_text(text[:end])
            with pytest.raises(CheckpointError, match="not readable as JSON"):
                open_checkpoint(tmp_path)


def test_more_bytes_than_tensors_are_refused(sound, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((sound[0] / "model.safetensors").read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file: its tensors are \d+ bytes, and it has \d+"):
        open_checkpoint(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        "text",
        {"a": None},
        {"a": [1]},
        *({"a": {key: value for key, value in ENTRY.items() if key != left_out}} for left_out in ENTRY),
        *({"a": {**ENTRY, key: value}} for key in ENTRY for value in (None, 7, {}, [None], ["2"], [2.0], [True], [-2], [2**64])),
        {"a": {**ENTRY, "data_offsets": [8, 0]}},
        {"a": {**ENTRY, "shape": [2**40, 2**40]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}, "b": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}},
    ],
    ids=str,
)
def test_a_header_that_is_no_header_is_one_line(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a (whole )?safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, 3, "a", {"a": 7}, {"a": None}, {"a": ["model.safetensors"]}], ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_an_index_that_is_no_index_is_one_line(weight_map, nested, tmp_path):
    index = {"metadata": {}, "weight_map": weight_map} if nested else weight_map
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a JSON object with a weight_map from tensors to files"):
        open_checkpoint(tmp_path)


# --- Unusual files


@pytest.mark.parametrize("dtype", ["BOOL", "U16", "U64", "I16", "F8_E5M2", "F8_E4M3FNUZ", "F6_E2M3", "F4", "C64"])
def test_an_unusual_dtype_stops_only_who_needs_it(sound, dtype, tmp_path):
    folder, wanted = sound
    file = tmp_path / "model.safetensors"
    whole = (folder / file.name).read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    known = safetensors.DTYPES.get(dtype)
    size = 160 * (np.dtype(known).itemsize if known else 1)

    def write_with(name: str) -> None:
        header, data = json.loads(whole[8:begin]), whole[begin:]
        if name in header:
            header["spare"] = header[name]
        header[name] = {"dtype": dtype, "shape": [160], "data_offsets": [len(data), len(data) + size]}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(size))

    write_with("mtp.0.flags")
    assert not is_refused(tmp_path, wanted)
    write_with("norm.weight")
    name = np.dtype(known).name if known else dtype
    with pytest.raises(CheckpointError, match=rf"tensor norm\.weight must be floats or quantised, got {name}"):
        load_weights(tmp_path, QUANTISED)


@pytest.mark.parametrize("other", ["zz.safetensors", "model.safetensors"])
def test_a_tensor_that_is_there_twice_is_refused(other, tmp_path):
    """In two files; and in one, under DeepSeek's name and under transformers'."""
    tensors = quantised_checkpoint(QUANTISED)
    again = {"lm_head.weight": tensors["head.weight"]}
    safetensors.write(tmp_path / other, again)
    safetensors.write(tmp_path / "model.safetensors", tensors | (again if other.startswith("model") else {}))
    with pytest.raises(CheckpointError, match=rf"tensor head\.weight is there twice, in model\.safetensors and {other}"):
        open_checkpoint(tmp_path)


def stacked(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Experts as one tensor a projection, called as DeepSeek or as transformers calls an expert's."""
    new = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(layers\.\d\.ffn\.experts)\.0\.(w\d)\.(weight|scale)", key):
            every = np.stack([tensors[key.replace(".experts.0.", f".experts.{e}.")] for e in range(QUANTISED.n_routed_experts)])
            new[name.format(*match.groups(), {"w1": "gate", "w2": "down", "w3": "up"}[match[2]])] = every
        elif ".experts." not in key:
            new[key] = tensor
    return new


@pytest.mark.parametrize("name", ["{0}.{1}.{2}", "{0}.{3}_proj.{2}"])
def test_stacked_experts_load_as_single_ones_do(sound, name, tmp_path):
    safetensors.write(tmp_path / "model.safetensors", stacked(quantised_checkpoint(QUANTISED), name))
    assert not is_refused(tmp_path, sound[1])


def test_stacked_and_single_experts_together_are_refused(tmp_path):
    tensors = quantised_checkpoint(QUANTISED)
    safetensors.write(tmp_path / "model.safetensors", stacked(tensors, "{0}.{1}.{2}") | tensors)
    with pytest.raises(
        CheckpointError, match=r"experts\.\*\.w\d\.weight is there twice, of all experts and as layers\.\d\.ffn\.experts\.0"
    ):
        load_weights(tmp_path, QUANTISED)


def fused_checkpoint() -> dict[str, np.ndarray]:
    """The hca checkpoint as transformers holds it in memory: gate on up projection, one tensor for all experts."""
    _, weights, _ = golden("hca")
    tensors = {key: np.asarray(tensor) for key, tensor in open_checkpoint(golden_folder("hca")).items() if ".experts." not in key}
    for i, layer in enumerate(weights["layers"]):
        experts = {key: np.asarray(tensor) for key, tensor in layer["ffn"]["experts"].items()}
        tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.concatenate([experts["w1"], experts["w3"]], axis=1)
        tensors[f"model.layers.{i}.mlp.experts.down_proj"] = experts["w2"]
    return tensors


def test_fused_experts_load_as_single_ones_do(tmp_path):
    config, weights, _ = golden("hca")
    safetensors.write(tmp_path / "model.safetensors", fused_checkpoint())
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path, config, jnp.float32), weights)


@pytest.mark.parametrize(
    ("key", "new", "message"),
    [
        ("down_proj", None, "experts.0.w2.weight is missing"),
        ("gate_up_proj", None, "experts.0.w1.weight is missing"),
        ("gate_up_proj", np.zeros((8, 66, 32), np.float32), "experts.*.w1.weight must have shape (8, 32, 32), got (8, 33, 32)"),
        ("gate_up_proj", np.zeros(64, np.float32), "experts.0.w1.weight is missing"),
        ("down_proj", np.zeros((8, 32, 33), np.float32), "experts.*.w2.weight must have shape (8, 32, 32), got (8, 32, 33)"),
        ("down_proj", np.zeros((8, 32, 32), np.int64), "experts.*.w2.weight must be floats or quantised, got int64"),
        (
            "down_proj",
            np.zeros((8, 32, 16), np.uint8),
            "experts.*.w2.weight is uint8, and tensor layers.1.ffn.experts.*.w2.scale is missing",
        ),
    ],
)
def test_fused_experts_that_do_not_fit_are_refused(key, new, message, tmp_path):
    tensors = fused_checkpoint()
    name = f"model.layers.1.mlp.experts.{key}"
    tensors.pop(name)
    safetensors.write(tmp_path / "model.safetensors", tensors if new is None else tensors | {name: new})
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, golden("hca")[0])
    assert f"tensor layers.1.ffn.{message}" in str(caught.value)


def fused_fp8(inner: int) -> tuple[Config, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A config, its checkpoint with fp8 experts one by one, and the same under transformers' names: gate on up, all experts, scales."""
    config = dataclasses.replace(QUANTISED, layers=("swa",), moe_intermediate_size=inner)
    random, single = np.random.default_rng(1), quantised_checkpoint(config)
    fused = {name: tensor for name, tensor in single.items() if ".experts." not in name}
    for name, shape in (("gate_up_proj", (2 * inner, 160)), ("down_proj", (160, inner))):
        codes = random.standard_normal((2, *shape)).astype(FP8)
        scale = (2.0 ** random.integers(-3, 4, (2, -(-shape[0] // 128), -(-shape[1] // 128)))).astype(np.float32)
        fused |= {f"model.layers.0.mlp.experts.{name}": codes, f"model.layers.0.mlp.experts.{name}_scale_inv": scale}
        for expert in range(2):
            for w, rows, blocks in (
                [("w2", slice(None), slice(None))]
                if name == "down_proj"
                else [("w1", slice(inner), slice(inner // 128)), ("w3", slice(inner, None), slice(inner // 128, None))]
            ):
                single[f"layers.0.ffn.experts.{expert}.{w}.weight"] = codes[expert, rows]
                single[f"layers.0.ffn.experts.{expert}.{w}.scale"] = scale[expert, blocks]
    return config, single, fused


def test_fused_fp8_experts_load_as_single_ones_do(tmp_path):
    config, single, fused = fused_fp8(256)
    weights = []
    for folder, tensors in ((tmp_path / "single", single), (tmp_path / "fused", fused)):
        folder.mkdir()
        safetensors.write(folder / "model.safetensors", tensors)
        weights.append(load_weights(folder, config))
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_fused_fp8_experts_whose_scales_are_of_gate_and_up_are_refused(tmp_path):
    config, _, fused = fused_fp8(192)
    safetensors.write(tmp_path / "model.safetensors", fused)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight is missing"):
        load_weights(tmp_path, config)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_code_and_scale(dtype):
    """All bytes of fp4 and fp8 with scales from 2^-100 to 2^100 and 0.7: the product in float32, rounded once."""
    codes = np.arange(256, dtype=np.uint8)
    for scale in (np.float32(2.0**-100), np.float32(1), np.float32(0.7), np.float32(2.0**100)):
        fp8 = np.tile(codes.view(FP8), (3, 1))
        with np.errstate(over="ignore"):
            wanted = (fp8.astype(np.float32) * scale).astype(dtype)
        found = dequantize(fp8, np.full((1, 2), scale), (), dtype)
        np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
        wanted = (np.stack([values[codes & 15], values[codes >> 4]], axis=-1).reshape(1, 512) * scale).astype(dtype)
        found = dequantize(codes[None], np.full((1, 16), scale), (), dtype)
        np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


@pytest.mark.parametrize("value", [-1, 2, 2**32, 0.5, float("nan")])
def test_a_route_to_no_expert_is_refused(value, tmp_path):
    tensors = quantised_checkpoint(QUANTISED)
    routes = tensors["layers.0.ffn.gate.tid2eid"].astype(type(value))
    routes[3, 1] = value
    safetensors.write(tmp_path / "model.safetensors", tensors | {"layers.0.ffn.gate.tid2eid": routes})
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.gate\.tid2eid must be integers in \[0, 2\)"):
        load_weights(tmp_path, QUANTISED)


@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint64, np.float32, ml_dtypes.bfloat16])
def test_routes_may_have_any_dtype_that_holds_them(sound, dtype, tmp_path):
    tensors = quantised_checkpoint(QUANTISED)
    routes = {name: tensor.astype(dtype) for name, tensor in tensors.items() if name.endswith("tid2eid")}
    safetensors.write(tmp_path / "model.safetensors", tensors | routes)
    assert not is_refused(tmp_path, sound[1])


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    tensors = quantised_checkpoint(QUANTISED)
    tensors["layers.0.attn.wkv.scale"] = tensors["layers.0.attn.wkv.scale"].astype(np.int32)
    safetensors.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wkv\.weight: scale must be floats or uint8, got int32"):
        load_weights(tmp_path, QUANTISED)
