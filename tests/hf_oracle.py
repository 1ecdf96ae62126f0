"""Random DeepSeek-V4s of Hugging Face transformers, and what they answer: the implementation we did not write.

Needs the `oracle` extra (transformers and torch). test_example_oracle.py runs it live; make_example_goldens.py keeps the
answers of two models under tests/data, so that the plain suite holds ours to them without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import transformers
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

SMALL = dict(
    num_hidden_layers=4,
    vocab_size=96,
    hidden_size=32,
    moe_intermediate_size=32,
    num_attention_heads=4,
    q_lora_rank=16,
    num_experts_per_tok=2,
    n_routed_experts=8,
    routed_scaling_factor=1.5,
    o_groups=2,
    o_lora_rank=16,
    # Many indexer heads: where all of few heads are cut off by the relu, scores tie at 0, and any pick is right.
    index_n_heads=16,
    index_topk=12,
    eos_token_id=None,
    max_position_embeddings=4096,
)

# name: (sizes, prompt length). 64 tokens are decoded after each prompt.
CONFIGS = {
    # More than 128 compressed entries, and positions far past YaRN's original context.
    "yarn": (
        dict(
            layer_types=[SWA, CSA, HCA, CSA],
            num_hash_layers=1,
            rope_scaling=dict(rope_type="yarn", factor=16, original_max_position_embeddings=64, beta_fast=32, beta_slow=1),
        ),
        530,
    ),
    "hash": (dict(layer_types=[SWA, SWA, CSA, HCA], num_hash_layers=2), 100),
    # Two full windows of 128 in the prompt; the third fills while decoding.
    "hca": (dict(layer_types=[HCA, HCA, CSA, HCA], num_hash_layers=0, index_topk=40, swiglu_limit=0.5), 350),
    # Every setting at a value that DeepSeek's models do not have.
    "settings": (
        dict(
            layer_types=[CSA, SWA, HCA, CSA],
            num_hash_layers=1,
            compress_rate_csa=6,
            compress_rate_hca=40,
            sliding_window=50,
            qk_rope_head_dim=128,
            index_head_dim=192,
            num_attention_heads=6,
            o_groups=3,
            num_experts_per_tok=3,
            routed_scaling_factor=2.5,
            swiglu_limit=0.75,
            rms_norm_eps=1e-3,
            hc_mult=3,
            hc_eps=1e-2,
            hc_sinkhorn_iters=2,
            rope_parameters=dict(
                main=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.25),
                compress=dict(
                    rope_type="yarn",
                    rope_theta=3000.0,
                    partial_rotary_factor=0.25,
                    factor=4,
                    original_max_position_embeddings=128,
                    beta_fast=20,
                    beta_slow=2,
                    attention_factor=1.0,
                ),
            ),
        ),
        200,
    ),
}

DECODED = 64


def make_model(name: str, seed: int = 0) -> DeepseekV4ForCausalLM:
    """A random fp32 model in which nothing is left at a value that would hide a bug (zero sinks, unit norms, …).

    Every value is representable in bfloat16, so a bfloat16 checkpoint holds it exactly.
    """
    sizes, _ = CONFIGS[name]
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**{**SMALL, **sizes})).eval()
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return torch.normal(mean, std, tuple(shape), generator=generator).bfloat16().float()

    with torch.no_grad():
        for key, value in sorted(model.state_dict().items()):
            if key.endswith("tid2eid"):
                draw = torch.rand(len(value), model.config.n_routed_experts, generator=generator)
                value.copy_(draw.argsort(dim=-1)[:, : value.shape[1]])
            elif key.endswith(("norm.weight", "layernorm.weight", "scale")):
                value.copy_(normal(value.shape, 1.0, 0.2))
            elif value.ndim == 1 or key.endswith("position_bias"):  # sinks, hc bases, routing biases, ape
                value.copy_(normal(value.shape, 0.0, 0.5))
            elif "embed_tokens" in key:
                value.copy_(normal(value.shape))
            else:
                value.copy_(normal(value.shape, 0.0, 1.5 / math.sqrt(value.shape[-1])))
    return model


def prompt_ids(name: str, seed: int = 0) -> np.ndarray:
    _, length = CONFIGS[name]
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], length)


def save(model: DeepseekV4ForCausalLM, folder: str | Path, **options) -> None:
    """save_pretrained in bfloat16, which loses nothing here; the model itself stays float32."""
    state = {key: value.bfloat16() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, **options)


@torch.no_grad()
def answers(model: DeepseekV4ForCausalLM, prompt: np.ndarray, cache=None) -> dict[str, np.ndarray]:
    """Logits of every prompt token, then DECODED greedy tokens, one step each, and the logits they came from."""
    out = model(torch.tensor(prompt[None]), cache=cache, use_cache=True)
    prefill = out.logits[0].numpy()
    tokens, logits = [], [out.logits[0, -1]]
    for _ in range(DECODED):
        tokens.append(int(logits[-1].argmax()))
        out = model(torch.tensor([[tokens[-1]]]), cache=out.cache, use_cache=True)
        logits.append(out.logits[0, -1])
    return {
        "prompt": prompt.astype(np.int32),
        "prefill_logits": prefill,  # [prompt, vocabulary]
        "tokens": np.array(tokens, np.int32),  # [DECODED]
        "decode_logits": np.stack(logits[1:]),  # [DECODED, vocabulary]: after each of `tokens`
    }


def packed_answers(model: DeepseekV4ForCausalLM, prompt: np.ndarray) -> dict[str, np.ndarray]:
    """`answers` of the model over a simulated fp8_ds_mla cache: every latent makes a round trip through its bytes."""
    cache = transformers.DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.update = _on_update(layer.update)
        if hasattr(layer, "update_compressor_states"):
            layer.update_compressor_states = _on_compressed(layer.update_compressor_states)

    return answers(model, prompt, cache)


def _on_update(update: Callable) -> Callable:
    return lambda key, value, *args, **kwargs: update(_round_trip(key), _round_trip(value), *args, **kwargs)


def _on_compressed(update: Callable) -> Callable:
    # The indexer's keys pass here too; they are not latents.
    return lambda name, entry: update(name, _round_trip(entry) if name == "compressor" else entry)


def _round_trip(latent: torch.Tensor) -> torch.Tensor:
    """Latents [..., 512] as an fp8_ds_mla cache gives them back, in NumPy."""
    latent = latent.numpy()
    tiles = latent[..., :448].reshape(*latent.shape[:-1], 7, 64).astype(np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(tiles).max(-1, keepdims=True), 1e-4) / 448))
    nope = ((tiles / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale).reshape(*latent.shape[:-1], 448)
    rope = latent[..., 448:].astype(ml_dtypes.bfloat16).astype(np.float32)
    return torch.tensor(np.concatenate([nope.astype(np.float32), rope], axis=-1))
