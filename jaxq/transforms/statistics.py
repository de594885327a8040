"""Running statistics of what flows into a site: associative folds over tokens.

A statistic is `init(site) -> state`, `update(state, x, weights) -> state` and `merge(a, b) -> state`, all
pure. States of shards, batches or hosts merge in any order; each state is a NamedTuple of float32 arrays.
`weights` counts a token so many times; 0 leaves it out, whatever it holds.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

State = TypeVar("State")
Weights = Float[Array, "*tokens"] | Bool[Array, "*tokens"] | None


class Sized(Protocol):
    """What a statistic needs to know of a site: a `jaxq.Site` is one."""

    @property
    def in_size(self) -> int: ...


class Statistic(Protocol[State]):
    """The interface of this module's classes. `x` is `(tokens..., in)`, `weights` `(tokens...)` or None."""

    def init(self, site: Sized) -> State: ...
    def update(self, state: State, x: Array, weights: Weights = None) -> State: ...
    def merge(self, a: State, b: State) -> State: ...


class HessianState(NamedTuple):
    """`matrix`: sum over tokens of weight * x x^T; `count`: sum of the weights."""

    matrix: Float[Array, "in in"]
    count: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Hessian:
    """The Hessian of the layer's squared output error, up to a factor: X^T X / tokens.

    That of GPTQ (Frantar et al. 2023, section 3.1). Products of low-precision inputs are summed in float32.
    """

    def init(self, site: Sized) -> HessianState:
        return HessianState(jnp.zeros((site.in_size, site.in_size), jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, state: HessianState, x: Array, weights: Weights = None) -> HessianState:
        present, weighted = _present(x, weights), _weighted(x, weights)
        if present.dtype != weighted.dtype:
            present = present.astype(weighted.dtype)
        tokens = tuple(range(x.ndim - 1))
        matrix = jax.lax.dot_general(
            weighted,
            present,
            ((tokens, tokens), ((), ())),
            precision="highest",
            preferred_element_type=jnp.float32,
            out_sharding=_replicated(x),
        )
        return HessianState(state.matrix + matrix, state.count + _count(x, weights))

    def merge(self, a: HessianState, b: HessianState) -> HessianState:
        return HessianState(a.matrix + b.matrix, a.count + b.count)

    def finalize(self, state: HessianState) -> Float[Array, "in in"]:
        """The mean over tokens; zeros if none was seen. Leading axes (layers, experts) pass through."""
        return state.matrix / jnp.where(state.count > 0, state.count, 1.0)[..., None, None]


class RangeState(NamedTuple):
    """Extreme values of each input channel; +inf and -inf before any token."""

    low: Float[Array, " in"]
    high: Float[Array, " in"]


@dataclasses.dataclass(frozen=True)
class Range:
    """Minimum and maximum of each input channel over the tokens of nonzero weight."""

    def init(self, site: Sized) -> RangeState:
        return RangeState(
            jnp.full((site.in_size,), jnp.inf, jnp.float32), jnp.full((site.in_size,), -jnp.inf, jnp.float32)
        )

    def update(self, state: RangeState, x: Array, weights: Weights = None) -> RangeState:
        low = high = x.astype(jnp.float32)
        if weights is not None:
            low = jnp.where(weights[..., None] != 0, low, jnp.inf)
            high = jnp.where(weights[..., None] != 0, high, -jnp.inf)
        tokens = tuple(range(x.ndim - 1))
        return self.merge(state, RangeState(low.min(axis=tokens), high.max(axis=tokens)))

    def merge(self, a: RangeState, b: RangeState) -> RangeState:
        return RangeState(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))

    def finalize(self, state: RangeState) -> Float[Array, " in"]:
        """The largest absolute value of each channel."""
        return jnp.maximum(jnp.abs(state.low), jnp.abs(state.high))


class MomentsState(NamedTuple):
    """Weighted sums of |x| and x^2 for each input channel, and the sum of the weights."""

    absolute: Float[Array, " in"]
    square: Float[Array, " in"]
    count: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean |x| and mean x^2 of each input channel (AWQ, Lin et al. 2024, uses the former)."""

    def init(self, site: Sized) -> MomentsState:
        zeros = jnp.zeros((site.in_size,), jnp.float32)
        return MomentsState(zeros, zeros, jnp.zeros((), jnp.float32))

    def update(self, state: MomentsState, x: Array, weights: Weights = None) -> MomentsState:
        present = _present(x, weights).astype(jnp.float32)
        weighted = _weighted(x, weights).astype(jnp.float32)
        tokens = tuple(range(x.ndim - 1))
        found = MomentsState(
            jnp.abs(weighted).sum(axis=tokens), (weighted * present).sum(axis=tokens), _count(x, weights)
        )
        return self.merge(state, found)

    def merge(self, a: MomentsState, b: MomentsState) -> MomentsState:
        return MomentsState(a.absolute + b.absolute, a.square + b.square, a.count + b.count)

    def finalize(self, state: MomentsState) -> tuple[Float[Array, " in"], Float[Array, " in"]]:
        """(mean |x|, mean x^2); zeros if no token was seen."""
        count = jnp.where(state.count > 0, state.count, 1.0)
        return state.absolute / count, state.square / count


def _present(x: Array, weights: Weights) -> Array:
    """`x` with zeros at tokens of weight 0: padding may hold anything, and 0 * nan is nan."""
    return x if weights is None else jnp.where(weights[..., None] != 0, x, jnp.zeros((), x.dtype))


def _weighted(x: Array, weights: Weights) -> Array:
    """Weight times token, exactly: a boolean mask keeps the dtype, other weights go to float32."""
    present = _present(x, weights)
    if weights is None or weights.dtype == jnp.bool_:
        return present
    return present.astype(jnp.float32) * weights[..., None].astype(jnp.float32)


def _count(x: Array, weights: Weights) -> Float[Array, ""]:
    if weights is None:
        return jnp.asarray(float(x.size // x.shape[-1]), jnp.float32)
    return jnp.sum(weights.astype(jnp.float32))


def _replicated(x: Array) -> Any:
    """The sharding to ask for: sums over sharded tokens are ambiguous under explicit axes, none otherwise."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    return NamedSharding(mesh, PartitionSpec())
