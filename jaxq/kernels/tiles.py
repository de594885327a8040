"""Products a tile at a time, in plain XLA: only one tile of the weight is ever dense.

A dense weight that comes and goes with every call costs more than the product itself: a CPU's allocator hands
fresh pages out each time (at 4096 x 4096 some 16,000 page faults, twenty times the product's own time).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.kernels.dispatch import fits

#: Numbers in a dense tile: 1 MiB of float32, which stays in the second cache of most CPUs.
TILE = 2**18

#: Outputs in a tile at most; beyond, outputs are cut too.
COLUMNS = 8192

#: A dense weight up to this size is cheaper to make whole, and one product is simpler than a loop of them.
WHOLE = 2**18

#: Tokens from which a whole dense weight is cheaper than sums of so many outputs tile by tile.
TOKENS = 512


def product(x: Float[Array, "*tokens in"], array: Any) -> Float[Array, "*tokens out"]:
    """`x @ array` in the dtype of `x`, accumulated in float32.

    Reads `array.tile(row, rows, column, columns)`, that part of the dense matrix in float32, where `row` (a
    multiple of `array.tile_unit`) and `column` may be traced.
    """
    in_size, out_size = array.matrix_shape
    *tokens, _ = x.shape
    flat = x.reshape((-1, in_size))
    columns = min(out_size, COLUMNS)
    rows = rows_in_tile(in_size, columns, array.tile_unit)
    whole, rest = divmod(in_size, rows)

    def strip(column: jax.Array | int, columns: int) -> Array:
        def part(row: jax.Array | int, rows: int) -> Array:
            some = jax.lax.dynamic_slice_in_dim(flat, row, rows, axis=1).astype(jnp.float32)
            tile = array.tile(row, rows, column, columns)
            return jnp.matmul(some, tile, preferred_element_type=jnp.float32)

        # The sum starts from a product, so that it is sharded and varies over devices as the result does.
        start = part(whole * rows, rest) if rest else part(0, rows)
        first = 0 if rest else 1
        return jax.lax.fori_loop(first, whole, lambda tile, total: total + part(tile * rows, rows), start)

    y = strips(strip, out_size, columns)
    return y.astype(x.dtype).reshape((*tokens, out_size))


def strips(
    one: Callable[[jax.Array | int, int], Float[Array, "tokens columns"]], out_size: int, columns: int
) -> Float[Array, "tokens out"]:
    """All outputs from `one(column, columns)`, some at a time and one after the other, to bound what is held."""
    count = -(-out_size // columns)
    if count == 1:
        return one(0, out_size)
    # Strips of one size, the last of which may overlap the one before.
    columns = -(-out_size // count)
    y = jnp.pad(one(0, columns), ((0, 0), (0, out_size - columns)))

    def step(strip: jax.Array | int, y: Array) -> Array:
        column = jnp.minimum(strip * columns, out_size - columns)
        return jax.lax.dynamic_update_slice_in_dim(y, one(column, columns), column, axis=1)

    return jax.lax.fori_loop(1, count, step, y)


def rows_in_tile(in_size: int, columns: int, unit: int) -> int:
    """Inputs in a tile: a power of two times `unit`, the fewest inputs that can be decoded apart."""
    most = min(TILE // columns, in_size)
    return unit * 2 ** max((most // unit).bit_length() - 1, 0)


def worthwhile(x: Array, array: Any, tokens: int = TOKENS) -> bool:
    """Whether a product with `x` should go tile by tile, which up to so many tokens is faster."""
    in_size, out_size = array.matrix_shape
    large = in_size * out_size > WHOLE and x.size <= tokens * in_size
    return large and fits(x, array) and 0 < array.tile_unit <= in_size
