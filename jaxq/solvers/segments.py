"""The best cut of sorted points into contiguous segments, by exact dynamic programming.

    D_m[j] = min over i < j of D_{m-1}[i] + cost(i, j],    cost(i, j] = sum f (x - mean)^2 over points i+1..j

Split points are monotone: the best i for j never lies left of the best i for a smaller j (Wu 1991, Grønlund et
al. 2017, arXiv 1701.07204). That is used once, with static shapes: positions are cut into blocks of s points;
every s-th position scans all splits; the splits of the positions between two of these lie between the two
answers. Windows of neighbouring blocks overlap in one block of candidates, so all (block of positions, block of
candidates) pairs that are needed lie on one monotone path through the grid of pairs: 2 n / s - 1 tiles of s x s.

A segment that begins in one block and ends in another is a suffix, whole blocks, and a prefix, and costs what its
parts cost and what it costs to join them, (m_1 - m_2)^2 / (1 / W_1 + 1 / W_2). Nothing is ever subtracted from a
running sum, so float32 suffices however unevenly the importance is spread.

Channels are the last axis everywhere: the vector lanes of a CPU and the threads of a warp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UNROLL = 8


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


def block_size(n: int) -> int:
    """Points in a block: balances the scan of every s-th position, n^2 / s, against the tiles, 3 n s at most."""
    return max(2, min(n, round(math.sqrt(n))))


def evaluations(n: int, entries: int) -> int:
    """Segment costs that `best_cuts` looks at for one channel."""
    s = block_size(n)
    return max(min(entries, n) - 2, 0) * (n * n // s + 3 * n * s)


def bytes_for(n: int, entries: int) -> int:
    """Bytes of temporaries that `best_cuts` needs for one channel, about."""
    s = block_size(n)
    return 4 * (n * s + 8 * (n // s) ** 2 + n * (min(entries, n) + 40))


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
    blocks = _Blocks(x, f, block_size(n))
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

    def __init__(self, x: Array, f: Array, s: int) -> None:
        n, channels = x.shape
        self.s, self.count = s, -(-n // s)
        self.padded, self.channels = self.s * self.count, channels
        # Points without importance cost nothing wherever they are.
        missing = self.padded - n
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, channels))])
        f = jnp.concatenate([f, jnp.zeros_like(f, shape=(missing, channels))])
        shape = (self.count, s, channels)
        self.x, self.f = x.reshape(shape), f.reshape(shape)
        points = Moments(self.f, self.x, jnp.zeros_like(self.x))
        self.prefix = _running(points)
        self.suffix = _running(points, reverse=True)
        self.total = Moments(*(part[:, -1] for part in self.prefix))
        self.inside = _inside(points, self.prefix, self.suffix)
        self.between = _between(self.total)
        self.prefix_inverse = 1.0 / self.prefix.weight
        self.suffix_inverse = 1.0 / self.suffix.weight
        self.between_inverse = 1.0 / self.between.weight

    def one_segment(self) -> Array:
        """D_1."""
        before = _running(Moments(*(part[None] for part in self.total)))
        before = Moments(
            *(jnp.concatenate([jnp.zeros_like(part[0, :1]), part[0, :-1]])[:, None] for part in before)
        )
        return merge(before, self.prefix).spread

    def candidates(self, best: Array) -> Array:
        """D[i] for i = 0 .. padded - 1: no points cost nothing."""
        flat = best.reshape(self.padded, self.channels)
        return jnp.concatenate([jnp.zeros_like(flat[:1]), flat[:-1]]).reshape(best.shape)

    def improve(self, best: Array) -> Array:
        """D_m from D_{m-1}."""
        count, s = self.count, self.s
        split = self.candidates(best)
        cost = split + self.suffix.spread
        far = self._across(cost, split) if count > 1 else jnp.full_like(best, jnp.inf)
        inside = self.inside
        near = _fold(jnp.minimum, far, s, lambda i: _at(split, i) + inside[:, i])
        return jnp.minimum(near, best)

    def _across(self, cost: Array, split: Array) -> Array:
        """The best over splits that lie in an earlier block."""
        count, s = self.count, self.s
        # Tied to `cost`, since XLA would move what it costs to join out of the loop over layers, where it is the
        # same, and keep all n^2 of it: slow on a CPU, too large anywhere.
        cost, suffix_mean, suffix_inverse, mean, inverse = jax.lax.optimization_barrier(
            (cost, self.suffix.mean, self.suffix_inverse, self.between.mean, self.between_inverse)
        )

        def ends_at_block(i: Any) -> Array:
            gap = _at(suffix_mean, i) - mean
            return _at(cost, i) + gap * gap / (_at(suffix_inverse, i) + inverse)

        coarse = _fold(jnp.minimum, jnp.full_like(mean, jnp.inf), s, ends_at_block) + self.between.spread
        # Row b: the block where the best split for the last position before block b + 1 lies.
        best_block = _running_max(_first_minimum(coarse))
        low = jnp.concatenate([jnp.zeros_like(best_block[:1]), best_block[:-1]])
        step = jnp.arange(2 * count - 1, dtype=jnp.int32)[:, None]
        # Tile t of the path joins block `row` with the candidates of block `t - row`.
        start = low + jnp.arange(count, dtype=jnp.int32)[:, None]
        before = jnp.full((2 * count - 1, self.channels), -1, jnp.int32)
        row = _fold(jnp.add, before, count, lambda b: (start[b] <= step).astype(jnp.int32))
        column = step - row
        pair = column * count + jnp.maximum(row - 1, 0)
        middle = Moments(*(_take(part.reshape(count * count, 1, -1), pair) for part in self.between))
        parts = (_take(self.suffix.weight, column), _take(self.suffix.mean, column), _take(cost, column))
        left = merge(Moments(*parts), middle)
        left_cost = jnp.where((column < row)[:, None], left.spread, jnp.inf)
        left_mean, left_inverse = left.mean, 1.0 / left.weight
        right_mean, right_inverse = _take(self.prefix.mean, row), _take(self.prefix_inverse, row)

        def tile(i: Any) -> Array:
            gap = _at(left_mean, i) - right_mean
            return _at(left_cost, i) + gap * gap / (_at(left_inverse, i) + right_inverse)

        tiles = _segment_minimum(_fold(jnp.minimum, jnp.full_like(left_cost, jnp.inf), s, tile), row, count)
        return _take(tiles, start) + self.prefix.spread

    def best_start(self, best: Array, end: Int[Array, " channels"]) -> Int[Array, " channels"]:
        """The split i that gives D_m[end], given D_{m-1}; 0 for end 0. One scan over all splits."""
        count, s = self.count, self.s
        split = self.candidates(best)
        place = jnp.maximum(end - 1, 0)
        block, inner = place // s, place % s
        lanes = jnp.arange(self.channels)
        middle = Moments(*(part[:, jnp.maximum(block - 1, 0), lanes][:, None] for part in self.between))
        right = Moments(*(part.reshape(self.padded, -1)[place, lanes] for part in self.prefix))
        left = Moments(self.suffix.weight, self.suffix.mean, split + self.suffix.spread)
        across = merge(merge(left, middle), right).spread
        within = split + self.inside[block, :, inner, lanes].T
        order = jnp.arange(count)[:, None, None]
        costs = jnp.where(order < block, across, jnp.where(order == block, within, jnp.inf))
        start = jnp.argmin(costs.reshape(self.padded, -1), axis=0).astype(jnp.int32)
        return jnp.where(end > 0, start, 0)


def _fold(
    combine: Callable[[Array, Array], Array], start: Array, count: int, term: Callable[[Any], Array]
) -> Array:
    """combine(start, term(0), term(1), ...).

    Unrolled, so that XLA keeps the result in registers, but never wholly: only a loop keeps XLA from fusing the
    gathers that make the operands into the terms, where LLVM does not vectorize, and the terms into the consumers
    of the result, which would compute it again for each use.
    """
    unroll = min(UNROLL, max(count // 2, 1))
    return jax.lax.fori_loop(0, count, lambda i, result: combine(result, term(i)), start, unroll=unroll)


def _at(x: Array, i: Any) -> Array:
    """`x[:, i]` with the axis kept."""
    return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)


def _running(items: Moments, reverse: bool = False) -> Moments:
    """Moments of items 0..i of axis 1, or i..last if `reverse`."""
    start = Moments(*(jnp.zeros_like(part[:, 0]) for part in items))

    def step(carry: Moments, item: Moments) -> tuple[Moments, Moments]:
        carry = merge(item, carry) if reverse else merge(carry, item)
        return carry, carry

    _, out = jax.lax.scan(step, start, Moments(*(jnp.moveaxis(part, 1, 0) for part in items)), reverse=reverse)
    return Moments(*(jnp.moveaxis(part, 0, 1) for part in out))


def _inside(points: Moments, prefix: Moments, suffix: Moments) -> Array:
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
    """Moments of the blocks q + 1 .. b, `(q, b, channels)`; nothing for q = b, infinite spread for q > b."""
    count = total.weight.shape[0]
    order = jnp.arange(count)[:, None]

    def step(after: Moments, item: Any) -> tuple[Moments, Moments]:
        q, block = item
        spread = jnp.where(order >= q, after.spread, jnp.inf)
        out = Moments(after.weight, after.mean, spread)
        here = order >= q
        block = Moments(jnp.where(here, block.weight, 0.0), block.mean, jnp.where(here, block.spread, 0.0))
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


def _take(x: Array, index: Array) -> Array:
    """`x[index[t, c], :, c]` for `x` (blocks, s, channels) and `index` (items, channels)."""
    # Single numbers from the flat array: XLA's gather of slices would move the channels off the last axis.
    _, s, channels = x.shape
    place = index[:, None] * s + jnp.arange(s, dtype=jnp.int32)[:, None]
    flat = place * channels + jnp.arange(channels, dtype=jnp.int32)
    return x.reshape(-1).at[flat].get(mode="promise_in_bounds")


def _segment_minimum(tiles: Array, row: Array, longest: int) -> Array:
    """At the first tile of each run of equal `row`, the minimum over the run."""
    steps = max(longest - 1, 1).bit_length()
    row = jnp.concatenate([row, jnp.full((2 ** (steps - 1), row.shape[1]), -1, row.dtype)])

    def step(i: Any, tiles: Array) -> Array:
        distance = jnp.left_shift(1, i)
        rest = jnp.zeros_like(tiles, shape=(2 ** (steps - 1), *tiles.shape[1:]))
        later = jax.lax.dynamic_slice_in_dim(jnp.concatenate([tiles, rest]), distance, tiles.shape[0])
        later_row = jax.lax.dynamic_slice_in_dim(row, distance, tiles.shape[0])
        same = row[: tiles.shape[0]] == later_row
        return jnp.where(same[:, None], jnp.minimum(tiles, later), tiles)

    return jax.lax.fori_loop(0, steps, step, tiles)
