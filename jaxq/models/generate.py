"""Text generation with a static key-value cache: prefill and the whole decoding loop are one jitted program.

Prompts of different length share a batch: rows are right-padded and slot s of the cache holds position s of
its row. What padding writes behind a prompt is overwritten by generated tokens before any query may see it,
so padding changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxq.errors import JaxqError
from jaxq.models.model import Model

_BUCKET = 32  # prompts are padded to a multiple of it, so that a program serves prompts of similar length


class Generation(NamedTuple):
    """tokens: the new tokens of each row, then pad; lengths: how many are real, the end token included."""

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]

    def rows(self) -> list[list[int]]:
        """The new tokens of each row as a list, without padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths, strict=True)]


class Rules(NamedTuple):
    """When to stop, what to fill with, how hot to sample."""

    ends: Int[np.ndarray, " K"]
    pad: Int[Array, ""] | np.int32
    temperature: Float[Array, ""] | np.float32


def keep(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The default transform: run the model as it is."""
    return fn


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]] | Int[Array, "B T"] | Int[np.ndarray, "B T"],
    *,
    max_new_tokens: int = 64,
    mask: Bool[np.ndarray, "B T"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: Sequence[int] | None = None,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]] = keep,
) -> Generation:
    """Continues each prompt until an end token or max_new_tokens.

    prompts: lists of token ids of any length, or an array (B, T) with mask (B, T), True where a token is
    real (left- or right-padded).
    temperature: 0 is greedy; else logits are divided by it, cut to the top_k highest and to the smallest set
    of probability top_p (Holtzman et al. 2020), and sampled: the same seed gives the same tokens.
    eos: end tokens, those of the config unless given; () never ends early.
    transform: wraps model.decode, e.g. transform=jaxq.quantized for params with quantized leaves. Pass the
    same function each time: it is part of the key under which the compiled program is kept.
    Errors: JaxqError for an empty prompt or settings out of range.
    """
    tokens, lengths = pad_prompts(prompts, mask)
    if max_new_tokens < 1:
        raise JaxqError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not temperature >= 0:
        raise JaxqError(f"temperature must be 0 (greedy) or positive, not {temperature}")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        raise JaxqError(f"top_k must lie between 1 and {model.config.vocab_size} (the vocabulary), not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise JaxqError(f"top_p must lie in (0, 1], not {top_p}")
    ends = model.config.eos if eos is None else tuple(int(token) for token in eos)
    pad = model.config.pad if model.config.pad is not None else (ends[0] if ends else 0)
    run = _generator(model.decode, model.init_cache, transform, max_new_tokens, temperature > 0, top_k, top_p)
    # Arguments of the program, not constants of it: other end tokens or temperatures do not compile again.
    rules = Rules(np.asarray(ends or (-1,), np.int32), np.int32(pad), np.float32(temperature or 1.0))
    out, counts = run(params, tokens, lengths, jax.random.key(seed), rules)
    return Generation(np.asarray(out), np.asarray(counts))


def pad_prompts(prompts: Any, mask: Any = None) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Right-padded tokens (T a multiple of 32) and the length of each row."""
    if mask is not None:
        mask = np.asarray(mask, bool)
        if mask.shape != np.shape(prompts):
            raise JaxqError(f"mask has shape {mask.shape}, prompts have {np.shape(prompts)}")
        rows = [np.asarray(row)[real] for row, real in zip(prompts, mask, strict=True)]
    else:
        rows = [np.asarray(row) for row in prompts]
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        raise JaxqError("every prompt needs at least one token")
    lengths = np.array([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), -(-int(lengths.max()) // _BUCKET) * _BUCKET), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths


def sample(
    logits: Float[Array, "B V"], key: Array, temperature: Array, top_k: int | None, top_p: float | None
) -> Int[Array, " B"]:
    """One token a row from softmax(logits / temperature), cut to top_k and the nucleus top_p; a key a row."""
    logits = logits / temperature
    if top_k is not None:
        lowest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        lowest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _embedding(params: Any) -> Any:
    """The embedding, of parameters that may stand beside quantizers of activations (`jaxq.Activated`)."""
    return getattr(params, "params", params)["embed"]["embedding"]


@functools.lru_cache(maxsize=16)
def _generator(
    decode: Callable[..., Any],
    init_cache: Callable[..., Any],
    transform: Callable[..., Any],
    steps: int,
    sampled: bool,
    top_k: int | None,
    top_p: float | None,
) -> Callable[..., tuple[Array, Array]]:
    """The jitted program (params, tokens, lengths, key, rules) -> (new tokens, their number)."""
    decode = transform(decode)

    def choose(logits: Array, key: Array, step: Array, temperature: Any) -> Array:
        if not sampled:
            return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        return sample(logits[:, 0], jax.random.fold_in(key, step), temperature, top_k, top_p)

    @jax.jit
    def run(params: Any, tokens: Array, lengths: Array, key: Array, rules: Rules) -> tuple[Array, Array]:
        batch, width = tokens.shape

        def is_end(token: Array) -> Array:
            return jnp.any(token[:, None] == rules.ends, axis=1)

        cache = init_cache(batch, width + steps, _embedding(params).dtype)
        logits, cache = decode(params, tokens, cache, jnp.zeros_like(lengths), lengths - 1)
        token = choose(logits, key, jnp.int32(0), rules.temperature)
        out = jnp.full((batch, steps), rules.pad).at[:, 0].set(token)

        def unfinished(state: tuple[Array, ...]) -> Array:
            step, done = state[0], state[2]
            return (step < steps) & ~jnp.all(done)

        def advance(state: Any) -> Any:
            step, token, done, out, counts, cache = state
            last = jnp.zeros_like(lengths)
            logits, cache = decode(params, token[:, None], cache, lengths + step - 1, last)
            token = jnp.where(done, rules.pad, choose(logits, key, step, rules.temperature))
            counts = counts + ~done
            return step + 1, token, done | is_end(token), out.at[:, step].set(token), counts, cache

        done, counts = is_end(token), jnp.ones(batch, jnp.int32)
        state = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), token, done, out, counts, cache))
        return state[3], state[4]

    return run
