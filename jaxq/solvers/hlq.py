"""Hierarchical linear quantization by alternating least squares (ELUTQ, Nie et al. 2025, arXiv 2510.19482)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from jaxq.errors import JaxqError
from jaxq.formats.base import Layout
from jaxq.formats.bitplane import BitPlane, BitPlaneArray, assemble
from jaxq.formats.groups import join_groups, split_groups
from jaxq.formats.rounding import round_to
from jaxq.solvers.common import all_finite, check, matrices

#: Part of the Gram matrix's diagonal that is added to it. Directions in which a group says nothing stay where they
#: are; elsewhere a step falls short by this part, which the next one makes up for.
RIDGE = 1e-6


def hlq(
    w: Any, format: BitPlane = BitPlane(), *, iterations: int = 20, layout: Layout | None = None  # noqa: B008
) -> BitPlaneArray:  # fmt: skip
    """Plane scales and offset of each group: nearest levels and least squares by turns, from the uniform grid.

    Args:
        w: `(in, out)` or `(batch..., in, out)`, any float dtype; of logical shape if `layout` is given.
        format: bits, group size and the dtype of the scales.
        iterations: rounds of assignment and least squares. The error never grows; after 20 it hardly falls.
        layout: how the logical leaf maps to the canonical matrix.

    Returns a BitPlaneArray of the logical shape and dtype of `w`, in each group with no more squared error than
    the uniform min-max grid stored in the same way. Scales are not negative and ascend. Raises JaxqError for
    weights that are not finite, a group larger than the width, and scales that `scale_dtype` cannot hold. Cost:
    O(in * out * 2^bits) for each iteration.
    """
    if iterations < 0:
        raise JaxqError(f"the number of iterations is {iterations}; give 0 or more")
    matrix = matrices(w, layout)
    format.rows_per_group(matrix.shape[-2])
    array, finite, fits = _solve(matrix, format, iterations, layout or Layout())
    check(finite, "the weights hold NaN or infinite values; repair the checkpoint or leave this weight dense")
    check(fits, f"a scale does not fit {format.scale_dtype}; use scale_dtype='bfloat16'")
    return array


@functools.partial(jax.jit, static_argnums=(1, 3))
def _solve(w: Array, format: BitPlane, iterations: Any, layout: Layout) -> tuple[BitPlaneArray, Array, Array]:
    in_size = w.shape[-2]
    size = format.rows_per_group(in_size)
    groups = split_groups(w.astype(jnp.float32), size)
    # Rows that only fill up the last group weigh nothing.
    weight = split_groups(jnp.ones((in_size, 1), jnp.float32), size)
    start = uniform_start(groups, weight > 0, format.bits)
    step = functools.partial(refit, groups, weight)
    fitted = jax.lax.fori_loop(0, iterations, lambda _, theta: step(theta, nearest(groups, theta)), start)

    def store(theta: Array) -> tuple[Array, Array, Array]:
        """(theta rounded, codes, error of each group)."""
        theta = round_to(canonical(theta), format.scale_dtype)
        codes = nearest(groups, theta)
        error = jnp.sum(weight * (levels_of(codes, theta) - groups) ** 2, axis=-2, keepdims=True)
        return theta, codes, error

    # Rounding may undo a fit of scales that nearly cancel; the start it cannot spoil.
    (plain, plain_codes, plain_error), (theta, codes, error) = store(start), store(fitted)
    better = error <= plain_error
    theta = jnp.where(better[..., None, :, :, :], theta, plain)
    codes = join_groups(jnp.where(better, codes, plain_codes), in_size)
    theta = theta[..., 0, :]
    array = assemble(codes, theta[..., :-1, :, :], theta[..., -1, :, :], format, layout, w.dtype)
    return array, all_finite(w), jnp.isfinite(theta).all(axis=(-3, -2, -1))


def uniform_start(
    w: Float[Array, "*batch groups size out"], valid: Bool[Array, "groups size 1"], bits: int
) -> Float[Array, "*batch bits+1 groups 1 out"]:
    """Scales s, 2s, 4s, ... and, last, the offset, of the grid from each group's least to its greatest value."""
    low = jnp.min(jnp.where(valid, w, jnp.inf), axis=-2, keepdims=True)
    high = jnp.max(jnp.where(valid, w, -jnp.inf), axis=-2, keepdims=True)
    unit = (high - low) / (2**bits - 1)
    return jnp.stack([*(unit * 2**plane for plane in range(bits)), low], axis=-4)


