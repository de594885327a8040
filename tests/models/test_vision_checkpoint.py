"""Image checkpoints: parity with transformers, the names of timm, saving, and every kind of damage."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_vision import SWIN as LONG_SWIN
from tiny_vision import VARIANTS, VIT, paths, pictures, random, tiny

import jaxq
from jaxq import assets, models
from jaxq.errors import JaxqError
from jaxq.models import onnx_file, vision_checkpoint, vision_demo
from jaxq.models.vision import build
from jaxq.models.vision_config import HALF, IMAGENET_MEAN, PRESETS
from jaxq.models.vision_forms import hf_names, timm_name, write_timm

SWIN = LONG_SWIN.replace(depths=(2, 1), crop=0.9)

# name -> (model class, config class, settings). Swin: grids that windows do not tile, a window of a whole grid.
TOKENS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=5)
PLAIN = dict(TOKENS, intermediate_size=40, image_size=32, patch_size=8)
WINDOWS = dict(patch_size=2, embed_dim=16, num_heads=[2, 4], window_size=4, num_labels=5)
CASES = {
    "vit": ("ViTForImageClassification", "ViTConfig", PLAIN),
    "vit-tokens": ("ViTModel", "ViTConfig", dict(PLAIN, qkv_bias=False, hidden_act="gelu_new")),
    "deit": ("DeiTForImageClassification", "DeiTConfig", PLAIN),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN),
    "dinov2": ("Dinov2Model", "Dinov2Config", dict(TOKENS, image_size=56)),
    "dinov2-head": ("Dinov2ForImageClassification", "Dinov2Config", dict(TOKENS, image_size=28)),
    "swin": ("SwinForImageClassification", "SwinConfig", dict(WINDOWS, image_size=32, depths=[2, 2])),
    "swin-odd": ("SwinForImageClassification", "SwinConfig", dict(WINDOWS, image_size=26, depths=[2, 1])),
    "swin-tokens": ("SwinModel", "SwinConfig", dict(WINDOWS, image_size=16, depths=[2, 1])),
}


def original(case: str):
    """The transformers model of a case, weights large enough that every part of it matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, config, settings = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter) + (parameter if parameter.ndim == 1 else 0.0))
    return model


def theirs(model, images) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model(torch.tensor(np.asarray(images).transpose(0, 3, 1, 2)))
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def ours(model, images) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(model.params, images))


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_transformers(case, tmp_path):
    reference = original(case)
    reference.save_pretrained(str(tmp_path), safe_serialization=True)
    model = models.load(tmp_path)
    assert isinstance(model, models.VisionModel)
    images = pictures(model.config)
    expected = theirs(reference, images)
    assert np.abs(expected).max() > 0.5
    assert np.abs(ours(model, images) - expected).max() <= 1e-4


def test_another_image_size_as_in_transformers(tmp_path):
    reference = original("dinov2")
    reference.save_pretrained(str(tmp_path), safe_serialization=True)
    model = vision_checkpoint.load(tmp_path, image_size=42)
    images = pictures(model.config)
    assert images.shape[1] == 42
    assert np.abs(ours(model, images) - theirs(reference, images)).max() <= 1e-4
    resized = models.load(tmp_path).resize(42)
    np.testing.assert_allclose(resized.params["pos_embed"], model.params["pos_embed"], atol=1e-6)


# ---- checkpoints written here, without torch ---------------------------------------------------------------

HF = {
    "vit": dict(
        model_type="vit", hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=4, layer_norm_eps=1e-6,
    ),
    "swin": dict(
        model_type="swin", embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, mlp_ratio=2.0,
        image_size=16, patch_size=2,
    ),
}  # fmt: skip


def write_hf(path, config, data, edit=lambda tensors: tensors):
    """A transformers checkpoint of random parameters; gives them. edit: tensors -> tensors."""
    params = random(config)
    tensors = {}
    for keys, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        value = np.asarray(leaf)
        if name.endswith("/kernel"):
            value = value.transpose((1, 0) if value.ndim == 2 else (3, 2, 0, 1))
        names = hf_names(config, data["model_type"], name)
        parts = np.split(value, len(names))
        whole = ["" if part.startswith("classifier") else data["model_type"] + "." for part in names]
        tensors |= {w + n: np.ascontiguousarray(p) for w, n, p in zip(whole, names, parts, strict=True)}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(data))
    save_file(edit(tensors), path / "model.safetensors")
    return params


