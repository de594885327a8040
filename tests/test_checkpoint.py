"""Checkpoints: bit-exact round trips, refusal of everything that differs, nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxq import checkpoint
from jaxq.checkpoint import check_destination, load, read_manifest, save
from jaxq.errors import JaxqError
from jaxq.formats import Layout, Uniform
from jaxq.quantize import Result
from jaxq.report import Report, SiteReport


def filled(abstract, seed: int = 0):
    """Arrays of random bits for ShapeDtypeStructs: any bit pattern must survive, NaN payloads included."""
    rng = np.random.default_rng(seed)

    def draw(x):
        count = int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
        return jnp.asarray(rng.integers(0, 256, count, np.uint8).view(x.dtype).reshape(x.shape))

    return jax.tree.map(draw, abstract)


def quantized(shape=(64, 12), dtype=jnp.float32, layout=None, seed=0, **settings):
    return filled(Uniform(**{"bits": 4, "group_size": 32} | settings).abstract(shape, dtype, layout), seed)


def example():
    return {
        "embed": {"embedding": quantized((16, 50), layout=Layout(perm=(1, 0)), group_size=None, bits=8)},
        "layers": {
            "0": {
                "up": {"kernel": quantized((50, 12), bits=3, group_size=16)},
                "down": {"kernel": quantized((12, 50), jnp.bfloat16, group_size=12, symmetric=True)},
            },
            "stack": {"kernel": quantized((3, 64, 12), bits=2)},
        },
        "norm": {"scale": jnp.arange(7, dtype=jnp.bfloat16), "a.b/c%": np.arange(3)},
    }


def assert_same(a, b):
    """Same structure, static fields, types, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def result(params=None):
    return Result(
        params=example() if params is None else params, report=Report({"name": "gptq"}, [SiteReport("a")])
    )


def leftovers(path: Path) -> list[str]:
    return [name for name in os.listdir(path) if name.startswith(".")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "out"
    save(path, result(), config={"family": "llama"}, source={"name": "tiny"}, baseline={"perplexity": 9.5})
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def edit(path: Path, change) -> None:
    manifest = json.loads((path / "jaxq.json").read_text())
    change(manifest)
    (path / "jaxq.json").write_text(json.dumps(manifest))


def test_round_trip_is_bit_exact(saved):
    again = load(saved)
    assert_same(again.params, example())
    assert again.report.to_dict() == result().report.to_dict()
    assert leftovers(saved.parent) == []


def test_the_manifest_says_what_is_there(saved):
    manifest = read_manifest(saved)
    entry = manifest["params"]["layers/0/up/kernel"]
    assert entry["format"] == {"name": "uniform", **dataclasses.asdict(Uniform(3, 16))}
    assert entry["shape"] == [50, 12] and entry["dtype"] == "float32"
    assert entry["arrays"]["codes"] == {"shape": [5, 12], "dtype": "uint32"}
    assert manifest["params"]["layers/stack/kernel"]["shape"] == [3, 64, 12]
    assert manifest["source"] == {"name": "tiny"} and manifest["baseline"] == {"perplexity": 9.5}
    assert manifest["recipe"] == {"name": "gptq"}
    assert json.loads((saved / "config.json").read_text()) == {"family": "llama"}


@settings(max_examples=12)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([None, "tensor", 1, 8, 13]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["float16", "bfloat16", "float32"]),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    in_size=st.integers(13, 70),
    out_size=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    turned=st.booleans(),
)
def test_every_uniform_array_survives(
    tmp_path_factory, bits, group, symmetric, scale, batch, in_size, out_size, dtype, turned
):
    layout = Layout(perm=(1, 0)) if turned else Layout()
    form = Uniform(bits, group, symmetric, scale)
    params = {"w": filled(form.abstract((*batch, in_size, out_size), dtype, layout))}
    path = tmp_path_factory.mktemp("one") / "out"
    save(path, result(params))
    assert_same(load(path).params, params)


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.float32(3.5),
        np.float64(1 / 3),
        np.arange(4, dtype=np.int64),
        jnp.zeros((0, 3)),
        np.zeros((2, 0), np.float64),
        jnp.array([True, False]),
        np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3).T,
        jnp.arange(-4, 4, dtype=jnp.int4),
        jnp.arange(5, dtype=jnp.float8_e4m3fn),
    ],
    ids=lambda leaf: f"{leaf.dtype}{list(leaf.shape)}",
)
def test_plain_leaves_keep_dtype_and_bits(leaf, tmp_path):
    save(tmp_path / "out", result({"x": leaf, "y": np.ones(1, np.float32)}))
    again = load(tmp_path / "out").params["x"]
    assert again.dtype == leaf.dtype and again.shape == leaf.shape
    assert np.asarray(again).tobytes() == np.asarray(leaf).tobytes()


