"""Integer execution: products of codes agree with the simulated ones, are int8 products, and say what is not."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import recipes
from jaxq.formats import Affine, Dynamic, Uniform, rounded_input
from jaxq.formats.activations import AffineQuantizer, DynamicQuantizer
from jaxq.formats.codes import of_activation, of_weight
from jaxq.formats.log_activations import LogQuantizer
from jaxq.jaxprs import subjaxprs
from jaxq.kernels import integer as kernel
from jaxq.stages import run, stages
from tests.blockwise.conftest import CONFIG
from tests.models.tiny_vision import SWIN, pictures, random


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32))


def products(fn, *args):
    """(integer products, products) that the function makes of these arguments."""
    found = []

    def look(jaxpr):
        platforms = [eqn.outvars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "platform_index"]
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append([v.aval.dtype.name for v in (*eqn.invars, eqn.outvars[0])])
            chosen = bool(eqn.invars) and any(eqn.invars[0] is v for v in platforms)
            # The last branch of a choice by platform is that of CPUs, among all others.
            for inner in list(subjaxprs(eqn))[-1 if chosen else 0 :]:
                look(inner)

    look(jax.make_jaxpr(fn)(*args).jaxpr)
    integers = [dtypes for dtypes in found if dtypes == ["int8", "int8", "int32"]]
    return len(integers), len(found)


def both(fn, params, *args):
    """(integer output, simulated output, what the integer execution reports)."""
    reports = []
    with jax.default_matmul_precision("highest"):
        got = jax.jit(jaxq.quantized(fn, lambda *why: reports.append(why), integer=True))(params, *args)
        want = jax.jit(jaxq.quantized(fn))(params, *args)
    return got, want, reports


def close(got, want, tolerance=1e-5):
    """To rounding, relative to the largest: sums of terms of both signs have no relative accuracy of their own."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))


def mostly_close(got, want, tolerance=1e-5):
    """Half of the images of a whole network, at least: of some, the last bits decide which code a value gets."""
    assert got.dtype == want.dtype and got.shape == want.shape
    far = np.abs(np.asarray(got, np.float64) - want).reshape(len(want), -1).max(axis=1)
    assert np.median(far) <= tolerance * float(np.abs(want).max())


def linear(params, x):
    return checkpoint_name(x, "x") @ params["w"] + params["b"]


BITS = st.integers(2, 8)


