"""Look-up tables: 2^bits values for each output channel or group of its inputs; a code says which a weight is.

The storage of SqueezeLLM (Kim et al. 2024, arXiv 2306.07629) and of the methods that start from it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer, UInt8, UInt32

from jaxq.errors import JaxqError
from jaxq.formats import blocks
from jaxq.formats.base import Format, Layout, QuantizedArray, quantized_pytree
from jaxq.formats.groups import check_size, join_groups, rows_per_group, split_groups, tile_unit
from jaxq.formats.packing import capacity_of, pack, slice_words, strided_bits, unpack, words_for
from jaxq.formats.placement import canonical_spec, check_divides, shard_count
from jaxq.formats.rounding import round_to
from jaxq.kernels import codebook as kernel

TABLE_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Codebook(Format):
    """A table of `2**bits` free values for each group of inputs of an output channel; codes are packed densely.

    The last group may be shorter than the others.

    Args:
        bits: 1 to 8.
        table_dtype: "float16", "bfloat16" or "float32".
        group_size: consecutive inputs that share a table; None for one table a channel.
    """

    name: ClassVar[str] = "codebook"

    bits: int = 4
    table_dtype: str = "float16"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise JaxqError(f"a codebook has 1 to 8 bits, not {self.bits!r}")
        check_size(self.group_size)
        if self.table_dtype not in TABLE_DTYPES:
            raise JaxqError(f"tables are stored in {', '.join(TABLE_DTYPES)}, not {self.table_dtype!r}")

    def __str__(self) -> str:
        return f"codebook {self.bits}-bit{'' if self.group_size is None else f' g{self.group_size}'}"

    @property
    def entries(self) -> int:
        """Values in a table, `2**bits`."""
        return 2**self.bits

    def rows_per_group(self, in_size: int) -> int:
        """Inputs that share a table; JaxqError if a group is larger than the width."""
        return rows_per_group(self.group_size, in_size)

    def abstract(
        self, shape: Sequence[int], dtype: Any = jnp.float32, layout: Layout | None = None
    ) -> CodebookArray:
        *batch, in_size, out_size = shape
        words = words_for(in_size, self.bits)
        codes: Any = jax.ShapeDtypeStruct((*batch, words, out_size), jnp.uint32)
        groups = -(-in_size // self.rows_per_group(in_size))
        table: Any = jax.ShapeDtypeStruct((*batch, groups * self.entries, out_size), jnp.dtype(self.table_dtype))
        return CodebookArray(
            codes=codes,
            table=table,
            format=self,
            layout=layout or Layout(),
            dtype_name=jnp.dtype(dtype).name,
            pad=capacity_of(words, self.bits) - in_size,
        )


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CodebookArray(QuantizedArray):
    """A tensor of codes into tables.

    `codes` (batch..., words, out) is packed along in; `table` (batch..., groups * entries, out), the entries of
    one group after those of another, is a differentiable leaf. `pad` is the room left in the last word, so that
    in = room - pad.
    """

    codes: UInt32[Array, "*batch words out"]
    table: Float[Array, "*batch tables out"]
    format: Codebook = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype_name: str = dataclasses.field(metadata={"static": True})
    pad: int = dataclasses.field(metadata={"static": True})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        words, out_size = self.codes.shape[-2:]
        return capacity_of(words, self.format.bits) - self.pad, out_size

    def matrix(self, dtype: Any = None) -> Float[Array, "*batch in out"]:
        in_size, _ = self.matrix_shape
        codes = unpack(self.codes, self.format.bits, in_size)
        return values_of(codes, self.table, self.format).astype(dtype or self.dtype)

    def matmul(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        return kernel.matmul(jnp.asarray(x), self)

    @property
    def tile_unit(self) -> int:
        """Inputs that can be decoded apart from the others: whole words, and whole groups or parts of one."""
        return tile_unit(self.format.rows_per_group(self.matrix_shape[0]), self.matrix_shape[0], self.format.bits)

    def tile(self, row: Any, rows: int, column: Any, columns: int) -> Float[Array, "rows columns"]:
        """That part of the dense matrix in float32; `row` is a multiple of `tile_unit`. For one matrix."""
        in_size, _ = self.matrix_shape
        words = slice_words(self.codes, self.format.bits, row, rows, column, columns)
        table = jax.lax.dynamic_slice_in_dim(self.table, column, columns, axis=1)
        size = self.format.rows_per_group(in_size)
        if size < in_size:
            first, some = row // size * self.format.entries, -(-rows // size) * self.format.entries
            table = jax.lax.dynamic_slice_in_dim(table, first, some, axis=0)
        return _values(unpack(words, self.format.bits, rows), table, self.format.entries, min(size, rows))

    def has_blocks(self, parts: int) -> bool:
        """Whether `block_sums` takes blocks of so many parts."""
        del parts  # Each weight takes a selection for all entries but one: of few, which all blocks share.
        return self.format.bits <= 4 and self.table.shape[-2] == self.format.entries

    def block_sums(self, x: Float[Array, "blocks part"], part: jax.Array | int) -> Float[Array, "blocks 1 out"]:
        """What one part of each block of inputs (`formats.blocks`) adds to a product. For one matrix."""
        codes = strided_bits(self.codes, self.format.bits, len(x), part)
        # Widened afterwards: XLA would store a wide table.
        return blocks.weighted_sum(x, (_by_bits(bits, self.table).astype(jnp.float32) for bits in codes))

    def take_out(self, ids: Integer[Array, "*ids"]) -> Float[Array, "*ids in"]:
        if self.batch_shape:
            raise JaxqError("take_out reads one matrix; index the batch axes away first, or use jax.vmap")
        in_size, _ = self.matrix_shape
        ids = jnp.asarray(ids)
        flat = ids.reshape(-1)
        codes = unpack(self.codes[:, flat], self.format.bits, in_size)
        values = values_of(codes, self.table[:, flat], self.format)
        return values.T.astype(self.dtype).reshape((*ids.shape, in_size))

    def partition_specs(self, spec: PartitionSpec, mesh: Any = None) -> CodebookArray:
        batch, rows, columns = canonical_spec(self, spec)
        in_size, _ = self.matrix_shape
        group_rows = None
        if rows is not None:
            shards = shard_count(rows, mesh)
            check_divides(in_size * self.format.bits, 32 * shards, "codes would be cut inside a packed word")
            if self.format.group_size is not None:
                check_divides(in_size, self.format.group_size * shards, "a group would be cut")
                group_rows = rows
        return dataclasses.replace(
            self,
            codes=PartitionSpec(*batch, rows, columns),
            table=PartitionSpec(*batch, group_rows, columns),
        )


def values_of(
    codes: Integer[Array, "*batch in out"], table: Float[Array, "*batch tables out"], format: Codebook
) -> Float[Array, "*batch in out"]:
    """The values of codes by the tables of their groups, float32."""
    return _values(codes, table, format.entries, format.rows_per_group(codes.shape[-2]))


def _values(codes: Array, table: Array, entries: int, size: int) -> Float[Array, "*batch in out"]:
    if table.shape[-2] == entries:
        return lookup(codes, table)
    return join_groups(lookup(split_groups(codes, size), by_groups(table, entries)), codes.shape[-2])


def by_groups(table: Float[Array, "*batch tables out"], entries: int) -> Float[Array, "*batch groups entries out"]:
    """The tables of a CodebookArray, each by itself."""
    return table.reshape((*table.shape[:-2], -1, entries, table.shape[-1]))


def joined(table: Float[Array, "*batch groups entries out"]) -> Float[Array, "*batch tables out"]:
    """Undoes `by_groups`."""
    return table.reshape((*table.shape[:-3], -1, table.shape[-1]))


def store(table: Float[Array, "*batch entries out"], format: Codebook) -> Float[Array, "*batch entries out"]:
    """The table as it will be stored, in float32: rounded to the nearest of `table_dtype`, ties to even."""
    return round_to(table, format.table_dtype)


def representable(table: Float[Array, "*batch entries out"], format: Codebook) -> Bool[Array, "*batch"]:
    """Whether each matrix's tables stay finite in `table_dtype`."""
    return jnp.isfinite(store(table, format)).all(axis=(-2, -1))


