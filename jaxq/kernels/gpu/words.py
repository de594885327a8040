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
from jaxtyping import Array, UInt8, UInt32

#: Words of a line of the cache, 128 bytes: of one plane of a sub-block where groups do not decide.
RUN = 32

#: Rows are whole lines if that adds no more than one part in so many.
LITTLE = 16

#: Bits of a code: (pairs in a word, members of a block).
UNITS = {4: (4, 1), 3: (8, 2), 2: (8, 1)}

#: One field of a code: (member, pair, half, first bit of the code, width, plane, place in its word).
Field = tuple[int, int, int, int, int, int, int]


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

    def fields(self) -> list[Field]:
        """Where each part of each code of a place lies."""
        wide = 2 if self.bits == 3 else self.bits
        found: list[Field] = []
        for member in range(self.members):
            for i in range(self.pairs):
                for half in (0, 1):
                    found.append((member, i, half, 0, wide, member, self._low(i, half, wide)))
                    if self.bits == 3:
                        found.append((member, i, half, 2, 1, 2, self._top(member, i, half)))
        return found

    def _low(self, i: int, half: int, wide: int) -> int:
        if self.spread:
            return 16 * half + wide * i
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
    rows = jnp.pad(jnp.swapaxes(codes, -1, -2), padding)
    places = rows.reshape((*batch, out_size, blocks, order.members, order.pairs, order.run, 2)).astype(jnp.uint32)
    words: list[Any] = [jnp.uint32(0)] * order.planes
    for member, i, half, first, width, plane, place in order.fields():
        part = (places[..., member, i, :, half] >> first) & (2**width - 1)
        words[plane] = words[plane] | (part << place)
    return jnp.stack(words, axis=-2).reshape((*batch, out_size, -1))


def unpack(rows: UInt32[Array, "*batch out words"], order: Order, in_size: int) -> UInt8[Array, "*batch in out"]:
    """The first `in_size` codes of rows made by `pack`."""
    *batch, out_size, _ = rows.shape
    planes = rows.reshape((*batch, out_size, -1, order.planes, order.run))
    found: dict[tuple[int, int, int], Array] = {}
    for member, i, half, first, width, plane, place in order.fields():
        part = ((planes[..., plane, :] >> place) & (2**width - 1)) << first
        found[member, i, half] = found.get((member, i, half), jnp.uint32(0)) | part
    codes = [
        jnp.stack([found[member, i, half].astype(jnp.uint8) for half in (0, 1)], axis=-1)
        for member in range(order.members)
        for i in range(order.pairs)
    ]
    whole = jnp.stack(codes, axis=-3).reshape((*batch, out_size, -1))
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
