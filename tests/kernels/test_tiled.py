"""Products tile by tile in plain XLA, against float64, and the memory that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import error, exact, normal, random_array

from jaxq.formats import BitPlane, Codebook, Uniform
from jaxq.kernels import matvec, tiles
from jaxq.kernels.bitplane import tiled

FORMATS = [
    *(Codebook(3, "float32"), Codebook(4, "float32", 96)),
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


ONE = [
    *(Uniform(4, 128), Uniform(3, 32), Uniform(5, 64, symmetric=True), Uniform(2, "tensor"), Uniform(8, None)),
    *(Codebook(1), Codebook(3, "float32"), Codebook(4, "bfloat16")),
    *(BitPlane(3, 64), BitPlane(2, 256), BitPlane(1, None)),
]


@pytest.mark.parametrize("format", ONE, ids=str)
@pytest.mark.parametrize("width", [1152, 832])
def test_one_token(format, width):
    array, x = random_array(format, width, 400), normal(width)
    assert matvec.worthwhile(x, array)
    product = jax.jit(lambda x, q: x @ q)
    assert error(product(x, array), exact(x, array)) < 2e-6
    half = jnp.asarray(x[None], jnp.bfloat16)
    assert product(half, array).shape == (1, 400)
    assert error(product(half, array), exact(half.astype(jnp.float32), array)) < 4e-3


@pytest.mark.parametrize(
    ("format", "width"),
    [(Codebook(5), 1024), (Uniform(4, 16), 1024), (Uniform(3, 48), 1056), (BitPlane(2, 64), 1000)],
    ids=str,
)
def test_what_has_no_blocks_goes_tile_by_tile(format, width):
    array, x = random_array(format, width, 300), normal(1, width)
    assert not matvec.worthwhile(x, array)
    assert error(x @ array, exact(x, array)) < 2e-6


def test_tokens_of_a_vmap_are_decoded_once():
    array, x = random_array(Codebook(4), 1024, 512), normal(3, 1024)
    mapped = jax.jit(jax.vmap(lambda x, q: x @ q, (0, None)))
    assert error(mapped(x, array), exact(x, array)) < 2e-6
    tokens = [line for line in mapped.lower(x, array).as_text().splitlines() if "dot_general" in line]
    assert tokens and all("3x" in line for line in tokens)
    stack = jax.tree.map(lambda z: jnp.stack([z, z, z]), array)
    assert error(jax.vmap(lambda x, q: x @ q)(x, stack), exact(x, array)) < 2e-6


@pytest.mark.parametrize("format", [Uniform(4, 128), Codebook(4), BitPlane(3, 128), BitPlane(3, 64)], ids=str)
def test_one_token_stores_nothing_dense(format):
    def temporary(f, *operands):
        return jax.jit(f).lower(*operands).compile().memory_analysis().temp_size_in_bytes

    x = jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    for width, out in ((4096, 4096), (14336, 4096), (4096, 14336), (896, 152000)):
        wide = jax.ShapeDtypeStruct((1, width), jnp.float32)
        assert temporary(lambda x, q: x @ q, wide, format.abstract((width, out))) < 4 * 2**20
    # Nor before a loop around it.
    array = format.abstract((4096, 4096))
    assert temporary(lambda x, q: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ q), x), x, array) < 4 * 2**20


def test_many_tokens_take_the_reference():
    array = random_array(Codebook(4), WIDTH, OUT)
    assert not tiles.worthwhile(jnp.ones((tiles.TOKENS + 1, WIDTH)), array)
    assert not tiles.worthwhile(jnp.ones((1, 64)), random_array(Codebook(4), 64, 64))
    # A stack that no jax.vmap maps multiplies as a dense one does.
    stack, x = random_array(Codebook(2), 2, WIDTH, OUT), normal(2, 1, WIDTH)
    np.testing.assert_allclose(stack.matmul(x), x @ np.asarray(stack.matrix()), rtol=1e-4, atol=1e-3)