@pytest.mark.parametrize("kind, config", [("vit", VIT), ("swin", SWIN)])
def test_hugging_face_form_is_read(kind, config, tmp_path):
    params = write_hf(tmp_path, config, HF[kind])
    lazy = models.load(tmp_path, lazy=True, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lazy.params)} == {"bfloat16"}
    model = models.load(tmp_path)
    assert model.config.replace(
        **{k: getattr(config, k) for k in ("mean", "std", "crop", "squash")}
    ) == config.replace(interpolation=model.config.interpolation)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, params)))
    assert model.source["kind"] == "vision" and model.source["name"] == tmp_path.name


def test_images_as_the_checkpoint_says(tmp_path):
    write_hf(tmp_path, VIT, HF["vit"] | {"id2label": {str(i): name for i, name in enumerate("abcde")}})
    found = models.load(tmp_path, lazy=True).config
    assert (found.mean, found.squash, found.crop, found.interpolation) == (HALF, True, 1.0, "bilinear")
    assert found.labels == tuple("abcde")
    for said, fields in [
        (dict(image_mean=IMAGENET_MEAN, resample=3, size=224), dict(mean=IMAGENET_MEAN, squash=True, crop=1.0)),
        (
            dict(size={"shortest_edge": 256}, do_center_crop=True, crop_size={"height": 224, "width": 224}),
            dict(squash=False, crop=0.875),
        ),
        (dict(size={"height": 16, "width": 16}, do_normalize=False), dict(mean=(0.0,) * 3, std=(1.0,) * 3)),
    ]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        found = models.load(tmp_path, lazy=True).config
        assert {name: getattr(found, name) for name in fields} == fields
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(resample=0)))
    with pytest.raises(JaxqError, match="resample 0 is not supported"):
        models.load(tmp_path)


# Tensors of timm 1.0.31's own models, those of the first block in full.
BLOCK = "attn.proj.bias attn.proj.weight attn.qkv.bias attn.qkv.weight mlp.fc1.bias mlp.fc1.weight mlp.fc2.bias "
BLOCK += "mlp.fc2.weight norm1.bias norm1.weight norm2.bias norm2.weight"
SCALED = f"{BLOCK} ls1.gamma ls2.gamma"
ENDS = "cls_token pos_embed patch_embed.proj.bias patch_embed.proj.weight norm.bias norm.weight"
HEAD = "head.bias head.weight"
WINDOWED = "patch_embed.norm.bias patch_embed.norm.weight patch_embed.proj.bias patch_embed.proj.weight norm.bias "
WINDOWED += (
    "norm.weight head.fc.bias head.fc.weight layers.1.downsample.norm.bias layers.1.downsample.norm.weight "
)
WINDOWED += "layers.1.downsample.reduction.weight"
GOLDEN = {
    "vit_small": (f"{ENDS} {HEAD}", "blocks.0", BLOCK),
    "deit_tiny": (f"{ENDS} {HEAD}", "blocks.0", BLOCK),
    "dinov2_small": (ENDS, "blocks.0", SCALED),
    "swin_tiny": (WINDOWED, "layers.0.blocks.0", f"{BLOCK} attn.relative_position_bias_table"),
}


@pytest.mark.parametrize("preset", GOLDEN)
def test_names_are_those_of_timm(preset):
    config = PRESETS[preset]
    config = config.replace(depths=(1, 1) if config.family == "swin" else (1,), heads=config.heads[:2])
    outside, first, block = GOLDEN[preset]
    found = {timm_name(config, path) for path in paths(config)}
    second = [f"layers.1.blocks.0.{name}" for name in block.split()] if config.family == "swin" else []
    assert found == {*outside.split(), *(f"{first}.{name}" for name in block.split()), *second}


