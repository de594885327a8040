"""Products with small integers that are scaled group by group: uniform grids, and planes of one bit.

A code becomes a bfloat16 number by a mask and an exponent, `1 + code / 2^field`, two of them with one instruction
each; the matrix unit multiplies these, exactly, and scales and what was added are accounted for after each group:
the zero point and the 1 meet the sum of the group's activations.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxq.kernels.tpu import blocks, words

#: Two bfloat16 ones, and the bits of their fractions.
ONES = 0x3F803F80
FRACTION = 7

#: Inputs in one product of the matrix unit, where no group ends before.
DEEP = 256

#: Groups are whole multiples of this.
GROUP = 64


def unsupported(array: Any, more_bits: str) -> str:
    """Why an array has no product here; empty if it has one. `more_bits` is what to say of more than 4."""
    if array.format.bits > 4:
        return more_bits
    in_size, _ = array.matrix_shape
    size = array.format.rows_per_group(in_size)
    return "" if size >= in_size or size % GROUP == 0 else f"groups are not multiples of {GROUP}"


def product(
    x: Float[Array, "tokens in"],
    codes: Int[Array, "planes rows out"],
    scale: Float[Array, "planes groups out"],
    base: Array,
    group: int,
    field: int,
) -> Float[Array, "tokens out"]:
    """`x @ w` in float32, `w = base + sum_j scale_j * code_j`, or `scale * (code - base)` of one plane.

    Args:
        x: bfloat16 or float32.
        codes: words of `field` bits a code (int32), or 4-bit integers that are 8 less than the code (int4).
        scale: float32, a row for each group of `group` inputs.
        base: `(groups, out)`: int32 zero points of one plane, or a float32 offset.
        group: inputs in a group, a multiple of 64; or all.
        field: bits of a code in a word.
    """
    packed = codes.dtype == jnp.int32
    per_row = 32 // field if packed else 1
    planes, groups, _ = scale.shape
    # Scales of a single group wait for the last block.
    late = groups == 1
    group = group if groups > 1 else codes.shape[-2] * per_row
    body = functools.partial(_body, group=group, late=late, field=field if packed else 0)

    def scratch(rows: int, wide: int) -> list[tuple[int, ...]]:
        return [(planes if late else 1, rows, wide), (rows, words.LANES)]

    return blocks.product(body, blocks.precise(x), [(codes, per_row)], [scale, base], scratch)


def _body(x, codes, scale, base, out, total, sums, *, group: int, late: bool, field: int) -> None:
    """One block: x `[tokens, deep]`, codes `[planes, rows, wide]`, scale `[planes, groups, wide]`.

    `total` `[1, tokens, wide]` is the result so far, or if scales are `late` `[planes, tokens, wide]`, the sums of
    products without them; `sums` is then, in all its lanes, what the activations add up to.
    """
    from jax.experimental import pallas as pl

    step, deep = pl.program_id(1), x.shape[1]
    size = blocks.chunk(group, deep, DEEP)
    gain, bias = (2**field, 2**field) if field else (1, -8)
    planes = codes.shape[0]

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def levels(row: Any) -> tuple[list[Array], Array]:
        """(what sums of products of each plane, what sums of activations of a group are multiplied by)."""
        rows = [scale[plane, pl.ds(row, 1), :] for plane in range(planes)]
        level = base[pl.ds(row, 1), :]
        if base.dtype == jnp.int32:
            level = -rows[0] * level.astype(jnp.float32)
        # Single rows are cheap: all that is known before meets them, not the sums of products.
        return [gain * some for some in rows], level - bias * sum(rows)

    if late:
        # All at once: a sum across lanes for each product is some bundles more.
        sums[...] += jnp.sum(x[...].astype(jnp.float32), axis=1, keepdims=True)

    results = [total[plane] for plane in range(total.shape[0])]
    for start in range(0, deep, size):
        some = x[:, start : start + size]
        parts = (blocks.dot(some, _values(codes, plane, start, size, field)) for plane in range(planes))
        if late:
            results = [result + part for result, part in zip(results, parts, strict=True)]
            continue
        # Not `//`, which asks what device there is, to round negative numbers. What fills up the last block
        # belongs to no group: its activations are zero.
        row = jnp.minimum(jax.lax.div(step * deep + start, group), scale.shape[1] - 1)
        factors, level = levels(row)
        own = jnp.sum(some.astype(jnp.float32), axis=1, keepdims=True)
        for factor, part in zip(factors, parts, strict=True):
            results[0] = results[0] + factor * part
        results[0] = results[0] + level * own
    for plane, result in enumerate(results):
        total[plane] = result

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        if not late:
            out[...] = total[0]
            return
        factors, level = levels(0)
        weighted = (factor * total[plane] for plane, factor in enumerate(factors))
        out[...] = sum(weighted, level * sums[:, :1])


def _values(codes, plane: int, start: int, size: int, field: int) -> Array:
    """`[size, wide]` bfloat16: 1 + code / 2^field, or 4-bit integers as they are."""
    if not field:
        return codes[plane, start : start + size, :].astype(jnp.bfloat16)
    mask = (2**field - 1) << (FRACTION - field)
    tiles = []
    for row in range(start, start + size, words.TILE):
        first, shift = words.place(row, field)
        some = words.shifted(codes[plane, first : first + words.SUBLANES, :], FRACTION - field - shift)
        tiles.append(words.in_pairs(some & jnp.int32(mask | mask << 16) | jnp.int32(ONES), jnp.bfloat16))
    return jnp.concatenate(tiles, axis=0)
