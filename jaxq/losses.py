"""Losses whose gradients say which weights matter. Each gives one number for a sequence, `(sequences,)`.

Any function `loss(output, *args)` does, the arguments being those of the quantized function; for labels that the
function does not take, see `targets` of `jaxq.quantize`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_token(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, weights: Float[Array, "B T"] | None = None
) -> Float[Array, " B"]:
    """Mean cross entropy of the tokens after the first, float32, natural logarithm.

    weights: a token of weight 0 (padding) is not predicted; others count so many times.
    """
    nll = _cross_entropy(logits[:, :-1], tokens[:, 1:])
    if weights is None:
        return nll.mean(axis=-1)
    w = weights[:, 1:].astype(jnp.float32)
    return jnp.sum(jnp.where(w != 0, nll, 0.0) * w, axis=-1) / jnp.maximum(jnp.sum(w, axis=-1), 1.0)


def sampled_next_token(key: jax.Array) -> Any:
    """`next_token` with tokens that the model itself would draw: for the true Fisher in place of the empirical.

    That is the second derivative of the KL divergence from the float model, where the divergence's own gradient is
    0.
    """

    def loss(logits: Array, *_: Any, weights: Any = None) -> Array:
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits[:, :-1].astype(jnp.float32)))
        tokens = jnp.concatenate([drawn[:, :1], drawn], axis=1)
        return next_token(logits, tokens, weights=weights)

    return loss


def classification(logits: Float[Array, "B K"], *args: Any, weights: Any = None) -> Float[Array, " B"]:
    """Cross entropy with the labels, the last of the arguments (`targets` of `jaxq.quantize`)."""
    return _cross_entropy(logits, args[-1])


def _cross_entropy(logits: Array, labels: Array) -> Array:
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
