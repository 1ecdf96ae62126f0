"""Calls of implementation="aiter_gluon", whose kernel is compiled for each as it is needed."""

import importlib.util
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp

import jax_dsv4 as dsv4
from jax_dsv4 import _gluon, build_aiter
from jax_dsv4._implementations import aiter_gluon
from jax_dsv4._implementations.interface import KernelCall

CACHE = pathlib.Path(os.environ.get("JAX_DSV4_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "jax_dsv4_tests")) / "gluon"


def source() -> pathlib.Path:
    return pathlib.Path(os.environ["JAX_DSV4_AITER_SOURCE"])


def missing() -> str:
    """Why AITER's Gluon kernel cannot be compiled here, or an empty string."""
    if "JAX_DSV4_AITER_SOURCE" not in os.environ:
        return "AITER's Gluon kernel is not here: name an AITER source tree in JAX_DSV4_AITER_SOURCE"
    if importlib.util.find_spec("triton") is None:
        return "AITER's Gluon kernel is compiled by Triton: pip install triton"
    return ""


def variant(q, scopes, scale: float = 512**-0.5, fused=True) -> list[_gluon.Variant]:
    """What a call needs; what its calls need, where each scope has its own."""
    calls = [scopes] if fused else [[scope] for scope in scopes]
    return [aiter_gluon.variant_for(KernelCall(q, tuple(each), None, None, scale, q.dtype, batch_invariant=False)) for each in calls]


def compile_for(q, scopes, scale: float = 512**-0.5, fused=True) -> None:
    build_aiter.build_gluon(source(), variant(q, scopes, scale, fused))


@jax.jit
def attend(q, scopes, sink=None):
    return dsv4.sparse_mla_decode(q, *scopes, attn_sink=sink, implementation="aiter_gluon", return_lse=True)


def make_cache(rng, slots, block_size=64, nan=()):
    """Appended by our own append; the slots `nan`, and those past `slots`, hold NaN in every format."""
    cache = dsv4.KVCache.create(-(-slots // block_size) + 1, block_size)
    where = jnp.arange(cache.num_slots, dtype=jnp.int32)
    latents = rng.normal(size=(cache.num_slots, 512))
    latents[[*nan, *range(slots, cache.num_slots)]] = float("nan")
    return dsv4.append(cache, jnp.asarray(latents, jnp.float32), where, implementation="xla")
