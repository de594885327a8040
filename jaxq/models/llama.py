"""Llama (Touvron et al. 2023), and what computes alike: SmolLM, Mistral (Jiang et al. 2023).

    x = x + attention(norm(x));  x = x + mlp(norm(x))

Attention is grouped-query with rotary positions; the MLP is down(silu(gate(x)) * up(x)). Mistral sees only
the last `window` positions. Shapes as in common.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxq.models import common
from jaxq.models.common import KV, Cache, Context, Dense, RMSNorm
from jaxq.models.config import ModelConfig, read_common, size

FAMILIES = {"llama": "llama", "mistral": "mistral"}

# Module path inside a block -> its name inside a Hugging Face layer.
CHECKPOINT_NAMES = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
IGNORED = (r"rotary_emb\.inv_freq$",)


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The config of a Hugging Face "llama" or "mistral" config.json."""
    if hf["model_type"] == "mistral":
        window = hf.get("sliding_window", 4096)
        return read_common(hf, "mistral", windows=(window,) * size(hf, "num_hidden_layers"))
    bias = bool(hf.get("attention_bias", False))
    mlp_bias = bool(hf.get("mlp_bias", False))
    return read_common(hf, "llama", qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


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
        q = checkpoint_name(common.rotate(q, context), "query")
        k = checkpoint_name(common.rotate(k, context), "key")
        v = checkpoint_name(v, "value")
        cache, k, v = common.remember(cache, k, v, context)  # [B, S, K, D]
        y = common.attend(q, k, v, context, c.query_scale)  # [B, T, H * D]
        return Dense(c.hidden_size, c.output_bias, name="output")(y), cache


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        c = self.config
        gate = Dense(c.intermediate_size, c.mlp_bias, name="gate")(x)
        up = Dense(c.intermediate_size, c.mlp_bias, name="up")(x)
        return Dense(c.hidden_size, c.mlp_bias, name="down")(common.activate(c.activation, gate) * up)


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
