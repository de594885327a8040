"""Quantizers of activations on disk: bit-exact round trips, refusal of what differs, models that run as before."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxq
from jaxq import checkpoint, evaluate, image_data, models
from jaxq.checkpoint import arrays, load, read_manifest, save
from jaxq.errors import JaxqError
from jaxq.formats import Affine, Dynamic, Uniform, rounded_input
from jaxq.formats.activations import AffineQuantizer, DynamicQuantizer
from jaxq.formats.log_activations import LogQuantizer, ShiftLogQuantizer
from jaxq.image_data import Images
from jaxq.models import vision
from jaxq.models.images import prepare
from jaxq.models.vision_config import VisionConfig
from jaxq.quantize import Result
from jaxq.report import Report
from tests.test_checkpoint import assert_same, edit, leftovers
from tests.test_cli import parsed, refused, run, write_model


def bits(*shape: int, seed: int = 0, dtype=np.float32) -> jax.Array:
    """Random bits: any pattern must survive, NaN payloads included."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.random.default_rng((seed, len(shape))).integers(0, 256, count, np.uint8)
    return jnp.asarray(raw.view(dtype).reshape(shape))


KINDS = {
    "tensor": AffineQuantizer(bits(), bits(seed=1), 8),
    "blocks/0/attn/probs#2": AffineQuantizer(bits(3, 1, 1), bits(3, 1, 1, seed=1), 4),
    "odd % name.": AffineQuantizer(bits(5), bits(seed=1), 4, fractional=True),
    "stack": AffineQuantizer(bits(2, 5), bits(2, 5, seed=1, dtype=jnp.bfloat16), 16),
    "dynamic": DynamicQuantizer(6),
    "dynamic over tokens": DynamicQuantizer(1, symmetric=False, axis=(-2, -1)),
    "log": LogQuantizer(bits(), 4),
    "log per head": LogQuantizer(bits(3, 1, 1), 3, root=2, official=True),
    "shift": ShiftLogQuantizer(bits(), bits(seed=1), bits(seed=2), 4),
    "shift official": ShiftLogQuantizer(bits(), bits(seed=1), bits(seed=2), 3, official=True),
    "host": AffineQuantizer(np.float64(1 / 3), np.array(2, np.int64), 2),
    "none": AffineQuantizer(jnp.zeros((0, 1, 1)), jnp.zeros((0, 1, 1)), 2),
}
PARAMS = {"w": jaxq.rtn(jnp.arange(32.0).reshape(8, 4), Uniform(4, 8)), "b": jnp.arange(4.0)}
EXAMPLE = jaxq.Activated(PARAMS, KINDS)


def result(params=EXAMPLE) -> Result:
    return Result(params, Report())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "out"
    save(path, result())
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def test_every_kind_comes_back_bit_for_bit(saved):
    again = load(saved).params
    assert_same(again, EXAMPLE)
    assert list(again.activations) == list(KINDS)
    assert {path: type(q) for path, q in again.activations.items()} == {p: type(q) for p, q in KINDS.items()}


def test_the_manifest_describes_each(saved):
    manifest = read_manifest(saved)
    assert manifest["schema"] == 2 and list(manifest["activations"]) == list(KINDS)
    found = manifest["activations"]["blocks/0/attn/probs#2"]
    assert len(found.pop("crc32")) == 8
    number = {"shape": [3, 1, 1], "dtype": "float32"}
    assert found == {
        "path": "blocks/0/attn/probs#2",
        "quantizer": {"name": "affine", "bits": 4, "fractional": False},
        "arrays": {"scale": number, "zero": number},
    }
    over = manifest["activations"]["dynamic over tokens"]
    assert over["quantizer"] == {"name": "dynamic", "bits": 1, "symmetric": False, "axis": [-2, -1]}
    assert over["arrays"] == {}


@pytest.mark.parametrize("activations", [{}, {"a": DynamicQuantizer(4), "b": DynamicQuantizer(8)}], ids=len)
def test_without_arrays(activations, tmp_path):
    params = jaxq.Activated(PARAMS, activations)
    save(tmp_path / "out", result(params))
    assert not (tmp_path / "out" / "activations").exists()
    assert_same(load(tmp_path / "out").params, params)


