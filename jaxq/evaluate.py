"""Perplexity of a language model on windows of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxq.data import windows as windows
from jaxq.errors import JaxqError

_LOGITS = 1 << 28  # bytes of float32 logits that one batch may hold


@functools.partial(jax.jit, static_argnums=0)
def token_nll(
    apply: Callable[[Any, Array], Array], params: Any, tokens: Int[Array, "B T"]
) -> Float[Array, "B T-1"]:
    """Negative log-likelihood (float32, natural logarithm) of each token after the first."""
    logits = apply(params, tokens)[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def perplexity(
    apply: Callable[[Any, Array], Array],
    params: Any,
    windows: Int[np.ndarray, "N T"],
    *,
    batch: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float | int]:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    apply: (params, tokens [B, T]) -> logits [B, T, V]; wrap it with `jaxq.quantized` for quantized leaves. It
    is compiled once (pass the same object again to keep that), and the logits stay inside the compiled
    function.
    batch: windows at a time; None takes as many as keep the logits within 256 MiB, at most 8.
    progress: called with (windows done, windows, perplexity so far).
    Returns {"perplexity": float, "tokens": how many were scored}. Raises `JaxqError` for windows that cannot
    be scored: none at all, shorter than two tokens, or with token ids that the model does not have.
    """
    tokens = np.asarray(windows, np.int32)
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise JaxqError(f"perplexity needs windows of at least 2 tokens, (count, length); got {tokens.shape}")
    count, length = tokens.shape
    params = jax.tree.map(jnp.asarray, params)
    one = jax.ShapeDtypeStruct((1, length), jnp.int32)
    vocab = jax.eval_shape(apply, params, one).shape[-1]
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise JaxqError(
            f"token ids run from {tokens.min()} to {tokens.max()}, the model has {vocab}: "
            "use the model's own tokenizer"
        )
    fits = max(1, min(8, _LOGITS // (4 * vocab * length)))
    step = min(count, fits if batch is None else batch)
    if step < 1:
        raise JaxqError(f"a batch needs at least 1 window, got {batch}")
    total, scored = 0.0, 0
    for start in range(0, count, step):
        rows = tokens[start : start + step]
        # The last batch is filled up so that it has the shape that was compiled.
        full = np.resize(rows, (step, length))
        total += float(np.asarray(token_nll(apply, params, full), np.float64)[: len(rows)].sum())
        scored += rows.size - len(rows)
        if progress is not None:
            progress(start + len(rows), count, float(np.exp(total / scored)))
    return {"perplexity": float(np.exp(total / scored)), "tokens": scored}