def test_a_bare_leaf_and_odd_names(tmp_path):
    bare = quantized()
    save(tmp_path / "bare", result(bare))
    assert_same(load(tmp_path / "bare").params, bare)
    odd = {"": {".": jnp.ones(1), "%": jnp.ones(2), "mlp/~/linear_0": {"w": jnp.ones(3)}}, "é ü": jnp.ones(4)}
    save(tmp_path / "odd", result(odd))
    assert_same(load(tmp_path / "odd").params, odd)


class Lazy:
    """Stands for a weight that is still in its file."""

    shape, dtype = (3,), np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
        return np.arange(3, dtype=np.float32)


def test_a_leaf_that_is_still_in_its_file(tmp_path):
    save(tmp_path / "out", result({"x": Lazy()}))
    assert load(tmp_path / "out").params["x"].tolist() == [0, 1, 2]


def test_like_restores_the_structure(tmp_path):
    params = {"blocks": [(quantized(seed=1), jnp.ones(2)), (quantized(seed=2), jnp.zeros(2))], "none": None}
    save(tmp_path / "out", result(params))
    flat = load(tmp_path / "out").params
    assert sorted(flat["blocks"]) == ["0", "1"]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert_same(load(tmp_path / "out", like=abstract).params, params)
    dense = jax.eval_shape(lambda: {"blocks": [(0, 0), (0, 0)], "none": None})
    assert_same(load(tmp_path / "out", like=dense).params, params)


def test_like_with_other_paths_is_refused(saved):
    with pytest.raises(JaxqError, match=r"the saved directory has no parameter extra"):
        load(saved, like=example() | {"extra": 1})
    with pytest.raises(JaxqError, match=r"the given tree has no parameter embed/embedding"):
        load(saved, like={"norm": example()["norm"], "layers": example()["layers"]})


def test_restores_onto_shards(tmp_path):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": quantized((1024, 16)), "b": jnp.arange(16.0), "rest": jnp.ones(3)}
    save(tmp_path / "out", result(params))

    def choose(path, leaf):
        return {
            "w": NamedSharding(mesh, PartitionSpec("model", None)),
            "b": NamedSharding(mesh, PartitionSpec("model")),
        }.get(path)

    again = load(tmp_path / "out", shardings=choose).params
    assert_same(again, params)
    assert again["w"].codes.sharding.spec == PartitionSpec("model", None)
    assert again["w"].codes.addressable_shards[0].data.shape == (32, 16)
    assert len(again["b"].sharding.device_set) == 4 and len(again["rest"].sharding.device_set) == 1
    save(tmp_path / "again", result(again))
    assert_same(load(tmp_path / "again").params, params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "no parameters"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "two parameters have the path a/b"),
        ({"x": "text", "y": object()}, "x is not an array|y is not an array"),
        ({"key": jax.random.key(0)}, "key is not an array"),
    ],
    ids=["empty", "same path", "objects", "random key"],
)
def test_what_cannot_be_stored_is_refused(params, message, tmp_path):
    with pytest.raises(JaxqError, match=message):
        save(tmp_path / "out", result(params))
    assert os.listdir(tmp_path) == []


def test_a_leaf_that_its_format_does_not_describe_is_refused(tmp_path):
    wrong = dataclasses.replace(quantized(), pad=quantized().pad + 8)
    with pytest.raises(JaxqError, match="^w: "):
        save(tmp_path / "out", result({"w": wrong}))


# What differs from the manifest is refused.


def test_a_directory_without_manifest_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(JaxqError, match="is not a jaxq directory"):
            load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ("[1]", "damaged"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": "x"}', "damaged"),
        ('{"schema": 1, "params": {"a": 3}}', "damaged"),
        ('{"schema": 1, "params": {"a": {"key": ["b"]}}}', "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(content, message, copy):
    (copy / "jaxq.json").write_text(content)
    with pytest.raises(JaxqError, match=message):
        load(copy)


def test_a_cut_manifest_is_refused(copy):
    text = (copy / "jaxq.json").read_bytes()
    for part in (1, len(text) // 3, len(text) // 2, len(text) - 3):
        (copy / "jaxq.json").write_bytes(text[:part])
        with pytest.raises(JaxqError, match="damaged"):
            load(copy)


def test_a_newer_schema_is_refused(copy):
    edit(copy, lambda manifest: manifest.update(schema=99, jaxq="9.9"))
    with pytest.raises(JaxqError, match=r"written by jaxq 9\.9 with schema 99.*upgrade"):
        load(copy)


UP = "layers/0/up/kernel"


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 4},
        {"bits": 2},
        {"group_size": 17},
        {"group_size": None},
        {"group_size": "tensor"},
        {"symmetric": True},
        {"scale_dtype": "float32"},
        {"scale_dtype": "bfloat16"},
        {"bits": 99},
        {"name": "unknown"},
        {"extra": 1},
    ],
    ids=str,
)
def test_another_format_is_refused(change, copy):
    edit(copy, lambda manifest: manifest["params"][UP]["format"].update(change))
    with pytest.raises(JaxqError, match=f"{UP}: "):
        load(copy)


