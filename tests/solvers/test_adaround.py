"""Learned rounding: what it starts from, what it ends at, and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.formats.groups import split_groups
from jaxq.formats.uniform import Uniform, fit_minmax, fit_mse
from jaxq.solvers import adaround
from jaxq.solvers.rtn import rtn

FORMATS = [Uniform(3, None), Uniform(4, 8), Uniform(2, 7, symmetric=True), Uniform(3, None, scale_dtype="float32")]


def example(format, seed=0, fit=fit_mse, shape=(20, 6)):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    scale, zero = fit(split_groups(w, format.rows_per_group(shape[0])), format)
    return w, adaround.start(w, scale, zero, format)


def bounds(a, w):
    """Smallest and largest value of each weight's grid, by hand."""
    size = a.format.rows_per_group(w.shape[0])
    groups = np.arange(w.shape[0]) // size
    scale, zero = (np.asarray(x, np.float64)[groups, 0] for x in (a.scale, a.zero))
    return scale, -zero * scale, (a.format.levels - zero) * scale


@pytest.mark.parametrize("format", FORMATS, ids=str)
@given(seed=st.integers(0, 2**16))
def test_it_starts_from_the_clamped_weight(format, seed):
    w, a = example(format, seed)
    scale, low, high = bounds(a, w)
    np.testing.assert_allclose(
        adaround.soft(a), np.clip(w, low, high), atol=3e-6 * float(scale.max()) * 2**format.bits
    )
    rest = np.asarray(w, np.float64) / scale - np.floor(np.asarray(w, np.float64) / scale)
    inside = (rest > 1e-3) & (rest < 1 - 1e-3)
    np.testing.assert_allclose(np.asarray(adaround.gate(a.alpha))[inside], rest[inside], atol=2e-5)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_untrained_it_rounds_to_nearest(format):
    w, a = example(format, fit=fit_minmax)
    nearest = rtn(w, format)
    np.testing.assert_allclose(adaround.hard(a), nearest.dequantize(), atol=1e-6)
    stored = adaround.store(a)
    np.testing.assert_array_equal(stored.codes, nearest.codes)
    np.testing.assert_allclose(stored.dequantize(), adaround.hard(a), rtol=1e-6)


def test_ties_go_up():
    format = Uniform(3, None, scale_dtype="float32")
    w = jnp.array([[0.5], [1.5], [-0.5], [2.0]])
    a = adaround.start(w, jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 2.0), format)
    np.testing.assert_array_equal(adaround.hard(a)[:, 0], [1.0, 2.0, 0.0, 2.0])


def test_gate_and_regularizer():
    alpha = jnp.array([-50.0, 0.0, 50.0])
    np.testing.assert_allclose(adaround.gate(alpha), [0.0, 0.5, 1.0], atol=1e-6)
    assert float(adaround.regularizer(alpha, 20.0)) == pytest.approx(1.0)
    assert float(adaround.regularizer(jnp.array([-50.0, 50.0]), 2.0)) == pytest.approx(0.0, abs=1e-6)
    assert [float(adaround.annealed(s)) for s in (0.0, 0.2, 0.6, 1.0)] == pytest.approx([20.0, 20.0, 11.0, 2.0])
    alphas = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)}
    assert float(adaround.rounding_penalty(alphas, 0.1)) == 0
    assert float(adaround.rounding_penalty(alphas, 0.6)) == pytest.approx(0.1)


def test_derivative_is_that_of_the_gate_inside_the_range():
    format = Uniform(2, None, scale_dtype="float32")
    # Code 3 of 0..3 is the last: a weight on it, one beyond it and one inside.
    w = jnp.array([[1.3], [2.7], [0.4]])
    a = adaround.start(w, jnp.full((1, 1, 1), 0.5), jnp.zeros((1, 1, 1)), format)
    g = jax.grad(lambda alpha: adaround.soft(a.__class__(alpha, a.floor, a.scale, a.zero, format)).sum())(a.alpha)
    s = jax.nn.sigmoid(a.alpha)
    slope = 0.5 * 1.2 * s * (1 - s)
    np.testing.assert_allclose(g, slope * jnp.array([[1.0], [0.0], [1.0]]), rtol=1e-5)
    # On the last code exactly, and with a gate that is exactly shut, the derivative passes.
    edge = adaround.AdaRound(jnp.zeros((1, 1)), jnp.array([[2.5]]), a.scale, a.zero, format)
    g = jax.grad(lambda alpha: adaround.soft(adaround.AdaRound(alpha, edge.floor, a.scale, a.zero, format)).sum())
    np.testing.assert_allclose(g(edge.alpha), [[0.5 * 1.2 * 0.25]], rtol=1e-5)
