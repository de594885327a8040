"""The schedule: sizes nest, padding is inert and small, shapes do not depend on data."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq.solvers.schedule import BLOCK, MICRO, PANEL, plan


@given(rows=st.integers(1, 20_000), group=st.one_of(st.none(), st.integers(1, 5000)))
def test_sizes_nest(rows, group):
    group = None if group is None else min(group, rows)
    made = plan(rows, group)
    sizes = made.sizes
    assert all(big % small == 0 for big, small in zip(sizes, sizes[1:], strict=False))
    assert sizes[-1] <= MICRO and made.padded % sizes[0] == 0 and made.padded >= rows
    if group is not None:
        assert made.slot in sizes and group <= made.slot < group + MICRO * (1 + -(-group // BLOCK))
        assert sizes[0] <= max(PANEL, made.slot)


@settings(max_examples=10)  # every example compiles
@given(rows=st.integers(1, 300), group=st.one_of(st.none(), st.integers(1, 300)))
def test_padding_round_trips(rows, group):
    made = plan(rows, None if group is None else min(group, rows))
    x = jnp.arange(1.0, rows * 2 + 1).reshape(rows, 2)
    padded = made.pad(x)
    assert padded.shape == (made.padded, 2)
    np.testing.assert_array_equal(made.unpad(padded), x)
    assert float(padded.sum()) == float(x.sum())


@pytest.mark.parametrize("rows", [576, 1536, 2048, 3072, 4096, 14336])
@pytest.mark.parametrize("group", [None, 32, 64])
def test_common_widths_need_no_padding(rows, group):
    assert plan(rows, group).padded == rows


def test_the_benchmark_shape():
    assert plan(4096, 128).sizes == (1024, 128, 16)
