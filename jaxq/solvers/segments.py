"""The best cut of sorted points into contiguous segments, by exact dynamic programming.

    D_m[j] = min over i < j of D_{m-1}[i] + cost(i, j],    cost(i, j] = sum f (x - mean)^2 over points i+1..j

Split points are monotone: the best i for j never lies left of the best i for a smaller j (Wu 1991, Grønlund et
al. 2017, arXiv 1701.07204). That is used twice, with static shapes. Points form blocks and blocks form groups. The
start of each group scans all splits, the start of each block those between the answers for the starts of its group
and of the next, and each point those between the answers for the starts of its block and of the next.

The last two scans go by tiles: all positions of a group or block, a row, times all splits of a block, a column. A
row needs the columns from its own answer to that of the next row. Of these only the first may be needed by other
rows too. So two sets of tiles have them all: each row with its first column, and each column with the one row that
needs it, but not as its first.

A segment that begins in one block and ends in another is a suffix, whole blocks, and a prefix, and costs what its
parts cost and what it costs to join them, (m_1 - m_2)^2 / (1 / W_1 + 1 / W_2). Nothing is ever subtracted from a
running sum, so float32 suffices however unevenly the importance is spread.

Channels are the last axis everywhere: the vector lanes of a CPU and the threads of a warp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UNROLL = 8

#: Below this many points the search in groups costs more, in gathers and compilation, than it saves.
GROUPED = 1000


class Moments(NamedTuple):
    """Total importance, mean and importance-weighted squared distance from the mean of a set of points."""

    weight: Array
    mean: Array
    spread: Array


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets together (Chan, Golub, LeVeque 1983); sets without importance count nothing."""
    weight = a.weight + b.weight
    share = b.weight / jnp.where(weight > 0, weight, 1.0)
    gap = b.mean - a.mean
    return Moments(weight, a.mean + gap * share, a.spread + b.spread + a.weight * share * gap * gap)


class Sizes(NamedTuple):
    """Points in a block, blocks in a group, and groups."""

    block: int
    group: int
    groups: int

    @property
    def blocks(self) -> int:
        return self.group * self.groups

    @property
    def costs(self) -> int:
        """Segment costs that a layer looks at in a channel."""
        points = self.block * self.blocks
        of_blocks = self.block * self.group * (self.groups + self.blocks) if self.group > 1 else 0
        return points * self.groups + of_blocks + 3 * points * self.block


