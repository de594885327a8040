"""Hugging Face directories: storage types, shards, tokenizers, and every kind of damage."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_hf
from safetensors.numpy import load_file, save_file

from jaxq import models
from jaxq.errors import JaxqError
from jaxq.models import huggingface

TOKENS = np.random.default_rng(5).integers(3, 80, (2, 12))
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def llama(tmp_path):
    """A good tiny Llama directory to be damaged."""
    tiny_hf.write(tmp_path / "m", tiny_hf.plain_config("llama"))
    return tmp_path / "m"


def shard(path) -> list[str]:
    """Splits model.safetensors in two files with an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, path / file)
    (path / "model.safetensors").unlink()
    weight_map = {name: file for file, some in files.items() for name in some}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return list(files)


def fails(path, message, **how):
    with pytest.raises(JaxqError, match=message) as error:
        models.load(path, **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["llama-gqa-llama3", "gemma3"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_sharded_checkpoints_of_transformers(case, stored, tmp_path):
    torch = pytest.importorskip("torch")
    original = tiny_hf.tiny(case).to(getattr(torch, stored))
    tiny_hf.save(original, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = models.load(tmp_path)
    with torch.no_grad():
        # Read again: .float() on a model in 16 bits would keep its rounded buffers.
        full = type(original).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
        expected = full(torch.tensor(TOKENS)).logits.numpy()
    logits = jax.jit(model.apply)(model.params, jnp.asarray(TOKENS))
    assert np.abs(np.asarray(logits) - expected).max() <= 1e-4


def test_text_model_of_an_image_text_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = tiny_hf.TINY | dict(head_dim=8, sliding_window=4)
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    ids = dict(image_token_index=90, boi_token_index=91, eoi_token_index=92, mm_tokens_per_image=4)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)
    config._attn_implementation = "eager"
    original = transformers.Gemma3ForConditionalGeneration(config).eval()
    tiny_hf.save(original, tmp_path)
    model = models.load(tmp_path)
    with torch.no_grad():
        expected = original(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(np.asarray(jax.jit(model.apply)(model.params, jnp.asarray(TOKENS))) - expected).max() <= 1e-4


def test_bfloat16_is_read_bit_for_bit(tmp_path):
    def rounded(tensors):
        return {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}

    written = tiny_hf.write(tmp_path, tiny_hf.plain_config("qwen2"), edit=rounded)
    for dtype in ("bfloat16", None):
        params = models.load(tmp_path, dtype=dtype).params
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(written), strict=True):
            assert a.dtype == (dtype or "float32")
            np.testing.assert_array_equal(
                np.float32(a), np.asarray(b).astype(ml_dtypes.bfloat16).astype(np.float32)
            )


def test_sharded_equals_whole_and_fingerprints_tell_them_apart(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "split")
    shard(tmp_path / "split")
    whole, split = models.load(llama), models.load(tmp_path / "split")
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, split.params))
    assert whole.source == models.load(llama, lazy=True).source
    assert whole.source["kind"] == "huggingface" and whole.source["name"] == "m"
    assert whole.source["header_sha256"] != split.source["header_sha256"]
    json.dumps(whole.source)


def test_harmless_extra_tensors_are_ignored(tmp_path):
    def add(tensors):
        embed = tensors["model.embed_tokens.weight"]
        return tensors | {
            "lm_head.weight": embed,
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        }

    tiny_hf.write(tmp_path, tiny_hf.plain_config("llama", tie_word_embeddings=True), edit=add)
    assert "head" not in models.load(tmp_path).params


def test_end_tokens_of_generation_config(llama):
    assert models.load(llama).config.eos == (2,)
    (llama / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert models.load(llama).config.eos == (2, 5)


def test_tokenizer_is_read_late_and_from_local_files_only(llama):
    tokenizers = pytest.importorskip("tokenizers")
    assert models.load(llama).tokenizer is None
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "hello": 5}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(llama / "tokenizer.json"))
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    model = models.load(llama)
    assert model.tokenizer("hello there")["input_ids"] == [5, 0]
    assert model.tokenizer is model.tokenizer
    (llama / "tokenizer.json").write_text("{")
    broken = models.load(llama)
    with pytest.raises(JaxqError, match="tokenizer cannot be read"):
        _ = broken.tokenizer


