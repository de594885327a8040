"""Statistics of a loss's gradient: against jax.grad of one sequence at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

import jaxq
from jaxq import losses
from jaxq.transforms.gradients import Saliency, StreamHessian


def network(p, x):
    """Linear, a cut, a scan over stacked layers, and a head stored as (out, in)."""
    h = checkpoint_name(jax.nn.gelu(x @ p["first"]), "block")

    def layer(h, w):
        return checkpoint_name(h + jnp.tanh(h @ w), "block"), None

    h, _ = jax.lax.scan(layer, h, p["stack"])
    return jnp.einsum("bti,oi->bto", h, p["head"])


def parameters(key):
    k = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(k[0], (5, 8)) / 2,
        "stack": jax.random.normal(k[1], (3, 8, 8)) / 3,
        "head": jax.random.normal(k[2], (7, 8)),
    }


def squares(output, x, *rest, weights=None):
    return jnp.sum(output**2 if weights is None else output**2 * weights[..., None], axis=(1, 2))


def one_by_one(params, batches, loss, weights=None):
    """Sum over sequences of the squared gradient of each."""
    total = jax.tree.map(jnp.zeros_like, params)
    for n, x in enumerate(batches):
        for i in range(len(x)):
            more = {} if weights is None else {"weights": weights[n][i : i + 1]}

            def alone(p, x=x[i : i + 1], more=more):
                return jnp.sum(loss(network(p, x), x, **more))

            total = jax.tree.map(lambda a, g: a + g**2, total, jax.grad(alone)(params))
    return total


@pytest.fixture
def problem(key):
    return parameters(key), [jax.random.normal(k, (4, 6, 5)) for k in jax.random.split(key, 2)]


def test_fisher_is_the_sum_of_squared_gradients(problem):
    params, batches = problem
    found = jaxq.observe(network, params, batches, {"**": jaxq.Fisher()}, loss=squares)
    want = one_by_one(params, batches, squares)
    for name in ("first", "stack"):
        np.testing.assert_allclose(found[name].square, want[name], rtol=1e-4)
    np.testing.assert_allclose(found["head"].square, want["head"].T, rtol=1e-4)
    assert float(found["first"].count) == 8 and found["stack"].count.tolist() == [8] * 3
    np.testing.assert_allclose(jaxq.Fisher().finalize(found["stack"]), found["stack"].square / 8)


def test_fisher_of_one_layer_has_the_closed_form(key):
    k = jax.random.split(key, 3)
    w, x, y = jax.random.normal(k[0], (3, 2)), jax.random.normal(k[1], (9, 3)), jax.random.normal(k[2], (9, 2))

    def loss(output, x, y):
        return jnp.sum((output - y) ** 2, axis=-1) / 2

    found = jaxq.observe(lambda w, x: x @ w, w, [x], {"**": jaxq.Fisher()}, loss=loss, targets=[y])
    error = np.asarray(x @ w - y)
    want = sum(np.outer(np.asarray(x)[s], error[s]) ** 2 for s in range(9))
    (state,) = found.values()
    np.testing.assert_allclose(state.square, want, rtol=1e-5)
    together = (np.asarray(x).T @ error) ** 2
    assert np.abs(want / together - 1).min() > 1e-3


def test_batches_may_be_split_and_merged(problem):
    params, batches = problem
    statistic = jaxq.Fisher()
    whole = jaxq.observe(network, params, batches, {"**": statistic}, loss=squares)
    parts = [jaxq.observe(network, params, [b[h]], {"**": statistic}, loss=squares)
             for b in batches for h in (slice(0, 1), slice(1, 4))]  # fmt: skip
    for name, state in whole.items():
        total = parts[0][name]
        for part in parts[1:]:
            total = (
                jax.vmap(statistic.merge)(total, part[name])
                if name == "stack"
                else statistic.merge(total, part[name])
            )
        np.testing.assert_allclose(total.square, state.square, rtol=1e-5)


def test_tokens_of_weight_zero_do_not_count(problem):
    params, batches = problem
    mask = [jnp.ones((4, 6)).at[:, 4:].set(0).at[3].set(0)] * 2
    dirty = [jnp.where(m[..., None] != 0, b, 1e3) for m, b in zip(mask, batches, strict=True)]
    found = jaxq.observe(network, params, dirty, {"**": jaxq.Fisher()}, mask, loss=squares)
    want = one_by_one(params, [b[:3, :4] for b in batches], squares)
    np.testing.assert_allclose(found["stack"].square, want["stack"], rtol=1e-4)
    assert float(found["first"].count) == 6


def test_data_may_be_sharded(problem):
    params, batches = problem
    batches = [jnp.concatenate([b, b + 1]) for b in batches]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = [jax.device_put(b, NamedSharding(mesh, PartitionSpec("data"))) for b in batches]
    both = {"first": jaxq.Fisher(), "stack": jaxq.GuidedHessian(2)}
    alone = jaxq.observe(network, params, batches, both, loss=squares)
    found = jaxq.observe(network, params, spread, both, loss=squares)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6 * float(jnp.abs(a).max()))


def test_guided_hessians_weigh_tokens_by_the_gradient(problem):
    params, batches = problem

    def perturbed(bump, x):
        h = jax.nn.gelu(x @ params["first"] + bump)
        h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, params["stack"])
        return jnp.sum(squares(jnp.einsum("bti,oi->bto", h, params["head"]), x))

    want = np.zeros((4, 5, 5))
    for x in batches:
        g = np.asarray(jax.grad(perturbed)(jnp.zeros((4, 6, 8)), x))
        for group in range(4):
            importance = np.mean(g[..., 2 * group : 2 * group + 2] ** 2, axis=-1)
            want[group] += np.einsum("bt,bti,btj->ij", importance, np.asarray(x), np.asarray(x))
    found = jaxq.observe(network, params, batches, {"first": jaxq.GuidedHessian()}, loss=squares)["first"]
    np.testing.assert_allclose(found.matrix, want, rtol=1e-4, atol=1e-5 * want.max())
    assert jaxq.GuidedHessian().finalize(found).shape == (4, 5, 5)


def test_saliency_keeps_every_token_and_weighs_the_hessian(problem):
    params, batches = problem
    found = jaxq.observe(network, params, batches, {"first": Saliency(2)}, loss=squares)["first"]
    assert found.shape == (2, 4, 6, 2)
    site = next(s for s in jaxq.sites(network, params, batches[0]) if s.path == "first")
    statistic = StreamHessian(2)
    state = statistic.init(site)
    for x, importance in zip(batches, found, strict=True):
        state = statistic.merge(state, statistic.update(statistic.init(site), x, importance))
    want = jaxq.observe(network, params, batches, {"first": jaxq.GuidedHessian(2)}, loss=squares)["first"]
    np.testing.assert_allclose(state.matrix, want.matrix, rtol=1e-5, atol=1e-6 * float(want.matrix.max()))
    np.testing.assert_allclose(
        statistic.finalize(state), jaxq.GuidedHessian().finalize(want), rtol=1e-5, atol=1e-6
    )


def test_experts_convolutions_and_input_statistics_beside(key):
    k = jax.random.split(key, 3)
    params = {
        "experts": jax.random.normal(k[0], (2, 4, 6)) / 2,
        "window": jax.random.normal(k[1], (3, 6, 5)) / 2,
    }
    x = jax.random.normal(k[2], (3, 7, 4))

    def fn(p, x):
        h = jnp.tanh(jnp.einsum("ebti,eio->ebto", jnp.stack([x, x + 1]), p["experts"])).sum(axis=0)
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(h, p["window"], (1,), "VALID", dimension_numbers=numbers)

    def loss(output, x):
        return jnp.sum(output**2, axis=(1, 2))

    found = jaxq.observe(fn, params, [x], {"**": jaxq.Fisher()}, loss=loss)
    want = jax.tree.map(jnp.zeros_like, params)
    for i in range(3):
        g = jax.grad(lambda p, i=i: jnp.sum(loss(fn(p, x[i : i + 1]), None)))(params)
        want = jax.tree.map(lambda a, g: a + g**2, want, g)
    np.testing.assert_allclose(found["experts"].square, want["experts"], rtol=1e-4)
    np.testing.assert_allclose(found["window"].square, want["window"].reshape(18, 5), rtol=1e-4)
    mixed = jaxq.observe(fn, params, [x], {"experts": jaxq.Hessian(), "**": jaxq.Fisher()}, loss=loss)
    assert mixed["experts"].matrix.shape == (2, 4, 4) and mixed["window"].square.shape == (18, 5)


def test_language_model_losses(key):
    logits = jax.random.normal(key, (2, 5, 11))
    tokens = jnp.arange(10).reshape(2, 5)
    nll = -jax.nn.log_softmax(logits)[jnp.arange(2)[:, None], jnp.arange(4), tokens[:, 1:]]
    np.testing.assert_allclose(losses.next_token(logits, tokens), nll.mean(axis=1), rtol=1e-6)
    weights = jnp.ones((2, 5)).at[:, 3:].set(0)
    np.testing.assert_allclose(
        losses.next_token(logits, tokens, weights=weights), nll[:, :2].mean(axis=1), rtol=1e-6
    )
    drawn = losses.sampled_next_token(jax.random.key(1))(logits, tokens)
    assert drawn.shape == (2,) and bool(jnp.isfinite(drawn).all())
    np.testing.assert_allclose(
        losses.classification(logits[:, 0], None, jnp.array([3, 4])),
        [-jax.nn.log_softmax(logits[0, 0])[3], -jax.nn.log_softmax(logits[1, 0])[4]],
        rtol=1e-6,
    )


def test_errors_say_what_to_do(problem):
    params, batches = problem
    with pytest.raises(jaxq.JaxqError, match="need a loss"):
        jaxq.observe(network, params, batches, {"**": jaxq.Fisher()})
    with pytest.raises(jaxq.JaxqError, match="matches no site"):
        jaxq.observe(network, params, batches, {"nothing": jaxq.Fisher()}, loss=squares)
    with pytest.raises(jaxq.JaxqError, match="give at least one"):
        jaxq.observe(network, params, [], {"**": jaxq.Fisher()}, loss=squares)
    with pytest.raises(jaxq.JaxqError, match="loss of calibration batch 1 is nan"):
        jaxq.observe(network, params, [batches[0], batches[1] * jnp.nan], {"**": jaxq.Fisher()}, loss=squares)
