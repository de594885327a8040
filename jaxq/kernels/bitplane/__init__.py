"""Products with a matrix of bit planes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from jaxq.kernels import tiles
from jaxq.kernels.bitplane import tiled
from jaxq.kernels.bitplane.reference import reference as reference
from jaxq.kernels.dispatch import on_cpu


def matmul(x: Float[Array, "*tokens in"], array: Any) -> Float[Array, "*tokens out"]:
    """`x @ array` in the dtype of `x`: for large matrices and few tokens tile by tile on CPUs, else the reference.

    A prepared array (`jaxq.prepare`) has a faster product of its own.
    """
    if not tiles.worthwhile(x, array, tiled.TOKENS):
        return reference(x, array)
    return on_cpu(tiled.product if tiled.fits(array) else tiles.product, reference, x, array)
