"""FIMA-Q's terms and error against a float64 oracle, and in the cases that have a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.solvers.fima import RIDGE, Averages, Rows, assemble, average, error

N, SHAPE = 12, (3, 5)


def problem(seed, scale=1.0):
    """Deviations and gradients of 12 examples; groups differ much, so that no inverse is near its ridge."""
    rng = np.random.default_rng(seed)
    moved, g = rng.normal(size=(N, *SHAPE)), scale * rng.normal(size=(N, *SHAPE))
    return moved.astype(np.float32), g.astype(np.float32)


def fit(moved, g, rank):
    """The terms whose rows are of groups of consecutive examples, in the place of later times."""
    groups = [np.arange(N) * rank // N == k for k in range(rank)]
    rows = Rows.of(moved[groups[0]], g[groups[0]], rank)
    for group in groups[1:]:
        rows = rows.followed_by(moved[group], g[group])
    return assemble(rows.averages, moved)


def oracle(moved, g, rank):
    """The low-rank and the diagonal term of a batch of deviations, in float64, by loops."""
    rows = np.abs(np.asarray(moved, np.float64)).reshape(len(moved), -1)
    slopes = np.abs(np.asarray(g, np.float64)).reshape(len(g), -1)
    groups = [[n for n in range(len(rows)) if n * rank // len(rows) == k] for k in range(rank)]
    d_bar = np.stack([rows[group].mean(axis=0) for group in groups])
    g_bar = np.stack([slopes[group].mean(axis=0) for group in groups])
    b = d_bar @ d_bar.T
    b = b + RIDGE * np.trace(b) * np.eye(rank)

    def terms(batch):
        low = diagonal = 0.0
        for c in np.abs(np.asarray(batch, np.float64)).reshape(len(batch), -1):
            a = g_bar @ c
            low += a @ np.linalg.solve(b, a) / len(batch)
            diagonal += np.sum(g_bar.mean(axis=0) * c**2) / len(batch)
        return np.array([low, diagonal])

    return terms


@given(seed=st.integers(0, 2**16), rank=st.sampled_from([1, 3, 5]))
def test_error_is_that_of_the_oracle(seed, rank):
    moved, g = problem(seed, 1e-4)
    terms, expected = fit(moved, g, rank), oracle(moved, g, rank)
    np.testing.assert_allclose(terms.first, expected(moved), rtol=1e-3)
    batch, targets = problem(seed + 1)
    value = (expected(batch - targets) / expected(moved)).sum()
    np.testing.assert_allclose(error(batch, targets, terms), value, rtol=1e-3)


def test_it_is_two_where_it_was_fitted():
    moved, g = problem(0)
    targets = np.ones_like(moved)
    assert float(error(targets + moved, targets, fit(moved, g, 4))) == pytest.approx(2, rel=1e-5)
    assert float(error(targets, targets, fit(moved, g, 4))) == 0


def test_rank_one_in_closed_form():
    moved, g = problem(1)
    terms = fit(moved, g, 1)
    c = np.abs(moved).reshape(N, -1)
    mean, slope = c.mean(axis=0), np.abs(g).reshape(N, -1).mean(axis=0)
    np.testing.assert_allclose(terms.diagonal, slope, rtol=1e-6)
    np.testing.assert_allclose(terms.first[0], np.mean((c @ slope) ** 2) / (mean @ mean), rtol=1e-4)


def test_rows_that_are_equal_or_zero_do_no_harm():
    """The plain inverse of the published code does not exist here."""
    moved, g = problem(2)
    one = fit(moved, g, 1)
    rows = average(moved, g)
    equal = assemble(Averages(*(jnp.tile(x, (3, 1)) for x in rows)), moved)
    padded = assemble(Averages(*(jnp.pad(x, ((0, 2), (0, 0))) for x in rows)), moved)
    for other in (equal, padded):
        assert other.root.shape == (3, 3) and np.isfinite(other.root).all()
        np.testing.assert_allclose(error(2 * moved, moved, other), error(2 * moved, moved, one), rtol=1e-4)
        np.testing.assert_allclose(other.first[0], one.first[0], rtol=1e-4)


def test_rows_of_several_passes():
    """Each pass is a row, and what the error is divided by is that of the first deviations."""
    (moved, g), (later, later_g) = problem(3), problem(4)
    rows = Rows.of(moved, g, 3)
    assert float(error(moved, jnp.zeros_like(moved), rows.terms())) == pytest.approx(2, rel=1e-5)
    rows = rows.followed_by(later, later_g)
    both = [average(moved, g), average(later, later_g)]
    want = assemble(jax.tree.map(lambda *x: jnp.concatenate(x), *both), moved)
    for batch in (moved, later):
        np.testing.assert_allclose(error(batch, 0 * batch, rows.terms()), error(batch, 0 * batch, want), rtol=1e-4)
    assert jax.tree.map(jnp.shape, rows.terms()) == jax.tree.map(jnp.shape, Rows.of(moved, g, 3).terms())
    rows = rows.followed_by(later, later_g)
    with pytest.raises(JaxqError, match="has its 3 rows already"):
        rows.followed_by(later, later_g)


def test_scales_and_order_within_groups_change_nothing():
    moved, g = problem(5)
    batch, targets = problem(6)
    before = error(batch, targets, fit(moved, g, 3))
    order = np.concatenate([np.random.default_rng(0).permutation(4) + 4 * k for k in range(3)])
    np.testing.assert_allclose(error(batch, targets, fit(moved[order], g[order], 3)), before, rtol=1e-4)
    np.testing.assert_allclose(error(batch, targets, fit(moved, 1e-7 * g, 3)), before, rtol=1e-4)


def test_nothing_to_divide_by():
    moved, g = problem(7)
    for terms in (fit(0 * moved, g, 2), fit(moved, 0 * g, 2)):
        assert np.isfinite(jax.tree.leaves(jax.tree.map(np.sum, terms))).all()
    np.testing.assert_array_equal(fit(moved, 0 * g, 2).first, [1, 1])
    assert float(error(moved, 0 * moved, fit(moved, 0 * g, 2))) == 0


def test_derivative_is_finite_also_at_the_target():
    moved, g = problem(8)
    terms = fit(moved, g, 2)
    outputs = jnp.asarray(moved).at[0].set(0.0)
    slope = jax.jit(jax.grad(error))(outputs, jnp.zeros_like(outputs), terms)
    np.testing.assert_array_equal(slope[0], 0)
    # Both terms are of degree 2.
    np.testing.assert_allclose(jnp.sum(slope * outputs), 2 * error(outputs, 0 * outputs, terms), rtol=1e-4)


def test_bad_input_is_refused():
    moved, g = problem(9)
    with pytest.raises(JaxqError, match="at least one row, not 0"):
        Rows.of(moved, g, 0)
    for wrong in ((moved, g[:, :2]), (moved[:0], g[:0])):
        with pytest.raises(JaxqError, match="give one for each"):
            Rows.of(*wrong, 1)
