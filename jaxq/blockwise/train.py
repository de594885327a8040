"""The step `reconstruct`: trains rounding, weights and scales of one block after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxq.blockwise import blocks, losses
from jaxq.blockwise.work import Dropped, Job, Work, leaves, own_paths, rounded
from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer
from jaxq.formats.base import Layout
from jaxq.formats.rounded_input import rounded_input
from jaxq.formats.uniform import Uniform
from jaxq.names import Activated
from jaxq.solvers import adaround
from jaxq.solvers.reconstruct import Data, Renew, Settings, reconstruct
from jaxq.stages import Program, Stage
from jaxq.steps import Reconstruct


def train(job: Job, work: Work, step: Reconstruct) -> Work:
    """Trains the blocks in order, each on what the trained blocks before it make of the examples."""
    batch = min(step.batch, len(job.examples[0]))
    count = len(job.examples[0]) - len(job.examples[0]) % batch
    pieces = blocks.cut(job.fn, work.params, job.examples, batch, step.whole)
    teachers = blocks.cut(job.teacher, work.floats, job.examples, batch, step.whole)
    if len(pieces) != len(teachers):
        raise JaxqError(f"the function has {len(pieces)} blocks and the float one {len(teachers)}")
    own_paths(pieces, job.targets)
    stream = floats = blocks.start(job.examples, batch, count)
    loss = losses.Loss(job, work, step, teachers, floats)
    runs: dict[Any, Any] = {}
    for n, (stage, teacher) in enumerate(zip(pieces, teachers, strict=True)):
        last = n + 1 == len(pieces)
        wanted = blocks.outputs(teacher, loss.leaves[n], floats)
        spec = spec_of(job, work, stage, step)
        if spec.trains:
            run = runs.setdefault((stage.program.key, spec), functools.partial(run_block, stage.program, spec))
            trained, fixed = started(job, work, stage, spec, step)
            rounded_now = functools.partial(blocks.outputs, stage, leaves(job, work, stage), stream)
            prepared = loss.prepare(n, rounded_now, wanted)
            floated = None if step.mixed == 1 else blocks.gathered(teacher, floats)
            found = reconstruct(
                run,
                loss.error(n),
                adaround.gates_penalty if step.train == "rounding" else None,
                trained,
                fixed | {"loss": prepared.shared},
                Data(blocks.gathered(stage, stream), floated, prepared.targets),
                _settings(step, batch),
                key=jax.random.fold_in(job.key, n),
                renew=_renewal(prepared.again, step, functools.partial(_outputs, stage, spec, stream)),
                progress=functools.partial(_tell, job, n, len(pieces), step.iterations),
            )
            work = taken_back(work, stage, spec, fixed, found.trained)
        if not last:
            rounds = leaves(job, work, stage, weights=step.quantized)
            stream = blocks.advanced(stage, stream, blocks.outputs(stage, rounds, stream))
            floats = blocks.advanced(teacher, floats, wanted)
    return work


def _renewal(
    again: losses.Again | None, step: Reconstruct, outputs: Callable[[Any, Any], list[list[Array]]]
) -> Renew | None:
    """Takes the loss along with the training, `rank` times in all, where the loss does that."""
    if again is None:
        return None
    times = 1

    def renew(trained: Any, fixed: dict[str, Any], done: int) -> dict[str, Any]:
        nonlocal again, times
        if again is not None and times < step.rank and done * step.rank >= times * step.iterations:
            shared, again = again(outputs(trained, fixed))
            fixed, times = fixed | {"loss": shared}, times + 1
        return fixed

    return renew


def _outputs(stage: Stage, spec: Spec, stream: blocks.Carries, trained: Any, fixed: Any) -> list[list[Array]]:
    """What the block gives for each batch where its training is, with all that is quantized."""
    still = spec._replace(drop=1.0)
    return [_output(stage.program, still, trained, fixed, blocks.live(stage, carry)) for carry in stream]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _output(program: Program, spec: Spec, trained: Any, fixed: Any, inputs: list[Any]) -> list[Any]:
    return run_block(program, spec, trained, fixed, inputs, jax.random.key(0))


def _settings(step: Reconstruct, batch: int) -> Settings:
    falling = ("scales",) if step.train == "rounding" else ("scales", "weights")
    rates = ((step.train, step.rate), ("scales", step.scale_rate))
    return Settings(step.iterations, batch, rates, falling, step.mixed, chunk=_chunk(step))


def _chunk(step: Reconstruct) -> int:
    """Steps between two looks: a loss that follows the training wants one whenever it moves on."""
    most = -(-step.iterations // step.rank) if step.loss == "fima" else step.iterations
    return min(500, most)


def _tell(job: Job, n: int, count: int, iterations: int, done: int, error: float) -> None:
    job.tell(f"block {n + 1} of {count}, {done}/{iterations}, error {error:.3g}", (n + done / iterations) / count)


class Spec(NamedTuple):
    """What is trained in a program, by positions and by its own names: equal blocks have equal specs.

    weights: (position, layout) of those on a grid. latent: (position, layout) of weights that are trained
    themselves. biases: positions of the biases beside those. inputs: positions with a quantizer of the input, and
    grids: what those are. names: activations with a quantizer.
    """

    train: str
    weights: tuple[tuple[int, Layout], ...]
    latent: tuple[tuple[int, Layout], ...]
    biases: tuple[int, ...]
    inputs: tuple[int, ...]
    grids: tuple[Any, ...]
    names: tuple[str, ...]
    drop: float
    scales: bool

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.weights if self.train == "rounding" else self.latent)


def spec_of(job: Job, work: Work, stage: Stage, step: Reconstruct) -> Spec:
    sites = stage.program.sites
    paths = [str(slot) for slot in stage.paths]
    chosen = [(p, site.layout) for p, site in sites.items() if paths[p] in job.targets]
    on_grid = [(p, layout) for p, layout in chosen if step.quantized and paths[p] in work.weights]
    beside = {paths[p].removesuffix("kernel") + "bias" for p, _ in chosen}
    inputs = [p for p in sites if paths[p] in work.inputs]
    rules = [work.rule(paths[p]) for p in inputs]
    pairs = zip(stage.program.names, stage.activations, strict=True)
    return Spec(
        train=step.train,
        weights=tuple(on_grid),
        latent=tuple(chosen) if step.train == "weights" else (),
        biases=tuple(p for p, path in enumerate(paths) if path in beside) if step.train == "weights" else (),
        inputs=tuple(inputs),
        grids=tuple(rule.grid for rule in rules if rule is not None),
        names=tuple(own for own, path in pairs if path in work.named),
        drop=step.drop,
        scales=step.scale_rate > 0,
    )


def started(
    job: Job, work: Work, stage: Stage, spec: Spec, step: Reconstruct
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is trained, what is not) of a block, as `run_block` takes them."""
    paths = [str(slot) for slot in stage.paths]
    quantizers = {str(p): work.inputs[paths[p]] for p in spec.inputs}
    pairs = zip(stage.program.names, stage.activations, strict=True)
    quantizers |= {own: work.named[path] for own, path in pairs if own in spec.names}
    scales = {k: q.scale for k, q in quantizers.items() if spec.scales and isinstance(q, AffineQuantizer)}
    fixed: dict[str, Any] = {
        "leaves": [work.params[path] for path in paths],
        "consts": list(stage.consts),
        "quantizers": quantizers,
        "grids": {str(p): work.weights[paths[p]] for p, _ in spec.weights},
    }
    if spec.train == "weights":
        latent = {str(p): jnp.asarray(work.params[paths[p]]) for p in (*(p for p, _ in spec.latent), *spec.biases)}
        return {"weights": latent, "scales": scales}, fixed
    gates = {}
    for p, layout in spec.weights:
        grid, format = work.weights[paths[p]], job.targets[paths[p]].rule.format
        assert isinstance(format, Uniform)
        matrix = layout.to_canonical(jnp.asarray(work.params[paths[p]]))
        gates[str(p)] = adaround.start(matrix, grid.scale[None, None], grid.zero[None, None], format)
    fixed["gates"] = {k: dataclasses.replace(a, alpha=jnp.zeros(())) for k, a in gates.items()}
    return {"rounding": {k: a.alpha for k, a in gates.items()}, "scales": scales}, fixed


