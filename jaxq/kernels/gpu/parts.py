"""The parts of arrays prepared for GPUs: words of codes by rows, then what each group of an output has of its own.

The first is `(batch..., out, words)`, the others are `(batch..., out, groups, ...)`, where an output that is one
group has a layout of words of its own.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Integer

from jaxq.kernels.gpu import words
from jaxq.kernels.gpu.words import Order


def group_of(format: Any, groups: int) -> int | None:
    """Inputs of each of so many groups; None for one group an output."""
    return None if groups == 1 else format.group_size


def order_of(format: Any, groups: int, spread: bool = False) -> Order:
    return words.order_for(format.bits, group_of(format, groups), spread)


def unsupported(format: Any, groups: int) -> str:
    """Why so many groups cannot be laid out; empty if they can."""
    return words.unsupported(format.bits, group_of(format, groups))


def take(parts: tuple[Array, ...], ids: Integer[Array, " ids"]) -> tuple[tuple[Array, ...], int]:
    """(the parts of these outputs of one matrix, outputs that only fill up the last tile)."""
    return tuple(part[ids] for part in parts), 0


def groups(parts: tuple[Any, ...]) -> int:
    """Groups of an output, with those that only fill up the last block."""
    return parts[1].shape[-2]


def sizes(format: Any, parts: tuple[Any, ...]) -> tuple[int, int]:
    """(in, out), with what fills up the last block."""
    return order_of(format, groups(parts)).inputs_in(parts[0].shape[-1]), parts[0].shape[-2]


def blocks(format: Any, parts: tuple[Any, ...]) -> int:
    """Blocks of inputs."""
    return parts[0].shape[-1] // order_of(format, groups(parts)).block_words
