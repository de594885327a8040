"""`jaxq.calibrate`: static quantizers of the activations of a function, from examples, stage by stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxq import tracing
from jaxq.activation_rule import ActivationRule as ActivationRule
from jaxq.errors import JaxqError, at_path
from jaxq.formats.base import is_quantized
from jaxq.formats.rounded_input import rounded_input
from jaxq.names import Activated, split
from jaxq.observe import merge_records, observed
from jaxq.patterns import first_match
from jaxq.sites import Site
from jaxq.stages import Program, Slot, Stage, stages

STREAMS = ("float", "quantized")

#: {path: (rule, site)} of what is to be fitted; the site is that of a weight, None for a named activation.
Chosen = dict[str, tuple["ActivationRule", Site | None]]


@dataclasses.dataclass(frozen=True)
class Whole:
    """The statistic that keeps all there is: examples one after the other along axis 0. Not for loops."""

    def init(self, site: Any) -> None:
        return None

    def update(self, state: None, x: Array, weights: Any = None) -> Array:
        return x

    def merge(self, a: Array, b: Array) -> Array:
        return jnp.concatenate([a, b])


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    rules: Sequence[ActivationRule],
    *,
    stream: str = "float",
) -> Activated:
    """The function's parameters with quantizers for its activations, each fitted to what reaches it.

    Args:
        fn: `fn(params, *args)`, pure, cut into stages as by `jaxq.stages`.
        params: pytree of arrays or quantized arrays, or `jaxq.Activated`, whose quantizers stay where no rule
            replaces them.
        batches: each an array (the one argument) or a tuple of arguments, all of one shape.
        rules: the first whose pattern matches a path decides; a rule that decides about none is an error.
        stream: what the examples are by the time they reach a stage: "float", the given function's own; or
            "quantized", what the stages before it make of them with their quantizers. Within a stage activations
            are not rounded while others are fitted.

    Returns `Activated(params, quantizers)`: leaves whose inputs are rounded are `RoundedInput` arrays, the rest
    stands under the names of activations. Run it with `jaxq.quantized(fn)`.

    Inputs of convolutions and look-ups are left alone, whatever matches them. Raises JaxqError for a rule that
    matches nothing else, stacked layers, a sample with NaN, or negative ones for a logarithmic grid. What is in
    memory is one stage with those of its activations that are fitted, for all examples, and their carry.
    """
    if stream not in STREAMS:
        raise JaxqError(f"stream is {' or '.join(map(repr, STREAMS))}, not {stream!r}")
    given = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not given:
        raise JaxqError("there are no batches to calibrate on: give at least one")
    params, quantizers = split(params)
    pieces = stages(fn, params, *given[0])
    chosen = _chosen(pieces, rules)
    flat = tracing.flatten(params)
    found: dict[str, Any] = {}
    carries: list[Any] = list(given)
    for n, piece in enumerate(pieces):
        taken = piece.take(Activated(flat, quantizers))
        found |= _fitted(piece, taken, carries, chosen)
        if n + 1 < len(pieces):
            now = taken
            if stream == "quantized":
                now = piece.take(_with(flat, quantizers, {k: found[k] for k in found if k in _own(piece)}, chosen))
            carries = [piece.fn(now, carry) for carry in carries]
    done = _with(flat, quantizers, found, chosen)
    return Activated(tracing.replace(params, done.params), done.activations)


def _own(piece: Stage) -> set[str]:
    """Paths of the leaves and of the activations of a stage."""
    return {str(slot) for slot in piece.paths} | set(piece.activations)


def _chosen(pieces: Sequence[Stage], rules: Sequence[ActivationRule]) -> Chosen:
    patterns: dict[str, ActivationRule] = {}
    for rule in rules:
        patterns.setdefault(rule.pattern, rule)
    decided: dict[str, bool] = dict.fromkeys(patterns, False)
    chosen: Chosen = {}
    for piece in pieces:
        sites = piece.program.sites
        weights = [
            (slot, sites[i]) for i, slot in enumerate(piece.paths) if i in sites and sites[i].kind == "matmul"
        ]
        for path, site in [*weights, *((name, None) for name in piece.activations)]:
            pattern = first_match(patterns, path)
            if pattern is None:
                continue
            decided[pattern] = True
            if patterns[pattern].grid is None:
                continue
            if isinstance(path, Slot) and path.index is not None:
                raise JaxqError(f"{path}: inputs of stacked layers are not calibrated; unstack them")
            chosen[str(path)] = (patterns[pattern], site)
    known = [path for piece in pieces for path in (*piece.paths, *piece.activations)]
    tracing.check_paths(decided, known)
    return chosen


def whole(keys: Iterable[str]) -> dict[str, Any]:
    """{key: the statistic that keeps all there is}."""
    return dict.fromkeys(keys, Whole())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(program: Program, keys: tuple[str, ...], leaves: Any, inputs: list[Any]) -> Any:
    return observed(program.run, whole(keys))(leaves, inputs)[1]


def _fitted(
    piece: Stage,
    taken: dict[str, Any],
    carries: Sequence[Any],
    chosen: Chosen,
) -> dict[str, Any]:
    """{path: quantizer} of what is to be fitted in a stage."""
    # Inside a program leaves go by their positions, and activations by the names that equal programs share.
    leaves = {str(i): str(slot) for i, slot in enumerate(piece.paths) if str(slot) in chosen}
    pairs = zip(piece.program.names, piece.activations, strict=True)
    keys = leaves | {own: path for own, path in pairs if path in chosen}
    if not keys:
        return {}
    records: Any = None
    for carry in carries:
        new = _observe(piece.program, tuple(keys), [taken[slot] for slot in piece.paths], piece.inputs(carry))
        records = new if records is None else merge_records(whole(keys), records, new)
    out = {}
    for own, path in keys.items():
        with at_path(path):
            out[path] = chosen[path][0].quantizer(records[own].state)
    return out


def _with(
    flat: dict[str, Any],
    quantizers: dict[str, Any],
    found: dict[str, Any],
    chosen: Chosen,
) -> Activated:
    """Flat parameters and quantizers with what was found put into its place."""
    leaves, named = dict(flat), dict(quantizers)
    for path, quantizer in found.items():
        rule, site = chosen[path]
        if site is None:
            named[path] = quantizer
            continue
        leaf = leaves[path]
        if is_quantized(leaf) and leaf.rounds_input:
            leaf = dataclasses.replace(leaf, quantizer=quantizer)
        else:
            assert rule.grid is not None
            dense = leaf if is_quantized(leaf) else jnp.asarray(np.asarray(leaf))
            leaf = rounded_input(dense, quantizer, rule.grid, site.layout)
        leaves[path] = leaf
    return Activated(leaves, named)
