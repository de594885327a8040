"""Products with a uniformly quantized matrix."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from jaxq.kernels import matvec, tiles
from jaxq.kernels.dispatch import on_cpu
from jaxq.kernels.uniform.reference import reference as reference


def matmul(x: Float[Array, "*tokens in"], array: Any) -> Float[Array, "*tokens out"]:
    """`x @ array` in the dtype of `x`: on CPUs in blocks (one token) or tile by tile where the matrix
    is large, else the reference.

    A prepared array (`jaxq.prepare`) has a faster product of its own.
    """
    if not tiles.worthwhile(x, array):
        return reference(x, array)
    one = matvec.worthwhile(x, array)
    return on_cpu(matvec.unless_mapped(tiles.product) if one else tiles.product, reference, x, array)
