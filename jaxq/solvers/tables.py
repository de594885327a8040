"""The best table for given codes: one small least squares problem a channel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

#: Floats that the one-hot codes of a chunk of channels may take up, over all matrices solved at once.
CHUNK_FLOATS = 2**25

#: Of the mean diagonal of P^T H P: above float32's rounding of that matrix, far below what moves the result.
RIDGE = 1e-6


def chunk_of(in_size: int, out_size: int, entries: int, lanes: int) -> int:
    """Channels that are solved at once, such that `lanes` matrices together stay inside CHUNK_FLOATS."""
    most = max(1, CHUNK_FLOATS // (lanes * in_size * entries))
    chunks = -(-out_size // min(most, out_size))
    return -(-out_size // chunks)


def corrections(
    hessian: Float[Array, "in in"],
    codes: UInt8[Array, "in out"],
    pull: Float[Array, "in out"],
    free: Bool[Array, "in out"],
    entries: int,
    chunk: int,
) -> Float[Array, "entries out"]:
    """What to add to each channel's table c so that (w - P c)^T H (w - P c) is least, P the one-hot codes.

    LNQ's closed form c = (P^T H P)^-1 P^T H w (GuidedQuant, Kim et al. 2025) in terms of the present error:
    c_new - c = (P^T H P)^-1 P^T H (w - P c). The two are equal, but this one loses nothing to cancellation, a
    ridge on it cannot raise the objective, and an entry without members stays as it is.

    Args:
        hessian: symmetric.
        codes: present codes.
        pull: H (w - P c).
        free: positions that belong to the table; the others are not members of any entry.
        entries: size of a table.
        chunk: channels solved at once; memory is twice `in * entries * chunk` floats.

    Returns float32; zero where a system has no solution. in^2 out entries multiplications: one dense product
    of the Hessian with the one-hot codes. Adding up its rows by code is `entries` times less arithmetic, but
    moves in^2 out floats instead, which is slower up to 16 entries at least.
    """
    in_size, out_size = codes.shape
    chunks = -(-out_size // chunk)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - out_size)]).T
        return x.reshape((chunks, chunk, in_size))

    def solve(pieces: tuple[Array, Array, Array]) -> Array:
        codes, pull, free = pieces
        members = codes[:, None, :] == jnp.arange(entries, dtype=codes.dtype)[:, None]
        members = (members & free[:, None, :]).astype(jnp.float32)
        spread = jnp.matmul(members.reshape((chunk * entries, in_size)), hessian, precision="highest")
        spread = spread.reshape((chunk, entries, in_size))
        contract = (((2,), (2,)), ((0,), (0,)))
        gram = jax.lax.dot_general(spread, members, contract, precision="highest")
        right = jax.lax.dot_general(members, pull[:, None, :], contract, precision="highest")
        mean = jnp.mean(jnp.diagonal(gram, axis1=1, axis2=2), axis=1)
        ridge = RIDGE * jnp.where(mean > 0, mean, 1.0)
        gram = gram + ridge[:, None, None] * jnp.eye(entries)
        lower = jax.lax.linalg.cholesky(gram, symmetrize_input=False)
        half = jax.lax.linalg.triangular_solve(lower, right, left_side=True, lower=True)
        found = jax.lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)[..., 0]
        return jnp.where(jnp.isfinite(found).all(axis=1, keepdims=True), found, 0.0)

    found = jax.lax.map(solve, (split(codes), split(pull), split(free)))
    return found.reshape((chunks * chunk, entries))[:out_size].T
