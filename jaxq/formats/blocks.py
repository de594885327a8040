"""Products of one token, summed up in blocks of inputs without storing anything dense.

A block is some parts of `PART` inputs. For one input of a part after the other, its weights in all blocks are
decoded, multiplied and added up. XLA makes one loop of all that, with vectors along the outputs, and shares the
blocks out among threads, as long as everything is elementwise and no single result has many users. Arrays are
`[blocks, 1, out]`, since to reshape is not elementwise.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxq.formats.packing import PART


def hold_groups(array: Any, parts: int) -> bool:
    """Whether groups of inputs are whole parts, and blocks of `parts` lie in one group or are whole groups."""
    in_size, _ = array.matrix_shape
    size, block = array.format.rows_per_group(in_size), PART * parts
    return size >= in_size or (size % PART == 0 and (size % block == 0 or block % size == 0))


def of_groups(
    x: Shaped[Array, "groups out"], size: int, in_size: int, blocks: int, part: jax.Array | int
) -> Shaped[Array, "#blocks 1 out"]:
    """What belongs to the group of `size` inputs that one part of each block lies in."""
    block = in_size // blocks
    if size >= in_size:
        return x[None]
    if size >= block:
        # The last group may be shorter.
        return jnp.repeat(x, size // block, axis=0)[:blocks, None]
    return jax.lax.dynamic_index_in_dim(x.reshape((blocks, -1, x.shape[-1])), part * PART // size, axis=1)


def sum_of(x: Float[Array, "blocks part"]) -> Float[Array, "blocks 1 1"]:
    # As a product: XLA would compute what uses a reduction in an order of its own.
    return (x @ jnp.ones(x.shape[1], jnp.float32))[:, None, None]


def weighted_sum(
    x: Float[Array, "blocks part"], rows: Iterable[Shaped[Array, "blocks 1 out"]]
) -> Float[Array, "blocks 1 out"]:
    """The sum of a row for each input of the part, times that input."""
    return functools.reduce(operator.add, (x[:, place, None, None] * row for place, row in enumerate(rows)))