@pytest.mark.parametrize("name", [*VARIANTS, "swin"])
def test_saved_models_load_again(name, tmp_path):
    config = SWIN if name == "swin" else tiny(name)
    model = build(config, random(config))
    vision_checkpoint.save(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = models.load(tmp_path)
    assert again.config == config and again.apply is model.apply
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, model.params)))
    if name == "both":
        return  # timm has no such pooling
    # What timm reads says the same, but for what timm takes from a model's name.
    data = json.loads((tmp_path / "config.json").read_text())
    del data["jaxq"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert models.load(tmp_path, lazy=True).config == config


def test_halves_and_other_parameters(tmp_path):
    model = build(VIT.replace(labels=tuple("abcde")), random(VIT))
    vision_checkpoint.save(model, tmp_path, np.float16)
    assert {x.dtype.name for x in load_file(tmp_path / "model.safetensors").values()} == {"float16"}
    again = models.load(tmp_path)
    np.testing.assert_allclose(again.params["pos_embed"], model.params["pos_embed"], atol=1e-3)
    assert again.config.labels == tuple("abcde")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    vision_checkpoint.save(model.replace(params=narrow), tmp_path)
    assert (models.load(tmp_path).params["pos_embed"] == narrow["pos_embed"]).all()
    head = model.params["head"]
    quantized = model.params | {"head": head | {"kernel": jaxq.rtn(head["kernel"], jaxq.Uniform(4, 8))}}
    large = model.params | {"pos_embed": model.params["pos_embed"] * 1e6}
    for params, dtype, message in [
        (large, np.float16, "pos_embed holds values that float16 cannot"),
        (quantized, np.float32, "quantized ones are saved with jaxq.save"),
        ({"a": np.ones(3)}, np.float32, "not the model's own"),
        (model.params, np.int8, "float32 or float16, not int8"),
    ]:
        with pytest.raises(JaxqError, match=message):
            vision_checkpoint.save(model.replace(params=params), tmp_path / "bad", dtype)
    assert not (tmp_path / "bad").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxqError, match="cannot write"):
        vision_checkpoint.save(model, tmp_path / "file")


# ---- timm's form -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A function that writes a timm checkpoint with some changes to its config and tensors, and loads it."""

    def make(config, change=None, edit=lambda tensors: tensors):
        vision_checkpoint.save(build(config, random(config)), tmp_path)
        data = write_timm(config)
        del data["jaxq"]
        (tmp_path / "config.json").write_text(json.dumps(data | (change or {})))
        tensors = edit(load_file(tmp_path / "model.safetensors"))
        save_file(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "model.safetensors"
        )
        return models.load(tmp_path)

    return make


def test_swin_of_old_timm(saved):
    """Before 0.9: merging ends a stage, the head is one layer, constants are stored."""

    def old(tensors):
        tensors = {n.replace("layers.1.downsample", "layers.0.downsample"): t for n, t in tensors.items()}
        tensors = {n.replace("head.fc.", "head."): t for n, t in tensors.items()}
        constant = np.zeros((2, 2), np.float32)
        more = ("layers.0.blocks.1.attn_mask", "layers.0.blocks.0.attn.relative_position_index")
        return tensors | dict.fromkeys(more, constant)

    model, expected = saved(SWIN, edit=old), saved(SWIN)
    assert model.config == expected.config == SWIN
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, expected.params)))


def test_old_flat_config_of_timm(saved, tmp_path):
    """All in one dict, shapes only in the name: as the first checkpoints of the hub have it."""
    config = PRESETS["deit_tiny"].replace(image_size=32, depths=(1,), classes=5)
    flat = write_timm(config)["pretrained_cfg"] | {"architecture": "deit_tiny_patch16_224", "num_features": 192}
    saved(config)
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert models.load(tmp_path, lazy=True).config == config


