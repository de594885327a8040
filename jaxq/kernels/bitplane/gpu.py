"""Bit planes on GPUs: a group has few values, so its scales become a look-up table in registers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxq.kernels.gpu import parts as layout
from jaxq.kernels.gpu import words
from jaxq.kernels.gpu.lanes import Instructions, halves, look_up, pair, tables
from jaxq.kernels.gpu.parts import blocks as blocks
from jaxq.kernels.gpu.parts import group_of, order_of
from jaxq.kernels.gpu.parts import groups as groups
from jaxq.kernels.gpu.parts import sizes as sizes
from jaxq.kernels.gpu.parts import take as take
from jaxq.kernels.gpu.run import product_of
from jaxq.kernels.gpu.weights import Tile, Weight
from jaxq.kernels.gpu.words import Order

#: A pair of one in float16.
ONES = 0x3C003C00

#: Axes of the words of one matrix.
AXES = 2

#: `prepare` takes and `restore` gives the bits of a weight together.
CODES = True


def unsupported(array: Any) -> str:
    """Why an array has no GPU product; empty if it has one."""
    bits = array.format.bits
    if bits not in words.UNITS:
        return "GPU kernels have 2 to 4 bit planes"
    return layout.unsupported(array.format, array.offset.shape[-2])


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """(words by rows `(batch..., out, words)`, of each group offset and scales by twos `(batch..., out, groups,
    2 or 4)`, and the last one if it is left over `(batch..., out, groups)`).

    Bit `j` of a code is that of plane `j`.
    """
    del target  # One layout for all GPUs.
    groups = array.offset.shape[-2]
    order, group = order_of(array.format, groups), group_of(array.format, groups)
    rows = words.pack(codes, order)
    values = jnp.concatenate([array.offset[..., None, :, :], array.scale], axis=-3)
    values = words.pad_last(jnp.moveaxis(values, -1, -3), words.groups_in(rows.shape[-1], order, group))
    values = jnp.moveaxis(values, -2, -1)
    paired = values.shape[-1] // 2 * 2
    return rows, values[..., :paired], *([values[..., paired]] if values.shape[-1] > paired else [])


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array, Array]:
    """(codes, scales, offsets) of the canonical array."""
    del target  # One layout for all GPUs.
    rows, values = parts[0], jnp.concatenate([parts[1], *(part[..., None] for part in parts[2:])], axis=-1)
    codes = words.unpack(rows, order_of(format, values.shape[-2]), in_size)
    groups = -(-in_size // format.rows_per_group(in_size))
    values = jnp.moveaxis(values[..., :groups, :], (-1, -3), (-3, -1))
    return codes, values[..., 1:, :, :], values[..., 0, :, :]


def product(x: Float[Array, "tokens in"], prepared: Any, **options: Any) -> Float[Array, "tokens out"]:
    """`x @ prepared`; see `kernels/gpu/run.py` for the options."""
    rows, paired, *left = prepared.parts
    groups = paired.shape[-2]
    if paired.dtype == jnp.float16:
        paired = lax.bitcast_convert_type(paired.reshape((*paired.shape[:-1], -1, 2)), jnp.uint32)
    order, group = order_of(prepared.format, groups), group_of(prepared.format, groups)
    planes = Planes(order, group, groups, paired.shape[-1])
    return product_of("bitplane", x, Weight(rows, planes, (paired, *left)), **options)


@dataclasses.dataclass(frozen=True)
class Planes:
    """Looks up sums of scales, rounded to float16.

    Its arrays: offset and scales of a group by twos, `(out, groups, paired)` words of two float16 or as many
    floats of another dtype; then the last scale where their number is odd, `(out, groups)`.
    """

    order: Order
    group: int | None
    groups: int
    paired: int
    kind: Any = jnp.float16

    def begin(self, tile: Tile) -> Any:
        return None if self.group else self._read(tile, jnp.zeros_like(tile.blocks))

    def read(self, tile: Tile) -> list[list[Array]]:
        """For each member of the blocks its offset and scales, as they lie in memory."""
        if self.group is None:
            return []
        members = range(self.order.members)
        return [self._read(tile, words.group_of(tile.blocks, m, self.order, self.group)) for m in members]

    def _read(self, tile: Tile, group: Array) -> list[Array]:
        width = self.groups * self.paired
        found = [tile.load(0, group * self.paired + place, width) for place in range(self.paired)]
        return found + [tile.load(1, group, self.groups) for _ in tile.refs[1:]]

    def _values(self, own: list[Array]) -> list[Array]:
        """Offset and scales in float32."""
        values: list[Array] = []
        for some in own:
            values += halves(some) if some.dtype == jnp.uint32 else [some.astype(jnp.float32)]
        return values

    def _entries(self, instructions: Instructions, own: list[Array]) -> list[Array]:
        """All sums of offset and scales as pairs of float16; of float16, sums in float16 round at each step."""
        if own[0].dtype != jnp.uint32:
            offset, *scales = self._values(own)
            entries = [offset]
            for scale in scales:
                entries += [entry + scale for entry in entries]
            entries = [entry.astype(jnp.float16) for entry in entries]
            return [pair(*entries[first : first + 2]) for first in range(0, len(entries), 2)]

        def plus(a: Array, b: Array) -> Array:
            return instructions.multiply_add(a, jnp.full_like(a, jnp.uint32(ONES)), b)

        first, *others = own
        entries = [plus(instructions.permute(first, first, 0x1010), first & jnp.uint32(0xFFFF0000))]
        for some in others:
            for twice in (0x1010, 0x3232) if some.dtype == jnp.uint32 else (0,):
                both = instructions.permute(some, some, twice) if twice else pair(some, some)
                entries += [plus(entry, both) for entry in entries]
        return entries

    def decode(
        self, instructions: Instructions, state: Any, own: list[list[Array]], planes: list[Array]
    ) -> list[tuple[list[Array], Array | None]]:
        found: list[tuple[list[Array], Array | None]] = []
        for member, nibbles in enumerate(words.nibbles(planes, self.order)):
            runs = tables(instructions, self._entries(instructions, state or own[member]))
            found.append(([word for some in nibbles for word in look_up(instructions, some, runs)], None))
        return found

    def shuffles(self, exact: bool) -> bool:
        return False  # Lanes of a warp have different groups.

    def exact(
        self, instructions: Instructions, state: Any, own: list[list[Array]], planes: list[Array]
    ) -> list[Any]:
        """Sums of scales in float32, bit by bit: a table would round them."""
        del instructions
        found = []
        for member, nibbles in enumerate(words.nibbles(planes, self.order)):
            offset, *scales = self._values(state or own[member])

            def value(nibble: Array, offset: Array = offset, scales: list[Array] = scales) -> Array:
                total = jnp.broadcast_to(offset, nibble.shape)
                for plane, scale in enumerate(scales):
                    total = total + jnp.where((nibble >> plane) & 1 == 1, scale, 0.0)
                return total

            pairs = [(value(word >> (8 * i)), value(word >> (8 * i + 4))) for word in nibbles for i in range(4)]
            found.append((pairs, None))
        return found
