"""Groups of inputs."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxq.formats.groups import join_groups, split_groups


@given(rows=st.integers(1, 40), size=st.integers(1, 17))
def test_groups_round_trip(rows, size):
    x = jnp.arange(rows * 3.0).reshape(rows, 3)
    groups = split_groups(x, size)
    assert groups.shape == (-(-rows // size), size, 3)
    np.testing.assert_array_equal(join_groups(groups, rows), x)
