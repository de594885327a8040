"""Perplexity of a language model on windows of tokens; accuracy of a classifier on labelled images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxq.data import windows as windows
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.stages import Stage, run, stages

_LOGITS = 1 << 28  # bytes of float32 logits that one batch may hold
_PIXELS = 1 << 23  # bytes of prepared images that one batch may hold


@jax.jit
def token_nll(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """Negative log-likelihood (float32, natural logarithm) of each token after the first."""
    logits = logits[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _pieces(apply: Callable[..., Any], params: Any, shape: tuple[int, ...], dtype: Any) -> list[Stage]:
    """The model's stages for input of this shape, kept so that evaluating again does not compile again."""
    leaves, tree = jax.tree.flatten(params, is_leaf=is_quantized)
    shapes = tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in leaves)
    # The precision is written into the products when they are traced.
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return _traced(apply, tree, shapes, shape, dtype, precision)


@functools.lru_cache(maxsize=4)
def _traced(
    apply: Callable[..., Any],
    tree: Any,
    shapes: tuple[Any, ...],
    shape: tuple[int, ...],
    dtype: Any,
    precision: str | None,
) -> list[Stage]:
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*s) for s in shapes])
    return stages(apply, params, jax.ShapeDtypeStruct(shape, dtype))


def perplexity(
    apply: Callable[[Any, Array], Array],
    params: Any,
    windows: Int[np.ndarray, "N T"],
    *,
    batch: int | None = None,
    integer: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float | int]:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    apply: (params, tokens [B, T]) -> logits [B, T, V]. It runs stage by stage, so that equal layers compile once
    and are kept compiled for the next call with the same function.
    params: leaves may be quantized, or handles that are read when their stage comes.
    batch: windows at a time; None takes as many as keep the logits within 256 MiB, at most 8.
    integer: products of codes where both operands have them, see `jaxq.quantized`.
    progress: called with (windows done, windows, perplexity so far).
    Returns {"perplexity": float, "tokens": how many were scored}. Raises `JaxqError` for windows that cannot
    be scored: none at all, shorter than two tokens, or with token ids that the model does not have.
    """
    tokens = np.asarray(windows, np.int32)
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise JaxqError(f"perplexity needs windows of at least 2 tokens, (count, length); got {tokens.shape}")
    count, length = tokens.shape
    one = _pieces(apply, params, (1, length), jnp.int32)
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
    pieces = _pieces(apply, params, (step, length), jnp.int32)
    total, scored = 0.0, 0
    for start in range(0, count, step):
        rows = tokens[start : start + step]
        # The last batch is filled up so that it has the shape that was compiled.
        full = np.resize(rows, (step, length))
        nll = token_nll(run(pieces, params, full, integer=integer), full)
        total += float(np.asarray(nll, np.float64)[: len(rows)].sum())
        scored += rows.size - len(rows)
        if progress is not None:
            progress(start + len(rows), count, float(np.exp(total / scored)))
    return {"perplexity": float(np.exp(total / scored)), "tokens": scored}


def top1(
    apply: Callable[[Any, Array], Array],
    params: Any,
    images: Shaped[np.ndarray, "N H W C"],
    labels: Int[np.ndarray, " N"],
    *,
    batch: int | None = None,
    prepare: Callable[[Any], Float[np.ndarray, "B h w c"]] | None = None,
    integer: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float | int]:
    """The percentage of images whose largest logit is that of their label; the first one, among equals.

    apply: (params, images [B, h, w, c] float32) -> logits [B, classes]. It runs stage by stage like `perplexity`.
    params: leaves may be quantized, or handles that are read when their stage comes.
    images: as `apply` takes them, or anything that `prepare` turns into that, a batch at a time.
    batch: images at a time; None takes as many as keep the prepared ones within 8 MiB, at most 256.
    integer: products of codes where both operands have them, see `jaxq.quantized`.
    progress: called with (images done, images, percentage so far).
    Returns {"top1": percentage, "images": how many were scored}. Raises `JaxqError` for images that cannot be
    scored: none at all, not as many as labels, or with labels that the model does not have.
    """
    prepare = prepare or (lambda rows: np.asarray(rows, np.float32))
    labels, count = np.asarray(labels), len(labels)
    if count == 0 or len(images) != count:
        raise JaxqError(f"top1 needs a label for each image and one image at least; got {len(images)} and {count}")
    shape = prepare(images[:1]).shape[1:]
    classes = _pieces(apply, params, (1, *shape), jnp.float32)[-1].program.output_avals[-1].shape[-1]
    if np.min(labels) < 0 or np.max(labels) >= classes:
        raise JaxqError(
            f"labels run from {np.min(labels)} to {np.max(labels)}, the model has {classes} classes: "
            "it was made for other data"
        )
    fits = max(1, min(256, _PIXELS // (4 * math.prod(shape))))
    step = min(count, fits if batch is None else batch)
    if step < 1:
        raise JaxqError(f"a batch needs at least 1 image, got {batch}")
    pieces = _pieces(apply, params, (step, *shape), jnp.float32)
    right = 0
    for start in range(0, count, step):
        rows = prepare(images[start : start + step])
        # The last batch is filled up so that it has the shape that was compiled.
        logits = run(pieces, params, np.resize(rows, (step, *shape)), integer=integer)
        wanted = labels[start : start + step]
        right += int((np.argmax(np.asarray(logits[: len(rows)]), axis=-1) == wanted).sum())
        if progress is not None:
            done = start + len(rows)
            progress(done, count, 100 * right / done)
    return {"top1": 100 * right / count, "images": count}
