"""Lloyd's iteration for weighted one-dimensional k-means, on sorted channels.

A step costs entries * log n for a channel: the cells of sorted centroids are contiguous, their borders are found
by bisection, and their means are differences of running sums (Kim et al. 2024, "SqueezeLLM", arXiv 2306.07629,
solve the same problem with scikit-learn).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxq.solvers.sorted_sums import Double, between, count_up_to, product, running_sums

ITERATIONS = 50


class Channels:
    """Sorted channels `(n, channels)`, ascending along axis 0, with their importance and running sums."""

    def __init__(self, x: Float[Array, "n channels"], f: Float[Array, "n channels"]) -> None:
        self.x, self.f = x, f
        self.weights = running_sums(Double(f, jnp.zeros_like(f)))
        self.moments = running_sums(product(f, x))

    def means(
        self, cuts: Int[Array, "entries+1 channels"], otherwise: Float[Array, "entries channels"]
    ) -> Float[Array, "entries channels"]:
        """Weighted means of the points between cuts; `otherwise` where there is no importance."""
        weight, moment = between(self.weights, cuts), between(self.moments, cuts)
        means = jnp.where(weight > 0, moment / jnp.where(weight > 0, weight, 1.0), otherwise)
        # A mean lies between the points that it is of, whatever the rounding.
        low = self._points(jnp.minimum(cuts[:-1], self.x.shape[0] - 1))
        high = self._points(jnp.maximum(cuts[1:] - 1, 0))
        return jnp.where(weight > 0, jnp.clip(means, low, high), otherwise)

    def step(self, table: Float[Array, "entries channels"]) -> Float[Array, "entries channels"]:
        """One iteration: each centroid goes to the mean of its cell, or stays if the cell has no importance."""
        middle = table[:-1] * 0.5 + table[1:] * 0.5
        cuts = count_up_to(self.x, middle)
        zero = jnp.zeros_like(table[:1], dtype=jnp.int32)
        return self.means(jnp.concatenate([zero, cuts, zero + self.x.shape[0]]), table)

    def cost(self, table: Float[Array, "entries channels"]) -> Float[Array, " channels"]:
        """sum f d^2 with d the distance to the nearest entry."""

        def nearer(entry: Any, distance: Array) -> Array:
            return jnp.minimum(distance, jnp.abs(self.x - table[entry]))

        distance = jax.lax.fori_loop(1, table.shape[0], nearer, jnp.abs(self.x - table[0]), unroll=8)
        return jnp.sum(self.f * distance * distance, axis=0)

    def _points(self, index: Array) -> Array:
        return jnp.take_along_axis(self.x, index, axis=0, mode="promise_in_bounds")


def iterate(
    channels: Channels, table: Float[Array, "entries channels"], iterations: int = ITERATIONS
) -> Float[Array, "entries channels"]:
    """`iterations` steps from `table`, sorted. The cost never rises, up to rounding."""
    return jax.lax.fori_loop(0, iterations, lambda _, table: channels.step(table), table)


def better(channels: Channels, *tables: Array) -> Float[Array, "entries channels"]:
    """For each channel the table of least cost, the first of equals."""
    best, cost = tables[0], channels.cost(tables[0])
    for table in tables[1:]:
        other = channels.cost(table)
        best = jnp.where(other < cost, table, best)
        cost = jnp.minimum(cost, other)
    return best


def lloyd(channels: Channels, entries: int, iterations: int = ITERATIONS) -> Float[Array, "entries channels"]:
    """The better of Lloyd's results from two deterministic starts, sorted along axis 0."""
    starts = (spread_start(channels, entries), farthest_start(channels, entries))
    return better(channels, *(iterate(channels, start, iterations) for start in starts))


def spread_start(channels: Channels, entries: int) -> Float[Array, "entries channels"]:
    """Quantiles of the density that many centroids would have, (importance * point density)^(1/3) (Panter, Dite
    1951), here sum f^(1/3) gap^(2/3). Quantiles of the importance itself would put all of them on a few points.
    """
    x, f = channels.x, channels.f
    gap = jnp.diff(x, axis=0)
    gap = 0.5 * (jnp.concatenate([gap, gap[-1:]]) + jnp.concatenate([gap[:1], gap])) if len(x) > 1 else x * 0
    mass = jnp.cumsum(jnp.cbrt(f * gap * gap), axis=0)
    level = (jnp.arange(entries, dtype=jnp.float32)[:, None] + 0.5) / entries
    place = count_up_to(mass, level * mass[-1:])
    return jnp.take_along_axis(x, jnp.minimum(place, len(x) - 1), axis=0, mode="promise_in_bounds")


def farthest_start(channels: Channels, entries: int) -> Float[Array, "entries channels"]:
    """k-means++ without the dice: the next centroid is the point of greatest f d^2 to those chosen so far."""
    x, f = channels.x, channels.f
    first = jnp.take_along_axis(x, jnp.argmax(f, axis=0)[None], axis=0)

    def choose(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        last, distance = carry
        distance = jnp.minimum(distance, jnp.abs(x - last))
        point = jnp.take_along_axis(x, jnp.argmax(f * distance * distance, axis=0)[None], axis=0)
        return (point, distance), point[0]

    _, others = jax.lax.scan(choose, (first, jnp.full_like(x, jnp.inf)), None, length=entries - 1)
    return jnp.sort(jnp.concatenate([first, others]), axis=0)