def levels_of(codes: UInt8[Array, "*shape"], theta: Float[Array, "*batch bits+1 groups 1 out"]) -> Array:
    """The values of codes, float32."""
    value = theta[..., -1, :, :, :]
    for plane in range(theta.shape[-4] - 1):
        value = value + jnp.where((codes >> plane) & 1 == 1, theta[..., plane, :, :, :], 0.0)
    return value


def nearest(
    w: Float[Array, "*batch groups size out"], theta: Float[Array, "*batch bits+1 groups 1 out"]
) -> UInt8[Array, "*batch groups size out"]:
    """Codes of the nearest levels, all of which are tried; ties to the lower code."""

    def attempt(code: Any, best: tuple[Array, Array]) -> tuple[Array, Array]:
        code = jnp.asarray(code, jnp.uint8)
        distance = jnp.abs(w - levels_of(code, theta))
        closer = distance < best[0]
        return jnp.where(closer, distance, best[0]), jnp.where(closer, code, best[1])

    entries = 2 ** (theta.shape[-4] - 1)
    best = jnp.abs(w - levels_of(jnp.uint8(0), theta)), jnp.zeros(w.shape, jnp.uint8)
    # Unrolled, XLA tries all levels in one pass over the weights; beyond sixteen that takes long to compile.
    return jax.lax.fori_loop(1, entries, attempt, best, unroll=min(entries - 1, 15))[1]


def refit(
    w: Float[Array, "*batch groups size out"],
    weight: Float[Array, "groups size 1"],
    theta: Float[Array, "*batch bits+1 groups 1 out"],
    codes: UInt8[Array, "*batch groups size out"],
) -> Float[Array, "*batch bits+1 groups 1 out"]:
    """Scales and offset of least squared error for these codes: the change that explains what `theta` leaves."""
    bits = theta.shape[-4] - 1
    columns = [((codes >> plane) & 1).astype(jnp.float32) for plane in range(bits)] + [jnp.ones_like(w)]
    rest = (w - levels_of(codes, theta)) * weight
    right = [jnp.sum(column * rest, axis=-2, keepdims=True) for column in columns]
    gram = [
        [jnp.sum(a * b * weight, axis=-2, keepdims=True) for b in columns[: row + 1]]
        for row, a in enumerate(columns)
    ]
    # The offset's own entry, the number of weights, is the largest of the matrix.
    ridge = RIDGE * gram[-1][-1]
    for row in range(bits + 1):
        gram[row][row] = gram[row][row] + ridge
    return theta + jnp.stack(_solve_positive(gram, right), axis=-4)


def _solve_positive(lower: list[list[Array]], right: list[Array]) -> list[Array]:
    """Solutions of many small positive definite systems at once, unrolled: LAPACK takes them one by one."""
    n = len(right)
    factor: list[list[Array]] = [[] for _ in range(n)]
    forward: list[Array] = []
    for row in range(n):
        for column in range(row + 1):
            value = lower[row][column]
            for k in range(column):
                value = value - factor[row][k] * factor[column][k]
            factor[row].append(jnp.sqrt(value) if row == column else value / factor[column][column])
        value = right[row]
        for k in range(row):
            value = value - factor[row][k] * forward[k]
        forward.append(value / factor[row][row])
    solution: list[Array] = [None] * n  # type: ignore[list-item]
    for row in reversed(range(n)):
        value = forward[row]
        for k in range(row + 1, n):
            value = value - factor[k][row] * solution[k]
        solution[row] = value / factor[row][row]
    return solution


def canonical(theta: Float[Array, "*batch bits+1 groups 1 out"]) -> Float[Array, "*batch bits+1 groups 1 out"]:
    """The same levels from scales that are not negative and ascend."""
    scale, offset = theta[..., :-1, :, :, :], theta[..., -1:, :, :, :]
    offset = offset + jnp.sum(jnp.minimum(scale, 0.0), axis=-4, keepdims=True)
    return jnp.concatenate([jnp.sort(jnp.abs(scale), axis=-4), offset], axis=-4)
