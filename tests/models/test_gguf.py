"""GGUF files against transformers (torch), the gguf package's own reader, and the model that was written."""

import dataclasses
import struct
from pathlib import Path

import gguf as gguf_package
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_gguf
import tiny_hf
from hypothesis import given
from hypothesis import strategies as st

from jaxq import models
from jaxq.errors import JaxqError
from jaxq.models import ModelConfig, abstract_params, gguf, gguf_file
from jaxq.models.config import Rope
from jaxq.models.gguf_file import File, Tensor

TOKENS = np.random.default_rng(7).integers(3, 97, (2, 24)).astype(np.int32)


def config_of(model_type: str, **changes) -> ModelConfig:
    if model_type == "gemma3_text":
        # Which layers slide is not in a file either: every sixth sees everything.
        changes = {"num_hidden_layers": 7, "layer_types": None, "sliding_window_pattern": 6} | changes
    config = ModelConfig.from_hf(tiny_hf.plain_config(model_type, **changes))
    # What the format does not say and jaxq assumes: no Mistral, queries scaled by the head size.
    family = "llama" if config.family == "mistral" else config.family
    return dataclasses.replace(config, family=family, query_scale=config.head_dim**-0.5)


def params_of(config: ModelConfig) -> dict:
    draws = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: draws.standard_normal(leaf.shape, np.float32), abstract_params(config))


def saved(tmp_path, config, params=None, **how):
    path = tmp_path / "model.gguf"
    tiny_gguf.write(path, config, params_of(config) if params is None else params, **how)
    return path


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_what_was_written_is_read(model_type, tmp_path):
    config = config_of(model_type)
    params = params_of(config)
    model = models.load(saved(tmp_path, config, params))
    assert model.config == config
    if not model_type.startswith("gemma"):
        same(model.params, params)
    else:
        # (scale + 1) - 1 rounds: by at most half a unit in the last place of a number below 4.
        def near(a, b):
            np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-22)

        jax.tree.map(near, model.params, params)


@pytest.mark.parametrize(
    "case",
    [
        "llama-biases",
        "llama-linear",
        "smollm-tied",
        "mistral-window",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3-ropes",
    ],
)
def test_logits_equal_transformers(case, tmp_path):
    torch = pytest.importorskip("torch")
    original = tiny_hf.tiny(case)
    if case.startswith("gemma"):
        # GGUF has no place for another query scale than head_dim ** -0.5.
        for layer in original.model.layers:
            layer.self_attn.scaling = layer.self_attn.head_dim**-0.5
    tiny_hf.save(original, tmp_path)
    same_model = models.load(tmp_path)
    tiny_gguf.write(tmp_path / "m.gguf", same_model.config, same_model.params)
    loaded = models.load(tmp_path / "m.gguf")
    with torch.no_grad():
        expected = original(torch.tensor(TOKENS)).logits.float().numpy()
    logits = np.asarray(jax.jit(loaded.apply)(loaded.params, TOKENS))
    assert np.abs(expected).max() > 0.5
    assert np.abs(logits - expected).max() <= 1e-4


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_weights_equal_those_that_transformers_reads(model_type, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    from jaxq.models.huggingface import checkpoint_name

    config = config_of(model_type)
    path = saved(tmp_path, config, extra=add_tiny_bpe)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    for keys, leaf in jax.tree.leaves_with_path(models.load(path).params):
        name = "/".join(key.key for key in keys)
        expected = theirs[checkpoint_name(config, name)].float().numpy()
        np.testing.assert_array_equal(leaf, expected.T if name.endswith("/kernel") else expected)


@pytest.mark.parametrize("kind", gguf_file.TYPES)
def test_every_type_decodes(kind, tmp_path):
    config = config_of("llama", hidden_size=256, num_hidden_layers=1)
    matrices = {}

    def edit(tensors):
        for name, value in tensors.items():
            if value.ndim == 2 and value.shape[1] == 256:
                matrices[name] = value if kind == "F32" else tiny_gguf.quantized(value, kind)
                if kind == "F16":
                    matrices[name] = value.astype(np.float16)
        return tensors | matrices

    path = saved(tmp_path, config, edit=edit)
    file = gguf_file.read(path)
    assert file.tensors["blk.0.ffn_up.weight"].type == kind
    for name, value in matrices.items():
        expected = tiny_gguf.decoded(value) if isinstance(value, tuple) else value.astype(np.float32)
        np.testing.assert_array_equal(file.values(name), expected)
        assert file.values(name).dtype == np.float32
    up = matrices["blk.0.ffn_up.weight"]
    expected = tiny_gguf.decoded(up) if isinstance(up, tuple) else up.astype(np.float32)
    np.testing.assert_array_equal(models.load(path).params["layers"]["0"]["mlp"]["up"]["kernel"], expected.T)


def test_quantized_matrices_are_near_what_was_quantized(tmp_path):
    config = config_of("llama", hidden_size=256, num_hidden_layers=1)
    params = params_of(config)
    # Half the step of each format, relative to the root mean square of a block of 32 normal numbers.
    for kind, bound in {"Q8_0": 0.006, "Q5_0": 0.05, "Q5_1": 0.04, "Q4_0": 0.1, "Q4_1": 0.09}.items():

        def edit(tensors, kind=kind):
            wide = {name: value for name, value in tensors.items() if value.ndim == 2 and value.shape[1] == 256}
            return tensors | {name: tiny_gguf.quantized(value, kind) for name, value in wide.items()}

        loaded = models.load(saved(tmp_path, config, params, edit=edit)).params
        for name in ("query", "key", "value"):
            ours = loaded["layers"]["0"]["attention"][name]["kernel"]
            exact = params["layers"]["0"]["attention"][name]["kernel"]
            assert 0 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < bound, (kind, name)


def test_big_tensors_are_decoded_piece_by_piece(tmp_path, monkeypatch):
    config = config_of("llama", hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    name = "token_embd.weight"
    path = saved(tmp_path, config, edit=lambda t: t | {name: tiny_gguf.quantized(t[name], "Q8_0")})
    whole = gguf_file.read(path).values(name)
    monkeypatch.setattr(gguf_file, "_DECODE", 640)
    np.testing.assert_array_equal(gguf_file.read(path).values(name), whole)


def test_header_equals_that_of_the_gguf_package(tmp_path):
    path = saved(tmp_path, config_of("gemma3_text"), extra=add_tiny_bpe)
    ours, theirs = gguf_file.read(path), gguf_package.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            found, expected = ours.metadata[name], field.contents()
            whole = isinstance(expected, list)
            assert list(found) == expected if whole else found == pytest.approx(expected)
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    assert all(ours.tensors[t.name].offset == t.data_offset for t in theirs.tensors)


def test_lazy_reads_nothing_until_asked(tmp_path, monkeypatch):
    path = saved(tmp_path, config_of("llama"))
    eager = models.load(path)
    read = []
    values = File.values
    monkeypatch.setattr(File, "values", lambda self, name: read.append(name) or values(self, name))
    model = models.load(path, lazy=True, dtype="bfloat16")
    assert read == []
    leaf = model.params["layers"]["1"]["attention"]["key"]["kernel"]
    assert isinstance(leaf, models.Lazy) and leaf.shape == (32, 16) and leaf.dtype == ml_dtypes.bfloat16
    expected = eager.params["layers"]["1"]["attention"]["key"]["kernel"]
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected.astype(jnp.bfloat16)))
    assert read == ["blk.1.attn_k.weight"]
    assert model.source == eager.source and model.source["bytes"] == path.stat().st_size