def test_a_directory_of_schema_1(tmp_path):
    """What is saved without rounded activations is what jaxq 0.1.0 wrote before there were any: its checksums."""
    w = np.arange(32, dtype=np.float32).reshape(8, 4)
    q = rounded_input(w, AffineQuantizer(jnp.float32(0.5), jnp.float32(3.0), 4), Affine(4))
    save(tmp_path / "out", result({"plain": w, "rounded": q}))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["schema"] == 1 and "activations" not in manifest
    assert {path: entry["crc32"] for path, entry in manifest["params"].items()} == {
        "plain": "284af9d3",
        "rounded": "07cdb632",
    }
    assert "quantizer" not in manifest["params"]["rounded"]
    assert_same(load(tmp_path / "out").params, {"plain": jnp.asarray(w), "rounded": q})


def test_the_structure_and_the_devices_of_the_parameters(tmp_path):
    params = {"w": [jnp.arange(32.0).reshape(8, 4)]}
    quantizers = {"x": AffineQuantizer(jnp.float32(0.5), jnp.float32(3.0), 4)}
    save(tmp_path / "out", result(jaxq.Activated(params, quantizers)))
    for like in (params, jaxq.Activated(params, {})):
        assert_same(load(tmp_path / "out", like=like).params, jaxq.Activated(params, quantizers))
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, PartitionSpec("model"))
    again = load(tmp_path / "out", like=params, shardings=lambda path, leaf: sharding).params
    assert_same(again, jaxq.Activated(params, quantizers))
    scale = again.activations["x"].scale
    assert len(scale.sharding.device_set) == 4 and scale.is_fully_replicated


# What differs from the manifest is refused.

PROBS = "blocks/0/attn/probs#2"
NUMBER = {"shape": [3, 1, 1], "dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [
        {"quantizer": {"name": "cubic", "bits": 4, "fractional": False}},
        {"quantizer": {"name": ["affine"], "bits": 4, "fractional": False}},
        {"quantizer": {"name": "dynamic", "bits": 4, "symmetric": True, "axis": -1}},
        {"quantizer": {"name": "log", "bits": 4, "root": 1, "official": False}},
        {"quantizer": {"bits": 4, "fractional": False}},
        {"quantizer": {"name": "affine", "bits": 4}},
        {"quantizer": {"name": "affine", "bits": 4, "fractional": False, "share": "head"}},
        {"quantizer": {"name": "affine", "bits": 99, "fractional": False}},
        {"quantizer": {"name": "affine", "bits": "4", "fractional": False}},
        {"quantizer": {"name": "affine", "bits": [4], "fractional": False}},
        {"quantizer": {"name": "affine", "bits": 4, "fractional": "no"}},
        {"quantizer": {"name": "affine", "bits": 4, "fractional": True}},
        {"quantizer": {"name": "affine", "bits": 5, "fractional": False}},
        {"quantizer": None},
        {"quantizer": "affine"},
        {"arrays": {"scale": NUMBER}},
        {"arrays": {"scale": NUMBER, "zero": NUMBER, "eta": NUMBER}},
        {"arrays": {"scale": NUMBER, "zero": NUMBER | {"shape": [3]}}},
        {"arrays": {"scale": NUMBER, "zero": NUMBER | {"dtype": "float16"}}},
        {"arrays": {"scale": NUMBER, "zero": NUMBER | {"dtype": "float33"}}},
        {"arrays": {"scale": NUMBER, "zero": 3}},
        {"arrays": []},
        {"crc32": "00000000"},
        {"path": "blocks/1/attn/probs"},
    ],
    ids=str,
)
def test_another_description_is_refused_by_name(change, copy):
    edit(copy, lambda manifest: manifest["activations"][PROBS].update(change))
    with pytest.raises(JaxqError, match=PROBS) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", [None, 0.5, "-1", True, [0.5]], ids=str)
def test_another_axis_is_refused_by_name(axis, copy):
    edit(copy, lambda manifest: manifest["activations"]["dynamic"]["quantizer"].update(axis=axis))
    with pytest.raises(JaxqError, match="activation dynamic: quantizer 'dynamic' cannot have axis"):
        load(copy)


