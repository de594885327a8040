"""Top-1 accuracy against numpy, and from the command line on tiny models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import evaluate, image_data
from jaxq.errors import JaxqError
from jaxq.evaluate import top1
from jaxq.image_data import Images
from jaxq.models import Lazy, images, vision, vision_checkpoint
from jaxq.models.vision_config import VisionConfig
from tests.test_cli import TEXT, parsed, refused, run, write_model

NAMES = ("cat", "dog", "cow", "hen", "pig")
CONFIG = VisionConfig(
    "vit", 8, 4, 16, (2,), (2,), classes=5, channels=1, mean=(0.4,), std=(0.3,), crop=1.0, labels=NAMES
)


def some(count: int = 11) -> Images:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    return Images(pixels, rng.integers(0, 5, count).astype(np.int32), NAMES)


@pytest.fixture(scope="module")
def model() -> vision.VisionModel:
    return vision.build(CONFIG, vision.init_params(CONFIG, seed=3, scale=0.5))


def prepare(rows: np.ndarray) -> np.ndarray:
    return images.prepare(rows, CONFIG)


@pytest.fixture(scope="module")
def expected(model) -> float:
    data = some()
    logits = np.asarray(model.apply(model.params, jnp.asarray(prepare(data.images))))
    return 100 * float(np.mean(logits.argmax(1) == data.labels))


@pytest.mark.parametrize("batch", [None, 4, 11, 100])
def test_equals_numpy_whatever_the_batch(model, expected, batch):
    data = some()
    found = top1(model.apply, model.params, data.images, data.labels, batch=batch, prepare=prepare)
    assert found == {"top1": pytest.approx(expected, rel=1e-12), "images": 11}
    assert isinstance(found["top1"], float)


def test_images_that_are_ready(model, expected):
    data = some()
    found = top1(model.apply, model.params, prepare(data.images), data.labels.tolist())
    assert found["top1"] == pytest.approx(expected)


def pick(params, x):
    """Logits that are the pixels of the first row."""
    return x[:, 0, :, 0] * params["scale"]


ROWS = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2]][:, None, :, None]
SCALE = {"scale": np.ones(4, np.float32)}


def test_by_hand():
    assert top1(pick, SCALE, ROWS, np.array([0, 1, 2, 3, 0, 1, 2]))["top1"] == 100
    assert top1(pick, SCALE, ROWS, np.array([0, 1, 2, 3, 1, 2, 3]))["top1"] == pytest.approx(400 / 7)
    # Among equal logits the first one counts.
    assert top1(pick, SCALE, 0 * ROWS, np.array([0, 1, 2, 3, 1, 2, 3]))["top1"] == pytest.approx(100 / 7)


def test_what_fills_the_last_batch_is_not_counted():
    # Three of the last batch's four are repeats of its first image, which is told right.
    assert top1(pick, SCALE, ROWS[:5], np.array([1, 2, 3, 0, 0]), batch=4)["top1"] == 20


def test_progress():
    seen = []
    labels = np.array([0, 1, 3, 3, 0, 1, 3])
    top1(pick, SCALE, ROWS, labels, batch=3, progress=lambda *event: seen.append(event))
    assert seen == [(3, 7, 200 / 3), (6, 7, 500 / 6), (7, 7, 500 / 7)]


def test_batches_stay_within_bounds(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "_PIXELS", 4 * 4 * 3)
    top1(pick, SCALE, ROWS, np.zeros(7, int), progress=lambda done, *_: seen.append(done))
    assert seen == [3, 6, 7]


def test_compiled_once_and_again_for_another_precision():
    traces = []

    def apply(params, x):
        traces.append(x.shape)
        return x[:, 0, :, 0] @ params["w"]

    params = {"w": np.eye(4, dtype=np.float32)}
    for _ in range(2):
        top1(apply, params, ROWS, np.zeros(7, int), batch=3)
    assert sorted(shape[0] for shape in traces) == [1, 3]
    with jax.default_matmul_precision("highest"):
        top1(apply, params, ROWS, np.zeros(7, int), batch=3)
    assert len(traces) == 4


def test_quantized_and_lazy_leaves(model, expected):
    data = some()
    wide = jaxq.Uniform(bits=8, group_size=None)
    flat = {"blocks/0/mlp/fc1/kernel", "blocks/1/attn/qkv/kernel"}

    def change(path, leaf):
        name = "/".join(key.key for key in path)
        if name in flat:
            return jaxq.rtn(leaf, wide)
        return Lazy(leaf.shape, np.dtype(leaf.dtype), functools.partial(np.asarray, leaf))

    params = jax.tree.map_with_path(change, model.params)
    found = top1(model.apply, params, data.images, data.labels, prepare=prepare)
    assert found["top1"] == pytest.approx(expected, abs=100 / 11 + 1e-6)


def test_other_images_and_labels_are_refused():
    with pytest.raises(JaxqError, match="one image at least; got 0 and 0"):
        top1(pick, SCALE, ROWS[:0], np.zeros(0, int))
    with pytest.raises(JaxqError, match="got 7 and 6"):
        top1(pick, SCALE, ROWS, np.zeros(6, int))
    with pytest.raises(JaxqError, match="labels run from 0 to 4, the model has 4 classes"):
        top1(pick, SCALE, ROWS, np.arange(7) % 5)
    with pytest.raises(JaxqError, match="labels run from -1"):
        top1(pick, SCALE, ROWS, np.full(7, -1))
    with pytest.raises(JaxqError, match="at least 1 image, got 0"):
        top1(pick, SCALE, ROWS, np.zeros(7, int), batch=0)


# ---- the command line --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("top1")
    vision_checkpoint.save(model, path / "vit")
    other = CONFIG.replace(classes=3, labels=())
    vision_checkpoint.save(vision.build(other, vision.init_params(other)), path / "three")
    write_model(path / "llama")
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(image_data.NAMES, "tiny", lambda split, cache: some(11 if split == "test" else 20))


def test_eval(place, expected):
    command = ("eval", place / "vit", "--metric", "top1", "--data", "tiny")
    found = parsed(*command)
    assert found == {
        "top1": pytest.approx(expected),
        "images": 11,
        "data": "tiny",
        "model": str(place / "vit"),
    }
    done = run(*command)
    assert done.exit_code == 0 and done.stdout == f"top-1 {expected:.2f} % (11 images of tiny)\n"


def test_eval_of_the_first_images(place, model):
    data = some()[:4]
    wanted = top1(model.apply, model.params, data.images, data.labels, prepare=prepare)["top1"]
    found = parsed("eval", place / "vit", "--metric", "top1", "--data", "tiny", "--images", "4", "--batch", "3")
    assert (found["top1"], found["images"]) == (pytest.approx(wanted), 4)


def test_fewer_images_than_asked_for_are_said(place):
    done = run("eval", place / "vit", "--metric", "top1", "--data", "tiny", "--images", "12")
    assert done.exit_code == 0 and "tiny gives 11 images, not 12" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("vit --metric top1 --data cifar", "there is no image data set 'cifar'"),
        ("vit --metric top1", "add --data fashion-mnist"),
        ("vit --data text.txt", "is an image model, perplexity is for language: use --metric top1"),
        ("llama --metric top1 --data tiny", "is a language model, top1 is for images: use --metric perplexity"),
        ("three --metric top1 --data tiny", "knows 3 classes, tiny has 5"),
        ("llama --data text.txt --images 3", "--images goes with --metric top1"),
        ("vit --metric top1 --data tiny --windows 3", "--windows and --seq-len go with --metric perplexity"),
        ("vit --metric accuracy --data tiny", "unknown metric 'accuracy'; use perplexity, top1"),
    ],
)
def test_bad_input_ends_in_one_line(args, message, place):
    words = [place / word if word in ("vit", "three", "llama", "text.txt") else word for word in args.split()]
    assert message in refused("eval", *words)


def test_sites_of_an_image_model(place):
    found = {site["path"]: site for site in parsed("sites", place / "vit")}
    assert found["blocks/0/attn/qkv/kernel"]["shape"] == [16, 48]
    assert found["patch_embed/proj/kernel"]["kind"] == "conv"


def test_an_image_model_reads_no_text(place):
    assert "this is an image model: it reads no text" in refused("generate", place / "vit", "--prompt", "Hello")


@pytest.mark.parametrize(
    ("recipe", "bits", "close"), [("rtn", 8, 0.05), ("gptq", 8, 0.05), ("squeezellm", 3, 0.5)]
)
def test_quantized_from_the_command_line(recipe, bits, close, place, tmp_path, model):
    out, words = tmp_path / "out", ["--recipe", recipe, "--bits", str(bits)]
    words += [] if recipe == "squeezellm" else ["--group-size", "channel"]
    words += [] if recipe == "rtn" else ["--calibration", "tiny", "--samples", "20", "--batch", "6"]
    done = parsed("quantize", place / "vit", out, *words)
    assert {site["path"] for site in done["sites"]} >= {f"blocks/{i}/mlp/fc2/kernel" for i in range(2)}
    assert all(site["format"] != "dense" for site in done["sites"] if site["path"].startswith("blocks"))
    data = some()
    x = jnp.asarray(prepare(data.images))
    result = jaxq.load(out)
    logits, wanted = jaxq.quantized(model.apply)(result.params, x), model.apply(model.params, x)
    assert 0 < np.abs(logits - wanted).max() < close * np.abs(wanted).max()
    found = parsed("eval", out, "--metric", "top1", "--data", "tiny")
    assert found["top1"] == pytest.approx(100 * float(np.mean(np.asarray(logits).argmax(1) == data.labels)))
    assert found["bits_per_weight"] == pytest.approx(done["bits_per_weight"])


def test_what_an_image_model_is_calibrated_on(place, tmp_path):
    words = ["--recipe", "gptq", "--group-size", "channel"]
    quantize = functools.partial(refused, "quantize", place / "vit", tmp_path / "out", *words)
    assert "recipe gptq needs images: add --calibration fashion-mnist" in quantize()
    assert "there is no image data set 'essays'" in quantize("--calibration", "essays")
    assert "32 images asked for, there are 20" in quantize("--calibration", "tiny")
    plan = parsed("quantize", place / "vit", "out", *words, "--calibration", "tiny", "--dry-run")
    assert plan["bytes_after"] < plan["bytes_before"]
