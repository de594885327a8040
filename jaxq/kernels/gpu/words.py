"""Codes in the order that the GPU kernels read.

A row holds the codes of one output. It is cut into blocks of `members * 2 * pairs * run` inputs, a block into
`members` sub-blocks. In a sub-block, word `j` of `run` holds `pairs` pairs of codes; pair `i` are inputs
`2 * run * i + 2 * j` and the next one, so that the pairs of `x` that `run` lanes need lie side by side. Codes of 4
and 2 bits fill a word; of codes of 3 bits the lower two fill a word for each of two members, and the top bits of
both a third word.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

#: Words of a line of the cache, 128 bytes: of one plane of a sub-block where groups do not decide.
RUN = 32

#: Rows are whole lines if that adds no more than one part in so many.
LITTLE = 16

#: For each code of a place (member of a block, pair, half).
Places = UInt32[np.ndarray, "members pairs 2"]

#: Bits of a code: (pairs in a word, members of a block).
UNITS = {4: (4, 1), 3: (8, 2), 2: (8, 1)}


@dataclasses.dataclass(frozen=True)
class Order:
    """How the codes of a row lie in words. `spread`: for arithmetic on pairs, else for nibbles that look up."""

    bits: int
    run: int
    spread: bool

    @property
    def pairs(self) -> int:
        return UNITS[self.bits][0]

    @property
    def members(self) -> int:
        return UNITS[self.bits][1]

    @property
    def planes(self) -> int:
        """Words of a block for each of its `run` places."""
        return 3 if self.bits == 3 else 1

    @property
    def low_bits(self) -> int:
        """Bits of a code's lower part."""
        return 2 if self.bits == 3 else self.bits

    @property
    def member_inputs(self) -> int:
        return 2 * self.pairs * self.run

    @property
    def block_inputs(self) -> int:
        return self.members * self.member_inputs

    @property
    def block_words(self) -> int:
        return self.planes * self.run

    def inputs_in(self, row_words: int) -> int:
        return row_words // self.block_words * self.block_inputs

    def places(self) -> tuple[Places, Places]:
        """Where in its word each code's lower part begins, and of codes of 3 bits the top bit, in a third word."""
        every = [
            [[(self._low(i, half), self._top(member, i, half)) for half in (0, 1)] for i in range(self.pairs)]
            for member in range(self.members)
        ]
        low, top = np.moveaxis(np.asarray(every, np.uint32), -1, 0)
        return low, top

    def _low(self, i: int, half: int) -> int:
        if self.spread:
            return 16 * half + self.low_bits * i
        # Neighbouring nibbles are a pair; codes of two bits take turns in them.
        turn, nibble = divmod(2 * i + half, 8)
        return 4 * nibble + 2 * turn

    def _top(self, member: int, i: int, half: int) -> int:
        """See `uniform/gpu.py` and `top_bits` for how these are read."""
        if self.spread:
            turn, step = divmod(i, 4)
            return (16 * half + 2 + 2 * step + 8 * member + turn) % 32
        turn, nibble = divmod(2 * i + half, 8)
        return 4 * nibble + 2 * member + turn


def order_for(bits: int, group: int | None, spread: bool) -> Order:
    """The order for groups of so many inputs; None for one group an output."""
    pairs, _ = UNITS[bits]
    return Order(bits, RUN if group is None else min(RUN, group // (2 * pairs)), spread)


def unsupported(bits: int, group: int | None) -> str:
    """Why groups of so many inputs cannot be laid out; empty if they can."""
    least = 8 * UNITS[bits][0]
    if group is None or (group >= least and group & (group - 1) == 0):
        return ""
    return f"GPU kernels have groups of a power of two, at least {least} inputs at {bits} bits"


def group_of(blocks: Array, member: int, order: Order, group: int | None) -> Array:
    """The group of a member of blocks."""
    if group is None:
        return jnp.zeros_like(blocks)
    place = blocks * order.members + member
    each = group // order.member_inputs
    return jax.lax.div(place, jnp.full_like(place, each)) if each > 1 else place


def groups_in(row_words: int, order: Order, group: int | None) -> int:
    """Groups of a row, with those that only fill up the last block."""
    return 1 if group is None else -(-order.inputs_in(row_words) // group)


def pad_last(x: Array, size: int) -> Array:
    """`x` with zeros behind, so that its last axis has `size` elements."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def pack(codes: UInt8[Array, "*batch in out"], order: Order) -> UInt32[Array, "*batch out words"]:
    """Rows of whole blocks, and of whole lines where that takes little more; codes of zero fill them up."""
    *batch, in_size, out_size = codes.shape
    blocks = -(-in_size // order.block_inputs)
    lines = math.lcm(order.block_words, RUN) // order.block_words
    whole = -(-blocks // lines) * lines
    blocks = whole if LITTLE * (whole - blocks) <= blocks else blocks
    padding = [(0, 0)] * len(batch) + [(0, 0), (0, blocks * order.block_inputs - in_size)]
    rows = jnp.pad(jnp.swapaxes(codes, -1, -2), padding).astype(jnp.uint32)
    codes = rows.reshape((*batch, out_size, blocks, order.members, order.pairs, order.run, 2))
    low, top = (places[:, :, None, :] for places in order.places())
    words = jnp.sum((codes & (2**order.low_bits - 1)) << low, axis=(-3, -1), dtype=jnp.uint32)
    if order.bits == 3:
        third = jnp.sum((codes >> 2) << top, axis=(-4, -3, -1), dtype=jnp.uint32)
        words = jnp.concatenate([words, third[..., None, :]], axis=-2)
    return words.reshape((*batch, out_size, -1))


def unpack(rows: UInt32[Array, "*batch out words"], order: Order, in_size: int) -> UInt8[Array, "*batch in out"]:
    """The first `in_size` codes of rows made by `pack`."""
    *batch, out_size, _ = rows.shape
    planes = rows.reshape((*batch, out_size, -1, order.planes, 1, order.run, 1))
    low, top = (places[:, :, None, :] for places in order.places())
    codes = (planes[..., : order.members, :, :, :] >> low) & (2**order.low_bits - 1)
    if order.bits == 3:
        codes = codes | ((planes[..., 2:, :, :, :] >> top) & 1) << 2
    whole = codes.astype(jnp.uint8).reshape((*batch, out_size, -1))
    return jnp.swapaxes(whole[..., :in_size], -1, -2)


def nibbles(planes: list[Any], order: Order) -> list[list[Any]]:
    """For each member the words of eight nibbles, one code in each, in the order of `lanes.look_up`."""
    if order.bits == 4:
        return [[planes[0]]]
    found = []
    for member in range(order.members):
        some = []
        for turn in (0, 1):
            word = (planes[member] >> (2 * turn)) & jnp.uint32(0x33333333)
            if order.bits == 3:
                word = word | top_bits(planes[2], member, turn)
            some.append(word)
        found.append(some)
    return found


def top_bits(plane: Any, member: int, turn: int) -> Any:
    """The third bits of eight codes, each at bit 2 of its nibble."""
    place = 2 * member + turn
    moved = plane >> (place - 2) if place >= 2 else plane << (2 - place)
    return moved & jnp.uint32(0x44444444)
