"""ViT: what jaxq.stages and jaxq.sites rely on, numerics by hand, configs. Parity: test_vision_checkpoint."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vision import VARIANTS, VIT, paths, pictures, programs, random, tiny

import jaxq
from jaxq.errors import JaxqError
from jaxq.models.vision import PRESETS, VisionConfig, abstract_params, build, init_params
from jaxq.models.vit import resample_positions


def layer_norm(x, p, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def by_hand(config: VisionConfig, params, images):
    """The plain ViT in float64 numpy, one image and one head at a time."""
    from math import erf

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    gelu = np.vectorize(lambda v: v * (1 + erf(v / 2**0.5)) / 2)
    size, width, heads = config.patch_size, config.hidden_size, config.heads[0]
    out = []
    for image in np.asarray(images, np.float64):
        patches = (
            image.reshape(config.grid, size, config.grid, size, -1).swapaxes(1, 2).reshape(config.grid**2, -1)
        )
        embed = p["patch_embed"]["proj"]
        x = patches @ embed["kernel"].reshape(-1, width) + embed["bias"]
        x = np.concatenate([p["cls_token"][0], x]) + p["pos_embed"][0]
        for i in range(config.depths[0]):
            b = p["blocks"][str(i)]
            qkv = (
                layer_norm(x, b["norm1"], config.norm_eps) @ b["attn"]["qkv"]["kernel"] + b["attn"]["qkv"]["bias"]
            )
            q, k, v = np.split(qkv, 3, axis=-1)
            ys = []
            for h in np.split(np.arange(width), heads):
                scores = q[:, h] @ k[:, h].T / np.sqrt(len(h))
                e = np.exp(scores - scores.max(-1, keepdims=True))
                ys.append(e / e.sum(-1, keepdims=True) @ v[:, h])
            x = x + np.concatenate(ys, -1) @ b["attn"]["proj"]["kernel"] + b["attn"]["proj"]["bias"]
            y = layer_norm(x, b["norm2"], config.norm_eps) @ b["mlp"]["fc1"]["kernel"] + b["mlp"]["fc1"]["bias"]
            x = x + gelu(y) @ b["mlp"]["fc2"]["kernel"] + b["mlp"]["fc2"]["bias"]
        out.append(layer_norm(x, p["norm"], config.norm_eps)[0] @ p["head"]["kernel"] + p["head"]["bias"])
    return np.stack(out)


def test_against_float64_by_hand():
    params, images = random(VIT), pictures(VIT)
    logits = np.asarray(jax.jit(build(VIT, params).apply)(params, images))
    expected = by_hand(VIT, params, images)
    assert logits.dtype == np.float32 and np.abs(expected).max() > 0.5
    assert np.abs(logits - expected).max() < 1e-5
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        exact = np.asarray(jax.jit(build(VIT, wide).apply)(wide, np.asarray(images, np.float64)))
    assert exact.dtype == np.float64 and np.abs(exact - expected).max() < 1e-12


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_matters_and_transformations_compose(name):
    config = tiny(name).replace(depths=(1,))
    model = build(config, random(config))
    images = pictures(config)
    out = jax.jit(model.apply)(model.params, images)
    assert out.dtype == jnp.float32
    assert out.shape == ((2, 5) if config.classes else (2, config.prefix + 16, 8))
    one_by_one = jax.jit(jax.vmap(lambda image: model.apply(model.params, image[None])[0]))(images)
    np.testing.assert_allclose(one_by_one, out, rtol=1e-4, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, images)))))(model.params)
    for keys, slope in jax.tree.leaves_with_path(slopes):
        assert np.isfinite(slope).all() and jnp.abs(slope).max() > 1e-6, keys


@pytest.mark.parametrize("name", ["plain", "both", "no-token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_share_one_program(name, dtype):
    config = tiny(name)
    stages, numbers = programs(config)
    assert numbers == [0, 1, 1, 1, 2]
    assert [len(stage.consts) for stage in stages] == [0] * 5
    model = build(config, init_params(config, 0, dtype))
    images = pictures(config)
    carry = (images,)
    for stage in jaxq.stages(model.apply, model.params, images):
        carry = stage.fn(stage.take(model.params), carry)
    # In bfloat16 a value is rounded where a piece ends, but not always inside of one.
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(carry, jax.jit(model.apply)(model.params, images), atol=tolerance)
    assert carry.dtype == jnp.float32


def test_sites_are_clean_and_products_are_named():
    config = tiny("distilled")
    sites = {s.path: s for s in jaxq.sites(build(config, None).apply, abstract_params(config), pictures(config))}
    kernels = [path for path in paths(config) if path.endswith("/kernel")]
    assert len(kernels) == 3 + 4 * 3
    for path in kernels:
        assert (sites[path].kind, sites[path].note) == ("conv" if "patch_embed" in path else "matmul", "")
        assert sites[path].out_size == sites[path].shape[-1]
    assert sites["blocks/1/attn/qkv/kernel"].matrix_shape == (8, 24)
    assert sites["patch_embed/proj/kernel"].matrix_shape == (4 * 4 * 3, 8)
    products = [s.path for s in sites.values() if s.kind == "product"]
    assert len(products) == 6 and all(s.shape[:2] == (2, 2) for s in sites.values() if s.kind == "product")
    assert sites["blocks/0/attn/query @ blocks/0/attn/key"].shape == (2, 2, 18, 18)
    assert sites["blocks/2/attn/probs @ blocks/2/attn/value"].shape == (2, 2, 18, 4)


def test_query_is_named_before_the_scale():
    config = VIT.replace(depths=(1,))
    params, images = random(config), pictures(config)
    jaxpr = jax.make_jaxpr(build(config, None).apply)(params, images)
    named = [e.params["name"] for e in jaxpr.jaxpr.eqns if e.primitive.name == "name"]
    assert named == ["block", "query", "key", "value", "probs", "block"]
    query = next(e for e in jaxpr.jaxpr.eqns if e.params.get("name") == "query")
    made = next(e for e in jaxpr.jaxpr.eqns if query.invars[0] in e.outvars)
    assert made.primitive.name == "transpose"


def test_paths_are_those_of_timm():
    shapes = paths(tiny("both"))
    assert shapes["patch_embed/proj/kernel"] == (4, 4, 3, 8) and shapes["pos_embed"] == (1, 17, 8)
    assert shapes["cls_token"] == (1, 1, 8) and shapes["head/kernel"] == (16, 5) and shapes["norm/scale"] == (8,)
    assert shapes["blocks/2/mlp/fc1/kernel"] == (8, 16) and shapes["blocks/0/ls1/scale"] == (8,)
    assert len(shapes) == 8 + 3 * 14
    assert "fc_norm/bias" in paths(tiny("mean")) and "norm/bias" not in paths(tiny("mean"))
    assert "blocks/0/attn/qkv/bias" not in paths(tiny("no-token"))
    params = init_params(VIT, 3, jnp.bfloat16)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, abstract_params(VIT))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    assert float(params["norm"]["scale"].sum()) == 8 and not params["head"]["bias"].any()


# As counted by timm, for 1000 classes.
COUNTS = {"vit_small": 22_050_664, "vit_base": 86_567_656, "deit_tiny": 5_717_416, "deit_small": 22_050_664}
COUNTS |= {"deit_base": 86_567_656, "swin_tiny": 28_288_354, "swin_small": 49_606_258, "swin_base": 87_768_224}
COUNTS |= {"dinov2_small": 22_056_192}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(PRESETS[name]))) == COUNTS[name]


def test_equal_configs_share_functions_and_round_trip():
    config = VIT.replace(labels=("a", "b", "c", "d", "e"))
    again = VisionConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert json.loads(config.to_json()) == config.to_dict()
    assert build(config, {"a": 1}).apply is build(again, None).apply
    model = build(config, 1, {"kind": "test"})
    assert model.replace(params=2).params == 2 and model.source == {"kind": "test"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(family="cnn"), "family 'cnn' is not one of vit, swin"),
        (dict(activation="mish"), "activation 'mish'"),
        (dict(pooling="max"), "pooling 'max'"),
        (dict(interpolation="nearest"), "interpolation 'nearest'"),
        (dict(image_size=18), "patches of 4 pixels do not tile an image of 18"),
        (dict(patch_size=0), "patch_size must be a positive integer, not 0"),
        (dict(heads=(3,)), "3 heads cannot share a width of 8"),
        (dict(heads=(2, 2)), "one number for each stage"),
        (dict(depths=(2, 2), heads=(2, 2)), "a ViT has one stage"),
        (dict(depths=(2.0,)), "depths must be a positive integer"),
        (dict(classes=-1), "classes must be 0"),
        (dict(crop=0.0), "crop above 0"),
        (dict(std=(1.0, 1.0, 0.0)), "those of std positive"),
        (dict(channels=1), "mean and std need 1 numbers"),
        (dict(labels=("a",)), "1 labels for 5 classes"),
        (dict(class_token=False), "need a class token"),
        (dict(distilled_head=True), "needs distilled=True"),
        (dict(family="swin"), "a Swin has neither class tokens"),
    ],
)
def test_impossible_configs_are_one_clear_line(changes, message):
    with pytest.raises(JaxqError, match=message) as error:
        VisionConfig.from_dict(VIT.to_dict() | changes)
    assert "\n" not in str(error.value)


def test_broken_json():
    for text in ("", "[1]", "{}", json.dumps(VIT.to_dict() | {"surprise": 1}), '{"family": null}'):
        with pytest.raises(JaxqError, match="not a jaxq vision config"):
            VisionConfig.from_json(text)
    for field in dataclasses.fields(VIT):
        with pytest.raises(JaxqError):
            VisionConfig.from_dict(VIT.to_dict() | {field.name: "nonsense"} | {"labels": ["x"]})


def test_images_of_another_shape_are_refused():
    model = build(VIT, random(VIT))
    for shape in ((2, 16, 16, 1), (2, 20, 20, 3), (16, 16, 3)):
        with pytest.raises(JaxqError, match=r"\(batch, 16, 16, 3\) are expected"):
            model.apply(model.params, jnp.zeros(shape))


def test_positions_move_to_another_grid():
    positions = np.random.default_rng(0).standard_normal((1, 1 + 49, 3)).astype(np.float32)
    np.testing.assert_allclose(resample_positions(positions, 1, 7), positions, atol=1e-6)
    flat = np.ones((1, 16, 2), np.float32)
    np.testing.assert_allclose(resample_positions(flat, 0, 9), np.ones((1, 81, 2)), rtol=1e-6)
    model = build(VIT, random(VIT))
    larger = model.resize(24)
    assert larger.config == VIT.replace(image_size=24) and larger.params["pos_embed"].shape == (1, 37, 8)
    assert larger.params["blocks"] is model.params["blocks"]
    assert jax.eval_shape(larger.apply, larger.params, pictures(larger.config)).shape == (2, 5)


@pytest.mark.parametrize("grid", [2, 5, 11])
def test_positions_as_torch_interpolates(grid):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).standard_normal((1, 2 + 49, 3)).astype(np.float32)
    patches = torch.tensor(positions[:, 2:]).reshape(1, 7, 7, 3).permute(0, 3, 1, 2)
    moved = torch.nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    expected = moved.permute(0, 2, 3, 1).reshape(1, grid * grid, 3).numpy()
    found = resample_positions(positions, 2, grid)
    np.testing.assert_array_equal(found[:, :2], positions[:, :2])
    np.testing.assert_allclose(found[:, 2:], expected, atol=2e-6)