def test_published_timm_configs(saved):
    config = PRESETS["vit_small"].replace(image_size=32, depths=(1,), classes=5)
    images = write_timm(config)["pretrained_cfg"]
    change = {"architecture": "vit_small_patch16_224", "model_args": None, "pretrained_cfg": images}
    assert saved(config, change).config == config
    squashed = images | {"crop_mode": "squash", "crop_pct": 1.0}
    assert saved(config, change | {"pretrained_cfg": squashed}).config == config.replace(squash=True, crop=1.0)
    larger = saved(config, change | {"pretrained_cfg": images | {"input_size": [3, 64, 64]}})
    assert larger.config.grid == 4 and larger.params["pos_embed"].shape == (1, 17, 384)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "convnext_tiny"}, "architecture 'convnext_tiny' is not supported; jaxq knows vit, deit"),
        ({"architecture": "vit_small_patch16_siglip_224"}, "'vit_small_patch16_siglip_224' is not supported"),
        ({"model_args": {"img_size": [16, 32]}}, "must be square, found"),
        ({"pretrained_cfg": {"input_size": [3, 16, 32]}, "model_args": {}}, "must be square"),
        ({"pretrained_cfg": {}, "model_args": {}}, "cannot be understood: KeyError 'input_size'"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode 'border' is not supported"),
        ({"model_args": {"img_size": 16, "num_heads": 3}}, "3 heads cannot share"),
        ({"model_args": {"img_size": 16, "num_heads": 2, "global_pool": "avg"}}, "only global_pool token"),
        ({"model_args": {"img_size": 16, "num_heads": 2, "act_layer": "mish"}}, "activation 'mish'"),
        ({"model_args": [1]}, "cannot be understood"),
        ({"jaxq": {"family": "vit"}}, "not a jaxq vision config"),
    ],
)
def test_broken_timm_configs(saved, change, message):
    with pytest.raises(JaxqError, match=message) as error:
        saved(VIT, change)
    assert "\n" not in str(error.value)


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def replaced(name, value):
    return lambda tensors: tensors | {name: value}


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            without("blocks.1.attn.proj.bias"),
            "lacks blocks.1.attn.proj.bias, which this vit needs for blocks/1/attn",
        ),
        (without("patch_embed.proj.weight"), "lacks patch_embed.proj.weight with 4 axes"),
        (replaced("norm.weight", np.ones(9, np.float32)), r"norm.weight has shape \(9,\), but \(8,\) is expected"),
        (
            replaced("blocks.0.attn.q_norm.weight", np.ones(4, np.float32)),
            "1 tensors .* no place for: blocks.0.attn.q",
        ),
        (replaced("pos_embed", np.ones((1, 16, 8), np.float32)), r"pos_embed has shape \(1, 16, 8\)"),
        (replaced("norm.bias", np.ones(8, np.int32)), "norm.bias is stored as I32"),
        (replaced("mask_token", np.ones((1, 8), np.float32)), None),
    ],
)
def test_damaged_timm_tensors(saved, edit, message):
    if message is None:
        saved(VIT, edit=edit)
        return
    with pytest.raises(JaxqError, match=message) as error:
        saved(VIT, edit=edit)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 3}, "3 heads cannot share"),
        ({"hidden_size": "8"}, "hidden_size must be a positive integer"),
        ({"image_size": [16, 32]}, "must be square"),
        ({"id2label": {"x": "cat"}}, "cannot be understood"),
        ({"hidden_size": 16}, "has shape"),
        ({"qkv_bias": False}, "9 tensors that this vit has no place for"),
        ({"model_type": "clip"}, "'clip' is not supported"),
    ],
)
def test_broken_hugging_face_configs(change, message, tmp_path):
    with pytest.raises(JaxqError, match=message) as error:
        write_hf(tmp_path, VIT, HF["vit"])
        (tmp_path / "config.json").write_text(json.dumps(HF["vit"] | change))
        models.load(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_hugging_face_files(tmp_path):
    lost = "vit.encoder.layer.0.attention.attention.key.weight"
    write_hf(tmp_path, VIT, HF["vit"], without(lost))
    with pytest.raises(JaxqError, match="lacks encoder.layer.0.attention.attention.key.weight"):
        models.load(tmp_path)
    write_hf(tmp_path, VIT, HF["vit"])
    raw = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:-9])
    with pytest.raises(JaxqError, match="truncated"):
        models.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(JaxqError, match="config.json is missing"):
        models.load(tmp_path)


# ---- the demo model ----------------------------------------------------------------------------------------


