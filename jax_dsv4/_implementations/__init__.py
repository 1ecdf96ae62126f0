"""The implementations of the ops, and how a call chooses among them.

An implementation is chosen when a program is lowered, for the platform it is lowered for, so that one traced program can be exported
for several. Each is an object with the methods of `interface.Implementation`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.export

from jax_dsv4 import _checks
from jax_dsv4._implementations import aiter, aiter_gluon, cpu, cuda, xla
from jax_dsv4._implementations.interface import Availability, Implementation

# In order of preference.
REGISTRY: dict[str, Implementation] = {i.name: i for i in (cpu.CPU, cuda.CUDA, aiter.AITER, aiter_gluon.AITER_GLUON, xla.XLA)}


@dataclass(frozen=True)
class Chosen:
    """The implementation for each platform that has one, by JAX's names; "" stands for any other platform."""

    by_platform: tuple[tuple[str, Implementation], ...]

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        return tuple(implementation for _, implementation in self.by_platform)

    @property
    def plain_jax(self) -> bool:
        """Whether no platform has a native implementation."""
        return all(platform == "" for platform, _ in self.by_platform)


def implementations() -> dict[str, Availability]:
    """Which implementations can run in this process, in order of preference.

    Returns:
      By name, a pair: `available`, and `detail`, which says what it is, or why it is absent.
    """
    return {name: implementation.availability() for name, implementation in REGISTRY.items()}


def names(op: str, implementation: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """The `implementation=` argument, of known names, as something that can be compared and hashed."""
    if implementation is None:
        return None
    asked = (implementation,) if isinstance(implementation, str) else implementation
    rule = "be None or name " + ", ".join(repr(n) for n in REGISTRY)
    _checks.require(isinstance(asked, Sequence) and len(asked) > 0, op, "implementation", rule, repr(asked))
    for name in asked:
        _checks.require(isinstance(name, str) and name in REGISTRY, op, "implementation", rule, repr(name))
    return implementation if isinstance(implementation, str) else tuple(asked)


def choose(op: str, implementation: str | Sequence[str] | None, unsupported: Callable[[Implementation], str | None]) -> Chosen:
    """The implementations of a call that `unsupported` gives no reason against.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: none of those asked for can take the call; the message has each one's reason.
    """
    asked = names(op, implementation)
    chosen: dict[str, Implementation] = {}
    reasons, absent = [], {}
    for name in REGISTRY if asked is None else (asked,) if isinstance(asked, str) else asked:
        candidate = REGISTRY[name]
        available, detail = candidate.availability()
        reason = None if available or (implementation is None and candidate.exportable()) else detail
        reason = reason or unsupported(candidate)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
            if implementation is None and not available:
                absent[name] = detail
            continue
        for platform in candidate.platforms or ("",):
            chosen.setdefault(platform, candidate)
    if not chosen:
        raise NotImplementedError(f"{op}: implementation={implementation!r} cannot run this call. " + "; ".join(reasons))
    for name, detail in absent.items():
        if chosen.keys().isdisjoint(REGISTRY[name].platforms):
            _warn_of_absence(name, detail)
    return Chosen(tuple(chosen.items()))


@functools.cache
def _warn_of_absence(name: str, detail: str) -> None:
    """Once, where JAX has a device that the implementation is for: what runs there instead is slower."""
    for platform in REGISTRY[name].platforms:
        try:
            device = jax.devices(platform)[0]
        except RuntimeError:
            continue
        message = f"jax_dsv4: no implementation {name!r} for {device.device_kind}, another runs: {detail}. See python -m jax_dsv4.doctor"
        warnings.warn(message, stacklevel=2)


def fuses(implementation: Implementation, fused: bool | None) -> bool:
    """Whether a call of both scopes is one kernel call, given the `fused=` argument."""
    return implementation.fuses if fused is None else fused


def cannot_fuse(implementation: Implementation, fused: bool | None) -> str | None:
    return "it calls its kernel per scope, and fused=True was asked for" if fused and not implementation.fuses else None


def varies(implementation: Implementation, batch_invariant: bool) -> str | None:
    varying = batch_invariant and not implementation.batch_invariant
    return "its bits may change with the batch, and batch_invariant=True was asked for" if varying else None


def cannot_size(implementation: Implementation, tokens: int) -> str | None:
    """Native calls plan for a known number of tokens."""
    native = implementation.platforms != ()
    return f"it needs constant batch axes, not {tokens} tokens" if native and jax.export.is_symbolic_dim(tokens) else None
