"""Error of a block's output by a Hessian fitted to gradients: a diagonal and a direction.

LS-ViT (CVPR 2026). The gradient of the loss at the quantized output O + dO is g = H dO to first order. Instead of
averaging estimates of single examples, it fits H to all pairs (dO_n, g_n) by least squares:

    H_ii = sum_n g_ni dO_ni / sum_n dO_ni^2        u = sum_n g_n t_n / sum_n t_n^2,   t_n = sqrt(dO_n . g_n)

minimise sum_n (g_ni - H_ii dO_ni)^2, and sum_n |g_n - u t_n|^2, as g_n = u (u . dO_n) if H = u u^T. The loss is
sum_i H_ii dO_i^2 / 2 + (u . dO)^2 / 2. Formulas from a secondary summary: neither paper nor code was at hand.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.errors import JaxqError

#: Rounds of alternation between the signs and the direction.
ROUNDS = 10


class LeastSquares(NamedTuple):
    """diag(diagonal) + direction direction^T, in place of a Hessian over d elements; float32."""

    diagonal: Float[Array, " d"]
    direction: Float[Array, " d"]


@functools.partial(jax.jit, static_argnames="aligned")
def fit(
    deviations: Float[Array, "N ..."], gradients: Float[Array, "N ..."], *, aligned: bool = False
) -> LeastSquares:
    """Both parts, each fitted as if it were alone.

    A negative H_ii is set to 0, so that the loss has a least value; it is 0 too where no example deviates. An
    example with dO . g <= 0 takes no part in u: it has no t. Without any, u = 0.

    Args:
        deviations: the quantized block's output minus the float block's, before the training.
        gradients: of each example's own loss (not of a batch's mean), at the quantized output.
        aligned: t_n is given the sign of u . dO_n, which the root loses. With the published t_n > 0, u is too
            short by |sum t_n^2 sign| / sum t_n^2, near 0 where signs are mixed. The signs are those of g_n . u,
            found by alternation from the example of the largest t_n, where no round raises the sum of squares. The
            sign of u itself means nothing.

    Raises JaxqError unless the shapes are equal. Time: O(N d). Memory: a copy of either.
    """
    if gradients.shape != deviations.shape:
        raise JaxqError(f"deviations are {deviations.shape} and gradients {gradients.shape}: give one for each")
    moved, g = _rows(deviations), _rows(gradients)
    diagonal = _ratio(jnp.sum(g * moved, axis=0), jnp.sum(jnp.square(moved), axis=0))
    rise = jnp.maximum(jnp.sum(g * moved, axis=1), 0.0)
    root = jnp.sqrt(rise)
    if aligned:
        root = root * _signs(g, root)
    direction = _ratio(jnp.matmul(root, g, precision="highest"), jnp.sum(rise))
    return LeastSquares(jnp.maximum(diagonal, 0.0), direction)


def error(
    outputs: Float[Array, "batch ..."], targets: Float[Array, "batch ..."], terms: LeastSquares
) -> Float[Array, ""]:
    """Mean over the batch of sum_i H_ii dO_i^2 / 2 + (u . dO)^2 / 2."""
    moved = _rows(outputs - targets)
    alone = jnp.matmul(jnp.square(moved), terms.diagonal, precision="highest")
    along = jnp.matmul(moved, terms.direction, precision="highest")
    return jnp.mean(alone + jnp.square(along)) / 2


def _signs(g: Float[Array, "N d"], root: Float[Array, " N"]) -> Float[Array, " N"]:
    def side(direction: Array) -> Array:
        return jnp.where(jnp.matmul(g, direction, precision="highest") < 0, -1.0, 1.0)

    def round_(_: int, signs: Array) -> Array:
        return side(jnp.matmul(root * signs, g, precision="highest"))

    return jax.lax.fori_loop(0, ROUNDS, round_, side(g[jnp.argmax(root)]))


def _ratio(above: Array, below: Array) -> Array:
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), 0.0)


def _rows(x: Float[Array, "N ..."]) -> Float[Array, "N d"]:
    return x.astype(jnp.float32).reshape(x.shape[0], -1)
