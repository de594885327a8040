"""The training example: its augmentations, one step, and a tiny run from end to end."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxq import image_data, models
from jaxq.image_data import Images
from jaxq.models import vision

_FILE = Path(__file__).parents[1] / "examples" / "train_vit.py"


def _module():
    import sys

    spec = importlib.util.spec_from_file_location("train_vit", _FILE)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["train_vit"] = made  # where dataclasses look for the annotations
    spec.loader.exec_module(made)
    return made


train_vit = _module()
TINY = dataclasses.replace(
    train_vit.SETTINGS["deit_tiny"], smoke=True, image_size=8, batch=16, epochs=4, rate=1e-2, warmup=1.0, shift=1
)


def some(count: int = 64) -> Images:
    """Two classes: in the second the upper half is bright, mirrored or not."""
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % 2
    pixels = rng.integers(0, 60, (count, 8, 8, 1)).astype(np.uint8)
    pixels[labels == 1, :4] += 180
    return Images(pixels, labels, ("dark", "bright"))


def tiny_config(settings, names=("dark", "bright"), make=train_vit.make_config) -> vision.VisionConfig:
    return make(settings, names).replace(hidden_size=16, depths=(1,), heads=(2,))


def test_shifts_and_mirrors(key):
    images = jnp.arange(1, 26, dtype=jnp.uint8).reshape(1, 5, 5, 1).repeat(64, 0)
    found = np.asarray(train_vit.shift_and_mirror(key, images, 1))
    assert found.shape == images.shape and found.dtype == np.uint8
    seen = set()
    for image in found[..., 0]:
        padded = np.pad(np.asarray(images[0, ..., 0]), 1)
        cuts = {(i, j): padded[i : i + 5, j : j + 5] for i in range(3) for j in range(3)}
        match = [(at, m) for at, c in cuts.items() for m in (0, 1) if (image == (c[:, ::-1] if m else c)).all()]
        assert len(match) == 1
        seen.add(match[0])
    assert len(seen) > 12  # of 18
    plain = train_vit.shift_and_mirror(key, images, 0)
    assert {(x == np.asarray(images[0])).all() for x in np.asarray(plain)} == {True, False}


def test_boxes(key):
    area, aspect = jnp.full(2000, 0.25), jnp.full(2000, 4.0)
    found = np.asarray(train_vit.boxes(key, 20, area, aspect))[..., 0]
    rows, columns = found.any(2).sum(1), found.any(1).sum(1)
    assert (found.sum((1, 2)) == rows * columns).all()  # a full rectangle
    assert rows.max() in (19, 20) and columns.max() == 5  # sqrt(.25 * 4) * 20 and sqrt(.25 / 4) * 20
    assert not np.asarray(train_vit.boxes(key, 20, jnp.zeros(9), jnp.ones(9))).any()


def test_mix(key):
    values = jnp.arange(8.0)
    images, targets = jnp.broadcast_to(values[:, None, None, None], (8, 6, 6, 1)), jnp.eye(8)
    same = train_vit.mix(key, images, targets, jnp.float32(0))
    np.testing.assert_array_equal(same[0], images)
    np.testing.assert_array_equal(same[1], targets)
    mixed, soft = train_vit.mix(key, images, targets, jnp.float32(1))
    assert (np.abs(np.asarray(soft) - np.eye(8)).max(1) > 0).sum() >= 6
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-6)
    # What the target says is what the image holds.
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), soft @ values, rtol=1e-5)


def test_erase(key):
    images = jnp.full((400, 28, 28, 1), 2.0)
    found = np.asarray(train_vit.erase(key, images, 0.25))
    share = (found != 2).mean((1, 2, 3))
    assert 0.15 < (share > 0).mean() < 0.35 and share.max() < 0.4
    assert (found[found != 2] <= 1).all() and (found >= 0).all()


@pytest.mark.parametrize("name", ["deit_tiny", "swin_tiny"])
def test_branches_drop_for_some_images_only(name, key):
    settings = dataclasses.replace(train_vit.SETTINGS[name], smoke=True)
    config = train_vit.make_config(settings, ("a", "b")).replace(image_size=28)
    model = vision.build(config, vision.init_params(config, 0, scale=0.1))
    images = jnp.broadcast_to(jax.random.normal(key, (1, 28, 28, 1)), (12, 28, 28, 1))

    def run(rate: float) -> np.ndarray:
        with train_vit.dropped(key, rate, 2 * sum(config.depths), 12):
            return np.asarray(jax.jit(lambda *args: model.apply(*args))(model.params, images))

    plain, found = np.asarray(jax.jit(model.apply)(model.params, images)), run(0.5)
    np.testing.assert_allclose(run(0.0), plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain, np.broadcast_to(plain[:1], plain.shape), atol=1e-5)
    assert len({tuple(row) for row in found.round(4).tolist()}) > 3


def test_a_start_with_positions():
    config = train_vit.make_config(train_vit.SETTINGS["deit_tiny"], ("a", "b")).replace(depths=(1,))
    params = train_vit.initial(config, 0)
    where = np.asarray(params["pos_embed"])[0]
    assert where.shape == (50, 192) and np.abs(where[0]).max() < 0.1 and where[1:].std() > 0.5
    np.testing.assert_allclose(
        train_vit.sines(7, 192)[9, [0, 48, 96, 144]], [np.sin(2), np.cos(2), np.sin(1), np.cos(1)], rtol=1e-6
    )
    assert np.asarray(params["blocks"]["0"]["mlp"]["fc2"]["kernel"]).std() == pytest.approx(768**-0.5, rel=0.02)
    assert not np.asarray(params["head"]["kernel"]).any()


def prepared(settings):
    config = tiny_config(settings)
    model = vision.build(config, train_vit.initial(config, 0))
    optimizer = train_vit.make_optimizer(settings, model.params, 4)
    return model, optimizer, train_vit.start(model.params, optimizer)


def test_epochs_lower_the_loss():
    settings = dataclasses.replace(TINY, mixed=0.0, erased=0.0, smoothing=0.0, drop=0.0, epochs=6)
    model, optimizer, state = prepared(settings)
    epoch = train_vit.make_epoch(settings, model, optimizer)
    data = some()
    first = np.asarray(jax.tree.leaves(state.average)[0])
    losses = []
    for i in range(6):
        state, value = epoch(state, data.images, data.labels, jax.random.key(i), jnp.float32(0))
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0], losses
    assert int(state.steps) == 24 and state.steps.dtype == jnp.int32
    assert {x.dtype for x in jax.tree.leaves((state.params, state.average))} == {np.dtype(np.float32)}
    assert not np.array_equal(first, jax.tree.leaves(state.average)[0])
    accuracy = train_vit.make_accuracy(model, batch=48)
    assert float(accuracy(state.average, data.images, data.labels)) == 100


def test_in_bfloat16_the_loss_is_nearly_the_same(monkeypatch, key):
    model, _, state = prepared(TINY)
    data = some(16)
    args = (state.params, jnp.asarray(data.images / np.float32(255)), jax.nn.one_hot(data.labels, 2), key)

    def measured():
        return jax.jit(jax.value_and_grad(lambda *a: train_vit.loss(TINY, model, *a)))(*args)

    wide, _ = measured()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    narrow, gradients = measured()
    assert float(narrow) == pytest.approx(float(wide), rel=2e-2) and narrow.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {np.dtype(np.float32)}


def test_from_end_to_end(monkeypatch, tmp_path):
    import typer

    monkeypatch.setattr(train_vit, "TOY", {**train_vit.TOY, "epochs": 1, "batch": 32, "smoke": True})
    monkeypatch.setattr(train_vit, "make_config", tiny_config)
    monkeypatch.setattr(image_data, "calibration", lambda data, count, seed: data)
    monkeypatch.setitem(image_data.NAMES, "fashion-mnist", lambda split, cache: some())
    app = typer.Typer()
    app.command()(train_vit.main)
    command = ["--model", "deit_tiny", "--smoke", "--image-size", "8"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["images"] == 64 and f"{record['top1']:.2f} % of 64 test images" in done.stdout.replace("\n", " ")
    assert [row["epoch"] for row in record["history"]] == [1] and record["settings"]["batch"] == 32
    model = models.load(tmp_path / "out")
    assert isinstance(model, vision.VisionModel) and model.config.labels == ("dark", "bright")
    assert record["parameters"] == sum(x.size for x in jax.tree.leaves(model.params))

    for change, message in (
        (["--model", "resnet", "--out", str(tmp_path / "no")], "unknown model 'resnet'"),
        ([*command, "--out", str(tmp_path / "no"), "--batch", "65"], "a batch of 65 needs as many images"),
        ([*command, "--out", str(_FILE)], "cannot write"),
    ):
        done = CliRunner().invoke(app, change)
        assert done.exit_code == 2 and message in done.stderr
