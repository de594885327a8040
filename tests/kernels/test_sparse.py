"""Sparse products against NumPy: empty columns, shards, both ways of multiplying."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.kernels import sparse


def stored(matrix: np.ndarray):
    """(rows, values, starts, counts) of the entries of `matrix` that are not 0."""
    column, row = np.nonzero(matrix.T)
    counts = np.bincount(column, minlength=matrix.shape[1])
    starts = (np.cumsum(counts) - counts).astype(np.uint32)
    return tuple(map(jnp.asarray, (row.astype(np.uint16), matrix[row, column], starts, counts.astype(np.uint16))))


def random(rows: int, columns: int, entries: int, seed: int) -> np.ndarray:
    """A matrix with `entries` entries, several columns of which are empty and one nearly full."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((rows, columns), np.float32)
    usable = rng.permutation(columns)[: max(1, columns // 2)]
    places = [(r, c) for c in usable for r in range(rows)][:entries]
    for place in places:
        matrix[place] = rng.uniform(1, 2) * rng.choice([-1, 1])
    return matrix


@given(seed=st.integers(0, 10**6), entries=st.sampled_from([1, 7, 20]))
def test_columns_and_dense(seed, entries):
    matrix = random(11, 8, entries, seed)
    rows, values, starts, counts = stored(matrix)
    column, valid = sparse.columns(starts, counts, rows.shape[0])
    np.testing.assert_array_equal(column, np.nonzero(matrix.T)[0])
    assert bool(valid.all())
    np.testing.assert_array_equal(
        jax.jit(sparse.dense, static_argnums=4)(rows, values, starts, counts, 11), matrix
    )


@pytest.mark.parametrize("low", [0, 2, 4, 6])
def test_a_shard_sees_its_own_columns(low):
    matrix = random(11, 8, 20, 3)
    rows, values, starts, counts = stored(matrix)
    mine = (rows, values, starts[low : low + 2], counts[low : low + 2])
    part, x = matrix[:, low : low + 2], np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    np.testing.assert_array_equal(sparse.dense(*mine, 11), part)
    for tokens in (x[:0], x[0], x, np.tile(x, (30, 1))):
        np.testing.assert_allclose(
            sparse.product(jnp.asarray(tokens), *mine, 2), tokens @ part, rtol=1e-5, atol=1e-6
        )
    np.testing.assert_array_equal(sparse.take(jnp.array([1, 0, 1, -1]), *mine, 11), part.T[[1, 0, 1, 1]])


@pytest.mark.parametrize("tokens", [(), (2,), (2, 3), (40, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product(tokens, dtype):
    matrix = random(32, 24, 30, 1)
    overlay = stored(matrix)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*tokens, 32)), dtype)
    out = jax.jit(sparse.product, static_argnums=5)(x, *overlay, 24)
    assert out.dtype == jnp.float32 and out.shape == (*tokens, 24)
    np.testing.assert_allclose(out, np.asarray(x, np.float64) @ matrix, rtol=1e-5, atol=1e-5)
    assert sparse.gathers(x, 30, 24) == (tokens != (40, 5))


def test_both_ways_have_the_same_derivatives():
    matrix = random(16, 12, 10, 2)
    rows, values, starts, counts = stored(matrix)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 16)).astype(np.float32))
    assert sparse.gathers(x, 10, 12) and not sparse.gathers(jnp.tile(x, (2, 1)), 10, 12)

    def loss(x, values, copies):
        return jnp.sum(sparse.product(jnp.tile(x, (copies, 1)), rows, values, starts, counts, 12) ** 2) / copies

    few, many = (jax.grad(loss, (0, 1))(x, values, copies) for copies in (1, 2))
    for a, b in zip(few, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    of_weights = 2 * np.asarray(x).T @ (np.asarray(x) @ matrix)
    np.testing.assert_allclose(few[1], of_weights.T[matrix.T != 0], rtol=1e-4, atol=1e-4)