@pytest.mark.parametrize("key", ["path", "quantizer", "arrays", "crc32"])
def test_a_part_that_is_missing_is_refused_by_name(key, copy):
    edit(copy, lambda manifest: manifest["activations"][PROBS].pop(key))
    with pytest.raises(JaxqError, match=f"jaxq.json is damaged: KeyError '{key}' in its activation {PROBS}"):
        load(copy)


def test_sections_and_entries_of_another_kind_are_refused(copy):
    edit(copy, lambda manifest: manifest["activations"].update({PROBS: 3}))
    with pytest.raises(JaxqError, match=f"damaged.*{PROBS}"):
        load(copy)
    for section in ([], None, "x"):
        edit(copy, lambda manifest, section=section: manifest.update(activations=section))
        with pytest.raises(JaxqError, match="damaged: its activations are no list of paths"):
            load(copy)
    edit(copy, lambda manifest: manifest.pop("activations"))
    with pytest.raises(JaxqError, match="has activations, of which jaxq.json says nothing"):
        load(copy)


def test_manifest_and_arrays_must_list_the_same(copy, tmp_path):
    edit(copy, lambda manifest: manifest["activations"].pop(PROBS))
    with pytest.raises(JaxqError, match=rf"{PROBS}/scale should be absent but is \[3, 1, 1\] float32"):
        load(copy)
    shutil.rmtree(copy / "activations")
    save(tmp_path / "other", result(jaxq.Activated(PARAMS, {p: q for p, q in KINDS.items() if p != PROBS})))
    shutil.copytree(tmp_path / "other" / "activations", copy / "activations")
    other = {"path": "new", "quantizer": {"name": "log", "bits": 4, "root": 1, "official": False}, "crc32": ""}
    edit(copy, lambda manifest: manifest["activations"].update(new=other | {"arrays": {"scale": NUMBER}}))
    with pytest.raises(JaxqError, match=r"new/scale should be \[3, 1, 1\] float32 but is absent"):
        load(copy)


def test_arrays_of_another_directory_are_refused(copy, tmp_path):
    other = KINDS | {PROBS: dataclasses.replace(KINDS[PROBS], scale=bits(3, 1, 1, seed=7))}
    save(tmp_path / "other", result(jaxq.Activated(PARAMS, other)))
    shutil.rmtree(copy / "activations")
    shutil.copytree(tmp_path / "other" / "activations", copy / "activations")
    with pytest.raises(JaxqError, match=f"{PROBS} is damaged: its checksum differs"):
        load(copy)
    assert_same(load(copy, verify=False).params, jaxq.Activated(PARAMS, other))
    shutil.rmtree(copy / "activations")
    with pytest.raises(JaxqError, match="activations cannot be read"):
        load(copy)


# A read that TensorStore gives up may complain from a thread of its own, later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["half", "flipped"])
def test_damaged_array_files_never_give_other_numbers(how, copy):
    refused_count = 0
    for file in sorted(file for file in (copy / "activations").rglob("*") if file.is_file()):
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes(b ^ 0x55 for b in content[middle : middle + 1]) + content[middle + 1 :]
        file.write_bytes(content[:middle] if how == "half" else flipped)
        try:
            assert_same(load(copy).params, EXAMPLE)
        except JaxqError as error:
            assert "\n" not in str(error) and "activations" in str(error)
            refused_count += 1
        file.write_bytes(content)
    assert refused_count >= 3


# What cannot be stored, and nothing half-written.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Half:
    by: jax.Array

    def __call__(self, x):
        return x * self.by


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (Half(jnp.float32(0.5)), "activation x: a Half cannot be saved, only AffineQuantizer, DynamicQuantizer, "),
        (lambda x: x, "activation x: a function cannot be saved"),
        (Affine(4).abstract(()), "scale of activation x is not an array of numbers but ShapeDtypeStruct"),
        (LogQuantizer(None, 4), "activation x: quantizer 'log' has the arrays scale, not none"),
        (LogQuantizer((jnp.ones(1), jnp.ones(1)), 4), "x: quantizer 'log' has the arrays scale, not scale/0, "),
        (DynamicQuantizer(4, np.True_), "activation x: quantizer 'dynamic' cannot have symmetric"),
    ],
    ids=["class", "function", "abstract", "none", "tuple", "setting"],
)
def test_what_cannot_be_stored_is_refused(quantizer, message, tmp_path):
    with pytest.raises(JaxqError, match=message):
        save(tmp_path / "out", result(jaxq.Activated(PARAMS, {"x": quantizer})))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_after_the_parameters(copy, monkeypatch):
    write = arrays.write

    def fail(directory, found):
        write(directory, found)
        if directory.name == "activations":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arrays, "write", fail)
    quantizers = {"x": AffineQuantizer(jnp.ones(250), jnp.ones(250), 4)}
    with pytest.raises(JaxqError, match=r"No space left on device \(2,400 bytes needed, "):
        save(copy, result(jaxq.Activated({"x": np.ones(50)}, quantizers)), overwrite=True)
    assert leftovers(copy.parent) == []
    assert_same(load(copy).params, EXAMPLE)


