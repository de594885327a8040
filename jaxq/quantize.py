"""`jaxq.quantize`: the driver. It cuts, observes, solves and replaces, one stage after another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import tracing
from jaxq.errors import JaxqError
from jaxq.formats.base import QuantizedArray, is_quantized
from jaxq.observe import merge_records, observed
from jaxq.planning import Target, arguments, at_path, describe, nbytes, targets
from jaxq.recipe import Recipe, Rule
from jaxq.report import Report, SiteReport
from jaxq.sites import Site, sites
from jaxq.solvers.gptq import DEFAULT_DAMPING
from jaxq.solvers.registry import SOLVERS
from jaxq.stages import Program, Slot, Stage, stages
from jaxq.tracked import Records
from jaxq.transforms.statistics import Hessian

STATISTICS = {"hessian": Hessian()}


@dataclasses.dataclass
class Result:
    """params: the pytree with quantized leaves. report: what happened at each site."""

    params: Any
    report: Report


class Event(NamedTuple):
    """Progress: a site was solved. error: its relative output error (nan if unknown); times in seconds."""

    stage: int
    stages: int
    path: str
    error: float
    seconds: float
    eta: float


def quantize(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    weights: Iterable[Any] | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Result:
    """Quantizes the parameters of a pure function as the recipe says.

    For each stage of the function in turn: statistics are taken of what the *quantized* stages before it make of
    the calibration data; its weights are solved and replaced; the data moves on, through the quantized stage
    and, beside it, through the float one. Memory holds one stage's float weights, the quantized
    model and the activations at one cut, never the float model (give weights that are read when asked for).

    Args:
        fn: `fn(params, *args)`, pure.
        params: pytree of arrays, or of handles with `shape`, `dtype` and `__array__`, which are read when
            their stage comes. The pytree itself is not changed.
        batches: calibration batches of one shape, each an array (the one argument) or a tuple of arguments. A
            recipe that needs no data wants one example only, and of that only the shapes.
        recipe: see `jaxq.recipes`.
        weights: for each batch, token weights (padding 0) whose shape leads that of the data at every site.
        progress: called after each site.

    Raises:
        JaxqError: a rule that matches nothing, no batches, batches of several shapes, weights that are
            not finite, a group larger than a width; each names the path.
    """
    start = time.perf_counter()
    given = [arguments(b) for b in batches]
    if not given:
        raise JaxqError("there is no calibration data: give at least one batch")
    _check_shapes(given)
    found, chosen = targets(fn, params, given[0], recipe)
    flat = tracing.flatten(params)
    for path in chosen:
        if is_quantized(flat[path]):
            raise JaxqError(f"{path} is quantized already: give float parameters, or leave it out of the recipe")
    run = _Run(flat, chosen, progress, start)
    with _one_blas_thread():
        if recipe.needs_data:
            run.by_stages(fn, params, given, None if weights is None else list(weights))
        else:
            run.by_leaves()
    rows = [r for site in found for r in run.rows_of(site)]
    listed = {site.path for site in found}
    other = sum(nbytes(leaf) for path, leaf in run.flat.items() if path not in listed)
    report = Report(
        recipe=recipe.to_dict(),
        rows=rows,
        seconds=time.perf_counter() - start,
        other_bytes=other,
        drift=run.drift,
    )
    return Result(tracing.replace(params, run.finished()), report)


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Keeps LAPACK on one thread of a CPU.

    XLA factorizes on the CPU by SciPy's OpenBLAS, whose idle threads spin against XLA's own: a 576 x 576 Cholesky
    factor then takes a second in place of 3 ms.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    import scipy.linalg  # noqa: F401  # the library must be loaded to be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def _check_shapes(batches: Sequence[tuple[Any, ...]]) -> None:
    def shapes(args: tuple[Any, ...]) -> Any:
        return [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(args) if tracing.is_array(x)]

    for i, args in enumerate(batches):
        if shapes(args) != shapes(batches[0]):
            raise JaxqError(
                f"batch {i} has another shape than batch 0: pad it and give token weights, or leave it out"
            )


@functools.partial(jax.jit, static_argnums=0)
def _observe(observer: Observer, leaves: list[Any], inputs: list[Any], weights: Any) -> Records:
    return observed(observer.program.run, observer.statistics)(leaves, inputs, weights=weights)[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Observer:
    """Statistics of a program by position of its leaves; equal stages share one, so that it compiles once."""

    program: Program
    statistics: dict[str, Any]


@jax.jit
def _difference(a: Any, b: Any) -> jax.Array:
    """Squared distance of two lists of float arrays and squared norm of the second."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if jnp.issubdtype(x.dtype, jnp.floating)]
    square = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)))  # noqa: E731
    return jnp.stack([sum(square(x - y) for x, y in pairs) + 0.0, sum(square(y) for _, y in pairs) + 0.0])