@functools.cache
def sizes(n: int) -> Sizes:
    """Those of least work: segment costs, pairs of blocks (which take memory too), 20 to gather each pair."""
    root = math.isqrt(n) + 1
    options = (
        Sizes(block, group, -(-n // (block * group)))
        for block in range(4, root + 4, 4)
        for group in range(1, root if n >= GROUPED else 2)
    )
    return min(options, key=lambda option: option.costs + option.blocks * (option.blocks + 20 * option.group))


def evaluations(n: int, entries: int) -> int:
    """Segment costs that `best_cuts` looks at for one channel."""
    return max(min(entries, n) - 2, 0) * sizes(n).costs


def bytes_for(n: int, entries: int) -> int:
    """Bytes of temporaries that `best_cuts` needs for one channel, about."""
    size = sizes(n)
    return 4 * (n * size.block + 3 * size.blocks**2 + n * (min(entries, n) + 30))


def best_cuts(
    x: Float[Array, "n channels"], f: Float[Array, "n channels"], entries: int
) -> Int[Array, "entries+1 channels"]:
    """Cuts of the cheapest partition of each channel into at most `entries` segments.

    Segment a holds the points cuts[a] .. cuts[a+1] - 1; surplus segments are empty and come first.

    Args:
        x: ascending along axis 0, of magnitude about 1.
        f: importance, not negative, not below 1e-30 where not 0, at most about 1.
        entries: the number of segments.

    Time O(entries n^1.5) a channel, memory O(n^1.5 + entries n). The cost of the result exceeds the optimum by
    no more than rounding, about 1e-6 of it.
    """
    n, channels = x.shape
    layers = min(entries, n)
    if layers < 2:
        ends = jnp.full((entries, channels), n, jnp.int32)
        return jnp.concatenate([jnp.zeros((1, channels), jnp.int32), ends])
    blocks = _Blocks(x, f, sizes(n))
    one = blocks.one_segment()

    def layer(m: Any, best: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(best, blocks.improve(best[m]), m + 1, axis=0)

    best = jnp.zeros_like(one, shape=(layers - 1, *one.shape)).at[0].set(one)
    best = jax.lax.fori_loop(0, layers - 2, layer, best)

    def backtrack(end: Array, best: Array) -> tuple[Array, Array]:
        start = blocks.best_start(best, end)
        return start, start

    whole = jnp.full_like(x[0], blocks.padded, dtype=jnp.int32)
    _, cuts = jax.lax.scan(backtrack, whole, best, reverse=True)
    missing = jnp.zeros((entries + 1 - layers, channels), jnp.int32)
    return jnp.concatenate([missing, jnp.minimum(cuts, n), jnp.full_like(cuts[:1], n)])


class _Blocks:
    """What all layers share. Arrays are `(blocks, s, channels)`, or `(blocks, blocks, channels)` for pairs.

    `best` arguments hold D_m[j] at place j - 1; candidates for the split hold D_m[i] at place i.
    """

    def __init__(self, x: Array, f: Array, sizes: Sizes) -> None:
        n, channels = x.shape
        self.s, self.group, self.groups = sizes
        self.count = sizes.blocks
        self.padded, self.channels = self.s * self.count, channels
        # Points without importance cost nothing wherever they are.
        missing = self.padded - n
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, channels))])
        f = jnp.concatenate([f, jnp.zeros_like(f, shape=(missing, channels))])
        shape = (self.count, self.s, channels)
        points = Moments(f.reshape(shape), x.reshape(shape), jnp.zeros_like(x, shape=shape))
        # One loop for both directions.
        ends = _running(Moments(*(jnp.concatenate([part, part[:, ::-1]]) for part in points)))
        self.prefix = Moments(*(part[: self.count] for part in ends))
        self.suffix = Moments(*(part[self.count :, ::-1] for part in ends))
        self.total = Moments(*(part[:, -1] for part in self.prefix))
        self.inside = _inside(points)
        self.between = _between(self.total)

    def one_segment(self) -> Array:
        """D_1."""
        before = merge(Moments(*(part[:1] for part in self.total)), Moments(*(part[0] for part in self.between)))
        before = Moments(*(part.at[0].set(0.0)[:, None] for part in before))
        return merge(before, self.prefix).spread

    def candidates(self, best: Array) -> Array:
        """D[i] for i = 0 .. padded - 1: no points cost nothing."""
        flat = best.reshape(self.padded, self.channels)
        return jnp.concatenate([jnp.zeros_like(flat[:1]), flat[:-1]]).reshape(best.shape)

    def improve(self, best: Array) -> Array:
        """D_m from D_{m-1}."""
        split, inside = self.candidates(best), self.inside
        far = self._across(split) if self.count > 1 else jnp.full_like(best, jnp.inf)
        near = _fold(jnp.minimum, far, self.s, lambda i: _at(split, i) + inside[:, i])
        return jnp.minimum(near, best)

    def _across(self, split: Array) -> Array:
        """The best over splits that lie in an earlier block."""
        tails = self.suffix._replace(spread=split + self.suffix.spread)
        columns = jnp.arange(self.count, dtype=jnp.int32)[:, None]

        # Tied to the tails: XLA would move what it costs to join out of the loop over layers, where it is the
        # same, and keep all of it: slow on a CPU, too large anywhere.
        tied = jax.lax.optimization_barrier((tails, Moments(*(part[:, :: self.group] for part in self.between))))
        low = _running_max(_first_minimum(_cheapest(*tied)))
        if self.group > 1:
            row = _row_of(low, columns)
            first = _cheapest(_take(tails, low), self._up_to_starts(low, columns[: self.groups]))
            rest = _cheapest(tails, self._up_to_starts(columns, row))
            _, column = _of_rows(low, row, first, rest)
            low = _running_max(column.reshape(self.count, self.channels))
        row = _row_of(low, columns)
        # What the prefixes themselves cost is added at the end.
        prefix = self.prefix._replace(spread=jnp.zeros_like(self.prefix.spread, shape=(1, 1, 1)))
        taken = prefix._replace(weight=_take(prefix.weight, row), mean=_take(prefix.mean, row))
        first = _cheapest(merge(_take(tails, low), self._up_to_block(low, columns)), prefix)
        rest = _cheapest(merge(tails, self._up_to_block(columns, row)), taken)
        return _of_rows(low, row, first, rest)[0] + self.prefix.spread

    def _up_to_block(self, column: Array, row: Array) -> Moments:
        """What lies between a column and a block."""
        pairs = Moments(*(part.reshape(-1, 1, self.channels) for part in self.between))
        return _take(pairs, column * self.count + row)

    def _up_to_starts(self, column: Array, row: Array) -> Moments:
        """What lies between a column and each block of a group."""
        pairs = Moments(*(part.reshape(-1, self.group, self.channels) for part in self.between))
        return _take(pairs, column * self.groups + row)

    def best_start(self, best: Array, end: Int[Array, " channels"]) -> Int[Array, " channels"]:
        """The split i that gives D_m[end], given D_{m-1}; 0 for end 0. One scan over all splits."""
        count, s = self.count, self.s
        split = self.candidates(best)
        place = jnp.maximum(end - 1, 0)
        block, inner = place // s, place % s
        lanes = jnp.arange(self.channels)
        middle = Moments(*(part[:, block, lanes][:, None] for part in self.between))
        right = Moments(*(part.reshape(self.padded, -1)[place, lanes] for part in self.prefix))
        left = Moments(self.suffix.weight, self.suffix.mean, split + self.suffix.spread)
        across = merge(left, merge(middle, right)).spread
        within = split + self.inside[block, :, inner, lanes].T
        order = jnp.arange(count)[:, None, None]
        costs = jnp.where(order < block, across, jnp.where(order == block, within, jnp.inf))
        start = jnp.argmin(costs.reshape(self.padded, -1), axis=0).astype(jnp.int32)
        return jnp.where(end > 0, start, 0)


