"""ViT (Dosovitskiy et al. 2021), and what computes alike: DeiT (Touvron et al. 2021), DINOv2 (Oquab et al. 2023).

    x = x + attention(norm1(x));  x = x + mlp(norm2(x))

One LayerNorm feeds exactly one linear map (query, key and value are one kernel), so that scales can move between
the two. Parts that Swin shares are here too. Shapes: B images, N tokens, E width, H heads, D head size, K classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxq.models.common import Dense, activate
from jaxq.models.vision_config import VisionConfig

_INIT = nn.initializers.normal(0.02)


def at_least_float32(dtype: Any) -> Any:
    """Where sums are taken: float32 for narrower dtypes, float64 for itself."""
    return jnp.promote_types(dtype, jnp.float32)


class LayerNorm(nn.Module):
    """Layer norm over the last axis (Ba et al. 2016), in float32 at least, back to the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        wide = at_least_float32(x.dtype)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(wide)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(wide)
        y = x.astype(wide)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


class Conv(nn.Module):
    """A convolution whose windows do not overlap: kernel (size, size, in, out) and bias."""

    features: int
    size: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B G G E"]:
        kernel = self.param("kernel", _INIT, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        numbers = ("NHWC", "HWIO", "NHWC")
        x = x.astype(kernel.dtype)
        y = lax.conv_general_dilated(x, kernel, (self.size, self.size), "VALID", dimension_numbers=numbers)
        return y + bias


class PatchEmbed(nn.Module):
    """Images to one token a patch, row by row, in the dtype of the parameters; Swin norms them."""

    config: VisionConfig
    norm: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B N E"]:
        c = self.config
        x = Conv(c.hidden_size, c.patch_size, name="proj")(images)
        x = x.reshape(x.shape[0], -1, c.hidden_size)
        return LayerNorm(c.norm_eps, name="norm")(x) if self.norm else x


class MLP(nn.Module):
    config: VisionConfig
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        y = activate(self.config.activation, Dense(self.hidden, True, name="fc1")(x))
        return Dense(x.shape[-1], True, name="fc2")(y)


class Classifier(nn.Module):
    """x (B, E) -> logits (B, K) in float32 at least."""

    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "B E"]) -> Float[Array, "B K"]:
        kernel = self.param("kernel", _INIT, (x.shape[-1], self.classes))
        bias = self.param("bias", nn.initializers.zeros, (self.classes,))
        wide = at_least_float32(x.dtype)
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=wide) + bias.astype(wide)


class LayerScale(nn.Module):
    """Multiplies by a learned vector (Touvron et al. 2021, CaiT)."""

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)


def split_heads(x: Float[Array, "B N F"], heads: int) -> list[Float[Array, "B H N D"]]:
    """Query, key and value out of the fused projection, whose outputs are ordered (which, head, channel)."""
    x = x.reshape(*x.shape[:2], 3, heads, x.shape[-1] // (3 * heads))
    return [jnp.swapaxes(x[:, :, i], 1, 2) for i in range(3)]


class Attention(nn.Module):
    """Softmax attention over all tokens, scores in float32 at least."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        c = self.config
        q, k, v = split_heads(Dense(3 * c.hidden_size, c.qkv_bias, name="qkv")(x), c.heads[0])
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        wide = at_least_float32(q.dtype)
        scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
        probs = checkpoint_name(jax.nn.softmax(scores, axis=-1).astype(v.dtype), "probs")
        y = jnp.einsum("bhnm,bhmd->bhnd", probs, v)
        return Dense(c.hidden_size, True, name="proj")(jnp.swapaxes(y, 1, 2).reshape(x.shape))


class Block(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        c = self.config
        y = Attention(c, name="attn")(LayerNorm(c.norm_eps, name="norm1")(x))
        x = x + (LayerScale(name="ls1")(y) if c.layer_scale else y)
        y = MLP(c, c.hidden(0), name="mlp")(LayerNorm(c.norm_eps, name="norm2")(x))
        return x + (LayerScale(name="ls2")(y) if c.layer_scale else y)


class Blocks(nn.Module):
    """Holds the blocks as "0", "1", ..., so that a path reads blocks/0/attn/qkv/kernel."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        for i in range(self.config.depths[0]):
            # The name is where jaxq.stages cuts: the residual stream at the door of each block.
            x = Block(self.config, name=str(i))(checkpoint_name(x, "block"))
        return x


class ViT(nn.Module):
    """images -> logits, or the normed tokens where the config has no classes, in float32 at least."""

    config: VisionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B ..."]:
        c = self.config
        x = PatchEmbed(c, name="patch_embed")(images)
        names = ["cls_token"] * c.class_token + ["dist_token"] * c.distilled
        tokens = [self.param(name, _INIT, (1, 1, c.hidden_size)).astype(x.dtype) for name in names]
        x = jnp.concatenate([*(jnp.broadcast_to(t, (x.shape[0], 1, c.hidden_size)) for t in tokens), x], axis=1)
        x = x + self.param("pos_embed", _INIT, (1, *x.shape[1:])).astype(x.dtype)
        x = Blocks(c, name="blocks")(x)
        x = checkpoint_name(x, "block")
        if c.classes and c.pooling == "mean":
            x = LayerNorm(c.norm_eps, name="fc_norm")(jnp.mean(x[:, c.prefix :], axis=1))
            return Classifier(c.classes, name="head")(x)
        x = LayerNorm(c.norm_eps, name="norm")(x)
        if not c.classes:
            return x.astype(at_least_float32(x.dtype))
        if c.distilled_head:
            both = Classifier(c.classes, name="head")(x[:, 0]), Classifier(c.classes, name="head_dist")(x[:, 1])
            return (both[0] + both[1]) / 2
        pooled = x[:, 0]
        if c.pooling == "cls_mean":
            pooled = jnp.concatenate([pooled, jnp.mean(x[:, c.prefix :], axis=1)], axis=-1)
        return Classifier(c.classes, name="head")(pooled)


def resample_positions(positions: np.ndarray, prefix: int, grid: int) -> np.ndarray:
    """Position embeddings (1, prefix + n * n, E) for another grid: those of the patches by bicubic interpolation.

    As DINOv2 does it: coordinates of pixel centres, cubic kernel with a = -0.75, edges repeated, no antialiasing.
    """
    side = round((positions.shape[1] - prefix) ** 0.5)
    at = (np.arange(grid) + 0.5) * (side / grid) - 0.5
    first = np.floor(at).astype(int)
    weights = np.zeros((grid, side))
    for tap in range(-1, 3):
        d = np.abs(at - first - tap)
        near, far = (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3
        np.add.at(weights, (np.arange(grid), np.clip(first + tap, 0, side - 1)), np.where(d <= 1, near, far))
    patches = positions[0, prefix:].reshape(side, side, -1)
    patches = np.einsum("gi,hj,ije->ghe", weights, weights, patches, optimize=True).reshape(1, grid * grid, -1)
    return np.concatenate([positions[:, :prefix], patches], axis=1).astype(positions.dtype)
