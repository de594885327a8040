"""Uniform integer grids of 1 to 8 bits: value = (code - zero) * scale.

Scales are for the whole matrix, for a channel (one column of the canonical matrix) or for a group of
consecutive inputs of a channel. The last group may be shorter than the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, UInt8, UInt32

from jaxq.errors import JaxqError
from jaxq.formats import blocks
from jaxq.formats.base import Format, Layout, QuantizedArray, quantized_pytree
from jaxq.formats.groups import join_groups, rows_per_group, slice_groups, split_groups, tile_unit
from jaxq.formats.packing import capacity_of, pack, slice_words, strided, unpack, words_for
from jaxq.formats.placement import canonical_spec, check_divides, shard_count
from jaxq.formats.rounding import spacing
from jaxq.kernels import uniform as kernel

SCALE_DTYPES = ("float16", "bfloat16", "float32")

# 80 steps of 0.01, as GPTQ's own range search (maxshrink 0.8, grid 100); 1.0 first, so that the search
# never does worse than min-max.
SHRINKS = tuple(1 - step / 100 for step in range(80))


@dataclasses.dataclass(frozen=True)
class Uniform(Format):
    """A uniform grid of `bits` bits; codes are packed densely.

    Asymmetric: the range [m, M] of a group is extended to hold 0, scale = (M - m) / (2^bits - 1), zero point
    = round(-m / scale), an integer in [0, 2^bits - 1] stored in `bits` bits. Symmetric ("sym-B", the grid of
    the GPTQ reference code): scale = 2 max|w| / (2^bits - 1), zero point 2^(bits - 1), not stored. Both have
    an exact 0, and |Q(w) - w| <= scale / 2 for every w of the group: scales are rounded up to `scale_dtype`.

    Args:
        bits: 1 to 8.
        group_size: consecutive inputs that share a scale; None for one group a channel; "tensor" for one
            scale for the whole matrix.
        symmetric: fixed zero point.
        scale_dtype: "float16", "bfloat16" or "float32".
    """

    name: ClassVar[str] = "uniform"

    bits: int = 4
    group_size: int | str | None = 128
    symmetric: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise JaxqError(f"a uniform grid has 1 to 8 bits, not {self.bits!r}")
        size = self.group_size
        if not (size is None or size == "tensor" or (type(size) is int and size >= 1)):
            raise JaxqError(f"group size {size!r} is not a positive number, None or 'tensor'")
        if self.scale_dtype not in SCALE_DTYPES:
            raise JaxqError(f"scales are stored in {', '.join(SCALE_DTYPES)}, not {self.scale_dtype!r}")

    def __str__(self) -> str:
        grain = {None: "channel", "tensor": "tensor"}.get(self.group_size, f"g{self.group_size}")  # type: ignore[call-overload]
        return f"uniform {self.bits}-bit {grain}{' symmetric' if self.symmetric else ''}"

    @property
    def levels(self) -> int:
        """The largest code, `2**bits - 1`."""
        return 2**self.bits - 1

    @property
    def grouped(self) -> bool:
        return isinstance(self.group_size, int)

    def rows_per_group(self, in_size: int) -> int:
        """Inputs that share a scale; JaxqError if a group is larger than the width."""
        if not isinstance(self.group_size, int):
            return in_size
        return rows_per_group(self.group_size, in_size)

    def abstract(
        self, shape: Sequence[int], dtype: Any = jnp.float32, layout: Layout | None = None
    ) -> UniformArray:
        *batch, in_size, out_size = shape
        groups = -(-in_size // self.rows_per_group(in_size))
        channels = 1 if self.group_size == "tensor" else out_size

        def struct(rows: int, columns: int, kind: Any) -> Any:
            return jax.ShapeDtypeStruct((*batch, rows, columns), kind)

        words = words_for(in_size, self.bits)
        return UniformArray(
            codes=struct(words, out_size, jnp.uint32),
            scale=struct(groups, channels, jnp.dtype(self.scale_dtype)),
            zero=None if self.symmetric else struct(words_for(groups, self.bits), channels, jnp.uint32),
            format=self,
            layout=layout or Layout(),
            dtype_name=jnp.dtype(dtype).name,
            pad=capacity_of(words, self.bits) - in_size,
        )


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class UniformArray(QuantizedArray):
    """A tensor on uniform grids.

    `codes` (batch..., words, out) is packed along in; `scale` (batch..., groups, out), or (batch..., 1, 1)
    for one scale a matrix; `zero` like `scale` but packed along groups, None when symmetric. `pad` is the
    room left in the last word, so that in = room - pad.
    """

    codes: UInt32[Array, "*batch words out"]
    scale: Float[Array, "*batch groups channels"]
    zero: UInt32[Array, "*batch zwords channels"] | None
    format: Uniform = dataclasses.field(metadata={"static": True})
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

    def zero_point(self) -> Float[Array, "*batch groups channels"]:
        """The zero point as float32, shaped like `scale`."""
        if self.zero is None:
            return jnp.full(self.scale.shape, 2.0 ** (self.format.bits - 1), jnp.float32)
        return unpack(self.zero, self.format.bits, self.scale.shape[-2]).astype(jnp.float32)

    def matrix(self, dtype: Any = None) -> Float[Array, "*batch in out"]:
        in_size, _ = self.matrix_shape
        codes = unpack(self.codes, self.format.bits, in_size)
        return values_of(codes, self.scale, self.zero_point(), self.format).astype(dtype or self.dtype)

    def matmul(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        return kernel.matmul(jnp.asarray(x), self)

    @property
    def tile_unit(self) -> int:
        """Inputs that can be decoded apart from the others: whole words, and whole groups or parts of one."""
        return tile_unit(self.format.rows_per_group(self.matrix_shape[0]), self.matrix_shape[0], self.format.bits)

    def tile(self, row: Any, rows: int, column: Any, columns: int) -> Float[Array, "rows columns"]:
        """That part of the dense matrix in float32; `row` is a multiple of `tile_unit`. For one matrix."""
        in_size, _ = self.matrix_shape
        codes = unpack(
            slice_words(self.codes, self.format.bits, row, rows, column, columns), self.format.bits, rows
        )
        if self.format.group_size == "tensor":
            return dequantize_codes(codes, self.scale, self.zero_point())
        size = self.format.rows_per_group(in_size)
        scale = slice_groups(self.scale, size, in_size, row, rows, column, columns)
        zero = jnp.full_like(scale, 2 ** (self.format.bits - 1))
        if self.zero is not None:
            # Bytes, not the floats of `zero_point`: these are held for the whole matrix.
            points = unpack(self.zero, self.format.bits, self.scale.shape[-2])
            zero = slice_groups(points, size, in_size, row, rows, column, columns)
        groups = split_groups(codes, min(size, rows))
        return join_groups(dequantize_codes(groups, scale[..., None, :], zero[..., None, :]), rows)

    def has_blocks(self, parts: int) -> bool:
        """Whether `block_sums` takes blocks of so many parts."""
        return blocks.hold_groups(self, parts)

    def block_sums(self, x: Float[Array, "blocks part"], part: jax.Array | int) -> Float[Array, "blocks 1 out"]:
        """What one part of each block of inputs (`formats.blocks`) adds to a product. For one matrix."""
        in_size, _ = self.matrix_shape
        size = self.format.rows_per_group(in_size)
        scale = blocks.of_groups(self.scale, size, in_size, len(x), part).astype(jnp.float32)
        zero: Any = float(2 ** (self.format.bits - 1))
        if self.zero is not None:
            points = unpack(self.zero, self.format.bits, self.scale.shape[-2])
            zero = blocks.of_groups(points, size, in_size, len(x), part).astype(jnp.float32)
        codes = strided(self.codes, self.format.bits, len(x), part)
        return (blocks.weighted_sum(x, codes) - zero * blocks.sum_of(x)) * scale

    def take_out(self, ids: Integer[Array, "*ids"]) -> Float[Array, "*ids in"]:
        if self.batch_shape:
            raise JaxqError("take_out reads one matrix; index the batch axes away first, or use jax.vmap")
        in_size, _ = self.matrix_shape
        ids = jnp.asarray(ids)
        flat = ids.reshape(-1)
        codes = unpack(self.codes[:, flat], self.format.bits, in_size)
        scale, zero = self.scale, self.zero
        if scale.shape[-1] != 1 or self.format.group_size != "tensor":
            scale, zero = scale[:, flat], None if zero is None else zero[:, flat]
        some = dataclasses.replace(self, scale=scale, zero=zero)
        values = values_of(codes, scale, some.zero_point(), self.format)
        return values.T.astype(self.dtype).reshape((*ids.shape, in_size))

    def partition_specs(self, spec: PartitionSpec, mesh: Any = None) -> UniformArray:
        batch, rows, columns = canonical_spec(self, spec)
        in_size, _ = self.matrix_shape
        group_rows = None
        if rows is not None:
            shards = shard_count(rows, mesh)
            check_divides(in_size * self.format.bits, 32 * shards, "codes would be cut inside a packed word")
            if self.format.grouped:
                group = self.format.rows_per_group(in_size)
                check_divides(in_size, group * shards, "a group would be cut")
                if self.zero is not None:
                    bits = self.scale.shape[-2] * self.format.bits
                    check_divides(bits, 32 * shards, "zero points would be cut inside a packed word")
                group_rows = rows
        channels = None if self.format.group_size == "tensor" else columns
        return dataclasses.replace(
            self,
            codes=PartitionSpec(*batch, rows, columns),
            scale=PartitionSpec(*batch, group_rows, channels),
            zero=None if self.zero is None else PartitionSpec(*batch, group_rows, channels),
        )


def round_up(scale: Float[Array, "*shape"], dtype: str) -> Float[Array, "*shape"]:
    """The smallest number of `dtype` that is not below `scale` (positive float32), as float32.

    Rounding up keeps the ends of the range within half a step. Arithmetic instead of a pair of casts, because
    XLA may drop such a pair (`xla_allow_excess_precision`) and the codes must belong to the stored scale.
    """
    if dtype == "float32":
        return scale
    power, steps = spacing(scale, dtype)
    return jnp.ceil(scale / power * steps) / steps * power


def _range(w: Array, format: Uniform) -> tuple[Array, Array]:
    axes = (-2, -1) if format.group_size == "tensor" else -2
    if format.symmetric:
        top = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
        return -top, top
    low = jnp.min(w, axis=axes, keepdims=True)
    high = jnp.max(w, axis=axes, keepdims=True)
    return jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)


def _grid(low: Array, high: Array, format: Uniform) -> tuple[Array, Array]:
    spread = high - low
    smallest = float(np.finfo(np.float32).tiny)
    scale = jnp.where(spread > 0, jnp.maximum(spread / format.levels, smallest), 1.0)
    scale = round_up(scale, format.scale_dtype)
    if format.symmetric:
        return scale, jnp.full_like(scale, 2.0 ** (format.bits - 1))
    return scale, jnp.clip(jnp.round(-low / scale), 0, format.levels)


def fit_minmax(w: Float[Array, "*batch group out"], format: Uniform) -> tuple[Array, Array]:
    """Scale and zero point of each group from its extreme values, both float32 `(*batch, 1, out or 1)`.

    The scale is already rounded to `format.scale_dtype`. A group of zeros gets scale 1.
    """
    return _grid(*_range(w.astype(jnp.float32), format), format)


def fit_mse(
    w: Float[Array, "*batch group out"],
    format: Uniform,
    weight: Float[Array, "*#batch #group #out"] | None = None,
    grid: Sequence[float] = SHRINKS,
    norm: float = 2.0,
) -> tuple[Array, Array]:
    """Like `fit_minmax`, with the range shrunk by the factor of `grid` that leaves the least error.

    The error of a group is sum(weight * |Q(w) - w|^norm). `weight` broadcasts with `w`. GPTQ's reference
    code searches the default grid with norm 2.4 (Frantar et al. 2023). Never worse than min-max if 1.0 is in
    `grid`.
    """
    w = w.astype(jnp.float32)
    low, high = _range(w, format)
    axes = (-2, -1) if format.group_size == "tensor" else -2

    def error(scale: Array, zero: Array) -> Array:
        difference = jnp.abs(dequantize_codes(quantize_codes(w, scale, zero, format), scale, zero) - w)
        loss = difference**norm
        return jnp.sum(loss if weight is None else loss * weight, axis=axes, keepdims=True)

    def step(best: tuple[Array, Array, Array], shrink: Array) -> tuple[tuple[Array, Array, Array], None]:
        scale, zero = _grid(low * shrink, high * shrink, format)
        loss = error(scale, zero)
        better = loss < best[0]
        return tuple(jnp.where(better, a, b) for a, b in zip((loss, scale, zero), best, strict=True)), None  # type: ignore[return-value]

    start = _grid(low, high, format)
    start = (jnp.full_like(low, jnp.inf), *start)
    (_, scale, zero), _ = jax.lax.scan(step, start, jnp.asarray(grid, jnp.float32))
    return scale, zero


def quantize_codes(
    w: Float[Array, "*batch group out"], scale: Array, zero: Array, format: Uniform
) -> UInt8[Array, "*batch group out"]:
    """Nearest codes: clip(round(w / scale) + zero, 0, 2^bits - 1). Ties go to even."""
    steps = jnp.round(w.astype(jnp.float32) / scale) + zero
    return jnp.clip(steps, 0, format.levels).astype(jnp.uint8)


def values_of(
    codes: UInt8[Array, "*batch in out"], scale: Array, zero: Array, format: Uniform
) -> Float[Array, "*batch in out"]:
    """The values of codes by scales and zero points of their groups, float32."""
    in_size = codes.shape[-2]
    if scale.shape[-2] == 1:
        return dequantize_codes(codes, scale, zero)
    groups = split_groups(codes, format.rows_per_group(in_size))
    return join_groups(dequantize_codes(groups, scale[..., None, :], zero[..., None, :]), in_size)


def dequantize_codes(codes: Integer[Array, "*shape"], scale: Array, zero: Array) -> Float[Array, "*shape"]:
    """(codes - zero) * scale in float32."""
    return (codes.astype(jnp.float32) - zero.astype(jnp.float32)) * scale.astype(jnp.float32)


def assemble(
    codes: UInt8[Array, "*batch in out"],
    scale: Float[Array, "*batch groups channels"],
    zero: Array | None,
    format: Uniform,
    layout: Layout | None = None,
    dtype: Any = jnp.float32,
) -> UniformArray:
    """Packs codes and zero points into a UniformArray of logical `dtype`; `zero` is unused when symmetric."""
    in_size = codes.shape[-2]
    packed = None
    if not format.symmetric:
        assert zero is not None
        packed = pack(zero.astype(jnp.uint8), format.bits)
    return UniformArray(
        codes=pack(codes, format.bits),
        scale=scale.astype(format.scale_dtype),
        zero=packed,
        format=format,
        layout=layout or Layout(),
        dtype_name=jnp.dtype(dtype).name,
        pad=capacity_of(words_for(in_size, format.bits), format.bits) - in_size,
    )
