"""Look-up tables on TPUs, in Pallas: weights are looked up in vector registers, then multiplied.

The ways to look up differ by generation, since registers are gathered from 8 rows of 32-bit numbers (v5) or 16
rows of 16-bit ones (v6), or not at all (v4). Where activations are bfloat16, tables are rounded to that, as in the
reference; for float32 everything is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxq.kernels.codebook import tpu_words
from jaxq.kernels.tpu import blocks, generations, words
from jaxq.kernels.tpu.words import take as take

#: Axes of the codes of one matrix.
AXES = 2
TOKENS = blocks.TOKENS

#: Inputs in one product of the matrix unit: decoded numbers that registers hold on the way.
DEEP = 64
#: Where a look-up gives a whole tile at once, the depth of the matrix unit.
DEEP_HALVES = 256

#: Inputs that share a table: not more than the smallest block, and not so few that tables fill the memory.
GROUPS = (64, 128, 256)


def unsupported(array: Any) -> str:
    """Why an array has no product on TPUs; empty if it has one."""
    if array.format.bits > 4:
        return "look-up tables on TPUs have 1 to 4 bits"
    group = _group(array.format, array.table)
    if group is None or group in GROUPS:
        return ""
    return f"look-up tables on TPUs have groups of {', '.join(map(str, GROUPS))} inputs, or one an output"


def _group(format: Any, table: Array) -> int | None:
    return None if table.shape[-2] == format.entries else format.group_size


def prepare(array: Any, codes: Array, target: str) -> tuple[Array, ...]:
    """Words of codes (3 bits take 4) and tables `(batch..., groups * 2^bits, out)` in their own dtype.

    The order is that of `tpu.words` for V6, of `tpu_words` before. Inputs and outputs are filled up with zeros.
    """
    in_size, out_size = words.padded(*array.matrix_shape)
    codes = words.pad_matrix(codes, in_size, out_size)
    group, bits = _group(array.format, array.table), array.format.bits
    count = 1 if group is None else in_size // group
    table = words.pad_matrix(array.table, count * array.format.entries, out_size)
    if target == generations.V6:
        return words.pack(codes, words.FIELD[bits]), table
    return tpu_words.pack(codes, bits), table


def restore(format: Any, parts: tuple[Array, ...], in_size: int, target: str) -> tuple[Array, Array]:
    """(codes, tables) of the canonical array, with the outputs that fill up the last tile."""
    packed, table = parts
    if target == generations.V6:
        codes = words.unpack(packed, words.FIELD[format.bits])
    else:
        codes = tpu_words.unpack(packed, format.bits)
    groups = -(-in_size // format.rows_per_group(in_size))
    return codes[..., :in_size, :], table[..., : groups * format.entries, :]


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out), with what fills up the last block."""
    return parts[0].shape[-2] * 32 // words.FIELD[format.bits], parts[0].shape[-1]


