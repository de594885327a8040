"""Numbers as 8-bit integers on a uniform grid: what an integer product multiplies."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from jaxq.formats.activations import AffineQuantizer, DynamicQuantizer
from jaxq.formats.packing import unpack
from jaxq.formats.uniform import UniformArray

BYTE = 8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "offset", "rest"],
    meta_fields=["span", "dtype_name"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """value = (code + offset + rest) * scale. Every member has the axes of `codes`, of their size or of size 1.

    Codes are counted from the zero point wherever int8 has room for that, which makes products simplest.

    scale: step of the grid. offset: whole, at most 128; None where codes count from the zero point. rest: what a
    zero point outside of its grid has beyond the nearest end of it, whole; None where it has nothing. span: the
    largest |code + offset|. dtype_name: of the values.
    """

    codes: Int8[Array, "*shape"]
    scale: Float[Array, "*#shape"]
    offset: Int32[Array, "*#shape"] | None
    rest: Float[Array, "*#shape"] | None
    span: int
    dtype_name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def grids(self) -> dict[str, Array]:
        """The members that say what the codes mean, without those that are None."""
        known = {"scale": self.scale, "offset": self.offset, "rest": self.rest}
        return {name: member for name, member in known.items() if member is not None}

    @property
    def shared(self) -> bool:
        """Whether all codes are on one grid."""
        return all(member.size == 1 for member in self.grids.values())

    def dequantize(self) -> Float[Array, "*shape"]:
        steps = self.codes.astype(jnp.float32)
        for member in (self.offset, self.rest):
            steps = steps if member is None else steps + member.astype(jnp.float32)
        return (steps * self.scale).astype(self.dtype_name)

    def astype(self, dtype: Any) -> Codes:
        """The same codes under another dtype of the values."""
        return dataclasses.replace(self, dtype_name=jnp.dtype(dtype).name)


def unfit(quantizer: Any) -> str:
    """Why what this quantizer rounds has no int8 codes, or nothing."""
    if not isinstance(quantizer, (AffineQuantizer, DynamicQuantizer)):
        return f"is rounded by {type(quantizer).__name__}, to no uniform grid"
    if quantizer.bits > BYTE:
        return f"is rounded to {quantizer.bits} bits, more than {BYTE}"
    if isinstance(quantizer, AffineQuantizer) and quantizer.fractional:
        return "is rounded to a grid with a fractional zero point"
    return ""


def of_activation(quantizer: Any, x: Float[Array, "*shape"]) -> Codes:
    """The codes of x, for a quantizer of which `unfit` says nothing. `dequantize` is then `quantizer(x)`.

    A NaN has no code: it becomes some number of its grid.
    """
    dynamic = isinstance(quantizer, DynamicQuantizer)
    grid = quantizer.grid(x) if dynamic else quantizer
    whole = grid.zero_point()
    # Only a static grid can lie beside 0.
    near = whole if dynamic else jnp.clip(whole, 0, grid.levels)
    codes, offset = _counted(grid.codes(x), _aligned(near, x.ndim), grid.bits)
    scale = _aligned(grid.step(), x.ndim)
    rest = None if dynamic else _aligned(near - whole, x.ndim)
    return Codes(codes, scale, offset, rest, grid.levels, jnp.dtype(x.dtype).name)


def of_weight(array: UniformArray) -> Codes:
    """The codes `(*batch, in, out)` of a weight with one group of inputs for each output."""
    bits = array.format.bits
    codes = unpack(array.codes, bits, array.matrix_shape[0]).astype(jnp.int32)
    scale = array.scale.astype(jnp.float32)
    if array.zero is None:
        # The zero point is the middle for all: nothing is left to be offset.
        counted, offset = (codes - 2 ** (bits - 1)).astype(jnp.int8), None
    else:
        counted, offset = _counted(codes, array.zero_point(), bits)
    return Codes(counted, scale, offset, None, array.format.levels, array.dtype_name)


def _counted(codes: Array, zero: Array, bits: int) -> tuple[Array, Array | None]:
    """(int8 codes, offset): from the zero point on, or from the middle where 8 bits leave no room for that."""
    zero = zero.astype(jnp.int32)
    if bits < BYTE:
        return (codes - zero).astype(jnp.int8), None
    middle = 2 ** (bits - 1)
    return (codes - middle).astype(jnp.int8), middle - zero


def _aligned(member: Array, ndim: int) -> Array:
    """With axes of size 1 in front."""
    return member.reshape((1,) * (ndim - member.ndim) + member.shape)