def _cheapest(left: Moments, right: Moments) -> Array:
    """For each place on the right of a tile the least cost of a segment from a place on its left."""
    left_inverse, right_inverse = 1.0 / left.weight, 1.0 / right.weight

    def segment(i: Any) -> Array:
        gap = _at(left.mean, i) - right.mean
        return _at(left.spread, i) + gap * gap / (_at(left_inverse, i) + right_inverse)

    worst = jnp.full_like(right.mean, jnp.inf)
    return _fold(jnp.minimum, worst, left.mean.shape[1], segment) + right.spread


def _row_of(low: Array, columns: Array) -> Array:
    """The row that needs a column, not as its first: the last with `low` before the column, found by bisection."""
    rows = low.shape[0]
    steps = (rows - 1).bit_length()

    # A loop, so that XLA does not search again for each use of the result.
    def step(i: Any, found: Array) -> Array:
        trial = found + jnp.left_shift(1, steps - 1 - i)
        before = _along(low, jnp.minimum(trial, rows - 1)) < columns
        return jnp.where((trial < rows) & before, trial, found)

    start = jnp.zeros_like(low, shape=(columns.shape[0], low.shape[1]))
    return jax.lax.fori_loop(0, steps, step, start)


def _of_rows(low: Array, row: Array, first: Array, rest: Array) -> tuple[Array, Array]:
    """The least cost for each place of a row, and the column that has it.

    Args:
        low: the first column of each row.
        row: the row of each column.
        first: costs in the tiles of `low`, `(rows, places, channels)`.
        rest: costs in the tiles of `row`, `(columns, places, channels)`.
    """
    rest, column = _run_minimum(rest, row)
    start = jnp.minimum(low + 1, row.shape[0] - 1)
    any_rest = _along(row, start) == jnp.arange(low.shape[0], dtype=jnp.int32)[:, None]
    rest, column = _take((rest, column), start)
    better = any_rest[:, None] & (rest < first)
    return jnp.where(better, rest, first), jnp.where(better, column, low[:, None])


def _run_minimum(tiles: Array, row: Array) -> tuple[Array, Array]:
    """From each tile on to the end of its run of equal `row`: the minimum, and the first tile that has it."""
    count = tiles.shape[0]
    tile = jnp.arange(count, dtype=jnp.int32)[:, None]

    def later(x: Array, distance: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, jnp.zeros_like(x)]), distance, count)

    def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        least, place = carry
        distance = jnp.left_shift(1, i)
        same = (row == later(row, distance)) & (tile < count - distance)
        less = jnp.where(same[:, None], jnp.minimum(least, later(least, distance)), least)
        return less, jnp.where(less < least, later(place, distance), place)

    start = tiles, jnp.broadcast_to(tile[:, None], tiles.shape)
    return jax.lax.fori_loop(0, (count - 1).bit_length(), step, start)


