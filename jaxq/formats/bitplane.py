"""Bit planes: a weight is an offset plus the scales of the planes in which its bit is set.

Hierarchical linear quantization (HLQ) of ELUTQ (Nie et al. 2025, arXiv 2510.19482), which is binary-coding
quantization (LUT-GEMM, Park et al. 2024, arXiv 2206.09557) in 0/1 notation. Uniform grids are the special case
of scales s, 2s, 4s, ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, UInt8, UInt32

from jaxq.errors import JaxqError
from jaxq.formats import blocks
from jaxq.formats.base import Format, Layout, QuantizedArray, quantized_pytree
from jaxq.formats.groups import check_size, join_groups, rows_per_group, slice_groups, split_groups, tile_unit
from jaxq.formats.packing import capacity_of, pack, slice_words, strided_bits, unpack, words_for
from jaxq.formats.placement import canonical_spec, check_divides, shard_count
from jaxq.formats.uniform import SCALE_DTYPES
from jaxq.kernels import bitplane as kernel


@dataclasses.dataclass(frozen=True)
class BitPlane(Format):
    """`bits` planes of one bit a weight; a group of inputs of a channel has a scale for each plane and an offset.

    value = offset + sum_j scale_j * bit_j. The last group may be shorter than the others.

    Args:
        bits: planes, 1 to 8.
        group_size: consecutive inputs that share scales and offset; None for one group a channel.
        scale_dtype: of scales and offsets: "float16", "bfloat16" or "float32".
    """

    name: ClassVar[str] = "bitplane"

    bits: int = 3
    group_size: int | None = 128
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise JaxqError(f"there are 1 to 8 bit planes, not {self.bits!r}")
        check_size(self.group_size)
        if self.scale_dtype not in SCALE_DTYPES:
            raise JaxqError(f"scales are stored in {', '.join(SCALE_DTYPES)}, not {self.scale_dtype!r}")

    def __str__(self) -> str:
        return f"bit planes {self.bits}-bit {'channel' if self.group_size is None else f'g{self.group_size}'}"

    @property
    def entries(self) -> int:
        """Values that a weight of one group can take, `2**bits`."""
        return 2**self.bits

    def rows_per_group(self, in_size: int) -> int:
        """Inputs that share scales; JaxqError if a group is larger than the width."""
        return rows_per_group(self.group_size, in_size)

    def abstract(
        self, shape: Sequence[int], dtype: Any = jnp.float32, layout: Layout | None = None
    ) -> BitPlaneArray:
        *batch, in_size, out_size = shape
        groups = -(-in_size // self.rows_per_group(in_size))
        words = words_for(in_size, 1)

        def struct(sizes: tuple[int, ...], kind: Any) -> Any:
            return jax.ShapeDtypeStruct((*batch, *sizes, out_size), jnp.dtype(kind))

        return BitPlaneArray(
            planes=struct((self.bits, words), jnp.uint32),
            scale=struct((self.bits, groups), self.scale_dtype),
            offset=struct((groups,), self.scale_dtype),
            format=self,
            layout=layout or Layout(),
            dtype_name=jnp.dtype(dtype).name,
            pad=capacity_of(words, 1) - in_size,
        )


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BitPlaneArray(QuantizedArray):
    """A tensor of bit planes.

    `planes` (batch..., bits, words, out) is packed along in; `scale` (batch..., bits, groups, out) and `offset`
    (batch..., groups, out) are differentiable leaves. `pad` is the room left in the last word, so that
    in = room - pad.
    """

    planes: UInt32[Array, "*batch bits words out"]
    scale: Float[Array, "*batch bits groups out"]
    offset: Float[Array, "*batch groups out"]
    format: BitPlane = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype_name: str = dataclasses.field(metadata={"static": True})
    pad: int = dataclasses.field(metadata={"static": True})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.planes.shape[:-3])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        words, out_size = self.planes.shape[-2:]
        return capacity_of(words, 1) - self.pad, out_size

    def matrix(self, dtype: Any = None) -> Float[Array, "*batch in out"]:
        in_size, _ = self.matrix_shape
        bits = unpack(self.planes, 1, in_size)
        return self._values(bits, self.scale, self.offset).astype(dtype or self.dtype)

    def _values(self, bits: Array, scale: Array, offset: Array) -> Float[Array, "*batch in channels"]:
        return _values(bits, scale, offset, self.format)

    def codes(self) -> UInt8[Array, "*batch in out"]:
        """Codes of which bit `j` is that of plane `j`."""
        bits = unpack(self.planes, 1, self.matrix_shape[0])
        joined = bits[..., 0, :, :]
        for plane in range(1, self.format.bits):
            joined = joined | (bits[..., plane, :, :] << plane)
        return joined

    def matmul(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        return kernel.matmul(jnp.asarray(x), self)

    @property
    def tile_unit(self) -> int:
        """Inputs that can be decoded apart from the others: whole words, and whole groups or parts of one."""
        return tile_unit(self.format.rows_per_group(self.matrix_shape[0]), self.matrix_shape[0], 1)

    def tile(self, row: Any, rows: int, column: Any, columns: int) -> Float[Array, "rows columns"]:
        """That part of the dense matrix in float32; `row` is a multiple of `tile_unit`. For one matrix."""
        in_size, _ = self.matrix_shape
        bits = unpack(slice_words(self.planes, 1, row, rows, column, columns), 1, rows)
        scale, offset = (
            slice_groups(z, self.format.rows_per_group(in_size), in_size, row, rows, column, columns)
            for z in (self.scale, self.offset)
        )
        groups = split_groups(bits, min(self.format.rows_per_group(in_size), rows))
        return join_groups(sum_planes(groups, scale[..., None, :], offset[..., None, :]), rows)

    def has_blocks(self, parts: int) -> bool:
        """Whether `block_sums` takes blocks of so many parts."""
        return blocks.hold_groups(self, parts)

    def block_sums(self, x: Float[Array, "blocks part"], part: jax.Array | int) -> Float[Array, "blocks 1 out"]:
        """What one part of each block of inputs (`formats.blocks`) adds to a product. For one matrix."""
        in_size, _ = self.matrix_shape
        size = self.format.rows_per_group(in_size)

        def of_groups(z: Array) -> Array:
            return blocks.of_groups(z, size, in_size, len(x), part).astype(jnp.float32)

        total = of_groups(self.offset) * blocks.sum_of(x)
        for words, scale in zip(self.planes, self.scale, strict=True):
            bits = (bit for (bit,) in strided_bits(words, 1, len(x), part))
            total = total + of_groups(scale) * blocks.weighted_sum(x, bits)
        return total

    def take_out(self, ids: Integer[Array, "*ids"]) -> Float[Array, "*ids in"]:
        if self.batch_shape:
            raise JaxqError("take_out reads one matrix; index the batch axes away first, or use jax.vmap")
        in_size, _ = self.matrix_shape
        ids = jnp.asarray(ids)
        flat = ids.reshape(-1)
        bits = unpack(self.planes[..., flat], 1, in_size)
        values = self._values(bits, self.scale[..., flat], self.offset[..., flat])
        return values.T.astype(self.dtype).reshape((*ids.shape, in_size))

    def partition_specs(self, spec: PartitionSpec, mesh: Any = None) -> BitPlaneArray:
        batch, rows, columns = canonical_spec(self, spec)
        in_size, _ = self.matrix_shape
        group_rows = None
        if rows is not None:
            shards = shard_count(rows, mesh)
            check_divides(in_size, 32 * shards, "planes would be cut inside a packed word")
            if self.format.group_size is not None:
                check_divides(in_size, self.format.group_size * shards, "a group would be cut")
                group_rows = rows
        return dataclasses.replace(
            self,
            planes=PartitionSpec(*batch, None, rows, columns),
            scale=PartitionSpec(*batch, None, group_rows, columns),
            offset=PartitionSpec(*batch, group_rows, columns),
        )


def _values(bits: Array, scale: Array, offset: Array, format: BitPlane) -> Float[Array, "*batch in channels"]:
    in_size = bits.shape[-2]
    groups = split_groups(bits, format.rows_per_group(in_size))
    return join_groups(sum_planes(groups, scale[..., None, :], offset[..., None, :]), in_size)


def values_of(
    codes: UInt8[Array, "*batch in out"], scale: Array, offset: Array, format: BitPlane
) -> Float[Array, "*batch in out"]:
    """The values of codes by scales and offsets of their groups, float32."""
    return _values(split_bits(codes, format.bits), scale, offset, format)


def sum_planes(
    bits: Integer[Array, "*batch bits groups size out"],
    scale: Float[Array, "*batch bits groups 1 out"],
    offset: Float[Array, "*batch groups 1 out"],
) -> Float[Array, "*batch groups size out"]:
    """offset + sum_j scale_j * bit_j in float32, plane after plane."""
    value = jnp.broadcast_to(offset.astype(jnp.float32), (*bits.shape[:-4], *bits.shape[-3:]))
    for plane in range(bits.shape[-4]):
        part = (..., plane, slice(None), slice(None), slice(None))
        value = value + bits[part].astype(jnp.float32) * scale[part].astype(jnp.float32)
    return value


def split_bits(codes: UInt8[Array, "*batch in out"], bits: int) -> UInt8[Array, "*batch bits in out"]:
    """Bit `j` of each code in plane `j`."""
    return jnp.stack([(codes >> plane) & 1 for plane in range(bits)], axis=-3)


def assemble(
    codes: UInt8[Array, "*batch in out"],
    scale: Float[Array, "*batch bits groups out"],
    offset: Float[Array, "*batch groups out"],
    format: BitPlane,
    layout: Layout | None = None,
    dtype: Any = jnp.float32,
) -> BitPlaneArray:
    """Packs codes (bit `j` is that of plane `j`) and rounds scales into a BitPlaneArray of logical `dtype`."""
    in_size = codes.shape[-2]
    return BitPlaneArray(
        planes=pack(split_bits(codes, format.bits), 1),
        scale=scale.astype(format.scale_dtype),
        offset=offset.astype(format.scale_dtype),
        format=format,
        layout=layout or Layout(),
        dtype_name=jnp.dtype(dtype).name,
        pad=capacity_of(words_for(in_size, 1), 1) - in_size,
    )
