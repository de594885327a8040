"""How much each element of a named activation matters to a classifier: diagonals of the Gauss-Newton matrix.

For logits z = f(O), p = softmax(z / T) and J = dz / dO, the divergence KL(p || softmax(f(O + d) / T)) is
d^T G d / 2 to second order, with G = J^T (diag p - p p^T) J / T^2. APHQ-ViT (Wu et al. 2025, arXiv 2504.02508)
weighs the error of a block's output by a "perturbation Hessian", averaged over images. Its probe, a shift of all
elements at once, gives the row sums of G, which are exactly zero in a network that normalizes its residual stream:
what its code averages is rounding noise pushed back through the network. The estimators here give G's diagonal
itself, or its root, from one backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxq.errors import JaxqError
from jaxq.names import Activated, activations
from jaxq.quantized import quantized

ESTIMATORS = ("sampled_fisher", "gaussian", "exact", "row_sum", "finite_difference")
REDUCTIONS = ("mean_abs", "mean_sq", "signed_mean", "per_sample")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Shift:
    """A probe: adds what it holds to an activation, in the activation's dtype."""

    by: Array

    def __call__(self, x: Array) -> Array:
        return x + self.by.astype(x.dtype)


def importance(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    paths: Sequence[str] | None = None,
    estimator: str = "sampled_fisher",
    reduction: str = "mean_abs",
    temperature: float = 20.0,
    key: Key[Array, ""] | None = None,
    step: float = 1e-6,
) -> dict[str, Float[Array, ...]]:
    """Importance of each element of named activations, all of them in one backward pass a batch.

    Args:
        fn: `fn(params, *args) -> logits (batch, ..., classes)`, pure; examples must not mix along the batch.
        batches: each an array (the one argument) or a tuple of arguments, examples along axis 0.
        paths: names of activations, see `jaxq.activations`; None takes those named "block", where stages are cut:
            the inputs of blocks, and the output of the last one.
        estimator: how an example's vector g is drawn. "sampled_fisher": g = J^T (p - e_y) / T for a class y drawn
            from p. "gaussian": g = J^T xi / T with xi = sqrt(p) eps - p <sqrt(p), eps>. Both have E[g g^T] = G.
            "exact": g^2 is the diagonal of G itself, from as many backward passes as there are classes. Two more,
            for comparison with the paper: "row_sum", G 1, and "finite_difference", what its code computes: the
            change of the KL's gradient between shifts of all elements by `step` and by -`step`.
        reduction: over the examples. "mean_abs": mean |g|, like a root of the diagonal, which the paper's code
            amounts to. "mean_sq": mean g^2, the diagonal. "per_sample": |g| of every example. "signed_mean": mean
            g, for comparison with the paper, whose equation of "finite_difference" takes no absolute value.
        temperature: T, softens p.
        key: of the random draws; default `jax.random.key(0)`.
        step: of "finite_difference".

    Returns {path: float32 array of the activation's shape without the batch axis}, or with all examples in front
    for "per_sample"; float64 where the activation is. Time: a forward and a backward pass ("exact": as many
    backward passes as classes; "row_sum" and "finite_difference": 2, forward and backward, for each path). Memory:
    the activations of a batch.

    Raises JaxqError for no batches, an unknown path, estimator or reduction.
    """
    for value, known, what in ((estimator, ESTIMATORS, "estimator"), (reduction, REDUCTIONS, "reduction")):
        if value not in known:
            raise JaxqError(f"unknown {what} {value!r}; use one of {', '.join(known)}")
    key = jax.random.key(0) if key is None else key
    chosen: list[str] | None = None if paths is None else list(paths)
    total: dict[str, Array] = {}
    parts: dict[str, list[Array]] = {}
    count = 0
    for i, batch in enumerate(batches):
        args = batch if isinstance(batch, tuple) else (batch,)
        if chosen is None:
            named = [name.path for name in activations(fn, params, *args, cut="")]
            chosen = [path for path in named if path.rpartition("/")[2].partition("#")[0] == "block"]
            if not chosen:
                raise JaxqError('the function names no activation "block": give the paths of jaxq.activations')
        draw = jax.random.fold_in(key, i)
        found = _batch(fn, tuple(chosen), estimator, reduction, temperature, step, params, args, draw)
        count += len(jax.tree.leaves(args)[0])
        for path, value in found.items():
            if reduction == "per_sample":
                parts.setdefault(path, []).append(value)
            else:
                total[path] = total[path] + value if path in total else value
    if not count:
        raise JaxqError("there are no batches to take an importance from: give at least one")
    # What comes out of jit is sorted by path: the order asked for, or that of the function, says more.
    if reduction == "per_sample":
        return {path: jnp.concatenate(parts[path]) for path in chosen or ()}
    return {path: total[path] / count for path in chosen or ()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _batch(
    fn: Callable[..., Any],
    paths: tuple[str, ...],
    estimator: str,
    reduction: str,
    temperature: float,
    step: float,
    params: Any,
    args: tuple[Any, ...],
    key: Array,
) -> dict[str, Array]:
    """Sums over the examples of a batch, or every example."""
    known = {name.path: name for name in activations(fn, params, *args, cut="")}
    unknown = [path for path in paths if path not in known]
    if unknown:
        raise JaxqError(f"no activation is named {unknown[0]!r}; see jaxq.activations")
    zeros = {path: jnp.zeros(known[path].shape, _at_least_float32(known[path].dtype)) for path in paths}

    def logits(probes: dict[str, Array]) -> Array:
        shifts = {path: Shift(probe) for path, probe in probes.items()}
        z = quantized(fn)(Activated(params, shifts), *args)
        return z.astype(_at_least_float32(z.dtype)) / temperature

    z, pull = jax.vjp(logits, zeros)
    p = jax.nn.softmax(z, axis=-1)
    if estimator == "sampled_fisher":
        drawn = jax.nn.one_hot(jax.random.categorical(key, z, axis=-1), z.shape[-1])
        (g,) = pull(p - drawn)
    elif estimator == "gaussian":
        root = jnp.sqrt(p)
        noise = jax.random.normal(key, p.shape)
        (g,) = pull(root * noise - p * jnp.sum(root * noise, axis=-1, keepdims=True))
    elif estimator == "exact":
        g = _exact(pull, p, zeros)
    elif estimator == "row_sum":
        g = _row_sums(logits, p, zeros)
    else:
        g = _differences(logits, p, zeros, step)
    return jax.tree.map(functools.partial(_reduced, reduction), g)


def _at_least_float32(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _reduced(reduction: str, g: Array) -> Array:
    if reduction == "per_sample":
        return jnp.abs(g)
    return jnp.sum({"mean_abs": jnp.abs(g), "mean_sq": jnp.square(g), "signed_mean": g}[reduction], axis=0)


def _exact(pull: Callable[..., Any], p: Array, zeros: dict[str, Array]) -> dict[str, Array]:
    """Root of the diagonal of G: sum_c p_c J_c^2 - (sum_c p_c J_c)^2, without cancellation."""
    # Classes of one position at a time: with several positions (tokens) their logits share the probes.
    if p.ndim != 2:
        raise JaxqError(f"the exact diagonal takes logits (batch, classes), not of shape {p.shape}")
    (mean,) = pull(p)

    def add(c: Any, total: dict[str, Array]) -> dict[str, Array]:
        (row,) = pull(jax.nn.one_hot(jnp.full(p.shape[0], c), p.shape[-1]))

        def term(t: Array, r: Array, m: Array) -> Array:
            return t + p[:, c].reshape((-1,) + (1,) * (r.ndim - 1)) * jnp.square(r - m)

        return jax.tree.map(term, total, row, mean)

    return jax.tree.map(jnp.sqrt, jax.lax.fori_loop(0, p.shape[-1], add, zeros))


def _gradient(logits: Callable[..., Array], p: Array) -> Callable[..., Any]:
    """Gradient of the sum over examples of KL(p || softmax(logits))."""
    return jax.grad(lambda probes: -jnp.sum(p * jax.nn.log_softmax(logits(probes), axis=-1)))


def _row_sums(logits: Callable[..., Array], p: Array, zeros: dict[str, Array]) -> dict[str, Array]:
    gradient = _gradient(logits, p)
    return _one_by_one(lambda ones: jax.jvp(gradient, (zeros,), (ones,))[1], zeros)


def _differences(logits: Callable[..., Array], p: Array, zeros: dict[str, Array], step: float) -> dict[str, Array]:
    gradient = _gradient(logits, p)

    def difference(ones: dict[str, Array]) -> dict[str, Array]:
        shift = {path: step * one for path, one in ones.items()}
        return jax.tree.map(jnp.subtract, gradient(shift), gradient(jax.tree.map(jnp.negative, shift)))

    return _one_by_one(difference, zeros)


def _one_by_one(of: Callable[..., dict[str, Array]], zeros: dict[str, Array]) -> dict[str, Array]:
    """{path: of(ones at this path, zeros at all others)[path]}."""

    def add(i: Any, total: dict[str, Array]) -> dict[str, Array]:
        found = of({path: zero + (i == n).astype(zero.dtype) for n, (path, zero) in enumerate(zeros.items())})
        return {path: total[path] + jnp.where(i == n, found[path], 0) for n, path in enumerate(zeros)}

    # A loop: written out, a network of a dozen blocks would be compiled a dozen times.
    return jax.lax.fori_loop(0, len(zeros), add, zeros)