def _fold(
    combine: Callable[[Array, Array], Array], start: Array, count: int, term: Callable[[Any], Array]
) -> Array:
    """combine(start, term(0), term(1), ...).

    Unrolled, so that XLA keeps the result in registers, but never wholly: only a loop keeps XLA from fusing the
    gathers that make the operands into the terms, where LLVM does not vectorize, and the terms into the consumers
    of the result, which would compute it again for each use.
    """
    unroll = max(u for u in range(1, UNROLL + 1) if count % u == 0 and (u < count or u == 1))
    return jax.lax.fori_loop(0, count, lambda i, result: combine(result, term(i)), start, unroll=unroll)


def _at(x: Array, i: Any) -> Array:
    """`x[:, i]` with the axis kept."""
    return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)


def _running(items: Moments) -> Moments:
    """Moments of items 0..i of axis 1."""
    start = Moments(*(jnp.zeros_like(part[:, 0]) for part in items))

    def step(carry: Moments, item: Moments) -> tuple[Moments, Moments]:
        carry = merge(carry, item)
        return carry, carry

    _, out = jax.lax.scan(step, start, Moments(*(jnp.moveaxis(part, 1, 0) for part in items)))
    return Moments(*(jnp.moveaxis(part, 0, 1) for part in out))


def _inside(points: Moments) -> Array:
    """Costs of segments in a block, `(blocks, first point, last point, channels)`; infinite if first > last."""
    size = points.weight.shape[1]
    order = jnp.arange(size)[:, None]

    def step(carry: Moments, item: tuple[Array, Array, Array]) -> tuple[Moments, Array]:
        first, weight, mean = item
        point = Moments(
            jnp.where(order >= first, weight[:, None], 0.0), mean[:, None], jnp.zeros_like(weight)[:, None]
        )
        carry = merge(point, carry)
        return carry, jnp.where(order >= first, carry.spread, jnp.inf)

    start = Moments(*(jnp.zeros_like(part) for part in points))
    items = (jnp.arange(size), jnp.moveaxis(points.weight, 1, 0), jnp.moveaxis(points.mean, 1, 0))
    _, costs = jax.lax.scan(step, start, items, reverse=True)
    return jnp.moveaxis(costs, 0, 1)


def _between(total: Moments) -> Moments:
    """Moments of the blocks q + 1 .. b - 1, `(q, b, channels)`; infinite spread for q >= b."""
    count = total.weight.shape[0]
    order = jnp.arange(count)[:, None]

    def step(after: Moments, item: Any) -> tuple[Moments, Moments]:
        q, block = item
        later = order > q
        out = after._replace(spread=jnp.where(later, after.spread, jnp.inf))
        block = Moments(jnp.where(later, block.weight, 0.0), block.mean, jnp.where(later, block.spread, 0.0))
        return merge(block, after), out

    start = Moments(*(jnp.zeros_like(part) for part in total))
    return jax.lax.scan(step, start, (jnp.arange(count), total), reverse=True)[1]


def _first_minimum(x: Array) -> Array:
    """argmin along axis 0, the first of equals; several times as fast as XLA's own on a CPU."""

    def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        best, place = carry
        return jnp.minimum(best, x[i]), jnp.where(x[i] < best, i, place)

    start = x[0], jnp.zeros(x.shape[1:], jnp.int32)
    return jax.lax.fori_loop(1, x.shape[0], step, start, unroll=UNROLL)[1]


def _running_max(x: Array) -> Array:
    """Rounding may break the monotony that the path relies on."""
    return jax.lax.cummax(x, axis=0)


def _take(x: Any, index: Array) -> Any:
    """`x[index[t, c], :, c]` for each `x` (blocks, s, channels) of a tree and `index` (items, channels)."""

    # Single numbers from the flat array: XLA's gather of slices would move the channels off the last axis.
    def take(x: Array) -> Array:
        _, s, channels = x.shape
        place = index[:, None] * s + jnp.arange(s, dtype=jnp.int32)[:, None]
        flat = place * channels + jnp.arange(channels, dtype=jnp.int32)
        return x.reshape(-1).at[flat].get(mode="promise_in_bounds")

    return jax.tree.map(take, x)


def _along(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=0, mode="promise_in_bounds")
