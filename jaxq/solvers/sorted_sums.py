"""Running sums of sorted channels in double-float arithmetic, so that differences of them stay accurate.

A difference of two running sums of importance is a small number between two large ones wherever a light cluster
lies beyond a heavy point. Pairs (high, low) of float32 carry 48 bits: enough for importance over eight decades.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Double(NamedTuple):
    """The unevaluated sum high + low, |low| at most half a unit in the last place of high."""

    high: Array
    low: Array


def add(a: Double, b: Double) -> Double:
    """a + b with a relative error of about 2^-46 (Knuth's two-sum on the high parts, Dekker's renormalisation)."""
    total = a.high + b.high
    part = total - a.high
    error = (a.high - (total - part)) + (b.high - part)
    low = error + (a.low + b.low)
    high = total + low
    return Double(high, low - (high - total))


def running_sums(x: Double) -> Double:
    """Sums of the first 0 .. n elements along axis 0 of `(n, channels)`, `(n + 1, channels)`.

    Blocks of about sqrt(n) side by side, then their totals: two short loops, O(n) in all.
    """
    n, channels = x.high.shape
    size = max(math.isqrt(n), 1)
    count = -(-n // size)
    padded = (jnp.pad(part, [(0, count * size - n), (0, 0)]).reshape(count, size, channels) for part in x)

    def step(total: Double, item: Double) -> tuple[Double, Double]:
        total = add(total, item)
        return total, total

    columns = Double(*(jnp.moveaxis(part, 1, 0) for part in padded))
    totals, inside = jax.lax.scan(step, Double(*(jnp.zeros_like(part[0]) for part in columns)), columns)
    start = Double(*(jnp.zeros_like(part[0]) for part in totals))
    _, before = jax.lax.scan(lambda sum, item: (add(sum, item), sum), start, totals)
    sums = add(Double(*(part[None] for part in before)), inside)
    sums = (jnp.moveaxis(part, 0, 1).reshape(count * size, channels)[:n] for part in sums)
    return Double(*(jnp.concatenate([jnp.zeros_like(part[:1]), part]) for part in sums))


def product(a: Array, b: Array) -> Double:
    """a * b exactly, barring underflow (Veltkamp's split, Dekker's product)."""
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    high = a * b
    return Double(high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low)


def between(sums: Double, cuts: Int[Array, "cuts channels"]) -> Float[Array, "cuts-1 channels"]:
    """Sums over the elements from one cut to the next."""
    high, low = (jnp.take_along_axis(part, cuts, axis=0, mode="promise_in_bounds") for part in sums)
    return add(Double(high[1:], low[1:]), Double(-high[:-1], -low[:-1])).high


def count_up_to(x: Float[Array, "n channels"], bounds: Float[Array, "m channels"]) -> Int[Array, "m channels"]:
    """How many of the ascending `x` are not above each bound. Time O(m log n) a channel."""
    n = x.shape[0]
    found = jnp.zeros(bounds.shape, jnp.int32)
    step = 1 << (n.bit_length() - 1)
    while step:
        trial = found + step
        value = jnp.take_along_axis(x, jnp.minimum(trial, n) - 1, axis=0, mode="promise_in_bounds")
        found = jnp.where((trial <= n) & (value <= bounds), trial, found)
        step >>= 1
    return found


def _halves(x: Array) -> tuple[Array, Array]:
    """The upper 12 bits of the significand and the rest. Masking bits is safe from any rewriting of arithmetic."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
