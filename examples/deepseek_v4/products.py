"""Products with weights, which are arrays or `Packed`: on a Hopper GPU by deepseek_v4/kernels.py, elsewhere by XLA.

dense       tokens times one or more matrices
experts     tokens times those of their experts
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_v4.config import Config
from deepseek_v4.packed import Fp4, Packed, unpack
from deepseek_v4.rope import rotate, turn

Matrix = Array | Packed


@cache
def kernels() -> Any:
    """The module deepseek_v4/kernels.py if the default device is a Hopper GPU and JAX has what it is written in, else None."""
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        return None
    try:
        from deepseek_v4 import kernels  # Pallas takes most of a second to import
    except ImportError:  # JAX 0.11 and 0.12 warn that Pallas's Triton is to go
        return None
    return kernels


def fused(tokens: int = 0) -> Any:
    """The module deepseek_v4/fused.py where `kernels` is there, and takes products of so many tokens; else None."""
    own = kernels()
    if own is None or tokens > own.MOST_TOKENS:
        return None
    from deepseek_v4 import fused

    return fused


@cache
def compiler_options() -> dict[str, str | bool] | None:
    """XLA's, for programs with these kernels: kernels that do not wait for each other run at once, and one is launched while the one before
    ends. Both are off by default in JAX 0.11; a step of one request takes 12 % less with them."""
    if kernels() is None or jax.__version_info__ < (0, 11):
        return None
    return {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT", "xla_gpu_enable_pdl": True}


def in_use() -> str:
    """What computes the products with experts and with packed weights on this machine, in words."""
    return "own kernels (Pallas)" if kernels() else "XLA"


def dense(x: Array, *ws: Matrix, dtype: jax.typing.DTypeLike | None = None) -> list[Array]:
    """x [..., c] times each of ws [r, c] → [..., r] of `dtype`, by default x's."""
    return dense_groups(x[..., None, :], *(jax.tree.map(lambda leaf: leaf[None], w) for w in ws), dtype=dtype, squeeze=True)


def dense_groups(x: Array, *ws: Matrix, dtype: jax.typing.DTypeLike | None = None, squeeze: bool = False) -> list[Array]:
    """x [..., g, c] times each of ws [g, r, c] → [..., g, r] of `dtype`, by default x's; [..., r] of the only group if `squeeze`."""
    dtype = dtype or x.dtype
    tokens = x.size // (x.shape[-1] * x.shape[-2])
    own = kernels()
    if takes(x, *ws) and tokens <= own.MOST_TOKENS:
        found = own.dense(x.reshape(tokens, *x.shape[-2:]), *ws, dtype=dtype)
        found = [y.reshape(*x.shape[:-1], -1) for y in found]
    else:
        found = [jnp.einsum("...gc,grc->...gr", x, unpack(w, x.dtype), preferred_element_type=dtype) for w in ws]
    return [y[..., 0, :] for y in found] if squeeze else found


@jax.jit
def dense_heads(x: Array, angle: Array, w: Matrix) -> Array:
    """x [b, t, h, k] with its heads turned by angle [b, t, 32], a group of them times each matrix of w [g, r, c] → [b, t, g, r]."""
    own, (b, t, _, k) = kernels(), x.shape
    if takes(x, w) and b * t <= own.FMA_TOKENS and not isinstance(w, Fp4):
        turns = turn(angle.reshape(b * t, -1))
        (found,) = own.dense(x.reshape(b * t, w.shape[0], -1), w, dtype=x.dtype, turn=turns, head=k)
        return found.reshape(b, t, *found.shape[1:])
    return dense_groups(rotate(x, angle[:, :, None]).reshape(b, t, w.shape[0], -1), w)[0]


def takes(x: Array, *ws: Matrix) -> bool:
    """Whether our own kernels multiply x with these."""
    own = kernels()
    return own is not None and x.dtype == jnp.bfloat16 and all(map(own.takes, ws))


@jax.jit
def dense_parts(x: Array, *ws: Matrix) -> Array:
    """The products of `dense` side by side, by our own kernels, in the parts that deepseek_v4/fused.py takes: [parts, b · t, 1, Σ r]."""
    return kernels().dense_parts(x.reshape(-1, 1, x.shape[-1]), *(jax.tree.map(lambda leaf: leaf[None], w) for w in ws))


