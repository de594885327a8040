"""Products with a matrix of bit planes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from jaxq.kernels import matvec, tiles
from jaxq.kernels.bitplane import tiled
from jaxq.kernels.bitplane.reference import reference as reference
from jaxq.kernels.dispatch import on_cpu


def matmul(x: Float[Array, "*tokens in"], array: Any) -> Float[Array, "*tokens out"]:
    """`x @ array` in the dtype of `x`: for large matrices and few tokens on CPUs in blocks (one token) or
    tile by tile, else the reference.

    A prepared array (`jaxq.prepare`) has a faster product of its own.
    """
    many = tiled.product if tiled.fits(array) else tiles.product
    if matvec.worthwhile(x, array):
        return on_cpu(matvec.unless_mapped(many), reference, x, array)
    if not tiles.worthwhile(x, array, tiled.TOKENS):
        return reference(x, array)
    return on_cpu(many, reference, x, array)
