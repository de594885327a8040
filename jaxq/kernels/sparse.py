"""Products with a sparse matrix stored by columns.

`rows` and `values` hold the entries, sorted by column and then by row; `starts` and `counts` say which of
them belong to each column. A shard along out sees all entries but only its own columns' starts and counts:
entries of other columns count for nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Integer, UInt


def columns(
    starts: UInt[Array, " out"], counts: UInt[Array, " out"], entries: int
) -> tuple[Integer[Array, " entries"], Bool[Array, " entries"]]:
    """(column of each entry, whether it belongs to one); ids ascend, also where they mean nothing."""
    starts, counts = _whole(starts), _whole(counts)
    # The number of starts up to a place, by a running sum: three times as fast as a binary search for each
    # entry. Of the columns that share a start, the last is counted: the others are empty.
    marks = jnp.zeros(entries, jnp.int32).at[starts.astype(jnp.int32)].add(1, mode="drop")
    ids = jnp.cumsum(marks) - 1
    column = jnp.maximum(ids, 0)
    ends = starts.astype(jnp.int32) + counts.astype(jnp.int32)
    return column, (ids >= 0) & (jnp.arange(entries) < ends[column])


def gathers(x: Float[Array, "*tokens in"], entries: int, out_size: int) -> bool:
    """Whether a product with `x` takes the entries one by one, not as a dense matrix.

    One by one needs a number for each token and entry, the other way one for each place of the matrix. At a
    quarter of that the times on a CPU cross too, and no more memory is taken than either way needs. Where
    tokens lie on explicit mesh axes, only the dense way needs no word on where its parts go.
    """
    return 4 * x.size * entries <= x.shape[-1] ** 2 * out_size and _is_whole(x)


def _is_whole(x: Array) -> bool:
    return all(entry is None for entry in jax.typeof(x).sharding.spec)


def _whole(x: Array) -> Array:
    """`x` on every device: scatters and searches along an explicitly sharded axis are type errors."""
    if _is_whole(x):
        return x
    return jax.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def product(
    x: Float[Array, "*tokens in"],
    rows: UInt[Array, " entries"],
    values: Float[Array, " entries"],
    starts: UInt[Array, " out"],
    counts: UInt[Array, " out"],
    out_size: int,
) -> Float[Array, "*tokens out"]:
    """`x @ dense(...)`, accumulated and returned in float32."""
    *tokens, in_size = x.shape
    if not gathers(x, rows.shape[0], out_size):
        matrix = dense(rows, values, starts, counts, in_size)
        return jnp.matmul(x.astype(jnp.float32), matrix, preferred_element_type=jnp.float32)
    column, valid = columns(starts, counts, rows.shape[0])
    weights = jnp.where(valid, values.astype(jnp.float32), 0.0)
    # Tokens last: each entry then reads and adds a contiguous run, an order of magnitude faster on a CPU.
    parts = x.reshape((-1, in_size)).T[rows.astype(jnp.int32)].astype(jnp.float32) * weights[:, None]
    sums = jnp.zeros((out_size, parts.shape[1]), jnp.float32)
    return sums.at[column].add(parts, indices_are_sorted=True).T.reshape((*tokens, out_size))


def dense(
    rows: UInt[Array, " entries"],
    values: Float[Array, " entries"],
    starts: UInt[Array, " out"],
    counts: UInt[Array, " out"],
    in_size: int,
) -> Float[Array, "in out"]:
    """The dense matrix, float32."""
    column, valid = columns(starts, counts, rows.shape[0])
    weights = jnp.where(valid, values.astype(jnp.float32), 0.0)
    return jnp.zeros((in_size, starts.shape[0]), jnp.float32).at[rows.astype(jnp.int32), column].add(weights)


def take(
    ids: Integer[Array, " ids"],
    rows: UInt[Array, " entries"],
    values: Float[Array, " entries"],
    starts: UInt[Array, " out"],
    counts: UInt[Array, " out"],
    in_size: int,
) -> Float[Array, "ids in"]:
    """Columns `ids` of the dense matrix, float32, without making the others. Needs memory O(ids * in)."""
    out_size, count = starts.shape[0], ids.shape[0]
    ids = jnp.clip(jnp.where(ids < 0, ids + out_size, ids), 0, out_size - 1)
    # One place for each column asked for: a column asked for twice is filled once and read twice.
    place = jnp.full(out_size, count, jnp.int32).at[ids].set(jnp.arange(count, dtype=jnp.int32))
    column, valid = columns(starts, counts, rows.shape[0])
    target = jnp.where(valid, place[column], count)
    filled = jnp.zeros((count, in_size), jnp.float32)
    filled = filled.at[target, rows.astype(jnp.int32)].add(values.astype(jnp.float32), mode="drop")
    return filled[place[ids]]
