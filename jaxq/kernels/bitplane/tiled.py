"""Plane by plane in plain XLA: `y = sum_j scale_j * (x @ plane_j) + offset * sum(x)`, group by group.

A bit is not shifted down but masked in place and converted, which gives a power of two; the activations are
divided by it beforehand, exactly. One product for each plane instead of one for their sum: XLA's loops over
several planes at once run ten times slower.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxq.kernels import tiles

WORD = 32
#: The values of the bits of a word as a signed number: the last one is negative.
PLACES = np.left_shift(np.uint32(1), np.arange(WORD, dtype=np.uint32)).view(np.int32)

#: Tokens up to which products plane by plane gain; 128 take four times as long as with a dense weight.
TOKENS = 16

#: Numbers in the tile of one plane, and outputs at a time: XLA may keep the tiles of all planes.
TILE = 2**17
COLUMNS = 4096


def fits(array: Any) -> bool:
    """Whether groups end with whole words."""
    in_size, _ = array.matrix_shape
    group = array.format.rows_per_group(in_size)
    return in_size % WORD == 0 and (group >= in_size or group % WORD == 0)


def product(x: Float[Array, "*tokens in"], array: Any) -> Float[Array, "*tokens out"]:
    """`x @ array` in the dtype of `x`, accumulated in float32; for arrays that `fits` says."""
    *tokens, _ = x.shape
    in_size, out_size = array.matrix_shape
    group = min(array.format.rows_per_group(in_size), in_size)
    columns = min(out_size, COLUMNS)
    words = _words_in_tile(group, in_size, columns)
    rows = words * WORD
    flat = x.reshape((-1, in_size)).astype(jnp.float32)
    scaled = (flat.reshape((-1, WORD)) / PLACES.astype(np.float32)).reshape(flat.shape)

    def strip(column: jax.Array | int, columns: int) -> Array:
        def slice_of(z: Array, start: jax.Array | int, size: int) -> Array:
            return jax.lax.dynamic_slice(z, (start, column), (size, columns))

        def part(tile: jax.Array | int) -> Array:
            xs, ss = (jax.lax.dynamic_slice_in_dim(z, tile * rows, rows, axis=1) for z in (flat, scaled))
            at = tile * rows // group
            total = jnp.sum(xs, axis=1, keepdims=True) * slice_of(array.offset, at, 1).astype(jnp.float32)
            for plane in range(array.format.bits):
                some = jax.lax.bitcast_convert_type(slice_of(array.planes[plane], tile * words, words), jnp.int32)
                bits = (some[:, None, :] & PLACES[:, None]).astype(jnp.float32).reshape((rows, columns))
                sums = jnp.matmul(ss, bits, preferred_element_type=jnp.float32)
                total = total + sums * slice_of(array.scale[plane], at, 1).astype(jnp.float32)
            return total

        return jax.lax.fori_loop(1, in_size // rows, lambda tile, total: total + part(tile), part(0))

    return tiles.strips(strip, out_size, columns).astype(x.dtype).reshape((*tokens, out_size))


def _words_in_tile(group: int, in_size: int, columns: int) -> int:
    """Words that divide those of a group, and so all of them unless the last group is shorter."""
    whole = math.gcd(group, in_size) // WORD
    most = max(TILE // columns // WORD, 1)
    return max(words for words in range(1, min(whole, most) + 1) if whole % words == 0)
