"""Products with a uniformly quantized matrix."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def reference(x: Float[Array, "*tokens in"], array: Any) -> Float[Array, "*tokens out"]:
    """`x @ array` by XLA: dequantizes in the graph, then multiplies in the dtype of `x`.

    This is no kernel: it states what one must compute.
    """
    return jnp.matmul(x, array.matrix(x.dtype))