def nearest(
    w: Float[Array, "*batch in out"], table: Float[Array, "*batch entries out"]
) -> UInt8[Array, "*batch in out"]:
    """Codes of the nearest entries of tables of 2 to 256 entries, ascending along -2; ties to the lower code.

    Counts the midpoints that lie below each weight: no sort, no look-up, memory O(in * out). An entry that
    occurs more than once is found at its first place.
    """
    bounds = _midpoints(table.astype(jnp.float32))
    w = w.astype(jnp.float32)

    def above(place: Any) -> Array:
        return (w > jax.lax.dynamic_index_in_dim(bounds, place, axis=-2)).astype(jnp.uint8)

    # Five at a time, which divides 15 and 255: a loop that writes after each comparison is bound by memory,
    # and a fully unrolled one does not fit the registers (1.3 and 2.1 times as long for 4 bits on a CPU).
    # The count starts from a comparison, so that it is sharded and varies over devices as the result does.
    return jax.lax.fori_loop(1, bounds.shape[-2], lambda place, count: count + above(place), above(0), unroll=5)


def _midpoints(table: Array) -> Float[Array, "*batch entries-1 out"]:
    """What a weight must exceed to leave the entries up to here."""
    low, high = table[..., :-1, :], table[..., 1:, :]
    middle = low * 0.5 + high * 0.5
    # Between neighbours among the floats the middle may round to the upper one, which must keep its own code.
    middle = jnp.where(middle < high, middle, low)
    # Equal entries are left together or not at all.
    middle = jnp.where(high > low, middle, jnp.inf)
    return jax.lax.cummin(middle, axis=middle.ndim - 2, reverse=True)