@settings(max_examples=25)
@given(
    bits=st.tuples(BITS, BITS),
    symmetric=st.booleans(),
    grain=st.sampled_from([None, "tensor", 64]),
    zero=st.sampled_from(["inside", "low", "high", "below", "above"]),
    sizes=st.sampled_from([((3,), 5, 4), ((2, 3), 33, 2), ((), 64, 1)]),
    named=st.booleans(),
    seed=st.integers(0, 3),
)
def test_linear_layers(bits, symmetric, grain, zero, sizes, named, seed):
    tokens, width, out = sizes
    grain = width if grain == 64 else grain
    top = 2 ** bits[0] - 1
    at = {"inside": top // 3, "low": 0, "high": top, "below": -5, "above": 3 * top + 200}[zero]
    q = AffineQuantizer(jnp.float32(3.0 / top), jnp.float32(at), bits[0])
    x = draw(*tokens, width, seed=seed) + (top / 2 - at) * 3.0 / top
    w = jaxq.rtn(draw(width, out, seed=seed), Uniform(bits[1], grain, symmetric))
    params = {"w": w, "b": draw(out)}
    taken = jaxq.Activated(params, {"x": q}) if named else params | {"w": rounded_input(w, q, Affine(bits[0]))}
    got, want, reports = both(linear, taken, x)
    close(got, want)
    assert reports == []
    assert products(jaxq.quantized(linear, integer=True), taken, x) == (1, 1)
    assert products(jaxq.quantized(linear), taken, x) == (0, 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_grid_for_each_token(bits, symmetric):
    q, x = DynamicQuantizer(bits, symmetric), 3 * draw(2, 5, 16) + 0.5
    w = jaxq.rtn(draw(16, 6), Uniform(bits, None))
    params = {"w": rounded_input(w, q, Dynamic(bits, symmetric)), "b": jnp.zeros(6)}
    for taken in (params, jaxq.Activated(params | {"w": w}, {"x": q})):
        got, want, reports = both(linear, taken, x)
        close(got, want)
        assert reports == []


def attention(params, x):
    q, k, v = (x @ params[name] for name in "qkv")
    heads = lambda y: y.reshape(*y.shape[:-1], 2, -1).swapaxes(1, 2)  # noqa: E731
    q, k, v = (checkpoint_name(heads(y), name) for y, name in ((q, "q"), (k, "k"), (v, "v")))
    scores = jnp.einsum("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k)
    probs = checkpoint_name(jax.nn.softmax(scores, axis=-1), "probs")
    y = jnp.einsum("bhnm,bhmd->bhnd", probs, v)
    return y.swapaxes(1, 2).reshape(x.shape), scores


def of_heads(bits, low, high):
    """A grid for each of two heads."""
    low, high = (jnp.asarray(n, jnp.float32).reshape(2, 1, 1) for n in (low, high))
    scale = (high - low) / (2**bits - 1)
    return AffineQuantizer(scale, jnp.round(-low / scale), bits)


@settings(max_examples=10)
@given(bits=st.tuples(BITS, BITS), grids=st.sampled_from(["head", "tensor", "mixed"]), seed=st.integers(0, 3))
def test_attention(bits, grids, seed):
    x = draw(2, 5, 8, seed=seed)
    params = {name: draw(8, 8, seed=i) / 3 for i, name in enumerate("qkv")}
    head = {
        "q": of_heads(bits[0], [-2, -3], [3, 2]),
        "k": of_heads(bits[1], [-3, -1], [1, 4]),
        "v": of_heads(bits[1], [-2, -2], [2, 3]),
        "probs": of_heads(bits[0], [0, 0], [1, 0.7]),
    }
    tensor = {k: AffineQuantizer(q.scale.max(), q.zero.max(), q.bits) for k, q in head.items()}
    quantizers = {"head": head, "tensor": tensor, "mixed": head | {"q": tensor["q"], "v": tensor["v"]}}[grids]
    taken = jaxq.Activated(params, quantizers)
    (y, scores), (want_y, want_scores), reports = both(attention, taken, x)
    close(scores, want_scores)
    close(y, want_y)
    assert reports == []
    assert products(jaxq.quantized(attention, integer=True), taken, x) == (2, 5)


def test_codes_come_back_as_the_rounded_values():
    x = 3 * draw(4, 3, 8)
    for q in (AffineQuantizer(jnp.full((3, 1), 0.1), jnp.asarray([[-3.0], [100], [400]]), 8), DynamicQuantizer(5)):
        np.testing.assert_array_equal(of_activation(q, x).dequantize(), q(x))
    w = jaxq.rtn(draw(40, 3), Uniform(8, None))
    np.testing.assert_array_equal(of_weight(w).dequantize(), w.dequantize())


def test_sums_are_exact():
    # Every term has the same sign and 8 bits on both sides: the largest sums that are accepted.
    width = 33_000
    x = AffineQuantizer(jnp.float32(1), jnp.float32(0), 8)
    a = of_activation(x, jnp.full((1, width), 255.0))
    b = of_activation(x, jnp.full((width, 1), 253.0))
    numbers = (((1,), (0,)), ((), ()))
    assert kernel.refused(a, b, numbers) == ""
    assert float(kernel.dot(a, b, numbers)[0, 0]) == float(np.float32(width * 255 * 253))
    c = of_activation(x, jnp.zeros((1, 2**15 + 300)))
    assert "32 bits" in kernel.refused(c, of_activation(x, jnp.zeros((2**15 + 300, 1))), numbers)


W = jaxq.rtn(draw(16, 4), Uniform(4, None))
FOUR = AffineQuantizer(jnp.float32(0.3), jnp.float32(7), 4)
REFUSED = {
    "logarithmic": (LogQuantizer(jnp.float32(1), 4), "no uniform grid"),
    "16 bits": (AffineQuantizer(jnp.float32(1e-4), jnp.float32(9), 16), "16 bits"),
    "fractional": (AffineQuantizer(jnp.float32(0.3), jnp.float32(7.5), 4, fractional=True), "fractional"),
    "channel": (AffineQuantizer(jnp.linspace(0.2, 0.4, 16), jnp.full(16, 7.0), 4), "varies along"),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_on_codes_is_reported(name, named):
    q, why = REFUSED[name]
    params = {"w": W, "b": jnp.zeros(4)}
    grid = Affine(4, "channel" if name == "channel" else "tensor")
    taken = jaxq.Activated(params, {"x": q}) if named else params | {"w": rounded_input(W, q, grid)}
    got, want, reports = both(linear, taken, draw(3, 16))
    np.testing.assert_array_equal(got, want)
    assert "w" in dict(reports) and any(why in reason for _, reason in reports)
    if named:
        assert "x" in dict(reports)
    assert products(jaxq.quantized(linear, integer=True), taken, draw(3, 16))[0] == 0


def test_weights_that_have_no_codes_are_reported():
    kinds = {
        "groups": jaxq.rtn(draw(16, 4), Uniform(4, 8)),
        "look-up table": jaxq.kmeans(draw(16, 4), None, jaxq.Codebook(2)),
    }
    for w in kinds.values():
        got, want, reports = both(linear, jaxq.Activated({"w": w, "b": jnp.zeros(4)}, {"x": FOUR}), draw(3, 16))
        np.testing.assert_array_equal(got, want)
        assert set(dict(reports)) == {"w", "x"}
    _, _, reports = both(linear, {"w": W, "b": jnp.zeros(4)}, draw(3, 16))
    assert reports == [("w", "has an input that is not rounded")]


USES = {
    "add": (lambda p, x: checkpoint_name(x, "x") + 1.0, "`add`"),
    "square": (lambda p, x: checkpoint_name(x, "x") ** 2, "no integer form"),
    "float operand": (lambda p, x: checkpoint_name(x, "x") @ jnp.ones((16, 2)), "not rounded"),
    "convolution": (
        lambda p, x: jax.lax.conv(checkpoint_name(x, "x")[None, None], jnp.ones((1, 1, 2, 2)), (1, 1), "VALID"),
        "no integer form",
    ),
    "output": (lambda p, x: checkpoint_name(x, "x").T, "returned"),
    "loop": (lambda p, x: jax.lax.fori_loop(0, 2, lambda i, y: y * y, checkpoint_name(x, "x")), "carried"),
    "scan": (lambda p, x: jax.lax.scan(lambda c, y: (c + y.sum(), None), 0.0, checkpoint_name(x, "x")), "scanned"),
    "remat": (
        lambda p, x: jax.checkpoint(lambda y: checkpoint_name(y, "x"))(x) * 1.0,
        "returned by a checkpointed",
    ),
    "again": (lambda p, x: checkpoint_name(checkpoint_name(x, "x"), "y") @ p["w"], "rounded again"),
}


@pytest.mark.parametrize("name", USES)
def test_other_uses_of_a_rounded_activation_are_right_and_reported(name):
    fn, why = USES[name]
    quantizers = {"x": FOUR} | ({"y": FOUR} if name == "again" else {})
    got, want, reports = both(fn, jaxq.Activated({"w": W}, quantizers), draw(3, 16))
    close(got, want, 1e-6)
    assert [path for path, _ in reports] == ["x"] and why in reports[0][1]


def test_reports_go_by_the_paths_of_activations():
    def twice(params, x):
        return checkpoint_name(checkpoint_name(x, "a") @ params["w"], "a") + 1.0

    assert [n.path for n in jaxq.activations(twice, {"w": W}, draw(3, 16))] == ["a", "a#2"]
    _, _, reports = both(twice, jaxq.Activated({"w": W}, {"a": FOUR, "a#2": FOUR}), draw(3, 16))
    assert [path for path, _ in reports] == ["a#2"]


MOVED = {
    "cast": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "half": lambda x: x[1:, :],
    "turned": lambda x: x.T.reshape(4, 4, 3).transpose(2, 0, 1).reshape(3, 16),
    "spread": lambda x: jnp.broadcast_to(x[:, None], (3, 2, 16)),
    "mixed": lambda x: x.reshape(2, 24).reshape(3, 16),
    "scaled": lambda x: x * 0.3 / 7.0,
    "named": lambda x: checkpoint_name(x, "again"),
    "jitted": jax.jit(lambda x: x[::-1]),
    "checkpointed": lambda x: x,
}


@pytest.mark.parametrize("name", MOVED)
def test_codes_stay_through_moves(name):
    def fn(params, x):
        y = checkpoint_name(x, "x")
        if name == "checkpointed":
            return jax.checkpoint(lambda y: y @ params["w"])(y)
        return MOVED[name](y) @ params["w"]

    taken = jaxq.Activated({"w": W}, {"x": FOUR})
    got, want, reports = both(fn, taken, draw(3, 16))
    close(got, want, 1e-2 if name == "cast" else 1e-5)
    assert reports == []
    assert products(jaxq.quantized(fn, integer=True), taken, draw(3, 16)) == (1, 1)


def test_a_layout_of_its_own_and_experts():
    def fn(params, x):
        y = jnp.einsum("btd,dhe->bthe", x, params["split"])
        z = jnp.einsum("bthe,hed->btd", y, params["joined"])
        return jnp.einsum("xbtd,xdf->xbtf", jnp.stack([z, -z, 2 * z]), params["experts"])

    split = jaxq.Layout.of((8, 2, 6), [0], [1, 2])
    joined = jaxq.Layout.of((2, 6, 8), [0, 1], [2])
    q = AffineQuantizer(jnp.float32(0.02), jnp.float32(120), 8)

    def weight(w, layout, quantizer=q):
        q = jaxq.rtn(layout.to_canonical(w), Uniform(8, None))
        return rounded_input(dataclasses.replace(q, layout=layout), quantizer, Affine(8))

    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), q)
    params = {
        "split": weight(draw(8, 2, 6) / 3, split),
        "joined": weight(draw(2, 6, 8) / 3, joined),
        "experts": weight(draw(3, 8, 5), jaxq.Layout(), stacked),
    }
    got, want, reports = both(fn, params, draw(2, 3, 8))
    close(got, want)
    assert reports == []
    assert products(jaxq.quantized(fn, integer=True), params, draw(2, 3, 8)) == (3, 3)


def test_under_transformations():
    taken = jaxq.Activated({"w": W, "b": jnp.zeros(4)}, {"x": FOUR})
    fn, simulated = jaxq.quantized(linear, integer=True), jaxq.quantized(linear)
    x = draw(5, 3, 16)
    want = simulated(taken, x)
    close(fn(taken, x), want)
    close(jax.vmap(fn, (None, 0))(taken, x), want)
    close(jax.lax.map(functools.partial(fn, taken), x), want)
    loss = lambda fn: lambda q, x: jnp.square(fn(jaxq.Activated(taken.params, {"x": q}), x)).sum()  # noqa: E731
    got, want = (jax.grad(loss(f), (0, 1))(FOUR, x) for f in (fn, simulated))
    close(got, want, 1e-4)
    assert abs(float(want[0].scale)) > 1e-2
    exported = jax.export.export(jax.jit(fn), platforms=("cpu", "cuda", "tpu"))(taken, x)
    assert "xi8>" in exported.mlir_module()
    close(exported.call(taken, x), fn(taken, x))


def test_layers_in_a_scan():
    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    w = jaxq.rtn(draw(3, 8, 8) / 3, Uniform(4, None))
    quantizer = AffineQuantizer(jnp.asarray([0.3, 0.1, 0.1]), jnp.asarray([7.0, 8, 9]), 4)
    params = {"w": rounded_input(w, quantizer, Affine(4))}
    got, want, reports = both(fn, params, draw(5, 8))
    close(got, want)
    assert reports == [] and products(jaxq.quantized(fn, integer=True), params, draw(5, 8)) == (1, 1)


def test_in_shards():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, "model"), P("data")), out_specs=P("data", "model")
    )
    def sharded(w, x):
        return checkpoint_name(x, "x") @ w

    def fn(params, x):
        return sharded(params["w"], x)

    params = {"w": rounded_input(W, FOUR, Affine(4))}
    got, want, reports = both(fn, params, draw(4, 16))
    close(got, want)
    assert reports == [] and products(jaxq.quantized(fn, integer=True), params, draw(4, 16)) == (1, 1)


