"""Dense packing of small integers: a value of b bits takes b bits.

The values along axis -2 form one little-endian bit stream: value `i` occupies bits `[i*bits, (i+1)*bits)`,
bit `k` being bit `k % 32` of word `k // 32`. A value may straddle two words. This is the order of GPTQ
checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt8, UInt32

WORD = 32

#: Values that `strided` takes at a time: whole words, whatever the bits.
PART = 32


def words_for(count: int, bits: int) -> int:
    """Words that hold `count` values."""
    return -(-count * bits // WORD)


def capacity_of(words: int, bits: int) -> int:
    """Values that fit in `words` words."""
    return words * WORD // bits


def whole_words(bits: int) -> int:
    """The fewest values that end with a word."""
    return WORD // math.gcd(bits, WORD)


def _period(bits: int) -> tuple[int, int]:
    """(values, words) of the shortest run after which values and words start together again."""
    values = whole_words(bits)
    return values, values * bits // WORD


def slice_words(
    words: UInt32[Array, "*batch words out"], bits: int, row: Any, rows: int, column: Any, columns: int
) -> UInt32[Array, "*batch some columns"]:
    """The words of values `row` to `row + rows` of some columns; `row` is a multiple of `whole_words(bits)`."""
    words = jax.lax.dynamic_slice_in_dim(words, row * bits // WORD, words_for(rows, bits), axis=words.ndim - 2)
    return jax.lax.dynamic_slice_in_dim(words, column, columns, axis=words.ndim - 1)


def strided(
    words: UInt32[Array, "words out"], bits: int, blocks: int, part: jax.Array | int
) -> Iterator[Int32[Array, "blocks 1 out"]]:
    """The values of one of the parts of `PART` values that make a block: one after the other, in all blocks."""
    rows = _strided_words(words, bits, blocks, part)
    for place in range(0, PART * bits, bits):
        word, byte, shift = place // WORD, place % WORD // 8, place % 8
        code = rows(word, byte) >> np.uint32(shift)
        if place % WORD + bits > WORD:
            code = code | rows(word + 1, 0) << np.uint32(WORD - place % WORD)
        yield (code & np.uint32(2**bits - 1)).astype(jnp.int32)


def strided_bits(
    words: UInt32[Array, "words out"], bits: int, blocks: int, part: jax.Array | int
) -> Iterator[list[Bool[Array, "blocks 1 out"]]]:
    """The bits of these values, lowest first."""
    rows = _strided_words(words, bits, blocks, part)

    def bit(place: int) -> Array:
        return rows(place // WORD, place % WORD // 8) & np.uint32(1 << place % 8) != 0

    for value in range(0, PART * bits, bits):
        yield [bit(place) for place in range(value, value + bits)]


def _strided_words(
    words: Array, bits: int, blocks: int, part: jax.Array | int
) -> Callable[[int, int], UInt32[Array, "blocks 1 out"]]:
    """Gives one of the words of a part, from one of its bytes up."""
    runs = words.reshape((blocks, -1, words.shape[-1]))

    # XLA stores what has more than some 15 users instead of reading it where it is used: hence bytes.
    @functools.cache
    def rows(word: int, byte: int) -> Array:
        if byte:
            return rows(word, 0) >> np.uint32(8 * byte)
        # Each row by itself: what several slices share would be read by an index that is read again each time.
        return jax.lax.dynamic_index_in_dim(runs, part * bits + word, axis=1)

    return rows


def _pad_rows(x: Array, rows: int) -> Array:
    missing = rows - x.shape[-2]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else x


def pack(codes: UInt8[Array, "*batch n out"], bits: int) -> UInt32[Array, "*batch words out"]:
    """Packs codes below `2**bits` along axis -2 into `ceil(n * bits / 32)` words."""
    values, words = _period(bits)
    *batch, count, out = codes.shape
    periods = -(-count // values)
    runs = _pad_rows(codes, periods * values).astype(jnp.uint32).reshape((*batch, periods, 1, values, out))
    # Distance of each value's first bit from the first bit of each word; no two values share a bit, so
    # adding them up joins them.
    offset = np.arange(values) * bits - WORD * np.arange(words)[:, None]
    inside = (offset > -bits) & (offset < WORD)
    up, down = (
        jnp.asarray(np.where(inside, np.maximum(o, 0), 0), jnp.uint32)[..., None] for o in (offset, -offset)
    )
    parts = jnp.where(jnp.asarray(inside)[..., None], (runs << up) >> down, jnp.uint32(0))
    stream = jnp.sum(parts, axis=-2, dtype=jnp.uint32).reshape((*batch, periods * words, out))
    return stream[..., : words_for(count, bits), :]


def unpack(words: UInt32[Array, "*batch words out"], bits: int, n: int) -> UInt8[Array, "*batch n out"]:
    """The first `n` values of a stream made by `pack`."""
    values, period_words = _period(bits)
    *batch, count, out = words.shape
    periods = -(-count // period_words)
    runs = _pad_rows(words, periods * period_words).reshape((*batch, periods, period_words, out))
    # The word in which each value starts and the one in which it ends. Indexing by constants, where unrolling
    # over the values would take seconds to compile for each shape.
    start = np.arange(values) * bits
    first, shift = start // WORD, start % WORD
    crosses = shift + bits > WORD
    # Where no value crosses into another word there is but one word to read, and no look-up.
    low = (runs if period_words == 1 else runs[..., first, :]) >> jnp.asarray(shift, jnp.uint32)[:, None]
    if crosses.any():
        last = np.where(crosses, first + 1, first)
        high = runs[..., last, :] << jnp.asarray(np.where(crosses, WORD - shift, 0), jnp.uint32)[:, None]
        low = jnp.where(jnp.asarray(crosses)[:, None], low | high, low)
    unpacked = (low & jnp.uint32(2**bits - 1)).astype(jnp.uint8)
    return unpacked.reshape((*batch, periods * values, out))[..., :n, :]