@given(heads=st.integers(1, 4), half=st.integers(1, 3), width=st.integers(1, 3))
def test_unpermute_undoes_the_converter(heads, half, width):
    rows = np.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    permuted = rows.reshape(heads, 2, half, width).swapaxes(1, 2).reshape(rows.shape)
    np.testing.assert_array_equal(gguf.unpermute(permuted, heads), rows)
    np.testing.assert_array_equal(gguf.unpermute(permuted[:, 0], heads), rows[:, 0])


def config_from(architecture: str, **metadata) -> ModelConfig:
    """The config of a header alone."""
    base = {
        "embedding_length": 4608,
        "block_count": 2,
        "attention.head_count": 32,
        "feed_forward_length": 64,
        "attention.key_length": 128,
        "attention.value_length": 128,
    }
    meta = {f"{architecture}.{key}": value for key, value in (base | metadata).items()}
    embedding = Tensor("token_embd.weight", (97, 4608), "F32", 0, 0)
    meta["general.architecture"] = architecture
    return gguf.read_config(File(Path("header"), meta, {"token_embd.weight": embedding}))


def test_what_gemma_files_leave_out():
    small, large = config_from("gemma2", block_count=26), config_from("gemma2", block_count=46)
    assert small.query_scale == 128**-0.5 and large.query_scale == 144**-0.5
    assert small.windows[:4] == (4096, None, 4096, None)
    assert (small.attention_softcap, small.logit_softcap, small.local_rope) == (50.0, 30.0, None)
    small, large = config_from("gemma3", block_count=18), config_from("gemma3", block_count=62)
    assert small.query_scale == 128**-0.5 and large.query_scale == 144**-0.5
    assert [i for i, window in enumerate(small.windows) if window is None] == [5, 11, 17]
    assert small.local_rope == Rope(1e4) and small.activation == "gelu_tanh"
    assert small.attention_softcap is None and small.logit_softcap is None
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    scaled = config_from("gemma3", **{"rope.freq_base": 1e6}, **scaling)
    assert scaled.rope == Rope(1e6, "linear", 8.0) and scaled.local_rope == Rope(1e4)


def test_windows_that_a_file_names():
    def windows(pattern):
        keys = {"attention.sliding_window": 7, "attention.sliding_window_pattern": pattern}
        return config_from("gemma3", **keys).windows

    assert windows(np.array([True, False])) == (7, None) and windows(1) == (None, None)
    with pytest.raises(JaxqError, match="names 3 of 2 layers"):
        windows([True] * 3)


