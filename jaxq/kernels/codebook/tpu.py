"""Look-up tables on TPUs, in Pallas: weights are looked up in vector registers, then multiplied.

The ways to look up differ by generation, since registers are gathered from 8 rows of 32-bit numbers (v5) or 16
rows of 16-bit ones (v6), or not at all (v4). Where activations are bfloat16, tables are rounded to that, as in the
reference; for float32 everything is exact.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Integer

from jaxq.kernels.tpu import blocks, generations, words

#: Axes of the codes of one matrix.
AXES = 2
TOKENS = blocks.TOKENS

#: Inputs in one product of the matrix unit: decoded numbers that registers hold on the way.
DEEP = 64
#: Where a look-up gives a whole tile at once, the depth of the matrix unit.
DEEP_HALVES = 256


def unsupported(array: Any) -> str:
    """Why an array has no product on TPUs; empty if it has one."""
    return "" if array.format.bits <= 4 else "look-up tables on TPUs have 1 to 4 bits"


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """Words of codes (`tpu.words`; 3 bits take 4) and tables `(batch..., 2^bits, out)` in their own dtype.

    All targets have one layout. Inputs and outputs are filled up with zeros.
    """
    del target
    in_size, out_size = words.padded(*array.matrix_shape)
    codes = words.pad_matrix(codes, in_size, out_size)
    table = words.pad_matrix(array.table, array.table.shape[-2], out_size)
    return words.pack(codes, words.FIELD[array.format.bits]), table


def take(parts: tuple[Array, ...], ids: Integer[Array, " ids"]) -> tuple[tuple[Array, ...], int]:
    """(the parts of these outputs of one matrix, outputs that only fill up the last tile)."""
    return tuple(part[..., ids] for part in parts), 0


def restore(format: Any, parts: tuple[Array, ...], in_size: int) -> tuple[Array, Array]:
    """(codes, tables) of the canonical array, with the outputs that fill up the last tile."""
    packed, table = parts
    return words.unpack(packed, words.FIELD[format.bits])[..., :in_size, :], table


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out), with what fills up the last block."""
    return parts[0].shape[-2] * 32 // words.FIELD[format.bits], parts[0].shape[-1]


