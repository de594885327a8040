"""Uniform grids in C++: integer products of codes and activations, or floats where those are faster.

Activations become integers of one to three bytes, with a unit for each group of inputs. Three bytes lose no more
than float32 sums do; one byte is the usual dynamic 8-bit activation, for those who allow it. Activations in
bfloat16 are multiplied by codes less their zero point, which bfloat16 holds exactly; a group's sum is scaled.
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
    if array.format.bits > 4:
        return "native uniform grids have 1 to 4 bits"
    in_size, _ = array.matrix_shape
    size = array.format.rows_per_group(in_size)
    return "" if size >= in_size or size % lines.RUN == 0 else f"groups are not multiples of {lines.RUN}"


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """(codes by rows `(batch..., out, bytes)`, scales and zero points by rows `(batch..., out, groups)`).

    Groups are filled up with zeros.
    """
    del target  # One layout for all processors.
    _, out_size = array.matrix_shape

    def rows(x: Array) -> Array:
        if array.format.group_size == "tensor":
            x = jnp.broadcast_to(x, (*x.shape[:-1], out_size))
        return lines.pad_groups(jnp.swapaxes(x, -1, -2))

    return lines.pack(codes, array.format.bits), rows(array.scale), rows(array.zero_point().astype(jnp.uint8))


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array, Array]:
    """(codes, scales, zero points) of the canonical array."""
    del target  # One layout for all processors.
    codes, scale, zero = parts
    groups = -(-in_size // format.rows_per_group(in_size))
    channels = slice(0, 1) if format.group_size == "tensor" else slice(None)
    scale, zero = (jnp.swapaxes(x[..., channels, :groups], -1, -2) for x in (scale, zero))
    return lines.unpack(codes, format.bits, in_size), scale, zero


def product(x: Float[Array, "tokens in"], prepared: Any) -> Float[Array, "tokens out"]:
    format = prepared.format
    attributes = {
        "bits": np.int32(format.bits),
        "group_size": np.int64(format.rows_per_group(x.shape[-1])),
        "digits": np.int32(lines.DIGITS[prepared.activations]),
        "activations": prepared.activations,
    }
    return call("jaxq_uniform", x, *prepared.parts, out_size=prepared.parts[0].shape[-2], **attributes)
