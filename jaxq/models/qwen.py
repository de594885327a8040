"""Qwen2 (Yang et al. 2024) and Qwen3 (Yang et al. 2025): Llama blocks with another attention.

Qwen2 adds biases to query, key and value. Qwen3 drops them and norms each head of query and key before the
rotation. Layers from max_window_layers on may slide over a window. Shapes as in common.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxq.models import common
from jaxq.models.common import KV, Cache, Context, Dense, RMSNorm
from jaxq.models.config import ModelConfig, layer_windows, read_common, size
from jaxq.models.llama import CHECKPOINT_NAMES as LLAMA_NAMES
from jaxq.models.llama import IGNORED, MLP

FAMILIES = {"qwen2": "qwen2", "qwen3": "qwen3"}
CHECKPOINT_NAMES = LLAMA_NAMES | {
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}

__all__ = ["CHECKPOINT_NAMES", "FAMILIES", "IGNORED", "Decoder", "read_config"]


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face "qwen2" or "qwen3" config.json."""
    layers = size(hf, "num_hidden_layers")
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    first = hf.get("max_window_layers", 28)
    windows = layer_windows(hf, layers, window, lambda i: window is not None and i >= first)
    if hf["model_type"] == "qwen2":
        return read_common(hf, "qwen2", windows=windows, qkv_bias=True)
    bias = bool(hf.get("attention_bias", False))
    head_dim = size(hf, "head_dim", 128)
    return read_common(hf, "qwen3", windows=windows, head_dim=head_dim, qkv_bias=bias, output_bias=bias)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], context: Context, cache: KV | None
    ) -> tuple[Float[Array, "B T E"], KV | None]:
        c = self.config
        q = Dense(c.heads * c.head_dim, c.qkv_bias, name="query")(x)
        k = Dense(c.kv_heads * c.head_dim, c.qkv_bias, name="key")(x)
        v = Dense(c.kv_heads * c.head_dim, c.qkv_bias, name="value")(x)
        q = q.reshape(*x.shape[:2], c.heads, c.head_dim)  # [B, T, H, D]
        k = k.reshape(*x.shape[:2], c.kv_heads, c.head_dim)  # [B, T, K, D]
        v = v.reshape(*x.shape[:2], c.kv_heads, c.head_dim)  # [B, T, K, D]
        if c.family == "qwen3":
            q = RMSNorm(c.norm_eps, name="query_norm")(q)
            k = RMSNorm(c.norm_eps, name="key_norm")(k)
        q = checkpoint_name(common.rotate(q, context), "query")
        k = checkpoint_name(common.rotate(k, context), "key")
        v = checkpoint_name(v, "value")
        cache, k, v = common.remember(cache, k, v, context)  # [B, S, K, D]
        y = common.attend(q, k, v, context, c.query_scale)  # [B, T, H * D]
        return Dense(c.hidden_size, c.output_bias, name="output")(y), cache


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], context: Context, cache: KV | None
    ) -> tuple[Float[Array, "B T E"], KV | None]:
        eps = self.config.norm_eps
        y, cache = Attention(self.config, name="attention")(RMSNorm(eps, name="attention_norm")(x), context, cache)
        x = x + y
        return x + MLP(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x)), cache


class Decoder(nn.Module):
    """tokens -> float32 logits and the updated cache (None without one)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None = None,
        position: Int[Array, "#B"] | None = None,
        last: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L V"], Cache | None]:
        c = self.config
        contexts = common.contexts(c, tokens, cache, position)
        embed = common.Embed(c.vocab_size, c.hidden_size, name="embed")
        x = embed(tokens)
        x, cache = common.Layers(Block, c, name="layers")(x, contexts, cache)
        x = checkpoint_name(x, "block")
        x = RMSNorm(c.norm_eps, name="norm")(common.pick(x, last))
        return embed.logits(x) if c.tied else common.Head(c.vocab_size, name="head")(x), cache
