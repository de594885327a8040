"""One layer in the layout of the public SqueezeLLM packer, to and from our arrays.

A layer of `in` inputs and `out` outputs at b bits is, beside an optional `bias`:

    qweight           int32 (in * b / 32, out)   codes, one little-endian bit stream down each column
    lookup_table      float32 (out, 2^b)         the values, in no order
    rows, cols, vals  int32 (out + 1,), int32 (nnz,), float32 (nnz,)   S by outputs, or none of the three
    full_rows, full_row_indices  float32 (in, t), int32 (t,)           more of S, whole outputs; or neither
    startrows         which thread starts where; means nothing here

A weight is table[code] + S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxq.errors import JaxqError
from jaxq.formats.base import Layout, QuantizedArray
from jaxq.formats.codebook import Codebook, CodebookArray
from jaxq.formats.dense_sparse import DenseSparse, DenseSparseArray, count_dtype, row_dtype
from jaxq.formats.packing import WORD

BITS = (2, 3, 4)
# name -> (dtype, axes)
TENSORS: dict[str, tuple[type, int]] = {
    "qweight": (np.int32, 2),
    "lookup_table": (np.float32, 2),
    "rows": (np.int32, 1),
    "cols": (np.int32, 1),
    "vals": (np.float32, 1),
    "full_rows": (np.float32, 2),
    "full_row_indices": (np.int32, 1),
    "startrows": (np.int32, 1),
}


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    in_size: int | None = None,
    table_dtype: str = "float32",
    dtype: Any = "float32",
) -> CodebookArray | DenseSparseArray:
    """One layer as a quantized (in, out) matrix: a codebook, with an overlay where S has entries.

    Args:
      tensors: name -> array, as at the top of this file.
      in_size: how many inputs there must be; None takes what the codes say.
      table_dtype: how the table is stored: "float32", which is exact, "float16" or "bfloat16". What rounding takes
        from the table, S is given, so that the weights with an entry stay as they were.
      dtype: logical dtype of the result.

    Raises:
      JaxqError: a tensor is missing, unknown, of another type or shape, not finite, or points outside the matrix.
    """
    given = _checked(tensors)
    table, words = given["lookup_table"], given["qweight"]
    out_size, entries = table.shape
    bits = entries.bit_length() - 1
    if entries != 2**bits or bits not in BITS:
        raise JaxqError(f"lookup_table has {entries} values an output: only 4, 8 and 16 (2 to 4 bits) are read")
    if words.shape[1] != out_size:
        raise JaxqError(f"qweight has {words.shape[1]} outputs, but lookup_table {out_size}")
    found = len(words) * WORD // bits
    if not found or found % WORD or len(words) * WORD % bits:
        raise JaxqError(f"qweight has {len(words)} words an output, not {bits} (its bits) for each 32 inputs")
    if in_size not in (None, found):
        raise JaxqError(f"qweight has codes for {found} inputs, not {in_size}")
    format = Codebook(bits, table_dtype)
    with np.errstate(over="ignore"):
        stored = np.asarray(table.T, jnp.dtype(table_dtype))
    if not np.isfinite(stored).all():
        raise JaxqError(f"lookup_table has values beyond the range of {table_dtype}: keep it in float32")
    # jnp.array copies; jnp.asarray may alias the file, which others can change.
    base = CodebookArray(
        codes=jnp.array(words.view(np.uint32)),
        table=jnp.array(stored),
        format=format,
        layout=Layout(),
        dtype_name=jnp.dtype(dtype).name,
        pad=0,
    )
    places, values = _entries(given, found, out_size)
    if not len(places):
        return base
    column, row = places // found, places % found
    lost = table.T - stored.astype(np.float32)
    if lost.any():
        values = values + lost[_codes_at(words, bits, row, column), column]
    counts = np.bincount(column, minlength=out_size)
    return DenseSparseArray(
        base=base.astype(jnp.float32),
        rows=jnp.array(row, row_dtype(found)),
        values=jnp.array(values, jnp.float32),
        starts=jnp.array(np.cumsum(counts) - counts, jnp.uint32),
        counts=jnp.array(counts, count_dtype(found)),
        format=_sparse(format, len(places), found, out_size),
        layout=Layout(),
        dtype_name=jnp.dtype(dtype).name,
    )


def to_tensors(array: QuantizedArray) -> dict[str, np.ndarray]:
    """The tensors of the canonical (in, out) matrix, as `from_tensors` reads them; S without full rows.

    Raises:
      JaxqError: the array is no codebook of 2 to 4 bits (with or without an overlay), has tables of groups or
        batch axes, or its inputs do not come in 32s, for which the layout has no place.
    """
    base = array.base if isinstance(array, DenseSparseArray) else array
    if not isinstance(base, CodebookArray) or base.format.bits not in BITS:
        raise JaxqError(f"the layout holds codebooks of 2 to 4 bits, not {array.format}")
    if array.batch_shape:
        raise JaxqError("the layout holds one matrix: index the batch axes away first")
    if len(base.table) != base.format.entries:
        raise JaxqError(f"the layout holds a table for each output, not for groups of {base.format.group_size}")
    in_size, _ = array.matrix_shape
    if in_size % WORD:
        raise JaxqError(f"the layout holds inputs by 32s: {in_size} do not fit")
    tensors = {
        "qweight": np.asarray(base.codes).view(np.int32),
        "lookup_table": np.ascontiguousarray(np.asarray(base.table).T.astype(np.float32)),
    }
    if isinstance(array, DenseSparseArray):
        ends = np.cumsum(np.asarray(array.counts).astype(np.int64))
        tensors["rows"] = np.concatenate([[0], ends]).astype(np.int32)
        tensors["cols"] = np.asarray(array.rows).astype(np.int32)
        tensors["vals"] = np.asarray(array.values).astype(np.float32)
    return tensors


def _checked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that mean something here, each of its type and axes, and finite."""
    unknown = sorted(set(tensors) - {*TENSORS, "bias"})
    if unknown:
        raise JaxqError(f"a SqueezeLLM layer has no tensor {', '.join(unknown)}")
    # One of a group is nothing without the others.
    for group in (("qweight", "lookup_table"), ("rows", "cols", "vals"), ("full_rows", "full_row_indices")):
        missing = [name for name in group if name not in tensors]
        if missing and (len(missing) < len(group) or "qweight" in group):
            raise JaxqError(f"a tensor is missing: {', '.join(missing)}")
    given = {}
    for name, (kind, axes) in TENSORS.items():
        if name not in tensors or name == "startrows":
            continue
        array = given[name] = np.asarray(tensors[name])
        if array.dtype != kind or array.ndim != axes:
            wanted = f"{np.dtype(kind)} with {axes} axes"
            raise JaxqError(f"{name} is {array.dtype} of shape {array.shape}, where {wanted} is expected")
        if kind is np.float32 and not np.isfinite(array).all():
            raise JaxqError(f"{name} holds values that are not finite: the file is damaged")
    return given


