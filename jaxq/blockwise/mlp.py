"""The step `relu_mlp`: every MLP of the function is fitted with ReLU to the float one with GELU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxq.blockwise import blocks, losses, search
from jaxq.blockwise.work import Job, Work
from jaxq.errors import JaxqError
from jaxq.solvers.relu_mlp import MLPWeights, Problem, fit_together, problem
from jaxq.steps import Reconstruct, ReluMLP

#: Ends of the paths of an MLP's members, in the order of `MLPWeights`, and of the layer scale behind it.
MEMBERS = ("mlp/fc1/kernel", "mlp/fc1/bias", "mlp/fc2/kernel", "mlp/fc2/bias")
SCALE = "ls2/scale"


#: Bytes of inputs and targets that MLPs trained side by side may take.
ROOM = 8 * 2**30


def relu_mlp(job: Job, work: Work, step: ReluMLP) -> Work:
    """Fits each MLP to what reaches it in the float function; on an accelerator equal ones side by side."""
    if job.fn is job.teacher:
        raise JaxqError(
            "the step relu_mlp needs the function with ReLU beside the float one, with GELU: give student="
        )
    batch = min(step.batch, len(job.examples[0]))
    count = len(job.examples[0]) - len(job.examples[0]) % batch
    teachers = blocks.cut(job.teacher, work.floats, job.examples, batch)
    carries = blocks.start(job.examples, batch, count)
    like = Reconstruct(loss="aph" if step.weighted else "mse", temperature=step.temperature)
    loss = losses.Loss(job, work, like, teachers, carries)
    params: dict[str, Any] = {}
    waiting: dict[str, tuple[int, Problem]] = {}
    for n, stage in enumerate(teachers):
        own = loss.leaves[n]
        for position, slot in enumerate(stage.paths):
            prefix = slot.removesuffix(MEMBERS[0])
            if prefix == slot:
                continue
            weights = MLPWeights(*(jnp.asarray(work.floats[prefix + end]) for end in MEMBERS))
            x = search.seen(stage, own, carries, (str(position),))[str(position)]
            importance = loss.importance[n] if step.weighted else None
            if importance is not None and prefix + SCALE in work.floats:
                importance = importance * jnp.abs(work.floats[prefix + SCALE])
            new = problem(weights, x, _exact(weights, x), importance, percentile=step.percentile, alpha=step.alpha)
            if waiting and not _fits(new, [known for _, known in waiting.values()]):
                params |= _fitted(job, step, len(teachers), waiting)
                waiting = {}
            waiting[prefix] = (n, new)
        if n + 1 < len(teachers):
            carries = blocks.advanced(stage, carries, blocks.outputs(stage, own, carries))
    if not waiting:
        raise JaxqError(f"the step relu_mlp finds no layer {MEMBERS[0]}")
    params |= _fitted(job, step, len(teachers), waiting)
    return work.having(params={path: new.astype(work.floats[path].dtype) for path, new in params.items()})


def _fits(new: Problem, waiting: list[Problem]) -> bool:
    """Whether it can be trained beside those."""
    if jax.default_backend() == "cpu" or jax.tree.map(jnp.shape, new) != jax.tree.map(jnp.shape, waiting[0]):
        return False
    return (len(waiting) + 1) * sum(leaf.nbytes for leaf in jax.tree.leaves(new.data)) <= ROOM


def _fitted(job: Job, step: ReluMLP, count: int, waiting: dict[str, tuple[int, Problem]]) -> dict[str, Array]:
    """{path: new member} of MLPs that are trained side by side."""
    numbers = [n for n, _ in waiting.values()]
    name = (
        f"MLP of block {numbers[0] + 1}"
        if len(numbers) == 1
        else f"MLPs of blocks {numbers[0] + 1} to {numbers[-1] + 1}"
    )
    share = len(numbers) / count

    def tell(done: int, error: float) -> None:
        at = numbers[0] / count + share * done / step.iterations
        job.tell(f"{name} of {count}, {done}/{step.iterations}, error {error:.3g}", at)

    job.tell(f"{name} of {count}", numbers[0] / count)
    found, _ = fit_together(
        [problem for _, problem in waiting.values()],
        iterations=step.iterations, batch=step.batch, rate=step.rate, chunk=min(500, step.iterations),
        keys=jnp.stack([jax.random.fold_in(job.key, n) for n in numbers]), progress=tell,
    )  # fmt: skip
    return {
        prefix + end: value
        for prefix, new in zip(waiting, found, strict=True)
        for end, value in zip(MEMBERS, new, strict=True)
    }


@jax.jit
def _exact(mlp: MLPWeights, x: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(x @ mlp.fc1_kernel + mlp.fc1_bias, approximate=False)
    return hidden @ mlp.fc2_kernel + mlp.fc2_bias
