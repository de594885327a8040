"""Where the codes of look-up tables lie in words, for kernels of TPUs that look 8 rows up at once.

Code `k` of word `r` of a run of 8 is that of input `8 k + r`: once moved to the lower end, the codes of a word are
indices into a register. The fourth bit of a code chooses between two halves of a table, by a shift of 16 places if
it stands for 16; where it lies four places above the first one, one shift moves both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt8

from jaxq.kernels.tpu.words import SUBLANES

#: Bits of a code: for each code of a word, the place of its lower bits (next to each other).
LOW = {
    1: tuple(range(32)),
    2: tuple(range(0, 32, 2)),
    3: (0, 5, 10, 15, 20, 23, 26, 29),
    4: (0, 5, 10, 15, 20, 23, 26, 29),
}

#: The place of the fourth bit: four above the first one, or in the gaps that these leave.
HIGH = (4, 9, 14, 19, 3, 8, 13, 18)


def places(bits: int) -> list[tuple[int, ...]]:
    """For each code of a word, the places of its bits, the lowest first."""
    low = [tuple(range(first, first + min(bits, 3))) for first in LOW[bits]]
    return [(*some, high) for some, high in zip(low, HIGH, strict=True)] if bits == 4 else low


def pack(codes: UInt8[Array, "*batch in out"], bits: int) -> Int32[Array, "*batch words out"]:
    """Words of 32, 16, 8, 8 codes of 1, 2, 3, 4 bits, for a multiple of 8 times as many inputs."""
    *batch, in_size, out_size = codes.shape
    every = places(bits)
    runs = codes.astype(jnp.uint32).reshape((*batch, -1, len(every), SUBLANES, out_size))
    words = jnp.zeros((*batch, runs.shape[-4], SUBLANES, out_size), jnp.uint32)
    for code, own in enumerate(every):
        for bit, place in enumerate(own):
            words |= ((runs[..., code, :, :] >> bit) & 1) << place
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape((*batch, in_size // len(every), out_size))


def unpack(words: Int32[Array, "*batch words out"], bits: int) -> UInt8[Array, "*batch in out"]:
    """Undoes `pack`."""
    *batch, rows, out_size = words.shape
    runs = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape((*batch, -1, SUBLANES, out_size))
    codes = [
        sum((((runs >> place) & 1) << bit for bit, place in enumerate(own)), jnp.uint32(0)) for own in places(bits)
    ]
    return jnp.stack(codes, axis=-3).astype(jnp.uint8).reshape((*batch, rows * len(codes), out_size))
