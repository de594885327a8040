"""Products tile by tile in plain XLA, against float64, and the memory that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import error, exact, normal, random_array

from jaxq.formats import BitPlane, Codebook, Uniform
from jaxq.kernels import tiles

FORMATS = [
    *(Codebook(2), Codebook(3, "float32"), Codebook(4)),
    *(Uniform(3, 48), Uniform(4, 128), Uniform(4, None), Uniform(5, 20), Uniform(8, "tensor")),
    *(BitPlane(2, 64), BitPlane(3, None), BitPlane(2, 24)),
]
WIDTH, OUT = 1000, 300


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products(format):
    array = random_array(format, WIDTH, OUT)
    for tokens in (1, 5):
        x = normal(tokens, WIDTH)
        assert tiles.worthwhile(jnp.asarray(x), array)
        assert error(x @ array, exact(x, array)) < 2e-6
    half = jnp.asarray(normal(2, 2, WIDTH), jnp.bfloat16)
    y = half @ array
    assert y.dtype == jnp.bfloat16 and error(y, exact(half.astype(jnp.float32), array)) < 4e-3


@pytest.mark.parametrize("format", [Uniform(4, 128), BitPlane(3, 64), BitPlane(2, None)], ids=str)
def test_widths_of_whole_words(format):
    array, x = random_array(format, 1152, 512), normal(3, 1152)
    assert error(x @ array, exact(x, array)) < 2e-6


def test_more_outputs_than_a_strip_holds():
    array, x = random_array(Codebook(3), 64, tiles.COLUMNS + 40), normal(2, 64)
    assert error(x @ array, exact(x, array)) < 2e-6


@pytest.mark.parametrize("format", [Codebook(4), Codebook(3), Uniform(4, 128), BitPlane(3, 128)], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (896, 152000)], ids=str)
def test_nothing_large_is_ever_dense(format, shape):
    array = format.abstract(shape)
    for tokens in (1, 8):
        x = jax.ShapeDtypeStruct((tokens, shape[0]), jnp.float32)
        compiled = jax.jit(lambda x, q: x @ q).lower(x, array).compile()
        outputs = 4 * tokens * shape[1]
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**20 + 2 * outputs


@pytest.mark.parametrize("format", [Codebook(3, "float32"), BitPlane(2, 64, "float32")], ids=str)
def test_gradients_vmap_and_scan(format):
    array, x = random_array(format, 2, WIDTH, OUT), normal(2, 3, WIDTH)
    dense = np.asarray(array.matrix(), np.float64)
    assert error(jax.vmap(lambda q, x: q.matmul(x))(array, x), x @ dense) < 2e-6
    _, layers = jax.lax.scan(lambda carry, layer: (carry, layer.matmul(x[0])), 0, array)
    assert error(layers, x[0] @ dense) < 2e-6
    tiled = jax.grad(lambda q, x: jnp.sum(q.matmul(x) ** 2), argnums=(0, 1), allow_int=True)(array[1], x[0])
    plain = jax.grad(lambda q, x: jnp.sum((x @ q.matrix()) ** 2), argnums=(0, 1), allow_int=True)(array[1], x[0])
    for found, expected in zip(jax.tree.leaves(tiled), jax.tree.leaves(plain), strict=True):
        if found.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_many_tokens_take_the_reference():
    array = random_array(Codebook(4), WIDTH, OUT)
    assert not tiles.worthwhile(jnp.ones((tiles.TOKENS + 1, WIDTH)), array)
    assert not tiles.worthwhile(jnp.ones((1, 64)), random_array(Codebook(4), 64, 64))
