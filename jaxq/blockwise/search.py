"""The step `calibrate`: grids of weights and activations from a sample, one block after another."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxq import tracing
from jaxq.blockwise import blocks
from jaxq.blockwise.work import Job, Work, leaves
from jaxq.calibration import whole as whole
from jaxq.errors import at_path
from jaxq.formats.activations import AffineQuantizer
from jaxq.formats.grids import Affine
from jaxq.formats.uniform import Uniform
from jaxq.interpreter import Rules, Walk
from jaxq.observe import merge_records, observed
from jaxq.patterns import matches
from jaxq.sites import Site
from jaxq.solvers import output_ranges, ranges
from jaxq.stages import Program, Stage
from jaxq.steps import Calibrate


def calibrate(job: Job, work: Work, step: Calibrate) -> Work:
    """Fits the grids of a block on what reaches it, then lets the examples through."""
    count = min(step.images, len(job.examples[0]))
    batch = min(step.batch, count)
    pieces = blocks.cut(job.fn, work.params, job.examples, batch)
    carries = blocks.start(job.examples, batch, count - count % batch)
    for n, stage in enumerate(pieces):
        job.tell(f"calibrating block {n + 1} of {len(pieces)}", n / len(pieces))
        work = _fitted(job, work, step, stage, carries)
        if n + 1 < len(pieces):
            rounds = step.stream == "quantized"
            own = leaves(job, work, stage, weights=rounds, activations=rounds)
            carries = blocks.advanced(stage, carries, blocks.outputs(stage, own, carries))
    return work


def _fitted(job: Job, work: Work, step: Calibrate, stage: Stage, carries: blocks.Carries) -> Work:
    weights = {
        position: site
        for position, site in stage.program.sites.items()
        if stage.paths[position] in job.targets and step.weights != "none"
    }
    inputs = {
        position: site
        for position, site in stage.program.sites.items()
        if site.kind == "matmul" and _fits(work, step, stage.paths[position])
    }
    pairs = zip(stage.program.names, stage.activations, strict=True)
    named = {own: path for own, path in pairs if _fits(work, step, path)}
    needed = {*inputs, *(weights if step.weights == "output" else ())}
    own = leaves(job, work, stage, weights=False, activations=False)
    known = seen(stage, own, carries, tuple(str(p) for p in sorted(needed)) + tuple(named))
    found: dict[str, dict[str, Any]] = {"weights": {}, "inputs": {}, "named": {}}
    for position in sorted({*weights, *inputs}):
        path = str(stage.paths[position])
        site = stage.program.sites[position]
        with at_path(path):
            x = known.get(str(position))
            matrix = site.layout.to_canonical(jnp.asarray(work.params[path]))
            on_x, on_w = _linear(job, work, step, path, site, x, matrix, position in weights, position in inputs)
            found["inputs"] |= {} if on_x is None else {path: on_x}
            found["weights"] |= {} if on_w is None else {path: on_w}
    found["named"] = _named(work, stage, known, named)
    return work.having(**found)


def _fits(work: Work, step: Calibrate, path: str) -> bool:
    """Whether the step fits a grid to this activation."""
    return step.activations and matches(step.only, path) and work.rule(path) is not None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(program: Program, keys: tuple[str, ...], leaves: Any, inputs: list[Any]) -> Any:
    return observed(program.run, whole(keys))(leaves, inputs)[1]


def seen(stage: Stage, leaves: Any, carries: blocks.Carries, keys: tuple[str, ...]) -> dict[str, Array]:
    """{position of a leaf, or a program's name of an activation: what reaches it}, examples along axis 0."""
    if not keys:
        return {}
    records: Any = None
    for carry in carries:
        new = _observe(stage.program, keys, leaves, stage.inputs(carry))
        records = new if records is None else merge_records(whole(keys), records, new)
    return {key: record.state for key, record in records.items()}


def _linear(
    job: Job,
    work: Work,
    step: Calibrate,
    path: str,
    site: Site,
    x: Array | None,
    matrix: Float[Array, "in out"],
    fit_weight: bool,
    fit_input: bool,
) -> tuple[Any, AffineQuantizer | None]:
    """(quantizer of the input, grids of the weight), None for what is not asked for."""
    rule = work.rule(path) if fit_input else None
    format = job.targets[path].rule.format if fit_weight else None
    assert format is None or isinstance(format, Uniform)
    by_output = rule is not None and rule.search == "output" and _per_tensor(rule.grid)
    if format is not None and step.weights == "output":
        assert x is not None
        bits = rule.grid.bits if rule is not None and rule.grid is not None and by_output else None
        on_x, on_w = output_ranges.linear_output_error(x, matrix, bits, format.bits)
        if rule is not None and not by_output:
            on_x = rule.quantizer(x)
        return on_x, _weight_grid(on_w, format)
    on_w = None if format is None else _weight_grid(_SEARCHES[step.weights](matrix, format.bits), format)
    return (None if rule is None else rule.quantizer(x)), on_w  # type: ignore[arg-type]


def _per_tensor(grid: Any) -> bool:
    return isinstance(grid, Affine) and grid.share == "tensor"


_SEARCHES = {
    "minmax": lambda w, bits: ranges.minmax(w, bits, 0),
    "percentile": lambda w, bits: ranges.percentile(w, bits, 0, ranges.WEIGHT_PERCENTILES),
    "mse": lambda w, bits: ranges.mse_grid(w, bits, 0, floor=ranges.WEIGHT_FLOOR),
}


def _weight_grid(q: AffineQuantizer, format: Uniform) -> AffineQuantizer:
    """The grid as it will be stored: scales in the format's dtype, zero points among the codes."""
    scale = jnp.ravel(q.scale).astype(format.scale_dtype).astype(jnp.float32)
    return dataclasses.replace(q, scale=scale, zero=jnp.clip(jnp.round(jnp.ravel(q.zero)), 0, format.levels))


# ---- products of activations -----------------------------------------------------------------------------


def _named(work: Work, stage: Stage, known: dict[str, Array], named: dict[str, str]) -> dict[str, Any]:
    """{path: quantizer} of named activations; those searched by "output" that meet in a product, together."""
    out: dict[str, Any] = {}
    for (a, b), numbers in products(stage.program).items():
        if a not in named or b not in named or named[a] in out or named[b] in out:
            continue
        rules = [work.rule(named[own]) for own in (a, b)]
        if any(r is None or r.search != "output" or not isinstance(r.grid, Affine) for r in rules):
            continue
        kept = {r.grid.share for r in rules}  # type: ignore[union-attr]
        axes = tuple(range(known[a].ndim)) if kept == {"tensor"} else (0, 2, 3)
        with at_path(named[a]):
            found = output_ranges.product_output_error(
                known[a], known[b], tuple(r.grid.bits for r in rules),  # type: ignore[union-attr]
                axes=axes, product=_product(numbers),
            )  # fmt: skip
        out |= {named[own]: q for own, q in zip((a, b), found, strict=True)}
    for own, path in named.items():
        if path not in out:
            rule = work.rule(path)
            assert rule is not None
            with at_path(path):
                out[path] = rule.quantizer(known[own])
    return out


@functools.cache
def _product(numbers: Any) -> Any:
    # The search compiles once for each function that it is given.
    return lambda a, b: lax.dot_general(a, b, numbers, precision="highest")


class ProductRules(Rules):
    """Collects which named activations meet in a product, and how."""

    follow_names = True

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, str], Any] = {}

    def product(self, eqn: Any, names: tuple[str | None, str | None]) -> None:
        if names[0] is not None and names[1] is not None:
            self.pairs[names[0], names[1]] = eqn.params["dimension_numbers"]


@functools.cache
def products(program: Program) -> dict[tuple[str, str], Any]:
    """{(name, name): dimension numbers} of the products of two named activations of a program.

    Names that it gives more than once are left out: they do not say which is meant.
    """
    rules = ProductRules()
    call = tracing.trace(program.run, (program.leaf_avals, program.input_avals))
    jax.eval_shape(lambda *values: Walk(rules).run(call.jaxpr, call.consts, list(values)) and None, *call.values)
    clear = {name for name in program.names if f"{name}#2" not in program.names}
    return {pair: numbers for pair, numbers in rules.pairs.items() if set(pair) <= clear}
