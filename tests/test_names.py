"""Quantizers of named activations: as if the function itself rounded them there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxq
from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer
from jaxq.stages import run, stages

ROUNDED = ["blocks/0/hidden", "blocks/1/probs"]


def block(p, x, i, name):
    with jax.named_scope(f"Model/blocks/{i}"):
        x = checkpoint_name(x, "block")
        h = name(jnp.tanh(x @ p["up"]["kernel"]), f"blocks/{i}/hidden")
        probs = name(jax.nn.softmax(h @ h.swapaxes(-1, -2)), f"blocks/{i}/probs")
        return x + probs @ h @ p["down"]["kernel"]


def named(x, path):
    return checkpoint_name(x, path.rpartition("/")[2])


def model(params, x, name=named):
    for i in range(3):
        x = block(params["blocks"][str(i)], x, i, name)
    return x @ params["head"]["kernel"]


@pytest.fixture
def params(key):
    def draw(i, *shape):
        return {"kernel": 0.5 * jax.random.normal(jax.random.fold_in(key, i), shape)}

    blocks = {str(i): {"up": draw(2 * i, 8, 12), "down": draw(2 * i + 1, 12, 8)} for i in range(3)}
    return {"blocks": blocks, "head": draw(9, 8, 5)}


@pytest.fixture
def quantizers():
    return {
        ROUNDED[0]: AffineQuantizer(jnp.float32(0.25), jnp.float32(4), 3),
        ROUNDED[1]: AffineQuantizer(jnp.float32(0.1), jnp.float32(0), 3),
    }


@pytest.fixture
def x(key):
    return jax.random.normal(jax.random.fold_in(key, 100), (2, 4, 8))


def by_hand(params, x, quantizers):
    return model(params, x, lambda v, path: quantizers[path](v) if path in quantizers else v)


def test_names_are_listed_with_their_scopes(params, x):
    found = jaxq.activations(model, params, x)
    assert [n.path for n in found] == [f"blocks/{i}/{what}" for i in range(3) for what in ("hidden", "probs")]
    assert found[1].shape == (2, 4, 4) and not any(n.repeated for n in found)


def test_named_activations_are_rounded_where_they_are_named(params, x, quantizers):
    want = by_hand(params, x, quantizers)
    got = jax.jit(jaxq.quantized(model))(jaxq.Activated(params, quantizers), x)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert np.abs(np.asarray(want - model(params, x))).max() > 1e-2
    plain = jaxq.quantized(model)(jaxq.Activated(params, {}), x)
    np.testing.assert_array_equal(plain, model(params, x))


def test_beside_quantized_weights(params, x, quantizers):
    rounded = jax.tree.map(lambda w: jaxq.rtn(w, jaxq.Uniform(4, None)), params)
    want = by_hand(jaxq.dequantize(rounded), x, quantizers)
    got = jaxq.quantized(model)(jaxq.Activated(rounded, quantizers), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_stage_by_stage(params, x, quantizers):
    both = jaxq.Activated(params, quantizers)
    pieces = stages(model, both, x)
    assert [p.activations for p in pieces][:3] == [(f"blocks/{i}/hidden", f"blocks/{i}/probs") for i in range(3)]
    assert pieces[0].program is pieces[1].program
    got = run(pieces, both, x)
    np.testing.assert_allclose(got, by_hand(params, x, quantizers), rtol=1e-5, atol=1e-5)


def test_derivatives_reach_the_scales(params, x, quantizers):
    def loss(fn, quantizers):
        return jnp.sum(jnp.square(fn(quantizers)))

    want = jax.grad(lambda q: loss(lambda q: by_hand(params, x, q), q))(quantizers)
    got = jax.grad(lambda q: loss(lambda q: jaxq.quantized(model)(jaxq.Activated(params, q), x), q))(quantizers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert abs(float(got[ROUNDED[0]].scale)) > 1e-3


def test_equal_names_are_numbered(x, quantizers):
    def twice(params, x):
        a = checkpoint_name(x, "a")
        return checkpoint_name(jnp.sin(a), "a") @ params["w"]

    params, half = {"w": jnp.eye(8)}, quantizers[ROUNDED[0]]
    assert [n.path for n in jaxq.activations(twice, params, x)] == ["a", "a#2"]
    got = jaxq.quantized(twice)(jaxq.Activated(params, {"a#2": half}), x)
    np.testing.assert_allclose(got, half(jnp.sin(x)), rtol=1e-6)


def test_names_in_stacked_layers_belong_to_stages(x, quantizers):
    def scanned(params, x):
        def layer(x, w):
            return jnp.tanh(checkpoint_name(x @ w, "hidden")), None

        return jax.lax.scan(layer, x, params["w"])[0]

    params, half = {"w": jnp.stack([jnp.eye(8), 2 * jnp.eye(8)])}, quantizers[ROUNDED[0]]
    with pytest.raises(JaxqError, match="hidden is named in a loop"):
        jaxq.quantized(scanned)(jaxq.Activated(params, {"hidden": half}), x)
    pieces = stages(scanned, params, x)
    paths = [path for piece in pieces for path in piece.activations]
    assert paths == ["hidden", "hidden#2"]
    got = run(pieces, jaxq.Activated(params, {"hidden#2": half}), x)
    np.testing.assert_allclose(got, jnp.tanh(half(2 * jnp.tanh(x))), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_rounded_is_said(params, x, quantizers):
    half = quantizers[ROUNDED[0]]
    with pytest.raises(JaxqError, match="no activation is named 'blocks/7/hidden'"):
        jaxq.quantized(model)(jaxq.Activated(params, {"blocks/7/hidden": half}), x)

    step = jax.jit(lambda x: checkpoint_name(jnp.sin(x), "s"))
    with pytest.raises(JaxqError, match="called more than once"):
        jaxq.quantized(lambda p, x: step(step(x)))(jaxq.Activated(params, {"s": half}), x)
