"""Whole SqueezeLLM checkpoints: read as PyTorch and as safetensors, run, refused, and imported by the command."""

import json
import os
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import packer
import pytest
from safetensors.numpy import load_file, save_file

import jaxq
from jaxq.errors import JaxqError
from jaxq.interop import squeezellm
from tests.models import tiny_hf
from tests.test_cli import TEXT, parsed, refused, run, write_model

TOKENS = np.arange(24).reshape(2, 12) % 97


def packed(source: Path, bits=3, share=0.02) -> tuple[dict, dict]:
    """(a checkpoint's tensors, the weights that they stand for) of a float directory; the rest in float16."""
    rng = np.random.default_rng(0)
    tensors, weights = {}, {}
    for name, value in load_file(source / "model.safetensors").items():
        if not name.startswith("model.layers.") or not name.endswith("_proj.weight"):
            tensors[name] = weights[name] = value.astype(np.float16)
            continue
        made, weights[name] = packer.layer(np.round(value * 4096) / 4096, bits, share, rng)
        tensors |= {name.replace("weight", part): x for part, x in made.items()}
        # The loader of the packer adds these; one layer has them here.
        if "q_proj" in name:
            tensors[name.replace("weight", "full_rows")] = np.zeros((value.shape[1], 10), np.float32)
            tensors[name.replace("weight", "full_row_indices")] = np.zeros(10, np.int32)
            tensors[name.replace("weight", "startrows")] = np.zeros(128, np.int32)
    return tensors, weights


