"""Tiny random models for tests: of transformers for parity, and checkpoints written without torch."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxq.models import ModelConfig, init_params
from jaxq.models.huggingface import checkpoint_name

TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LOCAL_GLOBAL = {
    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=500.0)
ODD_HEADS = dict(num_attention_heads=3, hidden_size=48, num_key_value_heads=1)
WINDOW = dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
GEMMA = dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=24)

# name -> (config class, settings on top of TINY). Windows are shorter than the 24 tokens of the tests.
CASES = {
    "llama-gqa-llama3": ("LlamaConfig", dict(rope_parameters=LLAMA3)),
    "llama-biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True, head_dim=12)),
    "llama-linear": ("LlamaConfig", dict(rope_parameters=LINEAR)),
    "smollm-tied": ("LlamaConfig", dict(ODD_HEADS, tie_word_embeddings=True)),
    "mistral-window": ("MistralConfig", dict(sliding_window=5)),
    "mistral-full": ("MistralConfig", dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2Config", dict()),
    "qwen2-window": ("Qwen2Config", dict(WINDOW, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "qwen3-window": ("Qwen3Config", dict(WINDOW, head_dim=8, attention_bias=True)),
    "gemma2": ("Gemma2Config", dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=1.5)),
    "gemma3": ("Gemma3TextConfig", dict(GEMMA, layer_types=["sliding_attention", "full_attention"])),
    "gemma3-ropes": (
        "Gemma3TextConfig",
        dict(GEMMA, num_hidden_layers=6, rope_parameters=LOCAL_GLOBAL, final_logit_softcapping=1.0),
    ),
}
MODEL_TYPES = {
    "LlamaConfig": "llama",
    "MistralConfig": "mistral",
    "Qwen2Config": "qwen2",
    "Qwen3Config": "qwen3",
    "Gemma2Config": "gemma2",
    "Gemma3TextConfig": "gemma3_text",
}
FAMILIES = ("llama-gqa-llama3", "mistral-window", "smollm-tied", "qwen2", "qwen3", "gemma2", "gemma3")


def tiny(name: str, seed: int = 0):
    """The transformers model of a case, weights large enough that every part of it matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, changes = CASES[name]
    config = getattr(transformers, kind)(**(TINY | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm scales and biases keep their start (1 or 0), so that the signal neither dies nor grows.
            parameter.copy_(0.25 * torch.randn_like(parameter) + (parameter if parameter.ndim == 1 else 0.0))
    return model


def save(model, path, **how) -> None:
    model.save_pretrained(str(path), safe_serialization=True, **how)


# model_type -> config.json settings on top of TINY, for checkpoints that need no torch.
PLAIN = {
    "llama": {},
    "mistral": dict(sliding_window=5),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=16),
    "gemma2": dict(head_dim=16, sliding_window=6),
    "gemma3_text": dict(head_dim=16, sliding_window=6, sliding_window_pattern=2),
}


def plain_config(model_type: str, **changes) -> dict:
    """A tiny config.json."""
    return TINY | dict(model_type=model_type) | PLAIN[model_type] | changes


def write(path: Path, hf: dict, seed: int = 0, edit=lambda tensors: tensors) -> dict:
    """Writes config.json and random model.safetensors; gives the parameters. edit: tensors -> tensors."""
    config = ModelConfig.from_hf(hf)
    params = init_params(config, seed)
    tensors = {}
    for keys, leaf in jax.tree.leaves_with_path(params):
        name = "/".join(key.key for key in keys)
        value = np.asarray(leaf)
        tensors[checkpoint_name(config, name)] = np.ascontiguousarray(
            value.T if name.endswith("kernel") else value
        )
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf))
    save_file(edit(tensors), path / "model.safetensors")
    return params
