"""Checks of arguments, and the one form that their messages have: `op: argument must rule, got got`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

INT32_MAX = 2**31 - 1
PARTS = jnp.float32, jnp.bfloat16, jnp.float16
"""Dtypes of attention to a part of the keys, which is to be merged."""

AxisName = str | tuple[str, ...]
"""A mesh axis, or several taken as one, the first outermost."""


def require(condition: bool, op: str, argument: str, rule: str, got: object) -> None:
    """Raises ValueError unless `condition` holds: the caller is wrong."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {rule}, got {got}")


def require_array(value: Any, op: str, argument: str) -> None:
    require(hasattr(value, "shape") and hasattr(value, "dtype"), op, argument, "be an array", type(value).__name__)


def require_dtype(value: Any, op: str, argument: str, *dtypes: Any) -> None:
    require_array(value, op, argument)
    names = " or ".join(jnp.dtype(d).name for d in dtypes)
    got = str(value.dtype)
    if dtypes == (jnp.int32,) and jnp.issubdtype(value.dtype, jnp.integer):
        got += f"; write {argument}.astype('int32')"
    require(value.dtype in [jnp.dtype(d) for d in dtypes], op, argument, f"have dtype {names}", got)


def require_shape(value: Any, op: str, argument: str, names: str, expected: Sequence[int | None]) -> None:
    """`expected` has None where any size will do."""
    require_array(value, op, argument)
    shape = tuple(value.shape)
    same = len(shape) == len(expected) and all(e is None or s == e for s, e in zip(shape, expected))
    wanted = "(" + ", ".join("*" if e is None else str(e) for e in expected) + ("," if len(expected) == 1 else "") + ")"
    require(same, op, argument, f"have shape {names} = {wanted}", shape)


def require_int(value: Any, op: str, argument: str, low: int, high: int = INT32_MAX) -> int:
    """A static Python integer in [low, high]."""
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(is_int, op, argument, "be a Python int", _static(value))
    require(low <= value <= high, op, argument, f"be from {low} to {high}", value)
    return int(value)


def require_float(value: Any, op: str, argument: str) -> float:
    """A static Python number."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    require(is_number, op, argument, "be a Python float", _static(value))
    return float(value)


def require_bool(value: Any, op: str, argument: str) -> bool:
    """A static Python bool."""
    require(isinstance(value, (bool, np.bool_)), op, argument, "be a Python bool", _static(value))
    return bool(value)


def _static(value: Any) -> str:
    """What was given in the place of a static value."""
    if isinstance(value, jax.core.Tracer):
        return "a traced value (name it in jax.jit's static_argnames)"
    return f"{type(value).__name__} {value!r}"


def require_fits_int32(value: int, op: str, argument: str) -> None:
    try:
        fits = value <= INT32_MAX
    except jax.errors.InconclusiveDimensionOperation:
        rule = f"fit int32 (at most {INT32_MAX}) for all sizes: give jax.export's symbolic sizes bounds, such as 'b <= 4096'"
        raise ValueError(f"{op}: {argument} must {rule}, got {value}") from None
    require(fits, op, argument, f"fit int32 (at most {INT32_MAX})", value)


def require_constant(op: str, argument: str, what: str, *sizes: int) -> None:
    """Checks sizes that must not be symbolic ones of jax.export."""
    symbolic = [size for size in sizes if jax.export.is_symbolic_dim(size)]
    require(not symbolic, op, argument, f"have a constant {what}", ", ".join(map(str, symbolic)))


def require_same_devices(op: str, **operands: Any) -> None:
    """Checks arrays that are no part of a traced program: those that were put on devices must be on the same ones."""
    arrays = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(operands) if isinstance(leaf, jax.Array)]
    put = [(path, x.sharding.device_set) for path, x in arrays if not isinstance(x, jax.core.Tracer) and x.committed]
    if any(devices != put[0][1] for _, devices in put):
        name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
        places = ", ".join(f"{name(path)} on {' '.join(sorted(map(str, devices)))}" for path, devices in put)
        require(False, op, "operands", "be on the same devices (jax.device_put moves them)", places)


def require_axis(axis_name: AxisName, op: str) -> int:
    """The size of a mesh axis that the caller's `jax.shard_map` (or `jax.vmap`) is over."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(f"{op}: axis_name must be an axis of the jax.shard_map around it, got {axis_name!r}") from None
