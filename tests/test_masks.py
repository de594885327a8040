"""Random masks against their exact distribution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.masks import bernoulli


@pytest.mark.parametrize("probability", [0.5, 0.25, 0.375, 1 / 256, 255 / 256, 0.3])
@pytest.mark.parametrize("shape", [(3, 1111), (7,), ()], ids=str)
def test_as_often_as_it_should(probability, shape):
    draws = 20_000 // max(1, math.prod(shape))
    keys = jax.random.split(jax.random.key(0), draws)
    found = np.asarray(jax.jit(jax.vmap(lambda key: bernoulli(key, probability, shape)))(keys))
    assert found.shape == (draws, *shape) and found.dtype == bool
    deviation = math.sqrt(probability * (1 - probability) / found.size)
    assert abs(found.mean() - probability) < 4 * deviation


def test_elements_do_not_know_of_each_other():
    found = np.asarray(bernoulli(jax.random.key(1), 0.375, (400, 320))).astype(float) - 0.375
    together = np.abs(np.corrcoef(found.T) - np.eye(320))
    assert together.max() < 6 / math.sqrt(400)
    for lag in (1, 31, 32, 33, 64):
        flat = found.ravel()
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 4 * 0.375 * 0.625 / math.sqrt(flat.size)


def test_keys_decide_and_certainty_needs_no_draw():
    one, again, other = (bernoulli(jax.random.key(k), 0.5, (5, 40)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert 40 < np.sum(one != other) < 160
    assert not bernoulli(jax.random.key(0), 0, (3,)).any() and bernoulli(jax.random.key(0), 1.0, (3,)).all()
    assert bernoulli(jax.random.key(0), 0.5, (0, 3)).shape == (0, 3)


def test_a_traced_probability():
    found = jax.jit(lambda p: bernoulli(jax.random.key(0), p, (10_000,)))(jnp.float32(0.2))
    assert abs(float(found.mean()) - 0.2) < 0.02
