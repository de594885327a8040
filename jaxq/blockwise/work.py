"""What the steps of a recipe hand on: float parameters, and the grids that they will be rounded to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxq.activation_rule import ActivationRule
from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer, qdrop
from jaxq.formats.base import Layout, QuantizedArray
from jaxq.formats.rounded_input import rounded_input
from jaxq.formats.uniform import Uniform, UniformArray, assemble
from jaxq.names import Activated
from jaxq.patterns import first_match
from jaxq.planning import Target
from jaxq.sites import Site
from jaxq.stages import Stage


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done, and of what; the same for all steps.

    fn: the function that is quantized. teacher: the float function, which it is to follow. Both take flat
    parameters {path: array}. examples: arguments of the function, calibration examples along axis 0. targets:
    weights that are rounded. tell: called with (what is done now, share of the step).
    """

    fn: Callable[..., Any]
    teacher: Callable[..., Any]
    examples: tuple[Any, ...]
    targets: dict[str, Target]
    key: Key[Array, ""]
    tell: Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Work:
    """The state between two steps.

    params: float leaves by path. floats: those of the float function, which only an equivalence changes. rules: of
    activations. weights: {path: grid of the canonical matrix, one for each output}. inputs: {path of a weight:
    quantizer of what it is multiplied with}. named: {name of an activation: quantizer}.
    """

    params: dict[str, Any]
    floats: dict[str, Any]
    rules: tuple[ActivationRule, ...]
    weights: dict[str, AffineQuantizer] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    named: dict[str, Any] = dataclasses.field(default_factory=dict)

    def rule(self, path: str) -> ActivationRule | None:
        pattern = first_match([rule.pattern for rule in self.rules], path)
        return next((rule for rule in self.rules if rule.pattern == pattern and rule.grid is not None), None)

    def having(self, **more: dict[str, Any]) -> Work:
        """With further entries."""
        return dataclasses.replace(self, **{name: getattr(self, name) | new for name, new in more.items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dropped:
    """Rounds each element with a probability only (QDrop): a quantizer while a block is trained."""

    quantizer: Any
    key: Any
    probability: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Array) -> Array:
        return qdrop(x, self.quantizer(x), self.key, self.probability)


def leaves(job: Job, work: Work, stage: Stage, *, weights: bool = True, activations: bool = True) -> Any:
    """What the stage's program takes for its leaves. weights, activations: whether those are rounded."""
    taken: dict[str, Any] = {}
    for position, slot in enumerate(stage.paths):
        leaf = work.params[str(slot)]
        site = stage.program.sites.get(position)
        if site is not None and weights and slot in work.weights:
            leaf = rounded(leaf, site.layout, work.weights[slot])
        if site is not None and activations and slot in work.inputs:
            rule = work.rule(slot)
            assert rule is not None and rule.grid is not None
            leaf = rounded_input(leaf, work.inputs[slot], rule.grid, site.layout)
        taken[slot] = leaf
    named = {path: work.named[path] for path in stage.activations if activations and path in work.named}
    return stage.leaves(taken | named)


def rounded(w: Array, layout: Layout, grid: AffineQuantizer) -> Array:
    """The weight with each output on its grid."""
    return layout.from_canonical(grid(layout.to_canonical(w)))


def stored(w: Float[Array, "*core"], site: Site, grid: AffineQuantizer, format: Uniform) -> UniformArray:
    """The weight as codes on its grid."""
    codes = grid.codes(site.layout.to_canonical(w)).astype(jnp.uint8)
    return assemble(codes, grid.scale[None], jnp.round(grid.zero)[None], format, site.layout, w.dtype)


def own_paths(pieces: Sequence[Stage], targets: dict[str, Target]) -> None:
    """JaxqError for weights that are stacked or used in several blocks: neither can be trained block by block."""
    seen: set[str] = set()
    for stage in pieces:
        for slot in stage.paths:
            if slot.path in targets and (slot.index is not None or slot.path in seen):
                why = "one of a stack: unstack the layers" if slot.index is not None else "used in several blocks"
                raise JaxqError(f"{slot}: a weight that is {why}; leave it out of the recipe")
            seen.add(slot.path)


def finished(job: Job, work: Work) -> Activated:
    """Flat parameters with quantized leaves, and quantizers of named activations."""
    flat = dict(work.params)
    for path, target in job.targets.items():
        leaf: Any = flat[path]
        if path in work.weights:
            assert isinstance(target.rule.format, Uniform)
            leaf = stored(leaf, target.site, work.weights[path], target.rule.format)
        flat[path] = leaf
    for path, quantizer in work.inputs.items():
        rule = work.rule(path)
        assert rule is not None and rule.grid is not None
        layout = None if isinstance(flat[path], QuantizedArray) else job.targets[path].site.layout
        flat[path] = rounded_input(flat[path], quantizer, rule.grid, layout)
    return Activated(flat, work.named)
