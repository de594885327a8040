"""From the PartitionSpec of a logical leaf to that of its canonical matrix."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxq.errors import JaxqError
from jaxq.formats.base import QuantizedArray


def canonical_spec(array: QuantizedArray, spec: PartitionSpec) -> tuple[tuple[Any, ...], Any, Any]:
    """(entries of the batch axes, entry of in, entry of out) for a logical leaf sharded by `spec`.

    Flattening keeps shards contiguous only if the first of the flattened axes is the sharded one; JaxqError
    otherwise.
    """
    batch = len(array.batch_shape)
    if len(spec) > array.ndim:
        raise JaxqError(f"{spec} has more entries than a weight of shape {array.shape} has axes")
    entries = [*spec, *[None] * (array.ndim - len(spec))]
    core: list[Any] = [None] * array.layout.core_ndim
    for entry, axis in zip(entries[batch:], array.layout.perm, strict=True):
        core[axis] = entry
    rows, columns = core[: array.layout.in_ndim], core[array.layout.in_ndim :]
    if any(entry is not None for entry in rows[1:] + columns[1:]):
        raise JaxqError(f"{spec} shards an inner axis of a weight of shape {array.shape} that is stored "
                        "flattened; shard the first in or out axis instead")  # fmt: skip
    return tuple(entries[:batch]), rows[0], columns[0]


def shard_count(entry: Any, mesh: Any = None) -> int:
    """Number of shards along an axis with this PartitionSpec entry."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    names = entry if isinstance(entry, tuple) else (entry,)
    missing = [name for name in names if name not in mesh.shape]
    if missing:
        raise JaxqError(f"no mesh with an axis {missing[0]!r} here; pass mesh= or set one with jax.set_mesh")
    return math.prod(mesh.shape[name] for name in names)


def check_divides(size: int, unit: int, problem: str) -> None:
    """JaxqError unless `unit` divides `size`."""
    if size % unit:
        raise JaxqError(f"this sharding of the in axis cannot be used: {problem}; "
                        "use fewer shards, shard the out axis, or choose another group size")  # fmt: skip