def field(number: int, value) -> bytes:
    """One protobuf field: an int, a float32 or bytes."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def initializer(name: str, values: np.ndarray) -> bytes:
    dims = b"".join(field(1, n) for n in values.shape)
    kind = {"float32": 1, "int64": 7}[values.dtype.name]
    return field(5, dims + field(2, kind) + field(8, name) + field(9, values.tobytes()))


def node(kind: str, inputs: str, output: str) -> bytes:
    return field(
        1, b"".join(field(1, i) for i in inputs.split()) + field(2, output) + field(3, "n") + field(4, kind)
    )


def test_weights_of_an_onnx_file(tmp_path):
    cls, rest, matrix = (
        np.random.default_rng(0).standard_normal(s, np.float32) for s in ((1, 1, 4), (1, 9, 4), (4, 300))
    )
    graph = initializer("backbone.embeddings.cls_token", cls) + initializer("a", rest) + initializer("b", cls + 1)
    graph += initializer("onnx::MatMul_7", matrix) + initializer("backbone.layer.fc.bias", matrix[0])
    graph += initializer("shape", np.array([1, 2])) + field(2, "graph's name") + field(12, 1.5)
    graph += node("MatMul", "x onnx::MatMul_7", "y") + node("Add", "backbone.layer.fc.bias y", "z")
    graph += node("MatMul", "x z", "w") + node("Add", "w y", "v")
    path = tmp_path / "m.onnx"
    path.write_bytes(field(1, 8) + field(7, graph))
    nodes, weights = onnx_file.read(path)
    assert nodes[0] == onnx_file.Node("MatMul", ("x", "onnx::MatMul_7"), ("y",)) and len(nodes) == 4
    assert "shape" not in weights
    found = {name: weight.view() for name, weight in vision_demo.dinov2_weights(path).items()}
    assert set(found) == {
        "embeddings.cls_token", "embeddings.position_embeddings", "layer.fc.bias", "layer.fc.weight"
    }  # fmt: skip
    np.testing.assert_array_equal(found["layer.fc.weight"], matrix.T)
    np.testing.assert_array_equal(found["embeddings.position_embeddings"], np.concatenate([cls + 1, rest], 1))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-3], b"\xff" * 40, b"plain text", field(7, field(5, field(2, 1)))):
        path.write_bytes(damaged)
        with pytest.raises(JaxqError, match="cannot be read as an ONNX model"):
            onnx_file.read(path)
    with pytest.raises(JaxqError, match="cannot be read"):
        onnx_file.read(tmp_path / "missing.onnx")


def test_demo_names_and_errors(tmp_path):
    with pytest.raises(JaxqError, match="no demo model 'x': choose one of dinov2-small"):
        vision_demo.load("x", cache=tmp_path)
    with pytest.raises(JaxqError, match=r"name of a demo model \(dinov2-small, gemma3-270m"):
        models.load("dinov3")


def test_the_demo_of_the_repository(tmp_path, monkeypatch):
    assert vision_demo.FOLDER.parts[-2:] == ("demo", "vit-fashion")
    assert (vision_demo.FOLDER.parents[1] / "jaxq" / "models" / "vision_demo.py").samefile(vision_demo.__file__)
    monkeypatch.setattr(vision_demo, "FOLDER", tmp_path / "vit-fashion")
    monkeypatch.chdir(tmp_path)
    for load in (models.load, vision_demo.load):
        with pytest.raises(JaxqError, match="clone the repository, or train it with examples/train_vit.py$"):
            load("vit-fashion")
    config = tiny("grey")
    vision_checkpoint.save(build(config, random(config)), vision_demo.FOLDER, np.float16)
    monkeypatch.chdir("/")
    model = models.load("vit-fashion")
    assert model.config == config and model.apply is build(config, {}).apply
    assert model.source["kind"] == "demo" and model.source["name"] == "vit-fashion"
    assert model.source["bytes"] == (vision_demo.FOLDER / "model.safetensors").stat().st_size
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16).astype(np.float32)),
        model.params,
        random(config),
    )
    lazy = models.load("vit-fashion", lazy=True, dtype="bfloat16")
    assert {(type(leaf), leaf.dtype) for leaf in jax.tree.leaves(lazy.params)} == {
        (models.Lazy, np.dtype(jnp.bfloat16))
    }
    assert vision_demo.load("vit-fashion", image_size=20).config.grid == 5
    (vision_demo.FOLDER / "model.safetensors").unlink()
    with pytest.raises(JaxqError, match="model.safetensors"):
        models.load("vit-fashion")


@pytest.mark.slow
def test_dinov2_small_against_the_original():
    """Values of transformers' Dinov2Model on the same weights, see the notes on assets."""
    try:
        model = models.load("dinov2-small")
    except assets.Unavailable as reason:
        pytest.skip(str(reason))
    assert isinstance(model, models.VisionModel) and model.config.grid == 16
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 22_056_192 - (37 * 37 - 16 * 16) * 384
    x = np.sin(0.01 * np.arange(3 * 224 * 224)).reshape(1, 3, 224, 224).astype(np.float32)
    out = ours(model, jnp.asarray(x.transpose(0, 2, 3, 1)))[0]
    assert out.shape == (257, 384)
    np.testing.assert_allclose(out[0, :4], [1.0568, -0.2619, 1.0568, -4.0879], atol=2e-4)
    np.testing.assert_allclose(out[1, :4], [1.4648, -0.5864, -0.2196, -4.2850], atol=2e-4)
    assert out.mean() == pytest.approx(0.00147, abs=1e-5) and out.std() == pytest.approx(2.64168, abs=5e-5)
