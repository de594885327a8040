"""A quantized matrix plus a sparse overlay of single weights (dense-and-sparse, Kim et al. 2024).

The overlay corrects the base at a fixed number of positions. It is stored by columns, so that its size is
static and exact: nothing is padded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, UInt, UInt32

from jaxq.errors import JaxqError
from jaxq.formats.base import Format, Layout, QuantizedArray, from_dict, quantized_pytree
from jaxq.formats.placement import canonical_spec
from jaxq.kernels import dispatch
from jaxq.kernels import sparse as kernel
from jaxq.kernels.elsewhere import only_on
from jaxq.largest import largest

VALUE_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class DenseSparse(Format):
    """Any format, plus an overlay that holds a fraction of the weights to better precision.

    The value of a weight is that of the base plus that of the overlay, where it has an entry there.

    Args:
        base: the format of the dense part.
        sparsity: fraction of the weights of each matrix that have an entry, between 0 and 1.
        value_dtype: "float16", "bfloat16" or "float32".
    """

    name: ClassVar[str] = "dense_sparse"

    base: Format
    sparsity: float
    value_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.base, Format):
            raise JaxqError(f"the base of a dense and sparse format is a format, not {self.base!r}")
        if not isinstance(self.sparsity, float) or not 0 < self.sparsity < 1:
            raise JaxqError(f"sparsity is a fraction of the weights between 0 and 1, not {self.sparsity!r}")
        if self.value_dtype not in VALUE_DTYPES:
            raise JaxqError(f"overlays are stored in {', '.join(VALUE_DTYPES)}, not {self.value_dtype!r}")

    def __str__(self) -> str:
        return f"{self.base} + {100 * self.sparsity:g}% sparse"

    def entries(self, in_size: int, out_size: int) -> int:
        """Overlay entries of an `(in_size, out_size)` matrix, at least 1."""
        return max(1, round(self.sparsity * in_size * out_size))

    def abstract(
        self, shape: Sequence[int], dtype: Any = jnp.float32, layout: Layout | None = None
    ) -> DenseSparseArray:
        *batch, in_size, out_size = shape
        entries = self.entries(in_size, out_size)

        def struct(size: int, kind: Any) -> Any:
            return jax.ShapeDtypeStruct((*batch, size), jnp.dtype(kind))

        return DenseSparseArray(
            base=self.base.abstract(shape),
            rows=struct(entries, row_dtype(in_size)),
            values=struct(entries, self.value_dtype),
            starts=struct(out_size, jnp.uint32),
            counts=struct(out_size, count_dtype(in_size)),
            format=self,
            layout=layout or Layout(),
            dtype_name=jnp.dtype(dtype).name,
        )

    def to_dict(self) -> dict[str, Any]:
        fields = {"sparsity": self.sparsity, "value_dtype": self.value_dtype}
        return {"name": self.name, "base": self.base.to_dict(), **fields}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Format:
        base, sparsity = fields.get("base"), fields.get("sparsity")
        if not isinstance(base, dict) or sparsity is None:
            raise JaxqError("format 'dense_sparse' needs a base, a table that names a format, and a sparsity")
        return cls(**{**fields, "base": from_dict(base)})


def row_dtype(in_size: int) -> Any:
    """The dtype of an overlay's input indices."""
    return jnp.uint16 if in_size <= 2**16 else jnp.uint32