def write_pt(path: Path, tensors: dict) -> Path:
    """As the packer saves it: a state dict with numbers of entries among the tensors."""
    torch = pytest.importorskip("torch")
    state = OrderedDict((name, torch.from_numpy(value)) for name, value in tensors.items())
    state._metadata = OrderedDict({"": {"version": 1}})  # pyright: ignore[reportAttributeAccessIssue]
    for name in tensors:
        if name.endswith(".vals"):
            state["sparse_threshold." + name.removesuffix(".vals")] = len(tensors[name])
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A float Llama with biases, the same packed, and what its weights became."""
    path = tmp_path_factory.mktemp("squeezellm")
    tiny_hf.write(path / "float", tiny_hf.plain_config("llama", intermediate_size=64, attention_bias=True))
    tensors, weights = packed(path / "float")
    save_file(tensors, path / "packed.safetensors")
    (path / "whole").mkdir()
    save_file(
        {name: value.astype(np.float32) for name, value in weights.items()}, path / "whole/model.safetensors"
    )
    (path / "whole/config.json").write_text((path / "float/config.json").read_text())
    # Of the float model, import needs the config alone.
    (path / "float/model.safetensors").unlink()
    return path


@pytest.fixture(scope="module")
def loaded(place):
    return squeezellm.load(place / "packed.safetensors", place / "float")


def test_the_model_is_the_one_that_was_packed(place, loaded):
    model, result = loaded
    expected = jaxq.models.load(place / "whole")
    dense = jax.jit(jaxq.dequantize)(model.params)
    assert jax.tree.structure(dense) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, dense, expected.params)
    logits = jax.jit(jaxq.quantized(model.apply))(model.params, TOKENS)
    np.testing.assert_allclose(logits, jax.jit(expected.apply)(expected.params, TOKENS), atol=2e-5)
    assert result.params is model.params and model.tokenizer is None
    assert model.source == {"kind": "squeezellm", "name": "packed.safetensors", "model": "float"}


def test_the_report(loaded):
    model, result = loaded
    rows = {row.path: row for row in result.report.rows}
    assert len(rows) == 2 * 7 + 2 and result.report.recipe["name"] == "imported"
    up, embed = rows["layers/1/mlp/up/kernel"], rows["embed/embedding"]
    assert up.shape == (32, 64) and up.bytes_before == 2 * 32 * 64 and up.quantized
    assert up.format.startswith("codebook 3-bit + ") and up.format.endswith("% sparse")
    assert up.bytes_after == model.params["layers"]["1"]["mlp"]["up"]["kernel"].nbytes
    assert up.bits_per_weight == 8 * up.bytes_after / (32 * 64)
    assert embed.kind == "embedding" and embed.format == "dense" and embed.bytes_before == embed.bytes_after
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert result.report.bytes_after == everything


def test_every_kind_of_file_gives_the_same(place, loaded, tmp_path):
    tensors = load_file(place / "packed.safetensors")
    sources = [write_pt(tmp_path / "packed.pt", tensors), tmp_path / "directory"]
    sources[1].mkdir()
    save_file(tensors, sources[1] / "model.safetensors")
    for source in sources:
        model, _ = squeezellm.load(source, place / "float")
        assert jax.tree.structure(model.params) == jax.tree.structure(loaded[0].params)
        jax.tree.map(np.testing.assert_array_equal, model.params, loaded[0].params)


def test_dtype(place):
    model, _ = squeezellm.load(place / "packed.safetensors", place / "float", dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(model.params, is_leaf=jaxq.is_quantized)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    with pytest.raises(JaxqError, match="float32 or bfloat16"):
        squeezellm.load(place / "packed.safetensors", place / "float", dtype="int8")


def test_a_config_that_says_so_is_read(place, tmp_path):
    config = json.loads((place / "float/config.json").read_text())
    config["quantization_config"] = {"quant_method": "squeezellm", "wbits": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    squeezellm.load(place / "packed.safetensors", tmp_path)


Q = "model.layers.0.self_attn.q_proj."
EMBED = "model.embed_tokens."


def without(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def adding(**named):
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in named.items()}


def editing(name, edit):
    return lambda tensors: tensors | {name: np.ascontiguousarray(edit(tensors[name]))}


def only_dense(tensors):
    return {name: value for name, value in tensors.items() if name.endswith("norm.weight")}


REFUSED = {
    "no table": (without(Q + "lookup_table"), "self_attn.q_proj: a tensor is missing: lookup_table"),
    "no codes": (without(Q + "qweight"), "lacks model.layers.0.self_attn.q_proj.weight"),
    "half an overlay": (without(Q + "rows"), "self_attn.q_proj: a tensor is missing: rows"),
    "no norm": (without("model.norm.weight"), "lacks model.norm.weight"),
    "no bias": (without(Q + "bias"), "lacks model.layers.0.self_attn.q_proj.bias"),
    "unknown": (adding(model__extra=np.zeros(3, np.float32)), "no place for: model.extra"),
    "another layer": (editing("model.layers.9.x", lambda _: np.zeros(1, np.int32)), "no place for"),
    "both": (
        adding(**{Q.replace(".", "__") + "weight": np.zeros((32, 32), np.float32)}),
        "both a weight and a qwe",
    ),
    "nothing quantized": (only_dense, "holds no qweight"),
    "outputs": (
        lambda t: editing(Q + "qweight", lambda x: x[:, :16])(editing(Q + "lookup_table", lambda x: x[:16])(t)),
        r"q_proj.weight has shape \(16, 32\), but config.json asks for \(32, 32\)",
    ),
    "table": (
        editing(Q + "lookup_table", lambda x: x[:16]),
        "q_proj: qweight has 32 outputs, but lookup_table 16",
    ),
    "axes": (editing(Q + "qweight", lambda x: x[0]), "not two matrices that fit"),
    "dtype": (editing(Q + "qweight", lambda x: x.astype(np.int16)), "q_proj.qweight is stored as I16"),
    "float codes": (editing(Q + "qweight", lambda x: x.astype(np.float32)), "q_proj: qweight is float32"),
    "nan": (editing(Q + "vals", lambda x: x * np.nan), "q_proj: vals holds values that are not finite"),
    "integers": (editing("model.norm.weight", lambda x: x.astype(np.int32)), "norm.weight is stored as I32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(place, tmp_path, case):
    edit, message = REFUSED[case]
    tensors = load_file(place / "packed.safetensors")
    if case == "another layer":
        tensors["model.layers.9.x"] = np.zeros(1)
    save_file(edit(tensors), tmp_path / "x.safetensors")
    with pytest.raises(JaxqError, match=message) as caught:
        squeezellm.load(tmp_path / "x.safetensors", place / "float")
    assert "\n" not in str(caught.value)


def test_codes_where_no_linear_layer_is(place, tmp_path):
    config = tiny_hf.plain_config("llama", intermediate_size=64, attention_bias=True, vocab_size=96)
    tiny_hf.write(tmp_path / "float", config | {"tie_word_embeddings": True})
    tensors, _ = packed(tmp_path / "float")
    made, _ = packer.layer(np.round(tensors[EMBED + "weight"] * 4096) / 4096, 3, 0.0, np.random.default_rng(0))
    file = tmp_path / "x.safetensors"
    save_file(without(EMBED + "weight")(tensors) | {EMBED + part: x for part, x in made.items()}, file)
    with pytest.raises(JaxqError, match="model.embed_tokens has codes, but it is no linear layer"):
        squeezellm.load(file, tmp_path / "float")
    save_file(tensors | {f"lm_head.{part}": x for part, x in made.items()}, file)
    with pytest.raises(JaxqError, match="lm_head: llama has no place for these codes"):
        squeezellm.load(file, tmp_path / "float")
    # A tied model may well carry its head once more.
    save_file(tensors | {"lm_head.weight": tensors[EMBED + "weight"]}, file)
    squeezellm.load(file, tmp_path / "float")


def test_files_that_are_no_checkpoint(place, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    with pytest.raises(JaxqError, match="model is no tensor but dict; save model.state_dict"):
        squeezellm.load(tmp_path / "x.pt", place / "float")
    with pytest.raises(JaxqError, match="config.json is missing"):
        squeezellm.load(place / "packed.safetensors", tmp_path)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A float model with a tokenizer, and a packed checkpoint of it."""
    path = tmp_path_factory.mktemp("import")
    write_model(path / "model")
    write_pt(path / "packed.pt", packed(path / "model", bits=4)[0])
    (path / "text.txt").write_text(TEXT)
    return path


