"""Random masks, many elements from one random word."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

#: Binary digits of a probability, up to which words are cheaper than a number for each element.
DIGITS = 8
WORD = 32


def bernoulli(
    key: Key[Array, ""], probability: float | Float[Array, ""], shape: Sequence[int]
) -> Bool[Array, "*shape"]:
    """True for each element on its own with the given probability, which is exact.

    As `jax.random.bernoulli`, but for a number of a few binary digits, such as 0.5 or 0.375, of random words whose
    every bit is an element: a generator's word costs more than all else that is done to an element.
    """
    if not isinstance(probability, (int, float)) or (probability * 2**DIGITS) % 1:
        return jax.random.bernoulli(key, probability, tuple(shape))
    if probability in (0, 1):
        return jnp.full(shape, bool(probability))
    digits = f"{int(probability * 2**DIGITS):0{DIGITS}b}".rstrip("0")
    count = math.prod(shape)
    words = jax.random.bits(key, (len(digits), -(-count // WORD)), jnp.uint32)
    # From the last digit to the first, halve the probability so far, and add a half for a 1.
    drawn = jnp.zeros_like(words[0])
    for digit, word in zip(reversed(digits), words, strict=True):
        drawn = drawn | word if digit == "1" else drawn & word
    bits = drawn[:, None] >> jnp.arange(WORD, dtype=jnp.uint32) & 1
    return (bits.reshape(-1)[:count] == 1).reshape(shape)
