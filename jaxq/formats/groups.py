"""Groups of consecutive inputs that share scales or a table; the last one of a channel may be shorter."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxq.errors import JaxqError
from jaxq.formats.packing import whole_words


def check_size(size: Any) -> None:
    """JaxqError unless `size` is a number of inputs, or None for one group a channel."""
    if not (size is None or (type(size) is int and size >= 1)):
        raise JaxqError(f"group size {size!r} is not a positive number or None")


def rows_per_group(size: int | None, in_size: int) -> int:
    """Inputs of a group; JaxqError if it is larger than the width."""
    if size is None:
        return in_size
    if size > in_size:
        raise JaxqError(f"group size {size} is larger than the input width {in_size}; "
                        "use group_size=None or a smaller one")  # fmt: skip
    return size


def split_groups(x: Array, size: int) -> Array:
    """`(..., in, out)` to `(..., groups, size, out)`; a short last group is filled with zeros."""
    *batch, in_size, out_size = x.shape
    groups = -(-in_size // size)
    if missing := groups * size - in_size:
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, missing), (0, 0)])
    return x.reshape((*batch, groups, size, out_size))


def join_groups(x: Array, in_size: int) -> Array:
    """Undoes `split_groups`."""
    *batch, groups, size, out_size = x.shape
    return x.reshape((*batch, groups * size, out_size))[..., :in_size, :]


def tile_unit(size: int, in_size: int, bits: int) -> int:
    """Inputs that end with a whole word, and with a group of `size` or inside one that such tiles fill evenly.

    0 if there is no such number below the width.
    """
    word = whole_words(bits)
    if size >= in_size:
        return word
    unit = math.lcm(size, word)
    # A part of a group, if twice that again and again makes the group: tiles are powers of two of the unit.
    while unit == size and unit % 2 == 0 and (unit // 2) % word == 0:
        unit = size = unit // 2
    return unit if unit <= in_size else 0


def slice_groups(
    x: Shaped[Array, "*batch groups out"], size: int, in_size: int, row: Any, rows: int, column: Any, columns: int
) -> Shaped[Array, "*batch some columns"]:
    """What belongs to the groups of `size` that inputs `row` to `row + rows` of some columns lie in."""
    x = jax.lax.dynamic_slice_in_dim(x, column, columns, axis=x.ndim - 1)
    if size >= in_size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, row // size, -(-rows // size), axis=x.ndim - 2)
