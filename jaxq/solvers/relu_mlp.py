"""An MLP with GELU, trained to be one with ReLU and few large activations, which quantize better.

The MLP reconstruction of APHQ-ViT (Wu et al. 2025, arXiv 2504.02508; the code where equation 12 differs).
With A = ReLU(fc1 X) and a fixed bound u, the error is that of fc2 A plus alpha times that of fc2 min(A, u), both
against the original output and weighted by its importance. The bound stands in the loss only: nothing clamps
afterwards. What is clamped gets no gradient from the second term, which is why the first one stays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from jaxq.errors import JaxqError
from jaxq.solvers.reconstruct import Data, Settings, reconstruct, reconstruct_together

#: Hidden activations at a time, when the bound is sought: 64 MiB of them, a few times.
CHUNK = 2**24

#: Values of half a float32.
HALVES = 2**16


class MLPWeights(NamedTuple):
    """y = fc2(activation(fc1(x))); kernels are (in, out)."""

    fc1_kernel: Float[Array, "E F"]
    fc1_bias: Float[Array, " F"]
    fc2_kernel: Float[Array, "F E"]
    fc2_bias: Float[Array, " E"]


class Problem(NamedTuple):
    """One MLP to be fitted, ready for `reconstruct`: members in float32."""

    weights: MLPWeights
    fixed: dict[str, Array]
    data: Data


def problem(
    kernels: MLPWeights,
    inputs: Float[Array, "N *tokens E"],
    targets: Float[Array, "N *tokens E"],
    importance: Float[Array, "*tokens E"] | None = None,
    *,
    percentile: float = 0.99,
    alpha: float = 2.0,
) -> Problem:
    """What `fit_together` takes of each MLP. Arguments and errors as of `fit`."""
    _check(kernels, inputs, targets, importance)
    own = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), kernels)
    fixed = {
        "importance": normalized(jnp.ones(inputs.shape[1:]) if importance is None else importance),
        "bound": jnp.float32(bound(own, inputs, percentile)),
        "alpha": jnp.float32(alpha),
    }
    return Problem(own, fixed, Data(jnp.asarray(inputs, jnp.float32), None, jnp.asarray(targets, jnp.float32)))


def fit(
    kernels: MLPWeights,
    inputs: Float[Array, "N *tokens E"],
    targets: Float[Array, "N *tokens E"],
    importance: Float[Array, "*tokens E"] | None = None,
    *,
    percentile: float = 0.99,
    alpha: float = 2.0,
    iterations: int = 20000,
    batch: int = 32,
    rate: float = 4e-5,
    key: Key[Array, ""] | None = None,
    progress: Callable[[int, float], None] | None = None,
    chunk: int = 500,
) -> tuple[MLPWeights, list[float]]:
    """Weights of the ReLU MLP, starting from those of the GELU MLP, and the mean error of each chunk of steps.

    Equal shapes share one compilation.

    Args:
        kernels: of the original MLP, any float dtype; they are trained in float32 and given back in their own.
        inputs: of fc1 in the original network.
        targets: the original MLP's outputs for them.
        importance: weight of each element's squared error, scaled here to root mean square 1; None weighs all
            alike.
        percentile: of the positive GELU outputs of the original MLP, which is the bound u. The paper's code has
            0.99 for 3 bits, and 0.98 for 2 and 4.
        alpha: weight of the clamped term.
        iterations, batch, rate, key, progress, chunk: as in `reconstruct`; Adam, whose rate falls along a cosine.

    Raises JaxqError for shapes that do not fit, an importance that is nowhere positive, a percentile outside
    (0, 1], an MLP without a positive activation, and whatever `reconstruct` raises for. Time: that of
    `reconstruct`, and two passes through fc1 for u.
    """
    weights, fixed, data = problem(kernels, inputs, targets, importance, percentile=percentile, alpha=alpha)
    settings = _settings(iterations, batch, rate, chunk)
    found = reconstruct(run, error, None, {"weights": weights}, fixed, data, settings, key=key, progress=progress)
    return jax.tree.map(lambda x, given: x.astype(given.dtype), found.trained["weights"], kernels), found.errors


def fit_together(
    problems: Sequence[Problem],
    *,
    iterations: int = 20000,
    batch: int = 32,
    rate: float = 4e-5,
    keys: Key[Array, " problems"],
    progress: Callable[[int, float], None] | None = None,
    chunk: int = 500,
) -> tuple[list[MLPWeights], list[float]]:
    """`fit` of several MLPs of one shape side by side, a key each: weights in float32, and mean errors of all."""
    weights, fixed, data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    settings = _settings(iterations, batch, rate, chunk)
    found = reconstruct_together(
        run, error, None, {"weights": weights}, fixed, data, settings, keys=keys, progress=progress
    )
    new = found.trained["weights"]
    return [jax.tree.map(lambda x, n=n: x[n], new) for n in range(len(problems))], found.errors


def _settings(iterations: int, batch: int, rate: float, chunk: int) -> Settings:
    return Settings(
        iterations=iterations,
        batch=batch,
        rates=(("weights", rate),),
        cosine=("weights",),
        mixed=1.0,
        scale=None,
        chunk=chunk,
    )


def run(
    trained: dict[str, MLPWeights], fixed: dict[str, Array], inputs: Float[Array, "batch *tokens E"], key: Any
) -> tuple[Float[Array, "batch *tokens E"], Float[Array, "batch *tokens E"]]:
    """Outputs with ReLU, and with its activations clamped to the bound; `key` is not used."""
    weights = trained["weights"]
    hidden = jax.nn.relu(inputs @ weights.fc1_kernel + weights.fc1_bias)
    limited = clamped(hidden, fixed["bound"])
    return hidden @ weights.fc2_kernel + weights.fc2_bias, limited @ weights.fc2_kernel + weights.fc2_bias


def error(outputs: tuple[Array, Array], targets: Array, fixed: dict[str, Array]) -> Float[Array, ""]:
    """Weighted squares, summed over tokens, averaged over batch and channels, over 10: as in the paper's code."""
    direct, limited = (jnp.square(x - targets) for x in outputs)
    weighted = (direct + fixed["alpha"] * limited) * fixed["importance"]
    return jnp.sum(weighted) / (10 * weighted.shape[0] * weighted.shape[-1])