def run_block(
    program: Program, spec: Spec, trained: dict[str, Any], fixed: dict[str, Any], inputs: list[Any], key: Array
) -> list[Any]:
    """The block's outputs while it is trained."""
    own: list[Any] = list(fixed["leaves"])
    if spec.train == "weights":
        for p, w in trained["weights"].items():
            own[int(p)] = w
    for p, layout in spec.weights:
        if spec.train == "rounding":
            gate = dataclasses.replace(fixed["gates"][str(p)], alpha=trained["rounding"][str(p)])
            own[p] = layout.from_canonical(adaround.soft(gate))
        else:
            own[p] = rounded(own[p], layout, fixed["grids"][str(p)])
    quantizers = {}
    for i, (name, quantizer) in enumerate(sorted(fixed["quantizers"].items())):
        if name in trained["scales"]:
            quantizer = dataclasses.replace(quantizer, scale=trained["scales"][name])
        dropped = Dropped(quantizer, jax.random.fold_in(key, i), spec.drop)
        quantizers[name] = quantizer if spec.drop == 1 else dropped
    for p, grid in zip(spec.inputs, spec.grids, strict=True):
        own[p] = rounded_input(own[p], quantizers[str(p)], grid, program.sites[p].layout)
    named = {name: quantizers[name] for name in spec.names}
    return program.run(Activated(own, named) if named else own, [*fixed["consts"], *inputs])


def taken_back(work: Work, stage: Stage, spec: Spec, fixed: dict[str, Any], trained: dict[str, Any]) -> Work:
    """The work with what was trained; learned rounding has become the value of the weight."""
    paths = [str(slot) for slot in stage.paths]
    params: dict[str, Any] = {}
    if spec.train == "weights":
        params = {paths[int(p)]: w for p, w in trained["weights"].items()}
    else:
        for p, layout in spec.weights:
            gate = dataclasses.replace(fixed["gates"][str(p)], alpha=trained["rounding"][str(p)])
            params[paths[p]] = layout.from_canonical(adaround.hard(gate)).astype(work.params[paths[p]].dtype)
    inputs, named = {}, {}
    own_to_path = dict(zip(stage.program.names, stage.activations, strict=True))
    for name, scale in trained["scales"].items():
        if name in own_to_path:
            path = own_to_path[name]
            named[path] = dataclasses.replace(work.named[path], scale=scale)
        else:
            path = paths[int(name)]
            inputs[path] = dataclasses.replace(work.inputs[path], scale=scale)
    return work.having(params=params, inputs=inputs, named=named)
