"""Statistics of a loss's gradient at each site, taken backwards, stage by stage.

A site gets a *probe*: zeros that do not change its output, but whose cotangent is defined to be the statistic of
the site's input and of the gradient at its output. Differentiating a stage with respect to the probes and to its
inputs is then all there is to do, whatever loops and calls the sites lie in; gradients of weights are never
formed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import tracing
from jaxq.errors import JaxqError
from jaxq.interpreter import Walk
from jaxq.observe import ObserveRules
from jaxq.patterns import first_match
from jaxq.sites import Site, site_of
from jaxq.stages import Program, Slot, Stage, stages
from jaxq.tracked import Leaf, Records
from jaxq.uses import Use

#: {position of a leaf in its stage: {name of a statistic: state}}
States = dict[int, dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Several:
    """Statistics of one site by name, as one statistic."""

    parts: dict[str, Any]

    def init(self, site: Any) -> dict[str, Any]:
        return {name: s.init(site) for name, s in self.parts.items()}

    def update(self, state: dict[str, Any], x: Any, g: Any, weights: Any = None) -> dict[str, Any]:
        return {name: s.update(state[name], x, g, weights) for name, s in self.parts.items()}

    def merge(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {name: s.merge(a[name], b[name]) for name, s in self.parts.items()}


class ProbeRules(ObserveRules):
    """Puts a probe at each site that a statistic asks for."""

    # A rule around a call that leaves enter would hide the probes inside; other calls keep theirs.
    keep_custom_rules = False
    follow_names = False

    def __init__(
        self, statistics: dict[str, Any], shapes: dict[str, Any], weights: Any, probes: dict[str, Any] | None
    ):
        super().__init__(statistics, shapes, weights)
        self.probes = probes
        #: Without probes, what shapes they must have.
        self.wanted: dict[str, Any] = {}

    def site(self, use: Use, leaf: Leaf, x: Any, dense: Callable[[], Any]) -> tuple[Any, Records]:
        statistic: Any = self.statistic(leaf.path)
        if statistic is None or use.kind == "embedding":
            return dense(), {}
        if use.note or use.kind == "grouped":
            what = use.note or "grouped matmul"
            raise JaxqError(f"{leaf.path}: no gradient statistics for a {what}; leave it out of the patterns")
        if leaf.levels or leaf.index:
            raise JaxqError(
                f"{leaf.path}: gradient statistics of a stack that is sliced inside a stage are not supported; "
                "scan over it at the top of the function, so that each layer is a stage"
            )
        site = site_of(use, leaf, self.shapes)
        self.sites.setdefault(leaf.path, site)
        lead = len(use.batch_axes)
        inputs = use.canonical_input(x)
        tokens = inputs.shape[lead:-1]
        weights = self.token_weights(leaf.path, tokens)

        def statistics(x: Any, g: Any, weights: Any) -> Any:
            def update(x: Any, g: Any) -> Any:
                return statistic.update(statistic.init(_core(site)), x, g, weights)

            for _ in range(lead):
                update = jax.vmap(update)
            return update(x, use.canonical_output(g, tokens))

        y = dense()
        if self.probes is None:
            self.wanted[leaf.path] = jax.eval_shape(statistics, inputs, y, weights)
            return y, {}
        return _probe(statistics)(y, inputs, weights, self.probes[leaf.path]), {}


def _core(site: Site) -> Site:
    """The site of one matrix of a stack."""
    lead = len(site.batch_axes)
    shift = lambda axes: tuple(a - lead for a in axes)  # noqa: E731
    return dataclasses.replace(
        site, shape=site.shape[lead:], in_axes=shift(site.in_axes), out_axes=shift(site.out_axes), batch_axes=()
    )


def _probe(statistics: Callable[..., Any]) -> Callable[..., Any]:
    """`y` itself; the cotangent of `probe` is statistics(x, cotangent of y, weights)."""

    @jax.custom_vjp
    def tap(y: Any, x: Any, weights: Any, probe: Any) -> Any:
        return y

    def forward(y: Any, x: Any, weights: Any, probe: Any) -> Any:
        return y, (x, weights)

    def backward(saved: Any, g: Any) -> Any:
        x, weights = saved
        return g, None, None, statistics(x, g, weights)

    tap.defvjp(forward, backward)
    return tap


@dataclasses.dataclass(frozen=True, eq=False)
class Probes:
    """Gradient statistics of a program by position of its leaves; equal stages share one: it compiles once."""

    program: Program
    statistics: dict[str, Any]
    sites: dict[str, Site]

    def zeros(self, leaves: list[Any], inputs: list[Any], weights: Any) -> dict[str, Any]:
        """The probes: a state of each statistic."""
        shapes: dict[str, Any] = {}

        def trace(leaves: list[Any], inputs: list[Any], weights: Any) -> None:
            shapes.update(self.run(leaves, inputs, None, weights)[1].wanted)

        jax.eval_shape(trace, leaves, inputs, weights)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def run(
        self, leaves: list[Any], inputs: list[Any], probes: dict[str, Any] | None, weights: Any
    ) -> tuple[list[Any], ProbeRules]:
        """The program's outputs, with probes at its sites, and the rules that put them there."""
        call = tracing.trace(self.program.run, (leaves, inputs))
        shapes = {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in zip(call.paths, call.values, strict=True)}
        rules = ProbeRules(self.statistics, shapes, weights, probes)
        values = [
            Leaf.of(v, p) if i < call.parameters else v
            for i, (v, p) in enumerate(zip(call.values, call.paths, strict=True))
        ]
        walk = Walk(rules)
        outs, _ = walk.run(call.jaxpr, call.consts, values)
        return call.finish([walk.plain(o) for o in outs]), rules


