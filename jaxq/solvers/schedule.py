"""In which pieces a sequential solver walks down the inputs: static sizes, chosen from the width alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array

MICRO = 16
BLOCK = 128
PANEL = 1024


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Nested piece sizes, each a multiple of the next.

    `sizes`: from panel down to micro-block. `rows`: true inputs. `group`: rows of a group as given, `slot`:
    rows that it takes up here (groups are padded with inert rows up to a multiple of the micro-block); both
    None if no group is fitted on the way.
    """

    rows: int
    sizes: tuple[int, ...]
    group: int | None
    slot: int | None

    @property
    def padded(self) -> int:
        return _round_up(self.slots_end, self.sizes[0])

    @property
    def slots_end(self) -> int:
        """Rows in use before the padding at the end."""
        if self.group is None or self.slot is None:
            return self.rows
        return -(-self.rows // self.group) * self.slot

    def pad(self, x: Array) -> Array:
        """`(rows, ...)` to `(padded, ...)`, zeros in the inert rows."""
        if self.group is not None and self.slot is not None and self.group != self.slot:
            groups = -(-self.rows // self.group)
            x = _fill(x, groups * self.group).reshape((groups, self.group, *x.shape[1:]))
            x = jnp.pad(x, [(0, 0), (0, self.slot - self.group), *[(0, 0)] * (x.ndim - 2)])
            x = x.reshape((groups * self.slot, *x.shape[2:]))
        return _fill(x, self.padded)

    def unpad(self, x: Array) -> Array:
        """Undoes `pad`."""
        if self.group is not None and self.slot is not None and self.group != self.slot:
            x = x[: self.slots_end].reshape((-1, self.slot, *x.shape[1:]))[:, : self.group]
            x = x.reshape((-1, *x.shape[2:]))
        return x[: self.rows]


def plan(rows: int, group: int | None = None) -> Schedule:
    """The schedule for `rows` inputs; `group` rows share a grid that is fitted on the way (None: no fitting).

    Micro-blocks are unrolled, so their size bounds compile time; blocks bound the cost of a micro-step's
    correction; panels bound the work that static shapes waste on the part of the matrix already done.
    """
    if group is None:
        micro, slot, inner = MICRO, None, ()
        unit = _best(range(BLOCK // 2, BLOCK + 1, MICRO), rows)
        count = -(-rows // unit)
        inner = (unit, micro)
    else:
        micro = group if group <= MICRO else _best(range(MICRO // 2, MICRO + 1), group)
        slot = _round_up(group, micro)
        count = -(-rows // group)
        if slot <= BLOCK // 2:
            members = _best(range(-(-BLOCK // 2 // slot), BLOCK // slot + 1), count)
            unit, count = members * slot, -(-count // members)
            inner = (unit, slot, micro)
        else:
            blocks = -(-slot // BLOCK)
            block = _round_up(-(-slot // blocks), micro)
            slot = unit = block * blocks
            inner = (slot, block, micro)
    most = max(1, PANEL // unit)
    panel = unit * _best(range(-(-most // 2), most + 1), count)
    sizes = tuple(dict.fromkeys((panel, *inner)))
    return Schedule(rows, sizes, group, slot)


def _best(candidates: Iterable[int], total: int) -> int:
    """The candidate whose multiple reaches `total` with the least excess; the largest of equals."""
    return min(candidates, key=lambda size: (_round_up(total, size), -size))


def _round_up(total: int, size: int) -> int:
    return -(-total // size) * size


def _fill(x: Array, rows: int) -> Array:
    return jnp.pad(x, [(0, rows - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])