def clamped(x: Float[Array, "*shape"], most: Float[Array, ""]) -> Float[Array, "*shape"]:
    """min(x, most); the derivative is 1 up to the bound and on it (as in torch), 0 above."""
    return jnp.where(x > most, most, x)


def normalized(importance: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Of root mean square 1, float32.

    Raises JaxqError where that cannot be.
    """
    scaled = jnp.asarray(importance, jnp.float32)
    # The squares of a divergence's gradients may be less than float32 has.
    scaled = scaled / jnp.where(jnp.max(scaled) > 0, jnp.max(scaled), 1.0)
    size = jnp.sqrt(jnp.mean(jnp.square(scaled)))
    if not (jnp.isfinite(size) and size > 0 and jnp.min(scaled) >= 0):
        raise JaxqError("an importance is finite, not negative, and positive somewhere: leave it out otherwise")
    return scaled / size


def bound(kernels: MLPWeights, inputs: Float[Array, "N *tokens E"], percentile: float) -> float:
    """The percentile of the strictly positive values of GELU(fc1 x): element ceil(count p) - 1 of them, sorted.

    Exact whatever their number: positive float32 numbers are ordered as their bits, so one pass counts the upper
    halves of the bits, and a second one the lower halves of those whose upper half is the right one. GELU is the
    exact one, by erf. Memory: a few times `CHUNK` activations, or those of one example if they are more.

    Raises JaxqError for a percentile outside (0, 1] and if no value is positive.
    """
    if not 0 < percentile <= 1:
        raise JaxqError(f"a percentile is in (0, 1], not {percentile!r}")
    upper = _counts(kernels, inputs, -1)
    count = int(upper.sum())
    if not count:
        raise JaxqError("no activation of the MLP is positive: there is no bound to clamp at")
    rank = math.ceil(count * percentile) - 1
    half, rest = _find(upper, rank)
    low, _ = _find(_counts(kernels, inputs, half), rest)
    return float(np.uint32(half * HALVES + low).view(np.float32))


def _find(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin of the element `rank`, and its rank there."""
    below = np.cumsum(counts)
    found = int(np.searchsorted(below, rank, side="right"))
    return found, rank - int(below[found] - counts[found])


def _counts(kernels: MLPWeights, inputs: Array, half: int) -> np.ndarray:
    """How many positive activations have each upper half; or each lower one, if the upper one is `half`."""
    examples = inputs.shape[0]
    size = math.prod(inputs.shape[1:-1]) * kernels.fc1_kernel.shape[-1]
    step = max(1, min(examples, CHUNK // max(size, 1)))
    total = np.zeros(HALVES, np.int64)
    for start in range(0, examples, step):
        total += np.asarray(_histogram(kernels, inputs, start, half, step), np.int64)
    return total


@functools.partial(jax.jit, static_argnames="step")
def _histogram(kernels: MLPWeights, inputs: Array, start: Any, half: Any, step: int) -> UInt32[Array, " 65536"]:
    """Counts over examples start..start + step; the last chunk leaves out those that an earlier one has."""
    begin = jnp.minimum(start, inputs.shape[0] - step)
    x = jax.lax.dynamic_slice_in_dim(inputs, begin, step).astype(jnp.float32)
    y = jnp.matmul(x, kernels.fc1_kernel, precision="highest") + kernels.fc1_bias
    y = jax.nn.gelu(y, approximate=False)
    fresh = (begin + jnp.arange(step) >= start).reshape((-1,) + (1,) * (y.ndim - 1))
    bits = jax.lax.bitcast_convert_type(y, jnp.uint32)
    upper, lower = (bits // HALVES).astype(jnp.int32), (bits % HALVES).astype(jnp.int32)
    chosen = fresh & (y > 0) & ((half < 0) | (upper == half))
    bins = jnp.where(chosen, jnp.where(half < 0, upper, lower), HALVES)
    return jnp.zeros(HALVES, jnp.uint32).at[bins.ravel()].add(1, mode="drop")


def _check(kernels: MLPWeights, inputs: Array, targets: Array, importance: Array | None) -> None:
    width, hidden = kernels.fc1_kernel.shape
    shapes = tuple(leaf.shape for leaf in kernels)
    if shapes != ((width, hidden), (hidden,), (hidden, width), (width,)):
        raise JaxqError(f"weights of shapes {shapes} are not those of an MLP; kernels are (in, out)")
    if inputs.shape != targets.shape or inputs.shape[-1] != width:
        raise JaxqError(f"inputs {inputs.shape} and targets {targets.shape} are not both (N, ..., {width})")
    if importance is not None and importance.shape != inputs.shape[1:]:
        raise JaxqError(f"an importance of shape {importance.shape} is not one for {inputs.shape[1:]}")
