"""What every family is built from: linear, embedding, norm, rotary tables, masks, attention, cache.

Shapes: B batch, T tokens, S key slots (T, or the cache length), E hidden, H heads, K key-value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxq.models.config import ModelConfig, Rope

_KERNEL_INIT = nn.initializers.normal(0.02)


class KV(NamedTuple):
    """The static cache of one layer; slot s holds position s."""

    key: Float[Array, "B S K D"]
    value: Float[Array, "B S K D"]


Cache = tuple[KV, ...]


class Context(NamedTuple):
    """What a block needs besides the residual stream: made once, before the first block."""

    mask: Bool[Array, "#B T S"]
    cos: Float[Array, "#B T 1 D/2"]
    sin: Float[Array, "#B T 1 D/2"]
    positions: Int[Array, "#B T"]


class Dense(nn.Module):
    """x (..., in) -> (..., out): x @ kernel (+ bias), in the dtype of x."""

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = x @ self.param("kernel", _KERNEL_INIT, (x.shape[-1], self.features)).astype(x.dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class Embed(nn.Module):
    """Token embedding (vocab, embed); `logits` contracts with the same leaf, for tied heads."""

    vocab: int
    features: int

    def setup(self) -> None:
        self.embedding = self.param("embedding", _KERNEL_INIT, (self.vocab, self.features))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        return jnp.take(self.embedding, tokens, axis=0, mode="clip")

    def logits(self, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        return jnp.einsum("bte,ve->btv", x, self.embedding.astype(x.dtype), preferred_element_type=jnp.float32)


class Head(nn.Module):
    """Untied output projection: x (B, T, embed) -> float32 logits (B, T, vocab)."""

    vocab: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        kernel = self.param("kernel", _KERNEL_INIT, (x.shape[-1], self.vocab))
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), in float32, back to the dtype of x.

    offset: added to the stored scale; Gemma stores the scale minus one.
    """

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (scale + self.offset if self.offset else scale)).astype(x.dtype)


class Layers(nn.Module):
    """Holds the blocks as "0", "1", ..., so that a path reads layers/0/attention/query/kernel."""

    block: type[nn.Module]
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], contexts: Sequence[Context], cache: Cache | None
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        slots = []
        for i, context in enumerate(contexts):
            # The name is where jaxq.stages cuts: the residual stream at the door of each block.
            x = checkpoint_name(x, "block")
            x, slot = self.block(self.config, name=str(i))(x, context, None if cache is None else cache[i])
            slots.append(slot)
        return x, None if cache is None else tuple(slots)


def activate(name: str, x: Float[Array, ...]) -> Float[Array, ...]:
    """The activation functions of ModelConfig.activation."""
    if name == "silu":
        return jax.nn.silu(x)
    if name == "relu":
        return jax.nn.relu(x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


def contexts(
    config: ModelConfig, tokens: Int[Array, "B T"], cache: Cache | None, position: Int[Array, "#B"] | None
) -> tuple[Context, ...]:
    """One Context a layer; layers of a kind share the very same arrays.

    position: where the first token of each row stands, for decoding with a cache; None means 0.
    """
    length = tokens.shape[1]
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    positions = steps if position is None else jnp.reshape(position, (-1, 1)).astype(jnp.int32) + steps
    slots = length if cache is None else cache[0].key.shape[1]

    def build(window: int | None) -> Context:
        rope = config.rope if window is None or config.local_rope is None else config.local_rope
        cos, sin = rotary_tables(rope, config.head_dim, positions)
        return Context(causal_mask(positions, slots, window), cos, sin, positions)

    kinds = {window: build(window) for window in dict.fromkeys(config.windows)}
    return tuple(kinds[window] for window in config.windows)


def causal_mask(positions: Int[Array, "#B T"], slots: int, window: int | None) -> Bool[Array, "#B T S"]:
    """True where a query may see the key in a slot: not later, and not `window` or more before it."""
    distance = positions[:, :, None] - jnp.arange(slots, dtype=jnp.int32)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """The head_dim / 2 rotary frequencies, float32, with context scaling applied (see Rope)."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.float32(rope.base) ** exponent).astype(np.float32)
    if rope.scaling == "linear":
        return inverse / np.float32(rope.factor)
    if rope.scaling == "llama3":
        turns = rope.original_length * inverse / (2 * np.pi)
        smooth = np.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
        return ((1 - smooth) * inverse / rope.factor + smooth * inverse).astype(np.float32)
    return inverse


def rotary_tables(
    rope: Rope, head_dim: int, positions: Int[Array, "#B T"]
) -> tuple[Float[Array, "#B T 1 D/2"], Float[Array, "#B T 1 D/2"]]:
    """cos and sin of position times frequency, float32."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T H D"], context: Context) -> Float[Array, "B T H D"]:
    """Rotary embedding in the split-half layout of Hugging Face, computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = context.cos, context.sin
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def remember(
    cache: KV | None, key: Float[Array, "B T K D"], value: Float[Array, "B T K D"], context: Context
) -> tuple[KV | None, Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """Writes keys and values into their slots; gives the cache and what attention shall read.

    Slots past the end of the cache are dropped, so that an overlong decode cannot overwrite earlier ones.
    """
    if cache is None:
        return None, key, value
    rows = jnp.arange(key.shape[0])[:, None]
    at = jnp.broadcast_to(context.positions, key.shape[:2])
    cache = KV(
        cache.key.at[rows, at].set(key.astype(cache.key.dtype), mode="drop"),
        cache.value.at[rows, at].set(value.astype(cache.value.dtype), mode="drop"),
    )
    return cache, cache.key.astype(key.dtype), cache.value.astype(value.dtype)


def attend(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    context: Context,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T E"]:
    """Grouped-query attention (Ainslie et al. 2023), scores and softmax in float32; heads flattened."""
    batch, length, heads, head_dim = query.shape
    query = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(context.mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = checkpoint_name(jax.nn.softmax(scores, axis=-1).astype(value.dtype), "probs")
    return jnp.einsum("bkgts,bskd->btkgd", probs, value).reshape(batch, length, heads * head_dim)


def pick(x: Float[Array, "B T E"], last: Int[Array, " B"] | None) -> Float[Array, "B L E"]:
    """All positions, or only position last[b] of row b (L = 1): prefill needs no other logits."""
    return x if last is None else jnp.take_along_axis(x, last[:, None, None], axis=1)