def test_numbers_repeated_for_each_layer():
    assert config_from("llama", **{"attention.head_count_kv": np.array([8, 8])}).kv_heads == 8
    with pytest.raises(JaxqError, match="one positive integer"):
        config_from("llama", **{"attention.head_count_kv": np.array([8, 4])})


def test_an_absurd_number_of_layers():
    with pytest.raises(JaxqError, match="claims to have 2147483647 layers"):
        config_from("llama", block_count=2**31 - 1)


def test_llama3_rope_factors(tmp_path):
    config = dataclasses.replace(config_of("llama"), rope=Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192))
    wave = [2 * np.pi * 5e5 ** (i / 8) for i in (0, 2, 4, 6)]
    # As llama.cpp's converter computes them.
    smooth = [min(max((8192 / w - 1) / 3, 0.0), 1.0) for w in wave]
    factors = [1 / ((1 - s) / 32 + s) for s in smooth]
    assert 1 < factors[2] < 32

    def add(tensors):
        return tensors | {"rope_freqs.weight": np.array(factors, np.float32)}

    assert models.load(saved(tmp_path, config, edit=add)).config.rope == config.rope
    factors[1] = 3.0
    with pytest.raises(JaxqError, match="Llama 3.1"):
        models.load(saved(tmp_path, config, edit=add))


# Damage


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(JaxqError, match="magic"):
        models.load(path)
    path.write_bytes(b"")
    with pytest.raises(JaxqError, match="magic"):
        models.load(path)
    with pytest.raises(JaxqError, match="cannot read"):
        models.load(tmp_path / "absent.gguf")


def test_a_file_cut_anywhere_gives_one_clear_error(tmp_path):
    path = saved(tmp_path, config_of("llama", num_hidden_layers=1), extra=add_tiny_bpe)
    data = path.read_bytes()
    end = max(t.offset + t.nbytes for t in gguf_file.read(path).tensors.values())
    header = min(t.offset for t in gguf_file.read(path).tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in [4, 8, 23, 24, *range(25, header, 97), header, header + 1, end - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(JaxqError, match="cut short") as caught:
            models.load(cut, lazy=True)
        assert "\n" not in str(caught.value)


@given(data=st.data())
def test_random_damage_to_the_header_never_escapes_as_another_error(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    good = bytearray(saved(folder, config_of("llama", num_hidden_layers=1)).read_bytes())
    header = min(t.offset for t in gguf_file.read(folder / "model.gguf").tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(4, header - 1))] = data.draw(st.integers(0, 255))
    (folder / "bad.gguf").write_bytes(good)
    try:
        models.load(folder / "bad.gguf", lazy=True)
    except JaxqError as error:
        assert "\n" not in str(error)


def test_versions_and_byte_order(tmp_path):
    path = saved(tmp_path, config_of("llama"))
    data = bytearray(path.read_bytes())
    for version in (struct.pack("<I", 1), struct.pack(">I", 3)):
        data[4:8] = version
        path.write_bytes(data)
        with pytest.raises(JaxqError, match="version|big endian"):
            models.load(path)


def test_unknown_architecture_type_and_tensors(tmp_path):
    config = config_of("llama", num_hidden_layers=1)
    path = saved(tmp_path, config)
    path.write_bytes(path.read_bytes().replace(b"llama", b"lhama"))
    with pytest.raises(JaxqError, match="'lhama' is not supported; jaxq knows llama, qwen2"):
        models.load(path)
    up = "blk.0.ffn_up.weight"
    ternary = np.zeros((48, 54), np.uint8), gguf_package.GGMLQuantizationType.TQ1_0
    for edit, message in [
        (
            lambda t: t | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)},
            "1 tensors .* no place for: 'blk.0.attn_s",
        ),
        (lambda t: {name: value for name, value in t.items() if name != up}, f"lacks the tensor {up}"),
        (lambda t: t | {up: np.ones((48, 31), np.float32)}, f"{up} has shape .*, the metadata asks for"),
        (lambda t: t | {up: ternary}, "type TQ1_0, not supported"),
    ]:
        with pytest.raises(JaxqError, match=message):
            models.load(saved(tmp_path, config, edit=edit))
    for extra, message in [
        (lambda w: w.add_expert_count(4), "mixture of experts"),
        (lambda w: w.add_rope_scaling_type(gguf_package.RopeScalingType.YARN), "rope scaling 'yarn'"),
        (lambda w: w.add_rope_dimension_count(4), "rope.dimension_count is 4"),
    ]:
        with pytest.raises(JaxqError, match=message):
            models.load(saved(tmp_path, config, extra=extra))


def test_abstract_params_need_no_file(tmp_path):
    config = config_of("gemma3_text")
    shapes = jax.tree.map(lambda leaf: leaf.shape, models.load(saved(tmp_path, config), lazy=True).params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))


def add_tiny_bpe(writer) -> None:
    letters = map(chr, range(ord("a"), ord("z") + 1))
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", *(f"x{i}" for i in range(67))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