def _stored(x: Any) -> Any:
    """The value kept until the way back: on the host, unless it is spread over devices."""
    if not isinstance(x, jax.Array) or len(x.sharding.device_set) > 1:
        return x
    return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


@functools.partial(jax.jit, static_argnums=0)
def _pull(
    probes: Probes, leaves: list[Any], inputs: list[Any], cotangents: list[Any], weights: Any
) -> tuple[dict[str, Any], list[Any]]:
    """(statistics, cotangents of the float inputs) for cotangents of the float outputs."""
    floats = [x for x in inputs if _is_float(x)]

    def outputs(zeros: dict[str, Any], floats: list[Any]) -> list[Any]:
        given = iter(floats)
        mixed = [next(given) if _is_float(x) else x for x in inputs]
        return [y for y in probes.run(leaves, mixed, zeros, weights)[0] if _is_float(y)]

    pull = jax.vjp(outputs, probes.zeros(leaves, inputs, weights), floats)[1]
    return pull(cotangents)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss_gradient(
    loss: Callable[..., Any], finish: Callable[..., Any], carry: dict[str, Any], args: Any, weights: Any
) -> tuple[Any, dict[str, Any]]:
    """(summed loss, its gradient with respect to each float value of the carry after the last stage)."""
    floats = {k: v for k, v in carry.items() if _is_float(v)}

    def total(floats: dict[str, Any]) -> Any:
        output = finish({**carry, **floats})
        each = loss(output, *args) if weights is None else loss(output, *args, weights=weights)
        return jnp.sum(each)

    return jax.value_and_grad(total)(floats)


