"""Quantized arrays in the order that a kernel reads, instead of the canonical packing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, PyTree

from jaxq.errors import JaxqError
from jaxq.formats import codebook, packing, uniform
from jaxq.formats.base import Layout, QuantizedArray, is_quantized, quantized_pytree
from jaxq.formats.bitplane import BitPlane, BitPlaneArray
from jaxq.formats.codebook import Codebook, CodebookArray
from jaxq.formats.dense_sparse import DenseSparseArray
from jaxq.formats.placement import canonical_spec
from jaxq.formats.rounded_input import RoundedInputArray
from jaxq.formats.uniform import Uniform, UniformArray
from jaxq.kernels import dispatch, native
from jaxq.kernels.bitplane import native as bitplane_native
from jaxq.kernels.bitplane import tpu as bitplane_tpu
from jaxq.kernels.codebook import native as codebook_native
from jaxq.kernels.codebook import tpu as codebook_tpu
from jaxq.kernels.tpu import generations
from jaxq.kernels.tpu.elsewhere import only_on_tpu
from jaxq.kernels.uniform import native as uniform_native
from jaxq.kernels.uniform import tpu as uniform_tpu

TARGETS = ("cpu", "tpu", *generations.TARGETS)

#: Bytes that stand for an activation in integer products.
DIGITS = {"float32": 3, "int16": 2, "int8": 1}

#: For each platform, what lays out and multiplies the arrays of a format.
KERNELS: dict[str, dict[type, ModuleType]] = {
    "cpu": {Uniform: uniform_native, Codebook: codebook_native, BitPlane: bitplane_native},
    "tpu": {Uniform: uniform_tpu, Codebook: codebook_tpu, BitPlane: bitplane_tpu},
}


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedArray(QuantizedArray):
    """A quantized tensor laid out for the kernels of one target. `restore` gives the canonical array, bit by bit.

    `parts` are the arrays of the kernel (see `kernels/*/native.py` and `tpu.py`), the batch axes leading; floating
    ones are differentiable. `in_pad` and `out_pad` are the inputs and outputs that only fill up the last block;
    `digits`, 1 to 3, are the bytes that stand for an activation in integer products of CPUs; `target` is "cpu" or
    a generation of TPUs.
    """

    parts: tuple[Array, ...]
    format: Any = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype_name: str = dataclasses.field(metadata={"static": True})
    in_pad: int = dataclasses.field(metadata={"static": True})
    out_pad: int = dataclasses.field(metadata={"static": True})
    digits: int = dataclasses.field(metadata={"static": True})
    target: str = dataclasses.field(metadata={"static": True})

    @property
    def platform(self) -> str:
        """The platform of `target`, as JAX names it."""
        return _platform(self.target)

    @property
    def kernel(self) -> Any:
        return KERNELS[self.platform][type(self.format)]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.parts[0].shape[: -self.kernel.AXES])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        in_size, out_size = self.kernel.sizes(self.format, self.parts)
        return in_size - self.in_pad, out_size - self.out_pad

    def restore(self) -> QuantizedArray:
        """The array in canonical packing."""
        in_size, _ = self.matrix_shape
        restored = self._restored()
        some = {"format": self.format, "layout": self.layout, "dtype": self.dtype_name}
        if isinstance(self.format, Uniform):
            return uniform.assemble(*restored, **some)
        if isinstance(self.format, Codebook):
            return codebook.assemble(*restored, **some)
        planes, scale, offset = restored
        pad = packing.capacity_of(planes.shape[-2], 1) - in_size
        return BitPlaneArray(planes, scale, offset, self.format, self.layout, self.dtype_name, pad)

    def _restored(self) -> Any:
        in_size, out_size = self.matrix_shape
        return [x[..., :out_size] for x in self.kernel.restore(self.format, self.parts, in_size, self.target)]

    def matrix(self, dtype: Any = None) -> Float[Array, "*batch in out"]:
        # Codes that are packed only to be unpacked would take longer than all the rest.
        if isinstance(self.format, Uniform):
            codes, scale, zero = self._restored()
            values = uniform.values_of(codes, scale, zero, self.format)
        elif isinstance(self.format, Codebook):
            values = codebook.lookup(*self._restored())
        else:
            return self.restore().matrix(dtype)
        return values.astype(dtype or self.dtype)

    def matmul(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        """`x @ matrix` by the kernel, in the dtype of `x`.

        The weight becomes dense instead in programs for other platforms, for many tokens (`TOKENS` of the kernel),
        for float64, on explicit mesh axes, and, with a warning, where the kernels of CPUs cannot run: an array
        that another machine prepared.
        """
        x = jnp.asarray(x)
        many = x.size > self.kernel.TOKENS * self.matrix_shape[0]
        if many or not dispatch.fits(x, self) or (self.target == "cpu" and not native.available(warn=True)):
            return _reference(x, self)
        implementation = _product if self.target == "cpu" else _tpu_product
        return dispatch.on(self.platform, implementation, _reference, x, self)

    def take_out(self, ids: Integer[Array, "*ids"]) -> Float[Array, "*ids in"]:
        if self.batch_shape:
            raise JaxqError("take_out reads one matrix; index the batch axes away first, or use jax.vmap")
        in_size, out_size = self.matrix_shape
        ids = jnp.asarray(ids)
        flat = ids.reshape(-1)
        flat = jnp.clip(jnp.where(flat < 0, flat + out_size, flat), 0, out_size - 1)
        # Only the rows asked for are restored: an embedding is far larger than what one step reads of it.
        parts, out_pad = self.kernel.take(self.parts, flat)
        some = dataclasses.replace(self, parts=parts, out_pad=out_pad, layout=Layout())
        return some.matrix().T.reshape((*ids.shape, in_size))

    def partition_specs(self, spec: PartitionSpec, mesh: Any = None) -> PreparedArray:
        batch, rows, columns = canonical_spec(self, spec)
        if rows is not None or self.out_pad:
            raise JaxqError("a prepared array is sharded along whole tiles of its outputs only; "
                            "shard the canonical array and prepare its shards")  # fmt: skip

        def of(part: Array) -> PartitionSpec:
            others = [None] * (part.ndim - len(batch) - 1)
            # Outputs come first for CPUs, last for TPUs.
            return PartitionSpec(*batch, *((columns, *others) if self.target == "cpu" else (*others, columns)))

        parts = tuple(of(part) for part in self.parts)
        return dataclasses.replace(self, parts=parts)


def _reference(x: Array, array: PreparedArray) -> Array:
    return jnp.matmul(x, array.matrix(x.dtype))


def _product(x: Array, array: PreparedArray) -> Array:
    *tokens, in_size = x.shape
    y = array.kernel.product(x.reshape((-1, in_size)), array)[:, : array.matrix_shape[1]]
    return y.astype(x.dtype).reshape((*tokens, y.shape[-1]))


_tpu_product = only_on_tpu(_product)


def _platform(target: str) -> str:
    return target.partition("-")[0]


def prepare(
    tree: PyTree,
    target: str = "cpu",
    *,
    activations: str = "float32",
    on_fallback: Callable[[str, str], None] | None = None,
) -> PyTree:
    """The tree with its quantized leaves laid out for the kernels of `target`. Values do not change.

    Args:
        tree: parameters, of which some leaves are quantized; or one quantized array.
        target: "cpu": where its kernels cannot run (no C++ compiler, another processor) leaves stay as they are,
            with one warning. "tpu-v4", "tpu-v5" (v5e, v5p) or "tpu-v6" (v6e, v7x): kernels in Pallas, whose
            layouts can be made anywhere. "tpu": the generation of this process's TPU; without one "tpu-v5", which
            later ones run too.
        activations: what uniform grids and bit planes may round the other operand to on CPUs: "float32" (as exact
            as float32 sums), "int16" or "int8", integers with a unit for each group of inputs.
        on_fallback: called with the path and the reason for each quantized leaf that stays as it is.

    Prepare what will run, not what will be saved: checkpoints hold canonical arrays, which `restore` gives back.
    """
    if target not in TARGETS:
        raise JaxqError(f"there are no kernels for {target!r} to prepare for; use {', '.join(TARGETS)}")
    if activations not in DIGITS:
        raise JaxqError(f"activations cannot be {activations!r}; use {', '.join(DIGITS)}")
    if target != "cpu" and activations != "float32":
        raise JaxqError("activations are rounded on CPUs only; on a TPU their dtype decides: bfloat16 or float32")
    if target == "tpu":
        target = generations.of_this_process()
    lacking = target == "cpu" and not native.available(warn=True)
    missing = f"no native CPU kernel: {native.reason()}" if lacking else ""

    def one(path: Any, leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        prepared, why = (leaf, missing) if missing else _prepare(leaf, target, DIGITS[activations])
        if why and on_fallback is not None:
            on_fallback(jax.tree_util.keystr(path, simple=True, separator="/"), why)
        return prepared

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_quantized)


def restore(tree: PyTree) -> PyTree:
    """The tree with every prepared leaf in canonical packing again."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, PreparedArray):
            return leaf.restore()
        if isinstance(leaf, DenseSparseArray):
            return dataclasses.replace(leaf, base=restore(leaf.base))
        if isinstance(leaf, RoundedInputArray):
            return dataclasses.replace(leaf, weight=restore(leaf.weight))
        return leaf

    return jax.tree.map(one, tree, is_leaf=is_quantized)


