"""An image model as data: a pure function over a parameter pytree, a config, a source."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jaxq.errors import JaxqError
from jaxq.models.swin import Swin
from jaxq.models.vision_config import PRESETS as PRESETS
from jaxq.models.vision_config import VisionConfig as VisionConfig
from jaxq.models.vit import ViT, resample_positions

# A new family is one file with a module of images, and its line here.
MODULES: dict[str, type[nn.Module]] = {"vit": ViT, "swin": Swin}


@dataclass(frozen=True, eq=False)
class VisionModel:
    """What `jaxq.models.load` gives for an image model.

    apply(params, images [B, H, W, C], normalised) -> logits float32 [B, classes], or without a head the normed
        tokens [B, N, D]; pure, holds no parameters.
    params: nested dict with string keys named as in timm ("blocks" -> "0" -> "attn" -> "qkv" -> "kernel"); leaves
        are arrays, or Lazy handles.
    source: fingerprint of the files that the model was read from, JSON-ready.
    """

    config: VisionConfig
    params: Any = field(repr=False)
    apply: Callable[..., Float[Array, "B ..."]] = field(repr=False)
    source: dict[str, Any]

    def replace(self, **changes: Any) -> VisionModel:
        """A copy with some fields changed, e.g. model.replace(params=...)."""
        return dataclasses.replace(self, **changes)

    def resize(self, image_size: int) -> VisionModel:
        """The model for images of another size: a ViT's position embeddings are interpolated.

        Errors: JaxqError where that is not all that changes, as for a Swin whose windows would shrink.
        """
        config = self.config.replace(image_size=image_size)
        params, old, new = self.params, abstract_params(self.config), abstract_params(config)
        if "pos_embed" in new and new["pos_embed"].shape != old["pos_embed"].shape:
            positions = np.asarray(params["pos_embed"])
            moved = resample_positions(positions.astype(np.float32), config.prefix, config.grid)
            params = params | {"pos_embed": jnp.asarray(moved.astype(positions.dtype))}
            old = old | {"pos_embed": new["pos_embed"]}
        if old != new:
            raise JaxqError(
                f"a {self.config.family} for images of {image_size} pixels has parameters of other shapes"
            )
        return build(config, params, self.source)


def build(config: VisionConfig, params: Any, source: dict[str, Any] | None = None) -> VisionModel:
    """Puts a VisionModel together."""
    return VisionModel(config, params, _function(config), dict(source or {}))


def abstract_params(config: VisionConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter pytree as ShapeDtypeStructs, every leaf in dtype; nothing is computed."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(config))


@functools.cache
def _shapes(config: VisionConfig) -> dict[str, Any]:
    # The blocks of a stage have the same shapes, so one is traced and the rest are copies of it.
    short = config.replace(depths=(1,) * len(config.depths))
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.channels), jnp.float32)
    tree = jax.eval_shape(_module(short).init, jax.random.key(0), images)["params"]
    for i, depth in enumerate(config.depths):
        stage = tree["layers"][str(i)] if config.family == "swin" else tree
        stage["blocks"] = {str(j): stage["blocks"]["0"] for j in range(depth)}
    return tree


def init_params(
    config: VisionConfig, seed: int = 0, dtype: Any = jnp.float32, scale: float = 0.02
) -> dict[str, Any]:
    """Where training from scratch starts: kernels, tokens and positions of deviation `scale`, the kernel of the
    patch embedding of deviation fan_in^-1/2, biases 0, norms and layer scales 1.
    """

    def draw(i: int, keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        if keys[-1].key in ("scale", "bias"):
            return jnp.asarray(np.full(leaf.shape, keys[-1].key == "scale", leaf.dtype))
        # numpy, since drawing with jax.random would compile a program for every shape.
        x = np.random.default_rng((seed, i)).standard_normal(leaf.shape, np.float32)
        deviation = np.prod(leaf.shape[:-1]) ** -0.5 if keys[0].key == "patch_embed" else scale
        return jnp.asarray((deviation * x).astype(leaf.dtype))

    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype))
    return jax.tree.unflatten(tree, [draw(i, *leaf) for i, leaf in enumerate(leaves)])


def _module(config: VisionConfig) -> nn.Module:
    return MODULES[config.family](config)  # type: ignore[call-arg]


@functools.cache
def _function(config: VisionConfig) -> Callable[..., Any]:
    # Equal configs give the very same function, so that jit does not compile a reloaded model again.
    return functools.partial(_apply, config)


def _apply(config: VisionConfig, params: Any, images: Float[Array, "B H W C"]) -> Float[Array, "B ..."]:
    expected = (config.image_size, config.image_size, config.channels)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise JaxqError(
            f"images of shape (batch, {', '.join(map(str, expected))}) are expected, not {images.shape}"
        )
    return _module(config).apply({"params": params}, images)  # type: ignore[return-value]
