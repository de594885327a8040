"""Layout: logical leaves of any axis order are (in, out) matrices."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.formats import Layout

CASES = {
    "dense": ((6, 4), (0,), (1,), (6, 4)),
    "out first": ((4, 6), (1,), (0,), (6, 4)),
    "heads out (DenseGeneral)": ((6, 2, 5), (0,), (1, 2), (6, 10)),
    "heads in (attention output)": ((2, 5, 6), (0, 1), (2,), (10, 6)),
    "conv HWIO": ((3, 3, 4, 8), (0, 1, 2), (3,), (36, 8)),
    "conv OIHW": ((8, 4, 3, 3), (1, 2, 3), (0,), (36, 8)),
    "in axes out of order": ((4, 3, 5), (2, 0), (1,), (20, 3)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matrix_is_the_einsum_operand(case):
    shape, in_axes, out_axes, matrix = case
    layout = Layout.of(shape, in_axes, out_axes)
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    canonical = layout.to_canonical(jnp.asarray(leaf))
    assert canonical.shape == matrix == layout.matrix_shape(shape)
    assert layout.logical_core(*matrix) == shape
    np.testing.assert_array_equal(canonical, leaf.transpose(in_axes + out_axes).reshape(matrix))
    np.testing.assert_array_equal(layout.from_canonical(canonical), leaf)


@given(st.data())
def test_round_trip_with_batch_axes(data):
    core = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    batch = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    axes = data.draw(st.permutations(range(len(core))))
    cut = data.draw(st.integers(1, len(core) - 1))
    layout = Layout.of(core, axes[:cut], axes[cut:])
    leaf = np.arange(math.prod(batch + core)).reshape(batch + core)
    matrix = layout.to_canonical(jnp.asarray(leaf))
    assert matrix.shape[:-2] == batch
    np.testing.assert_array_equal(layout.from_canonical(matrix), leaf)


def test_default_is_a_plain_matrix():
    assert Layout.of((7, 9), (0,), (1,)) == Layout()
    assert hash(Layout()) == hash(Layout.of((2, 3), [0], [1]))


@pytest.mark.parametrize(("ins", "outs"), [((0,), ()), ((0, 1), (1,)), ((0,), (2,)), ((), (0, 1))])
def test_axes_must_split_the_shape(ins, outs):
    with pytest.raises(JaxqError, match="name each axis once"):
        Layout.of((3, 4), ins, outs)


def test_wrong_leaf_is_refused():
    layout = Layout.of((2, 5, 6), (0, 1), (2,))
    with pytest.raises(JaxqError, match="does not describe a weight of shape"):
        layout.to_canonical(jnp.zeros((2, 4, 6)))
