"""Dense and sparse: the weights that would hurt most leave the dense part for a sparse overlay.

The split of SqueezeLLM (Kim et al. 2024, arXiv 2306.07629, section 4.2): a few weights of the greatest
sensitivity, then the largest of what is left. Exact numbers of entries take the place of the paper's
thresholds, so that shapes are static.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxq.errors import JaxqError
from jaxq.formats.base import Layout, QuantizedArray
from jaxq.formats.dense_sparse import DenseSparse, DenseSparseArray, compress
from jaxq.largest import largest
from jaxq.solvers.common import all_finite, check, matrices


def select(
    w: Float[Array, "in out"], count: int, sensitivity: Float[Array, "in out"] | None, sensitive: int
) -> Bool[Array, "in out"]:
    """The positions that leave the dense part: a mask with exactly `count` true entries.

    First the `sensitive` positions of greatest `sensitivity` (not negative), then the largest |w| of the
    rest. Of equal ones those of the lowest input leave first, then of the lowest output. `sensitivity` may be
    None if `sensitive` is 0. Bounds: 0 <= sensitive <= count <= in * out.
    """
    mask = jnp.zeros_like(w, bool)
    if sensitive:
        assert sensitivity is not None
        mask = _largest(jnp.abs(sensitivity.astype(jnp.float32)), sensitive)
    if count > sensitive:
        mask = mask | _largest(jnp.where(mask, -1.0, jnp.abs(w.astype(jnp.float32))), count - sensitive)
    return mask


def _largest(score: Float[Array, "in out"], count: int) -> Bool[Array, "in out"]:
    """Exactly `count` of the largest, the first of equal ones."""
    places = largest(score.reshape(-1), count)
    return jnp.zeros(score.size, bool).at[places].set(True).reshape(score.shape)


def overlay(
    w: Float[Array, "*batch in out"],
    base: QuantizedArray,
    mask: Bool[Array, "*batch in out"],
    format: DenseSparse,
    layout: Layout | None,
    dtype: Any,
) -> DenseSparseArray:
    """`base` with an overlay that restores canonical `w` wherever `mask` is true.

    The overlay holds the difference between `w` and the base, whatever the base stores there, so that their
    sum is `w` to one rounding of `value_dtype`. Every matrix of `mask` must hold exactly `format.entries`
    places. The result has the given layout and logical dtype.
    """
    return _overlay(w, base, mask, format, layout or Layout(), jnp.dtype(dtype).name)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _overlay(
    w: Array, base: Any, mask: Array, format: DenseSparse, layout: Layout, dtype_name: str
) -> DenseSparseArray:
    take = functools.partial(compress, format=format)
    for _ in base.batch_shape:
        take = jax.vmap(take)
    rows, values, starts, counts = take(w.astype(jnp.float32) - base.matrix(jnp.float32), mask)
    base = dataclasses.replace(base, layout=Layout(), dtype_name="float32")
    return DenseSparseArray(base, rows, values, starts, counts, format, layout, dtype_name)


def solve_split(
    solve: Callable[..., Any],
    w: Any,
    statistics: dict[str, Any],
    format: DenseSparse,
    *,
    sensitivity: Any = None,
    sensitive: float = 0.0,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[DenseSparseArray, dict[str, Any]]:
    """Splits `w`, solves the dense part with any solver, and puts the overlay on top.

    Args:
        solve: `(w, **statistics, format=, layout=, **options)`, giving an array, or an array and diagnostics.
            It gets canonical weights with 0 at the removed positions. If it has a parameter `frozen`, that is
            the mask of those positions, `(batch..., in, out)`: errors there cost nothing.
        w: `(in, out)` or `(batch..., in, out)`, any float dtype; of logical shape if `layout` is given.
        statistics: what `solve` needs to know, in canonical shape.
        format: how many weights leave, and the format of the rest.
        sensitivity: cost of an error of each weight, not negative, of the shape of `w` (or canonical).
        sensitive: fraction of all weights that leave for their sensitivity, part of `format.sparsity`; the
            others leave for their size.
        layout: how the logical leaf maps to the canonical matrix.

    Returns (array, diagnostics of `solve`). Raises JaxqError for weights or a sensitivity that are not
    finite or of the wrong shape, for `sensitive` outside [0, sparsity] or without a sensitivity, for
    overlay values beyond `value_dtype`, and whatever `solve` raises.
    """
    w = jnp.asarray(w)
    matrix = matrices(w, layout)
    *batch, in_size, out_size = matrix.shape
    if not 0 <= sensitive <= format.sparsity:
        raise JaxqError(f"the sensitive fraction {sensitive!r} is a part of the sparsity {format.sparsity}; "
                        "use one between 0 and that")  # fmt: skip
    if sensitive and sensitivity is None:
        raise JaxqError(
            "weights cannot leave for their sensitivity without one; give sensitivity=, or use sensitive=0"
        )
    check(
        all_finite(matrix),
        "the weights hold NaN or infinite values; repair the checkpoint or leave this weight dense",
    )
    count = format.entries(in_size, out_size)
    first = min(count, round(sensitive * in_size * out_size))
    if first:
        sensitivity = _like(sensitivity, w, matrix, layout)
        check(all_finite(sensitivity), "the sensitivity holds NaN or infinite values")
    rest, mask = _split(matrix, sensitivity if first else None, count, first)
    if "frozen" in inspect.signature(solve).parameters:
        options["frozen"] = mask
    solved = solve(rest, **statistics, format=format.base, layout=None, **options)
    base, diagnostics = solved if isinstance(solved, tuple) else (solved, {})
    array = overlay(matrix, base, mask, format, layout, w.dtype)
    check(
        jnp.isfinite(array.values),
        f"an overlay value does not fit {format.value_dtype}; use value_dtype='float32'",
    )
    return array, diagnostics


@functools.partial(jax.jit, static_argnums=(2, 3))
def _split(w: Array, sensitivity: Array | None, count: int, sensitive: int) -> tuple[Array, Array]:
    """(w without the removed weights, mask of those)."""
    choose: Callable[..., Array] = lambda w, s: select(w, count, s, sensitive)  # noqa: E731
    for _ in w.shape[:-2]:
        choose = jax.vmap(choose)
    mask = choose(w, sensitivity)
    return jnp.where(mask, jnp.zeros((), w.dtype), w), mask


def _like(sensitivity: Any, w: Array, matrix: Array, layout: Layout | None) -> Float[Array, "*batch in out"]:
    """The sensitivity in canonical form. One that could be either is taken as logical, like the weight."""
    sensitivity = jnp.asarray(sensitivity)
    if sensitivity.shape == w.shape:
        return layout.to_canonical(sensitivity) if layout else sensitivity
    if sensitivity.shape != matrix.shape:
        raise JaxqError(
            f"a sensitivity of shape {sensitivity.shape} does not belong to a weight of shape {w.shape}"
        )
    return sensitivity
