"""Loads a GGUF file: config and tokenizer from its metadata, parameters from its tensors.

Two things differ from a Hugging Face checkpoint: the rows of query and key projections of the "llama"
architecture are reordered for interleaved rotary embedding, and Gemma's norms hold 1 + scale. Linear weights
are (out, in), as there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.errors import JaxqError
from jaxq.models import gguf_file, gguf_tokenizer
from jaxq.models.config import ModelConfig, Rope
from jaxq.models.huggingface import param_dtype
from jaxq.models.lazy import Lazy
from jaxq.models.model import Later, Model, abstract_params, build

# GGUF architecture -> jaxq family. Mistral and SmolLM are exported as "llama".
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3"}

NAMES = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "attention/query": "attn_q",
    "attention/key": "attn_k",
    "attention/value": "attn_v",
    "attention/output": "attn_output",
    "attention/query_norm": "attn_q_norm",
    "attention/key_norm": "attn_k_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
ROPE_FACTORS = "rope_freqs.weight"
_MOST_LAYERS = 1 << 14  # more than any model has; a damaged count must not exhaust memory

# Of Gemma's sizes these alone scale queries by (hidden / heads)^-0.5; the file does not say so.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def load(path: str | os.PathLike[str], *, lazy: bool = False, dtype: Any = None) -> Model:
    """The model of a GGUF file, parameters in dtype (float32 unless given; or bfloat16).

    lazy: leaves are Lazy handles that decode one tensor when asked. Raises `JaxqError`, one line, for a file
    that is missing, damaged or cut short, or an architecture, tensor type or feature that jaxq does not know.
    """
    dtype = param_dtype(dtype)
    file = gguf_file.read(path)
    config = read_config(file)
    params = match(config, file, dtype)
    if not lazy:
        params = jax.tree.map(jnp.asarray, params)
    return build(config, params, Later(lambda: gguf_tokenizer.build(file.metadata)), fingerprint(file))


def fingerprint(file: gguf_file.File) -> dict[str, Any]:
    """{"kind", "name", "bytes", "header_sha256"}: tells two files apart without reading their tensors."""
    digest = hashlib.sha256()
    with open(file.path, "rb") as raw:
        digest.update(raw.read(min((tensor.offset for tensor in file.tensors.values()), default=0)))
    size = file.path.stat().st_size
    return {"kind": "gguf", "name": file.path.name, "bytes": size, "header_sha256": digest.hexdigest()}


def read_config(file: gguf_file.File) -> ModelConfig:
    """The config in the metadata, completed by which tensors there are."""
    meta = file.metadata
    family = FAMILIES.get(meta.get("general.architecture", ""))
    if family is None:
        found = meta.get("general.architecture")
        known = ", ".join(FAMILIES)
        raise JaxqError(f"{file.path}: architecture {found!r} is not supported; jaxq knows {known}")
    get = _Reader(file, family)
    if get.raw("expert_count"):
        raise JaxqError(f"{file.path} is a mixture of experts: jaxq loads dense models only")
    hidden, heads = get.size("embedding_length"), get.size("attention.head_count")
    head_dim = get.size("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get.size(key, head_dim) != head_dim:
            raise JaxqError(f"{file.path}: {key} is {get.size(key)}, jaxq needs it to be the head size {head_dim}")
    layers = get.size("block_count")
    if layers > _MOST_LAYERS:
        raise JaxqError(f"{file.path} is damaged: it claims to have {layers} layers")
    gemma = family.startswith("gemma")
    scaled = gemma and layers == GEMMA_27B_LAYERS[family]
    rope = read_rope(file, get, head_dim)
    eos = [meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    return ModelConfig(
        family=family,
        vocab_size=_tensor(file, NAMES["embed/embedding"]).shape[0],
        hidden_size=hidden,
        intermediate_size=get.size("feed_forward_length"),
        heads=heads,
        kv_heads=get.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        windows=_windows(get, family, layers),
        query_scale=(hidden / heads if scaled else head_dim) ** -0.5,
        norm_eps=get.number("attention.layer_norm_rms_epsilon", 1e-6),
        activation="gelu_tanh" if gemma else "silu",
        rope=rope,
        local_rope=Rope(get.number("rope.freq_base_swa", 1e4)) if family == "gemma3" else None,
        tied=NAMES["head/kernel"] not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        attention_softcap=get.optional("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
        logit_softcap=get.optional("final_logit_softcapping", 30.0 if family == "gemma2" else None),
        max_length=get.size("context_length", 2048),
        bos=meta.get("tokenizer.ggml.bos_token_id"),
        eos=tuple(dict.fromkeys(token for token in eos if token is not None)),
        pad=meta.get("tokenizer.ggml.padding_token_id"),
    )


class _Reader:
    """Metadata of one architecture, checked."""

    def __init__(self, file: gguf_file.File, family: str):
        self.path, self.meta, self.prefix = file.path, file.metadata, family

    def raw(self, key: str) -> Any:
        return self.meta.get(f"{self.prefix}.{key}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.raw(key)
        if isinstance(value, np.ndarray | list) and len(set(value)) == 1:
            value = int(value[0])  # some exporters repeat the number for each layer
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise JaxqError(f"{self.path}: {self.prefix}.{key} must be one positive integer, found {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw(key)
        return default if value is None else float(value)

    def optional(self, key: str, default: float | None) -> float | None:
        value = self.raw(key)
        return default if value is None else float(value) or None


def _windows(get: _Reader, family: str, layers: int) -> tuple[int | None, ...]:
    """The window of each layer; every 2nd (Gemma 2) or 6th (Gemma 3) layer sees everything."""
    if family.startswith("qwen") or not (family.startswith("gemma") or get.raw("attention.sliding_window")):
        return (None,) * layers
    window = get.size("attention.sliding_window", 4096)
    if family == "llama":
        return (window,) * layers
    pattern = get.raw("attention.sliding_window_pattern")
    if pattern is None or isinstance(pattern, int):
        every = pattern or (2 if family == "gemma2" else 6)
        return tuple(window if (i + 1) % every else None for i in range(layers))
    if len(pattern) != layers:
        raise JaxqError(f"{get.path}: sliding_window_pattern names {len(pattern)} of {layers} layers")
    return tuple(window if local else None for local in pattern)


def read_rope(file: gguf_file.File, get: _Reader, head_dim: int) -> Rope:
    """Rotary embedding of the (full-attention) layers."""
    base = get.number("rope.freq_base", 1e4)
    kind = get.raw("rope.scaling.type") or "none"
    if ROPE_FACTORS in file.tensors:
        return _llama3_rope(file, base, head_dim)
    if kind == "linear":
        return Rope(base, "linear", get.number("rope.scaling.factor", 1.0))
    if kind != "none":
        raise JaxqError(f"{file.path}: rope scaling {kind!r} is not supported; use none, linear or llama3")
    return Rope(base)


def _llama3_rope(file: gguf_file.File, base: float, head_dim: int) -> Rope:
    """Llama 3.1 files hold the divisor of each frequency in place of the parameters that gave it."""
    found = file.values(ROPE_FACTORS)
    rope = Rope(base, "llama3", float(found.max()), 1.0, 4.0, 8192)
    wave = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (rope.original_length / wave - rope.low_factor) / (rope.high_factor - rope.low_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / rope.factor + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise JaxqError(f"{file.path}: {ROPE_FACTORS} is not that of Llama 3.1, the only one supported")
    return rope


def match(config: ModelConfig, file: gguf_file.File, dtype: np.dtype) -> dict[str, Any]:
    """Lazy parameters for a config out of the file's tensors, checked both ways."""
    left = dict(file.tensors)
    left.pop(ROPE_FACTORS, None)

    def find(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Lazy:
        path = "/".join(key.key for key in keys)
        name = tensor_name(path)
        tensor = left.pop(name, None) or _tensor(file, name)
        shape = leaf.shape[::-1] if path.endswith("/kernel") else leaf.shape
        if tensor.shape != shape:
            raise JaxqError(f"{file.path}: {name} has shape {tensor.shape}, the metadata asks for {shape}")
        return Lazy(leaf.shape, dtype, _reader(config, file, path, name))

    params = jax.tree.map_with_path(find, abstract_params(config, dtype))
    if left:
        some = ", ".join(map(repr, sorted(left)[:3]))
        raise JaxqError(f"{file.path}: {len(left)} tensors that {config.family} has no place for: {some}")
    return params


def tensor_name(path: str) -> str:
    """The GGUF tensor of a parameter path, e.g. layers/0/attention/query/kernel -> blk.0.attn_q.weight."""
    if path in NAMES:
        return NAMES[path]
    found = re.fullmatch(r"layers/(\d+)/(.+)/(\w+)", path)
    assert found, path
    layer, module, leaf = found.groups()
    return f"blk.{layer}.{BLOCK_NAMES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def _tensor(file: gguf_file.File, name: str) -> gguf_file.Tensor:
    if name not in file.tensors:
        raise JaxqError(f"{file.path} lacks the tensor {name}: it is not a complete model")
    return file.tensors[name]


def _reader(config: ModelConfig, file: gguf_file.File, path: str, name: str) -> Callable[[], np.ndarray]:
    """Decodes a tensor into the orientation of the parameter at `path`."""
    heads = {"query": config.heads, "key": config.kv_heads}.get(path.split("/")[-2], 0)
    permuted = config.family == "llama" and heads > 0
    minus_one = config.family.startswith("gemma") and path.endswith("/scale")

    def read() -> np.ndarray:
        values = file.values(name)
        if permuted:
            values = unpermute(values, heads)
        if minus_one:
            values = values - np.float32(1)
        return values.T if path.endswith("/kernel") else values

    return read


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the reordering of projection rows (out, ...) for interleaved rotary embedding."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
