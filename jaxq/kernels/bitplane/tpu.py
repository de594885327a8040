"""Bit planes on TPUs, in Pallas: each plane goes through the matrix unit as ones and one-and-a-halfs.

Planes are scaled and added after they are multiplied, not before: another pass through the matrix unit takes less
than the vector instructions that would add planes up to weights.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxq.kernels.tpu import blocks, integers, words
from jaxq.kernels.tpu.words import take as take

#: Axes of the planes of one matrix.
AXES = 3

#: `prepare` takes and `restore` gives words of planes.
CODES = False
TOKENS = blocks.TOKENS

#: Where the bits of a canonical word lie.
_PLACES = np.arange(32, dtype=np.uint32)[:, None]


def unsupported(array: Any) -> str:
    """Why an array has no product on TPUs; empty if it has one."""
    return integers.unsupported(array, "there are 1 to 4 bit planes on TPUs")


def prepare(array: Any, planes: Array, target: str) -> tuple[Array, ...]:
    """Planes `(batch..., bits, in / 32, out)` of words (`tpu.words`), scales and offsets in float32.

    Takes canonical words. All targets have one layout. Inputs and outputs are filled up with zeros.
    """
    del target
    in_size, out_size = words.padded(*array.matrix_shape)
    bits = (planes[..., :, None, :] >> _PLACES) & 1
    bits = bits.astype(jnp.uint8).reshape((*planes.shape[:-2], -1, planes.shape[-1]))

    def columns(x: Array) -> Array:
        return words.pad_matrix(x.astype(jnp.float32), x.shape[-2], out_size)

    packed = words.pack(words.pad_matrix(bits, in_size, out_size), 1)
    return packed, columns(array.scale), columns(array.offset)


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array, Array]:
    """(words of planes, scales, offsets) of the canonical array, with the outputs that fill up the last tile."""
    del target  # One layout for all generations.
    packed, scale, offset = parts
    count = -(-in_size // 32)
    bits = words.unpack(packed, 1)[..., : count * 32, :].astype(jnp.uint32)
    bits = bits.reshape((*packed.shape[:-2], count, 32, packed.shape[-1]))
    planes = jnp.sum(bits << _PLACES, axis=-2, dtype=jnp.uint32)
    return planes, scale.astype(format.scale_dtype), offset.astype(format.scale_dtype)


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out), with what fills up the last block."""
    return parts[0].shape[-2] * 32, parts[0].shape[-1]


def product(x: Float[Array, "tokens in"], prepared: Any) -> Float[Array, "tokens out"]:
    planes, scale, offset = prepared.parts
    group = prepared.format.rows_per_group(x.shape[-1])
    return integers.product(x, planes, scale, offset, group, 1)