def _entries(given: Mapping[str, np.ndarray], in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(places, values) of S: each place, output * in + input, once and in order, as int64; float32 values."""
    places, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    if "rows" in given:
        starts, inputs = given["rows"].astype(np.int64), given["cols"].astype(np.int64)
        if len(starts) != out_size + 1 or starts[0] != 0 or (np.diff(starts) < 0).any():
            raise JaxqError(f"rows must be {out_size + 1} numbers that start at 0 and never fall")
        if not starts[-1] == len(inputs) == len(given["vals"]):
            counts = f"{starts[-1]} entries, cols {len(inputs)} and vals {len(given['vals'])}"
            raise JaxqError(f"rows ends at {counts}: these must be the same")
        _check_range("cols", inputs, in_size)
        places.append(np.repeat(np.arange(out_size), np.diff(starts)) * in_size + inputs)
        values.append(given["vals"])
    if "full_rows" in given:
        full, outputs = given["full_rows"], given["full_row_indices"].astype(np.int64)
        if full.shape != (in_size, len(outputs)):
            raise JaxqError(f"full_rows has shape {full.shape}, where {(in_size, len(outputs))} is expected")
        _check_range("full_row_indices", outputs, out_size)
        # The packer makes no full rows, its loader makes ten of zeros.
        row, place = np.nonzero(full)
        places.append(outputs[place] * in_size + row)
        values.append(full[row, place])
    at, found = np.concatenate(places), np.concatenate(values)
    if (np.diff(at) > 0).all():
        return at, found
    at, where = np.unique(at, return_inverse=True)
    found = np.bincount(where, found, len(at))
    if len(at) and np.abs(found).max() > np.finfo(np.float32).max:
        raise JaxqError("vals and full_rows have sums beyond the range of float32: the file is damaged")
    return at, found.astype(np.float32)


def _check_range(name: str, numbers: np.ndarray, size: int) -> None:
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < size):
        raise JaxqError(f"{name} must be numbers from 0 to {size - 1}; found {numbers.min()} to {numbers.max()}")


def _codes_at(words: np.ndarray, bits: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The codes of single weights, without unpacking the others."""
    first, shift = row * bits // WORD, row * bits % WORD
    after = np.minimum(first + 1, len(words) - 1)
    stream = words.view(np.uint32)
    pair = stream[first, column].astype(np.uint64) | stream[after, column].astype(np.uint64) << np.uint64(WORD)
    return ((pair >> shift.astype(np.uint64)) & np.uint64(2**bits - 1)).astype(np.int64)


def _sparse(base: Codebook, count: int, in_size: int, out_size: int) -> DenseSparse:
    """The format whose overlay has just so many entries."""
    # A format asks for less than all weights; the next smaller fraction rounds to all of them.
    sparsity = min(count / (in_size * out_size), math.nextafter(1.0, 0.0))
    format = DenseSparse(base, sparsity)
    if format.entries(in_size, out_size) != count:
        raise JaxqError(f"{count} of {in_size * out_size} weights have an entry, which no sparsity expresses")
    return format
