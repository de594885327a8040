"""The triangular factor that carries rounding errors from one input to the next."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ESCALATION = 10.0
FIRST_DAMPING = 1e-4
LAST_DAMPING = 1.0


class Factor(NamedTuple):
    """`coupling`: unit upper triangular; `damping`: in units of the mean diagonal; `fallback`: no success."""

    coupling: Float[Array, "in in"]
    damping: Float[Array, ""]
    fallback: Bool[Array, ""]


def normalize(hessian: Float[Array, "in in"]) -> tuple[Float[Array, "in in"], Bool[Array, " in"]]:
    """The Hessian over the mean diagonal of its live inputs, and which inputs are live.

    A dead input (zero diagonal) never carried a signal: its diagonal becomes 1, so that it neither gives nor
    takes corrections.
    """
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    live = diagonal != 0
    count = jnp.maximum(jnp.sum(live), 1).astype(jnp.float32)
    mean = jnp.sum(diagonal) / count
    hessian = hessian / jnp.where(mean > 0, mean, 1.0)
    return _add_to_diagonal(hessian, jnp.where(live, 0.0, 1.0)), live


def factorize(hessian: Float[Array, "in in"], damping: Float[Array, ""]) -> Factor:
    """The coupling R of a normalized Hessian: H + damping I = R D R^T, R unit upper triangular, D diagonal.

    GPTQ (Frantar et al. 2023, Algorithm 1) reads the upper Cholesky factor U of H^-1 = U^T U. Reversing the
    order of H, taking its Cholesky factor and reversing back gives H = S S^T with S upper triangular, hence
    U = S^-1; and the updates of Algorithm 1 need only S: in terms of the errors d_k = w_k - q_k, row j is
    rounded at w_j + sum over k < j of (S_kj / S_jj) d_k (Babai's nearest plane; Chen et al. 2025, "The
    geometry of LLM quantization"). So nothing is ever inverted.

    If a pivot is lost in rounding the damping grows tenfold, up to 1; if that fails too, R is the identity
    (the Hessian's diagonal, which makes GPTQ equal to round to nearest) and `fallback` is set.
    """
    size = hessian.shape[0]
    smallest_pivot = size * float(jnp.finfo(jnp.float32).eps)
    reverse = hessian[::-1, ::-1]
    last = 1.5 * jnp.maximum(damping, LAST_DAMPING)

    def attempt(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        trial, _, _, _ = state
        damped = _add_to_diagonal(reverse, jnp.broadcast_to(trial, (size,)))
        lower = jax.lax.linalg.cholesky(damped, symmetrize_input=False)
        good = jnp.all(jnp.diagonal(lower) ** 2 > smallest_pivot)
        return jnp.maximum(trial * ESCALATION, FIRST_DAMPING), trial, lower, good

    def unsolved(state: tuple[Array, Array, Array, Array]) -> Array:
        trial, _, _, good = state
        return ~good & (trial <= last)

    start = (damping, damping, jnp.eye(size, dtype=jnp.float32), jnp.asarray(False))
    _, used, lower, good = jax.lax.while_loop(unsolved, attempt, start)
    upper = lower[::-1, ::-1]
    coupling = upper / jnp.diagonal(upper)
    coupling = jnp.where(good, coupling, jnp.eye(size, dtype=jnp.float32))
    return Factor(coupling, used, ~good)


def completions(coupling: Float[Array, "in in"], size: int) -> Float[Array, "slots size size"]:
    """For each run of `size` rows, the inverse of the coupling's diagonal block.

    Its transpose takes the errors that the run has received to the change of its rows that is best while they
    are still free: the weights that Algorithm 1 of GPTQ shows when the run is reached, where a fresh grid is
    fitted.
    """
    starts = jnp.arange(0, coupling.shape[0], size)
    blocks = jax.vmap(lambda start: jax.lax.dynamic_slice(coupling, (start, start), (size, size)))(starts)
    unit = jnp.broadcast_to(jnp.eye(size, dtype=coupling.dtype), blocks.shape)
    return jax.lax.linalg.triangular_solve(blocks, unit, left_side=True, unit_diagonal=True)


def _add_to_diagonal(matrix: Array, values: Array) -> Array:
    diagonal = jnp.arange(matrix.shape[0])
    return jnp.where(diagonal[:, None] == diagonal, matrix + values, matrix)
