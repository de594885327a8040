"""Takes a model's weights off the grid that an earlier quantization left them on, keeping its function.

Weights that were published at 4 bits make round-to-nearest on the same grid look lossless. Two equivalences
move them off it: gains of the norms go into the projections that follow, and the residual stream is rotated.
The rotation mixes only four channels at a time, of similar size, so that outlier channels stay what they
are: a full rotation would make the model easier to quantize than a natural one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxq.errors import JaxqError
from jaxq.models.config import ModelConfig
from jaxq.models.lazy import Lazy

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_BLOCK = 4
_COLUMNS = 4096


def off_grid(params: dict[str, Any], config: ModelConfig, seed: int = 0) -> tuple[dict[str, Any], ModelConfig]:
    """The same function with rotated weights, unit norm gains and an untied head.

    With Q orthogonal and g the gain of the norm before a projection W (in, out): W -> Q^T diag(g) W; for
    projections into the residual stream W -> W Q; for the embedding E -> E Q. Q is block-diagonal with random
    orthogonal 4x4 blocks over the channels sorted by the embedding's root mean square. Computed in float64,
    rounded to each leaf's dtype. Leaves may be arrays or Lazy, and stay so. Deterministic in seed.

    Raises `JaxqError` for families whose norms do not commute with a rotation (Gemma's, which also have norms
    after the projections) and for a width that is not a multiple of 4.
    """
    if config.family not in _FAMILIES:
        raise JaxqError(f"off_grid knows {', '.join(_FAMILIES)}, not {config.family}")
    if config.hidden_size % _BLOCK:
        raise JaxqError(f"off_grid needs a width that is a multiple of {_BLOCK}, not {config.hidden_size}")
    embedding = params["embed"]["embedding"]

    @functools.cache
    def turn() -> tuple[Int[np.ndarray, "n 4"], Float[np.ndarray, "n 4 4"]]:
        return rotation(np.asarray(embedding), seed)

    def into(leaf: Any) -> Any:  # (..., hidden) -> leaf Q
        return _lazily(lambda w: turn_rows(w.T, None, *turn()).T, leaf)

    def outof(leaf: Any, gain: Any) -> Any:  # (hidden, out) -> Q^T diag(gain) leaf
        return _lazily(lambda w, g: turn_rows(w, g, *turn()), leaf, gain)

    def block(layer: dict[str, Any]) -> dict[str, Any]:
        attention, mlp = layer["attention"], layer["mlp"]
        first, second = layer["attention_norm"]["scale"], layer["mlp_norm"]["scale"]
        reads = ("query", "key", "value")
        ins = {name: _with(attention[name], kernel=lambda w: outof(w, first)) for name in reads}
        ups = {name: _with(mlp[name], kernel=lambda w: outof(w, second)) for name in ("gate", "up")}
        return {
            **layer,
            "attention": {**attention, **ins, "output": _with(attention["output"], kernel=into, bias=into)},
            "mlp": {**mlp, **ups, "down": _with(mlp["down"], kernel=into, bias=into)},
            "attention_norm": {"scale": _ones(first)},
            "mlp_norm": {"scale": _ones(second)},
        }

    final = params["norm"]["scale"]
    head = params["head"]["kernel"] if "head" in params else _lazily(np.transpose, embedding)
    moved = {
        **params,
        "embed": {"embedding": into(embedding)},
        "layers": {name: block(layer) for name, layer in params["layers"].items()},
        "norm": {"scale": _ones(final)},
        "head": {"kernel": outof(head, final)},
    }
    return moved, dataclasses.replace(config, tied=False)


def rotation(
    embedding: Float[np.ndarray, "vocab hidden"], seed: int
) -> tuple[Int[np.ndarray, "n 4"], Float[np.ndarray, "n 4 4"]]:
    """(channels of each block, orthogonal blocks): channels by root mean square, largest first; float64."""
    power = np.mean(np.square(embedding, dtype=np.float64), axis=0)
    order = np.argsort(-power, kind="stable").reshape(-1, _BLOCK)
    draws = np.random.default_rng(seed).standard_normal((len(order), _BLOCK, _BLOCK))
    q, r = np.linalg.qr(draws)
    # The signs make the blocks uniform over the orthogonal group (Mezzadri 2007).
    return order, q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None, :]


def turn_rows(
    w: Float[np.ndarray, "hidden ..."],
    gain: Float[np.ndarray, " hidden"] | None,
    channels: Int[np.ndarray, "n 4"],
    blocks: Float[np.ndarray, "n 4 4"],
) -> Float[np.ndarray, "hidden ..."]:
    """Q^T diag(gain) w, in float64, rounded to the dtype of w."""
    mix = blocks.swapaxes(-1, -2)
    if gain is not None:
        mix = mix * gain[channels].astype(np.float64)[:, None, :]
    columns = w.reshape(len(w), -1)
    turned = np.empty(columns.shape, w.dtype)
    # Some columns at a time, so that float64 never holds a whole embedding.
    for start in range(0, columns.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        turned[channels, part] = mix @ columns[:, part][channels].astype(np.float64)
    return turned.reshape(w.shape)


def _with(leaves: dict[str, Any], **changes: Callable[[Any], Any]) -> dict[str, Any]:
    """The dict with functions applied to those of its leaves that are named."""
    return {name: changes.get(name, lambda leaf: leaf)(leaf) for name, leaf in leaves.items()}


def _ones(leaf: Any) -> Any:
    return _lazily(np.ones_like, leaf)


def _lazily(fn: Callable[..., np.ndarray], *leaves: Any) -> Any:
    """fn of the leaves, in the dtype of the first; Lazy if that is Lazy, computed at each read."""

    def compute() -> np.ndarray:
        return fn(*(np.asarray(leaf) for leaf in leaves))

    first = leaves[0]
    if not isinstance(first, Lazy):
        return compute()
    return Lazy(first.shape[::-1] if fn is np.transpose else first.shape, first.dtype, compute)
