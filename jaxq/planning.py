"""`jaxq.plan`: what a recipe would do to a function's parameters, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq import tracing
from jaxq.errors import JaxqError, at_path
from jaxq.formats.base import is_quantized
from jaxq.recipe import Recipe, Rule
from jaxq.sites import Site, sites
from jaxq.stages import stages
from jaxq.transforms.registry import STATISTICS


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """What a run would do to one leaf. format is "" where it stays as it is."""

    path: str
    kind: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would do, from shapes alone. peak_bytes: an estimate, weights not yet read left out."""

    rows: list[SitePlan]
    bytes_before: int
    bytes_after: int
    peak_bytes: int


class Target(NamedTuple):
    """A leaf that a rule quantizes."""

    site: Site
    rule: Rule


def nbytes(leaf: Any) -> int:
    return leaf.nbytes if is_quantized(leaf) else math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def arguments(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def describe(rule: Rule | None) -> str:
    """A rule's format in words, "" for none."""
    return "" if rule is None or rule.format is None else str(rule.format)


def targets(
    fn: Callable[..., Any], params: Any, batch: Any, recipe: Recipe
) -> tuple[list[Site], dict[str, Target]]:
    """(every site that could be quantized, {path: target}). JaxqError for a rule that matches none of them."""
    found: dict[str, Site] = {}
    for site in sites(fn, params, *arguments(batch)):
        if not site.in_axes or not site.out_axes or site.kind == "product":
            continue
        # A leaf with several uses is laid out for its product: that is where its data comes from.
        if site.path not in found or found[site.path].kind == "embedding":
            found[site.path] = site
    recipe.check(list(found))
    out = {}
    for path, site in found.items():
        rule = recipe.rule(path)
        if rule is None or rule.solver is None or rule.format is None:
            continue
        with at_path(path):
            rule.format.abstract(site.matrix_shape, site.dtype, site.layout)
        if rule.needs and site.kind == "embedding":
            raise JaxqError(f"{path} is a look-up: no data flows into it, so {rule.solver} cannot fit it; use rtn")
        out[path] = Target(site, rule)
    return list(found.values()), out


def plan(fn: Callable[..., Any], params: Any, batch: Any, recipe: Recipe, batches: int = 1) -> Plan:
    """What `quantize` would do, without reading a weight.

    Args:
        params, batch: arrays, or anything with a shape and a dtype.
        batches: how many batches the calibration will have, for the memory estimate.
    """
    flat = tracing.flatten(params)
    found, chosen = targets(fn, params, batch, recipe)
    rows = []
    for site in found:
        target = chosen.get(site.path)
        before = nbytes(flat[site.path])
        after = before
        if target is not None and target.rule.format is not None:
            after = target.rule.format.abstract(site.matrix_shape, site.dtype, site.layout).nbytes
        rows.append(SitePlan(site.path, site.kind, site.shape, describe(target and target.rule), before, after))
    listed = {r.path for r in rows}
    other = sum(nbytes(leaf) for path, leaf in flat.items() if path not in listed)
    before, after = (other + sum(getattr(r, f) for r in rows) for f in ("bytes_before", "bytes_after"))
    return Plan(rows, before, after, after + _working_bytes(fn, params, batch, recipe, chosen, batches))


def _working_bytes(
    fn: Callable[..., Any], params: Any, batch: Any, recipe: Recipe, chosen: dict[str, Target], batches: int
) -> int:
    """The largest stage: its float weights, its statistics, and the activations that are kept meanwhile.

    Forwards, those are two streams at one cut; backwards, the inputs of every stage.
    """
    flat = tracing.flatten(params)
    if not recipe.needs_data:
        return max((nbytes(flat[p]) for p in chosen), default=0)
    worst = 0
    pieces = stages(fn, params, *arguments(batch))
    saved = (
        batches * sum(nbytes(a) for p in pieces for a in p.program.input_avals) if recipe.needs_gradients else 0
    )
    for n, stage in enumerate(pieces):
        weights = sum(nbytes(flat[s.path]) for s in stage.paths)
        statistics = sum(_statistic_bytes(chosen[s.path]) for s in stage.paths if s.path in chosen)
        live = sum(nbytes(a) for a in stage.program.input_avals)
        streams = 2 * batches * live if n else 0
        worst = max(worst, weights + statistics + max(streams, saved))
    return worst


def _statistic_bytes(target: Target) -> int:
    """What the solver of one leaf is given, and makes of it."""
    total = 0
    for name in target.rule.needs.values():
        state = jax.eval_shape(lambda name=name: STATISTICS[name].init(target.site))
        # A Hessian, its damped copy, its factor and the inverse of that.
        total += 4 * sum(nbytes(x) for x in jax.tree.leaves(state))
    return total
