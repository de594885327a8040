"""Uniform grids on GPUs: a code becomes part of a float16's mantissa, and one fused operation makes it a value.

A field of bits put into the mantissa of 1024 at place p is 1024 + 2^p code; that over 2^p, minus 1024 / 2^p and
the zero point, is code - zero point, all exactly. So a pair of codes costs one logical operation and one of
arithmetic, and most fields need no shift. Scales multiply sums of products, not weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxq.kernels.gpu import parts as layout
from jaxq.kernels.gpu import words
from jaxq.kernels.gpu.lanes import Instructions, halves, pair
from jaxq.kernels.gpu.parts import blocks as blocks
from jaxq.kernels.gpu.parts import group_of, order_of
from jaxq.kernels.gpu.parts import groups as groups
from jaxq.kernels.gpu.parts import sizes as sizes
from jaxq.kernels.gpu.parts import take as take
from jaxq.kernels.gpu.run import product_of
from jaxq.kernels.gpu.weights import Tile, Weight, pairs_exactly
from jaxq.kernels.gpu.words import Order

#: Bits of a code: where, in a half of a word, the fields begin that are read without another shift.
PLACES = {4: (0, 4), 3: (0, 2, 4, 6), 2: (0, 2, 4, 6, 8)}

#: Bits of a code: by how much a word is shifted for the fields after those.
SHIFT = {4: 8, 3: 8, 2: 10}

#: Decoded weights are so much smaller than codes: below 1, so that sums in float16 overflow only for activations
#: of thousands.
SHRINK = 16

#: A pair of 1024 in float16.
MAGIC = 0x64006400

#: A pair of 1 / (SHRINK 2^place) in float16.
UNIT = {place: ((11 - place) << 10) * 0x00010001 for place in (0, 2, 4, 6, 8)}


#: Axes of the words of one matrix.
AXES = 2


def unsupported(array: Any) -> str:
    """Why an array has no GPU product; empty if it has one."""
    bits = array.format.bits
    if bits not in words.UNITS:
        return "GPU kernels have uniform grids of 2 to 4 bits"
    return layout.unsupported(array.format, array.scale.shape[-2])


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """(words by rows `(batch..., out, words)`, scale and zero point of groups `(batch..., out, groups, 2)`)."""
    del target  # One layout for all GPUs.
    _, out_size = array.matrix_shape
    groups = array.scale.shape[-2]
    order = order_of(array.format, groups, spread=True)
    rows = words.pack(codes, order)
    room = words.groups_in(rows.shape[-1], order, group_of(array.format, groups))

    def by_rows(x: Array) -> Array:
        if array.format.group_size == "tensor":
            x = jnp.broadcast_to(x, (*x.shape[:-1], out_size))
        return words.pad_last(jnp.swapaxes(x, -1, -2), room)

    # Zero points are small integers, exact in any dtype of scales: a group is read as one word of two halves.
    zero = array.zero_point().astype(array.scale.dtype)
    return rows, jnp.stack([by_rows(array.scale), by_rows(zero)], axis=-1)


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array, Array]:
    """(codes, scales, zero points) of the canonical array."""
    del target  # One layout for all GPUs.
    rows, own = parts
    groups = -(-in_size // format.rows_per_group(in_size))
    channels = slice(0, 1) if format.group_size == "tensor" else slice(None)
    scale, zero = (jnp.swapaxes(own[..., channels, :groups, part], -1, -2) for part in (0, 1))
    codes = words.unpack(rows, order_of(format, own.shape[-2], spread=True), in_size)
    return codes, scale, lax.stop_gradient(zero)


def product(x: Float[Array, "tokens in"], prepared: Any, **options: Any) -> Float[Array, "tokens out"]:
    """`x @ prepared`; see `kernels/gpu/run.py` for the options."""
    rows, own = prepared.parts
    groups = own.shape[-2]
    order = order_of(prepared.format, groups, spread=True)
    grid = Grid(order, group_of(prepared.format, groups), groups)
    if own.dtype == jnp.float16:
        own = lax.bitcast_convert_type(own, jnp.uint32)
    return product_of("uniform", x, Weight(rows, grid, (own,)), **options)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Decodes pairs of (code - zero point) / SHRINK, exactly.

    Its array: scale and zero point of each group, `(out, groups)` words of two float16, or `(out, groups, 2)`
    floats of another dtype.
    """

    order: Order
    group: int | None
    groups: int
    kind: Any = jnp.float16

    def begin(self, tile: Tile) -> Any:
        return None if self.group else self._grid(tile.instructions, self._read(tile, jnp.zeros_like(tile.blocks)))

    def read(self, tile: Tile) -> list[list[Array]]:
        """For each member of the blocks its scale and zero point, as they lie in memory."""
        if self.group is None:
            return []
        members = range(self.order.members)
        return [self._read(tile, words.group_of(tile.blocks, m, self.order, self.group)) for m in members]

    def _read(self, tile: Tile, group: Array) -> list[Array]:
        each = 1 if tile.refs[0].dtype == jnp.uint32 else 2
        return [tile.load(0, group * each + part, self.groups * each) for part in range(each)]

    def _grid(self, instructions: Instructions, own: list[Array]) -> tuple[Array, list[Array]]:
        """(scales, what to add to 1024 / 2^place + code for each place), for decoded pairs 1 / SHRINK as large."""
        if len(own) == 1:
            (word,) = own
            scale, zero = halves(word)[0], instructions.permute(word, word, 0x3232)
        else:
            scale, zero = own[0], pair(*[own[1].astype(jnp.float16)] * 2)
        offsets = []
        for place in PLACES[self.order.bits]:
            unit, rest = (_both(value / SHRINK) for value in (-1, -1024 / 2**place))
            offsets.append(instructions.multiply_add(zero, jnp.full_like(zero, unit), jnp.full_like(zero, rest)))
        return scale.astype(jnp.float32) * SHRINK, offsets

    def decode(
        self, instructions: Instructions, state: Any, own: list[list[Array]], planes: list[Array]
    ) -> list[tuple[list[Array], Array | None]]:
        found = []
        for member, fields in enumerate(self._fields(instructions, planes)):
            scale, offsets = state or self._grid(instructions, own[member])
            pairs = []
            for i, field in enumerate(fields):
                place = i % len(offsets)
                unit = jnp.full_like(field, jnp.uint32(UNIT[PLACES[self.order.bits][place]]))
                pairs.append(instructions.multiply_add(field, unit, jnp.broadcast_to(offsets[place], field.shape)))
            found.append((pairs, scale))
        return found

    def shuffles(self, exact: bool) -> bool:
        return False  # Lanes of a warp have different groups.

    def exact(
        self, instructions: Instructions, state: Any, own: list[list[Array]], planes: list[Array]
    ) -> list[Any]:
        return pairs_exactly(self, instructions, state, own, planes)

    def _fields(self, instructions: Instructions, planes: list[Array]) -> list[list[Array]]:
        """For each member the pairs 1024 + 2^place * code."""
        bits, places = self.order.bits, PLACES[self.order.bits]
        found = []
        for member in range(self.order.members):
            fields = []
            for i in range(self.order.pairs):
                turn, step = divmod(i, len(places))
                word = planes[member] >> (SHIFT[bits] * turn) if turn else planes[member]
                low = 2 if bits == 3 else bits
                mask = 0x00010001 * (2**low - 1) << places[step]
                if bits == 3:
                    top = _rotated(planes[2], 8 * member + turn)
                    field = (word & jnp.uint32(mask)) | instructions.merged(top, 0x00040004 << places[step], MAGIC)
                else:
                    field = instructions.merged(word, mask, MAGIC)
                fields.append(field)
            found.append(fields)
        return found


def _both(value: float) -> Any:
    """A pair of a number in float16."""
    return jnp.uint32(int(np.float16(value).view(np.uint16)) * 0x00010001)


def _rotated(word: Array, places: int) -> Array:
    return word if not places else (word >> places) | (word << (32 - places))