def lookup(
    codes: Integer[Array, "*batch in out"], table: Float[Array, "*batch entries out"]
) -> Float[Array, "*batch in out"]:
    """The values that codes stand for, float32."""
    table = table.astype(jnp.float32)
    # A tree needs entries - 1 selects a weight and no memory access. For up to 8 entries it is the faster one
    # on CPUs too; beyond, a gather is (for 16 entries 0.8 ms a million weights against 1.9 ms). TPUs gather
    # single numbers slowly, whatever the size.
    if table.shape[-2] <= 8:
        return _select(codes, table)
    return jax.lax.platform_dependent(codes, table, tpu=_select, default=_gather)


def _select(codes: Array, table: Array) -> Array:
    bits = (table.shape[-2] - 1).bit_length()
    return _by_bits([(codes >> bit) & 1 == 1 for bit in range(bits)], table)


def _by_bits(bits: list[Bool[Array, "*batch in out"]], table: Array) -> Float[Array, "*batch in out"]:
    """Halves the candidates by one bit of the code after another, lowest first."""
    candidates = [table[..., entry : entry + 1, :] for entry in range(table.shape[-2])]
    for bit in bits:
        candidates = [jnp.where(bit, *pair) for pair in zip(candidates[1::2], candidates[::2], strict=True)]
    return candidates[0]


def _gather(codes: Array, table: Array) -> Array:
    return jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-2)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _assemble(codes: Array, table: Array, format: Codebook, layout: Layout, dtype_name: str) -> CodebookArray:
    in_size = codes.shape[-2]
    return CodebookArray(
        codes=pack(codes, format.bits),
        table=table.astype(format.table_dtype),
        format=format,
        layout=layout,
        dtype_name=dtype_name,
        pad=capacity_of(words_for(in_size, format.bits), format.bits) - in_size,
    )


def assemble(
    codes: UInt8[Array, "*batch in out"],
    table: Float[Array, "*batch tables out"],
    format: Codebook,
    layout: Layout | None = None,
    dtype: Any = jnp.float32,
) -> CodebookArray:
    """Packs codes and rounds tables into a CodebookArray of logical `dtype`."""
    return _assemble(codes, table, format, layout or Layout(), jnp.dtype(dtype).name)
