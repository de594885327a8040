"""Static quantizers of activations, fitted stage by stage: against the same thing by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxq
from jaxq import evaluate
from jaxq.calibration import ActivationRule, calibrate
from jaxq.errors import JaxqError
from jaxq.formats import Affine, Dynamic, ShiftLog
from jaxq.models import vision
from jaxq.models.vision_config import VisionConfig
from jaxq.solvers import ranges

RULES = [
    ActivationRule("**/up/kernel", Affine(4, "channel"), "minmax"),
    ActivationRule("**/probs", ShiftLog(3)),
    ActivationRule("**/down/kernel", Affine(4), "percentile"),
]


def block(p, x, i, tap):
    with jax.named_scope(f"Model/blocks/{i}"):
        x = checkpoint_name(x, "block")
        h = jnp.tanh(tap(f"blocks/{i}/up/kernel", x) @ p["up"]["kernel"])
        probs = tap(f"blocks/{i}/probs", checkpoint_name(jax.nn.softmax(h @ h.swapaxes(-1, -2)), "probs"))
        return x + tap(f"blocks/{i}/down/kernel", probs @ h) @ p["down"]["kernel"]


def model(params, x, tap=lambda path, x: x):
    for i in range(2):
        x = block(params["blocks"][str(i)], x, i, tap)
    return x @ params["head"]["kernel"]


@pytest.fixture
def params(key):
    def draw(i, *shape):
        return {"kernel": 0.5 * jax.random.normal(jax.random.fold_in(key, i), shape)}

    blocks = {str(i): {"up": draw(2 * i, 8, 12), "down": draw(2 * i + 1, 12, 8)} for i in range(2)}
    return {"blocks": blocks, "head": draw(9, 8, 5)}


@pytest.fixture
def batches(key):
    return list(jax.random.normal(jax.random.fold_in(key, 100), (3, 2, 4, 8)))


def by_hand(params, x, quantizers):
    """What the function gives with these quantizers, and what reached each of them before it was rounded."""
    seen = {}

    def tap(path, x):
        seen[path] = x
        return quantizers[path](x) if path in quantizers else x

    return model(params, x, tap), seen


def quantizers_of(result):
    leaves = jaxq.tracing.flatten(result.params)
    weights = {path: leaf.quantizer for path, leaf in leaves.items() if getattr(leaf, "rounds_input", False)}
    return weights | result.activations


def fitted(path, x):
    if path.endswith("up/kernel"):
        return ranges.minmax(x, 4, (0, 1))
    return ranges.shift_log(x, 3) if path.endswith("probs") else ranges.percentile(x, 4)


def same(a, b):
    for path in a.keys() | b.keys():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a[path], b[path])


def test_on_the_float_stream(params, batches):
    result = calibrate(model, params, batches, RULES)
    whole = jnp.concatenate(batches)
    seen = by_hand(params, whole, {})[1]
    same(quantizers_of(result), {path: fitted(path, x) for path, x in seen.items()})
    want = by_hand(params, whole, quantizers_of(result))[0]
    got = jax.jit(jaxq.quantized(model))(result, whole)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - model(params, whole)).max() > 0.05


def test_on_the_quantized_stream(params, batches):
    result = calibrate(model, params, batches, RULES, stream="quantized")
    whole = jnp.concatenate(batches)
    known = {}
    for i in range(2):
        # Within a block nothing is rounded while its own quantizers are fitted.
        seen = by_hand(params, whole, known)[1]
        known |= {path: fitted(path, x) for path, x in seen.items() if path.startswith(f"blocks/{i}")}
    same(quantizers_of(result), known)
    other = quantizers_of(calibrate(model, params, batches, RULES))
    assert float(other["blocks/1/down/kernel"].scale) != float(known["blocks/1/down/kernel"].scale)


def test_beside_quantized_weights_and_again(params, batches):
    rounded = jax.tree.map(lambda w: jaxq.rtn(w, jaxq.Uniform(4, None)), params)
    first = calibrate(model, rounded, batches, RULES[:1])
    assert first.params["blocks"]["0"]["up"]["kernel"].format.base == jaxq.Uniform(4, None)
    again = calibrate(model, first, batches, [ActivationRule("**/up/kernel", Affine(4), "mse"), *RULES[1:]])
    assert again.params["blocks"]["0"]["up"]["kernel"].quantizer.scale.shape == ()
    assert set(again.activations) == {"blocks/0/probs", "blocks/1/probs"}
    x = batches[0]
    want = by_hand(jaxq.dequantize(rounded), x, quantizers_of(again))[0]
    np.testing.assert_allclose(jaxq.quantized(model)(again, x), want, rtol=1e-3, atol=1e-3)


def test_equal_names_in_a_stage_have_their_own(batches):
    def twice(params, x):
        a = checkpoint_name(x, "a")
        return checkpoint_name(10 * jnp.sin(a), "a") @ params["w"]

    result = calibrate(twice, {"w": jnp.eye(8)}, batches, [ActivationRule("a*", Affine(4), "minmax")])
    whole = jnp.concatenate(batches)
    same(result.activations, {"a": ranges.minmax(whole, 4), "a#2": ranges.minmax(10 * jnp.sin(whole), 4)})


def test_the_first_rule_decides_and_one_without_a_grid_leaves_alone(params, batches):
    rules = [ActivationRule("blocks/0/**"), ActivationRule("{blocks,head}/**/kernel", Dynamic(8))]
    assert set(quantizers_of(calibrate(model, params, batches, rules))) == {
        "blocks/1/up/kernel", "blocks/1/down/kernel", "head/kernel"
    }  # fmt: skip


def test_an_image_model_at_eight_bits_is_itself(key):
    config = VisionConfig("vit", 8, 4, 16, (2,), (2,), classes=5, channels=1, mean=(0.4,), std=(0.3,), crop=1.0)
    net = vision.build(config, vision.init_params(config, seed=3, scale=0.3))
    images = [jax.random.normal(jax.random.fold_in(key, i), (4, 8, 8, 1)) for i in range(2)]
    rules = [
        ActivationRule("**/{query,key,value,probs}", Affine(8, "head"), "minmax"),
        ActivationRule("{blocks,head}/**/kernel", Affine(8), "minmax"),
    ]
    result = calibrate(net.apply, net.params, images, rules)
    assert len(result.activations) == 8 and result.activations["blocks/1/attn/probs"].scale.shape == (2, 1, 1)
    got, want = jaxq.quantized(net.apply)(result, images[0]), net.apply(net.params, images[0])
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()
    data, labels = np.asarray(jnp.concatenate(images)), np.arange(8) % 5
    right = np.asarray(jaxq.quantized(net.apply)(result, data)).argmax(1) == labels
    assert evaluate.top1(net.apply, result, data, labels, batch=4)["top1"] == pytest.approx(100 * right.mean())
    low = calibrate(net.apply, net.params, images, [ActivationRule(r.pattern, Affine(2), "minmax") for r in rules])
    worse = jaxq.quantized(net.apply)(low, images[0])
    assert np.abs(worse - want).max() > 3 * np.abs(got - want).max()


def test_both_kinds_are_saved(params, batches, tmp_path):
    result = calibrate(model, params, batches, RULES)
    jaxq.save(tmp_path / "out", jaxq.Result(result, jaxq.Report()))
    again = jaxq.load(tmp_path / "out").params
    want = jaxq.quantized(model)(result, batches[0])
    np.testing.assert_array_equal(jaxq.quantized(model)(again, batches[0]), want)
    assert [site.path for site in jaxq.sites(model, again, batches[0])] == [
        site.path for site in jaxq.sites(model, params, batches[0])
    ]


def test_bad_input_is_refused_by_name(params, batches):
    with pytest.raises(JaxqError, match=r"pattern '\*\*/gate/kernel' matches no site"):
        calibrate(model, params, batches, [ActivationRule("**/gate/kernel", Affine(4))])
    with pytest.raises(JaxqError, match="quantize the parameters first"):
        jaxq.quantize(model, jaxq.Activated(params, {}), batches, jaxq.recipes.named("rtn"))
    with pytest.raises(JaxqError, match="no batches"):
        calibrate(model, params, [], RULES)
    with pytest.raises(JaxqError, match="stream is"):
        calibrate(model, params, batches, RULES, stream="both")
    with pytest.raises(JaxqError, match="unknown search 'hessian'"):
        ActivationRule("**", Affine(4), "hessian")
    with pytest.raises(JaxqError, match="blocks/0/up/kernel: .*negative"):
        calibrate(model, params, batches, [ActivationRule("**/up/kernel", ShiftLog(4))])
    scanned = {"w": jnp.stack([jnp.eye(8)] * 2)}
    with pytest.raises(JaxqError, match="stacked layers"):
        calibrate(lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0], scanned, batches,
                  [ActivationRule("w*", Affine(4))])  # fmt: skip
