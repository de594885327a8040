"""One run of the driver: which statistics are taken when, what is solved when, and what is told of it."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.errors import JaxqError, at_path
from jaxq.formats.base import QuantizedArray, is_quantized
from jaxq.formats.dense_sparse import DenseSparse
from jaxq.gradients import States, Sweep
from jaxq.observe import merge_records, observed
from jaxq.planning import Target, describe, nbytes
from jaxq.recipe import Rule
from jaxq.report import SiteReport
from jaxq.sites import Site
from jaxq.solvers.gptq import DEFAULT_DAMPING
from jaxq.solvers.registry import SOLVERS
from jaxq.solvers.split import solve_split
from jaxq.stages import Program, Slot, Stage
from jaxq.tracked import Records
from jaxq.transforms.registry import STATISTICS, needs_gradients, of_gradient, weighted_by


class Event(NamedTuple):
    """Progress: a site was solved. error: relative, as in the report (nan if unknown); times in seconds."""

    stage: int
    stages: int
    path: str
    error: float
    seconds: float
    eta: float


@functools.partial(jax.jit, static_argnums=0)
def _observe(observer: Observer, leaves: list[Any], inputs: list[Any], weights: Any) -> Records:
    return observed(observer.program.run, observer.statistics)(leaves, inputs, weights=weights)[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Observer:
    """Statistics of a program by position of its leaves; equal stages share one, so that it compiles once."""

    program: Program
    statistics: dict[str, Any]


@jax.jit
def difference(a: Any, b: Any) -> jax.Array:
    """Squared distance of two lists of float arrays and squared norm of the second."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if jnp.issubdtype(x.dtype, jnp.floating)]
    square = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)))  # noqa: E731
    return jnp.stack([sum(square(x - y) for x, y in pairs) + 0.0, sum(square(y) for _, y in pairs) + 0.0])


class Data(NamedTuple):
    """Calibration batches with, for each, token weights and targets of the loss."""

    batches: list[tuple[Any, ...]]
    weights: list[Any] | None
    targets: list[Any] | None


