"""Bit planes in C++ as codes by rows: the bits of a weight together, and a table of their sums for each group.

For floating activations: a vector holds such a table, and products of float32 are exact but for the order of
sums; with activations in bfloat16 tables are rounded to bfloat16 too, where the processor multiplies that. Sums of
integer activations looked up by bits (`native.py`) want another layout.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxq.kernels import native
from jaxq.kernels.native import call, lines
from jaxq.kernels.native.lines import sizes as sizes
from jaxq.kernels.native.lines import take as take

#: Axes of the first part of one matrix.
AXES = 2

#: Tokens up to which products are faster than XLA's with a dense weight, decoded for it.
TOKENS = lines.TOKENS

#: `prepare` takes and `restore` gives the bits of a weight together.
CODES = True

#: Bits whose table fits a vector, by instruction set. With NEON none: sums looked up by planes take fewer
#: instructions than values looked up by bytes.
BITS = {"avx512bf16": 4, "avx512": 4, "avx2": 3}

#: Activations that this layout is for.
ACTIVATIONS = ("float32", "bfloat16")


def faster(array: Any) -> bool:
    """Whether this layout is the better one here, for `ACTIVATIONS`."""
    in_size, _ = array.matrix_shape
    size = array.format.rows_per_group(in_size)
    return array.format.bits <= BITS.get(native.instruction_set(), 0) and (
        size >= in_size or size % lines.RUN == 0
    )


def unsupported(array: Any) -> str:
    """Why an array has no native product; empty if it has one."""
    del array  # Only what `faster` prefers comes here.
    return ""


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """Codes by rows `(batch..., out, bytes)`; scales, then offsets `(batch..., out, bits + 1, groups)`.

    Groups are filled up with zeros.
    """
    del target  # One layout for all processors.
    scale = jnp.concatenate([array.scale, array.offset[..., None, :, :]], axis=-3)
    scale = jnp.moveaxis(scale, -1, -3)
    return lines.pack(codes, array.format.bits), lines.pad_groups(scale)


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array, Array]:
    """(codes, scales, offsets) of the canonical array."""
    del target  # One layout for all processors.
    codes, scale = parts
    groups = -(-in_size // format.rows_per_group(in_size))
    scale = jnp.moveaxis(scale[..., :groups], -3, -1)
    return lines.unpack(codes, format.bits, in_size), scale[..., :-1, :, :], scale[..., -1, :, :]


def product(x: Float[Array, "tokens in"], prepared: Any) -> Float[Array, "tokens out"]:
    codes, scale = prepared.parts
    group_size = np.int64(prepared.format.rows_per_group(x.shape[-1]))
    bits = np.int32(prepared.format.bits)
    some = {"activations": prepared.activations, "out_size": codes.shape[-2]}
    return call("jaxq_levels", x, codes, scale, **some, bits=bits, group_size=group_size)