def test_another_format_that_fits_its_own_manifest_is_refused(copy):
    other = Uniform(2, 16).abstract((50, 12))

    def change(manifest):
        entry = manifest["params"][UP]
        entry["format"]["bits"] = 2
        entry["arrays"] = {
            name: {"shape": getattr(other, name).shape, "dtype": getattr(other, name).dtype.name}
            for name in entry["arrays"]
        }

    edit(copy, change)
    with pytest.raises(JaxqError, match=rf"{UP}/codes should be \[4, 12\] uint32 but is \[5, 12\] uint32"):
        load(copy)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (UP, {"dtype": "bfloat16"}),
        (UP, {"shape": [12, 50]}),
        (UP, {"layout": {"in_tail": [], "out_tail": [], "perm": [1, 0]}, "shape": [12, 50]}),
        (UP, {"layout": {"in_tail": [2], "out_tail": [], "perm": [0, 1, 2]}, "shape": [25, 2, 12]}),
        (UP, {"matrix_shape": [49, 12], "shape": [49, 12]}),
        (UP, {"matrix_shape": None}),
        (UP, {"format": None}),
        (UP, {"layout": {"inner": 1}}),
        ("norm/scale", {"dtype": "float16"}),
        ("norm/scale", {"shape": [7, 1], "arrays": {"": {"shape": [7, 1], "dtype": "bfloat16"}}}),
        ("norm/scale", {"arrays": {"": {"shape": [7], "dtype": "float32"}}}),
    ],
    ids=str,
)
def test_another_description_is_refused(path, change, copy):
    edit(copy, lambda manifest: manifest["params"][path].update(change))
    with pytest.raises(JaxqError):
        load(copy)


def test_arrays_and_manifest_must_list_the_same_paths(copy):
    edit(copy, lambda manifest: manifest["params"].pop(UP))
    with pytest.raises(JaxqError, match=r"layers/0/up/kernel/codes should be absent but is \[5, 12\] uint32"):
        load(copy)


def test_a_missing_array_is_refused(copy):
    def add(manifest):
        manifest["params"]["norm/bias"] = manifest["params"]["norm/scale"] | {"key": ["norm", "bias"]}

    edit(copy, add)
    with pytest.raises(JaxqError, match=r"norm/bias should be \[7\] bfloat16 but is absent"):
        load(copy)


def test_arrays_of_another_directory_are_refused(copy, tmp_path):
    other = example()
    other["norm"]["scale"] = other["norm"]["scale"] + 1
    save(tmp_path / "other", result(other))
    shutil.rmtree(copy / "params")
    shutil.copytree(tmp_path / "other" / "params", copy / "params")
    with pytest.raises(JaxqError, match="norm/scale is damaged: its checksum differs"):
        load(copy)
    assert_same(load(copy, verify=False).params, other)


def damaged_files(path: Path):
    return sorted(file for file in (path / "params").rglob("*") if file.is_file())


