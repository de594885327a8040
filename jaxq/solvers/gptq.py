"""GPTQ: rounding with error feedback (Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ", Algorithm 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxq.errors import JaxqError
from jaxq.formats.base import Layout, QuantizedArray
from jaxq.formats.groups import split_groups
from jaxq.formats.uniform import Uniform, UniformArray, assemble
from jaxq.solvers.common import RANGES, Jitted, all_finite, canonical, check, check_weights
from jaxq.solvers.factor import completions, factorize, normalize
from jaxq.solvers.schedule import Schedule, plan
from jaxq.solvers.walk import Grid, Walk, on_uniform_grid

#: In units of the mean diagonal of H, as in the paper.
DEFAULT_DAMPING = 0.01


def gptq(
    w: Any,
    hessian: Any,
    format: Uniform,
    *,
    order: str = "natural",
    groups: str = "fresh",
    damping: float = DEFAULT_DAMPING,
    range: str = "minmax",
    layout: Layout | None = None,
) -> UniformArray:
    """Rounds the inputs one after another, moving each error onto the inputs still to come.

    Minimises tr((W - Q)^T H (W - Q)) greedily, H = X^T X / tokens: the squared error of the layer's output.

    Args:
        w: `(in, out)` or `(batch..., in, out)`; of logical shape if `layout` is given.
        hessian: `(in, in)`, shared by a batch, or `(batch..., in, in)`. Any positive scale: it is normalized.
        format: the grid.
        order: "natural", or "activation": largest diagonal of H first ("act-order"), which implies static
            groups; codes are stored in natural order either way.
        groups: "fresh" fits a group's grid when its first row is reached, on weights that hold all
            corrections so far; "static" fits all grids beforehand on the original weights.
        damping: added to the diagonal, in units of its mean. Grows tenfold (up to 1) while the factorization
            fails; 0.01 is the value of the paper.
        range: "minmax" or "mse".
        layout: how the logical leaf maps to the canonical matrix.

    Returns a UniformArray of the logical shape and dtype of `w`. Inputs that never carried a signal (zero
    diagonal) get weight 0. Raises JaxqError for weights or a Hessian that are not finite, a Hessian of the
    wrong shape, or a group larger than the width. `gptq_solve` also tells the damping used and the error.
    """
    return _checked(w, hessian, format, order, groups, damping, range, layout)[0]


def gptq_solve(
    w: Any,
    hessian: Any,
    format: Uniform,
    *,
    order: str = "natural",
    groups: str = "fresh",
    damping: float = DEFAULT_DAMPING,
    range: str = "minmax",
    layout: Layout | None = None,
) -> tuple[UniformArray, dict[str, Array]]:
    """`gptq` with diagnostics: (array, {"damping", "fallback", "error"}), each of the batch shape.

    "damping": the last one tried; "fallback": no damping up to 1 sufficed, and the result is round to
    nearest; "error": `output_error` of the result.
    """
    array, used = _checked(w, hessian, format, order, groups, damping, range, layout)
    return array, used | {"error": output_error(w, array, hessian)}


def output_error(w: Any, array: QuantizedArray, hessian: Any) -> Float[Array, "*batch"]:
    """Relative error of the layer's output, ||X (W - Q)|| / ||X W|| = sqrt(tr(D^T H D) / tr(W^T H W)).

    `w` has the logical shape of `array` or its canonical one. 0 if the layer's output is 0.
    """
    w = jnp.asarray(w)
    if w.shape == array.shape:
        w = array.layout.to_canonical(w)
    return _output_error(w, array, jnp.asarray(hessian))


@jax.jit
def _output_error(w: Array, array: QuantizedArray, hessian: Array) -> Array:
    w = w.astype(jnp.float32)

    def energy(x: Array) -> Array:
        return jnp.sum(x * jnp.matmul(hessian.astype(jnp.float32), x, precision="highest"), axis=(-2, -1))

    reference = energy(w)
    error = jnp.maximum(energy(w - array.matrix(jnp.float32)), 0.0)
    return jnp.where(reference > 0, jnp.sqrt(error / jnp.where(reference > 0, reference, 1.0)), 0.0)


def _checked(
    w: Any,
    hessian: Any,
    format: Uniform,
    order: str,
    groups: str,
    damping: float,
    range: str,
    layout: Layout | None,
) -> tuple[UniformArray, dict[str, Array]]:
    matrix, hessian = canonical(w, format, layout, range), jnp.asarray(hessian)
    *batch, in_size, _ = matrix.shape
    if hessian.shape not in ((in_size, in_size), (*batch, in_size, in_size)):
        raise JaxqError(f"a Hessian of shape {hessian.shape} does not fit {in_size} inputs; "
                        f"it must be {(*batch, in_size, in_size)}")  # fmt: skip
    if order not in ("natural", "activation") or groups not in ("fresh", "static"):
        raise JaxqError(f"order is 'natural' or 'activation' and groups 'fresh' or 'static', "
                        f"not {order!r} and {groups!r}")  # fmt: skip
    if not 0 <= damping < np.inf:
        raise JaxqError(f"damping {damping} is not a number from 0 up")
    array, used, finite, representable, sound = _jitted(
        matrix, hessian, jnp.float32(damping), format, order, groups, range, layout or Layout()
    )
    check_weights(finite, representable, format)
    check(sound, "the Hessian holds NaN or infinite values; look at the activations that it was built from")
    return array, used


def _solve_batch(
    w: Array,
    hessian: Array,
    damping: Array,
    format: Uniform,
    order: str,
    groups: str,
    range: str,
    layout: Layout,
) -> tuple[UniformArray, dict[str, Array], Array, Array, Array]:
    def solve(w: Array, hessian: Array) -> Any:
        return _solve(w, hessian, damping, format, order, groups, range)

    batched = 0 if hessian.ndim == w.ndim else None
    for _ in w.shape[:-2]:
        solve = jax.vmap(solve, in_axes=(0, batched))
    codes, (scale, zero), used = solve(w.astype(jnp.float32), hessian)
    array = assemble(codes, scale, zero, format, layout, w.dtype)
    return array, used, all_finite(w), all_finite(array.scale), all_finite(hessian)


# A search for the fastest of each small product would take a GPU 8 s of an 11 s compilation, and halve a run of
# 25 ms (H100, 4096 x 4096): a model has too few matrices of a shape to earn that back.
_jitted = Jitted(_solve_batch, (3, 4, 5, 6, 7), {"xla_gpu_autotune_level": 0})


def _solve(
    w: Array, hessian: Array, damping: Array, format: Uniform, order: str, groups: str, range: str
) -> tuple[Array, Grid, dict[str, Array]]:
    """Codes `(in, out)`, scale and zero `(groups, out or 1)` and diagnostics of one matrix."""
    in_size = w.shape[0]
    hessian, live = normalize(hessian)
    w = jnp.where(live[:, None], w, 0.0)
    group = format.rows_per_group(in_size)
    fit = functools.partial(RANGES[range], format=format)
    if groups == "fresh" and order == "natural" and group < in_size:
        schedule = plan(in_size, group)
        codes, grid, used = _walk(w, hessian, damping, schedule, format, fit, None)
        count = -(-in_size // group)
        return codes, (grid[0][:count], grid[1][:count]), used

    schedule = plan(in_size)
    fitted = fit(split_groups(w, group))
    grid = fitted[0][:, 0, :], fitted[1][:, 0, :]
    per_row = grid if group >= in_size else _each_row(grid, group, in_size)
    if order == "natural":
        codes, _, used = _walk(w, hessian, damping, schedule, format, fit, per_row)
        return codes, grid, used
    ranks = jnp.argsort(-jnp.diagonal(hessian))
    per_row = per_row if group >= in_size else (per_row[0][ranks], per_row[1][ranks])
    codes, _, used = _walk(w[ranks], hessian[ranks][:, ranks], damping, schedule, format, fit, per_row)
    return jnp.zeros_like(codes).at[ranks].set(codes, unique_indices=True), grid, used


def _walk(
    w: Array,
    hessian: Array,
    damping: Array,
    schedule: Schedule,
    format: Uniform,
    fit: Callable[[Array], Grid],
    per_row: Grid | None,
) -> tuple[Array, Grid, dict[str, Array]]:
    """Codes `(in, out)`, the grid walked on and diagnostics, rows taken in the order given.

    Inert rows have no coupling: they neither give errors nor take any.
    """
    factor = factorize(hessian, damping)
    coupling = schedule.pad(schedule.pad(factor.coupling).T).T
    grid = per_row
    if grid is not None and grid[0].shape[0] > 1:
        missing = schedule.padded - grid[0].shape[0]
        grid = jax.tree.map(lambda x: jnp.pad(x, [(0, missing), (0, 0)], constant_values=1), grid)
    completion = completions(coupling, schedule.slot) if grid is None and schedule.slot else None
    rounding = functools.partial(on_uniform_grid, format=format)
    codes, fitted = Walk(coupling, schedule, rounding, grid, fit, completion).run(schedule.pad(w))
    grid = fitted if grid is None else grid
    assert grid is not None
    return schedule.unpad(codes), grid, {"damping": factor.damping, "fallback": factor.fallback}


def _each_row(grid: Grid, group: int, in_size: int) -> Grid:
    """A grid for each group, `(groups, out)`, as one for each input, `(in, out)`."""
    scale, zero = (jnp.repeat(x, group, axis=0)[:in_size] for x in grid)
    return scale, zero