# ---- vision transformers ---------------------------------------------------------------------------------


def quantized_vit(vit, images, name, bits, **settings):
    recipe = recipes.named(name, weights=bits, activations=bits, images=16, **settings)
    return jaxq.quantize(vit.apply, vit.params, images, recipe)


CONVOLUTION = [("patch_embed/proj/kernel", "is used by a convolution, which has no integer form")]


@pytest.fixture(scope="module")
def vit():
    from jaxq.models import vision

    return vision.build(CONFIG, vision.init_params(CONFIG, seed=1, scale=0.3))


@pytest.fixture(scope="module")
def images():
    return [draw(8, 8, 8, 1, seed=i) for i in range(2)]


@pytest.mark.parametrize(
    ("name", "bits", "settings"),
    [
        ("percentile", 4, {}),
        ("percentile", 8, {}),
        pytest.param("qdrop", 4, {"iterations": 2}, marks=pytest.mark.slow),
        pytest.param("qdrop", 8, {"iterations": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_vision_transformer(vit, images, name, bits, settings, tmp_path):
    result = quantized_vit(vit, images, name, bits, **settings)
    jaxq.save(tmp_path / "out", result)
    params = jaxq.load(tmp_path / "out").params
    got, want, reports = both(vit.apply, params, images[0])
    mostly_close(got, want)
    assert reports == CONVOLUTION
    # In each block four weights, and queries with keys and probabilities with values; and the head.
    count = 6 * math.prod(CONFIG.depths) + 1
    run_on_codes = jaxq.quantized(vit.apply, integer=True)
    assert products(run_on_codes, params, images[0]) == (count, count)
    lowered = jax.jit(run_on_codes).lower(params, images[0]).as_text()
    assert (
        sum("xi8>" in line and "xi32>" in line for line in lowered.splitlines() if "dot_general" in line) == count
    )
    by_stages = run(stages(vit.apply, params, images[0]), params, images[0], integer=True)
    mostly_close(by_stages, got)


def test_logarithmic_probabilities_stay_simulated(vit, images):
    params = quantized_vit(vit, images, "repq-vit", 4).params
    got, want, reports = both(vit.apply, params, images[0])
    mostly_close(got, want)
    assert {path.rpartition("/")[2] for path, _ in reports} == {"kernel", "probs", "value"}
    assert products(jaxq.quantized(vit.apply, integer=True), params, images[0]) == (11, 13)


@pytest.mark.slow
def test_swin():
    from jaxq.models import vision

    config = SWIN.replace(channels=1, mean=(0.5,), std=(0.5,))
    swin, images = vision.build(config, random(config)), pictures(config)
    params = jaxq.quantize(swin.apply, swin.params, [images], recipes.named("percentile", images=2)).params
    got, want, reports = both(swin.apply, params, images)
    mostly_close(got, want, 1e-4)
    assert [path for path, _ in reports] == ["patch_embed/proj/kernel"]
    made, of = products(jaxq.quantized(swin.apply, integer=True), params, images)
    assert made == of > 0