# A read that TensorStore gives up may complain from a thread of its own, later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["missing", "empty", "half", "flipped"])
def test_damaged_array_files_never_give_other_values(how, copy):
    refused = 0
    for file in damaged_files(copy):
        content = file.read_bytes()
        if how == "missing":
            file.unlink()
        elif how == "flipped":
            middle = len(content) // 2
            file.write_bytes(
                content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :] if content else b""
            )
        else:
            file.write_bytes(b"" if how == "empty" else content[: len(content) // 2])
        try:
            assert_same(load(copy).params, example())
        except JaxqError as error:
            assert "\n" not in str(error)
            refused += 1
        file.write_bytes(content)
    assert refused >= 3
    assert_same(load(copy).params, example())


def test_missing_params_are_refused(copy):
    shutil.rmtree(copy / "params")
    with pytest.raises(JaxqError, match="cannot be read"):
        load(copy)


# Whole or not at all.


def test_an_existing_path_is_refused(copy):
    with pytest.raises(JaxqError, match="exists.*overwrite"):
        save(copy, result({"x": np.ones(1)}))
    assert_same(load(copy).params, example())


def test_overwrite_replaces_a_jaxq_directory(copy):
    (copy / "stale.txt").write_text("from before")
    save(copy, result({"x": np.ones(1, np.float32)}), overwrite=True, files={"report.html": "<p>"})
    assert list(load(copy).params) == ["x"]
    assert sorted(os.listdir(copy)) == ["jaxq.json", "params", "report.html"]
    assert leftovers(copy.parent) == []


def test_overwrite_never_deletes_what_jaxq_did_not_write(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    check_destination(home, overwrite=True)
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for path, message in ((home, "holds no jaxq.json"), (tmp_path / "file", "is a file")):
        with pytest.raises(JaxqError, match=message):
            check_destination(path, overwrite=True)


def test_check_destination(tmp_path, copy):
    assert check_destination(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert check_destination(copy, overwrite=True) == copy
    (tmp_path / "file").write_text("x")
    with pytest.raises(JaxqError, match="not a directory"):
        check_destination(tmp_path / "file" / "out")
    with pytest.raises(JaxqError, match=r"needs 1,000,000,000,000,000,000 bytes and [\d,]+ are free"):
        check_destination(tmp_path / "new", needed=10**18)


def test_parents_are_made(tmp_path):
    save(tmp_path / "a" / "b", result())
    assert_same(load(tmp_path / "a" / "b").params, example())


def test_a_link_to_a_directory_is_followed(copy, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(copy)
    save(link, result({"x": np.ones(1, np.float32)}), overwrite=True)
    assert link.is_symlink() and list(load(copy).params) == ["x"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("step", ["arrays", "tokenizer", "manifest", "flush", "first rename", "last rename"])
def test_a_failure_at_any_step_leaves_what_was_there(step, error, copy, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    class Tokenizer:
        def save_pretrained(self, path):
            Path(path, "tokenizer.json").write_text("{}")
            if step == "tokenizer":
                raise error

    if step == "arrays":
        monkeypatch.setattr(checkpoint.store.disk, "write", fail)
    elif step == "manifest":
        monkeypatch.setattr(checkpoint.store, "_manifest", fail)
    elif step == "flush":
        monkeypatch.setattr(checkpoint.directory, "_flush", fail)
    elif "rename" in step:
        rename, calls = os.rename, []

        def failing(source, target):
            if Path(source).name.endswith(".old"):
                return rename(source, target)
            calls.append(source)
            return fail() if len(calls) == (1 if step == "first rename" else 2) else rename(source, target)

        # Orbax renames too: only the calls of the directory module count.
        monkeypatch.setattr(
            checkpoint.directory.os,
            "rename",
            lambda a, b: failing(a, b) if str(copy.parent) == str(Path(b).parent) else rename(a, b),
        )
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else JaxqError
    with pytest.raises(expected) as caught:
        save(copy, result({"x": np.ones(1000)}), tokenizer=Tokenizer(), overwrite=True)
    monkeypatch.undo()
    if expected is JaxqError:
        assert "No space left on device (8,000 bytes needed, " in str(caught.value)
    assert leftovers(copy.parent) == []
    assert_same(load(copy).params, example())


FULL_DISK = """
import os, resource, sys
import numpy as np
from jaxq.checkpoint import load, save
from jaxq.errors import JaxqError
from jaxq.quantize import Result
from jaxq.report import Report

path, limit = sys.argv[1], int(sys.argv[2])
save(path, Result({"x": np.arange(5)}, Report()))
rng = np.random.default_rng(0)
big = Result({"w": rng.integers(0, 2**32, 500_000, np.uint32)}, Report())
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for target, overwrite in ((path, True), (path + "-new", False)):
    try:
        save(target, big, overwrite=overwrite)
    except JaxqError as error:
        print(error, file=sys.stderr)
    else:
        sys.exit("a full disk went unnoticed")
assert load(path).params["x"].tolist() == [0, 1, 2, 3, 4]
print(sorted(os.listdir(os.path.dirname(path))))
"""


def run_full_disk(path: Path, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_file_that_may_not_grow_leaves_what_was_there(tmp_path):
    done = run_full_disk(tmp_path / "out", 100_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "['out']"
    assert done.stderr.count("2,000,000 bytes needed") == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = run_full_disk(tmp_path / "out", 0)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("\n")[-2] == "['out']"
        assert done.stderr.count("2,000,000 bytes needed") == 2
        assert "No space left" in done.stderr
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_saving_and_loading_say_nothing(tmp_path, capfd, recwarn):
    save(tmp_path / "out", result())
    load(tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_load_model_needs_a_config(copy):
    edit(copy, lambda manifest: None)
    with pytest.raises(JaxqError, match="not a jaxq model config"):
        checkpoint.load_model(copy)
    (copy / "config.json").write_text("[")
    with pytest.raises(JaxqError, match="cannot be read"):
        checkpoint.load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(JaxqError, match="has no config.json"):
        checkpoint.load_model(copy)
