"""How the ops partition over a mesh: which dimensions may be split, and what each device then runs.

A call is described by labels, one for each dimension of each operand and result. A dimension with a label may be split over mesh axes,
and all dimensions of that label are split alike; one without stays whole. What runs on each device is the ordinary call on local shapes,
with no collective in it. Automatic mode goes through JAX's custom partitioning with a Shardy rule, explicit mode through `jax.shard_map`;
where there is one device, or a `shard_map` around the call, both are the call itself.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_dsv4 import _checks

Tree = TypeVar("Tree")
MeshAxes = str | tuple[str, ...]


class Dims(NamedTuple):
    """The dimensions of one array.

    labels  one per dimension, None where it is not split
    whole   the array's name in messages, if it is so large that resharding it would be a mistake: a cache
    """

    labels: tuple[str | None, ...]
    whole: str = ""

    @classmethod
    def unsplit(cls, array: jax.Array | jax.ShapeDtypeStruct, whole: str = "") -> Dims:
        return cls((None,) * array.ndim, whole)

    def spec(self, axes: dict[str, MeshAxes]) -> PartitionSpec:
        """The partition of an array, from the mesh axes of each label."""
        return PartitionSpec(*(axes.get(label) if label else None for label in self.labels))

    def require_whole(self, op: str, spec: PartitionSpec | None) -> None:
        if self.whole:
            _require(op, self.whole, spec is None or not any(spec), spec)


def require_whole(op: str, name: str, array: jax.Array) -> None:
    """Checks an array that is none of a traced program, so that no partitioner will look at it."""
    if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
        _require(op, name, array.is_fully_replicated, array.sharding)


def _require(op: str, name: str, whole: bool, sharding: object) -> None:
    rule = "be whole on every device here (a cache's blocks are spread under jax.shard_map, with local_scope and merge_over_axis)"
    _checks.require(whole, op, f"{name}'s data", rule, f"sharding {sharding}")


def partitioned(
    op: str, call: Callable[..., tuple[jax.Array, ...]], operands: Sequence[Dims], results: Sequence[Dims]
) -> Callable[..., tuple[jax.Array, ...]]:
    """`call`, from arrays to a tuple of arrays, partitioned by its labels. Earlier operands lead: others are split as they are."""
    automatic = custom_partitioning(call)

    def partition(mesh, arrays, shapes):  # type: ignore[no-untyped-def]
        if mesh.empty:  # inside a shard_map that is manual over some of the mesh's axes, where JAX names no others
            shardings = [tuple(x.sharding for x in side) for side in (shapes, arrays)]
            _require_alike(op, zip((*operands, *results), (*arrays, *shapes)))
            return mesh, call, *shardings
        for dims, array in zip(operands, arrays):
            dims.require_whole(op, array.sharding.spec)
        axes = _axes((*operands, *results), [x.sharding.spec for x in (*arrays, *shapes)])
        return mesh, call, *(tuple(NamedSharding(mesh, dims.spec(axes)) for dims in side) for side in (results, operands))

    automatic.def_partition(partition, sharding_rule=_shardy_rule(operands, results))

    def partitioned_call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        shardings = [jax.typeof(array).sharding for array in arrays]
        mesh = next((s.mesh for s in shardings if not s.mesh.empty), shardings[0].mesh)
        if AxisType.Explicit not in mesh.axis_types:
            with _in_cache_key(call, arrays):
                parts: tuple[jax.Array, ...] = automatic(*arrays)
            return parts
        if set(mesh.axis_types) != {AxisType.Explicit}:
            kinds = ", ".join(f"{name}: {kind}" for name, kind in zip(mesh.axis_names, mesh.axis_types))
            raise NotImplementedError(f"{op}: a mesh must be explicit in all of its axes or in none, got {kinds}")
        for dims, sharding in zip(operands, shardings):
            dims.require_whole(op, sharding.spec)
        axes = _axes(operands, [sharding.spec for sharding in shardings])
        specs, result_specs = (tuple(dims.spec(axes) for dims in side) for side in (operands, results))
        arrays = tuple(jax.sharding.reshard(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs))
        parts = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=result_specs, check_vma=False)(*arrays)
        return parts

    return partitioned_call


def _in_cache_key(call: Callable[..., object], arrays: Sequence[jax.Array]) -> contextlib.AbstractContextManager[object]:
    """What makes `call` a part of a program's key in JAX's persistent compilation cache.

    Of a call that is partitioned automatically, the key has a pointer. Where JAX is told to leave pointers out of keys, the call itself
    must be in: all else is equal for different scales, layouts and block sizes.
    """
    if not jax.config.jax_remove_custom_partitioning_ptr_from_cache_key:  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    program = str(jax.make_jaxpr(call)(*arrays))
    return set_xla_metadata(jax_dsv4=hashlib.sha256(program.encode()).hexdigest())


def _axes(dims: Sequence[Dims], specs: Iterable[PartitionSpec]) -> dict[str, MeshAxes]:
    """The mesh axes of each label: those of the first array that is split along it, less what an earlier label has."""
    axes: dict[str, MeshAxes] = {}
    used: set[str] = set()
    for array, spec in zip(dims, specs):
        for label, names in zip(array.labels, spec):
            taken = {names} if isinstance(names, str) else set(names or ())
            if label and taken and label not in axes and not taken & used:
                axes[label] = names
                used |= taken
    return axes


def _require_alike(op: str, arrays: Any) -> None:
    """Checks that arrays are split alike along each label, and those that stay whole not at all."""
    size: dict[str | None, int] = {}
    for dims, array in arrays:
        for label, whole, part in zip(dims.labels, array.shape, array.sharding.shard_shape(array.shape)):
            rule = "be split alike in a shard_map over some of the mesh's axes (make it one over all of them)"
            _checks.require(part == (size.setdefault(label, part) if label else whole), op, "operands", rule, f"{array.shape} and {part}")


def _shardy_rule(operands: Sequence[Dims], results: Sequence[Dims]) -> str:
    """In Shardy's notation; a dimension that stays whole is a factor of its own."""

    def side(arrays: Sequence[Dims], own: str) -> str:
        return ", ".join(" ".join(label or f"{own}{i}_{j}" for j, label in enumerate(dims.labels)) for i, dims in enumerate(arrays))

    return f"{side(operands, 'x')} -> {side(results, 'y')}"


def is_explicit(tree: object) -> bool:
    """Whether any of the arrays carries axes of an explicit mesh in its type."""
    return any(AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types for x in jax.tree.leaves(tree))


def varying_axes(tree: object) -> frozenset[str]:
    """The axes of the shard_map around along which any of the arrays differs between devices."""
    none: frozenset[str] = frozenset()
    return none.union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary(tree: Tree, axes: frozenset[str]) -> Tree:
    """The arrays with types that say that they differ along `axes`."""

    def one(x: jax.Array) -> jax.Array:
        missing = axes - varying_axes(x)
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    varied: Tree = jax.tree.map(one, tree)
    return varied
