"""Quantizers of activations: `q(x)` is x on a grid, with a straight-through derivative.

A quantizer is a pytree of arrays that broadcast against the trailing axes of x: `()` for one grid a tensor,
`(D,)` for one a channel, `(H, 1, 1)` for one a head of `(batch, head, token, feature)`. Quantizers of equal
blocks stack along a leading axis of their leaves, for `vmap` and `scan`. Everything is computed in float32; the
result has the shape and dtype of x. NaN stays NaN (and makes its token NaN on a dynamic grid); its code means
nothing.

Every rounding passes the derivative on ("straight through") and every clamp passes it where it changes nothing,
bounds included. These derivatives are stated, not composed: `jnp.clip` and `lax.clamp` have 1/2 and 0 at a
bound, and after rounding all values of the first and last bin are on one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxq import masks
from jaxq.errors import JaxqError
from jaxq.formats.base import quantized_pytree

# Scales below it, negative ones too, count as this one: x_hat is then almost 0 but finite, and the derivative
# with respect to the scale, as if nothing were floored, lets training leave.
SCALE_FLOOR = float(np.finfo(np.float32).tiny)

MAX_BITS = 16


def check_bits(bits: Any, fewest: int = 1) -> None:
    """JaxqError unless `bits` is an int from `fewest` to 16."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not fewest <= bits <= MAX_BITS:
        raise JaxqError(f"an activation quantizer has {fewest} to {MAX_BITS} bits, not {bits!r}")


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class AffineQuantizer:
    """Uniform affine grid: code = clamp(round(x / scale) + zero, 0, 2^bits - 1), x_hat = (code - zero) * scale.

    The derivative is 1 where the clamp does nothing, 0 elsewhere; with respect to the scale it is round(x / scale)
    - x / scale there, -zero below and 2^bits - 1 - zero above (LSQ, Esser et al. 2020, without its gradient
    scaling); the zero point is frozen. Scales <= 0 are floored (`SCALE_FLOOR`).

    Args:
        scale: step of the grid.
        zero: code of 0, rounded to an integer in use. Outside [0, 2^bits - 1] the grid does not hold 0.
        bits: 1 to 16.
        fractional: the zero point is not rounded, as in the I&S-ViT code after its reparametrization. The bounds
            then lie off the grid, and there are 2^bits + 1 values.
    """

    scale: Float[Array, "*grid"]
    zero: Float[Array, "*grid"]
    bits: int = dataclasses.field(metadata={"static": True})
    fractional: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1 + self.fractional

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        check_fits(x, self.scale, self.zero)
        exact, raw = x.astype(jnp.float32), jnp.asarray(self.scale, jnp.float32)
        zero, top = jax.lax.stop_gradient(self.zero_point()), 2**self.bits - 1
        scale = jax.lax.stop_gradient(self.step())
        steps, position = _steps(jax.lax.stop_gradient(exact), scale)
        code = steps + zero
        below, above = code < 0, code > top
        value = (jnp.clip(code, 0, top) - zero) * scale
        by_x = jnp.where(below | above, 0.0, 1.0)
        by_scale = jnp.where(below, -zero, jnp.where(above, top - zero, steps - position))
        return with_slopes(value, (exact, raw), (by_x, by_scale)).astype(x.dtype)

    def codes(self, x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
        """0 to `levels`; 0 is the lower bound, and so it is of a fractional grid."""
        check_fits(x, self.scale, self.zero)
        zero, first = self.zero_point(), self._first()
        steps, _ = _steps(x.astype(jnp.float32), self.step())
        return (jnp.clip(steps, first, jnp.ceil(2**self.bits - 1 - zero)) - first).astype(jnp.int32)

    def dequantize(self, codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        zero = self.zero_point()
        code = jnp.clip(codes + self._first() + zero, 0, 2**self.bits - 1)
        return (code - zero) * self.step()

    def zero_point(self) -> Float[Array, "*grid"]:
        """The zero point in use, float32: rounded, unless it is fractional."""
        zero = jnp.asarray(self.zero, jnp.float32)
        return zero if self.fractional else jnp.round(zero)

    def step(self) -> Float[Array, "*grid"]:
        """The scale in use, float32: floored (`SCALE_FLOOR`)."""
        return floored(self.scale)

    def _first(self) -> Array:
        """round(x / scale) of code 0."""
        return jnp.floor(-self.zero_point())


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class DynamicQuantizer:
    """A uniform grid fitted to each token when it comes; the derivative is 1 everywhere. It holds no arrays.

    Symmetric: scale = max|x| / (2^(bits - 1) - 1), zero in the middle, so that the lowest code stays unused.
    Asymmetric: the range of the token, extended to hold 0, in 2^bits - 1 steps. |x_hat - x| <= scale / 2.

    Args:
        bits: 1 to 16, symmetric from 2.
        symmetric: 0 in the middle.
        axis: axis or axes that share a grid; -1: the features of a token.
    """

    bits: int = dataclasses.field(metadata={"static": True})
    symmetric: bool = dataclasses.field(default=True, metadata={"static": True})
    axis: int | Sequence[int] = dataclasses.field(default=-1, metadata={"static": True})

    def __post_init__(self) -> None:
        check_bits(self.bits, 2 if self.symmetric else 1)
        if not isinstance(self.axis, int):
            object.__setattr__(self, "axis", tuple(self.axis))

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def grid(self, x: Float[Array, "*shape"]) -> AffineQuantizer:
        """The grids of these tokens: with size 1 along `axis`."""
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        low = jnp.minimum(x.min(axis=self.axis, keepdims=True), 0.0)
        high = jnp.maximum(x.max(axis=self.axis, keepdims=True), 0.0)
        if self.symmetric:
            spread, steps = jnp.maximum(-low, high), 2 ** (self.bits - 1) - 1
        else:
            spread, steps = high - low, self.levels
        scale = jnp.where(spread == 0, 1.0, jnp.maximum(spread / steps, SCALE_FLOOR))
        middle = jnp.full_like(scale, 2.0 ** (self.bits - 1))
        return AffineQuantizer(scale, middle if self.symmetric else jnp.round(-low / scale), self.bits)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        value = self.grid(x)(jax.lax.stop_gradient(x))
        return with_slopes(value, (x,), (jnp.ones_like(x),))

    def codes(self, x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
        """0 to `levels`; their meaning differs from token to token: `dequantize` them with the grid of x."""
        return self.grid(x).codes(x)

    def dequantize(self, codes: Int[Array, "*shape"], grid: AffineQuantizer) -> Float[Array, "*shape"]:
        return grid.dequantize(codes)


def qdrop(
    x: Float[Array, "*shape"],
    x_hat: Float[Array, "*shape"],
    key: Key[Array, ""] | None,
    probability: float | Float[Array, ""],
) -> Float[Array, "*shape"]:
    """Each element quantized with the given probability, else left alone (QDrop, Wei et al. 2022).

    `key` is not read, and may be None, for a probability that is the number 0 or 1.
    """
    if isinstance(probability, (int, float)):
        if not 0 <= probability <= 1:
            raise JaxqError(f"a probability lies between 0 and 1, which {probability!r} does not")
        if probability in (0, 1):
            return x_hat if probability else x
    if key is None:
        raise JaxqError(f"to quantize with probability {probability!r} takes a random key; give one, or use 1.0")
    return jnp.where(masks.bernoulli(key, probability, x.shape), x_hat, x)


@jax.custom_jvp
def with_slopes(value: Array, inputs: tuple[Array, ...], slopes: tuple[Array, ...]) -> Array:
    """`value`, whose derivative with respect to each input is defined to be the slope of the same place."""
    return value


@with_slopes.defjvp
def with_slopes_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    value, _, slopes = primals
    terms = [jnp.broadcast_to(s * t, value.shape) for s, t in zip(slopes, tangents[1], strict=True)]
    return value, sum(terms[1:], terms[0])


def floored(scale: Any) -> Array:
    return jnp.maximum(jnp.asarray(scale, jnp.float32), SCALE_FLOOR)


def _steps(x: Array, scale: Array) -> tuple[Array, Array]:
    """round(x / scale) and x / scale."""
    # XLA turns a division by a broadcast scale into just this where it compiles both together, and only there:
    # codes at ties would depend on what is jitted.
    position = x * (1 / scale)
    return jnp.round(position), position


def check_fits(x: Array, *members: Any) -> None:
    """JaxqError unless every member broadcasts against the trailing axes of x."""
    for member in members:
        shape = jnp.shape(member)
        trailing = x.shape[x.ndim - len(shape) :] if len(shape) <= x.ndim else None
        if trailing is None or any(m not in (1, n) for m, n in zip(shape, trailing, strict=True)):
            raise JaxqError(f"a grid of shape {shape} does not fit activations of shape {tuple(x.shape)}; "
                            "a stack of quantizers is for jax.vmap or lax.scan")  # fmt: skip
