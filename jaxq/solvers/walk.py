"""The sequential part of GPTQ: round, hand the error on, go to the next input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.formats.uniform import Uniform, dequantize_codes, quantize_codes
from jaxq.solvers.schedule import Schedule

Grid = tuple[Array, ...]
Found = tuple[Array, Grid | None]
Rounding = Callable[..., tuple[Array, Array]]


def on_uniform_grid(
    value: Array, target: Array, scale: Array, zero: Array, *, format: Uniform
) -> tuple[Array, Array]:
    """The rounding of GPTQ: the nearest point of a uniform grid, `(codes, points)`."""
    codes = quantize_codes(value, scale, zero, format)
    return codes, dequantize_codes(codes, scale, zero)


@dataclasses.dataclass(frozen=True)
class Walk:
    """One walk down the inputs of one matrix.

    Rows are inputs, so that a step is elementwise work on an `(out,)` vector. A piece of rows receives the
    errors of all rows before it by one product (left-looking: unlike the usual update of everything that
    follows, it never rewrites the rest of the matrix), then is cut into smaller pieces; the smallest is
    unrolled, which makes its steps one fused loop.

    Args:
        coupling: what an error adds to the rows after it, `[before, after]`; read above the diagonal only.
            Padded by the schedule.
        schedule: the nested piece sizes.
        rounding: `(value, target, *grid of the row) -> (found, point)`, all of shape `(out,)`: what to keep of
            the row, and the number that stands for it; its error is `target - point`.
        grid: arrays `(in, ...)`, or `(1, ...)` where all rows share one; None to fit one for each slot on the
            way.
        fit: the grid of a `(group, out)` piece; needed for fitting only.
        completion: see `factor.completions`; needed for fitting only.
    """

    coupling: Float[Array, "in in"]
    schedule: Schedule
    rounding: Rounding
    grid: Grid | None
    fit: Callable[[Array], Grid] | None = None
    completion: Float[Array, "slots slot slot"] | None = None

    def run(self, w: Float[Array, "in out"], received: Float[Array, "in out"] | None = None) -> Found:
        """What the rounding found, `(in, out)`, and the fitted grids `(slots, out)`, None if the grid was given.

        `received`: what the rows are to be moved by before any error arrives.
        """
        panel = self.schedule.sizes[0]

        def step(error: Array, index: Array) -> tuple[Array, Found]:
            start = index * panel
            target = _rows(w, start, panel)

            def receive(before: Array, corrected: Array) -> Array:
                coupling = jax.lax.dynamic_slice(self.coupling, (before * panel, start), (panel, panel))
                return corrected + _feedback(coupling, _rows(error, before * panel, panel))

            moved = target if received is None else target + _rows(received, start, panel)
            corrected = jax.lax.fori_loop(0, index, receive, moved)
            inner, found = self._piece(0, start, corrected, target, self.grid)
            return _put(error, inner, start), found

        _, found = jax.lax.scan(step, jnp.zeros_like(w), jnp.arange(w.shape[0] // panel))
        return _join(found)

    def _piece(
        self, level: int, start: Array, corrected: Array, target: Array, grid: Grid | None
    ) -> tuple[Array, Found]:
        """(errors, (codes, grids fitted)) of the piece of rows from `start`.

        `target`: the original weight; `corrected`: that plus the errors received from before the piece.
        """
        sizes = self.schedule.sizes
        fitted = None
        if self.completion is not None and sizes[level] == self.schedule.slot:
            assert self.fit is not None
            inverse = jax.lax.dynamic_index_in_dim(self.completion, start // sizes[level], keepdims=False)
            grid = fitted = self.fit(target + _feedback(inverse, corrected - target))
        if level == len(sizes) - 1:
            assert grid is not None
            error, codes = self._micro(start, corrected, target, grid)
            return error, (codes, fitted)
        size, part = sizes[level], sizes[level + 1]

        def step(error: Array, index: Array) -> tuple[Array, Found]:
            offset = index * part
            coupling = jax.lax.dynamic_slice(self.coupling, (start, start + offset), (size, part))
            received = _rows(corrected, offset, part) + _feedback(coupling, error)
            inner, found = self._piece(level + 1, start + offset, received, _rows(target, offset, part), grid)
            return _put(error, inner, offset), found

        error, found = jax.lax.scan(step, jnp.zeros_like(target), jnp.arange(size // part))
        codes, below = _join(found)
        return error, (codes, fitted if below is None else below)

    def _micro(self, start: Array, corrected: Array, target: Array, grid: Grid) -> tuple[Array, Array]:
        """Errors and codes of a micro-block: row by row, each handing its error to the rows below."""
        size = corrected.shape[0]
        coupling = jax.lax.dynamic_slice(self.coupling, (start, start), (size, size))
        here = (x if x.shape[0] == 1 else _rows(x, start, size) for x in grid)
        settings = [jnp.broadcast_to(x, (size, *x.shape[1:])) for x in here]
        errors: list[Array] = []
        codes: list[Array] = []
        for row in range(size):
            value = corrected[row]
            for before, error in enumerate(errors):
                value = value + coupling[before, row] * error
            code, point = self.rounding(value, target[row], *(x[row] for x in settings))
            codes.append(code)
            errors.append(target[row] - point)
        return jnp.stack(errors), jnp.stack(codes)


def _rows(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=0)


def _put(x: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=0)


def _feedback(coupling: Float[Array, "before after"], error: Float[Array, "before out"]) -> Array:
    return jax.lax.dot_general(coupling, error, (((0,), (0,)), ((), ())), precision="highest")


def _join(found: Found) -> Found:
    """What the parts of a piece found, `(parts, rows, ...)`, as one `(parts * rows, ...)`."""
    return jax.tree.map(lambda x: x.reshape((x.shape[0] * x.shape[1], *x.shape[2:])), found)
