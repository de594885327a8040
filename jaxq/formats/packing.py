"""Dense packing of small integers: a value of b bits takes b bits.

The values along axis -2 form one little-endian bit stream: value `i` occupies bits `[i*bits, (i+1)*bits)`,
bit `k` being bit `k % 32` of word `k // 32`. A value may straddle two words. This is the order of GPTQ
checkpoints.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

WORD = 32


def words_for(count: int, bits: int) -> int:
    """Words that hold `count` values."""
    return -(-count * bits // WORD)


def capacity_of(words: int, bits: int) -> int:
    """Values that fit in `words` words."""
    return words * WORD // bits


def _period(bits: int) -> tuple[int, int]:
    """(values, words) of the shortest run after which values and words start together again."""
    common = math.gcd(bits, WORD)
    return WORD // common, bits // common


def _pad_rows(x: Array, rows: int) -> Array:
    missing = rows - x.shape[-2]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else x


def pack(codes: UInt8[Array, "*batch n out"], bits: int) -> UInt32[Array, "*batch words out"]:
    """Packs codes below `2**bits` along axis -2 into `ceil(n * bits / 32)` words."""
    values, words = _period(bits)
    *batch, count, out = codes.shape
    periods = -(-count // values)
    runs = _pad_rows(codes, periods * values).astype(jnp.uint32).reshape((*batch, periods, values, out))
    packed = [jnp.zeros((*batch, periods, out), jnp.uint32) for _ in range(words)]
    for index in range(values):
        word, shift = divmod(index * bits, WORD)
        value = runs[..., index, :]
        packed[word] = packed[word] | (value << shift)
        if shift + bits > WORD:
            packed[word + 1] = packed[word + 1] | (value >> (WORD - shift))
    stream = jnp.stack(packed, axis=-2).reshape((*batch, periods * words, out))
    return stream[..., : words_for(count, bits), :]


def unpack(words: UInt32[Array, "*batch words out"], bits: int, n: int) -> UInt8[Array, "*batch n out"]:
    """The first `n` values of a stream made by `pack`."""
    values, period_words = _period(bits)
    *batch, count, out = words.shape
    periods = -(-count // period_words)
    runs = _pad_rows(words, periods * period_words).reshape((*batch, periods, period_words, out))
    mask = jnp.uint32(2**bits - 1)
    if period_words == 1:
        shifts = jnp.arange(values, dtype=jnp.uint32)[:, None] * bits
        unpacked = ((runs >> shifts) & mask).astype(jnp.uint8)
    else:
        unpacked = jnp.stack([_value(runs, index, bits, mask) for index in range(values)], axis=-2)
    return unpacked.reshape((*batch, periods * values, out))[..., :n, :]


def _value(runs: Array, index: int, bits: int, mask: Array) -> Array:
    word, shift = divmod(index * bits, WORD)
    value = runs[..., word, :] >> shift
    if shift + bits > WORD:
        value = value | (runs[..., word + 1, :] << (WORD - shift))
    return (value & mask).astype(jnp.uint8)
