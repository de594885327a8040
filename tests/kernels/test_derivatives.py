"""Derivatives of products that are not the reference: in both directions, of second order, batched, in loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, random_array

import jaxq
from jaxq.formats import BitPlane, Codebook, Uniform
from jaxq.kernels import dispatch, native, tiles

TABLE, GRID, PLANES = Codebook(3, "float32"), Uniform(4, 64, scale_dtype="float32"), BitPlane(2, 32, "float32")
GROUPS = Codebook(4, "float32", 64)
CASES = [
    ("tiled", GROUPS),
    ("native", GROUPS),
    ("tiled", GRID),
    ("tiled", PLANES),
    ("native", TABLE),
    ("native", PLANES),
]


#: Activations of which sums are no larger than 1: sines of large ones magnify rounding.
SMALL = np.float32(0.01)


def continuous(array):
    """The members that have derivatives, and how to put them back."""
    leaves, tree = jax.tree.flatten(array)
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def rebuild(some):
        every = list(leaves)
        for i, leaf in zip(moving, some, strict=True):
            every[i] = leaf
        return jax.tree.unflatten(tree, every)

    return [leaves[i] for i in moving], rebuild


def plain(q, x):
    return jnp.matmul(x, q.matrix(x.dtype))


def product(q, x):
    return q.matmul(x)


@pytest.fixture
def small(monkeypatch):
    """Small matrices go tile by tile too."""
    monkeypatch.setattr(tiles, "WHOLE", 0)
    monkeypatch.setattr(tiles, "TILE", 64 * 24)


def example(kind, format, *batch):
    if kind == "native" and not native.available():
        pytest.skip(native.reason())
    array = random_array(format, *batch, 160, 24)
    return jaxq.prepare(array) if kind == "native" else array


@pytest.mark.parametrize(("kind", "format"), CASES, ids=str)
def test_every_order_and_direction(kind, format, small, monkeypatch):
    members, rebuild = continuous(example(kind, format))
    x, dx, dy = (SMALL * normal(*shape, seed=i) for i, shape in enumerate(((3, 160), (3, 160), (3, 24))))
    changes = [normal(*m.shape, seed=9) for m in members]

    def found(matmul):
        def of(members, x):
            return matmul(rebuild(members), x)

        def loss(members, x):
            return jnp.sum(jnp.sin(of(members, x)))

        along = jax.jvp(of, (members, x), (changes, dx))
        back = jax.vjp(of, members, x)[1](dy)
        only_x = jax.jvp(lambda x: of(members, x), (x,), (dx,))[1], jax.grad(loss, 1)(members, x)
        # The Hessian times a vector, as `jaxq.importance` takes it.
        twice = jax.jvp(jax.grad(loss, (0, 1)), (members, x), (changes, dx))[1]
        over = jax.grad(lambda x: jnp.sum(jax.jvp(lambda x: of(members, x), (x,), (dx,))[1] ** 2))(x)
        return along, back, only_x, twice, over

    called = []
    monkeypatch.setattr(dispatch, "product", lambda *args, call=dispatch.product: called.append(1) or call(*args))
    results = jax.jit(lambda: (found(product), found(plain)))()
    assert called, "the reference was compared with itself"
    compare(*results)


def compare(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()) + 1e-6)


@pytest.mark.parametrize(("kind", "format"), CASES[1:3], ids=str)
def test_batched_and_in_loops(kind, format, small):
    stack, x = example(kind, format, 3), jnp.asarray(SMALL * normal(3, 2, 160))
    members, rebuild = continuous(stack)

    def found(matmul):
        def of(members, x):
            return jax.vmap(matmul)(rebuild(members), x)

        def layers(members, x):
            def layer(carry, q):
                y = matmul(q, x)
                return jnp.sin(carry + y.sum()), y

            return jax.lax.scan(layer, 0.0, rebuild(members))

        def total(f):
            return lambda members, x: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(f(members, x)))

        values = of(members, x), layers(members, x[0])
        backwards = jax.grad(total(of), (0, 1))(members, x), jax.grad(total(layers), (0, 1))(members, x[0])
        ones = jax.tree.map(jnp.ones_like, (members, x))
        forwards = jax.jvp(of, (members, x), ones), jax.jvp(layers, (members, x[0]), (ones[0], ones[1][0]))
        one = jax.tree.map(lambda leaf: leaf[0], stack)
        rows = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(matmul(one, x)))))(x)
        shared = jax.vmap(matmul, (0, None))(stack, x[0]), jax.vmap(matmul, (None, 0))(one, x)
        # Batched in one member only: the codes are shared.
        scaled = jax.vmap(lambda s: matmul(continuous(one)[1]([m * s for m in continuous(one)[0]]), x[0]))
        return values, backwards, forwards, rows, shared, scaled(jnp.arange(1.0, 4.0))

    compare(*jax.jit(lambda: (found(product), found(plain)))())


def test_precision_of_derivatives_is_that_of_the_call(small):
    array, x = random_array(TABLE, 160, 24), normal(2, 160)

    def loss(x):
        with jax.default_matmul_precision("highest"):
            y = array.matmul(x)
        return jnp.sum(y)

    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cuda"])(jnp.asarray(x))
    products = [line for line in exported.mlir_module().splitlines() if "stablehlo.dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


def test_importance_of_a_model_with_tiled_products(small):
    params = {"a": random_array(GRID, 160, 24), "b": normal(24, 5)}

    def fn(params, x):
        return jnp.tanh(jax.ad_checkpoint.checkpoint_name(x, "block") @ params["a"]) @ params["b"]

    batches = [normal(4, 160)]
    for estimator in ("sampled_fisher", "row_sum"):
        of = [jaxq.importance(fn, p, batches, estimator=estimator) for p in (params, jaxq.dequantize(params))]
        compare(*of)
