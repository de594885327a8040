"""Reads the weights of an ONNX file, with the little of the protobuf format that this takes.

A message is a row of fields, each a number, a kind and a value; the numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxq.errors import JaxqError

_FLOAT = 1  # TensorProto.DataType


class Node(NamedTuple):
    """One operation, by the names of its inputs and outputs."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read(path: Path) -> tuple[list[Node], dict[str, np.ndarray]]:
    """The nodes of the graph, and its float32 initializers by name, read-only and mapped from the file.

    Errors: JaxqError for a file that cannot be read or is not an ONNX model with its weights inside, as raw bytes.
    """
    try:
        (graph,) = _every(np.memmap(path, np.uint8, "r").data, 7)
        nodes = [Node(_text(part, 4)[0], _text(part, 1), _text(part, 2)) for part in _every(graph, 1)]
        weights = dict(_tensor(part) for part in _every(graph, 5) if _FLOAT in _every(part, 2))
    except (IndexError, ValueError, TypeError, OSError) as error:
        raise JaxqError(f"{path} cannot be read as an ONNX model with its weights inside: {error}") from None
    return nodes, weights


def _tensor(data: memoryview) -> tuple[str, np.ndarray]:
    (raw,) = _every(data, 9)
    return _text(data, 8)[0], np.frombuffer(raw, np.float32).reshape(_every(data, 1))


def _text(data: memoryview, wanted: int) -> tuple[str, ...]:
    return tuple(str(part, "utf-8") for part in _every(data, wanted))


def _every(data: memoryview, wanted: int) -> list:
    """The values of a field that may be repeated: ints, or bytes."""
    return [value for field, value in _fields(data) if field == wanted]


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, len(data)), at)
        if at + size > len(data):
            raise ValueError("it is damaged or cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number that begins there, 7 bits a byte, lowest first, and where it ends."""
    for length in range(1, 11):
        if data[at + length - 1] < 128:
            return sum((data[at + i] & 127) << 7 * i for i in range(length)), at + length
    raise ValueError("it is damaged")
