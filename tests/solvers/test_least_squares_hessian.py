"""The fitted Hessian where it is known, and the sums of squares that it minimises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.solvers.least_squares_hessian import LeastSquares, error, fit

N, D = 20, 6


def moves(seed, count=N):
    return np.random.default_rng(seed).normal(size=(count, D))


def floats(*arrays):
    return [np.asarray(x, np.float32) for x in arrays]


@given(seed=st.integers(0, 2**16))
def test_a_diagonal_hessian_is_recovered_and_costs_what_it_should(seed):
    rng = np.random.default_rng(seed)
    h, moved = rng.uniform(0.1, 3, D), moves(seed)
    terms = fit(*floats(moved, moved * h))
    np.testing.assert_allclose(terms.diagonal, h, rtol=1e-5)
    alone = LeastSquares(terms.diagonal, 0 * terms.direction)
    outputs, targets = floats(moves(seed + 1), moves(seed + 2))
    expected = np.mean([0.5 * d @ np.diag(h) @ d for d in (outputs - targets).astype(np.float64)])
    np.testing.assert_allclose(error(outputs, targets, alone), expected, rtol=1e-5)


@given(seed=st.integers(0, 2**16))
def test_a_hessian_of_rank_one_is_recovered(seed):
    """As published where the deviations lie on one side of u, and with any signs where those are found."""
    u, moved = np.random.default_rng(seed).normal(size=D), moves(seed)
    along = moved @ u
    sided = moved * np.where(along < 0, -1, 1)[:, None]
    terms = fit(*floats(sided, np.abs(along)[:, None] * u))
    np.testing.assert_allclose(terms.direction, u, rtol=1e-4, atol=1e-5)

    mixed = floats(moved, along[:, None] * u)
    found = fit(*mixed, aligned=True).direction
    np.testing.assert_allclose(jnp.outer(found, found), np.outer(u, u), rtol=1e-3, atol=1e-4)
    short = np.sum(along * np.abs(along)) / np.sum(along**2)
    np.testing.assert_allclose(fit(*mixed).direction, short * u, rtol=1e-3, atol=1e-4)

    outputs = floats(moves(seed + 1))[0]
    alone = LeastSquares(jnp.zeros(D), found)
    np.testing.assert_allclose(
        error(outputs, 0 * outputs, alone), 0.5 * np.mean((outputs @ u) ** 2), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("aligned", [False, True])
def test_both_parts_are_least_squares(aligned):
    """Of gradients of a full Hessian with noise: every step away from the fit costs."""
    rng = np.random.default_rng(0)
    root, moved = rng.normal(size=(D, D)), moves(1)
    g = moved @ (root @ root.T) + 0.1 * rng.normal(size=(N, D))
    terms = fit(*floats(moved, g), aligned=aligned)
    t = np.sqrt(np.maximum(np.sum(moved * g, axis=1), 0))
    taken = t > 0
    if aligned:
        t = t * np.sign(g @ np.asarray(terms.direction, np.float64))

    def diagonal_cost(h):
        return np.sum((g - moved * h) ** 2)

    def direction_cost(u):
        return np.sum((g[taken] - t[taken, None] * u) ** 2)

    assert (np.asarray(terms.diagonal) > 0).all()
    for cost, best in ((diagonal_cost, terms.diagonal), (direction_cost, terms.direction)):
        best = np.asarray(best, np.float64)
        for step in 1e-2 * rng.normal(size=(20, D)):
            assert cost(best + step) > cost(best)
    if aligned:
        published = np.asarray(fit(*floats(moved, g)).direction, np.float64)
        assert direction_cost(np.asarray(terms.direction, np.float64)) < np.sum(
            (g[taken] - np.abs(t[taken, None]) * published) ** 2
        )


def test_what_falls_takes_no_part():
    moved = moves(2)
    g = moved * np.array([1.0, 1, 1, 1, 1, -3])
    rising = np.sum(moved * g, axis=1) > 0
    assert 0 < rising.sum() < N
    terms = fit(*floats(moved, g))
    np.testing.assert_allclose(terms.diagonal, [1, 1, 1, 1, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(terms.direction, fit(*floats(moved[rising], g[rising])).direction, rtol=1e-4)
    down = fit(*floats(moved, -moved))
    np.testing.assert_array_equal(down.diagonal, 0)
    np.testing.assert_array_equal(down.direction, 0)


@pytest.mark.parametrize("aligned", [False, True])
def test_elements_and_blocks_that_do_not_deviate(aligned):
    moved = moves(3) * np.array([1.0, 1, 0, 1, 1, 1])
    terms = fit(*floats(moved, 2 * moved), aligned=aligned)
    np.testing.assert_allclose(terms.diagonal, [2, 2, 0, 2, 2, 2], rtol=1e-5)
    for still in (
        fit(*floats(0 * moved, moved), aligned=aligned),
        fit(*floats(moved, 0 * moved), aligned=aligned),
    ):
        np.testing.assert_array_equal(still.diagonal, 0)
        np.testing.assert_array_equal(still.direction, 0)


def test_shapes_derivative_and_jit():
    moved, g = floats(moves(4).reshape(N, 2, 3), moves(5).reshape(N, 2, 3))
    terms = fit(moved, g)
    assert terms.diagonal.shape == terms.direction.shape == (D,)
    slope = jax.jit(jax.grad(error))(moved, np.zeros_like(moved), terms)
    h = np.diag(np.asarray(terms.diagonal)) + np.outer(terms.direction, terms.direction)
    np.testing.assert_allclose(slope, (moved.reshape(N, D) @ h / N).reshape(moved.shape), rtol=1e-3, atol=1e-6)
    with pytest.raises(JaxqError, match="give one for each"):
        fit(moved, g[:5])
