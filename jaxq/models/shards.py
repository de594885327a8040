"""Reads safetensors files: the header when opened, a tensor only when asked for.

The format: 8 bytes header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, the
data. Read here because the numpy side of the safetensors package knows no bfloat16, and so that every kind of
damage gets an error of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxq.errors import JaxqError

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_HEADER_LIMIT = 100 << 20


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies; view() maps it without reading."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor as stored, read-only, mapped from the file: pages are read when touched."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, DTYPES[self.dtype])
        try:
            return np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise JaxqError(f"{self.file}: cannot read {self.name}: {error}") from None


def read_header(file: Path) -> tuple[dict[str, Tensor], bytes]:
    """All tensors of a file by name, and the raw header.

    Errors: JaxqError when the file is missing, not safetensors, or of another length than its header says.
    """
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if total < 8 or length > min(total - 8, _HEADER_LIMIT):
                raise JaxqError(f"{file}: not a safetensors file, or cut short in its header; fetch it again")
            raw = stream.read(length)
    except FileNotFoundError:
        raise JaxqError(f"{file}: this shard is missing; fetch the whole checkpoint") from None
    except OSError as error:
        raise JaxqError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
        end = max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, JaxqError):
            raise
        raise JaxqError(f"{file}: broken safetensors header; fetch it again") from None
    if total < end:
        raise JaxqError(f"{file}: truncated, {total} of {end} bytes are there; fetch it again")
    if total > end:
        raise JaxqError(f"{file}: {total - end} bytes after the last tensor: damaged; fetch it again")
    return tensors, raw


def _tensor(file: Path, name: str, entry: dict[str, Any], start: int) -> Tensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(not isinstance(n, int) or n < 0 for n in (begin, end, *shape)):
        raise ValueError(name)
    kind = entry["dtype"]
    if kind in DTYPES and end - begin != math.prod(shape) * DTYPES[kind].itemsize:
        raise JaxqError(f"{file}: {name} of shape {shape} and type {kind} does not take {end - begin} bytes")
    return Tensor(file, name, kind, shape, start + begin)
