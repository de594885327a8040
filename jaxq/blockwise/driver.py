"""Runs the steps of a recipe, one after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import planning, tracing
from jaxq.blockwise import blocks, mlp, norms, search, train
from jaxq.blockwise.work import Job, Work, finished, leaves
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.formats.uniform import Uniform
from jaxq.names import Activated
from jaxq.planning import nbytes
from jaxq.recipe import Recipe
from jaxq.report import Report, SiteReport
from jaxq.run import difference
from jaxq.steps import Calibrate, Reconstruct, ReluMLP, Reparametrize, Rotate, Step

#: {step: (what does it, its share of the time against another's: a step that trains takes far longer)}
DONE_BY: dict[type[Step], tuple[Callable[..., Work], float]] = {
    ReluMLP: (mlp.relu_mlp, 1.0),
    Calibrate: (search.calibrate, 0.2),
    Reparametrize: (norms.reparametrize, 0.01),
    Rotate: (norms.rotate, 0.01),
    Reconstruct: (train.train, 3.0),
}

#: tell(what is done now, seconds since the start, seconds left)
Tell = Callable[[str, float, float], None]


def run(
    fn: Callable[..., Any],
    params: Any,
    batches: Sequence[Any],
    recipe: Recipe,
    *,
    student: Callable[..., Any] | None = None,
    seed: int = 0,
    tell: Tell | None = None,
) -> tuple[Activated, Report]:
    """The function's parameters as the recipe's steps make them, with quantizers of activations, and the report.

    Args:
        fn: `fn(params, *args)`, the float function.
        params: pytree of float arrays.
        batches: calibration batches, each an array or a tuple of arguments, examples along axis 0 of all.
        recipe: with steps.
        student: the function that is quantized, where it is another than `fn` (with ReLU in place of GELU, for
            instance), with the same parameters and blocks.
        seed: of every draw.
        tell: called as the work goes on.

    The calibration examples and what reaches one block are in memory. Raises JaxqError for weights that are
    quantized already, not on a uniform grid of one scale an output, stacked, or used in several blocks.
    """
    begin = time.perf_counter()
    progress = _Progress(recipe.steps, begin, tell)
    job, work = started(fn, params, batches, recipe, student=student, seed=seed, tell=progress)
    flat = work.params
    for n, step in enumerate(recipe.steps):
        progress.step = n
        work = DONE_BY[type(step)][0](job, work, step)
    job.tell("packing", 1.0)
    done = finished(job, work)
    left = [path for path in job.targets if path not in work.weights]
    if left:
        raise JaxqError(
            f"no step of recipe {recipe.name} finds a grid for {left[0]}: add a step calibrate with weights"
        )
    quantized = tracing.flatten(done.params)
    sites = planning.targets(fn, params, batches[0], recipe)[0]
    listed = {site.path for site in sites}
    rows = [
        SiteReport(
            site.path, site.kind, tuple(site.shape),
            str(quantized[site.path].format) if is_quantized(quantized[site.path]) else "dense",
            8 * nbytes(quantized[site.path]) / math.prod(site.shape),
            nbytes(flat[site.path]), nbytes(quantized[site.path]),
        )
        for site in sites
    ]  # fmt: skip
    report = Report(
        recipe.to_dict(), rows, seconds=time.perf_counter() - begin,
        other_bytes=sum(nbytes(leaf) for path, leaf in quantized.items() if path not in listed),
        drift=drift(job, work, len(jax.tree.leaves(batches[0])[0])),
    )  # fmt: skip
    return Activated(tracing.replace(params, quantized), done.activations), report


def started(
    fn: Callable[..., Any],
    params: Any,
    batches: Sequence[Any],
    recipe: Recipe,
    *,
    student: Callable[..., Any] | None = None,
    seed: int = 0,
    tell: Callable[[str, float], None] = lambda text, share: None,
) -> tuple[Job, Work]:
    """What the steps work on, before the first of them. Arguments and errors as of `run`."""
    flat = {path: _array(path, leaf) for path, leaf in tracing.flatten(params).items()}
    _, targets = planning.targets(fn, params, batches[0], recipe)
    for path, target in targets.items():
        format = target.rule.format
        if not isinstance(format, Uniform) or format.symmetric or format.group_size is not None:
            raise JaxqError(f"{path}: steps work on asymmetric uniform grids of one scale an output, not {format}")
    teacher = _flat(fn, params)
    job = Job(
        fn=teacher if student is None else _flat(student, params),
        teacher=teacher,
        examples=blocks.together(batches),
        targets=targets,
        key=jax.random.key(seed),
        tell=tell,
    )
    return job, Work(flat, flat, recipe.activations)


def drift(job: Job, work: Work, batch: int) -> list[float]:
    """After each block, the relative distance of the first examples from those of the float function."""
    pieces = blocks.cut(job.fn, work.params, job.examples, batch)
    teachers = blocks.cut(job.teacher, work.floats, job.examples, batch)
    stream = floats = blocks.start(job.examples, batch, batch)
    out = []
    for stage, teacher in zip(pieces, teachers, strict=True):
        found = blocks.outputs(stage, leaves(job, work, stage), stream)
        own = teacher.leaves({slot: work.floats[str(slot)] for slot in teacher.paths})
        wanted = blocks.outputs(teacher, own, floats)
        missed, norm = np.sqrt(np.asarray(difference(found[0], wanted[0]), np.float64))
        out.append(float(missed / norm) if norm else 0.0)
        if teacher.finish is None:
            stream, floats = blocks.advanced(stage, stream, found), blocks.advanced(teacher, floats, wanted)
    return out


class _Progress:
    """From the share of a step to that of the whole."""

    def __init__(self, steps: Sequence[Step], begin: float, tell: Tell | None):
        self.weights = [DONE_BY[type(step)][1] for step in steps]
        self.begin, self.tell, self.step = begin, tell, 0

    def __call__(self, text: str, share: float) -> None:
        if self.tell is None:
            return
        done = sum(self.weights[: self.step]) + self.weights[self.step] * share
        spent, whole = time.perf_counter() - self.begin, sum(self.weights)
        self.tell(text, spent, spent * (whole / done - 1) if done > 0 else math.nan)


def _array(path: str, leaf: Any) -> jax.Array:
    if is_quantized(leaf):
        raise JaxqError(f"{path} is quantized already: give float parameters")
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf))


def _flat(fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """The function of flat parameters {path: leaf}, whose paths are those of the tree."""
    return lambda flat, *args: fn(tracing.replace(params, flat), *args)
