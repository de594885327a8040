"""The importance of activations against the exact Gauss-Newton matrix of small networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxq
from jaxq.errors import JaxqError

T = 20.0


def normed(x, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def rms(x, eps=1e-6):
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def vit(params, x, norm=normed):
    """Pre-LN blocks over tokens (B, N, D), read out at the first token."""
    for p in params["blocks"]:
        x = checkpoint_name(x, "block")
        h = norm(x)
        x = x + jax.nn.softmax(h @ p["qk"] @ h.swapaxes(-1, -2)) @ h @ p["v"]
        x = x + jnp.tanh(norm(x) @ p["up"]) @ p["down"]
    x = checkpoint_name(x, "block")
    return norm(x)[:, 0] @ params["head"]


def rms_vit(params, x):
    return vit(params, x, rms)


def linear(params, x):
    return checkpoint_name(x, "block") @ params["w"]


@pytest.fixture
def params(key):
    def draw(i, *shape):
        return jax.random.normal(jax.random.fold_in(key, i), shape) / np.sqrt(shape[0])

    shapes = {"qk": (6, 6), "v": (6, 6), "up": (6, 9), "down": (9, 6)}
    blocks = [{name: draw(4 * i + n, *shape) for n, (name, shape) in enumerate(shapes.items())} for i in range(2)]
    return {"blocks": blocks, "head": 8 * draw(9, 6, 4)}


@pytest.fixture
def x(key):
    return jax.random.normal(jax.random.fold_in(key, 100), (5, 3, 6))


def kl(fn, params, x, path, shift, temperature):
    """KL from the logits of one example to those with its activation shifted."""
    from jaxq.importance import Shift

    run = jaxq.quantized(fn)
    p = jax.nn.softmax(fn(params, x) / temperature)
    q = jax.nn.log_softmax(run(jaxq.Activated(params, {path: Shift(shift)}), x) / temperature)
    return jnp.sum(p * (jnp.log(p) - q))


def hessians(fn, params, x, path, shape):
    """Exact Hessians (example, elements, elements) of the KL at the float network."""

    def one(x):
        def loss(flat):
            return kl(fn, params, x[None], path, flat.reshape((1, *shape)), T)

        zero = jnp.zeros(np.prod(shape))
        return jax.grad(loss)(zero), jax.hessian(loss)(zero)

    return jax.vmap(one)(x)


def test_two_classes_by_hand():
    w = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    x = jnp.zeros((1, 2))
    # p = (1/2, 1/2), G = p (1 - p) w w^T / T^2 = 1/4 [[1, -1], [-1, 1]] / T^2.
    exact = jaxq.importance(linear, {"w": w}, [x], estimator="exact", reduction="mean_sq")["block"]
    np.testing.assert_allclose(exact, np.full(2, 0.25) / T**2, rtol=1e-6)
    rows = jaxq.importance(linear, {"w": w}, [x], estimator="row_sum")["block"]
    np.testing.assert_allclose(rows, np.zeros(2), atol=1e-10)


@pytest.mark.parametrize("fn", [vit, rms_vit])
def test_exact_is_the_diagonal_of_the_hessian_of_the_divergence(fn, params, x):
    exact = jaxq.importance(fn, params, [x[:2], x[2:]], estimator="exact", reduction="mean_sq")
    assert list(exact) == ["block", "block#2", "block#3"]
    # The first block is like the second: one Hessian less to compile.
    exact.pop("block")
    rows = jaxq.importance(fn, params, [x], paths=list(exact), estimator="row_sum", reduction="per_sample")
    for path in exact:
        slope, hessian = hessians(fn, params, x, path, (3, 6))
        diagonal = jnp.diagonal(hessian, axis1=1, axis2=2)
        scale = float(jnp.abs(diagonal).max())
        np.testing.assert_allclose(slope, np.zeros_like(slope), atol=1e-2 * scale)
        np.testing.assert_allclose(exact[path].reshape(-1), diagonal.mean(0), rtol=1e-3, atol=1e-4 * scale)
        want = jnp.abs(hessian.sum(-1)).reshape(5, 3, 6)
        np.testing.assert_allclose(rows[path], want, rtol=1e-2, atol=1e-3 * scale)


def test_the_published_probe_is_zero_where_the_residual_stream_is_normalized(params, x):
    size = {f: jaxq.importance(f, params, [x], estimator="exact", reduction="mean_sq") for f in (vit, rms_vit)}
    rows = {f: jaxq.importance(f, params, [x], estimator="row_sum") for f in (vit, rms_vit)}
    for path in ("block", "block#2", "block#3"):
        assert rows[vit][path].max() < 1e-4 * size[vit][path].max()
        assert rows[rms_vit][path].max() > 1e-2 * size[rms_vit][path].max()
    # What its code stores is rounding noise: not zero, and a thousand times less with a thousandfold step.
    noise = [jaxq.importance(vit, params, [x], estimator="finite_difference", step=d)["block"] / d
             for d in (1e-6, 1e-3)]  # fmt: skip
    assert 0 < noise[1].mean() < 0.1 * noise[0].mean()


def test_gradients_sum_to_zero_over_channels(params, x):
    drawn = jaxq.importance(vit, params, [x], reduction="per_sample")
    assert drawn["block"].shape == (5, 3, 6)

    def loss(shift):
        from jaxq.importance import Shift

        return jnp.square(jaxq.quantized(vit)(jaxq.Activated(params, {"block#2": Shift(shift)}), x)).sum()

    g = jax.grad(loss)(jnp.zeros((5, 3, 6)))
    assert np.abs(g.sum(-1)).max() < 1e-4 * np.abs(g).max()


@pytest.mark.parametrize("estimator", ["sampled_fisher", "gaussian"])
def test_sampled_vectors_have_the_diagonal_for_their_mean_square(estimator, params, x):
    many = jnp.tile(x, (4000, 1, 1))
    found = jaxq.importance(vit, params, [many], estimator=estimator, reduction="mean_sq")
    exact = jaxq.importance(vit, params, [x], estimator="exact", reduction="mean_sq")
    for path, want in exact.items():
        big = np.asarray(want) > 0.05 * float(want.max())
        ratio = np.asarray(found[path])[big] / np.asarray(want)[big]
        assert 0.93 < ratio.min() and ratio.max() < 1.07
        assert abs(ratio.mean() - 1) < 0.03


def test_differences_go_to_row_sums_in_float64(params, x):
    with jax.enable_x64(True):
        wide, images = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
        found = {
            estimator: jaxq.importance(rms_vit, wide, [images], estimator=estimator, step=1e-4)
            for estimator in ("row_sum", "finite_difference")
        }
        for path, rows in found["row_sum"].items():
            assert rows.dtype == np.float64 and rows.max() > 0
            np.testing.assert_allclose(found["finite_difference"][path] / 2e-4, rows, 1e-4, 1e-6 * rows.max())


def test_the_signed_mean_cancels(params, x):
    take = functools.partial(jaxq.importance, rms_vit, params, paths=["block"], estimator="row_sum")
    each = [take([x[i : i + 1]], reduction="signed_mean")["block"] for i in range(5)]
    np.testing.assert_allclose(np.abs(each[0]), take([x[:1]], reduction="mean_abs")["block"])
    signed, absolute = (take([x], reduction=how)["block"] for how in ("signed_mean", "mean_abs"))
    np.testing.assert_allclose(signed, np.mean(each, axis=0), 1e-4, 1e-5 * float(absolute.max()))
    assert (np.abs(signed) < 0.99 * absolute).any()


def test_all_at_once_is_one_by_one_and_batches_are_a_sum(params, x):
    whole = jaxq.importance(vit, params, [x], estimator="exact")
    turned = jaxq.importance(vit, params, [x], paths=["block#2", "block"], estimator="exact")
    assert list(turned) == ["block#2", "block"]
    for path, value in whole.items():
        alone = jaxq.importance(vit, params, [x[3:], x[:3]], paths=[path], estimator="exact")
        np.testing.assert_allclose(alone[path], value, rtol=1e-4, atol=1e-7)
    # Only the first token reaches the logits after the last block.
    assert whole["block#3"][1:].max() == 0 < whole["block#3"][0].min()


def test_draws_follow_the_key(params, x):
    a, b, c = (
        jaxq.importance(vit, params, [x], key=jax.random.key(seed), reduction="per_sample")["block"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0


def test_refusals(params, x):
    with pytest.raises(JaxqError, match="unknown estimator 'hutchinson'"):
        jaxq.importance(vit, params, [x], estimator="hutchinson")
    with pytest.raises(JaxqError, match="unknown reduction"):
        jaxq.importance(vit, params, [x], reduction="mean")
    with pytest.raises(JaxqError, match="no activation is named 'nowhere'"):
        jaxq.importance(vit, params, [x], paths=["nowhere"])
    with pytest.raises(JaxqError, match="no batches"):
        jaxq.importance(vit, params, [])
    with pytest.raises(JaxqError, match='names no activation "block"'):
        jaxq.importance(lambda p, x: x @ p["head"], params, [x])
