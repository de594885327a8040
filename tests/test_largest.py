"""The places of the largest values, however they are found."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxq.largest import by_sort, largest


@pytest.mark.parametrize("find", [largest, by_sort])
@given(seed=st.integers(0, 2**31), data=st.data())
def test_places_are_those_of_a_stable_sort(find, seed, data):
    # Few distinct values, so that order among equal ones is tested.
    score = np.random.default_rng(seed).integers(-2, 3, 37).astype(np.float32)
    count = data.draw(st.sampled_from([1, 5, 37]))
    expected = np.argsort(-score, kind="stable")[:count]
    np.testing.assert_array_equal(find(jnp.asarray(score), count), expected)


@pytest.mark.parametrize("find", [largest, by_sort])
def test_places_of_a_batch(find):
    score = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    found = jax.vmap(lambda x: find(x, 4))(jnp.asarray(score))
    np.testing.assert_array_equal(found, np.argsort(-score, axis=-1)[:, :4])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2**20, 2**20 + 2048, 2**21])
def test_sizes_on_which_the_compiler_of_gpus_does_not_end(size):
    score = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    np.testing.assert_array_equal(largest(jnp.asarray(score), 100), np.argsort(-score, kind="stable")[:100])