# Quantizers of the inputs of weights.


@pytest.mark.parametrize(
    ("base", "batch", "share"), [(None, (), "tensor"), (Uniform(4, 8), (2,), "channel")], ids=["dense", "stack"]
)
def test_a_fractional_quantizer_of_an_input_survives(base, batch, share, tmp_path):
    grid = Affine(4, share)
    w = jax.random.normal(jax.random.key(0), (*batch, 8, 4))
    abstract = grid.abstract((8,), batch)
    quantizer = AffineQuantizer(jnp.full(abstract.scale.shape, 0.3), jnp.full(abstract.zero.shape, 2.25), 4, True)
    leaf = rounded_input(w if base is None else jaxq.rtn(w, base), quantizer, grid)
    save(tmp_path / "out", result({"w": leaf}))
    again = load(tmp_path / "out").params["w"]
    assert_same(again, leaf)
    assert again.quantizer.fractional
    x = jax.random.normal(jax.random.key(1), (*batch, 3, 8))
    matmul = jax.jit(jax.vmap(lambda q, x: q.matmul(x)) if batch else lambda q, x: q.matmul(x))
    np.testing.assert_array_equal(matmul(again, x), matmul(leaf, x))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["schema"] == 2 and manifest["params"]["w"]["quantizer"] == {"fractional": True}


def test_another_axis_of_an_input_survives_and_another_grid_is_refused(tmp_path):
    leaf = rounded_input(jnp.ones((8, 4)), DynamicQuantizer(4, axis=(-2, -1)), Dynamic(4))
    save(tmp_path / "out", result({"w": leaf}))
    assert_same(load(tmp_path / "out").params, {"w": leaf})
    for wrong in (DynamicQuantizer(3), AffineQuantizer(jnp.float32(1), jnp.float32(0), 4), Half(jnp.float32(1))):
        with pytest.raises(JaxqError, match="^w: "):
            save(tmp_path / "no", result({"w": dataclasses.replace(leaf, quantizer=wrong)}))
    for wrong in ({"fractional": True}, "axis", {"axis": 0.5}):
        edit(tmp_path / "out", lambda manifest, wrong=wrong: manifest["params"]["w"].update(quantizer=wrong))
        with pytest.raises(JaxqError, match=r"^w: its format in jaxq\.json cannot be read"):
            load(tmp_path / "out")


# Models.

NAMES = ("cat", "dog", "cow")
CONFIG = VisionConfig(
    "vit", 8, 4, 16, (2,), (2,), classes=3, channels=1, mean=(0.4,), std=(0.3,), crop=1.0, labels=NAMES
)


def some() -> Images:
    rng = np.random.default_rng(1)
    return Images(rng.integers(0, 256, (11, 8, 8, 1)).astype(np.uint8), rng.integers(0, 3, 11), NAMES)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> tuple[Path, vision.VisionModel]:
    """A directory of a model with rounded activations, and the model."""
    model = vision.build(CONFIG, vision.init_params(CONFIG, seed=3, scale=0.5), {"name": "tiny"})
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    quantizers = {
        "query": AffineQuantizer(jnp.full((2, 1, 1), 0.4), jnp.full((2, 1, 1), 3.5), 3, fractional=True),
        "key": DynamicQuantizer(3),
        "probs": ShiftLogQuantizer(jnp.float32(2**-5), jnp.float32(-5), jnp.float32(0.05), 2),
    }
    paths = [name.path for name in jaxq.activations(model.apply, model.params, images)]
    chosen = {p: quantizers[p.split("/")[-1]] for p in paths if p.split("/")[-1] in quantizers}
    assert len(chosen) == 6
    model = model.replace(params=jaxq.Activated(model.params, chosen))
    path = tmp_path_factory.mktemp("vit") / "out"
    save(path, result(model.params), config=CONFIG, source=model.source)
    return path, model


