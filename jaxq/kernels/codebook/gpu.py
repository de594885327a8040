"""Look-up tables on GPUs: tables lie in registers, and byte permutes find both bytes of four weights at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxq.kernels.gpu import parts as layout
from jaxq.kernels.gpu import words
from jaxq.kernels.gpu.lanes import Instructions, look_up, tables
from jaxq.kernels.gpu.parts import blocks as blocks
from jaxq.kernels.gpu.parts import group_of, order_of
from jaxq.kernels.gpu.parts import groups as groups
from jaxq.kernels.gpu.parts import sizes as sizes
from jaxq.kernels.gpu.parts import take as take
from jaxq.kernels.gpu.run import by_rows, product_of
from jaxq.kernels.gpu.weights import Tile, Weight, pairs_exactly
from jaxq.kernels.gpu.words import Order

#: Axes of the words of one matrix.
AXES = 2


def unsupported(array: Any) -> str:
    """Why an array has no GPU product; empty if it has one."""
    if array.format.bits not in words.UNITS:
        return "GPU kernels have look-up tables of 2 to 4 bits"
    if array.format.table_dtype == "float32":
        return "GPU kernels have tables of 16 bits a value"
    return layout.unsupported(array.format, array.table.shape[-2] // array.format.entries)


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """(words by rows `(batch..., out, words)`, tables by rows `(batch..., out, groups, 2^bits)`)."""
    del target  # One layout for all GPUs.
    table, entries = jnp.swapaxes(array.table, -1, -2), array.format.entries
    groups = table.shape[-1] // entries
    order = order_of(array.format, groups)
    rows = words.pack(codes, order)
    room = words.groups_in(rows.shape[-1], order, group_of(array.format, groups))
    return rows, words.pad_last(table, room * entries).reshape((*table.shape[:-1], room, entries))


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array]:
    """(codes, tables) of the canonical array."""
    del target  # One layout for all GPUs.
    rows, table = parts
    codes = words.unpack(rows, order_of(format, table.shape[-2]), in_size)
    count = -(-in_size // format.rows_per_group(in_size))
    table = table[..., :count, :].reshape((*table.shape[:-2], -1))
    return codes, jnp.swapaxes(table, -1, -2)


def product(x: Float[Array, "tokens in"], prepared: Any, **options: Any) -> Float[Array, "tokens out"]:
    """`x @ prepared`; see `kernels/gpu/run.py` for the options.

    Tables of bfloat16 are always summed in float32: in bfloat16 an error of 1e-3 is out of reach. Tensor cores
    take them in float16, in which only values far below the others of a table have fewer digits.
    """
    rows, table = prepared.parts
    count = table.shape[-2]
    if table.dtype == jnp.bfloat16:
        options["exact"] = True
        if not by_rows(x.shape[0], exact=True):
            table = table.astype(jnp.float16)
    entries = lax.bitcast_convert_type(table.reshape((*table.shape[:-1], -1, 2)), jnp.uint32)
    decoder = Tables(order_of(prepared.format, count), table.dtype, group_of(prepared.format, count), count)
    return product_of("codebook", x, Weight(rows, decoder, (entries,)), **options)


@dataclasses.dataclass(frozen=True)
class Tables:
    """Looks pairs up, by byte permutes or from what other lanes keep of the table; exact.

    Its array holds the tables as pairs of entries, `(out, groups, 2^bits / 2)` words.
    """

    order: Order
    kind: Any
    group: int | None
    groups: int

    def begin(self, tile: Tile) -> list[Array] | None:
        return None if self.group else self._read(tile, 0)

    def read(self, tile: Tile) -> list[list[Array]]:
        """For each member of the blocks its table; nothing where one is that of a whole output."""
        if self.group is None:
            return []
        members = range(self.order.members)
        return [self._read(tile, words.group_of(tile.blocks, m, self.order, self.group)) for m in members]

    def _read(self, tile: Tile, group: Any) -> list[Array]:
        count = 2**self.order.bits // 2
        return [tile.load(0, group * count + entry, self.groups * count) for entry in range(count)]

    def decode(
        self, instructions: Instructions, state: Any, own: list[list[Array]], planes: list[Array]
    ) -> list[tuple[list[Array], Array | None]]:
        found: list[tuple[list[Array], Array | None]] = []
        for member, nibbles in enumerate(words.nibbles(planes, self.order)):
            runs = tables(instructions, state or own[member])
            found.append(([pair for some in nibbles for pair in look_up(instructions, some, runs)], None))
        return found

    def shuffles(self, exact: bool) -> bool:
        """Whether shuffles find entries in less time than permutes: each gives one, as float32.

        All lanes must have the same table.
        """
        return self.group is None and (exact or self.order.bits == 4)

    def shuffled_sum(
        self, instructions: Instructions, state: list[Array], planes: list[Array], x: list[list[Any]], start: Array
    ) -> Array:
        """`start` plus the products of one token's inputs, in float32, with what other lanes have of the table."""
        for member, pairs in zip(words.nibbles(planes, self.order), x, strict=True):
            for turn, some in enumerate(member):
                start = instructions.shuffled_sum(state, self.kind, some, pairs[4 * turn : 4 * turn + 4], start)
        return start

    def exact(
        self, instructions: Instructions, state: Any, own: list[list[Array]], planes: list[Array]
    ) -> list[Any]:
        return pairs_exactly(self, instructions, state, own, planes)
