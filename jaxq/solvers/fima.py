"""Error of a block's output by a diagonal and a low-rank Fisher matrix, from gradients at the quantized output.

FIMA-Q (Wu et al. CVPR 2025, arXiv 2506.11543). The divergence KL(p(O) || p(O + dO)) has no gradient at dO = 0, so
that its gradient at the perturbed output is g = F dO to first order, with F the Fisher matrix. With |dO| and |g|
averaged over the examples, once a refresh, the rows of Dbar and Gbar, and c = |output - target| of an example:

    low rank   (c Gbar^T) (Dbar Dbar^T)^-1 (c Gbar^T)^T       diagonal   sum_i mean|g|_i c_i^2

and the error is the mean over examples of each, divided by its first value, added. Taken from the authors' code
(github.com/ShiheWang/FIMA-Q, revision 64c4b00, `fisher_dplr`; the paper's equations were not at hand). There the
diagonal term is of degree 2 in c, though its weight is of degree 1 in dO; the low-rank term is |F^T c|^2 for
the least F with F Dbar^T = Gbar^T, so a form in F F^T, not in F. Neither scale outlives the division.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.errors import JaxqError

#: Added to the diagonal of Dbar Dbar^T, relative to its trace.
RIDGE = 1e-5


class Averages(NamedTuple):
    """|dO| and |g|, averaged over the examples, each row at another time of the training; float32."""

    deviations: Float[Array, "rank d"]
    gradients: Float[Array, "rank d"]


class FimaTerms(NamedTuple):
    """The Fisher matrix of a block's output of d elements; float32.

    root: W, where W W^T is the regularized inverse of Dbar Dbar^T; no rounding makes the low-rank term negative.
    first: what the low-rank and the diagonal term are divided by: their means over the examples of the fit, 1 for
        a term that is 0.
    """

    diagonal: Float[Array, " d"]
    gradients: Float[Array, "rank d"]
    root: Float[Array, "rank rank"]
    first: Float[Array, " 2"]


class Rows(NamedTuple):
    """Averages that get a row whenever the gradients are taken anew in the course of a training.

    count: of the rows that there are; the others are zero. first: the deviations of the first row, over which the
    terms are divided by their means.
    """

    averages: Averages
    count: int
    first: Float[Array, "N ..."]

    @classmethod
    def of(cls, deviations: Float[Array, "N ..."], gradients: Float[Array, "N ..."], rank: int) -> Rows:
        """The first of `rank` rows.

        Args:
            deviations: the quantized block's output minus the float block's. The authors' code runs all other
                blocks in float for it.
            gradients: of each example's own divergence (not of a batch's mean), at the quantized output.
            rank: rows in the end.

        Raises JaxqError unless rank is at least 1 and the shapes are equal.
        """
        if rank < 1:
            raise JaxqError(f"the low-rank term has at least one row, not {rank}")
        rest = [(0, rank - 1), (0, 0)]
        averages = Averages(*(jnp.pad(x, rest) for x in average(deviations, gradients)))
        return cls(averages, 1, deviations)

    def followed_by(self, deviations: Float[Array, "N ..."], gradients: Float[Array, "N ..."]) -> Rows:
        """With the next row. Raises JaxqError if there are all."""
        if self.count == len(self.averages.deviations):
            raise JaxqError(f"the low-rank term has its {self.count} rows already")
        new = average(deviations, gradients)
        averages = Averages(*(x.at[self.count].set(row[0]) for x, row in zip(self.averages, new, strict=True)))
        return Rows(averages, self.count + 1, self.first)

    def terms(self) -> FimaTerms:
        """See `assemble`."""
        return assemble(self.averages, self.first)


def average(deviations: Float[Array, "N ..."], gradients: Float[Array, "N ..."]) -> Averages:
    """Mean |dO| and mean |g| over the examples, one row each."""
    if gradients.shape != deviations.shape or not len(deviations):
        raise JaxqError(f"deviations are {deviations.shape} and gradients {gradients.shape}: give one for each")
    return Averages(*(jnp.mean(_sizes(x), axis=0, keepdims=True) for x in (deviations, gradients)))


def assemble(averages: Averages, deviations: Float[Array, "N ..."], *, ridge: float = RIDGE) -> FimaTerms:
    """The terms from averages, with first values over the examples of `deviations`.

    The inverse is that of Dbar Dbar^T + ridge trace(Dbar Dbar^T) I. Groups of the same images have nearly the same
    mean |dO|, so that the plain inverse of the authors' code is ill-conditioned, and does not exist for rows that
    are equal or zero. A ridge depends smoothly on the rows, where a pseudo-inverse jumps with the rank that it
    sees: equal rows give the rank-one term over 1 + ridge. It is above the rounding of float32 sums, and below the
    spread of groups of a hundred examples. Rows of zeros change nothing, up to a factor of the diagonal that
    cancels: with them the shapes, and a compiled step, stay while the rank grows.
    """
    root = _inverse_root(averages.deviations, ridge)
    diagonal = jnp.mean(averages.gradients, axis=0)
    first = jnp.stack(_terms(_sizes(deviations), diagonal, averages.gradients, root))
    return FimaTerms(diagonal, averages.gradients, root, jnp.where(first > 0, first, 1.0))


def error(
    outputs: Float[Array, "batch ..."], targets: Float[Array, "batch ..."], terms: FimaTerms
) -> Float[Array, ""]:
    """Mean over the batch of low-rank term / first + diagonal term / first: 2 on the deviations of the fit.

    Its derivative is 0 where the output is the target. Time: O(batch d rank).
    """
    low, diagonal = _terms(_sizes(outputs - targets), terms.diagonal, terms.gradients, terms.root)
    return low / terms.first[0] + diagonal / terms.first[1]


def _terms(sizes: Array, diagonal: Array, gradients: Array, root: Array) -> tuple[Array, Array]:
    along = jnp.matmul(sizes, gradients.T, precision="highest")
    low = jnp.sum(jnp.square(jnp.matmul(along, root, precision="highest")), axis=1)
    return jnp.mean(low), jnp.mean(jnp.matmul(jnp.square(sizes), diagonal, precision="highest"))


def _inverse_root(rows: Float[Array, "rank d"], ridge: float) -> Float[Array, "rank rank"]:
    """Zeros for rows of zeros."""
    gram = jnp.matmul(rows, rows.T, precision="highest")
    trace = jnp.trace(gram)
    values, vectors = jnp.linalg.eigh(gram)
    damped = jnp.maximum(values, 0.0) + ridge * trace
    return vectors * jnp.where(trace > 0, jax.lax.rsqrt(jnp.where(trace > 0, damped, 1.0)), 0.0)


def _sizes(x: Float[Array, "N ..."]) -> Float[Array, "N d"]:
    return jnp.abs(x.astype(jnp.float32)).reshape(x.shape[0], -1)
