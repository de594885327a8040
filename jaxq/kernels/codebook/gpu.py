"""Look-up tables on GPUs: tables lie in registers, and byte permutes find both bytes of four weights at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jaxq.kernels.gpu import words
from jaxq.kernels.gpu.lanes import Instructions, look_up, tables
from jaxq.kernels.gpu.run import by_rows, product_of
from jaxq.kernels.gpu.weights import Tile, Weight, pairs_exactly
from jaxq.kernels.gpu.words import Order

#: Axes of the words of one matrix.
AXES = 2


def unsupported(array: Any) -> str:
    """Why an array has no GPU product; empty if it has one."""
    if array.format.bits not in words.UNITS:
        return "GPU kernels have look-up tables of 2 to 4 bits"
    return "GPU kernels have tables of 16 bits a value" if array.format.table_dtype == "float32" else ""


def _order(format: Any) -> Order:
    return words.order_for(format.bits, None, spread=False)


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """(words by rows `(batch..., out, words)`, tables by rows `(batch..., out, 2^bits)`)."""
    del target  # One layout for all GPUs.
    return words.pack(codes, _order(array.format)), jnp.swapaxes(array.table, -1, -2)


def take(parts: tuple[Array, ...], ids: Integer[Array, " ids"]) -> tuple[tuple[Array, ...], int]:
    """(the parts of these outputs of one matrix, outputs that only fill up the last tile)."""
    return tuple(part[ids] for part in parts), 0


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array]:
    """(codes, tables) of the canonical array."""
    del target  # One layout for all GPUs.
    rows, table = parts
    return words.unpack(rows, _order(format), in_size), jnp.swapaxes(table, -1, -2)


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out), with what fills up the last block."""
    return _order(format).inputs_in(parts[0].shape[-1]), parts[0].shape[-2]


def groups(parts: tuple[Any, ...]) -> int:
    """Groups of an output, which lie along the second axis of all parts but the first; 1 if they are one."""
    del parts  # A table is that of a whole output.
    return 1


def blocks(format: Any, parts: tuple[Any, ...]) -> int:
    """Blocks of inputs."""
    return parts[0].shape[-1] // _order(format).block_words


def product(x: Float[Array, "tokens in"], prepared: Any, **options: Any) -> Float[Array, "tokens out"]:
    """`x @ prepared`; see `kernels/gpu/run.py` for the options.

    Tables of bfloat16 are always summed in float32: in bfloat16 an error of 1e-3 is out of reach. Tensor cores
    take them in float16, in which only values far below the others of a table have fewer digits.
    """
    rows, table = prepared.parts
    if table.dtype == jnp.bfloat16:
        options["exact"] = True
        if not by_rows(x.shape[0], exact=True):
            table = table.astype(jnp.float16)
    entries = lax.bitcast_convert_type(table.reshape((*table.shape[:-1], -1, 2)), jnp.uint32)
    return product_of(
        "codebook", x, Weight(rows, Tables(_order(prepared.format), table.dtype), (entries,)), **options
    )


@dataclasses.dataclass(frozen=True)
class Tables:
    """Looks pairs up, by byte permutes or from what other lanes keep of the table; exact.

    Its array holds the tables as pairs of entries, `(out, 2^bits / 2)` words.
    """

    order: Order
    kind: Any
    group: int | None = None

    def begin(self, tile: Tile) -> list[Array]:
        count = 2**self.order.bits // 2
        return [tile.load(0, entry, count) for entry in range(count)]

    def read(self, tile: Tile) -> None:
        del tile  # A table is that of a whole output.

    def decode(
        self, instructions: Instructions, state: Any, own: None, planes: list[Array]
    ) -> list[tuple[list[Array], Array | None]]:
        runs = tables(instructions, state)
        found: list[tuple[list[Array], Array | None]] = []
        for member in words.nibbles(planes, self.order):
            found.append(([pair for some in member for pair in look_up(instructions, some, runs)], None))
        return found

    def shuffles(self, exact: bool) -> bool:
        """Whether shuffles find entries in less time than permutes: each gives one, as float32."""
        return exact or self.order.bits == 4

    def shuffled_sum(
        self, instructions: Instructions, state: list[Array], planes: list[Array], x: list[list[Any]], start: Array
    ) -> Array:
        """`start` plus the products of one token's inputs, in float32, with what other lanes have of the table."""
        for member, pairs in zip(words.nibbles(planes, self.order), x, strict=True):
            for turn, some in enumerate(member):
                start = instructions.shuffled_sum(state, self.kind, some, pairs[4 * turn : 4 * turn + 4], start)
        return start

    def exact(self, instructions: Instructions, state: Any, own: None, planes: list[Array]) -> list[Any]:
        return pairs_exactly(self, instructions, state, own, planes)
