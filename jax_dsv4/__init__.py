"""DeepSeek-V4 sparse MLA decode for JAX."""

from jax_dsv4 import reference as reference
from jax_dsv4.cache import KVCache as KVCache
from jax_dsv4.cache import Scope as Scope
from jax_dsv4.cache import append as append
from jax_dsv4.cache import dequantize as dequantize
from jax_dsv4.context import local_scope as local_scope
from jax_dsv4.context import local_slots as local_slots
from jax_dsv4.context import split_scope as split_scope
from jax_dsv4.decode import sparse_mla_decode as sparse_mla_decode
from jax_dsv4.implementations import implementations as implementations
from jax_dsv4.merge import apply_attn_sink as apply_attn_sink
from jax_dsv4.merge import merge_over_axis as merge_over_axis
from jax_dsv4.merge import merge_scopes as merge_scopes
from jax_dsv4.plan import DecodePlan as DecodePlan
from jax_dsv4.plan import plan_decode as plan_decode