def count_dtype(in_size: int) -> Any:
    """The dtype of the number of an output's entries, which may be all of its inputs."""
    return jnp.uint16 if in_size < 2**16 else jnp.uint32


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DenseSparseArray(QuantizedArray):
    """A quantized tensor with an overlay.

    `base` is a quantized array in canonical form: the identity layout, logical dtype float32. `rows`
    (batch..., entries) are the inputs and `values` (batch..., entries) the values of the overlay, sorted by
    output and then by input; the entries of output `o` are the `counts[o]` from `starts[o]` on, both
    (batch..., out). Along a sharded out axis entries are replicated, starts and counts sharded.
    """

    base: QuantizedArray
    rows: UInt[Array, "*batch entries"]
    values: Float[Array, "*batch entries"]
    starts: UInt32[Array, "*batch out"]
    counts: UInt[Array, "*batch out"]
    format: DenseSparse = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype_name: str = dataclasses.field(metadata={"static": True})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.base.batch_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.base.matrix_shape

    @property
    def overlay(self) -> tuple[Array, Array, Array, Array]:
        """(rows, values, starts, counts)."""
        return self.rows, self.values, self.starts, self.counts

    def matrix(self, dtype: Any = None) -> Float[Array, "*batch in out"]:
        in_size, _ = self.matrix_shape
        scatter: Callable[..., Array] = functools.partial(kernel.dense, in_size=in_size)
        for _ in self.batch_shape:
            scatter = jax.vmap(scatter)
        return (self.base.matrix(jnp.float32) + scatter(*self.overlay)).astype(dtype or self.dtype)

    def matmul(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        x = jnp.asarray(x)
        # Of a base in kernel order, which knows whether it can take the overlay along.
        fuses = getattr(self.base, "fuses", None)
        if fuses is not None and fuses(x, self.rows.shape[-1]):
            return dispatch.on("cuda", _fused, _apart, x, self)
        return _apart(x, self)

    def _apart(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        _, out_size = self.matrix_shape
        if not kernel.gathers(x, self.rows.shape[-1], out_size):
            # One dense product, where the sum of two would cost twice as much.
            return jnp.matmul(x, self.matrix(x.dtype))
        dense = self.base.matmul(x).astype(jnp.float32)
        return (dense + kernel.product(x, *self.overlay, out_size)).astype(x.dtype)

    def take_out(self, ids: Integer[Array, "*ids"]) -> Float[Array, "*ids in"]:
        if self.batch_shape:
            raise JaxqError("take_out reads one matrix; index the batch axes away first, or use jax.vmap")
        in_size, _ = self.matrix_shape
        ids = jnp.asarray(ids)
        sparse = kernel.take(ids.reshape(-1), *self.overlay, in_size).reshape((*ids.shape, in_size))
        return (self.base.take_out(ids) + sparse).astype(self.dtype)

    def partition_specs(self, spec: PartitionSpec, mesh: Any = None) -> DenseSparseArray:
        batch, rows, columns = canonical_spec(self, spec)
        if rows is not None:
            raise JaxqError("a weight with a sparse overlay cannot be sharded along its in axis: the overlay is "
                            "stored by outputs; shard the out axis instead")  # fmt: skip
        return dataclasses.replace(
            self,
            base=self.base.partition_specs(PartitionSpec(*batch, None, columns), mesh),
            rows=PartitionSpec(*batch, None),
            values=PartitionSpec(*batch, None),
            starts=PartitionSpec(*batch, columns),
            counts=PartitionSpec(*batch, columns),
        )


@functools.partial(only_on, "cuda")
def _fused(x: Array, array: DenseSparseArray) -> Array:
    base: Any = array.base
    return base.fused(x, array.overlay)


def _apart(x: Array, array: DenseSparseArray) -> Array:
    return array._apart(x)


def compress(values: Float[Array, "in out"], mask: Any, format: DenseSparse) -> tuple[Array, Array, Array, Array]:
    """(rows, values, starts, counts) of the values of one matrix at `mask` (in, out), which must hold exactly
    `format.entries(in, out)` places."""
    in_size, out_size = values.shape
    entries = format.entries(in_size, out_size)
    counts = jnp.sum(mask, axis=0, dtype=jnp.int32)
    # Of equal values these are the first, in order: the places of the mask, on a CPU in a third of the time of
    # jnp.nonzero, which scatters every place of the matrix.
    places = largest(mask.T.reshape(-1).astype(jnp.float32), entries)
    column, row = places // in_size, places % in_size
    return (
        row.astype(row_dtype(in_size)),
        values[row, column].astype(format.value_dtype),
        (jnp.cumsum(counts) - counts).astype(jnp.uint32),
        counts.astype(count_dtype(in_size)),
    )
