"""A language model as data: pure functions over a parameter pytree, a config, a tokenizer, a source."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxq.errors import JaxqError
from jaxq.models import gemma, llama, qwen
from jaxq.models.common import KV, Cache
from jaxq.models.config import ModelConfig as ModelConfig
from jaxq.models.config import Rope as Rope

# A new family is one file with FAMILIES, CHECKPOINT_NAMES, IGNORED, read_config and Decoder, added here.
FILES: tuple[ModuleType, ...] = (llama, qwen, gemma)


class Later:
    """A value made at first use, then kept: a tokenizer that nobody asks for is never read."""

    def __init__(self, make: Callable[[], Any]):
        self._get = functools.cache(make)

    def get(self) -> Any:
        return self._get()


@dataclass(frozen=True, eq=False)
class Model:
    """What `jaxq.models.load` gives.

    apply(params, tokens [B, T]) -> logits float32 [B, T, V]; pure, holds no parameters.
    decode(params, tokens [B, T], cache, position [B] or scalar, last [B] or None) -> (logits float32, cache):
        tokens stand at position, position + 1, ... of each row; with `last` only the logits at that index
        of each row are computed ([B, 1, V]).
    init_cache(batch, length, dtype=float32) -> an empty cache.
    params: nested dict with string keys ("layers" -> "0" -> "attention" -> "query" -> "kernel"); leaves are
        arrays, or Lazy handles.
    source: fingerprint of the files that the model was read from, JSON-ready.
    """

    config: ModelConfig
    params: Any = field(repr=False)
    apply: Callable[..., Float[Array, "B T V"]] = field(repr=False)
    decode: Callable[..., tuple[Float[Array, "B L V"], Cache]] = field(repr=False)
    init_cache: Callable[..., Cache] = field(repr=False)
    source: dict[str, Any]
    later: Later = field(repr=False)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, read at first use; None when the source has none."""
        return self.later.get()

    def replace(self, **changes: Any) -> Model:
        """A copy with some fields changed, e.g. model.replace(params=...)."""
        return dataclasses.replace(self, **changes)


def build(config: ModelConfig, params: Any, tokenizer: Any = None, source: dict[str, Any] | None = None) -> Model:
    """Puts a Model together. tokenizer: a transformers tokenizer, a Later that makes one, or None."""
    apply, decode, init_cache = _functions(config)
    return Model(
        config=config,
        params=params,
        apply=apply,
        decode=decode,
        init_cache=init_cache,
        source=dict(source or {}),
        later=tokenizer if isinstance(tokenizer, Later) else Later(lambda: tokenizer),
    )


def family_file(config: ModelConfig) -> ModuleType:
    """The file that implements config.family."""
    for module in FILES:
        if config.family in module.FAMILIES.values():
            return module
    raise JaxqError(f"unknown model family {config.family!r}")


def hf_family(model_type: Any) -> ModuleType:
    """The file that reads a Hugging Face model_type. Errors: JaxqError that lists what is supported."""
    for module in FILES:
        if model_type in module.FAMILIES:
            return module
    known = ", ".join(sorted(name for module in FILES for name in module.FAMILIES))
    raise JaxqError(f"model_type {model_type!r} is not supported; jaxq knows {known}")


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter pytree as ShapeDtypeStructs, every leaf in dtype; nothing is computed."""
    # Layers have the same shapes in every family, so one is traced and the rest are copies of it.
    decoder = family_file(config).Decoder(dataclasses.replace(config, windows=config.windows[:1]))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["params"]
    layer = shapes["layers"]["0"]
    tree = {**shapes, "layers": {str(i): layer for i in range(config.layers)}}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def init_params(
    config: ModelConfig, seed: int = 0, dtype: Any = jnp.float32, scale: float = 0.02
) -> dict[str, Any]:
    """Random, for tests and benchmarks: matrices and biases of deviation `scale`, norms near 1."""

    def draw(i: int, keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        # numpy, since drawing with jax.random would compile a program for every shape.
        x = np.random.default_rng((seed, i)).standard_normal(leaf.shape, np.float32)
        x = 1.0 + 0.1 * x if keys[-1].key == "scale" else scale * x
        return jnp.asarray(x.astype(leaf.dtype))

    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype))
    return jax.tree.unflatten(tree, [draw(i, *leaf) for i, leaf in enumerate(leaves)])


@functools.cache
def _functions(config: ModelConfig) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    # Equal configs give the very same functions, so that jit does not compile a reloaded model again.
    return tuple(functools.partial(fn, config) for fn in (_apply, _decode, _init_cache))  # type: ignore


def _apply(config: ModelConfig, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    logits, _ = family_file(config).Decoder(config).apply({"params": params}, tokens)
    return logits


def _decode(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "B T"],
    cache: Cache,
    position: Int[Array, "#B"],
    last: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B L V"], Cache]:
    return family_file(config).Decoder(config).apply({"params": params}, tokens, cache, position, last)


def _init_cache(config: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    empty = jnp.zeros((batch, length, config.kv_heads, config.head_dim), dtype)
    return tuple(KV(empty, empty) for _ in config.windows)
