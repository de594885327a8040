"""Products with a matrix of look-up tables."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from jaxq.kernels import tiles
from jaxq.kernels.codebook.reference import reference as reference
from jaxq.kernels.dispatch import on_cpu


def matmul(x: Float[Array, "*tokens in"], array: Any) -> Float[Array, "*tokens out"]:
    """`x @ array` in the dtype of `x`: tile by tile on CPUs where the matrix is large, else the reference.

    A prepared array (`jaxq.prepare`) has a faster product of its own.
    """
    if not tiles.worthwhile(x, array):
        return reference(x, array)
    return on_cpu(tiles.product, reference, x, array)
