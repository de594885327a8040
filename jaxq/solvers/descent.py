"""Passes over the codes of a codebook: error feedback, and exact coordinate descent, by one and the same walk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxq.solvers.schedule import Schedule, plan
from jaxq.solvers.walk import Walk

#: On accelerators, tables up to this size are searched by a chain of selections inside one fused kernel.
CHAIN = 16

#: GPTQ's 16 rows take three times as long to compile here, and twice as long to run (CPU, 3 bits).
MICRO = 8


def table_point(
    value: Float[Array, " out"],
    target: Float[Array, " out"],
    table: Float[Array, "entries out"],
    middles: Float[Array, "entries-1 out"],
    free: Bool[Array, " out"],
) -> tuple[Array, Array]:
    """The rounding of a walk over codebooks: the nearest entry of each channel's table, `(points, points)`.

    `table` is ascending, `middles` lie between its neighbours. A channel that is not `free` takes its target,
    without error.
    """
    point = jax.lax.platform_dependent(value, table, middles, cpu=_in_a_loop, default=_at_once)
    point = jnp.where(free, point, target)
    return point, point


def _in_a_loop(value: Array, table: Array, middles: Array) -> Array:
    """For CPUs, where unrolled selections take long to compile and spill (4 bits: 0.39 s a pass against 0.09)."""

    def step(entry: Any, point: Array) -> Array:
        middle, above = (jax.lax.dynamic_index_in_dim(x, entry, keepdims=False) for x in (middles, table[1:]))
        return jnp.where(value > middle, above, point)

    return jax.lax.fori_loop(0, middles.shape[0], step, table[0])


def _at_once(value: Array, table: Array, middles: Array) -> Array:
    """For accelerators, where each step of a loop is a kernel to launch."""
    if table.shape[0] > CHAIN:
        return jnp.max(jnp.where(value > middles, table[1:], table[0]), axis=0)
    point = table[0]
    for entry in range(table.shape[0] - 1):
        point = jnp.where(value > middles[entry], table[entry + 1], point)
    return point


def schedule_for(rows: int) -> Schedule:
    """The pieces of a pass over `rows` inputs: GPTQ's, with smaller micro-blocks."""
    schedule = plan(rows)
    return dataclasses.replace(schedule, sizes=(*schedule.sizes[:-1], MICRO))


def descent_coupling(hessian: Float[Array, "in in"]) -> Float[Array, "in in"]:
    """[before, after]: what a change of one input adds to the best value of another, H_ij / H_ii for `after` i.

    Zero where an input has no positive diagonal.
    """
    return hessian * _inverse_diagonal(hessian)


def descend(
    coupling: Float[Array, "padded padded"],
    hessian: Float[Array, "in in"],
    w: Float[Array, "in out"],
    points: Float[Array, "in out"],
    table: Float[Array, "entries out"],
    free: Bool[Array, "in out"],
    schedule: Schedule,
) -> Float[Array, "in out"]:
    """One pass over the inputs of (w - q)^T H (w - q), every channel at once.

    With the coupling of `descent_coupling` a step of coordinate descent on each input in turn: all others
    held, input i is best at the entry nearest to q_i + (H (w - q))_i / H_ii (GuidedQuant, Kim et al. 2025, the
    assignment step of LNQ). That is Gauss-Seidel, so with d = q_old - q_new the inputs before i have moved its
    target by the sum over j < i of (H_ij / H_ii) d_j beyond the product taken before the pass: GPTQ's walk,
    started from the old points. With the coupling of `factor.factorize` and `points = w` the product is
    zero, and the pass is GPTQ's walk itself, its grid the table (the assignment step of GANQ, Zhao and
    Yuan 2025).

    Args:
        coupling: padded by the schedule.
        hessian: symmetric; zero rows where an input costs nothing.
        points: the present q.
        table: ascending.
        free: positions that may move; the others stay at their present point.

    Returns the new q. Coordinate descent never raises the objective of a channel, up to rounding.
    1.5 in^2 out multiplications.
    """
    pull = product(hessian, w - points) * _inverse_diagonal(hessian)[:, None]
    grid = (table[None], ((table[1:] + table[:-1]) / 2)[None], schedule.pad(free))
    found, _ = Walk(coupling, schedule, table_point, grid).run(schedule.pad(points), schedule.pad(pull))
    return schedule.unpad(found)


def product(hessian: Float[Array, "in in"], error: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """H d in full float32."""
    return jnp.matmul(hessian, error, precision="highest")


def energy(hessian: Float[Array, "in in"], error: Float[Array, "in out"]) -> Float[Array, " out"]:
    """d^T H d of each channel."""
    return jnp.sum(error * product(hessian, error), axis=0)


def _inverse_diagonal(hessian: Array) -> Float[Array, " in"]:
    diagonal = jnp.diagonal(hessian)
    return jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1.0), 0.0)
