"""A weight whose product rounds its other operand first: weight and activation quantization at one site."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from jaxq.errors import JaxqError
from jaxq.formats.base import Format, Layout, QuantizedArray, from_dict, is_quantized, quantized_pytree
from jaxq.formats.grids import Grid, grid_from_dict
from jaxq.formats.placement import canonical_spec


@dataclasses.dataclass(frozen=True)
class RoundedInput(Format):
    """A weight in any format, or dense, with a quantizer of its site's input.

    Args:
        base: the format of the weight; None leaves it dense, in its logical dtype.
        grid: what the input is rounded to, for a tensor or a channel.
    """

    name: ClassVar[str] = "rounded_input"

    base: Format | None
    grid: Grid

    def __post_init__(self) -> None:
        if self.base is not None and not isinstance(self.base, Format):
            raise JaxqError(f"the base of a rounded input is a format or None, not {self.base!r}")
        if not isinstance(self.grid, Grid):
            raise JaxqError(f"an input is rounded to a grid, not {self.grid!r}")
        if getattr(self.grid, "share", "") == "head":
            raise JaxqError("the input of a weight has no heads; share its grid by tensor or by channel")

    def __str__(self) -> str:
        return f"{self.base or 'dense'}, input {self.grid}"

    def abstract(
        self, shape: Sequence[int], dtype: Any = jnp.float32, layout: Layout | None = None
    ) -> RoundedInputArray:
        *batch, in_size, _ = shape
        dense: Any = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        return RoundedInputArray(
            weight=dense if self.base is None else self.base.abstract(shape),
            quantizer=self.grid.abstract((in_size,), batch),
            format=self,
            layout=layout or Layout(),
            dtype_name=jnp.dtype(dtype).name,
        )

    def to_dict(self) -> dict[str, Any]:
        base = None if self.base is None else self.base.to_dict()
        return {"name": self.name, "base": base, "grid": self.grid.to_dict()}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Format:
        if set(fields) != {"base", "grid"}:
            raise JaxqError("format 'rounded_input' needs a base, which may be null, and a grid")
        base = fields["base"]
        return cls(None if base is None else from_dict(base), grid_from_dict(fields["grid"]))


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RoundedInputArray(QuantizedArray):
    """A tensor with a quantizer of what it is multiplied with.

    `weight` is a quantized array in canonical form (identity layout, logical dtype float32) or a dense one
    (batch..., in, out); `quantizer` is a pytree x -> x, whose arrays have the batch axes in front. Both are
    differentiable.
    `matmul` rounds its operand; `dequantize` and look-ups give the weight alone.
    """

    weight: Any
    quantizer: Any
    format: RoundedInput = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype_name: str = dataclasses.field(metadata={"static": True})

    rounds_input: ClassVar[bool] = True

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.weight.batch_shape if is_quantized(self.weight) else tuple(self.weight.shape[:-2])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        if is_quantized(self.weight):
            return self.weight.matrix_shape
        in_size, out_size = self.weight.shape[-2:]
        return in_size, out_size

    def matrix(self, dtype: Any = None) -> Float[Array, "*batch in out"]:
        dtype = dtype or self.dtype
        return self.weight.matrix(dtype) if is_quantized(self.weight) else self.weight.astype(dtype)

    def matmul(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        x = self.quantizer(jnp.asarray(x))
        return self.weight.matmul(x) if is_quantized(self.weight) else jnp.matmul(x, self.weight.astype(x.dtype))

    def take_out(self, ids: Integer[Array, "*ids"]) -> Float[Array, "*ids in"]:
        if self.batch_shape:
            raise JaxqError("take_out reads one matrix; index the batch axes away first, or use jax.vmap")
        if is_quantized(self.weight):
            return self.weight.take_out(ids).astype(self.dtype)
        return jnp.moveaxis(jnp.take(self.weight, ids, axis=1), 0, -1).astype(self.dtype)

    def partition_specs(self, spec: PartitionSpec, mesh: Any = None) -> RoundedInputArray:
        batch, rows, columns = canonical_spec(self, spec)
        canonical = PartitionSpec(*batch, rows, columns)
        by_channel = getattr(self.format.grid, "share", "") == "channel"
        numbers = PartitionSpec(*batch, rows) if by_channel else PartitionSpec(*batch)
        return dataclasses.replace(
            self,
            weight=self.weight.partition_specs(canonical, mesh) if is_quantized(self.weight) else canonical,
            quantizer=jax.tree.map(lambda _: numbers, self.quantizer),
        )


def rounded_input(weight: Any, quantizer: Any, grid: Grid, layout: Layout | None = None) -> RoundedInputArray:
    """Puts a quantizer of the input beside a weight.

    Args:
        weight: a quantized array, or a dense one of logical shape `(batch..., core...)`.
        quantizer: of `grid`; its arrays have the batch axes in front.
        layout: how a dense weight maps to its canonical matrix; that of a quantized one is its own.
    """
    if is_quantized(weight):
        if weight.rounds_input:
            raise JaxqError("this weight already rounds its input")
        canonical = dataclasses.replace(weight.astype(jnp.float32), layout=Layout())
        form = RoundedInput(weight.format, grid)
        return RoundedInputArray(canonical, quantizer, form, weight.layout, weight.dtype_name)
    layout = layout or Layout()
    matrix = layout.to_canonical(jnp.asarray(weight))
    return RoundedInputArray(matrix, quantizer, RoundedInput(None, grid), layout, matrix.dtype.name)
