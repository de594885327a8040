"""Writes tiny GGUF files as llama.cpp's converter does, with the gguf package's writer and name tables."""

from pathlib import Path

import gguf
import jax
import numpy as np
from gguf import GGMLQuantizationType as Type

from jaxq.models import ModelConfig
from jaxq.models.huggingface import checkpoint_name

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"} | {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}


def write(path: Path, config: ModelConfig, params, *, edit=lambda tensors: tensors, extra=lambda writer: None):
    """params (jaxq's pytree) as a GGUF file. edit: changes {name: array or (raw, type)}."""
    architecture = ARCHITECTURES[config.family]
    writer = gguf.GGUFWriter(path, architecture)
    header(writer, config)
    extra(writer)
    for name, value in edit(tensors(architecture, config, params)).items():
        value, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, np.ascontiguousarray(value), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def header(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.base)
    if config.rope.scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    window = next((window for window in config.windows if window), None)
    if window:
        writer.add_sliding_window(window)
    if config.attention_softcap:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)
    ids = {"bos": config.bos, "eos": config.eos[0] if config.eos else None, "pad": config.pad}
    for kind, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)


def tensors(architecture: str, config: ModelConfig, params) -> dict[str, np.ndarray]:
    """{GGUF name: float32 (out, in)}, query and key rows reordered for arch llama, Gemma's norms plus one."""
    number = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.layers)
    out = {}
    for keys, leaf in jax.tree.leaves_with_path(params):
        path = "/".join(key.key for key in keys)
        hf = checkpoint_name(config, path)
        stem, suffix = hf.rsplit(".", 1)
        value = np.asarray(leaf, np.float32)
        value = value.T if path.endswith("/kernel") else value
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.heads if stem.endswith("q_proj") else config.kv_heads
            split = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = split.swapaxes(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and stem.endswith("norm"):
            value = value + 1
        out[f"{names.get_name(stem)}.{suffix}"] = value
    return out


def quantized(value: np.ndarray, kind: str, seed: int = 0) -> tuple[np.ndarray, Type]:
    """A matrix in a block format: by the gguf package where it can, else random codes with sane scales."""
    number = Type[kind]
    if kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        block, size = gguf.GGML_QUANT_SIZES[number]
        draws = np.random.default_rng(seed)
        raw = draws.integers(0, 256, (value.shape[0], value.shape[1] // block, size), np.uint8)
        # Where each format keeps its float16 scales.
        at = {"Q2_K": (-4, -2), "Q3_K": (-2,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (-2,)}[kind]
        for start in at:
            start %= size
            scales = draws.uniform(0.001, 0.01, raw.shape[:2]).astype(np.float16)
            raw[..., start : start + 2] = scales[..., None].view(np.uint8)
        return raw.reshape(value.shape[0], -1), number
    return gguf.quants.quantize(value, number), number


def decoded(value: tuple[np.ndarray, Type]) -> np.ndarray:
    return gguf.quants.dequantize(*value)
