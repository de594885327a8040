"""Perplexity of a language model on windows of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxq import tracing
from jaxq.data import windows as windows
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.stages import Stage, run, stages

_LOGITS = 1 << 28  # bytes of float32 logits that one batch may hold


@jax.jit
def token_nll(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """Negative log-likelihood (float32, natural logarithm) of each token after the first."""
    logits = logits[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@functools.lru_cache(maxsize=4)
def _pieces(apply: Callable[..., Any], tree: Any, shapes: tuple[Any, ...], batch: tuple[int, int]) -> list[Stage]:
    """The model's stages, kept so that evaluating again does not compile again."""
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*s) for s in shapes])
    return stages(apply, params, jax.ShapeDtypeStruct(batch, jnp.int32))


def perplexity(
    apply: Callable[[Any, Array], Array],
    params: Any,
    windows: Int[np.ndarray, "N T"],
    *,
    batch: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float | int]:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    apply: (params, tokens [B, T]) -> logits [B, T, V]. It runs stage by stage, so that equal layers compile once
    and are kept compiled for the next call with the same function.
    params: leaves may be quantized, or handles that are read when their stage comes.
    batch: windows at a time; None takes as many as keep the logits within 256 MiB, at most 8.
    progress: called with (windows done, windows, perplexity so far).
    Returns {"perplexity": float, "tokens": how many were scored}. Raises `JaxqError` for windows that cannot
    be scored: none at all, shorter than two tokens, or with token ids that the model does not have.
    """
    tokens = np.asarray(windows, np.int32)
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise JaxqError(f"perplexity needs windows of at least 2 tokens, (count, length); got {tokens.shape}")
    count, length = tokens.shape
    leaves, tree = jax.tree.flatten(params, is_leaf=is_quantized)
    shapes = tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in leaves)
    one = _pieces(apply, tree, shapes, (1, length))
    vocab = one[-1].program.output_avals[-1].shape[-1]
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise JaxqError(
            f"token ids run from {tokens.min()} to {tokens.max()}, the model has {vocab}: "
            "use the model's own tokenizer"
        )
    fits = max(1, min(8, _LOGITS // (4 * vocab * length)))
    step = min(count, fits if batch is None else batch)
    if step < 1:
        raise JaxqError(f"a batch needs at least 1 window, got {batch}")
    pieces = _pieces(apply, tree, shapes, (step, length))
    flat = tracing.flatten(params)
    total, scored = 0.0, 0
    for start in range(0, count, step):
        rows = tokens[start : start + step]
        # The last batch is filled up so that it has the shape that was compiled.
        full = np.resize(rows, (step, length))
        nll = token_nll(run(pieces, flat, full), full)
        total += float(np.asarray(nll, np.float64)[: len(rows)].sum())
        scored += rows.size - len(rows)
        if progress is not None:
            progress(start + len(rows), count, float(np.exp(total / scored)))
    return {"perplexity": float(np.exp(total / scored)), "tokens": scored}
