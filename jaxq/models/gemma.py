"""Gemma 2 (Gemma Team 2024) and the text model of Gemma 3 (Gemma Team 2025).

    x = x + norm(attention(norm(x)));  x = x + norm(mlp(norm(x)))

Embeddings are multiplied by sqrt(hidden); norms store their scale minus one; layers alternate between a
sliding window and full attention. Gemma 2 caps attention scores and logits with tanh. Gemma 3 norms each head
of query and key, and its sliding layers rotate with another base. Shapes as in common.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxq.errors import JaxqError
from jaxq.models import common
from jaxq.models.common import KV, Cache, Context, Dense, RMSNorm
from jaxq.models.config import ModelConfig, activation, layer_windows, read_common, read_rope, size

# "gemma3" is the image-text checkpoint, of which only the text model is read.
FAMILIES = {"gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3": "gemma3"}
CHECKPOINT_NAMES = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "mlp_post_norm": "post_feedforward_layernorm",
}
IGNORED = (r"rotary_emb\.inv_freq$", r"(^|\.)vision_tower\.", r"(^|\.)multi_modal_projector\.")

# What Gemma3TextConfig assumes; published image-text configs leave these out.
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face "gemma2", "gemma3_text" or "gemma3" config.json."""
    gemma3 = hf["model_type"] != "gemma2"
    if gemma3:
        found = {**hf, **hf.get("text_config", {})}
        hf = {**_GEMMA3_DEFAULTS, **{key: value for key, value in found.items() if value is not None}}
    if hf.get("use_bidirectional_attention"):
        raise JaxqError("config.json: use_bidirectional_attention is not supported (this is an embedding model)")
    layers = size(hf, "num_hidden_layers")
    window = size(hf, "sliding_window", 4096)
    every = (hf.get("sliding_window_pattern") or 6) if gemma3 else 2
    bias = bool(hf.get("attention_bias", False))
    fields: dict[str, Any] = {
        "windows": layer_windows(hf, layers, window, lambda i: bool((i + 1) % every)),
        "head_dim": size(hf, "head_dim", 256),
        "query_scale": float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
        "activation": activation(hf.get("hidden_activation") or "gelu_pytorch_tanh"),
        "tied": bool(hf.get("tie_word_embeddings", True)),
        "qkv_bias": bias,
        "output_bias": bias,
    }
    if not gemma3:
        caps = {
            "attention_softcap": hf.get("attn_logit_softcapping", 50.0),
            "logit_softcap": hf.get("final_logit_softcapping", 30.0),
        }
        return read_common(hf, "gemma2", **fields, **caps)
    ropes = hf.get("rope_parameters") or {}
    full = ropes.get("full_attention") or hf.get("rope_scaling")
    rope = read_rope(full, hf.get("rope_theta", 1e6), hf)
    local = read_rope(ropes.get("sliding_attention"), hf.get("rope_local_base_freq", 1e4), hf)
    cap = hf.get("final_logit_softcapping")
    return read_common(hf, "gemma3", **fields, rope=rope, local_rope=local, logit_softcap=cap)


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
        if c.family == "gemma3":
            q = RMSNorm(c.norm_eps, offset=1.0, name="query_norm")(q)
            k = RMSNorm(c.norm_eps, offset=1.0, name="key_norm")(k)
        q = checkpoint_name(common.rotate(q, context), "query")
        k = checkpoint_name(common.rotate(k, context), "key")
        v = checkpoint_name(v, "value")
        cache, k, v = common.remember(cache, k, v, context)  # [B, S, K, D]
        y = common.attend(q, k, v, context, c.query_scale, c.attention_softcap)  # [B, T, H * D]
        return Dense(c.hidden_size, c.output_bias, name="output")(y), cache


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        c = self.config
        gate = Dense(c.intermediate_size, name="gate")(x)
        up = Dense(c.intermediate_size, name="up")(x)
        return Dense(c.hidden_size, name="down")(common.activate(c.activation, gate) * up)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], context: Context, cache: KV | None
    ) -> tuple[Float[Array, "B T E"], KV | None]:
        def norm(name: str, y: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
            return RMSNorm(self.config.norm_eps, offset=1.0, name=name)(y)

        y, cache = Attention(self.config, name="attention")(norm("attention_norm", x), context, cache)
        x = x + norm("attention_post_norm", y)
        y = MLP(self.config, name="mlp")(norm("mlp_norm", x))
        return x + norm("mlp_post_norm", y), cache


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
        x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        x, cache = common.Layers(Block, c, name="layers")(x, contexts, cache)
        x = checkpoint_name(x, "block")
        x = RMSNorm(c.norm_eps, offset=1.0, name="norm")(common.pick(x, last))
        logits = embed.logits(x) if c.tied else common.Head(c.vocab_size, name="head")(x)
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits, cache
