"""Places of the largest values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def largest(score: Float[Array, " n"], count: int) -> Int32[Array, " count"]:
    """The places of the `count` largest of `score`, the greatest first, of equal ones the first.

    No NaN; 1 <= count <= n. O(n log n) on a GPU, O(n log count) elsewhere.
    """
    # XLA's splitter of top_k on GPUs does not end, and takes all memory of the host, for n >= 2^20 that are
    # multiples of 1024 (jax issue 19653). It has nothing better than a sort for so many places anyway.
    return jax.lax.platform_dependent(
        score,
        cuda=lambda x: by_sort(x, count),
        rocm=lambda x: by_sort(x, count),
        default=lambda x: jax.lax.top_k(x, count)[1],
    )


def by_sort(score: Float[Array, " n"], count: int) -> Int32[Array, " count"]:
    """`largest` by a stable sort of everything."""
    places = jnp.arange(score.shape[0], dtype=jnp.int32)
    return jax.lax.sort((-score, places), num_keys=1, is_stable=True)[1][:count]
