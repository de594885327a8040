"""Products with a matrix of look-up tables."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from jaxq.kernels import matvec, tiles
from jaxq.kernels.codebook.reference import reference as reference
from jaxq.kernels.dispatch import on_cpu


def matmul(x: Float[Array, "*tokens in"], array: Any) -> Float[Array, "*tokens out"]:
    """`x @ array` in the dtype of `x`: on CPUs in blocks (one token) or tile by tile where the matrix
    is large, else the reference.

    A prepared array (`jaxq.prepare`) has a faster product of its own.
    """
    if not tiles.worthwhile(x, array):
        return reference(x, array)
    one = matvec.worthwhile(x, array)
    return on_cpu(matvec.unless_mapped(tiles.product) if one else tiles.product, reference, x, array)
