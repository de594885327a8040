"""Swin (Liu et al. 2021): attention in windows, shifted by half a window in every second block.

    x = x + attention(norm1(x) in windows);  x = x + mlp(norm2(x))

Each stage but the first begins by merging 2 x 2 tokens. Tokens are (B, N, E) at every cut, N = grid * grid.
Shapes: B images, N tokens, G grid, E width, H heads, D head size, W windows of an image, T tokens of a window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxq.models.common import Dense
from jaxq.models.vision_config import VisionConfig
from jaxq.models.vit import MLP, Classifier, LayerNorm, PatchEmbed, split_heads

_INIT = nn.initializers.normal(0.02)
_MASKED = -100.0  # as published, not minus infinity: softmax leaves traces of masked tokens


@functools.cache
def relative_index(window: int) -> np.ndarray:
    """[T * T]: the row of the bias table that speaks of each pair of tokens of a window, int32."""
    at = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), -1).reshape(-1, 2)
    down, right = np.moveaxis(at[:, None] - at[None] + window - 1, -1, 0)
    return (down * (2 * window - 1) + right).reshape(-1).astype(np.int32)


@functools.cache
def shift_mask(grid: int, window: int, shift: int) -> np.ndarray:
    """[W, 1, T, T], float32: masks pairs of tokens that the cyclic shift brought together from opposite sides."""
    index = np.arange(grid)
    band = (index >= grid - window).astype(int) + (index >= grid - shift)
    region = (3 * band[:, None] + band).reshape(grid // window, window, grid // window, window)
    region = region.swapaxes(1, 2).reshape(-1, window * window)
    return np.where(region[:, None] != region[:, :, None], _MASKED, 0.0).astype(np.float32)[:, None]


def windows(x: Float[Array, "B G G E"], window: int) -> Float[Array, "BW T E"]:
    """Cuts the grid into windows, row by row."""
    batch, grid, _, width = x.shape
    x = x.reshape(batch, grid // window, window, grid // window, window, width)
    return jnp.swapaxes(x, 2, 3).reshape(-1, window * window, width)


def unwindows(x: Float[Array, "BW T E"], window: int, grid: int) -> Float[Array, "B G G E"]:
    """The grid that `windows` cut."""
    x = x.reshape(-1, grid // window, grid // window, window, window, x.shape[-1])
    return jnp.swapaxes(x, 2, 3).reshape(-1, grid, grid, x.shape[-1])


class WindowAttention(nn.Module):
    """Softmax attention within windows, with a learned bias for each head and relative position."""

    config: VisionConfig
    heads: int
    window: int

    @nn.compact
    def __call__(self, x: Float[Array, "BW T E"], mask: np.ndarray | None) -> Float[Array, "BW T E"]:
        length, width = x.shape[1:]
        q, k, v = split_heads(Dense(3 * width, self.config.qkv_bias, name="qkv")(x), self.heads)
        q = checkpoint_name(q * (width // self.heads) ** -0.5, "query")
        k, v = checkpoint_name(k, "key"), checkpoint_name(v, "value")
        scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
        table = self.param("relative_position_bias_table", _INIT, ((2 * self.window - 1) ** 2, self.heads))
        bias = jnp.take(table, relative_index(self.window), axis=0, mode="clip").astype(jnp.float32)
        scores = scores + bias.T.reshape(self.heads, length, length)
        if mask is not None:
            scores = (scores.reshape(-1, *mask.shape[:1], *scores.shape[1:]) + mask).reshape(scores.shape)
        probs = checkpoint_name(jax.nn.softmax(scores, axis=-1).astype(v.dtype), "probs")
        y = jnp.einsum("bhnm,bhmd->bhnd", probs, v)
        return Dense(width, True, name="proj")(jnp.swapaxes(y, 1, 2).reshape(x.shape))


class Block(nn.Module):
    """A Swin block over a square grid; a grid that windows do not tile is padded with zeros after the norm."""

    config: VisionConfig
    stage: int
    grid: int
    shifted: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        c, grid = self.config, self.grid
        # A window as large as the grid sees everything: there is nothing to shift.
        window = min(c.window_size, grid)
        shift = window // 2 if self.shifted and grid > c.window_size else 0
        y = LayerNorm(c.norm_eps, name="norm1")(x).reshape(x.shape[0], grid, grid, x.shape[-1])
        padded = -(-grid // window) * window
        if padded > grid:
            y = jnp.pad(y, [(0, 0), (0, padded - grid), (0, padded - grid), (0, 0)])
        if shift:
            y = jnp.roll(y, (-shift, -shift), (1, 2))
        mask = shift_mask(padded, window, shift) if shift else None
        y = WindowAttention(c, c.heads[self.stage], window, name="attn")(windows(y, window), mask)
        y = unwindows(y, window, padded)
        if shift:
            y = jnp.roll(y, (shift, shift), (1, 2))
        x = x + y[:, :grid, :grid].reshape(x.shape)
        return x + MLP(c, c.hidden(self.stage), name="mlp")(LayerNorm(c.norm_eps, name="norm2")(x))


class Merging(nn.Module):
    """Concatenates 2 x 2 neighbours (down first, then right), norms, and halves the channels."""

    config: VisionConfig
    grid: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N/4 2E"]:
        batch, _, width = x.shape
        odd, half = self.grid % 2, (self.grid + 1) // 2
        x = x.reshape(batch, self.grid, self.grid, width)
        if odd:
            x = jnp.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
        x = x.reshape(batch, half, 2, half, 2, width).transpose(0, 1, 3, 4, 2, 5)
        x = LayerNorm(self.config.norm_eps, name="norm")(x.reshape(batch, half * half, 4 * width))
        return Dense(2 * width, name="reduction")(x)


class Blocks(nn.Module):
    """Holds the blocks of a stage as "0", "1", ..."""

    config: VisionConfig
    stage: int
    grid: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B N E"]:
        for i in range(self.config.depths[self.stage]):
            # The name is where jaxq.stages cuts: the residual stream at the door of each block.
            block = Block(self.config, self.stage, self.grid, i % 2 == 1, name=str(i))
            x = block(checkpoint_name(x, "block"))
        return x


class Stage(nn.Module):
    """Merging, but for the first stage, and blocks. grid: of the tokens that come in."""

    config: VisionConfig
    stage: int
    grid: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B M F"]:
        if self.stage:
            x = Merging(self.config, self.grid, name="downsample")(checkpoint_name(x, "block"))
        grid = (self.grid + 1) // 2 if self.stage else self.grid
        return Blocks(self.config, self.stage, grid, name="blocks")(x)


class Stages(nn.Module):
    """Holds the stages as "0", "1", ..., so that a path reads layers/0/blocks/0/attn/qkv/kernel."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N E"]) -> Float[Array, "B M F"]:
        grid = self.config.grid
        for i in range(len(self.config.depths)):
            x = Stage(self.config, i, grid, name=str(i))(x)
            grid = (grid + 1) // 2 if i else grid
        return x


class Swin(nn.Module):
    """images -> float32 logits, or the normed tokens of the last stage where the config has no classes."""

    config: VisionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B ..."]:
        c = self.config
        x = PatchEmbed(c, norm=True, name="patch_embed")(images)
        x = Stages(c, name="layers")(x)
        x = LayerNorm(c.norm_eps, name="norm")(checkpoint_name(x, "block"))
        if not c.classes:
            return x.astype(jnp.float32)
        return Classifier(c.classes, name="head")(jnp.mean(x, axis=1))
