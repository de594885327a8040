"""The order of codes in 32-bit words that the kernels of TPUs read.

Bfloat16 numbers lie in a register as pairs: rows 2i and 2i+1 are the halves of the words of row i. Codes of `bits`
bits fill both halves of a word, so that one mask takes a pair of rows out and what it leaves is, with an
exponent put in front, already a tile of 16 rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Integer, Shaped, UInt8

#: Rows of words in a register, and of bfloat16 numbers.
SUBLANES = 8
TILE = 2 * SUBLANES
LANES = 128

#: Bits of a code: bits that it takes. To join 3 of 2 + 1 would double the instructions that decode a uniform code.
FIELD = {1: 1, 2: 2, 3: 4, 4: 4}


def padded(in_size: int, out_size: int) -> tuple[int, int]:
    """(in, out) with what fills up the last block: whole words of one bit, and not many small blocks."""
    unit = 256 if in_size <= 512 else 512
    return -(-in_size // unit) * unit, -(-out_size // LANES) * LANES


def pad_matrix(x: Array, rows: int, columns: int) -> Array:
    """`(batch..., in, out)` with zeros behind, up to `(batch..., rows, columns)`."""
    padding = [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, columns - x.shape[-1])]
    return jnp.pad(x, padding)


def take(parts: tuple[Array, ...], ids: Integer[Array, " ids"]) -> tuple[tuple[Array, ...], int]:
    """(the parts of these outputs of one matrix, outputs that only fill up the last tile)."""
    return tuple(part[..., ids] for part in parts), 0


def pack(codes: UInt8[Array, "*batch in out"], field: int) -> Int32[Array, "*batch words out"]:
    """Words of 32 / `field` codes, for a multiple of 256 / `field` inputs.

    Word `r` of a run of 8 holds, in its half `h` from bit `field * s` on, the code of input `16 s + 2 r + h`.
    """
    *batch, in_size, out_size = codes.shape
    steps = 16 // field
    runs = codes.astype(jnp.uint32).reshape((*batch, in_size // (TILE * steps), steps, SUBLANES, 2, out_size))
    places = jnp.arange(steps, dtype=jnp.uint32)[:, None, None, None] * field
    halves = jnp.arange(2, dtype=jnp.uint32)[:, None] * 16
    words = jnp.sum(runs << (places + halves), axis=(-4, -2), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape((*batch, in_size * field // 32, out_size))


def unpack(words: Int32[Array, "*batch words out"], field: int) -> UInt8[Array, "*batch in out"]:
    """Undoes `pack`."""
    *batch, rows, out_size = words.shape
    steps = 16 // field
    runs = jax.lax.bitcast_convert_type(words, jnp.uint32)
    runs = runs.reshape((*batch, rows // SUBLANES, 1, SUBLANES, 1, out_size))
    places = jnp.arange(steps, dtype=jnp.uint32)[:, None, None, None] * field
    halves = jnp.arange(2, dtype=jnp.uint32)[:, None] * 16
    codes = (runs >> (places + halves)) & jnp.uint32(2**field - 1)
    return codes.astype(jnp.uint8).reshape((*batch, rows * 32 // field, out_size))


def place(row: int, field: int) -> tuple[int, int]:
    """(first row of words, shift within a half) of the tile of 16 inputs from `row` on."""
    run, rest = divmod(row, TILE * 16 // field)
    return run * SUBLANES, rest // TILE * field


def shifted(words: Int32[Array, "8 lanes"], places: int) -> Int32[Array, "8 lanes"]:
    """Words shifted up, or down (filled with zeros) if `places` is negative."""
    if places == 0:
        return words
    if places > 0:
        return words << places
    return jax.lax.shift_right_logical(words, jnp.int32(-places))


def in_pairs(words: Int32[Array, "8 lanes"], dtype: Any) -> Shaped[Array, "16 lanes"]:
    """Halves of words as a tile of 16-bit numbers, in a kernel."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.bitcast(words, dtype)
