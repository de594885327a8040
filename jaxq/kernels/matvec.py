"""Products of one token, in plain XLA, which never stores a decoded weight: see `formats/blocks.py`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from jaxq.formats.packing import PART
from jaxq.kernels import tiles
from jaxq.kernels.dispatch import Implementation, vary_as

#: Sums of blocks, at most: 1 MiB.
SUMS = 2**18


def worthwhile(x: Array, array: Any) -> bool:
    """Whether `x` is one token for a large matrix that can be cut into blocks."""
    return x.size == array.matrix_shape[0] and tiles.worthwhile(x, array) and _parts(array) > 0


def _parts(array: Any) -> int:
    """Parts in a block: the fewest, but at least two, that leave at most `SUMS`; 0 if the array has none such."""
    in_size, out_size = array.matrix_shape
    whole, rest = divmod(in_size, PART)
    least = max(2, -(-whole * out_size // SUMS))
    fits = (parts for parts in range(least, whole + 1) if whole % parts == 0 and array.has_blocks(parts))
    return 0 if rest else next(fits, 0)


def product(x: Float[Array, "*one in"], array: Any) -> Float[Array, "*one out"]:
    """`x @ array` in the dtype of `x`, accumulated in float32."""
    in_size, out_size = array.matrix_shape
    parts = _parts(array)
    inputs = x.reshape((-1, parts, PART)).astype(jnp.float32)
    ones = jnp.ones(len(inputs), jnp.float32)

    # Two parts at least, since a loop around it makes XLA store a slice of a stack of weights, which it would else
    # decode without vectors.
    def add(part: jax.Array | int, y: Float[Array, " out"]) -> Float[Array, " out"]:
        # Tied to what changes, or XLA would decode before this loop, and those around it, what it can.
        part, own = jax.lax.optimization_barrier((part, array))
        some = jax.lax.dynamic_index_in_dim(inputs, part, axis=1, keepdims=False)
        # As a product: a reduction would take what it adds up apart.
        return y + ones @ own.block_sums(some, part)[:, 0]

    zeros = vary_as(jnp.zeros(out_size, jnp.float32), x, *jax.tree.leaves(array))
    y = jax.lax.fori_loop(0, parts, add, zeros)
    return y.astype(x.dtype).reshape((*x.shape[:-1], out_size))


@functools.cache
def unless_mapped(many: Implementation) -> Implementation:
    """`product`, or `many` where `jax.vmap` makes many tokens of one: it would decode for each of them."""
    one = custom_vmap(product)

    @one.def_vmap
    def _(size: int, batched: Any, x: Array, array: Any) -> tuple[Array, bool]:
        del size
        return jax.vmap(many, jax.tree.map(lambda axis: 0 if axis else None, tuple(batched)))(x, array), True

    return one