def test_missing_config(tmp_path):
    fails(tmp_path, r"config\.json is missing")


def test_broken_config(llama):
    for text in ("{", "[]"):
        (llama / "config.json").write_text(text)
        fails(llama, r"config\.json")


def test_no_safetensors(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    fails(llama, "neither model.safetensors nor .* not read")


def test_missing_shard(llama):
    _, second = shard(llama)
    (llama / second).unlink()
    for lazy in (False, True):
        fails(llama, f"{second}: this shard is missing", lazy=lazy)


@pytest.mark.parametrize("lost", [1, 1000])
def test_truncated_shard(llama, lost):
    _, second = shard(llama)
    data = (llama / second).read_bytes()
    (llama / second).write_bytes(data[:-lost])
    for lazy in (False, True):
        fails(llama, f"{second}: truncated, {len(data) - lost} of {len(data)} bytes", lazy=lazy)


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_cut_in_the_header(llama, size):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    fails(llama, "cut short in its header|broken safetensors header")


def test_damaged_files(llama):
    file = llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + b"x")
    fails(llama, "1 bytes after the last tensor")
    file.write_bytes(data[:8] + b"\xff" + data[9:])
    fails(llama, "broken safetensors header")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header[Q0]["shape"] = [32, 31]
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + int.from_bytes(data[:8], "little") :])
    fails(llama, r"q_proj.*\(32, 31\).*does not take")


def test_wrong_shape_names_both(tmp_path):
    tiny_hf.write(tmp_path, tiny_hf.plain_config("llama"), edit=lambda t: t | {Q0: t[Q0][:, :31].copy()})
    fails(tmp_path, r"q_proj.weight has shape \(32, 31\), but config.json asks for \(32, 32\)")


def test_missing_and_unknown_tensors(tmp_path):
    tiny_hf.write(tmp_path, tiny_hf.plain_config("llama"), edit=lambda t: {k: v for k, v in t.items() if k != Q0})
    fails(tmp_path, f"lacks {Q0}.*layers/0/attention/query/kernel")
    tiny_hf.write(
        tmp_path, tiny_hf.plain_config("llama"), edit=lambda t: t | {"model.extra": np.ones(3, np.float32)}
    )
    fails(tmp_path, "1 tensors that llama has no place for: model.extra")


def test_unread_storage_types(tmp_path):
    tiny_hf.write(tmp_path, tiny_hf.plain_config("llama"), edit=lambda t: t | {Q0: t[Q0].astype(np.int8)})
    fails(tmp_path, "stored as I8; only BF16, F16, F32, F64")


def test_broken_index(llama):
    shard(llama)
    index = llama / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"ghost": "model-00001-of-00002.safetensors"}}))
    fails(llama, "ghost should be in model-00001")
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    fails(llama, "outside the directory")
    index.write_text("{}")
    fails(llama, "no weight_map")


def test_unsupported_type_and_dtype(llama):
    fails(llama, "float32 or bfloat16, not int8", dtype="int8")
    fails(llama, "float32 or bfloat16, not nonsense", dtype="nonsense")
    (llama / "config.json").write_text(json.dumps(tiny_hf.TINY | {"model_type": "bert"}))
    fails(llama, "'bert' is not supported")


def test_a_quantized_directory_points_to_its_loader(llama):
    (llama / "jaxq.json").write_text("{}")
    fails(llama, "jaxq.load")


def test_every_parameter_has_one_checkpoint_name():
    for model_type in tiny_hf.PLAIN:
        config = models.ModelConfig.from_hf(tiny_hf.plain_config(model_type))
        paths = jax.tree.leaves_with_path(models.abstract_params(config))
        names = [huggingface.checkpoint_name(config, "/".join(key.key for key in keys)) for keys, _ in paths]
        assert len(set(names)) == len(names)
