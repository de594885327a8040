"""What calibration keeps of activations that do not fit in memory: a bounded sample, and exact extremes.

Both have the interface of `jaxq.transforms.statistics`: pure, associative folds over batches.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxq.errors import JaxqError


class SampleState(NamedTuple):
    """`rows`: those kept; `rank`: the rank of each, `EMPTY` where there is none; `seen`: rows offered so far."""

    rows: Float[Array, "count in"]
    rank: UInt32[Array, " count"]
    seen: UInt32[Array, ""]


EMPTY = np.uint32(2**32 - 1)
# 2^32 / golden ratio: its multiples modulo 2^32 fall evenly into any interval (Weyl), so that the rows of least
# rank are spread evenly over the stream, and no length of a sequence is nearly in step with them.
STRIDE = np.uint32(2654435769)


@dataclasses.dataclass(frozen=True)
class Sample:
    """At most `count` rows (tokens) of a stream, evenly spread over it; all of them if they fit.

    Row i of a stream has the rank i * STRIDE mod 2^32, and the rows of least rank stay: the same ones however the
    stream is cut into batches. `merge` is associative; streams that were numbered apart give another sample than
    one after the other would, unless all rows fit.
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise JaxqError(f"a sample holds a positive number of rows, not {self.count!r}")

    def init(self, site: Any) -> SampleState:
        return SampleState(
            jnp.zeros((self.count, site.in_size), jnp.float32),
            jnp.full((self.count,), EMPTY, jnp.uint32),
            jnp.zeros((), jnp.uint32),
        )

    def update(
        self, state: SampleState, x: Float[Array, "*tokens in"], weights: Array | None = None
    ) -> SampleState:
        """The state after the tokens of nonzero weight."""
        rows = x.reshape((-1, x.shape[-1])).astype(jnp.float32)
        present = jnp.ones((len(rows),), bool) if weights is None else weights.reshape(-1) != 0
        place = state.seen + jnp.cumsum(present, dtype=jnp.uint32) - np.uint32(1)
        # One bit less than EMPTY has.
        rank = jnp.where(present, (place * STRIDE) >> 1, EMPTY)
        found = SampleState(jnp.where(present[:, None], rows, 0.0), rank, present.sum(dtype=jnp.uint32))
        return self.merge(state, found)

    def merge(self, a: SampleState, b: SampleState) -> SampleState:
        rank = jnp.concatenate([a.rank, b.rank], axis=-1)
        rows = jnp.concatenate([a.rows, b.rows], axis=-2)
        # Stable, hence associative where ranks are equal.
        kept = jnp.argsort(rank, axis=-1, stable=True)[..., : self.count]
        rows = jnp.take_along_axis(rows, kept[..., None], axis=-2)
        return SampleState(rows, jnp.take_along_axis(rank, kept, axis=-1), a.seen + b.seen)

    def finalize(self, state: SampleState) -> Float[Array, "*batch rows in"]:
        """The rows, in an order of no meaning. Not under jit: how many there are is a matter of values.

        Leading axes (layers, experts) pass through if each of them has as many rows.
        """
        filled = np.unique(np.sum(np.asarray(state.rank) != EMPTY, axis=-1))
        if len(filled) > 1:
            raise JaxqError(f"the samples of a stack hold from {filled[0]} to {filled[-1]} rows; "
                            "take one layer of the state at a time")  # fmt: skip
        return state.rows[..., : int(filled[0]), :]


class ExtremesState(NamedTuple):
    """Smallest and largest value of each grid; +inf and -inf before any."""

    low: Float[Array, "*grid"]
    high: Float[Array, "*grid"]


@dataclasses.dataclass(frozen=True)
class Extremes:
    """Minimum and maximum, exactly, for each grid of the shape `()`, `(D,)` or `(H, 1, 1)`, as of a quantizer.

    `affine(*state, bits)` of `ranges` is the quantizer.
    """

    shape: tuple[int, ...] = ()

    def init(self, site: Any = None) -> ExtremesState:
        low = jnp.full(self.shape, jnp.inf, jnp.float32)
        return ExtremesState(low, -low)

    def update(
        self, state: ExtremesState, x: Float[Array, "*tokens in"], weights: Array | None = None
    ) -> ExtremesState:
        """The state after the tokens of nonzero weight."""
        low = high = x.astype(jnp.float32)
        if weights is not None:
            low = jnp.where(weights[..., None] != 0, low, jnp.inf)
            high = jnp.where(weights[..., None] != 0, high, -jnp.inf)
        extra = x.ndim - len(self.shape)
        shared = tuple(a for a in range(x.ndim) if a < extra or self.shape[a - extra] == 1)
        found = ExtremesState(low.min(axis=shared).reshape(self.shape), high.max(axis=shared).reshape(self.shape))
        return self.merge(state, found)

    def merge(self, a: ExtremesState, b: ExtremesState) -> ExtremesState:
        return ExtremesState(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))

    def finalize(self, state: ExtremesState) -> tuple[Float[Array, "*grid"], Float[Array, "*grid"]]:
        """(smallest, largest)."""
        return state.low, state.high
