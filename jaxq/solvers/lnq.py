"""LNQ: codebooks of least output error, by turns (GuidedQuant, Kim et al. 2025, arXiv 2505.07004)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxq.errors import JaxqError
from jaxq.formats.base import Layout
from jaxq.formats.codebook import Codebook, CodebookArray, assemble, lookup, nearest, representable, store
from jaxq.solvers.common import Jitted, all_finite, check, matrices
from jaxq.solvers.descent import descend, descent_coupling, energy, product, schedule_for
from jaxq.solvers.factor import factorize, normalize
from jaxq.solvers.gptq import DEFAULT_DAMPING
from jaxq.solvers.kmeans import fit_tables
from jaxq.solvers.tables import chunk_of, corrections

STARTS = ("feedback", "nearest")
ROUNDS = 4
SWEEPS = 1


class Settings(NamedTuple):
    """What a compiled solve is made for."""

    format: Codebook
    rounds: int
    sweeps: int
    start: str
    chunk: int


class State(NamedTuple):
    """Where the channels stand: points `(in, out)`, tables `(entries, out)` ascending, objective `(out,)`."""

    points: Array
    table: Array
    energy: Array


def lnq(
    w: Any,
    hessian: Any,
    format: Codebook = Codebook(),  # noqa: B008
    *,
    importance: Any = None,
    frozen: Any = None,
    rounds: int = ROUNDS,
    sweeps: int = SWEEPS,
    start: str = "feedback",
    damping: float = DEFAULT_DAMPING,
    layout: Layout | None = None,
) -> CodebookArray:
    """Tables and codes by turns, each the best for the other, for the least error of the layer's output.

    Minimises (w - q)^T (H + damping I) (w - q) for each output channel, q_i one of the channel's `2**bits`
    values, H = X^T X / tokens over its mean diagonal. A round fits the table to the codes in closed form, then
    the codes to the table. Inputs are visited in descending order of H's diagonal.

    Args:
        w: `(in, out)` or `(batch..., in, out)`, any float dtype; of logical shape if `layout` is given.
        hessian: `(in, in)`, shared by all; `(batch..., in, in)`; or `(batch..., groups, in, in)`, where group g
            of consecutive output channels has its own. Any positive scale: each is normalized.
        format: the codebook, with one table a channel.
        importance: weights of the k-means that gives the first tables, of the shape of `w` (or canonical).
            Default: the root of the Hessian's diagonal.
        frozen: bool, of the shape of `w` (or canonical): weights that are stored exactly elsewhere. They count
            nowhere, and their code is that of the entry nearest to `w`.
        rounds: tables fitted after the first ones; 0 keeps those of k-means.
        sweeps: passes of coordinate descent for each table.
        start: where descent starts. "nearest": from the codes at hand, the first of which are the nearest
            ones, as in the paper. "feedback": from those, and once more from GPTQ's walk with the table as its
            grid; each channel keeps the better end.
        damping: as in `gptq`; here it is part of the objective too, whose minimum would otherwise lean on
            what few tokens happened to show.
        layout: how the logical leaf maps to the canonical matrix.

    Returns a CodebookArray of the logical shape and dtype of `w`, with no more damped error in any channel than
    with `rounds=0`. Inputs that never carried a signal (zero diagonal) cost nothing and take the nearest entry.
    Raises JaxqError for weights, importance or a Hessian that are not finite, shapes that do not belong
    together, tables of groups, or tables beyond `table_dtype`. Cost: about
    rounds * (entries + 4 sweeps + 5) in^2 out multiplications, and a compilation of some seconds a shape.
    """
    return _checked(w, hessian, format, importance, frozen, rounds, sweeps, start, damping, layout)[0]


def lnq_solve(
    w: Any,
    hessian: Any,
    format: Codebook = Codebook(),  # noqa: B008
    *,
    importance: Any = None,
    frozen: Any = None,
    rounds: int = ROUNDS,
    sweeps: int = SWEEPS,
    start: str = "feedback",
    damping: float = DEFAULT_DAMPING,
    layout: Layout | None = None,
) -> tuple[CodebookArray, dict[str, Array]]:
    """`lnq` with diagnostics: (array, {"error", "damping", "fallback"}), each of the batch shape.

    "error": as `gptq.output_error`, without damping, frozen positions counted as exact; "damping": the greatest
    that a group's factorization needed; "fallback": a group's Hessian could not be factorized, so that there
    was no walk to start from.
    """
    return _checked(w, hessian, format, importance, frozen, rounds, sweeps, start, damping, layout)


def _checked(
    w: Any,
    hessian: Any,
    format: Codebook,
    importance: Any,
    frozen: Any,
    rounds: int,
    sweeps: int,
    start: str,
    damping: float,
    layout: Layout | None,
) -> tuple[CodebookArray, dict[str, Array]]:
    w, hessian = jnp.asarray(w), jnp.asarray(hessian)
    matrix = matrices(w, layout)
    *batch, in_size, out_size = matrix.shape
    groups = _groups(hessian.shape, matrix.shape)
    if importance is not None:
        importance = _beside(importance, "importance", w, matrix, layout)
    if frozen is not None:
        frozen = _beside(frozen, "mask of frozen weights", w, matrix, layout).astype(bool)
    if format.rows_per_group(in_size) < in_size:
        raise JaxqError(f"lnq fits one table a channel, not one for each group of {format.group_size}; use "
                        "group_size=None, or the solver kmeans")  # fmt: skip
    if start not in STARTS:
        raise JaxqError(f"start is {' or '.join(map(repr, STARTS))}, not {start!r}")
    for name, count in (("rounds", rounds), ("sweeps", sweeps)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise JaxqError(f"{name} is a whole number from 0 up, not {count!r}")
    if not isinstance(damping, Tracer) and not 0 <= damping < np.inf:
        raise JaxqError(f"damping {damping} is not a number from 0 up")
    chunk = chunk_of(in_size, out_size // groups, format.entries, math.prod(batch) * groups)
    settings = Settings(format, rounds, sweeps, start, chunk)
    tables, importance_sound = _first_tables(matrix, hessian, importance, frozen, groups, format.entries)
    array, used, sound = _jitted(
        matrix, hessian, tables, frozen, jnp.float32(damping), settings, groups, layout or Layout()
    )
    check(sound["w"], "the weights hold NaN or infinite values; repair the checkpoint or leave this weight dense")
    check(
        sound["hessian"],
        "the Hessian holds NaN or infinite values; look at the activations that it was built from",
    )
    check(importance_sound, "the importance holds NaN, infinite or negative values")
    check(sound["table"], f"a table does not fit {format.table_dtype}; use table_dtype='bfloat16'")
    return array, used


def _groups(hessian: tuple[int, ...], matrix: tuple[int, ...]) -> int:
    """How many groups of channels have their own Hessian; JaxqError if its shape does not fit."""
    *batch, in_size, out_size = matrix
    if hessian in ((in_size, in_size), (*batch, in_size, in_size)):
        return 1
    groups = hessian[len(batch)] if len(hessian) == len(batch) + 3 else 0
    if hessian != (*batch, groups, in_size, in_size):
        raise JaxqError(f"a Hessian of shape {hessian} does not fit weights of shape {matrix}; it must be "
                        f"{(*batch, in_size, in_size)}, with an axis for groups before the last two if they "
                        "differ")  # fmt: skip
    if groups < 1 or out_size % groups:
        raise JaxqError(f"{groups} Hessians cannot share {out_size} output channels evenly; use a number of "
                        "groups that divides them")  # fmt: skip
    return groups


def _beside(x: Any, what: str, w: Array, matrix: Array, layout: Layout | None) -> Array:
    """An array given beside the weight, in canonical form. What could be either is logical, like the weight."""
    x = jnp.asarray(x)
    if x.shape == w.shape:
        return layout.to_canonical(x) if layout else x
    if x.shape != matrix.shape:
        raise JaxqError(f"the {what} has shape {x.shape}, the weight {w.shape}; they must be equal")
    return x


@functools.partial(jax.jit, static_argnums=(4, 5))
def _first_tables(
    w: Array, hessian: Array, importance: Array | None, frozen: Array | None, groups: int, entries: int
) -> tuple[Float[Array, "*batch groups entries out"], Bool[Array, "*batch"]]:
    """The tables of weighted k-means, and whether the importance is fit for use.

    A program of its own: it does not depend on most settings, and takes longer to compile than the rest.
    """

    def fit(w: Array, hessian: Array, importance: Array | None, frozen: Array | None) -> Array:
        diagonal = jnp.diagonal(hessian).astype(jnp.float32)
        # The root spreads the entries over more of the weights than the diagonal itself does: feedback moves
        # errors off the inputs that matter, whose weights must not take up all the entries.
        weights = jnp.sqrt(jnp.maximum(diagonal, 0.0))[:, None] if importance is None else importance
        counted = jnp.broadcast_to((diagonal != 0)[:, None], w.shape)
        counted = counted if frozen is None else counted & ~frozen
        weights = jnp.where(counted, weights.astype(jnp.float32), 0.0)
        weights = jnp.where(jnp.sum(weights, axis=0) > 0, weights, counted.astype(jnp.float32))
        weights = jnp.where(counted.any(axis=0), weights, 1.0)
        return fit_tables(w, weights, entries)

    pieces = (_split(w.astype(jnp.float32), groups), hessian, _split(importance, groups), _split(frozen, groups))
    sound = jnp.asarray(True)
    if importance is not None:
        sound = all_finite(importance) & (importance >= 0).all(axis=(-2, -1))
    return _each(fit, w, hessian)(*pieces), sound


def _solve_batch(
    w: Array,
    hessian: Array,
    tables: Array,
    frozen: Array | None,
    damping: Array,
    settings: Settings,
    groups: int,
    layout: Layout,
) -> tuple[CodebookArray, dict[str, Array], dict[str, Array]]:
    def join(x: Array) -> Array:
        return jnp.moveaxis(x, -3, -2).reshape((*x.shape[:-3], x.shape[-2], groups * x.shape[-1]))

    def solve(w: Array, hessian: Array, table: Array, frozen: Array | None) -> Any:
        return _solve(w, hessian, table, frozen, damping, settings)

    codes, table, used = _each(solve, w, hessian)(
        _split(w.astype(jnp.float32), groups), hessian, tables, _split(frozen, groups)
    )
    codes, table = join(codes), join(table)
    reference, error = (jnp.sum(used[key], axis=-1) for key in ("reference", "error"))
    relative = jnp.sqrt(jnp.maximum(error, 0.0) / jnp.where(reference > 0, reference, 1.0))
    diagnostics = {
        "error": jnp.where(reference > 0, relative, 0.0),
        "damping": jnp.max(used["damping"], axis=-1),
        "fallback": jnp.any(used["fallback"], axis=-1),
    }
    sound = {
        "w": all_finite(w),
        "hessian": all_finite(hessian),
        "table": representable(table, settings.format),
    }
    return assemble(codes, table, settings.format, layout, w.dtype), diagnostics, sound


# As for GPTQ: a search for the fastest of each small product costs a GPU more than it can earn back.
_jitted = Jitted(_solve_batch, (5, 6, 7), {"xla_gpu_autotune_level": 0})


def _split(x: Array | None, groups: int) -> Array | None:
    """`(..., in, out)` to `(..., groups, in, out / groups)`."""
    if x is None:
        return None
    return jnp.moveaxis(x.reshape((*x.shape[:-1], groups, x.shape[-1] // groups)), -2, -3)


def _each(f: Callable[..., Any], w: Array, hessian: Array) -> Callable[..., Any]:
    """f(w, hessian, ...) of one group, mapped over groups and batch axes; all but a shared Hessian have those."""
    f = jax.vmap(f, in_axes=(0, 0 if hessian.ndim == w.ndim + 1 else None, 0, 0))
    for _ in w.shape[:-2]:
        f = jax.vmap(f, in_axes=(0, 0 if hessian.ndim >= w.ndim else None, 0, 0))
    return f


def _solve(
    w: Float[Array, "in out"],
    raw: Float[Array, "in in"],
    table: Float[Array, "entries out"],
    frozen: Bool[Array, "in out"] | None,
    damping: Float[Array, ""],
    settings: Settings,
) -> tuple[Array, Array, dict[str, Array]]:
    """Codes `(in, out)`, stored tables `(entries, out)` and diagnostics of channels that share a Hessian."""
    hessian, live = normalize(raw)
    ranks = jnp.argsort(-jnp.diagonal(hessian))
    mask = jnp.zeros(w.shape, bool) if frozen is None else frozen
    free = (~mask & live[:, None])[ranks]
    hessian, table = hessian[ranks][:, ranks], store(table, settings.format)
    points, table, used = _alternate(w[ranks], hessian, live[ranks], free, table, damping, settings)
    points = jnp.zeros_like(points).at[ranks].set(points, unique_indices=True)
    codes = nearest(points, table)
    error = jnp.where(mask, 0.0, w - lookup(codes, table))
    raw = raw.astype(jnp.float32)
    return codes, table, used | {"error": energy(raw, error).sum(), "reference": energy(raw, w).sum()}


def _alternate(
    w: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    live: Bool[Array, " in"],
    free: Bool[Array, "in out"],
    table: Float[Array, "entries out"],
    damping: Float[Array, ""],
    settings: Settings,
) -> tuple[Array, Array, dict[str, Array]]:
    """Points `(in, out)`, stored tables and diagnostics, inputs in the order given.

    Points that are not free stay at `w`, without error. `table` holds stored values.
    """
    format, feedback = settings.format, settings.start == "feedback"
    schedule = schedule_for(w.shape[0])
    used = {"damping": damping, "fallback": jnp.asarray(False)}
    couplings = []
    if feedback:
        factor = factorize(hessian, damping)
        used = {"damping": factor.damping, "fallback": factor.fallback}
        couplings.append(factor.coupling)
    diagonal = jnp.arange(w.shape[0])
    cost = jnp.where(diagonal[:, None] == diagonal, hessian + used["damping"], hessian)
    cost = jnp.where(live[:, None] & live, cost, 0.0)
    couplings.append(descent_coupling(cost))
    couplings = jnp.stack([schedule.pad(schedule.pad(x).T).T for x in couplings])

    def descended(table: Array, points: Array, walked: Array) -> Array:
        def step(index: Any, points: Array) -> Array:
            coupling = couplings[jnp.minimum(index, len(couplings) - 1)]
            return descend(coupling, cost, w, points, table, free, schedule)

        first = jnp.where(walked, 0, len(couplings) - 1)
        return jax.lax.fori_loop(first, settings.sweeps + len(couplings) - 1, step, points)

    def better(a: State, b: State) -> State:
        wins = b.energy < a.energy
        return jax.tree.map(lambda x, y: jnp.where(wins, y, x), a, b)

    def state(points: Array, table: Array) -> State:
        return State(points, table, energy(cost, w - points))

    def fitted(now: State) -> State:
        codes = nearest(now.points, now.table)
        pull = product(cost, w - now.points)
        table = now.table + corrections(cost, codes, pull, free, format.entries, settings.chunk)
        points = jnp.where(free, lookup(codes, table), w)
        found = better(now, state(points, table))
        return found._replace(table=jnp.sort(found.table, axis=0))

    def stored(now: State) -> State:
        table = store(now.table, format)
        return state(jnp.where(free, lookup(nearest(now.points, now.table), table), w), table)

    def turn(carry: tuple[State, State], index: Array) -> tuple[tuple[State, State], None]:
        now, best = carry
        if settings.rounds:
            now = jax.lax.cond(index > 0, fitted, lambda now: now, now)
            now = jax.lax.cond(index == settings.rounds, stored, lambda now: now, now)

        def chain(now: State, walked: Array) -> tuple[State, None]:
            points = descended(now.table, jnp.where(walked, w, now.points), walked)
            return better(now, state(points, now.table)), None

        now, _ = jax.lax.scan(chain, now, jnp.asarray([False, True][: 1 + feedback]))
        kept = (index == 0) | (index == settings.rounds)
        best = jax.tree.map(lambda x, y: jnp.where(kept, x, y), better(best, now), best)
        return (now, best), None

    start = state(jnp.where(free, lookup(nearest(w, table), table), w), table)
    (_, best), _ = jax.lax.scan(turn, (start, start), jnp.arange(settings.rounds + 1))
    return best.points, best.table, used