class _Run:
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
        self.observers: dict[tuple[str, tuple[int, ...]], Observer] = {}
        self.layouts: dict[str, dict[int, Site]] = {}
        self.drift: list[float] = []

    # ---- without data ------------------------------------------------------------------------------------

    def by_leaves(self) -> None:
        for n, (path, target) in enumerate(self.chosen.items()):
            slot = Slot(path)
            self.solve(slot, target.site, target.rule, self.read(slot), None)
            self.report(slot, n + 1, len(self.chosen), (n + 1) / len(self.chosen))

    # ---- with data ---------------------------------------------------------------------------------------

    def by_stages(
        self, fn: Callable[..., Any], params: Any, batches: Sequence[Any], weights: Sequence[Any] | None
    ) -> None:
        pieces = stages(fn, params, *batches[0])
        wanted = [any(s.path in self.chosen for s in p.paths) for p in pieces]
        last = max(i for i, yes in enumerate(wanted) if yes)
        floats: list[Any] = list(batches)
        stream = floats
        for n, stage in enumerate(pieces[: last + 1]):
            leaves = [self.read(slot) for slot in stage.paths]
            due = self.due(stage)
            if due:
                records = self.records(stage, leaves, due, stream, weights)
                for i, (position, site) in enumerate(due.items()):
                    slot = stage.paths[position]
                    rule = self.chosen[slot.path].rule
                    record = records.get(str(position))
                    self.solve(slot, site, rule, leaves[position], None if record is None else record.state)
                    self.report(slot, n + 1, len(pieces), (n + (i + 1) / len(due)) / (last + 1))
            if n < last:
                stream, floats = self.advance(stage, leaves, stream, floats, bool(due))

    def due(self, stage: Stage) -> dict[int, Site]:
        """{position: site} of the stage's leaves that are to be solved here."""
        program = stage.program
        if program.key not in self.layouts:
            found: dict[int, Site] = {}
            for site in sites(program.run, program.leaf_avals, program.input_avals):
                if site.in_axes and site.out_axes and site.kind not in ("product", "embedding"):
                    found.setdefault(int(site.path), site)
            self.layouts[program.key] = found
        out = {}
        for position, slot in enumerate(stage.paths):
            target = self.chosen.get(slot.path)
            if target is None or slot in self.solved:
                continue
            if position in self.layouts[program.key]:
                out[position] = self.layouts[program.key][position]
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
        wanted = {p: self.statistic(stage.paths[p]) for p in due}
        positions = tuple(p for p, statistic in wanted.items() if statistic is not None)
        if not positions:
            return {}
        key = (stage.program.key, positions)
        if key not in self.observers:
            self.observers[key] = Observer(stage.program, {str(p): wanted[p] for p in positions})
        observer = self.observers[key]
        records: Records | None = None
        for i, carry in enumerate(stream):
            w = None if weights is None else jnp.asarray(weights[i])
            new = _observe(observer, leaves, stage.inputs(carry), w)
            records = new if records is None else merge_records(observer.statistics, records, new)
        return records or {}

    def statistic(self, slot: Slot) -> Any:
        solver = self.chosen[slot.path].rule.solver
        name = SOLVERS[solver].statistic if solver is not None else None
        return None if name is None else STATISTICS[name]

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
                total += np.asarray(_difference(got, wanted), np.float64)
        self.drift.append(float(np.sqrt(total[0] / total[1])) if total[1] > 0 else 0.0)
        return (new_stream if apart else new_floats), new_floats

    # ---- one leaf ----------------------------------------------------------------------------------------

    def read(self, slot: Slot) -> Any:
        """The slot's leaf as an array; a quantized one, which other parts of the model may hold, as it is."""
        leaf = self.flat[slot.path]
        if is_quantized(leaf) or isinstance(leaf, jax.Array):
            return slot.of(leaf)
        return jnp.asarray(slot.of(np.asarray(leaf)))

    def solve(self, slot: Slot, site: Site, rule: Rule, leaf: Any, state: Any) -> None:
        assert rule.solver is not None and rule.format is not None
        begin = time.perf_counter()
        solver = SOLVERS[rule.solver]
        with at_path(slot):
            importance = () if state is None else (STATISTICS[solver.statistic or ""].finalize(state),)
            out = solver.solve(leaf, *importance, rule.format, layout=site.layout, **rule.options)
        array, used = out if isinstance(out, tuple) else (out, {})
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


def _solver_note(used: dict[str, Any], options: dict[str, Any]) -> str:
    """What a reader of the report must know about the solve."""
    if "fallback" in used and bool(np.any(used["fallback"])):
        return "the Hessian could not be factorized: rounded to nearest"
    damping = float(np.max(used.get("damping", 0.0)))
    raised = damping > 1.001 * options.get("damping", DEFAULT_DAMPING)
    return f"damping raised to {damping:g}" if raised else ""