def product(x: Float[Array, "tokens in"], prepared: Any) -> Float[Array, "tokens out"]:
    packed, table = prepared.parts
    bits, group = prepared.format.bits, _group(prepared.format, table)
    table = table.reshape((-1, prepared.format.entries, table.shape[-1]))
    x = blocks.precise(x)
    half = x.dtype == jnp.bfloat16
    if half:
        table = table.astype(jnp.bfloat16)
    if prepared.target == generations.V6:
        tiles, table = _tiles_of_halves, _pieces(table)
    elif prepared.target == generations.V4:
        tiles, table = _each(_select), _rows(table.astype(jnp.float32), words.SUBLANES)
    elif bits <= 3:
        tiles, table = _each(_gather), _rows(table.astype(jnp.float32), words.SUBLANES)
    elif half:
        tiles, table = _each(_gather_pairs), _pairs(table)
    else:
        tiles, table = _each(_gather_twice), table.astype(jnp.float32)
    rows = table.shape[-2]
    table = table.reshape((*table.shape[:-3], -1, table.shape[-1]))
    body = functools.partial(_body, tiles=tiles, bits=bits, group=group, rows=rows)
    codes = (packed, 32 // words.FIELD[bits])
    if group is None:
        return blocks.product(body, x, [codes], [table], lambda *shape: [shape])
    return blocks.product(body, x, [codes, (table, group // rows)], [], lambda *shape: [shape])


def _rows(table: Array, rows: int) -> Array:
    """`(groups, entries, out)` filled up to so many rows, since a gather reads whole registers."""
    return words.pad_matrix(table, max(rows, table.shape[-2]), table.shape[-1])


def _pairs(table: Float[Array, "groups entries out"]) -> Integer[Array, "groups 8 out"]:
    """Entries i, above, and i + 8, below, in one word, as bfloat16.

    Read as a float32, a word is entry i with something behind it, which rounding to bfloat16 adds if it is half
    of a unit or more: then the upper half is stored one unit lower in magnitude.
    """
    rounded = _rows(table.astype(jnp.bfloat16), words.TILE)
    # Minus zero would lie exactly at the half of a unit.
    rounded = jnp.where(rounded == 0, jnp.bfloat16(0), rounded)
    whole = jax.lax.bitcast_convert_type(rounded, jnp.uint16).astype(jnp.uint32)
    above, below = whole[:, : words.SUBLANES], whole[:, words.SUBLANES :]
    # Zero has nothing below it: with a rest behind, it becomes the smallest positive number of all, or stays zero.
    down = (below >= 0x8000) & (above > 0)
    word = ((above - down) << 16) | below
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def _pieces(table: Float[Array, "groups entries out"]) -> Float[Array, "pieces groups 16 out"]:
    """Bfloat16 tables of which the sum is the table: one for every 8 bits of its precision."""
    count = {"bfloat16": 1, "float16": 2, "float32": 3}[table.dtype.name]
    rest, pieces = _rows(table.astype(jnp.float32), words.TILE), []
    for _ in range(count):
        # By a mask, since XLA may leave out a pair of casts; what it cuts off goes to the next piece.
        top = jax.lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        top = jax.lax.bitcast_convert_type(top, jnp.float32)
        pieces.append(top.astype(jnp.bfloat16))
        rest = rest - top
    return jnp.stack(pieces)


def _body(
    x, packed, table, out, total, *, tiles: Callable[..., list[Array]], bits: int, group: int | None, rows: int
) -> None:
    """One block: x `[tokens, deep]`, words `[..., wide]`, for each group a table of `[..., rows, wide]`."""
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    result = total[...]
    size = DEEP_HALVES if tiles is _tiles_of_halves else DEEP
    size = size if group is None else min(size, group)
    for start in range(0, x.shape[1], size):
        first = 0 if group is None else start // group * rows
        entries = table[..., first : first + rows, :]
        weights = jnp.concatenate(tiles(packed, start, size, bits, entries), axis=0)
        result = result + blocks.dot(x[:, start : start + size], weights)
    total[...] = result

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        out[...] = total[...]


def _tiles_of_halves(packed, start: int, size: int, bits: int, table: Array) -> list[Array]:
    """Tiles of 16 rows, each by one gather from 16 rows of bfloat16; of several pieces, their float32 sum."""
    field = words.FIELD[bits]
    mask = 2**field - 1
    tiles = []
    for row in range(start, start + size, words.TILE):
        first, shift = words.place(row, field)
        some = words.shifted(packed[first : first + words.SUBLANES, :], -shift)
        codes = words.in_pairs(some & jnp.int32(mask | mask << 16), jnp.int16)
        found = [_take(piece, codes) for piece in table]
        # The smallest first: sums of neighbours among the pieces are exact.
        tiles.append(found[0] if len(found) == 1 else sum(piece.astype(jnp.float32) for piece in found[::-1]))
    return tiles


def _each(look_up: Callable[[Array, tuple[int, ...], Array], Array]) -> Callable[..., list[Array]]:
    """Tiles of 8 rows from a look-up of codes whose bits lie at given places of words."""

    def tiles(packed, start: int, size: int, bits: int, table: Array) -> list[Array]:
        every = tpu_words.places(bits)
        found = []
        for row in range(start, start + size, words.SUBLANES):
            run, code = divmod(row // words.SUBLANES, len(every))
            some = packed[run * words.SUBLANES : (run + 1) * words.SUBLANES, :]
            found.append(look_up(some, every[code], table))
        return found

    return tiles


def _low(some: Array, places: tuple[int, ...]) -> Array:
    """The lower bits of codes, up to three."""
    count = min(len(places), 3)
    moved = words.shifted(some, -places[0])
    return moved if places[0] + count == 32 else moved & (2**count - 1)


def _gather(some: Array, places: tuple[int, ...], table: Array) -> Array:
    """8 rows of float32, for up to 8 entries."""
    return _take(table, _low(some, places))


def _gather_twice(some: Array, places: tuple[int, ...], table: Array) -> Array:
    """8 rows of float32, for 16 entries: from either half of the table."""
    codes = _low(some, places)
    low, high = (_take(part, codes) for part in (table[: words.SUBLANES], table[words.SUBLANES :]))
    return jnp.where(_is_set(some, places[3]), high, low)


def _gather_pairs(some: Array, places: tuple[int, ...], table: Array) -> Array:
    """8 rows of bfloat16 values in float32, for 16 entries: one gather of words from `_pairs`."""
    pair = _take(table, _low(some, places))
    lower = words.shifted(some, 4 - places[3]) & 16
    return jax.lax.bitcast_convert_type(pair << lower, jnp.float32)


def _select(some: Array, places: tuple[int, ...], table: Array) -> Array:
    """8 rows of float32 without a gather: one bit of the code after another halves the candidates."""
    candidates = [jnp.broadcast_to(table[row : row + 1, :], some.shape) for row in range(2 ** len(places))]
    for place in places:
        odd = _is_set(some, place)
        candidates = [jnp.where(odd, *pair) for pair in zip(candidates[1::2], candidates[::2], strict=True)]
    return candidates[0]


def _is_set(some: Array, place: int) -> Array:
    """Whether that bit of each word is set: moved up to be its sign."""
    return words.shifted(some, 31 - place) < 0


def _take(table: Array, rows: Array) -> Array:
    """Column by column, the rows of the table. By `lax.gather`: NumPy's indexing would check and widen indices."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(1,),
    )
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(table, rows[..., None], numbers, slice_sizes=(1, 1), mode=mode)
