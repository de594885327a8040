"""Logarithmic quantizers of activations, for values from 0 up such as softmax outputs.

Like those of `activations`: pytrees, called on x, with stated straight-through derivatives.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxq.errors import JaxqError
from jaxq.formats.activations import SCALE_FLOOR, check_bits, check_fits, floored, with_slopes
from jaxq.formats.base import quantized_pytree


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class LogQuantizer:
    """Logarithmic grid: code = clamp(round(-root * log2(x / scale)), 0, top), x_hat = scale * 2^(-code / root).

    The last code, `levels`, is the zero: x_hat = 0 for all that would need it or more, and for x <= 0. The
    derivative is x_hat / x where the code is not clamped, 0 at the zero and above the scale's bin; with respect to
    the scale it is 1 above and 0 elsewhere (the two roundings that contain it cancel).

    Args:
        scale: the largest value.
        bits: 1 to 16.
        root: 1 for log2 (FQ-ViT), 2 for log sqrt2 (RepQ-ViT, Li et al. 2023): steps of 2^(1 / root).
        official: top = 2^bits, a code more than the bits hold, as in the RepQ-ViT code: 2^bits values and a zero.
            Otherwise top = 2^bits - 1.
    """

    scale: Float[Array, "*grid"]
    bits: int = dataclasses.field(metadata={"static": True})
    root: int = dataclasses.field(default=1, metadata={"static": True})
    official: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if isinstance(self.root, bool) or not isinstance(self.root, int) or self.root < 1:
            raise JaxqError(f"the root of a log quantizer is a positive whole number, not {self.root!r}")

    @property
    def levels(self) -> int:
        """The largest code, which is the zero."""
        return 2**self.bits - 1 + self.official

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        check_fits(x, self.scale)
        exact, raw = x.astype(jnp.float32), jnp.asarray(self.scale, jnp.float32)
        fixed = jax.lax.stop_gradient(exact)
        steps = self._steps(fixed)
        value = self._values(jnp.clip(steps, 0, self.levels))
        above, inside = steps < 0, (steps >= 0) & (steps < self.levels)
        by_x = jnp.where(inside, value / jnp.where(inside, fixed, 1.0), 0.0)
        by_scale = jnp.where(above, 1.0, 0.0)
        return with_slopes(value, (exact, raw), (by_x, by_scale)).astype(x.dtype)

    def codes(self, x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
        check_fits(x, self.scale)
        return jnp.clip(self._steps(x.astype(jnp.float32)), 0, self.levels).astype(jnp.int32)

    def dequantize(self, codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self._values(codes.astype(jnp.float32))

    def _steps(self, x: Array) -> Array:
        scale = jax.lax.stop_gradient(floored(self.scale))
        return jnp.round(-self.root * jnp.log2(jnp.maximum(x * (1 / scale), 0.0)))

    def _values(self, code: Array) -> Array:
        whole = jnp.floor(code / self.root)
        value = jax.lax.stop_gradient(floored(self.scale)) * _power_of_two(-whole)
        for rest in range(1, self.root):
            value = jnp.where(code - self.root * whole == rest, value * 2 ** (-rest / self.root), value)
        return jnp.where(code >= self.levels, 0.0, value)


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class ShiftLogQuantizer:
    """Shift-uniform-log2 grid for softmax outputs (SULQ; Zhong et al. 2023, "I&S-ViT", section 3.2).

    With y = log2(x + eta) and step = (high - low) / top: code = clamp(round((y - low) / step), 0, top),
    x_hat = 2^round(code * step + low) - eta. All bits are spent on the range [low, high], and a product with a
    power of two is a shift. x = 0 comes back as 0 if eta is a power of two and low = log2(eta). The derivative is
    (x_hat + eta) / (x + eta) where the code is not clamped (half a step beyond low and high), else 0. All three
    arrays are frozen.

    Args:
        eta: shift, positive.
        low: smallest log2(x + eta). The paper's example rounds a zero point, which makes low and high multiples of
            the step, and the ends of the range inexact; its code and `shift_log` do not.
        high: largest log2(x + eta).
        bits: 1 to 16.
        official: top = 2^bits, as the I&S-ViT code runs it: a code more than the bits hold, and a step that its
            own search does not use. Otherwise top = 2^bits - 1, as in the paper.
    """

    eta: Float[Array, "*grid"]
    low: Float[Array, "*grid"]
    high: Float[Array, "*grid"]
    bits: int = dataclasses.field(metadata={"static": True})
    official: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1 + self.official

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        check_fits(x, self.eta, self.low, self.high)
        exact = x.astype(jnp.float32)
        fixed = jax.lax.stop_gradient(exact)
        eta = jax.lax.stop_gradient(jnp.asarray(self.eta, jnp.float32))
        steps = self._steps(fixed)
        power = self._powers(jnp.clip(steps, 0, self.levels))
        inside = (steps >= 0) & (steps <= self.levels) & (fixed + eta > 0)
        slope = jnp.where(inside, power / jnp.where(inside, fixed + eta, 1.0), 0.0)
        return with_slopes(power - eta, (exact,), (slope,)).astype(x.dtype)

    def codes(self, x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
        check_fits(x, self.eta, self.low, self.high)
        return jnp.clip(self._steps(x.astype(jnp.float32)), 0, self.levels).astype(jnp.int32)

    def dequantize(self, codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self._powers(codes.astype(jnp.float32)) - self.eta

    def _grid(self) -> tuple[Array, Array]:
        low, high = (jax.lax.stop_gradient(jnp.asarray(y, jnp.float32)) for y in (self.low, self.high))
        return low, jnp.maximum((high - low) / self.levels, SCALE_FLOOR)

    def _steps(self, x: Array) -> Array:
        low, step = self._grid()
        return jnp.round((shifted_log(x, jax.lax.stop_gradient(self.eta)) - low) * (1 / step))

    def _powers(self, code: Array) -> Array:
        low, step = self._grid()
        return _power_of_two(jnp.round(code * step + low))


def shifted_log(x: Float[Array, "*shape"], eta: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """log2(x + eta); sums that are not positive count as the smallest normal float."""
    return jnp.log2(jnp.maximum(x + eta, SCALE_FLOOR))


def _power_of_two(exponent: Array) -> Array:
    """2^exponent for whole numbers below 128, exactly, 0 where a float32 would be subnormal."""
    # jnp.exp2 is exp(x log 2) to XLA: it misses most powers of two by a few units in the last place.
    biased = jnp.clip(exponent, -127, 127).astype(jnp.int32) + 127
    power = jax.lax.bitcast_convert_type(biased << 23, jnp.float32)
    return jnp.where(jnp.isnan(exponent), exponent, power)