def test_the_command(shop):
    out = shop / "out"
    found = parsed("import", shop / "packed.pt", out, "--model", shop / "model")
    assert found["out"] == str(out) and found["recipe"]["name"] == "imported" and len(found["sites"]) == 9
    assert {"params", "jaxq.json", "config.json", "tokenizer.json"} <= set(os.listdir(out))
    seen = parsed("inspect", out, "--verify")
    up = next(item for item in seen["params"] if item["path"] == "layers/0/mlp/up/kernel")
    assert up["format"]["name"] == "dense_sparse" and up["format"]["base"]["bits"] == 4
    assert seen["source"]["name"] == "packed.pt" and seen["bits_per_weight"] == found["bits_per_weight"]
    scored = parsed("eval", out, "--data", shop / "text.txt", "--windows", "3", "--seq-len", "32")
    model, _ = squeezellm.load(shop / "packed.pt", shop / "model")
    windows = jaxq.evaluate.windows(TEXT, model.tokenizer, 32, 3)
    expected = jaxq.evaluate.perplexity(model.apply, jax.jit(jaxq.dequantize)(model.params), windows)
    assert scored["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert "exists" in refused("import", shop / "packed.pt", out, "--model", shop / "model")
    done = run("import", shop / "packed.pt", out, "--model", shop / "model", "--overwrite")
    assert done.exit_code == 0 and "mlp/up" in done.stdout and f"written to {out}" in done.stdout


def test_the_command_refuses_and_leaves_nothing(shop, tmp_path):
    out, model = tmp_path / "out", shop / "model"
    assert "no zip archive" in refused("import", shop / "text.txt", out, "--model", model)
    assert "No such file" in refused("import", tmp_path / "none.pt", out, "--model", model)
    assert "config.json is missing" in refused("import", shop / "packed.pt", out, "--model", tmp_path)
    assert "holds no qweight" in refused("import", model, out, "--model", model)
    assert "--model" in refused("import", shop / "packed.pt", out)
    (tmp_path / "cut.pt").write_bytes((shop / "packed.pt").read_bytes()[:5000])
    assert "cut short" in refused("import", tmp_path / "cut.pt", out, "--model", model)
    assert os.listdir(tmp_path) == ["cut.pt"]


def test_the_command_has_help_with_examples():
    done = run("import", "--help")
    assert done.exit_code == 0 and "Examples" in done.stdout and "$ jaxq import" in done.stdout
