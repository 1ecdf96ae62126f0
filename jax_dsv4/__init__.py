"""DeepSeek-V4 sparse MLA decode for JAX."""

from jax_dsv4 import _ffi
from jax_dsv4 import reference as reference
from jax_dsv4._implementations import implementations as implementations
from jax_dsv4._ops.append import append as append
from jax_dsv4._ops.decode import sparse_mla_decode as sparse_mla_decode
from jax_dsv4._ops.plan import plan_decode as plan_decode
from jax_dsv4._work import DecodePlan as DecodePlan
from jax_dsv4.cache import KVCache as KVCache
from jax_dsv4.cache import Scope as Scope
from jax_dsv4.cache import dequantize as dequantize
from jax_dsv4.cache import fp8_scale as fp8_scale
from jax_dsv4.context import local_scope as local_scope
from jax_dsv4.context import local_slots as local_slots
from jax_dsv4.context import merge_over_axis as merge_over_axis
from jax_dsv4.context import split_scope as split_scope
from jax_dsv4.merge import apply_attn_sink as apply_attn_sink
from jax_dsv4.merge import merge_scopes as merge_scopes

__version__ = "0.1.0"

_ffi.register()
