"""What the error of a block costs: weights of the squared error of its output, or other forms of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.blockwise import blocks
from jaxq.blockwise.work import Job, Work
from jaxq.solvers import fima, least_squares_hessian
from jaxq.stages import Stage
from jaxq.steps import Reconstruct

#: Losses that weigh the squared error by one number for each element of the output.
AVERAGED = {"aph": jnp.abs, "hessian": jnp.square}


def squared(outputs: list[Array], targets: Any, fixed: Any) -> Float[Array, ""]:
    """Mean squared error of the outputs."""
    pairs = zip(outputs, targets["value"], strict=True)
    return sum((jnp.mean(jnp.square(o - t)) for o, t in pairs), jnp.float32(0.0))


def weighted(outputs: list[Array], targets: Any, fixed: Any) -> Float[Array, ""]:
    """Mean squared error weighted by importance, of all examples or of each."""
    weight = targets["weight"] if "weight" in targets else fixed["loss"]
    return jnp.mean(weight * jnp.square(outputs[0] - targets["value"][0]))


def divergence(outputs: list[Array], targets: Any, fixed: Any) -> Float[Array, ""]:
    """KL divergence of the classes' probabilities from those of the float function, mean over examples."""
    wanted = jax.nn.log_softmax(targets["value"][0].astype(jnp.float32))
    found = jax.nn.log_softmax(outputs[0].astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1))


def by_fima(outputs: list[Array], targets: Any, fixed: Any) -> Float[Array, ""]:
    return fima.error(outputs[0], targets["value"][0], fixed["loss"])


def by_least_squares(outputs: list[Array], targets: Any, fixed: Any) -> Float[Array, ""]:
    return least_squares_hessian.error(outputs[0], targets["value"][0], fixed["loss"])


def through_the_rest(rest: tuple[Stage, ...], outputs: list[Array], targets: Any, fixed: Any) -> Float[Array, ""]:
    """Error of the logits that the float blocks behind give, and of the output, each over its first value."""
    return jnp.sum(jnp.stack(_both(rest, fixed["loss"]["leaves"], outputs, targets)) / fixed["loss"]["first"])


def _both(rest: Sequence[Stage], leaves: Sequence[Any], outputs: list[Array], targets: Any) -> tuple[Array, Array]:
    found = outputs
    for stage, own in zip(rest, leaves, strict=True):
        found = stage.program.run(own, [*stage.consts, *found])
    local = 2 * jnp.mean(jnp.square(outputs[0] - targets["value"][0]))
    return jnp.mean(jnp.square(found[0] - targets["logits"])), local


ERRORS = {"mse": squared, "fima": by_fima, "least_squares": by_least_squares}


#: again(outputs of the block as it is now) -> (what all examples share from now on, the next `again`).
Again = Callable[[Sequence[list[Array]]], tuple[Any, Any]]


class Prepared(NamedTuple):
    """What the loss of a block takes.

    targets: of each example. shared: by all of them. again: for a loss that follows the training, as FIMA-Q does,
    `rank` times in its course, the first time before it.
    """

    targets: dict[str, Any]
    shared: Any = ()
    again: Again | None = None


