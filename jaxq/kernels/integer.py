"""Products of integer codes: int8 x int8 -> int32, scaled once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

if TYPE_CHECKING:
    from jaxq.formats.codes import Codes

#: Dimension numbers of a dot_general: ((contracted of a, of b), (batch of a, of b)).
Numbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]

ROOM = 2**31

#: Terms of a sum come in multiples of it on GPUs.
WHOLE = 4


def refused(a: Codes, b: Codes, numbers: Numbers) -> str:
    """Why `dot` cannot multiply these, or nothing."""
    for operand, contracted in zip((a, b), numbers[0], strict=True):
        if any(member.shape[axis] != 1 for member in operand.grids.values() for axis in contracted):
            return "is on a grid that varies along what is summed over"
    terms = _terms(a, numbers)
    if terms * a.span * b.span >= ROOM:
        return f"is summed over {terms} products of up to {a.span} x {b.span}, more than 32 bits hold"
    return ""


def dot(a: Codes, b: Codes, numbers: Numbers) -> Float[Array, "*out"]:
    """`lax.dot_general` of two arrays of codes, as float32, exact up to its two scales. See `refused`.

    With value = (code + offset + rest) * scale, offsets add multiples of the sums of the other operand's codes.
    All that is in int32; only a zero point beside its grid (rest) adds such a term in float32.
    """
    terms = _terms(a, numbers)
    # Two's complement: what overflows on the way comes back, since the whole sum fits (`refused`).
    total = codes_dot(a.codes, b.codes, numbers)
    sums = [_spread(_summed(x, numbers[0][side]), side, a, b, numbers) for side, x in enumerate((a, b))]
    (offset_a, rest_a), (offset_b, rest_b) = (
        [None if m is None else _spread(m, side, a, b, numbers) for m in (x.offset, x.rest)]
        for side, x in enumerate((a, b))
    )
    if offset_a is not None:
        total += offset_a * sums[1]
        sums[0] = sums[0] + terms * offset_a
    if offset_b is not None:
        total += offset_b * sums[0]
        sums[1] = sums[1] + terms * offset_b
    result = total.astype(jnp.float32)
    if rest_a is not None:
        result += rest_a * sums[1]
    if rest_b is not None:
        result += rest_b * sums[0]
        if rest_a is not None:
            result += terms * rest_a * rest_b
    # One after the other: their product alone may be too small for float32.
    return result * _spread(a.scale, 0, a, b, numbers) * _spread(b.scale, 1, a, b, numbers)


def codes_dot(a: Int8[Array, "*a"], b: Int8[Array, "*b"], numbers: Numbers) -> Int32[Array, "*out"]:
    """`lax.dot_general` of int8, summed in int32."""

    def plain(a: Array, b: Array) -> Array:
        return lax.dot_general(a, b, numbers, preferred_element_type=jnp.int32)

    def filled(a: Array, b: Array) -> Array:
        return plain(*(_filled(x, axes[-1]) for x, axes in zip((a, b), numbers[0], strict=True)))

    if not numbers[0][0] or math.prod(a.shape[axis] for axis in numbers[0][0]) % WHOLE == 0:
        return plain(a, b)
    # What XLA gives here on GPUs, for sums over a number of terms that is no multiple of 4, is wrong for most
    # shapes (jax 0.11.2 on an H200: 3 x 33 by 33 x 7, 50 x 50 by 50 x 64 in a batch), not slow.
    return lax.platform_dependent(a, b, cuda=filled, rocm=filled, default=plain)


def _filled(x: Array, axis: int) -> Array:
    """Zeros behind `axis` up to a multiple of `WHOLE`."""
    return jnp.pad(x, [(0, -size % WHOLE if n == axis else 0) for n, size in enumerate(x.shape)])


def _terms(a: Codes, numbers: Numbers) -> int:
    return math.prod(a.shape[axis] for axis in numbers[0][0])


def _summed(x: Codes, axes: Sequence[int]) -> Array:
    return jnp.sum(x.codes, axis=tuple(axes), keepdims=True, dtype=jnp.int32)


def _spread(member: Array, side: int, a: Codes, b: Codes, numbers: Numbers) -> Array:
    """A member of operand `side`, of size 1 where it is summed over, along the axes of the product."""
    contracted, batch = numbers[0][side], numbers[1][side]
    free = [axis for axis in range(member.ndim) if axis not in contracted and axis not in batch]
    other = (b if side == 0 else a).codes.ndim - len(contracted) - len(batch)
    lead, own = [member.shape[axis] for axis in batch], [member.shape[axis] for axis in free]
    moved = jnp.transpose(member, [*batch, *free, *contracted])
    return jnp.reshape(moved, [*lead, *own, *[1] * other] if side == 0 else [*lead, *[1] * other, *own])