@pytest.fixture(scope="module")
def logits(vit):
    """Of a model on the pictures, and those without any rounding."""
    x, model = jnp.asarray(prepare(some().images, CONFIG)), vit[1]
    rounded = jax.jit(jaxq.quantized(model.apply))
    return lambda params: rounded(params, x), jax.jit(model.apply)(model.params.params, x)


def test_an_image_model_gives_the_same_logits(vit, logits):
    path, model = vit
    again, found = checkpoint.load_model(path)
    assert_same(again.params, model.params)
    assert again.params is found.params and again.config == CONFIG and again.apply is model.apply
    np.testing.assert_array_equal(logits[0](again.params), logits[0](model.params))
    assert np.abs(logits[0](again.params) - logits[1]).max() > 0.1


def test_eval_rounds_the_activations(vit, logits, monkeypatch):
    path, model = vit
    data = some()
    monkeypatch.setitem(image_data.NAMES, "tiny", lambda split, cache: data)
    both = (logits[0](model.params), logits[1])
    right, other = (100 * float(np.mean(np.argmax(x, 1) == data.labels)) for x in both)
    assert right != other
    found = parsed("eval", path, "--metric", "top1", "--data", "tiny")
    assert (found["top1"], found["images"]) == (pytest.approx(right), 11)
    found = parsed("eval", path, "--metric", "top1", "--data", "tiny", "--integer")
    assert found["images"] == 11 and found["integer"]
    # Weights are float here, and no product has two operands on whole uniform grids.
    assert set(found["in_float"]) == set(model.params.activations)


def test_inspect_lists_them(vit, copy):
    path, model = vit
    found = parsed("inspect", path, "--verify")
    listed = {item.pop("path"): item for item in found["activations"]}
    assert list(listed) == list(model.params.activations)
    grid = {"name": "affine", "bits": 3, "fractional": True}
    assert listed["blocks/0/attn/query"] == {"grid": grid, "bits": 3, "bytes": 16}
    assert listed["blocks/1/attn/probs"]["bytes"] == 12 and listed["blocks/1/attn/key"]["bytes"] == 0
    assert found["bytes"] == sum(item["bytes"] for item in found["params"]) + 2 * (16 + 12)
    done = run("inspect", path)
    assert done.exit_code == 0
    assert (
        "6 named activations rounded: 2 to 3-bit per head (fractional), 2 to 3-bit per token, "
        "2 to 2-bit shifted log; their grids take 56 B\n"
    ) in done.stdout
    done = run("inspect", copy)
    for words in ("12 named activations rounded: 1 to 8-bit, ", "per channel (fractional), ", "(official), "):
        assert words in done.stdout
    edit(copy, lambda manifest: manifest["activations"][PROBS].update(quantizer={"name": "cubic"}))
    assert f"activation {PROBS}: unknown quantizer 'cubic'" in refused("inspect", copy)


def test_inspect_without_any(tmp_path):
    save(tmp_path / "out", result(PARAMS))
    assert parsed("inspect", tmp_path / "out")["activations"] == []
    assert "activations" not in run("inspect", tmp_path / "out").stdout


def test_a_language_model_gives_the_same_perplexity(tmp_path):
    model = models.load(write_model(tmp_path / "model"))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    paths = [name.path for name in jaxq.activations(model.apply, model.params, tokens)]
    chosen = {path: DynamicQuantizer(2) for path in paths if path.endswith("query")}
    assert len(chosen) == 1
    params = jaxq.Activated(model.params, chosen)
    save(tmp_path / "out", result(params), config=model.config)
    again, _ = checkpoint.load_model(tmp_path / "out")
    assert_same(again.params, params)
    windows = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 16))
    found, want, other = (
        evaluate.perplexity(again.apply, p, windows)["perplexity"] for p in (again.params, params, model.params)
    )
    assert found == want != other
