"""What every quantized tensor has in common: its layout, its logical shape, its verbs.

A weight is stored in one canonical form, a matrix `(in, out)` with optional leading batch axes (scanned
layers, experts); `Layout` says how that matrix maps to the shape the model knows. Sizes are always read from
the shapes of the children, so that they stay true when `scan`, `vmap` or `shard_map` slices the pytree.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, PyTree

from jaxq.errors import JaxqError


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the canonical `(batch..., in, out)` matrix maps to the leaf's logical shape.

    The canonical core axes are the in axes followed by the out axes; the first of either kind is derived from
    the matrix shape, so a layout holds no size that a shard along it would change.

    Args:
        in_tail: sizes of the in axes after the first.
        out_tail: sizes of the out axes after the first.
        perm: logical core axis `i` is canonical core axis `perm[i]`; `(1, 0)` for an `(out, in)` leaf.
    """

    in_tail: tuple[int, ...] = ()
    out_tail: tuple[int, ...] = ()
    perm: tuple[int, ...] = (0, 1)

    @classmethod
    def of(cls, shape: Sequence[int], in_axes: Sequence[int], out_axes: Sequence[int]) -> Layout:
        """The layout of a logical core shape (no batch axes) whose axes are split into in and out axes.

        The order inside `in_axes` and `out_axes` is the order in which they are flattened. Raises JaxqError
        unless each axis of `shape` is named exactly once, with at least one on each side.
        """
        ins, outs = tuple(in_axes), tuple(out_axes)
        core = ins + outs
        if not ins or not outs or sorted(core) != list(range(len(shape))):
            raise JaxqError(f"in axes {ins} and out axes {outs} do not split the axes of {tuple(shape)}; "
                            "name each axis once, with at least one on each side")  # fmt: skip
        perm = tuple(core.index(axis) for axis in range(len(core)))
        return cls(tuple(shape[a] for a in ins[1:]), tuple(shape[a] for a in outs[1:]), perm)

    @property
    def in_ndim(self) -> int:
        return 1 + len(self.in_tail)

    @property
    def core_ndim(self) -> int:
        return self.in_ndim + 1 + len(self.out_tail)

    def canonical_core(self, in_size: int, out_size: int) -> tuple[int, ...]:
        """Sizes of the canonical core axes of an `(in_size, out_size)` matrix."""
        ins, outs = math.prod(self.in_tail), math.prod(self.out_tail)
        return (in_size // ins, *self.in_tail, out_size // outs, *self.out_tail)

    def logical_core(self, in_size: int, out_size: int) -> tuple[int, ...]:
        """The logical core shape of an `(in_size, out_size)` matrix."""
        core = self.canonical_core(in_size, out_size)
        return tuple(core[axis] for axis in self.perm)

    def matrix_shape(self, core: Sequence[int]) -> tuple[int, int]:
        """`(in, out)` of a logical core shape; JaxqError if this layout cannot describe it."""
        canonical = [0] * self.core_ndim
        if len(core) == self.core_ndim:
            for size, axis in zip(core, self.perm, strict=True):
                canonical[axis] = size
        ins, outs = canonical[: self.in_ndim], canonical[self.in_ndim :]
        if len(core) != self.core_ndim or tuple(ins[1:]) != self.in_tail or tuple(outs[1:]) != self.out_tail:
            raise JaxqError(f"the layout {self} does not describe a weight of shape {tuple(core)}; "
                            "build it with Layout.of(shape, in_axes, out_axes)")  # fmt: skip
        return math.prod(ins), math.prod(outs)

    def to_canonical(self, array: Array) -> Array:
        """Logical `(batch..., core...)` to canonical `(batch..., in, out)`."""
        batch = array.ndim - self.core_ndim
        matrix = self.matrix_shape(array.shape[batch:])
        inverse = sorted(range(self.core_ndim), key=self.perm.__getitem__)
        moved = array.transpose((*range(batch), *(batch + axis for axis in inverse)))
        return moved.reshape((*array.shape[:batch], *matrix))

    def from_canonical(self, matrix: Array) -> Array:
        """Canonical `(batch..., in, out)` to logical `(batch..., core...)`."""
        *batch, in_size, out_size = matrix.shape
        split = matrix.reshape((*batch, *self.canonical_core(in_size, out_size)))
        return split.transpose((*range(len(batch)), *(len(batch) + axis for axis in self.perm)))


class Format:
    """A frozen, hashable description of how a tensor is stored; says nothing of how it was found.

    Subclasses are frozen dataclasses with a class attribute `name`, unique among formats.
    """

    name: ClassVar[str]

    def abstract(
        self, shape: Sequence[int], dtype: Any = jnp.float32, layout: Layout | None = None
    ) -> QuantizedArray:
        """The quantized array of a canonical `(batch..., in, out)` shape, with ShapeDtypeStruct children."""
        raise NotImplementedError

    def nbytes(self, shape: Sequence[int]) -> int:
        """Exact bytes of a canonical `(batch..., in, out)` weight: every code, scale and zero point."""
        return self.abstract(shape).nbytes

    def bits_per_weight(self, in_size: int, out_size: int) -> float:
        """Exact stored bits for each weight of an `(in, out)` matrix."""
        return 8 * self.nbytes((in_size, out_size)) / (in_size * out_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `from_dict` makes an equal format."""
        return {"name": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Format:
        return cls(**fields)


def from_dict(data: dict[str, Any]) -> Format:
    """The format that `to_dict` described; JaxqError for an unknown name or field."""
    known = {cls.name: cls for cls in Format.__subclasses__()}
    name = data.get("name")
    if name not in known:
        raise JaxqError(f"unknown format {name!r}; use one of {', '.join(sorted(known))}")
    fields = {key: value for key, value in data.items() if key != "name"}
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(known[name])})  # type: ignore[arg-type]
    if unknown:
        raise JaxqError(f"format {name!r} has no setting {', '.join(map(repr, unknown))}")
    return known[name]._from_fields(fields)


class QuantizedArray:
    """Base of all quantized pytrees.

    Subclasses are frozen dataclasses made with `quantized_pytree`. Their dynamic fields are arrays with the
    batch axes leading; their static fields include the ones below. Nothing is checked on construction, since
    JAX builds pytrees with placeholders for children.
    """

    format: Any
    layout: Layout
    dtype_name: str

    #: Whether `matmul` rounds its operand, so that no dense product can stand in for it.
    rounds_input: ClassVar[bool] = False

    # NumPy must hand `x @ q` over to __rmatmul__ instead of looping over objects.
    __array_ufunc__ = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(in, out)` of the canonical matrix."""
        raise NotImplementedError

    def matrix(self, dtype: Any = None) -> Float[Array, "*batch in out"]:
        """The dense canonical matrix, `(batch..., in, out)`, in `dtype` (default: the logical dtype)."""
        raise NotImplementedError

    def matmul(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        """`x @ matrix`, in the dtype of `x`; under batch axes call it through `jax.vmap`."""
        raise NotImplementedError

    def take_out(self, ids: Integer[Array, "*ids"]) -> Float[Array, "*ids in"]:
        """Columns `ids` of the canonical matrix, each an `(in,)` vector: the embedding look-up."""
        raise NotImplementedError

    def partition_specs(self, spec: PartitionSpec, mesh: Any = None) -> QuantizedArray:
        """The same pytree with a PartitionSpec for each child, given that of the logical leaf.

        Args:
            spec: how the dense leaf would be sharded.
            mesh: the mesh whose axes `spec` names; default: the mesh set by `jax.set_mesh`. Only sharding
                an in axis needs it.

        Raises JaxqError where a shard would split a group or a packed word.
        """
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, derived from the children."""
        return (*self.batch_shape, *self.layout.logical_core(*self.matrix_shape))

    @property
    def ndim(self) -> int:
        return len(self.batch_shape) + self.layout.core_ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The logical dtype: what `dequantize` gives."""
        return jnp.dtype(self.dtype_name)

    @property
    def nbytes(self) -> int:
        """Exact bytes of all children."""
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.size

    def __repr__(self) -> str:
        try:
            what = f"shape={self.shape}, bits_per_weight={self.bits_per_weight:.3f}"
        except (AttributeError, TypeError):
            what = "placeholder"
        return f"{type(self).__name__}({self.format}, {what}, dtype={self.dtype_name})"

    def astype(self, dtype: Any) -> QuantizedArray:
        """The same codes under another logical dtype."""
        return dataclasses.replace(self, dtype_name=jnp.dtype(dtype).name)  # type: ignore[type-var]

    def dequantize(self, dtype: Any = None) -> Array:
        """The dense array of logical shape, in `dtype` (default: the logical dtype)."""
        return self.layout.from_canonical(self.matrix(dtype))

    def __matmul__(self, other: Any) -> Array:
        return jnp.matmul(self.dequantize(), other)

    def __rmatmul__(self, x: Any) -> Array:
        """`x @ q`: contracts the last axis of `x` with the second to last logical axis, as for any array."""
        if self.ndim == 2 and self.layout == Layout():
            return self.matmul(jnp.asarray(x))
        return jnp.matmul(x, self.dequantize())

    def __getitem__(self, ids: Any) -> Any:
        """Look-up along the first logical axis.

        A batch axis gives a slice that is still quantized. A whole out axis (an embedding table `(vocab,
        embed)`) reads only the rows asked for. Anything else is the dense array, indexed.
        """
        if self.batch_shape and not isinstance(ids, tuple):
            return jax.tree.map(lambda child: child[ids], self)
        first, *rest = self.layout.perm
        if self.batch_shape or self.layout.out_tail or first != self.layout.in_ndim or _is_basic(ids):
            return self.dequantize()[ids]
        ids = jnp.asarray(ids)
        rows = self.take_out(ids)
        ins = self.layout.canonical_core(*self.matrix_shape)[: self.layout.in_ndim]
        rows = rows.reshape((*ids.shape, *ins))
        return rows.transpose((*range(ids.ndim), *(ids.ndim + axis for axis in rest)))


def _is_basic(ids: Any) -> bool:
    """Slices, None, Ellipsis, tuples and boolean masks: NumPy indexing that is not a look-up by number."""
    if isinstance(ids, (int, np.integer)) and not isinstance(ids, bool):
        return False
    return not jnp.issubdtype(getattr(ids, "dtype", jnp.bool_), jnp.integer)


def is_quantized(x: Any) -> bool:
    """Whether `x` is a quantized array; use it as `is_leaf` in tree functions."""
    return isinstance(x, QuantizedArray)


def dequantize(tree: PyTree) -> PyTree:
    """The tree with every quantized leaf made dense; other leaves as they are."""
    return jax.tree.map(lambda x: x.dequantize() if is_quantized(x) else x, tree, is_leaf=is_quantized)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The logical shape and dtype of a dense or quantized leaf."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


QuantizedType = TypeVar("QuantizedType", bound=type)


def quantized_pytree(cls: QuantizedType) -> QuantizedType:
    """Class decorator: registers a quantized dataclass as a pytree and for `jax.export`.

    Static fields are those with `metadata={"static": True}`; in an exported file they are JSON.
    """
    cls = jax.tree_util.register_dataclass(cls)
    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxq.{cls.__name__}",
        serialize_auxdata=_encode_static,
        deserialize_auxdata=_decode_static,
    )


def _encode_static(values: Sequence[Any]) -> bytes:
    def plain(value: Any) -> Any:
        if isinstance(value, Format):
            return {"format": value.to_dict()}
        if isinstance(value, Layout):
            return {"layout": dataclasses.asdict(value)}
        return value

    return json.dumps([plain(value) for value in values]).encode()


def _decode_static(data: bytes | bytearray) -> tuple[Any, ...]:
    def rich(value: Any) -> Any:
        if isinstance(value, dict) and "format" in value:
            return from_dict(value["format"])
        if isinstance(value, dict):
            return Layout(**{key: tuple(sizes) for key, sizes in value["layout"].items()})
        return value

    return tuple(rich(value) for value in json.loads(bytes(data)))
