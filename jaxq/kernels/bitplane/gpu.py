"""Bit planes on GPUs: a group has few values, so its scales become a look-up table in registers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxq.kernels.gpu import words
from jaxq.kernels.gpu.lanes import look_up, pair, tables
from jaxq.kernels.gpu.products import Tile, Weight, load
from jaxq.kernels.gpu.run import product_of
from jaxq.kernels.gpu.words import Order


def unsupported(array: Any) -> str:
    """Why an array has no GPU product; empty if it has one."""
    bits = array.format.bits
    if bits not in words.UNITS:
        return "GPU kernels have 2 to 4 bit planes"
    return words.unsupported(bits, _group(array.format, array.offset.shape[-2]))


def _group(format: Any, groups: int) -> int | None:
    return None if groups == 1 else format.group_size


def _order(format: Any, groups: int) -> Order:
    return words.order_for(format.bits, _group(format, groups), spread=False)


def prepare(array: Any, codes: Array) -> tuple[Array, ...]:
    """(words by rows `(batch..., out, words)`, offsets, then scales `(batch..., out, bits + 1, groups)`).

    Bit `j` of a code is that of plane `j`.
    """
    groups = array.offset.shape[-2]
    order, group = _order(array.format, groups), _group(array.format, groups)
    rows = words.pack(codes, order)
    values = jnp.concatenate([array.offset[..., None, :, :], array.scale], axis=-3)
    values = jnp.moveaxis(values, -1, -3)
    return rows, words.pad_last(values, words.groups_in(rows.shape[-1], order, group))


def take(parts: tuple[Array, ...], ids: Integer[Array, " ids"]) -> tuple[tuple[Array, ...], int]:
    """(the parts of these outputs of one matrix, outputs that only fill up the last tile)."""
    return tuple(part[ids] for part in parts), 0


def restore(format: Any, parts: tuple[Array, ...], in_size: int) -> tuple[Array, Array, Array]:
    """(codes, scales, offsets) of the canonical array."""
    rows, values = parts
    codes = words.unpack(rows, _order(format, values.shape[-1]), in_size)
    groups = -(-in_size // format.rows_per_group(in_size))
    values = jnp.moveaxis(values[..., :groups], -3, -1)
    return codes, values[..., 1:, :, :], values[..., 0, :, :]


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out), with what fills up the last block."""
    return _order(format, parts[1].shape[-1]).inputs_in(parts[0].shape[-1]), parts[0].shape[-2]


def product(x: Float[Array, "tokens in"], prepared: Any, **options: Any) -> Float[Array, "tokens out"]:
    """`x @ prepared`; see `kernels/gpu/run.py` for the options."""
    rows, values = prepared.parts
    groups = values.shape[-1]
    planes = Planes(_order(prepared.format, groups), _group(prepared.format, groups), groups)
    return product_of("bitplane", x, Weight(rows, planes, (values,)), **options)


@dataclasses.dataclass(frozen=True)
class Planes:
    """Looks up sums of scales, rounded to float16. Its array: offsets, then scales `(out, bits + 1, groups)`."""

    order: Order
    group: int | None
    groups: int
    kind: Any = jnp.float16

    def begin(self, tile: Tile) -> Any:
        return None if self.group else self._values(tile, jnp.zeros_like(tile.blocks))

    def _values(self, tile: Tile, group: Array) -> list[Array]:
        """Offset and scales, float32."""
        (ref,) = tile.refs
        planes = self.order.bits + 1
        first = tile.rows * (planes * self.groups) + group
        return [load(ref.at[first + plane * self.groups]).astype(jnp.float32) for plane in range(planes)]

    def _of(self, state: Any, member: int, tile: Tile) -> list[Array]:
        return state or self._values(tile, words.group_of(tile.blocks, member, self.order, self.group))

    def decode(self, state: Any, planes: list[Array], tile: Tile) -> list[tuple[list[Array], Array | None]]:
        found: list[tuple[list[Array], Array | None]] = []
        for member, nibbles in enumerate(words.nibbles(planes, self.order)):
            offset, *scales = self._of(state, member, tile)
            entries = [offset]
            for scale in scales:
                entries += [entry + scale for entry in entries]
            entries = [entry.astype(jnp.float16) for entry in entries]
            pairs = [pair(*entries[first : first + 2]) for first in range(0, len(entries), 2)]
            runs = tables(tile.instructions, pairs)
            found.append(([word for some in nibbles for word in look_up(tile.instructions, some, runs)], None))
        return found

    def exact(self, state: Any, planes: list[Array], tile: Tile) -> list[Any]:
        """Sums of scales in float32, bit by bit: a table would round them."""
        found = []
        for member, nibbles in enumerate(words.nibbles(planes, self.order)):
            offset, *scales = self._of(state, member, tile)

            def value(nibble: Array, offset: Array = offset, scales: list[Array] = scales) -> Array:
                total = jnp.broadcast_to(offset, nibble.shape)
                for plane, scale in enumerate(scales):
                    total = total + jnp.where((nibble >> plane) & 1 == 1, scale, 0.0)
                return total

            pairs = [(value(word >> (8 * i)), value(word >> (8 * i + 4))) for word in nibbles for i in range(4)]
            found.append((pairs, None))
        return found
