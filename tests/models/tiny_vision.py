"""Tiny image models for tests."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq.models.vision import VisionConfig, abstract_params, build, init_params

VIT = VisionConfig("vit", 16, 4, 8, (3,), (2,), classes=5, mlp_ratio=2.0)
SWIN = VisionConfig(
    "swin", 16, 2, 8, (4, 2), (2, 4), 5, mlp_ratio=2.0, norm_eps=1e-5, class_token=False, pooling="mean",
    window_size=4,
)  # fmt: skip

# What each trait adds to VIT.
VARIANTS = {
    "plain": {},
    "scaled": dict(layer_scale=True, classes=0),
    "distilled": dict(distilled=True, distilled_head=True),
    "distilled-token": dict(distilled=True),
    "mean": dict(pooling="mean"),
    "no-token": dict(pooling="mean", class_token=False, qkv_bias=False),
    "both": dict(pooling="cls_mean", layer_scale=True),
    "grey": dict(channels=1, mean=(0.5,), std=(0.5,), activation="relu"),
}


def tiny(name: str) -> VisionConfig:
    return VIT.replace(**VARIANTS[name])


def random(config: VisionConfig, seed: int = 0):
    """Parameters of which every one matters."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.3 * draw.standard_normal(x.shape, np.float32)), init_params(config)
    )


def pictures(config: VisionConfig, batch: int = 2, seed: int = 1) -> jax.Array:
    shape = (batch, config.image_size, config.image_size, config.channels)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def paths(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(abstract_params(config))
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf.shape for k, leaf in leaves}


def programs(config: VisionConfig) -> tuple[list[jaxq.Stage], list[int]]:
    """The stages, and for each the number of its program."""
    model = build(config, abstract_params(config))
    images = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, config.channels), jnp.float32)
    stages = jaxq.stages(model.apply, model.params, images)
    numbers: dict[int, int] = {}
    return stages, [numbers.setdefault(id(stage.program), len(numbers)) for stage in stages]
