"""Bit planes in C++: four bits of a plane look up the sum of four activations.

The method of T-MAC (Wei et al. 2025, arXiv 2407.00088).

The tables of sums are made for each call and shared by all rows and planes; a byte shuffle looks 16 or more rows
up at once. Sums are integers of one to three bytes, with a unit for each group of inputs: three bytes lose no more
than float32 sums do, one byte is what T-MAC does. Where there are many tokens, tiles are decoded to floats
instead.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxq.kernels.native import call, lines

TILE = 64

#: Tokens up to which tables are faster than decoding, by bytes of a sum.
TABLE_TOKENS = {1: 24, 2: 16, 3: 10}

#: Axes of the first part of one matrix.
AXES = 4

#: `prepare` takes and `restore` gives words of planes.
CODES = False

#: Tokens up to which products are faster than XLA's with a dense weight, decoded for it.
TOKENS = lines.TOKENS


def unsupported(array: Any) -> str:
    """Why an array has no native product; empty if it has one."""
    in_size, _ = array.matrix_shape
    size = array.format.rows_per_group(in_size)
    return "" if size >= in_size or size % 8 == 0 else "groups are not multiples of 8"


def prepare(array: Any, words: Array, target: str) -> tuple[Array, ...]:
    """Planes `(batch..., tiles, bits, bytes, 64)`; scales, then offsets `(batch..., tiles, groups, bits + 1, 64)`.

    A tile is 64 outputs, a byte eight inputs.
    """
    del target  # One layout for all processors.
    in_size, out_size = array.matrix_shape
    tiles, pairs = -(-out_size // TILE), -(-in_size // 8)
    # A word holds 32 inputs of a column: four bytes of eight inputs.
    pieces = jnp.stack([(words >> (8 * piece)).astype(jnp.uint8) for piece in range(4)], axis=-2)
    pieces = pieces.reshape((*words.shape[:-2], -1, out_size))[..., :pairs, :]
    scale = jnp.concatenate([array.scale, array.offset[..., None, :, :]], axis=-3)

    def tiled(x: Array) -> Array:
        """`(batch..., planes, rows, out)` to `(batch..., tiles, planes, rows, 64)`."""
        x = lines.pad_to(x, tiles * TILE, -1)
        return jnp.moveaxis(x.reshape((*x.shape[:-1], tiles, TILE)), -2, -4)

    return tiled(pieces), jnp.swapaxes(tiled(scale), -2, -3)


def take(parts: tuple[Array, ...], ids: Integer[Array, " ids"]) -> tuple[tuple[Array, ...], int]:
    """(the parts of these outputs of one matrix, outputs that only fill up the last tile)."""
    tiles = -(-ids.size // TILE)
    out_pad = tiles * TILE - ids.size
    ids = lines.pad_to(ids, tiles * TILE, -1)

    def some(x: Array) -> Array:
        rows = x[ids // TILE, :, :, ids % TILE]
        return jnp.moveaxis(rows.reshape((tiles, TILE, *rows.shape[1:])), 1, -1)

    return tuple(some(part) for part in parts), out_pad


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array, Array]:
    """(words of planes, scales, offsets) of the canonical array, with the outputs that fill up the last tile."""
    del target  # One layout for all processors.

    def whole(x: Array) -> Array:
        x = jnp.moveaxis(x, -4, -2)
        return x.reshape((*x.shape[:-2], -1))

    pieces, scale = whole(parts[0]), whole(jnp.swapaxes(parts[1], -2, -3))
    count = -(-in_size // 32)
    pieces = lines.pad_to(pieces, count * 4, -2)
    pieces = pieces.reshape((*pieces.shape[:-2], count, 4, pieces.shape[-1])).astype(jnp.uint32)
    words = sum((pieces[..., piece, :] << (8 * piece) for piece in range(4)), jnp.uint32(0))
    return jnp.asarray(words), scale[..., :-1, :, :], scale[..., -1, :, :]


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out), with what fills up the last byte and the last tile."""
    tiles, _, pairs, tile = parts[0].shape[-4:]
    return pairs * 8, tiles * tile


def product(x: Float[Array, "tokens in"], prepared: Any) -> Float[Array, "tokens out"]:
    digits, (in_size, out_size) = lines.DIGITS[prepared.activations], prepared.matrix_shape
    attributes = {
        "group_size": np.int64(prepared.format.rows_per_group(in_size)),
        "digits": np.int32(digits),
        "table_tokens": np.int64(TABLE_TOKENS[digits]),
    }
    some = {"activations": prepared.activations, "out_size": out_size}
    return call("jaxq_bitplane", x, *prepared.parts, **some, **attributes)
