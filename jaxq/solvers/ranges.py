"""Static ranges of activations: from a sample to a quantizer.

`axes` are the axes of the sample that share a grid (None: all); the kept ones get grids of their own, in the shape
that broadcasts against the trailing axes of x: axes (0, 1) of (batch, token, feature) give `(feature,)`, axes
(0, 2, 3) of (batch, head, token, feature) give `(head, 1, 1)`. Candidates are tried one after another, so that a
search takes a few copies of the sample, whatever the number of candidates. Under a transformation the content of
the sample is not checked.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer, check_bits
from jaxq.formats.log_activations import LogQuantizer, ShiftLogQuantizer, shifted_log
from jaxq.solvers.common import check
from jaxq.solvers.samples import Extremes as Extremes
from jaxq.solvers.samples import Sample as Sample

Axes = int | Sequence[int] | None
Candidates = TypeVar("Candidates")

#: Those of RepQ-ViT and I&S-ViT.
ACTIVATION_PERCENTILES = (0.999, 0.9999, 0.99999)
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)

#: Least scales of `mse_grid`. That of activations is of the APHQ-ViT code; weights of 8 bits need smaller ones.
ACTIVATION_FLOOR = 1e-4
WEIGHT_FLOOR = 1e-8

#: Shifts for which a softmax output of 0 stays 0.
POWERS_OF_TWO = tuple(2.0**-k for k in range(4, 20))
OFFICIAL_ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


def affine(low: Float[Array, "*grid"], high: Float[Array, "*grid"], bits: int) -> AffineQuantizer:
    """The grid from `low` to `high`: scale = (high - low) / (2^bits - 1), zero = round(-low / scale).

    |x_hat - x| <= scale / 2 in between, whatever the signs. Where low = high the grid holds that number exactly.
    """
    check_bits(bits)
    low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    constant = jnp.where(low != 0, jnp.abs(low), 1.0)
    scale = jnp.where(high > low, (high - low) / (2**bits - 1), constant)
    return AffineQuantizer(scale, jnp.round(-low / scale), bits)


def minmax(x: Float[Array, "*shape"], bits: int, axes: Axes = None) -> AffineQuantizer:
    """The grid over the whole range of the sample."""
    rows, grid = by_grid(checked(x), axes)
    return affine(rows.min(axis=1).reshape(grid), rows.max(axis=1).reshape(grid), bits)


def percentile(
    x: Float[Array, "*shape"],
    bits: int,
    axes: Axes = None,
    percentiles: Sequence[float] = ACTIVATION_PERCENTILES,
) -> AffineQuantizer:
    """Of the grids from quantile 1 - p to quantile p, the one of least squared error (RepQ-ViT, I&S-ViT).

    p = 1 is the whole range, which the published candidates leave out. Ties go to the first.
    """
    check_bits(bits)
    _check_probabilities(percentiles)
    return _percentile(checked(x), bits, axes_of(x, axes), tuple(percentiles))


def mse_grid(
    x: Float[Array, "*shape"],
    bits: int,
    axes: Axes = None,
    *,
    count: int = 128,
    zeros: Sequence[int] | None = None,
    floor: float = ACTIVATION_FLOOR,
) -> AffineQuantizer:
    """Of a grid of scales and zero points, the pair of least squared error (APHQ-ViT's code, after AdaLog).

    Scales go in equal steps from (Q_0.9 - Q_0.1) / (2^bits - 1) to (max - min) / (2^bits - 1). For the latter the
    range is extended to hold 0, as no zero point outside the codes is tried: that changes nothing but samples of
    one sign, which no published candidate would cover.

    Args:
        x: the sample.
        bits: 1 to 16.
        axes: axes that share a grid.
        count: candidates in all, shared out among the zero points.
        zeros: the zero points; by default the min(16, 2^bits) around the middle. `[0]` for values from 0 up.
        floor: the least scale.
    """
    check_bits(bits)
    return _mse_grid(checked(x), bits, axes_of(x, axes), zero_points(bits, zeros), count, floor)


def log(
    x: Float[Array, "*shape"],
    bits: int,
    root: int = 1,
    percentiles: Sequence[float] = ACTIVATION_PERCENTILES,
    axes: Axes = None,
    *,
    official: bool = False,
) -> LogQuantizer:
    """The logarithmic grid whose scale is the quantile of least squared error (RepQ-ViT). x >= 0."""
    LogQuantizer(jnp.ones(()), bits, root, official)
    _check_probabilities(percentiles)
    return _log(checked(x, signed=False), bits, root, axes_of(x, axes), tuple(percentiles), official)


def shift_log(
    x: Float[Array, "*rows entries"],
    bits: int,
    etas: Sequence[float] | None = None,
    low_high: tuple[Any, Any] | None = None,
    *,
    score: str = "mse",
    official: bool = False,
) -> ShiftLogQuantizer:
    """The shift-uniform-log2 grid of the best shift (SULQ, I&S-ViT section 3.2). Per tensor.

    Args:
        x: softmax outputs, a row along the last axis.
        bits: 1 to 16.
        etas: the shifts to try; by default 2^-4 to 2^-19, with `official` the eleven of the I&S-ViT code.
        low_high: smallest and largest x, if more is known of them than the sample (`Extremes`).
        score: "mse", which does not see a small bias of all the many zeros; or "row_sum": the expected squared
            error of a row times values of mean 1 and variance 1, sum of squared errors + squared sum of errors.
        official: searched with 2^bits codes and run with 2^bits + 1, as the code does.
    """
    check_bits(bits)
    etas = tuple(etas) if etas is not None else OFFICIAL_ETAS if official else POWERS_OF_TWO
    if not etas or min(etas) <= 0:
        raise JaxqError(f"the shifts of a shift-log search are positive numbers, not {etas}")
    if score not in ("mse", "row_sum"):
        raise JaxqError(f"unknown score {score!r}; use 'mse' or 'row_sum'")
    x = checked(x, signed=False)
    low, high = (x.min(), x.max()) if low_high is None else low_high
    found = _shift_log(x, bits, etas, jnp.asarray(low), jnp.asarray(high), score)
    return dataclasses.replace(found, official=official)


def choose(candidates: Candidates, error: Callable[[Candidates], Array]) -> Candidates:
    """The candidate of least error. Ties go to the first.

    Args:
        candidates: a pytree, such as a quantizer, whose leaves have the candidates along their first axis.
        error: takes one candidate; gives its error, a scalar, or of the shape of the candidate's leaves: then each
            entry is chosen by itself.
    """
    best = jnp.argmin(jax.lax.map(error, candidates), axis=0)
    if best.ndim == 0:
        return jax.tree.map(lambda leaf: leaf[best], candidates)
    return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, best[None], axis=0)[0], candidates)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _percentile(x: Array, bits: int, axes: tuple[int, ...], percentiles: tuple[float, ...]) -> AffineQuantizer:
    rows, grid = by_grid(x, axes)
    low = quantiles(rows, [1 - p for p in percentiles])
    return least_error(rows, affine(low, quantiles(rows, percentiles), bits), grid)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _mse_grid(
    x: Array, bits: int, axes: tuple[int, ...], zeros: tuple[int, ...], count: int, floor: float
) -> AffineQuantizer:
    rows, grid = by_grid(x, axes)
    return least_error(rows, scales_and_zeros(rows, bits, zeros, count, floor), grid)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _log(
    x: Array, bits: int, root: int, axes: tuple[int, ...], percentiles: tuple[float, ...], official: bool
) -> LogQuantizer:
    rows, grid = by_grid(x, axes)
    return least_error(rows, LogQuantizer(quantiles(rows, percentiles), bits, root, official), grid)


@functools.partial(jax.jit, static_argnums=(1, 2, 5))
def _shift_log(
    x: Array, bits: int, etas: tuple[float, ...], low: Array, high: Array, score: str
) -> ShiftLogQuantizer:
    eta = jnp.asarray(etas, jnp.float32)
    x, low, high = (value.astype(jnp.float32) for value in (x, low, high))

    def error(q: ShiftLogQuantizer) -> Array:
        missed = q(x) - x
        squares = jnp.mean(jnp.square(missed))
        if score == "mse":
            return squares
        return x.shape[-1] * squares + jnp.mean(jnp.square(missed.sum(axis=-1)))

    return choose(ShiftLogQuantizer(eta, shifted_log(low, eta), shifted_log(high, eta), bits), error)


def least_error(rows: Float[Array, "grids n"], candidates: Any, grid: tuple[int, ...]) -> Any:
    """Of candidates `(count, grids)`, for each row the one of least squared error, in the shape of the grid."""

    def error(q: Any) -> Float[Array, " grids"]:
        q = jax.tree.map(lambda leaf: leaf[:, None], q)
        return jnp.mean(jnp.square(q(rows) - rows), axis=1)

    return jax.tree.map(lambda leaf: leaf.reshape(grid), choose(candidates, error))


def scales_and_zeros(
    rows: Float[Array, "grids n"], bits: int, zeros: tuple[int, ...], count: int, floor: float
) -> AffineQuantizer:
    """The candidates of `mse_grid`, members `(scales * zeros, grids)`."""
    near, far = quantiles(rows, (0.1, 0.9))
    least, most = jnp.minimum(rows.min(axis=1), 0.0), jnp.maximum(rows.max(axis=1), 0.0)
    steps = max(1, count // len(zeros))
    scales = jnp.linspace(far - near, most - least, steps) / (2**bits - 1)
    scales = jnp.maximum(scales, floor)
    shape = (len(zeros), *scales.shape)
    scale = jnp.broadcast_to(scales, shape)
    zero = jnp.broadcast_to(jnp.asarray(zeros, jnp.float32)[:, None, None], shape)
    return AffineQuantizer(scale.reshape(-1, len(rows)), zero.reshape(-1, len(rows)), bits)


def zero_points(bits: int, zeros: Sequence[int] | None) -> tuple[int, ...]:
    if zeros is not None:
        if not zeros:
            raise JaxqError("a search needs a zero point to try")
        return tuple(int(zero) for zero in zeros)
    count = min(16, 2**bits)
    first = 2 ** (bits - 1) - count // 2
    return tuple(range(first, first + count))


def quantiles(
    rows: Float[Array, "grids n"], probabilities: Sequence[float]
) -> Float[Array, "probabilities grids"]:
    """Quantiles of each row, by linear interpolation.

    `jnp.quantile` finds places in float32, which has no whole numbers beyond 2^24; here they are found in advance.
    """
    n = rows.shape[1]
    ranked = jnp.sort(rows, axis=1)
    places = [p * (n - 1) for p in probabilities]
    below = [min(math.floor(place), max(n - 2, 0)) for place in places]
    share = jnp.asarray([place - low for place, low in zip(places, below, strict=True)], jnp.float32)[:, None]
    low = ranked[:, np.asarray(below)].T
    high = ranked[:, np.asarray([min(b + 1, n - 1) for b in below])].T
    return low + (high - low) * share


def axes_of(x: Any, axes: Axes) -> tuple[int, ...]:
    """The axes that share a grid, none negative, in order."""
    ndim = jnp.ndim(x)
    named = tuple(range(ndim)) if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in named):
        raise JaxqError(f"a sample of shape {jnp.shape(x)} has not all of the axes {named}")
    return tuple(sorted({axis % ndim for axis in named}))


def by_grid(x: Array, axes: Axes) -> tuple[Float[Array, "grids n"], tuple[int, ...]]:
    """The sample with a row for each grid, in float32, and the shape of the grids."""
    shared = axes_of(x, axes)
    kept = [axis for axis in range(x.ndim) if axis not in shared]
    rows = jnp.transpose(x, (*kept, *shared)).reshape((math.prod(x.shape[axis] for axis in kept), -1))
    grid = [1 if axis in shared else x.shape[axis] for axis in range(x.ndim)]
    return rows.astype(jnp.float32), tuple(grid[kept[0] :]) if kept else ()


def checked(x: Any, signed: bool = True) -> Array:
    """The sample as an array; JaxqError unless it has numbers, all finite, and none negative if not `signed`."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise JaxqError(f"a sample of activations is floating point, not {x.dtype.name}")
    if x.size == 0:
        raise JaxqError(f"a sample of shape {x.shape} is empty; give it at least one batch")
    finite: Bool[Array, ""] = jnp.isfinite(x).all()
    check(finite, "the sample of activations holds NaN or infinite values; mask padding, or look for an overflow")
    if not signed:
        check((x >= 0).all(), "a logarithmic grid takes values from 0 up, and the sample holds negative ones")
    return x


def _check_probabilities(percentiles: Sequence[float]) -> None:
    if not percentiles or not all(0.5 < p <= 1 for p in percentiles):
        raise JaxqError(f"percentiles lie above 0.5 and up to 1, which {tuple(percentiles)} do not")