def _prepare(leaf: Any, target: str, digits: int) -> tuple[Any, str]:
    """(the array in kernel order, ""), or (the array, why not)."""
    if isinstance(leaf, PreparedArray):
        if leaf.target == target:
            return dataclasses.replace(leaf, digits=digits), ""
        return _prepare(leaf.restore(), target, digits)
    if isinstance(leaf, DenseSparseArray):
        base, why = _prepare(leaf.base, target, digits)
        return dataclasses.replace(leaf, base=base), why
    if isinstance(leaf, RoundedInputArray):
        if not is_quantized(leaf.weight):
            return leaf, "it is dense"
        weight, why = _prepare(leaf.weight, target, digits)
        return dataclasses.replace(leaf, weight=weight), why
    if not isinstance(leaf, (UniformArray, CodebookArray, BitPlaneArray)):
        return leaf, f"there is no kernel for {leaf.format}"
    kernel: Any = KERNELS[_platform(target)][type(leaf.format)]
    if why := kernel.unsupported(leaf):
        return leaf, why
    in_size, out_size = leaf.matrix_shape
    parts = _lay_out(leaf, target)
    room = kernel.sizes(leaf.format, parts)
    pads = {"in_pad": room[0] - in_size, "out_pad": room[1] - out_size}
    some = {**pads, "digits": digits, "target": target}
    return PreparedArray(parts, leaf.format, leaf.layout, leaf.dtype_name, **some), ""


@functools.partial(jax.jit, static_argnums=1)
def _lay_out(leaf: Any, target: str) -> tuple[Array, ...]:
    kernel: Any = KERNELS[_platform(target)][type(leaf.format)]
    if isinstance(leaf, BitPlaneArray):
        return kernel.prepare(leaf, leaf.planes, target)
    return kernel.prepare(leaf, packing.unpack(leaf.codes, leaf.format.bits, leaf.matrix_shape[0]), target)
