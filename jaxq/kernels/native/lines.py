"""Codes in the order that the native products read; `src/kernels.h` describes it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

RUN = 64

#: Tokens up to which the kernels are faster than XLA's product with a dense weight, decoded for it.
TOKENS = 512

#: What activations may be rounded to, and the bytes that stand for one where products are of integers.
DIGITS = {"float32": 3, "bfloat16": 3, "int16": 2, "int8": 1}

#: Groups of a row are stored up to a multiple of this.
GROUPS = 16

#: Bits of a code: in how many runs they fill whole lines.
RUNS = {1: 8, 2: 4, 3: 8, 4: 2}

#: Bits of a code: bytes that these runs take.
BLOCK = {1: 64, 2: 64, 3: 192, 4: 64}


def inputs_in(row_bytes: int, bits: int) -> int:
    """Inputs that a row of so many bytes has room for."""
    return row_bytes // BLOCK[bits] * RUNS[bits] * RUN


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out) of parts that begin with rows made by `pack`, with what fills up the last block."""
    return inputs_in(parts[0].shape[-1], format.bits), parts[0].shape[-2]


def take(parts: tuple[Array, ...], ids: Integer[Array, " ids"]) -> tuple[tuple[Array, ...], int]:
    """(the parts, all by rows, of these outputs of one matrix, outputs that only fill up the last tile)."""
    return tuple(part[ids] for part in parts), 0


def pack(codes: UInt8[Array, "*batch in out"], bits: int) -> UInt8[Array, "*batch out bytes"]:
    """Rows of whole blocks; codes of zero fill up the last one."""
    *batch, in_size, out_size = codes.shape
    runs = RUNS[bits]
    blocks = -(-in_size // (runs * RUN))
    padding = [(0, 0)] * len(batch) + [(0, 0), (0, blocks * runs * RUN - in_size)]
    rows = jnp.pad(jnp.swapaxes(codes, -1, -2), padding).reshape((*batch, out_size, blocks, runs, RUN))
    if bits == 3:
        low = [_line(rows[..., part : part + 4, :] & 3, 2) for part in (0, 4)]
        lines = jnp.stack([*low, _line(rows >> 2, 1)], axis=-2)
    else:
        lines = _line(rows, bits)
    return lines.reshape((*batch, out_size, -1))


def unpack(rows: UInt8[Array, "*batch out bytes"], bits: int, in_size: int) -> UInt8[Array, "*batch in out"]:
    """The first `in_size` codes of rows made by `pack`."""
    *batch, out_size, _ = rows.shape
    lines = rows.reshape((*batch, out_size, -1, BLOCK[bits] // RUN, RUN))
    if bits == 3:
        low = jnp.concatenate([_runs(lines[..., part, :], 2) for part in (0, 1)], axis=-2)
        codes = low | (_runs(lines[..., 2, :], 1) << 2)
    else:
        codes = _runs(lines[..., 0, :], bits)
    return jnp.swapaxes(codes.reshape((*batch, out_size, -1))[..., :in_size], -1, -2)


def _line(runs: UInt8[Array, "*batch runs 64"], bits: int) -> UInt8[Array, "*batch 64"]:
    line = runs[..., 0, :]
    for run in range(1, runs.shape[-2]):
        line = line | (runs[..., run, :] << (bits * run))
    return line


def _runs(line: UInt8[Array, "*batch 64"], bits: int) -> UInt8[Array, "*batch runs 64"]:
    return jnp.stack([(line >> (bits * run)) & (2**bits - 1) for run in range(8 // bits)], axis=-2)


def pad_groups(x: Array) -> Array:
    """`x` with zeros behind, up to a number of groups (the last axis) that is read by whole vectors."""
    return pad_to(x, -(-x.shape[-1] // GROUPS) * GROUPS, -1)


def pad_to(x: Array, size: int, axis: int) -> Array:
    """`x` with zeros behind, so that `axis` (negative) has `size` elements."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)
