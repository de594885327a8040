"""The step `relu_mlp`: every MLP of the function is fitted with ReLU to the float one with GELU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq.blockwise import blocks, losses, search
from jaxq.blockwise.work import Job, Work
from jaxq.errors import JaxqError
from jaxq.solvers.relu_mlp import MLPWeights, fit
from jaxq.steps import Reconstruct, ReluMLP

#: Ends of the paths of an MLP's members, in the order of `MLPWeights`, and of the layer scale behind it.
MEMBERS = ("mlp/fc1/kernel", "mlp/fc1/bias", "mlp/fc2/kernel", "mlp/fc2/bias")
SCALE = "ls2/scale"


def relu_mlp(job: Job, work: Work, step: ReluMLP) -> Work:
    """Fits the MLPs one after another, each to what reaches it in the float function."""
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
    params = {}
    for n, stage in enumerate(teachers):
        own = loss.leaves[n]
        for position, slot in enumerate(stage.paths):
            prefix = slot.removesuffix(MEMBERS[0])
            if prefix == slot:
                continue
            job.tell(f"MLP of block {n + 1} of {len(teachers)}", n / len(teachers))
            weights = MLPWeights(*(jnp.asarray(work.floats[prefix + end]) for end in MEMBERS))
            x = search.seen(stage, own, carries, (str(position),))[str(position)]
            importance = loss.importance[n] if step.weighted else None
            if importance is not None and prefix + SCALE in work.floats:
                importance = importance * jnp.abs(work.floats[prefix + SCALE])
            new, _ = fit(
                weights, x, _exact(weights, x), importance,
                percentile=step.percentile, alpha=step.alpha, iterations=step.iterations, batch=batch,
                rate=step.rate, key=jax.random.fold_in(job.key, n), chunk=min(500, step.iterations),
                progress=lambda done, error, n=n: job.tell(
                    f"MLP of block {n + 1} of {len(teachers)}, {done}/{step.iterations}, error {error:.3g}",
                    (n + done / step.iterations) / len(teachers),
                ),
            )  # fmt: skip
            params |= {prefix + end: value for end, value in zip(MEMBERS, new, strict=True)}
        if n + 1 < len(teachers):
            carries = blocks.advanced(stage, carries, blocks.outputs(stage, own, carries))
    if not params:
        raise JaxqError(f"the step relu_mlp finds no layer {MEMBERS[0]}")
    return work.having(params=params)


@jax.jit
def _exact(mlp: MLPWeights, x: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(x @ mlp.fc1_kernel + mlp.fc1_bias, approximate=False)
    return hidden @ mlp.fc2_kernel + mlp.fc2_bias
