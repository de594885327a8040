"""Products of codes are exact, whatever the number of terms."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax import lax

from jaxq.kernels import integer as kernel

SHAPES = [
    ((3, 33), (33, 7), (((1,), (0,)), ((), ()))),
    ((5, 6), (4, 6), (((1,), (1,)), ((), ()))),
    ((2, 3, 50, 50), (2, 3, 50, 64), (((3,), (2,)), ((0, 1), (0, 1)))),
    ((3, 5, 7), (5, 7, 2), (((1, 2), (0, 1)), ((), ()))),
    ((3, 8), (8, 5), (((1,), (0,)), ((), ()))),
    ((3,), (4,), (((), ()), ((), ()))),
]


def operands(a, b, seed):
    rng = np.random.default_rng(seed)
    return (rng.integers(-128, 128, shape).astype(np.int8) for shape in (a, b))


def exact(a, b, numbers):
    return np.asarray(lax.dot_general(a.astype(np.float64), b.astype(np.float64), numbers, precision="highest"))


def check(sizes, seed):
    a, b, numbers = sizes
    x, y = operands(a, b, seed)
    found = jax.jit(kernel.codes_dot, static_argnums=2)(x, y, numbers)
    assert found.dtype == jnp.int32
    # Every sum is a whole number that float32 holds.
    np.testing.assert_array_equal(found, exact(x, y, numbers))


@pytest.mark.parametrize("sizes", SHAPES)
def test_products(sizes):
    check(sizes, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SHAPES)
def test_products_on_a_gpu(sizes):
    check(sizes, 0)


@given(st.integers(1, 9), st.integers(0, 2**31))
def test_zeros_behind_the_terms_change_nothing(terms, seed):
    x, y = operands((3, terms), (terms, 2), seed)
    more = [np.asarray(kernel._filled(jnp.asarray(v), axis)) for v, axis in ((x, 1), (y, 0))]
    assert more[0].shape[1] % kernel.WHOLE == 0
    np.testing.assert_array_equal(more[0].astype(int) @ more[1].astype(int), x.astype(int) @ y.astype(int))