def swiglu(gate: Array, up: Array, config: Config) -> Array:
    limit = config.swiglu_limit
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def gate_and_up(x: Array, w: Any, config: Config) -> Array:
    """What the third matrix of the shared expert is multiplied with: x [..., d] → [..., i]."""
    gate, up = dense(x, w["w1"], w["w3"], dtype=jnp.float32)
    return swiglu(gate, up, config).astype(x.dtype)


@partial(jax.jit, static_argnames="config")
def expert_parts(x: Array, chosen: Array, w: Any, config: Config) -> Array:
    """Each pair's expert of its token x [s, d], chosen [s, k], by our own kernels: `terms.Routed.experts`."""
    own, count, activate = kernels(), w["w1"].shape[0], partial(swiglu, config=config)
    if len(x) <= own.FEW_TOKENS:
        return own.few_experts(x, chosen, w, activate)
    expert = jnp.where((chosen >= 0) & (chosen < count), chosen, count).reshape(-1)
    return own.experts(x, expert, w, activate, config.n_routed_experts)


@partial(jax.jit, static_argnames="config")
def run_experts(x: Array, chosen: Array, weight: Array, w: Any, config: Config) -> Array:
    """Σ weight · expert(token) over a token's experts that are here: x [b, t, d], chosen, weight [b, t, k] → float32 [b, t, d].

    Tokens are sorted by expert and cut into blocks, each of one expert. So the experts that were chosen are read, and no others; and each
    multiplies its own tokens, and at most a block less one of others.
    """
    count = w["w1"].shape[0]
    here = (chosen >= 0) & (chosen < count)
    flat = x.reshape(-1, x.shape[-1])
    if takes(x, *w.values()):
        out = expert_parts(flat, chosen.reshape(len(flat), -1), w, config)[:, :-1].sum(axis=0)
    else:
        out = sorted_blocks(flat, jnp.where(here, chosen, count).reshape(-1), w, config)
    out = out.reshape(*chosen.shape, -1)  # [b, t, k, d]
    return jnp.where(here[..., None], out * weight[..., None], 0).sum(axis=2)


def sorted_blocks(x: Array, expert: Array, w: Any, config: Config) -> Array:
    """Each pair's expert of its token: x [s, d], expert [pairs] → float32 [pairs, d]."""
    count, per = w["w1"].shape[0], len(expert) // len(x)
    size = min(1 << max(len(expert) // config.n_routed_experts - 1, 0).bit_length(), 128)  # of a block: about the tokens of an expert
    order = jnp.argsort(expert)
    rows = x[jnp.pad(order // per, (0, size))]  # [s, d], by expert
    number = jnp.arange(count, dtype=jnp.int32)
    first, end = (compare(expert, number[:, None]).sum(axis=1, dtype=jnp.int32) for compare in (jnp.less, jnp.less_equal))
    blocks = -((first - end) // size)  # of each expert
    blocks_end = jnp.where(number <= number[:, None], blocks, 0).sum(axis=1, dtype=jnp.int32)

    def run_block(i: Array, out: Array) -> Array:
        e = jnp.sum(blocks_end <= i, dtype=jnp.int32)
        at = first[e] + (i - blocks_end[e] + blocks[e]) * size
        one = partial(lax.dynamic_index_in_dim, index=e, keepdims=False)
        w1, w3, w2 = (unpack(jax.tree.map(one, w[name]), x.dtype) for name in ("w1", "w3", "w2"))
        block = lax.dynamic_slice_in_dim(rows, at, size)
        gate, up = jnp.einsum("sd,id->si", block, w1), jnp.einsum("sd,id->si", block, w3)
        y = jnp.einsum("si,di->sd", swiglu(gate, up, config), w2, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, y, at, axis=0)  # what it writes past its expert, the next block writes anew

    out = lax.fori_loop(0, blocks_end[-1], run_block, jnp.zeros(rows.shape, jnp.float32))
    return out[jnp.argsort(order)]
