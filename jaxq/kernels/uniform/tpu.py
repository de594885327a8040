"""Uniform grids on TPUs, in Pallas: codes are multiplied as bfloat16, exactly, and scaled group by group."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.kernels.tpu import blocks, generations, integers, words
from jaxq.kernels.tpu.words import take as take

#: Axes of the codes of one matrix.
AXES = 2
TOKENS = blocks.TOKENS


def unsupported(array: Any) -> str:
    """Why an array has no product on TPUs; empty if it has one."""
    return integers.unsupported(array, "uniform grids on TPUs have 1 to 4 bits")


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """Codes, scales `(batch..., groups, out)` in float32, zero points of that shape in int32.

    Codes are words of them (`tpu.words`), or int4 where 4-bit integers convert in hardware; 3 bits take 4. Inputs
    and outputs are filled up with codes of zero under scales of zero.
    """
    in_size, out_size = words.padded(*array.matrix_shape)
    field = words.FIELD[array.format.bits]
    codes = words.pad_matrix(codes, in_size, out_size)
    if target == generations.V6 and field == 4:
        packed = (codes.astype(jnp.int8) - 8).astype(jnp.int4)
    else:
        packed = words.pack(codes, field)

    def columns(x: Array) -> Array:
        if array.format.group_size == "tensor":
            x = jnp.broadcast_to(x, (*x.shape[:-1], array.matrix_shape[1]))
        return words.pad_matrix(x, x.shape[-2], out_size)

    return packed, columns(array.scale.astype(jnp.float32)), columns(array.zero_point().astype(jnp.int32))


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array, Array]:
    """(codes, scales, zero points) of the canonical array, with the outputs that fill up the last tile."""
    del target  # The dtype of codes says it.
    packed, scale, zero = parts
    if packed.dtype == jnp.int4:
        codes = (packed.astype(jnp.int8) + 8).astype(jnp.uint8)
    else:
        codes = words.unpack(packed, words.FIELD[format.bits])
    channels = slice(0, 1) if format.group_size == "tensor" else slice(None)
    return codes[..., :in_size, :], scale[..., channels].astype(format.scale_dtype), zero[..., channels]


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out), with what fills up the last block."""
    packed = parts[0]
    per_row = 1 if packed.dtype == jnp.int4 else 32 // words.FIELD[format.bits]
    return packed.shape[-2] * per_row, packed.shape[-1]


def product(x: Float[Array, "tokens in"], prepared: Any) -> Float[Array, "tokens out"]:
    packed, scale, zero = prepared.parts
    group = prepared.format.rows_per_group(x.shape[-1])
    field = words.FIELD[prepared.format.bits]
    return integers.product(x, packed[None], scale[None], zero, group, field)
