"""Statistics of what flows into a site and of the loss's gradient at its output.

Like those of `statistics`, with `update(state, x, g, weights)`: `x` is `(sequences, tokens..., in)`, `g` the
gradient of the summed loss with respect to the site's output, `(sequences, tokens..., out)`. The loss is a sum
over sequences (or other examples, along the first axis), each of which has a gradient of its own.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.transforms.statistics import Weights, _count, _present, _replicated


class Matrix(Protocol):
    """What these statistics need to know of a site: a `jaxq.Site` is one."""

    @property
    def in_size(self) -> int: ...
    @property
    def out_size(self) -> int: ...


class FisherState(NamedTuple):
    """`square`: sum over sequences of the squared gradient; `count`: how many sequences."""

    square: Float[Array, "in out"]
    count: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Fisher:
    """The diagonal of the empirical Fisher information: the mean over sequences of (d loss_s / d w)^2.

    Kim et al. 2024 (SqueezeLLM), section 4.1. Each sequence's gradient is squared before it is added, and
    sums are float32. A parameter used at several sites counts as several parameters: their squares are added.
    Memory: sequences * in * out floats for a batch.
    """

    gradient = True

    def init(self, site: Matrix) -> FisherState:
        return FisherState(jnp.zeros((site.in_size, site.out_size), jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, state: FisherState, x: Array, g: Array, weights: Weights = None) -> FisherState:
        present = _present(x, weights).astype(jnp.promote_types(x.dtype, g.dtype))
        tokens = tuple(range(1, x.ndim - 1))
        each = jax.lax.dot_general(
            present,
            g.astype(present.dtype),
            ((tokens, tokens), ((0,), (0,))),
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        square = jnp.einsum("sio,sio->io", each, each, out_sharding=_replicated(x))
        return FisherState(state.square + square, state.count + _sequences(x, weights))

    def merge(self, a: FisherState, b: FisherState) -> FisherState:
        return FisherState(a.square + b.square, a.count + b.count)

    def finalize(self, state: FisherState) -> Float[Array, "in out"]:
        """The mean over sequences; zeros if none was seen. Leading axes pass through."""
        return state.square / jnp.where(state.count > 0, state.count, 1.0)[..., None, None]


class GuidedState(NamedTuple):
    """`matrix`: sum over tokens of the group's mean squared gradient * x x^T; `count`: tokens."""

    matrix: Float[Array, "groups in in"]
    count: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class GuidedHessian:
    """X^T Diag(g^2) X for each group of consecutive output channels, g^2 averaged over the group's channels.

    Kim et al. 2025 (GuidedQuant, arXiv 2505.07004): the Fisher information of a column of weights, block by block,
    with the channels of a group sharing one. The number of groups is lowered to a divisor of the output width.
    """

    groups: int = 4
    gradient = True

    def init(self, site: Matrix) -> GuidedState:
        shape = (_groups(self.groups, site), site.in_size, site.in_size)
        return GuidedState(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, state: GuidedState, x: Array, g: Array, weights: Weights = None) -> GuidedState:
        # Mean losses give gradients around 1e-6; their squares stay clear of float32's smallest numbers.
        square = jnp.square(g.astype(jnp.float32))
        importance = square.reshape((*g.shape[:-1], state.matrix.shape[0], -1)).mean(axis=-1)
        return _weighted_squares(state, _present(x, weights), importance)

    def merge(self, a: GuidedState, b: GuidedState) -> GuidedState:
        return GuidedState(a.matrix + b.matrix, a.count + b.count)

    def finalize(self, state: GuidedState) -> Float[Array, "groups in in"]:
        """The mean over tokens; zeros if none was seen. Leading axes pass through."""
        return state.matrix / jnp.where(state.count > 0, state.count, 1.0)[..., None, None, None]


@dataclasses.dataclass(frozen=True)
class Saliency:
    """How much each token's output matters: the mean squared gradient over each group of output channels.

    The state is `(batches, tokens..., groups)`: merging puts batches one after the other. What `StreamHessian`
    weighs tokens by.
    """

    groups: int = 4
    gradient = True

    def init(self, site: Matrix) -> Float[Array, "0 groups"]:
        return jnp.zeros((0, _groups(self.groups, site)), jnp.float32)

    def update(
        self, state: Array, x: Array, g: Array, weights: Weights = None
    ) -> Float[Array, "1 *tokens groups"]:
        square = jnp.square(g.astype(jnp.float32)).reshape((*g.shape[:-1], state.shape[-1], -1)).mean(axis=-1)
        return (square if weights is None else jnp.where(weights[..., None] != 0, square, 0.0))[None]

    def merge(self, a: Array, b: Array) -> Float[Array, "batches *tokens groups"]:
        return jnp.concatenate([a, b])

    def finalize(self, state: Array) -> Array:
        return state


@dataclasses.dataclass(frozen=True)
class StreamHessian:
    """`GuidedHessian`, with the inputs that the quantized layers before make and the gradients of the float model.

    So its solver also answers for the errors made so far. `update` is given `Saliency` as token weights.
    """

    groups: int = 4
    weighted_by = "saliency"

    def init(self, site: Matrix) -> GuidedState:
        return GuidedHessian(self.groups).init(site)

    def update(self, state: GuidedState, x: Array, weights: Float[Array, "*tokens groups"]) -> GuidedState:
        return _weighted_squares(state, x, weights)

    def merge(self, a: GuidedState, b: GuidedState) -> GuidedState:
        return GuidedState(a.matrix + b.matrix, a.count + b.count)

    def finalize(self, state: GuidedState) -> Float[Array, "groups in in"]:
        """The mean over tokens; zeros if none was seen. Leading axes pass through."""
        return GuidedHessian(self.groups).finalize(state)


def _groups(most: int, site: Matrix) -> int:
    """The largest number of groups, at most this, that divides the output width."""
    return max(n for n in range(1, min(most, site.out_size) + 1) if site.out_size % n == 0)


def _weighted_squares(state: GuidedState, x: Array, importance: Float[Array, "*tokens groups"]) -> GuidedState:
    """The state after tokens with these importances for each group."""
    x = x.astype(jnp.float32)
    tokens = tuple(range(x.ndim - 1))

    def group(one: Array) -> Array:
        return jax.lax.dot_general(
            x * one[..., None],
            x,
            ((tokens, tokens), ((), ())),
            precision="highest",
            preferred_element_type=jnp.float32,
            out_sharding=_replicated(x),
        )

    # One after another: the weighted inputs of a single group are in memory.
    matrix = jax.lax.map(group, jnp.moveaxis(importance, -1, 0))
    return GuidedState(state.matrix + matrix, state.count + _count(x, None))


def _sequences(x: Array, weights: Weights) -> Float[Array, ""]:
    """How many sequences have a token that counts."""
    if weights is None:
        return jnp.asarray(float(x.shape[0]), jnp.float32)
    return jnp.sum(jnp.any(weights.reshape((x.shape[0], -1)) != 0, axis=1).astype(jnp.float32))
