"""Look-up tables in C++: a vector holds the table, or byte shuffles find the bytes of its values.

Products are of floats: exact but for the order of sums, whatever the dtype of the tables. With activations in
bfloat16 tables are rounded to bfloat16 too, where the processor multiplies that.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxq.kernels.native import call, lines
from jaxq.kernels.native.lines import sizes as sizes
from jaxq.kernels.native.lines import take as take

#: Axes of the first part of one matrix.
AXES = 2

#: Tokens up to which products are faster than XLA's with a dense weight, decoded for it.
TOKENS = lines.TOKENS


def unsupported(array: Any) -> str:
    """Why an array has no native product; empty if it has one."""
    in_size, _ = array.matrix_shape
    size = array.format.rows_per_group(in_size)
    if size < in_size and size % lines.RUN:
        return f"native look-up tables have groups of a multiple of {lines.RUN} inputs"
    return "" if array.format.bits <= 4 else "native look-up tables have 1 to 4 bits"


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """(codes by rows `(batch..., out, bytes)`, tables by rows `(batch..., out, groups * 2^bits)`)."""
    del target  # One layout for all processors.
    return lines.pack(codes, array.format.bits), jnp.swapaxes(array.table, -1, -2)


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array]:
    """(codes, tables) of the canonical array."""
    del target  # One layout for all processors.
    rows, table = parts
    return lines.unpack(rows, format.bits, in_size), jnp.swapaxes(table, -1, -2)


def product(x: Float[Array, "tokens in"], prepared: Any) -> Float[Array, "tokens out"]:
    rows, table = prepared.parts
    group_size = np.int64(prepared.format.rows_per_group(x.shape[-1]))
    some = {"activations": prepared.activations, "out_size": rows.shape[-2]}
    return call(
        "jaxq_codebook", x, rows, table, **some, bits=np.int32(prepared.format.bits), group_size=group_size
    )
