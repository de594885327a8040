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
from jaxq.formats import bitplane, codebook, packing, uniform
from jaxq.formats.base import Layout, QuantizedArray, is_quantized, quantized_pytree
from jaxq.formats.bitplane import BitPlane, BitPlaneArray
from jaxq.formats.codebook import Codebook, CodebookArray
from jaxq.formats.dense_sparse import DenseSparseArray
from jaxq.formats.placement import canonical_spec, shard_count
from jaxq.formats.rounded_input import RoundedInputArray
from jaxq.formats.uniform import Uniform, UniformArray
from jaxq.kernels import dispatch, native
from jaxq.kernels.bitplane import gpu as bitplane_gpu
from jaxq.kernels.bitplane import native as bitplane_native
from jaxq.kernels.bitplane import native_rows as bitplane_rows
from jaxq.kernels.bitplane import tpu as bitplane_tpu
from jaxq.kernels.codebook import gpu as codebook_gpu
from jaxq.kernels.codebook import native as codebook_native
from jaxq.kernels.codebook import tpu as codebook_tpu
from jaxq.kernels.elsewhere import only_on
from jaxq.kernels.gpu import run as gpu
from jaxq.kernels.tpu import generations
from jaxq.kernels.uniform import gpu as uniform_gpu
from jaxq.kernels.uniform import native as uniform_native
from jaxq.kernels.uniform import tpu as uniform_tpu

TARGETS = ("cpu", "gpu", "tpu", *generations.TARGETS)

#: For each kind of device what activations may be rounded to.
ACTIVATIONS = {
    "cpu": ("float32", "bfloat16", "int16", "int8"),
    "gpu": ("float32", "float16"),
    "tpu": ("float32",),
}

#: A sparse overlay goes into the same pass over the weight up to this fraction of it, on GPUs.
FUSED = 0.01

#: The layout of bit planes on CPUs as codes by rows, where `bitplane_rows.faster` prefers it.
ROWS = "cpu-rows"

#: For each kind of device, or one layout on it, what lays out and multiplies the arrays of a format.
KERNELS: dict[str, dict[type, ModuleType]] = {
    "cpu": {Uniform: uniform_native, Codebook: codebook_native, BitPlane: bitplane_native},
    ROWS: {BitPlane: bitplane_rows},
    "gpu": {Uniform: uniform_gpu, Codebook: codebook_gpu, BitPlane: bitplane_gpu},
    "tpu": {Uniform: uniform_tpu, Codebook: codebook_tpu, BitPlane: bitplane_tpu},
}


