"""Products tile by tile in plain XLA, against float64, and the memory that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import error, exact, normal, random_array

from jaxq.formats import BitPlane, Codebook, Uniform
from jaxq.kernels import tiles
from jaxq.kernels.bitplane import tiled

FORMATS = [
    Codebook(3, "float32"),
    *(Uniform(3, 48), Uniform(8, "tensor")),
    BitPlane(2, 24),
]
WIDTH, OUT = 1000, 300


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products(format):
    array, xs = random_array(format, WIDTH, OUT), [normal(5, WIDTH)]
    half = jnp.asarray(normal(2, 2, WIDTH), jnp.bfloat16)
    assert all(tiles.worthwhile(jnp.asarray(x), array) for x in (*xs, half))
    *ys, y = jax.jit(lambda q, xs: [x @ q for x in xs])(array, [*xs, half])
    for x, found in zip(xs, ys, strict=True):
        assert error(found, exact(x, array)) < 2e-6
    assert y.dtype == jnp.bfloat16 and error(y, exact(half.astype(jnp.float32), array)) < 4e-3


def test_plane_by_plane():
    array, x = random_array(BitPlane(3, 64), 1152, 512), normal(3, 1152)
    assert tiled.fits(array)
    assert error(x @ array, exact(x, array)) < 2e-6


def test_more_outputs_than_a_strip_holds():
    array, x = random_array(Codebook(3), 64, tiles.COLUMNS + 40), normal(2, 64)
    assert error(x @ array, exact(x, array)) < 2e-6


@pytest.mark.parametrize(
    ("format", "shape"),
    [
        *((Codebook(4), (4096, 11008)), (Uniform(4, 128), (896, 152000))),
        *((BitPlane(3, 128), (4096, 4096)), (BitPlane(3, 128), (896, 152000))),
    ],
    ids=str,
)
def test_nothing_large_is_ever_dense(format, shape):
    x = jax.ShapeDtypeStruct((8, shape[0]), jnp.float32)
    compiled = jax.jit(lambda x, q: x @ q).lower(x, format.abstract(shape)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**20 + 2 * 4 * 8 * shape[1]


def test_many_tokens_take_the_reference():
    array = random_array(Codebook(4), WIDTH, OUT)
    assert not tiles.worthwhile(jnp.ones((tiles.TOKENS + 1, WIDTH)), array)
    assert not tiles.worthwhile(jnp.ones((1, 64)), random_array(Codebook(4), 64, 64))
    # A stack that no jax.vmap maps multiplies as a dense one does.
    stack, x = random_array(Codebook(2), 2, WIDTH, OUT), normal(2, 1, WIDTH)
    np.testing.assert_allclose(stack.matmul(x), x @ np.asarray(stack.matrix()), rtol=1e-4, atol=1e-3)