def product(x: Float[Array, "tokens in"], prepared: Any) -> Float[Array, "tokens out"]:
    packed, table = prepared.parts
    field = words.FIELD[prepared.format.bits]
    x = blocks.precise(x)
    in_size = packed.shape[-2] * 32 // field
    x = words.pad_matrix(x, x.shape[0], in_size)
    half = x.dtype == jnp.bfloat16
    if prepared.target == generations.V4:
        look_up, table = _select, table.astype(jnp.float32)
    elif prepared.target == generations.V6 and half:
        look_up, table = _gather_halves, _rows(table.astype(jnp.bfloat16), words.TILE)
    elif table.shape[-2] <= words.SUBLANES:
        look_up, table = _gather, _rows(table.astype(jnp.float32), words.SUBLANES)
    elif half:
        look_up, table = _gather_pairs, _pairs(table)
    else:
        look_up, table = _gather_twice, _rows(table.astype(jnp.float32), words.TILE)
    if look_up is _gather_halves:
        body = functools.partial(_body, look_up=look_up, field=field, deep=DEEP_HALVES)
    else:
        # Numbers of 32 bits come one half of the words after the other.
        x = x.reshape((-1, in_size // words.TILE, words.SUBLANES, 2)).swapaxes(-1, -2).reshape(x.shape)
        body = functools.partial(_body, look_up=_halves(look_up), field=field, deep=DEEP)
    return blocks.product(body, x, [(packed, 32 // field)], [table], _scratch)


def _scratch(rows: int, wide: int) -> list[Any]:
    return [pltpu.VMEM((rows, wide), jnp.float32)]


def _rows(table: Array, rows: int) -> Array:
    """`(entries, out)` filled up to so many rows, since a gather reads whole registers."""
    return words.pad_matrix(table, rows, table.shape[-1])


def _pairs(table: Float[Array, "entries out"]) -> Integer[Array, "8 out"]:
    """Entries i, above, and i + 8, below, in one word, as bfloat16.

    Read as a float32, a word is entry i with something behind it, which rounding to bfloat16 adds if it is half
    of a unit or more: then the upper half is stored one unit lower in magnitude.
    """
    rounded = _rows(table.astype(jnp.bfloat16), words.TILE)
    # Minus zero would lie exactly at the half of a unit.
    rounded = jnp.where(rounded == 0, jnp.bfloat16(0), rounded)
    whole = jax.lax.bitcast_convert_type(rounded, jnp.uint16).astype(jnp.uint32)
    above, below = whole[: words.SUBLANES], whole[words.SUBLANES :]
    # Zero has nothing below it: with a rest behind, it becomes the smallest positive number of all, or stays zero.
    down = (below >= 0x8000) & (above > 0)
    word = ((above - down) << 16) | below
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def _body(x, packed, table, out, total, *, look_up, field: int, deep: int) -> None:
    """One block: x `[tokens, deep]`, words `[rows, wide]`, the whole table of its outputs `[entries, wide]`."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    result, entries = total[...], table[...]
    for start in range(0, x.shape[1], deep):
        tiles = []
        for row in range(start, start + deep, words.TILE):
            first, shift = words.place(row, field)
            tiles.append(look_up(packed[first : first + words.SUBLANES, :], shift, field, entries))
        result = result + blocks.dot(x[:, start : start + deep], jnp.concatenate(tiles, axis=0))
    total[...] = result

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        out[...] = total[...]


def _halves(look_up):
    """A look-up of both halves of words, the lower one first."""

    def both(some: Array, shift: int, field: int, table: Array) -> Array:
        return jnp.concatenate([look_up(some, shift + half, field, table) for half in (0, 16)], axis=0)

    return both


def _gather_halves(some: Array, shift: int, field: int, table: Array) -> Array:
    """A tile of 16 rows by one gather from 16 rows of bfloat16."""
    mask = 2**field - 1
    codes = words.shifted(some, -shift) & jnp.int32(mask | mask << 16)
    return _take(table, pltpu.bitcast(codes, jnp.int16))


def _gather(some: Array, shift: int, field: int, table: Array) -> Array:
    """8 rows of float32, for up to 8 entries."""
    # A code of 3 bits in 4 is below 8 in any case.
    return _take(table, words.shifted(some, -shift) & min(2**field - 1, words.SUBLANES - 1))


def _gather_twice(some: Array, shift: int, field: int, table: Array) -> Array:
    """8 rows of float32, for 9 to 16 entries: from either half of the table."""
    codes = words.shifted(some, -shift) & (words.SUBLANES - 1)
    low, high = (_take(part, codes) for part in (table[: words.SUBLANES], table[words.SUBLANES :]))
    # The highest bit of the code as the sign of the word.
    return jnp.where(words.shifted(some, 32 - field - shift) < 0, high, low)


def _gather_pairs(some: Array, shift: int, field: int, table: Array) -> Array:
    """8 rows of bfloat16 values in float32, for 9 to 16 entries: one gather of words from `_pairs`."""
    pair = _take(table, words.shifted(some, -shift) & (words.SUBLANES - 1))
    # Bit 3 of the code, moved to stand for 16.
    lower = words.shifted(some, 1 - shift) & 16
    return jax.lax.bitcast_convert_type(pair << lower, jnp.float32)


def _select(some: Array, shift: int, field: int, table: Array) -> Array:
    """8 rows of float32 without a gather: one bit of the code after another halves the candidates."""
    candidates = [jnp.broadcast_to(table[row : row + 1, :], some.shape) for row in range(table.shape[0])]
    bit = 0
    while len(candidates) > 1:
        odd = words.shifted(some, 31 - bit - shift) < 0
        candidates = [jnp.where(odd, *pair) for pair in zip(candidates[1::2], candidates[::2], strict=True)]
        bit += 1
    return candidates[0]


def _take(table: Array, rows: Array) -> Array:
    """Column by column, the rows of the table. By `lax.gather`: NumPy's indexing would check and widen indices."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(1,),
    )
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(table, rows[..., None], numbers, slice_sizes=(1, 1), mode=mode)