class Run:
    """One run: the leaves solved so far and the rows of its report."""

    def __init__(
        self,
        flat: dict[str, Any],
        chosen: dict[str, Target],
        progress: Callable[[Event], None] | None,
        start: float,
    ):
        self.flat, self.chosen, self.progress, self.start = flat, chosen, progress, start
        self.solved: dict[Slot, QuantizedArray] = {}
        self.rows: dict[Slot, SiteReport] = {}
        #: Finished statistics of leaves that wait for the rest of what their solver takes, by name.
        self.known: dict[Slot, dict[str, Any]] = {}
        self.observers: dict[tuple[str, tuple[int, ...]], Observer] = {}
        self.drift: list[float] = []
        #: Shares of the whole run at the start and the end of its present phase.
        self.phase = (0.0, 1.0)

    def left(self, forwards: bool = False) -> bool:
        """Whether there are targets still to be solved (for which the data must run forwards)."""
        done = {slot.path for slot in self.solved}
        rest = [target.rule for path, target in self.chosen.items() if path not in done]
        return any(rule.needs for rule in rest) if forwards else bool(rest)

    # ---- without data ------------------------------------------------------------------------------------

    def by_leaves(self) -> None:
        done = {slot.path for slot in self.solved}
        rest = [path for path in self.chosen if path not in done]
        for n, path in enumerate(rest):
            slot, target = Slot(path), self.chosen[path]
            self.solve(slot, target.site, target.rule, self.read(slot))
            self.report(slot, n + 1, len(rest), (n + 1) / len(rest))

    # ---- with data ---------------------------------------------------------------------------------------

    def by_gradients(self, pieces: Sequence[Stage], data: Data, loss: Callable[..., Any]) -> None:
        """Runs the float function forwards and backwards; solves what gradients alone decide."""
        rules = [target.rule for target in self.chosen.values() if target.rule.needs]
        whole = all(_of_gradient(name) for rule in rules for name in rule.needs.values())
        self.phase = (0.0, 1.0 if whole else 0.5)
        first = min(n for n, piece in enumerate(pieces) if any(map(self.of_gradient, piece.paths)))
        sweep = Sweep(pieces, data.batches, loss, data.targets, data.weights)

        def wanted(stage: Stage) -> dict[int, tuple[Site, dict[str, Any]]]:
            named = {p: (site, self.of_gradient(stage.paths[p])) for p, site in self.due(stage).items()}
            return {p: (site, {n: STATISTICS[n] for n in names}) for p, (site, names) in named.items() if names}

        def visit(n: int, stage: Stage, leaves: list[Any], states: States) -> None:
            due = self.due(stage)
            for i, (position, found) in enumerate(states.items()):
                slot, site = stage.paths[position], due[position]
                rule = self.chosen[slot.path].rule
                alone = all(map(_of_gradient, rule.needs.values()))
                self.keep(slot, found, wait=not alone)
                if alone:
                    self.solve(slot, site, rule, leaves[position])
                    # The way forwards comes first, and takes about a quarter of the time.
                    share = (len(pieces) - 1 - n + (i + 1) / len(states)) / (len(pieces) - first)
                    self.report(slot, n + 1, len(pieces), 0.25 + 0.75 * share)

        sweep.run(lambda stage: [self.read(slot) for slot in stage.paths], wanted, visit, first)

    def of_gradient(self, slot: Slot) -> list[str]:
        """Names of the statistics of the loss's gradient that the leaf's solver takes, or that weigh others."""
        target = self.chosen.get(slot.path)
        return [] if target is None else of_gradient(target.rule.needs.values())

    def keep(self, slot: Slot, states: dict[str, Any], wait: bool = False) -> None:
        """Finished statistics until the leaf is solved, on the host if that is another phase's work."""
        finished = {name: STATISTICS[name].finalize(state) for name, state in states.items()}
        self.known.setdefault(slot, {}).update(jax.tree.map(np.asarray, finished) if wait else finished)

    def by_stages(self, pieces: Sequence[Stage], data: Data) -> None:
        if self.phase[1] < 1:
            self.phase = (self.phase[1], 1.0)
        wanted = [any(s.path in self.chosen for s in p.paths) for p in pieces]
        last = max(i for i, yes in enumerate(wanted) if yes)
        floats: list[Any] = list(data.batches)
        stream = floats
        for n, stage in enumerate(pieces[: last + 1]):
            leaves = [self.read(slot) for slot in stage.paths]
            due = self.due(stage)
            if due:
                records = self.records(stage, leaves, due, stream, data.weights)
                for i, (position, site) in enumerate(due.items()):
                    slot = stage.paths[position]
                    record = records.get(str(position))
                    if record is not None:
                        self.keep(slot, {self.statistic(slot): record.state})
                    self.solve(slot, site, self.chosen[slot.path].rule, leaves[position])
                    self.report(slot, n + 1, len(pieces), (n + (i + 1) / len(due)) / (last + 1))
            if n < last:
                changed = any(slot in self.solved for slot in stage.paths)
                stream, floats = self.advance(stage, leaves, stream, floats, changed)

    def due(self, stage: Stage) -> dict[int, Site]:
        """{position: site} of the stage's leaves that are to be solved here."""
        layouts = stage.program.sites
        out = {}
        for position, slot in enumerate(stage.paths):
            target = self.chosen.get(slot.path)
            if target is None or slot in self.solved:
                continue
            if position in layouts:
                out[position] = layouts[position]
            elif target.site.kind == "embedding":
                out[position] = target.site
        return out

    def records(
        self,
        stage: Stage,
        leaves: list[Any],
        due: dict[int, Site],
        stream: Sequence[Any],
        weights: Sequence[Any] | None,
    ) -> Records:
        names = {p: self.statistic(stage.paths[p]) for p in due}
        wanted = {str(p): STATISTICS[name] for p, name in names.items() if name}
        if not wanted:
            return {}
        key = (stage.program.key, tuple(map(int, wanted)))
        if key not in self.observers:
            self.observers[key] = Observer(stage.program, wanted)
        observer = self.observers[key]
        records: Records | None = None
        salient = {}
        for p, name in names.items():
            if not (name and weighted_by(name)):
                continue
            if due[p].batch_axes:
                raise JaxqError(f"{stage.paths[p]}: a stack of matrices takes no {name} statistic; use another")
            salient[str(p)] = self.known[stage.paths[p]].pop(weighted_by(name))
        for i, carry in enumerate(stream):
            w = None if weights is None else jnp.asarray(weights[i])
            if salient:
                w = {"": w} | {p: jnp.asarray(s[i]) for p, s in salient.items()}
            new = _observe(observer, leaves, stage.inputs(carry), w)
            records = new if records is None else merge_records(observer.statistics, records, new)
        return records or {}

    def statistic(self, slot: Slot) -> str:
        """Name of the statistic of the inputs that the leaf's solver takes, "" for none."""
        needs = self.chosen[slot.path].rule.needs.values()
        return next((name for name in needs if not _of_gradient(name)), "")

    def advance(
        self, stage: Stage, leaves: list[Any], stream: Sequence[Any], floats: Sequence[Any], changed: bool
    ) -> tuple[list[Any], list[Any]]:
        """Both streams after the stage; notes how far the quantized one has drifted from the float one."""
        quantized = [self.solved.get(slot, leaf) for slot, leaf in zip(stage.paths, leaves, strict=True)]
        call, apart = stage.program.call, stream is not floats or changed
        new_stream: list[Any] = []
        new_floats: list[Any] = []
        total = np.zeros(2)
        for mine, reference in zip(stream, floats, strict=True):
            wanted = call(leaves, stage.inputs(reference))
            new_floats.append(stage.advance(reference, wanted))
            if apart:
                got = call(quantized, stage.inputs(mine))
                new_stream.append(stage.advance(mine, got))
                total += np.asarray(difference(got, wanted), np.float64)
        self.drift.append(float(np.sqrt(total[0] / total[1])) if total[1] > 0 else 0.0)
        return (new_stream if apart else new_floats), new_floats

    # ---- one leaf ----------------------------------------------------------------------------------------

    def read(self, slot: Slot) -> Any:
        """The slot's leaf as an array; a quantized one, which other parts of the model may hold, as it is."""
        leaf = self.flat[slot.path]
        if is_quantized(leaf) or isinstance(leaf, jax.Array):
            return slot.of(leaf)
        return jnp.asarray(slot.of(np.asarray(leaf)))

    def solve(self, slot: Slot, site: Site, rule: Rule, leaf: Any) -> None:
        assert rule.solver is not None and rule.format is not None
        begin = time.perf_counter()
        known = self.known.pop(slot, {})
        given = {argument: jnp.asarray(known[name]) for argument, name in rule.needs.items()}
        solve = SOLVERS[rule.solver].solve
        # Statistics belong to the canonical matrix, whose axes a square weight does not show.
        matrix = site.layout.to_canonical(leaf)
        with at_path(slot):
            if isinstance(rule.format, DenseSparse):
                sensitivity = given.pop("sensitivity", None)
                out = solve_split(solve, matrix, given, rule.format, sensitivity=sensitivity, **rule.options)
            else:
                out = solve(matrix, format=rule.format, **given, **rule.options)
        array, used = out if isinstance(out, tuple) else (out, {})
        array = dataclasses.replace(array, layout=site.layout)
        array = jax.block_until_ready(array)
        self.solved[slot] = array
        error = float(np.sqrt(np.mean(np.square(used["error"])))) if "error" in used else math.nan
        self.rows[slot] = SiteReport(
            path=str(slot),
            kind=site.kind,
            shape=tuple(array.shape),
            format=describe(rule),
            bits_per_weight=array.bits_per_weight,
            bytes_before=nbytes(leaf),
            bytes_after=array.nbytes,
            error=error,
            seconds=time.perf_counter() - begin,
            note=_solver_note(used, rule.options),
        )

    def report(self, slot: Slot, stage: int, of: int, share: float) -> None:
        if self.progress is None:
            return
        seconds = time.perf_counter() - self.start
        share = self.phase[0] + (self.phase[1] - self.phase[0]) * share
        self.progress(Event(stage, of, slot, self.rows[slot].error, seconds, seconds * (1 / share - 1)))

    def rows_of(self, site: Site) -> list[SiteReport]:
        mine = [row for slot, row in self.rows.items() if slot.path == site.path]
        if mine:
            return mine
        size = nbytes(self.flat[site.path])
        bits = 8 * size / math.prod(site.shape)
        return [SiteReport(site.path, site.kind, site.shape, "dense", bits, size, size, note=site.note)]

    def finished(self) -> dict[str, Any]:
        """{path: leaf} for the whole tree: quantized ones, slices stacked again, and the rest read."""
        out: dict[str, Any] = {}
        slices: dict[str, dict[int, Any]] = {}
        for slot, array in self.solved.items():
            if slot.index is None:
                out[slot.path] = array
            else:
                slices.setdefault(slot.path, {})[slot.index] = array
        for path, parts in slices.items():
            out[path] = jax.tree.map(lambda *xs: jnp.stack(xs), *(parts[i] for i in sorted(parts)))
        for path in self.flat:
            if path not in out:
                out[path] = self.read(Slot(path))
        return out


def _of_gradient(name: str) -> bool:
    return needs_gradients(STATISTICS[name])


def _solver_note(used: dict[str, Any], options: dict[str, Any]) -> str:
    """What a reader of the report must know about the solve."""
    if "fallback" in used and bool(np.any(used["fallback"])):
        return "the Hessian could not be factorized: rounded to nearest"
    damping = float(np.max(used.get("damping", 0.0)))
    raised = damping > 1.001 * options.get("damping", DEFAULT_DAMPING)
    return f"damping raised to {damping:g}" if raised else ""