class Loss:
    """The loss of every block of a step.

    leaves: of each block of the float function.
    """

    def __init__(self, job: Job, work: Work, step: Reconstruct, teachers: Sequence[Stage], start: blocks.Carries):
        self.job, self.step, self.teachers = job, step, teachers
        self.leaves = [stage.leaves({s: work.floats[str(s)] for s in stage.paths}) for stage in teachers]
        if step.loss != "mse":
            blocks.check_chain(teachers)
        self.importance = self._importance(start) if step.loss in (*AVERAGED, "ph") else []

    def error(self, n: int) -> Callable[..., Any]:
        if n + 1 == len(self.teachers):
            return divergence if self.step.loss != "mse" or self._classifies() else squared
        if self.step.loss == "global":
            return functools.partial(through_the_rest, tuple(self.teachers[n + 1 :]))
        return ERRORS.get(self.step.loss, weighted)

    def _classifies(self) -> bool:
        return len(self.teachers[-1].program.output_avals[0].shape) == 2

    def prepare(self, n: int, found: Callable[[], list[list[Array]]], wanted: Sequence[list[Array]]) -> Prepared:
        """What the loss of block n takes, before it is trained.

        found: gives the outputs of the quantized block. wanted: those of the float block.
        """
        targets: dict[str, Any] = {"value": blocks.joined(wanted)}
        if n + 1 == len(self.teachers) or self.step.loss == "mse":
            return Prepared(targets)
        if self.step.loss in AVERAGED:
            return Prepared(targets, self.importance[n])
        if self.step.loss == "ph":
            return Prepared(targets | {"weight": self.importance[n]})
        if self.step.loss == "global":
            return self._through_the_rest(n, found(), targets)
        deviations, gradients = self.deviations(n, found(), wanted)
        if self.step.loss == "fima":
            rows = fima.Rows.of(deviations, gradients, self.step.rank)
            return Prepared(targets, rows.terms(), functools.partial(self._next_row, n, wanted, rows))
        if self.step.loss == "least_squares":
            return Prepared(targets, least_squares_hessian.fit(deviations, gradients))
        return Prepared(targets | {"weight": jnp.square(gradients)})

    def _next_row(
        self, n: int, wanted: Sequence[list[Array]], rows: fima.Rows, found: Sequence[list[Array]]
    ) -> tuple[Any, Again]:
        rows = rows.followed_by(*self.deviations(n, found, wanted))
        return rows.terms(), functools.partial(self._next_row, n, wanted, rows)

    def _through_the_rest(self, n: int, found: Sequence[list[Array]], targets: dict[str, Any]) -> Prepared:
        rest, leaves = self.teachers[n + 1 :], self.leaves[n + 1 :]
        batch = len(found[0][0])
        exact = targets["value"][0]
        parts = [exact[i : i + batch] for i in range(0, len(exact), batch)]
        targets = targets | {"logits": jnp.concatenate([self._logits(rest, leaves, x) for x in parts])}
        values = jnp.stack(_both(rest, leaves, found[0], jax.tree.map(lambda x: x[:batch], targets)))
        return Prepared(targets, {"leaves": leaves, "first": jnp.where(values > 0, values, 1.0)})

    def deviations(
        self, n: int, found: Sequence[list[Array]], wanted: Sequence[list[Array]]
    ) -> tuple[Array, Array]:
        """(error of the quantized block's output, gradient of the KL divergence there), of each example."""
        rest, leaves = self.teachers[n + 1 :], self.leaves[n + 1 :]
        misses, gradients = [], []
        for out, right in zip(found, wanted, strict=True):
            misses.append(out[0] - right[0])
            # The float blocks go on from the quantized output.
            draw = functools.partial(_kl_gradient, self._logits(rest, leaves, right[0]), self.step.temperature)
            gradients.append(blocks.cotangents(rest, leaves, _carry(rest, out[0]), draw)[0])
        return jnp.concatenate(misses), jnp.concatenate(gradients)

    def _logits(self, rest: Sequence[Stage], leaves: Sequence[Any], x: Array) -> Array:
        carry = _carry(rest, x)
        for stage, own in zip(rest, leaves, strict=True):
            found = stage.program.call(own, stage.inputs(carry))
            carry = stage.advance(carry, found)
        return found[0]

    def _importance(self, start: blocks.Carries) -> list[Array]:
        """Importance of every block's output but the last's: as `jaxq.importance` with `sampled_fisher`."""
        first, rest = self.teachers[0], self.teachers[1:]
        total: list[list[Array]] = [[] for _ in rest]
        reduce = AVERAGED.get(self.step.loss)
        for i, carry in enumerate(start):
            self.job.tell(f"importance of blocks, batch {i + 1} of {len(start)}", 0.0)
            after = first.advance(carry, first.program.call(self.leaves[0], first.inputs(carry)))
            key = jax.random.fold_in(self.job.key, i)
            draw = functools.partial(_sampled, key, self.step.temperature)
            for own, g in zip(total, blocks.cotangents(rest, self.leaves[1:], after, draw), strict=True):
                own.append(jnp.abs(g) if reduce is None else jnp.sum(reduce(g), axis=0))
        if reduce is None:
            return [jnp.concatenate(parts) for parts in total]
        count = sum(len(jax.tree.leaves(carry)[0]) for carry in start)
        return [sum(parts[1:], parts[0]) / count for parts in total]


def _carry(rest: Sequence[Stage], x: Array) -> dict[str, Array]:
    """The carry of the first of these blocks: in a chain, one array."""
    return {rest[0].reads[0]: x}


def _sampled(key: Array, temperature: float, logits: Float[Array, "B K"]) -> Float[Array, "B K"]:
    z = logits.astype(jnp.float32) / temperature
    drawn = jax.nn.one_hot(jax.random.categorical(key, z, axis=-1), z.shape[-1])
    return ((jax.nn.softmax(z, axis=-1) - drawn) / temperature).astype(logits.dtype)


def _kl_gradient(
    exact: Float[Array, "B K"], temperature: float, logits: Float[Array, "B K"]
) -> Float[Array, "B K"]:
    p, q = (jax.nn.softmax(z.astype(jnp.float32) / temperature, axis=-1) for z in (exact, logits))
    return ((q - p) / temperature).astype(logits.dtype)
