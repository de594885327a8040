"""The GGUF container: metadata, tensor table, tensor values.

Versions 2 and 3, little endian: magic, version, counts, typed key-value pairs, tensor table, then the tensors
at aligned offsets. The header is read here and not by the gguf package, whose reader makes numpy objects of
every token (25 s and 700 MB for a vocabulary of 262144); the gguf package decodes the block formats.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxq.errors import JaxqError

# What llama.cpp calls them, in the order of its enumeration.
TYPES = (
    "F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16",
)  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DECODE = 1 << 20  # values decoded at a time


@dataclass(frozen=True)
class Tensor:
    """An entry of the tensor table. shape is in numpy order: (out, in) for a linear layer."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class File:
    """An opened GGUF file: its metadata and tensor table; values are read by `values`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.frombuffer(_map(self.path), np.uint8)

    def values(self, name: str) -> np.ndarray:
        """The tensor as float32, in numpy order."""
        tensor = self.tensors[name]
        kind = GGMLQuantizationType[tensor.type]
        block, size = GGML_QUANT_SIZES[kind]
        rows = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        raw = self._bytes[tensor.offset : tensor.offset + tensor.nbytes].reshape(rows)
        if tensor.type in ("F32", "F16"):
            return raw.view("<f4" if tensor.type == "F32" else "<f2").astype(np.float32)
        if len(rows) == 1:
            return dequantize(raw, kind)
        # A few rows at a time: the decoder's temporaries are several times the size of what it decodes.
        values = np.empty(tensor.shape, np.float32)
        step = max(1, _DECODE // max(1, math.prod(tensor.shape[1:])))
        for start in range(0, rows[0], step):
            values[start : start + step] = dequantize(raw[start : start + step], kind)
        return values


def read(path: str | os.PathLike[str]) -> File:
    """Opens a GGUF file and checks its header; no tensor is read.

    Raises `JaxqError` for a file that is missing, is not GGUF, is cut short or uses an unknown tensor type.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise JaxqError(f"{path} is not a GGUF file: it does not start with the GGUF magic")
            total = os.fstat(file.fileno()).st_size
        data = memoryview(_map(path))
    except OSError as error:
        raise JaxqError(f"cannot read {path}: {error.strerror or error}") from error
    cursor = _Cursor(data, 4)
    try:
        metadata, tensors = _header(cursor, str(path))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise JaxqError(f"{path} is cut short or damaged: its header makes no sense ({error})") from error
    for tensor in tensors.values():
        if tensor.offset + tensor.nbytes > total:
            raise JaxqError(
                f"{path} is cut short: tensor {tensor.name!r} ends at byte {tensor.offset + tensor.nbytes} "
                f"but the file has {total}: fetch it again"
            )
    return File(path, metadata, tensors)


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _header(cursor: _Cursor, path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise JaxqError(f"{path} is GGUF version {version} or big endian: only little-endian 2 and 3 are read")
    tensor_count, pair_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    table = [_entry(cursor) for _ in range(tensor_count)]
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align <= 0:
        raise JaxqError(f"{path} is damaged: its alignment is {align!r}")
    start = -(-cursor.at // align) * align
    tensors: dict[str, Tensor] = {}
    for name, shape, number, offset in table:
        kind = _type_name(number)
        if kind not in TYPES:
            raise JaxqError(
                f"{path}: tensor {name!r} has type {kind}, not supported; jaxq reads {', '.join(TYPES)}"
            )
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if not shape or shape[-1] % block or name in tensors:
            raise JaxqError(f"{path} is damaged: {name!r} has shape {shape} in blocks of {block}, or comes twice")
        tensors[name] = Tensor(name, shape, kind, start + offset, math.prod(shape) // block * size)
    return metadata, tensors


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape in numpy order, type number, offset from the start of the tensor data)."""
    name = cursor.string()
    dims = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
    return name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")


def _type_name(number: int) -> str:
    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"number {number}"


class _Cursor:
    """Reads typed values one after another; raises struct.error or IndexError at the end of the data."""

    def __init__(self, data: memoryview, at: int):
        self.data, self.at = data, at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        return str(self._take(size), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise IndexError(f"unknown metadata type {kind}")
        value = self.scalar(_SCALARS[kind])
        # The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == 6 else value

    def _array(self) -> Any:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[kind] if kind != 7 else "?")
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if count > len(self.data):
            raise IndexError(f"an array of {count} items")
        return [self.value(kind) for _ in range(count)]

    def _take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise IndexError(f"{size} bytes wanted, {len(self.data) - self.at} left")
        self.at += size
        return self.data[self.at - size : self.at]
