"""From GELU to ReLU: the bound, the error and its derivative, and networks that need no change."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.solvers import reconstruct, relu_mlp
from jaxq.solvers.relu_mlp import MLPWeights, bound, clamped, error, fit, fit_together, normalized, run

N, T, E, F = 24, 3, 5, 8
QUICK = dict(iterations=100, batch=8, rate=2e-3, chunk=50)


def problem(seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    shapes = ((E, F), (F,), (F, E), (E,))
    weights = MLPWeights(*(jnp.asarray(size * rng.normal(size=s), jnp.float32) for s in shapes))
    return weights, jnp.asarray(rng.normal(size=(N, T, E)), jnp.float32)


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def gelu_mlp(weights, x):
    k1, b1, k2, b2, x = wide(*weights, x)
    z = x @ k1 + b1
    hidden = z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    return hidden, jnp.asarray(hidden @ k2 + b2, jnp.float32)


def relu_mlp_output(weights, x, most=np.inf):
    k1, b1, k2, b2, x = wide(*weights, x)
    return np.minimum(np.maximum(x @ k1 + b1, 0), most) @ k2 + b2


def cost(weights, x, targets, h, u, alpha=2.0):
    """The published error in float64."""
    h = np.ones((T, E)) if h is None else np.asarray(h, np.float64)
    h = h * np.sqrt(h.size / np.sum(h**2))
    targets = np.asarray(targets, np.float64)
    squares = (relu_mlp_output(weights, x) - targets) ** 2
    squares = squares + alpha * (relu_mlp_output(weights, x, u) - targets) ** 2
    return np.sum(squares * h, axis=1).mean() / 10


@given(seed=st.integers(0, 2**16), percentile=st.sampled_from([0.01, 0.5, 0.98, 0.99, 1.0]))
def test_the_bound_is_a_percentile_of_the_positive_activations(seed, percentile):
    weights, x = problem(seed)
    hidden, _ = gelu_mlp(weights, x)
    positive = np.sort(hidden[hidden > 0])
    expected = positive[math.ceil(len(positive) * percentile) - 1]
    np.testing.assert_allclose(bound(weights, x, percentile), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("examples", [1, 5, 7, 24])
def test_the_bound_is_exact_and_the_same_by_chunks(examples, monkeypatch):
    """Of one unit, and inputs so large that GELU leaves them: the activations are known."""
    values = np.random.default_rng(0).permutation(np.linspace(10, 1e4, N * T)).astype(np.float32)
    values[:5] = -values[:5]
    x = jnp.zeros((N, T, E)).at[:, :, 0].set(values.reshape(N, T))
    weights = MLPWeights(jnp.zeros((E, F)).at[0, 0].set(1.0), jnp.zeros(F), jnp.zeros((F, E)), jnp.zeros(E))
    monkeypatch.setattr(relu_mlp, "CHUNK", examples * T * F)
    positive = np.sort(values[values > 0])
    for percentile in (1e-6, *np.linspace(0.05, 1, 20)):
        assert bound(weights, x, percentile) == positive[math.ceil(len(positive) * percentile) - 1]


def test_error_and_derivative_of_the_clamp():
    weights, x = problem(1)
    _, targets = gelu_mlp(weights, x)
    h = jnp.asarray(np.random.default_rng(1).uniform(0.1, 2, (T, E)), jnp.float32)
    fixed = {"importance": normalized(h), "bound": jnp.float32(0.7), "alpha": jnp.float32(3)}
    np.testing.assert_allclose(jnp.mean(jnp.square(fixed["importance"])), 1, rtol=1e-6)
    found = jax.jit(lambda w: error(run({"weights": w}, fixed, x, None), targets, fixed))(weights)
    np.testing.assert_allclose(found, cost(weights, x, targets, h, 0.7, 3.0), rtol=1e-4)
    at = jnp.array([-1.0, 0.5, 2.0, 2.5])
    np.testing.assert_array_equal(jax.vmap(jax.grad(lambda v: clamped(v, jnp.float32(2.0))))(at), [1, 1, 1, 0])


def test_what_is_always_clamped_learns_from_the_direct_term_alone():
    weights, x = problem(2)
    weights = weights._replace(fc1_bias=weights.fc1_bias.at[0].set(100.0))
    targets = jnp.zeros_like(x)
    fixed = {"importance": jnp.ones((T, E)), "bound": jnp.float32(1.0), "alpha": jnp.float32(2)}

    def limited(weights):
        return error(run({"weights": weights}, fixed, x, None)[1:] * 2, targets, fixed)

    slope = jax.jit(jax.grad(limited))(weights)
    np.testing.assert_array_equal(slope.fc1_kernel[:, 0], 0)
    assert float(slope.fc1_bias[0]) == 0 and np.abs(slope.fc1_bias[1:]).max() > 0


def test_training_lowers_the_error():
    weights, x = problem(3)
    hidden, targets = gelu_mlp(weights, x)
    h = jnp.asarray(np.random.default_rng(3).uniform(0, 2, (T, E)), jnp.float32)
    seen = []
    new, errors = fit(weights, x, targets, h, progress=lambda *at: seen.append(at), **QUICK)
    u = np.sort(hidden[hidden > 0])[math.ceil((hidden > 0).sum() * 0.99) - 1]
    assert cost(new, x, targets, h, u) < 0.7 * cost(weights, x, targets, h, u)
    assert seen == [(50, errors[0]), (100, errors[1])] and errors[1] < errors[0]
    again, _ = fit(weights, x, targets, 1e-12 * h, **QUICK)
    for one, other in zip(new, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_network_with_relu_stays():
    """Without a clamp, or with the bound at the largest activation, it has no error: nothing moves, bit for bit.

    Of whole numbers, so that sums are exact. GELU gives the largest of them as it is.
    """
    rng = np.random.default_rng(4)
    weights = MLPWeights(*(jnp.asarray(rng.integers(-3, 4, w.shape), jnp.float32) for w in problem()[0]))
    x = jnp.asarray(rng.integers(-3, 4, (N, T, E)), jnp.float32)
    targets = jnp.asarray(relu_mlp_output(weights, x), jnp.float32)
    for settings in (dict(percentile=1.0), dict(percentile=0.5, alpha=0.0)):
        new, errors = fit(weights, x, targets, **settings, **QUICK)
        assert errors == [0, 0]
        jax.tree.map(np.testing.assert_array_equal, new, weights)
    moved, errors = fit(weights, x, targets, percentile=0.5, **QUICK)
    assert errors[0] > 1 and np.abs(moved.fc1_kernel - weights.fc1_kernel).max() > 0.02


def test_equal_shapes_compile_once_and_dtypes_stay():
    weights, x = problem(5)
    _, targets = gelu_mlp(weights, x)
    fit(weights, x, targets, **QUICK)
    before = reconstruct._steps._cache_size()
    fit(*problem(6), targets, jnp.ones((T, E)), percentile=0.9, alpha=1.0, **QUICK)
    assert reconstruct._steps._cache_size() == before
    half = MLPWeights(*(w.astype(jnp.bfloat16) for w in weights))
    new, _ = fit(half, x, targets, **QUICK)
    assert all(w.dtype == jnp.bfloat16 for w in new)


def test_side_by_side_as_one_by_one():
    keys = jax.random.split(jax.random.key(3), 2)
    given = [problem(seed, size) for seed, size in ((8, 1.0), (9, 0.5))]
    targets = [gelu_mlp(weights, x)[1] for weights, x in given]
    alone = [
        fit(weights, x, y, percentile=0.9, key=key, **QUICK)
        for (weights, x), y, key in zip(given, targets, keys, strict=True)
    ]
    ready = [
        relu_mlp.problem(weights, x, y, percentile=0.9) for (weights, x), y in zip(given, targets, strict=True)
    ]
    seen = []
    found, errors = fit_together(ready, keys=keys, progress=lambda *at: seen.append(at), **QUICK)
    for (one, _), other in zip(alone, found, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, other)
    np.testing.assert_allclose(errors, np.mean([e for _, e in alone], axis=0), rtol=1e-4)
    assert seen == [(50, errors[0]), (100, errors[1])]


def test_bad_input_is_refused():
    weights, x = problem(7)
    with pytest.raises(JaxqError, match=r"a percentile is in \(0, 1\], not 0"):
        fit(weights, x, x, percentile=0)
    with pytest.raises(JaxqError, match="not those of an MLP"):
        fit(weights._replace(fc2_kernel=weights.fc1_kernel), x, x)
    with pytest.raises(JaxqError, match=r"are not both \(N, ..., 5\)"):
        fit(weights, x, x[:3])
    with pytest.raises(JaxqError, match="an importance of shape"):
        fit(weights, x, x, jnp.ones(E))
    for h in (jnp.zeros((T, E)), -jnp.ones((T, E)), jnp.full((T, E), jnp.nan)):
        with pytest.raises(JaxqError, match="an importance is finite"):
            fit(weights, x, x, h)
    dead = weights._replace(fc1_kernel=0 * weights.fc1_kernel, fc1_bias=-jnp.ones(F))
    with pytest.raises(JaxqError, match="no activation of the MLP is positive"):
        fit(dead, x, x)