@quantized_pytree
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedArray(QuantizedArray):
    """A quantized tensor laid out for the kernels of one target. `restore` gives the canonical array, bit by bit.

    `parts` are the arrays of the kernel (see `kernels/*/native.py`, `gpu.py`, `tpu.py`), the batch axes leading;
    floating ones are differentiable. `in_pad` and `out_pad` are the inputs and outputs that only fill up the last
    block; `activations` is what the other operand may be rounded to (see `ACTIVATIONS`); `target` is "cpu",
    `ROWS`, "gpu" or a generation of TPUs.
    """

    parts: tuple[Array, ...]
    format: Any = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype_name: str = dataclasses.field(metadata={"static": True})
    in_pad: int = dataclasses.field(metadata={"static": True})
    out_pad: int = dataclasses.field(metadata={"static": True})
    activations: str = dataclasses.field(metadata={"static": True})
    target: str = dataclasses.field(metadata={"static": True})

    @property
    def device(self) -> str:
        """The kind of device of `target`, a key of `KERNELS`."""
        return _device(self.target)

    @property
    def kernel(self) -> Any:
        return _kernel(self.target, self.format)

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
        if self.kernel.CODES:
            return bitplane.assemble(*restored, **some)
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
            codes, table = self._restored()
            values = codebook.values_of(codes, table, self.format)
        elif self.kernel.CODES:
            codes, scale, offset = self._restored()
            values = bitplane.values_of(codes, scale, offset, self.format)
        else:
            return self.restore().matrix(dtype)
        return values.astype(dtype or self.dtype)

    def matmul(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        """`x @ matrix` by the kernel, in the dtype of `x`.

        The weight becomes dense instead in programs for other platforms, for many tokens, for float64, on explicit
        mesh axes, and, with a warning, where the kernels of CPUs cannot run: an array that another machine
        prepared.
        """
        x = jnp.asarray(x)
        if not self._takes(x) or (self.device == "cpu" and not native.available(warn=True)):
            return _reference(x, self)
        platform, implementation = _PRODUCTS[self.device]
        return dispatch.on(platform, implementation, _reference, x, self)

    def _takes(self, x: Float[Array, "*tokens in"]) -> bool:
        """Whether the kernel multiplies `x`: few enough tokens, and what every implementation needs."""
        tokens = x.size // max(self.matrix_shape[0], 1)
        if self.device == "gpu":
            few = gpu.takes(tokens, x.dtype, self.parts[0], self.exact)
        else:
            few = tokens <= self.kernel.TOKENS
        return few and dispatch.fits(x, self)

    @property
    def exact(self) -> bool:
        """Whether a GPU sums in float32."""
        return self.activations == "float32"

    def fuses(self, x: Float[Array, "*tokens in"], entries: int) -> bool:
        """Whether the kernel adds a sparse overlay of so many entries in the same pass."""
        in_size, out_size = self.matrix_shape
        by_rows = self.device == "gpu" and gpu.by_rows(x.size // max(in_size, 1), self.exact)
        return by_rows and entries <= FUSED * in_size * out_size and self._takes(x)

    def fused(
        self, x: Float[Array, "*tokens in"], overlay: tuple[Array, Array, Array, Array]
    ) -> Float[Array, "*tokens out"]:
        """`x @ (matrix + overlay)` in the dtype of `x`, by the kernel of GPUs. See `fuses`."""
        return _gpu_product(x, self, overlay)

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
        if self.out_pad or (rows is not None and not self._cuts_inputs(rows, mesh)):
            raise JaxqError("a prepared array is sharded along whole tiles of its outputs only, for GPUs also "
                            "along inputs if shards hold whole blocks and several groups; shard the canonical "
                            "array and prepare its shards")  # fmt: skip

        def of(place: int, part: Array) -> PartitionSpec:
            axes = [None] * (part.ndim - len(batch))
            # Outputs come first for CPUs and GPUs, last for TPUs.
            axes[-1 if self.device == "tpu" else 0] = columns
            if rows is not None and (place == 0 or self.kernel.groups(self.parts) > 1):
                axes[1] = rows
            return PartitionSpec(*batch, *axes)

        return dataclasses.replace(self, parts=tuple(of(*part) for part in enumerate(self.parts)))

    def _cuts_inputs(self, entry: Any, mesh: Any) -> bool:
        """Whether each shard along the inputs is a prepared array by itself."""
        if self.device != "gpu" or self.in_pad:
            return False
        shards = shard_count(entry, mesh)
        blocks, groups = self.kernel.blocks(self.format, self.parts), self.kernel.groups(self.parts)
        # The layout of a single group is that of an output without groups.
        return blocks % shards == 0 and (groups == 1 or (groups % shards == 0 and groups > shards))


# Jitted, so that layers of the same shape are traced and lowered once.
@jax.jit
def _reference(x: Array, array: PreparedArray) -> Array:
    return jnp.matmul(x, array.matrix(x.dtype))


def _product(x: Array, array: PreparedArray) -> Array:
    *tokens, in_size = x.shape
    y = array.kernel.product(x.reshape((-1, in_size)), array)[:, : array.matrix_shape[1]]
    return y.astype(x.dtype).reshape((*tokens, y.shape[-1]))


def _gpu_product(x: Array, array: PreparedArray, overlay: tuple[Array, ...] = ()) -> Array:
    *tokens, in_size = x.shape
    options = {"exact": array.exact, "overlay": overlay, "dtype": x.dtype}
    y = array.kernel.product(x.reshape((-1, in_size)), array, **options)
    return y.reshape((*tokens, y.shape[-1]))


#: For each kind of device its platform, as JAX names it, and the product.
_PRODUCTS: dict[str, tuple[str, dispatch.Implementation]] = {
    "cpu": ("cpu", _product),
    "gpu": ("cuda", only_on("cuda", _gpu_product)),
    "tpu": ("tpu", only_on("tpu", _product)),
}


def _device(target: str) -> str:
    return target.partition("-")[0]


def _kernel(target: str, format: Any) -> Any:
    return KERNELS[target if target in KERNELS else _device(target)][type(format)]


def _layout(array: Any, target: str, activations: str) -> str:
    """`target`, or the one of its layouts that suits an array with such activations."""
    by_rows = target == "cpu" and isinstance(array.format, BitPlane) and activations in bitplane_rows.ACTIVATIONS
    return ROWS if by_rows and bitplane_rows.faster(array) else target


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
            with one warning. "gpu" (of Nvidia), "tpu-v4", "tpu-v5" (v5e, v5p) or "tpu-v6" (v6e, v7x): kernels in
            Pallas, whose layouts can be made anywhere. "tpu": the generation of this process's TPU;
            without one "tpu-v5", which later ones run too.
        activations: what the other operand may be rounded to. "float32": nothing, products are as exact as float32
            sums. On CPUs also "bfloat16": processors that multiply it (AVX512-BF16) then take tables rounded to it
            too, others multiply as float32; errors of some 3e-3. And "int16" or "int8", for uniform grids and bit
            planes: integers with a unit for each group of inputs. On GPUs also "float16", in which the products of
            a word are then summed too: errors of some 5e-4.
        on_fallback: called with the path and the reason for each quantized leaf that stays as it is.

    Prepare what will run, not what will be saved: checkpoints hold canonical arrays, which `restore` gives back.
    """
    if target not in TARGETS:
        raise JaxqError(f"there are no kernels for {target!r} to prepare for; use {', '.join(TARGETS)}")
    known = ACTIVATIONS[_device(target)]
    if activations not in known:
        raise JaxqError(f"activations for {target} cannot be {activations!r}; use {', '.join(known)}")
    if target == "tpu":
        target = generations.of_this_process()
    lacking = target == "cpu" and not native.available(warn=True)
    missing = f"no native CPU kernel: {native.reason()}" if lacking else ""

    def one(path: Any, leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        prepared, why = (leaf, missing) if missing else _prepare(leaf, target, activations)
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


def _prepare(leaf: Any, target: str, activations: str) -> tuple[Any, str]:
    """(the array in kernel order, ""), or (the array, why not)."""
    if isinstance(leaf, PreparedArray):
        if leaf.target == _layout(leaf, target, activations):
            return dataclasses.replace(leaf, activations=activations), ""
        return _prepare(leaf.restore(), target, activations)
    if isinstance(leaf, DenseSparseArray):
        base, why = _prepare(leaf.base, target, activations)
        return dataclasses.replace(leaf, base=base), why
    if isinstance(leaf, RoundedInputArray):
        if not is_quantized(leaf.weight):
            return leaf, "it is dense"
        weight, why = _prepare(leaf.weight, target, activations)
        return dataclasses.replace(leaf, weight=weight), why
    if not isinstance(leaf, (UniformArray, CodebookArray, BitPlaneArray)):
        return leaf, f"there is no kernel for {leaf.format}"
    target = _layout(leaf, target, activations)
    kernel = _kernel(target, leaf.format)
    if why := kernel.unsupported(leaf):
        return leaf, why
    in_size, out_size = leaf.matrix_shape
    parts = _lay_out(leaf, target)
    room = kernel.sizes(leaf.format, parts)
    pads = {"in_pad": room[0] - in_size, "out_pad": room[1] - out_size}
    some = {**pads, "activations": activations, "target": target}
    return PreparedArray(parts, leaf.format, leaf.layout, leaf.dtype_name, **some), ""


@functools.partial(jax.jit, static_argnums=1)
def _lay_out(leaf: Any, target: str) -> tuple[Array, ...]:
    kernel = _kernel(target, leaf.format)
    if isinstance(leaf, BitPlaneArray):
        return kernel.prepare(leaf, leaf.codes() if kernel.CODES else leaf.planes, target)
    return kernel.prepare(leaf, packing.unpack(leaf.codes, leaf.format.bits, leaf.matrix_shape[0]), target)