class Sweep:
    """One pass over the data, forwards and then backwards.

    Memory: the inputs of every stage for all the data (on the host), the float weights of one stage, its
    statistics, and the activations that its backward pass needs for one batch.

    Args:
        pieces: the stages of the function.
        batches: tuples of its arguments.
        loss: `loss(output, *args) -> (sequences,)`, see `jaxq.losses`.
        targets: for each batch, one more argument of the loss (labels).
        weights: for each batch, token weights, given to the loss as keyword `weights` too.
    """

    def __init__(
        self,
        pieces: Sequence[Stage],
        batches: Sequence[tuple[Any, ...]],
        loss: Callable[..., Any],
        targets: Sequence[Any] | None = None,
        weights: Sequence[Any] | None = None,
    ):
        self.pieces, self.batches, self.loss = pieces, batches, loss
        self.targets, self.weights = targets, weights
        self.probes: dict[tuple[str, tuple[Any, ...]], Probes] = {}

    def run(
        self,
        read: Callable[[Stage], list[Any]],
        wanted: Callable[[Stage], dict[int, tuple[Site, dict[str, Any]]]],
        visit: Callable[[int, Stage, list[Any], States], None],
        first: int = 0,
    ) -> None:
        """Visits the stages from the last to `first`, each with the statistics of its leaves by position.

        Args:
            read: the float leaves of a stage.
            wanted: {position: (site, {name: statistic})} for the leaves of a stage.
            visit: called with (number of the stage, stage, leaves, {position: {name: state}}).
        """
        saved, cotangents = self.forward(read, first)
        for n in reversed(range(first, len(self.pieces))):
            stage = self.pieces[n]
            leaves = read(stage)
            states: States = {}
            probes = self.probes_of(stage, wanted(stage))
            for b, inputs in enumerate(saved[n]):
                found, given = self.pull(probes, stage, leaves, inputs, cotangents[b], self.weight(b))
                merged = {int(p): s for p, s in found.items()}
                states = merged if not states else self.merge(probes, states, merged)
                cotangents[b] = given
            saved[n] = []
            visit(n, stage, leaves, states)

    def weight(self, batch: int) -> Any:
        return None if self.weights is None else jnp.asarray(self.weights[batch])

    def forward(
        self, read: Callable[[Stage], list[Any]], first: int
    ) -> tuple[list[list[list[Any]]], list[dict[str, Any]]]:
        """Inputs of each stage for each batch, and the loss's gradient at the end."""
        carries: list[Any] = list(self.batches)
        saved: list[list[list[Any]]] = []
        last = self.pieces[-1]
        for n, stage in enumerate(self.pieces):
            leaves = read(stage)
            saved.append([])
            for b, carry in enumerate(carries):
                inputs = stage.inputs(carry)
                if n >= first:
                    saved[n].append([_stored(x) for x in inputs])
                outputs = stage.program.call(leaves, inputs)
                if stage is not last:
                    carries[b] = stage.advance(carry, outputs)
                else:
                    carries[b] = self.loss_gradient(b, stage.carry_after(carry, outputs))
        return saved, carries

    def loss_gradient(self, batch: int, carry: dict[str, Any]) -> dict[str, Any]:
        args = self.batches[batch]
        if self.targets is not None:
            args = (*args, self.targets[batch])
        finish = self.pieces[-1].finish
        assert finish is not None
        try:
            value, gradient = _loss_gradient(self.loss, finish, carry, args, self.weight(batch))
        except TypeError as error:
            raise JaxqError(f"the loss cannot be differentiated: {error}") from error
        if not np.isfinite(value):
            raise JaxqError(
                f"the loss of calibration batch {batch} is {float(value)}: nothing can be learnt from it"
            )
        return gradient

    def probes_of(self, stage: Stage, wanted: dict[int, tuple[Site, dict[str, Any]]]) -> Probes:
        key = (stage.program.key, tuple((p, *names) for p, (_, names) in wanted.items()))
        if key not in self.probes:
            statistics = {str(p): Several(parts) for p, (_, parts) in wanted.items()}
            # Within a stage a leaf is known by its position and has the shape of a slot.
            sites = {str(p): site for p, (site, _) in wanted.items()}
            self.probes[key] = Probes(stage.program, statistics, sites)
        return self.probes[key]

    def pull(
        self,
        probes: Probes,
        stage: Stage,
        leaves: list[Any],
        inputs: list[Any],
        after: dict[str, Any],
        weights: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(statistics, cotangents before the stage by name) given those after it."""
        outputs = [
            after.get(name, jnp.zeros(aval.shape, aval.dtype))
            for name, aval in zip(stage.writes, stage.program.output_avals, strict=True)
            if _is_float(aval)
        ]
        states, given = _pull(probes, leaves, inputs, outputs, weights)
        before = {k: v for k, v in after.items() if k not in stage.writes}
        names = [None] * len(stage.consts) + list(stage.reads)
        floats = [n for n, x in zip(names, inputs, strict=True) if _is_float(x)]
        for name, cotangent in zip(floats, given, strict=True):
            if name is not None:
                before[name] = before[name] + cotangent if name in before else cotangent
        return states, before

    def merge(self, probes: Probes, a: States, b: States) -> States:
        out = {}
        for position, state in a.items():
            merge = probes.statistics[str(position)].merge
            for _ in probes.sites[str(position)].batch_axes:
                merge = jax.vmap(merge)
            out[position] = merge(state, b[position])
        return out


def observe_gradients(
    fn: Callable[..., Any],
    params: Any,
    batches: Sequence[tuple[Any, ...]],
    statistics: dict[str, Any],
    loss: Callable[..., Any],
    targets: Sequence[Any] | None = None,
    weights: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """{path: state} of gradient statistics by pattern; the part of `jaxq.observe` that runs backwards."""
    if not batches:
        raise JaxqError("there are no batches to observe: give at least one")
    pieces = stages(fn, params, *batches[0])
    flat = tracing.flatten(params)
    found: dict[Slot, Any] = {}

    def wanted(stage: Stage) -> dict[int, tuple[Site, dict[str, Any]]]:
        out = {}
        for position, site in stage.program.sites.items():
            pattern = first_match(statistics, stage.paths[position].path)
            if pattern is not None and statistics[pattern] is not None:
                out[position] = (site, {"": statistics[pattern]})
        return out

    def visit(n: int, stage: Stage, leaves: list[Any], states: States) -> None:
        for position, state in states.items():
            slot = stage.paths[position]
            if slot in found:
                raise JaxqError(f"{slot} is used in several stages: its gradient is not known stage by stage")
            found[slot] = state[""]

    first = next((n for n, piece in enumerate(pieces) if wanted(piece)), None)
    matched = {k: any(first_match(statistics, s.path) == k for p in pieces for s in _slots(p)) for k in statistics}
    tracing.check_paths({k: yes for k, yes in matched.items() if statistics[k] is not None}, list(flat))
    if first is not None:
        Sweep(pieces, batches, loss, targets, weights).run(
            lambda stage: list(stage.take(flat).values()), wanted, visit, first
        )
    out: dict[str, Any] = {slot.path: state for slot, state in found.items() if slot.index is None}
    stacks: dict[str, dict[int, Any]] = {}
    for slot, state in found.items():
        if slot.index is not None:
            stacks.setdefault(slot.path, {})[slot.index] = state
    for path, parts in stacks.items():
        out[path] = jax.tree.map(lambda *xs: jnp.stack(xs), *(parts[i] for i in sorted(parts)))
    return out


def _slots(stage: Stage) -> list[Slot]:
    return [stage.paths[position] for position in stage.program.sites]
