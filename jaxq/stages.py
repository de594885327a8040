"""`jaxq.stages`: cuts a function into pieces that run one after the other, each with its own parameters.

Cuts are the values named by `jax.ad_checkpoint.checkpoint_name(x, "block")` and the iterations of a `lax.scan`
over stacked parameters. Pieces with equal jaxprs share one `Program`, so that forty equal layers compile once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun

from jaxq import jaxprs, tracing
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.names import Activated, names, split
from jaxq.quantized import quantized
from jaxq.sites import Site, sites

Carry = dict[str, Any]

#: Operations that move into the stage which needs them when all they depend on is a parameter: otherwise a
#: cast of all parameters at the top of a model would make every weight cross every cut.
_SINKS = frozenset(
    {"convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "slice", "copy", "copy_p"}
)

#: Name that marks where an iteration of an unrolled scan over layers begins.
_LAYER = "jaxq.layer"


class Slot(str):
    """Name of a stage's parameter: a path, or `path[i]` for slice i of a stacked one."""

    path: str
    index: int | None

    def __new__(cls, path: str, index: int | None = None) -> Slot:
        self = super().__new__(cls, path if index is None else f"{path}[{index}]")
        self.path, self.index = path, index
        return self

    def of(self, leaf: Any) -> Any:
        """The slot's part of the whole leaf."""
        return leaf if self.index is None else leaf[self.index]


class Program:
    """A compiled piece: pure functions `(leaves, inputs) -> outputs`, lists of arrays. Leaves may be quantized.

    run: to be traced. call: jitted. integer: jitted, on codes (see `jaxq.quantized`). Two programs with the same
    `key` compute the same. names: the activations that it names, in order; for leaves all take
    `jaxq.Activated(leaves, quantizers)` too.
    """

    def __init__(self, closed: Any, parameters: int, key: str):
        self.key = key
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
        self.leaf_avals, self.input_avals, self.output_avals = (
            avals[:parameters],
            avals[parameters:],
            closed.out_avals,
        )
        plain = jaxpr_as_fun(closed)
        self._dense: Callable[..., list[Any]] = lambda leaves, inputs: plain(*leaves, *inputs)
        self.run: Callable[..., list[Any]] = quantized(self._dense)
        self.call = jax.jit(self.run)
        self.names = [name.path for name in names(jaxprs.opened(closed)[0].eqns).values()]

    @functools.cached_property
    def integer(self) -> Callable[..., list[Any]]:
        return jax.jit(quantized(self._dense, integer=True))

    @functools.cached_property
    def sites(self) -> dict[int, Site]:
        """{position of a leaf: its site} for the leaves that data flows into."""
        found: dict[int, Site] = {}
        for site in sites(self.run, self.leaf_avals, self.input_avals):
            if site.in_axes and site.out_axes and site.kind not in ("product", "embedding"):
                found.setdefault(int(site.path), site)
        return found


@dataclasses.dataclass(frozen=True)
class Stage:
    """One piece of a function.

    paths: its parameters, in the order in which the program takes them. activations: those that it names, in the
    order of `Program.names`. fn: `fn(stage_params, carry) -> carry` with stage_params {path: leaf}, see `take`;
    the first stage takes the function's arguments (a tuple) as its carry, and the last one returns the function's
    output; with `integer=True`, products of codes where both operands have them.
    """

    program: Program
    paths: tuple[Slot, ...]
    activations: tuple[str, ...]
    reads: tuple[str, ...]
    consts: tuple[Any, ...]
    writes: tuple[str, ...]
    keeps: frozenset[str]
    start: Callable[[Any], Carry] | None = None
    finish: Callable[[Carry], Any] | None = None

    def take(self, params: Any) -> dict[str, Any]:
        """The stage's parameters out of the whole pytree (or out of its flat form {path: leaf}).

        Quantizers of its activations, where there are such (`jaxq.Activated`), come by their paths.
        """
        params, quantizers = split(params)
        flat = tracing.flatten(params)
        mine = {path: quantizers[path] for path in self.activations if path in quantizers}
        return {slot: slot.of(_read(flat[slot.path])) for slot in self.paths} | mine

    def leaves(self, stage_params: dict[str, Any]) -> Any:
        """What the program takes for its leaves, out of `take(params)`."""
        leaves = [stage_params[p] for p in self.paths]
        pairs = zip(self.program.names, self.activations, strict=True)
        quantizers = {own: stage_params[path] for own, path in pairs if path in stage_params}
        return Activated(leaves, quantizers) if quantizers else leaves

    def inputs(self, carry: Any) -> list[Any]:
        """The program's inputs out of the carry."""
        env = carry if self.start is None else self.start(carry)
        return [*self.consts, *(env[k] for k in self.reads)]

    def advance(self, carry: Any, outputs: Sequence[Any]) -> Any:
        """The carry after the program gave these outputs."""
        env = self.carry_after(carry, outputs)
        return env if self.finish is None else self.finish(env)

    def carry_after(self, carry: Any, outputs: Sequence[Any]) -> Carry:
        """What `advance` makes of a carry, by name, also after the last stage."""
        env = dict(carry if self.start is None else self.start(carry))
        env.update(zip(self.writes, outputs, strict=True))
        return {k: v for k, v in env.items() if k in self.keeps}

    def fn(self, stage_params: dict[str, Any], carry: Any, *, integer: bool = False) -> Any:
        missing = [p for p in self.paths if p not in stage_params]
        if missing:
            raise JaxqError(f"this stage needs {', '.join(missing)}: give Stage.take(params)")
        call = self.program.integer if integer else self.program.call
        return self.advance(carry, call(self.leaves(stage_params), self.inputs(carry)))


def _read(leaf: Any) -> Any:
    """A leaf as an array; a handle of one that lies on disk is read."""
    return leaf if is_quantized(leaf) or isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf))


# ---- one flat jaxpr: calls with cuts inside are opened, scans over layers unrolled -----------------------


def _flat(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], params: set[Any], cut: str, scope: str = ""
) -> list[Any]:
    """Evaluates a jaxpr into equations of one level. params: its variables that are parameters."""
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    params = set(params)

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jaxprs.Literal) else env[v]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        known = [not isinstance(v, jaxprs.Literal) and v in params for v in eqn.invars]
        name = eqn.primitive.name
        here = "/".join(p for p in (scope, jaxprs.scope_of(eqn)) if p)
        if name in jaxprs.CALLS | jaxprs.CUSTOM and _opens(eqn, cut):
            inner, inner_consts = jaxprs.called(eqn)
            inside = {v for v, yes in zip(inner.invars, known, strict=True) if yes}
            outs = _flat(inner, inner_consts, values, inside, cut, here)
        elif name == "scan" and _is_layers(eqn, known):
            outs = _unrolled(eqn, values, known, cut, here)
        else:
            # Scopes are part of the paths of named activations.
            with jax.named_scope(here) if here and names([eqn]) else nullcontext():
                outs = jaxprs.bind(eqn, values)
            if name in _SINKS and known[0]:
                params.update(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _opens(eqn: Any, cut: str) -> bool:
    """Whether there may be a cut inside a call."""
    inside = lambda e: e.primitive.name == "scan" or _is_cut(e, cut)  # noqa: E731
    return any(jaxprs.any_equation(j, inside) for j in jaxprs.subjaxprs(eqn))


def _is_cut(eqn: Any, cut: str) -> bool:
    return eqn.primitive.name == "name" and eqn.params["name"] in (cut, _LAYER)


def _is_layers(eqn: Any, known: Sequence[bool]) -> bool:
    """Whether a scan takes slices of parameters: its iterations are layers."""
    s = jaxprs.scan_parts(eqn)
    return s.length > 1 and any(known[s.consts + s.carry :])


def _unrolled(eqn: Any, values: Sequence[Any], known: Sequence[bool], cut: str, scope: str) -> list[Any]:
    s = jaxprs.scan_parts(eqn)
    split = s.consts + s.carry
    consts, carry, xs = list(values[: s.consts]), list(values[s.consts : split]), values[split:]
    inside = {v for v, yes in zip(s.jaxpr.invars, known, strict=True) if yes}
    # Slices of parameters belong to the layer; slices of data are made here, before the first layer, since
    # their positions would make equal layers differ.
    slices = [[lax.index_in_dim(x, i, 0, keepdims=False) for x in xs] for i in range(s.length)]
    ys: list[Any] = [None] * s.length
    for i in range(s.length)[:: -1 if s.reverse else 1]:
        marks = [checkpoint_name(c, _LAYER) for c in carry[:1]]
        outs = _flat(s.jaxpr, s.jaxpr_consts, [*consts, *marks, *carry[1:], *slices[i]], inside, cut, scope)
        carry, ys[i] = outs[: s.carry], outs[s.carry :]
    carry = [checkpoint_name(c, _LAYER) for c in carry[:1]] + carry[1:]
    return [*carry, *(jnp.stack(parts) for parts in zip(*ys, strict=True))]


# ---- cutting ---------------------------------------------------------------------------------------------


class _Cutter:
    """A flat jaxpr, split at its cuts; holds what the pieces share."""

    def __init__(self, closed: Any, parameters: int, paths: Sequence[str], cut: str):
        self.jaxpr, consts = jaxprs.opened(closed)
        self.slots = {v: Slot(p) for v, p in zip(self.jaxpr.invars[:parameters], paths, strict=True)}
        self.consts = dict(zip(self.jaxpr.constvars, consts, strict=True))
        self.sunk: dict[Any, Any] = {}
        self.programs: dict[str, Program] = {}
        self.names: dict[Any, str] = {}
        self.named = {place: name.path for place, name in names(self.jaxpr.eqns, frozenset({cut, _LAYER})).items()}
        self.segments: list[list[Any]] = [[]]
        # The marks themselves are left out, so that a layer does not depend on what stands before it.
        self.marked: dict[Any, Any] = {}
        for eqn in self.jaxpr.eqns:
            own = eqn.replace(invars=[self.unmarked(v) for v in eqn.invars])
            if id(eqn) in self.named:
                self.named[id(own)] = self.named[id(eqn)]
            self.place(own, cut)
        self.outvars = [self.unmarked(v) for v in self.jaxpr.outvars]
        self.segments[-1] += [e for v in self.outvars for e in self.chain(v)]

    def unmarked(self, var: Any) -> Any:
        return var if isinstance(var, jaxprs.Literal) else self.marked.get(var, var)

    def place(self, eqn: Any, cut: str) -> None:
        first = eqn.invars[0] if eqn.invars else None
        if eqn.primitive.name in _SINKS and len(eqn.invars) == 1 and self.is_leaf(first):
            self.sunk[eqn.outvars[0]] = eqn
            self.index_slot(eqn, first)
            return
        if not _is_cut(eqn, cut):
            self.segments[-1].append(eqn)
            return
        self.marked[eqn.outvars[0]] = first
        if self.segments[-1]:
            self.segments.append([])

    def index_slot(self, eqn: Any, var: Any) -> None:
        """A slice of size 1 along the leading axis, squeezed, is a slot of its own: one layer of a stack."""
        before = self.sunk.get(var)
        if eqn.primitive.name != "squeeze" or eqn.params["dimensions"] != (0,) or before is None:
            return
        source = before.invars[0]
        p = before.params
        if (
            before.primitive.name == "slice"
            and source in self.slots
            and self.slots[source].index is None
            and set(p["strides"] or (1,)) == {1}
            and p["limit_indices"][0] == p["start_indices"][0] + 1
            and not any(p["start_indices"][1:])
            and p["limit_indices"][1:] == source.aval.shape[1:]
        ):
            self.slots[eqn.outvars[0]] = Slot(self.slots[source].path, p["start_indices"][0])
            del self.sunk[eqn.outvars[0]]

    def is_leaf(self, var: Any) -> bool:
        return not isinstance(var, jaxprs.Literal) and (var in self.slots or var in self.sunk)

    def chain(self, var: Any) -> list[Any]:
        """The sunk equations that make this value out of a slot."""
        if isinstance(var, jaxprs.Literal) or var not in self.sunk:
            return []
        eqn = self.sunk[var]
        return [*self.chain(eqn.invars[0]), eqn]

    def equations(self, segment: Sequence[Any]) -> list[Any]:
        """The segment with the sunk equations that it needs."""
        out = {id(e): e for eqn in segment for e in (*(c for v in eqn.invars for c in self.chain(v)), eqn)}
        return list(out.values())

    def name(self, var: Any) -> str:
        return self.names.setdefault(var, f"v{len(self.names)}")

    def stages(self) -> list[Stage]:
        pieces = [self.equations(s) for s in self.segments]
        returned = [v for v in self.outvars if not isinstance(v, jaxprs.Literal)]
        needed = [{v for e in p for v in e.invars if not isinstance(v, jaxprs.Literal)} for p in pieces]
        out, later = [], set(returned)
        for eqns, used in reversed(list(zip(pieces, needed, strict=True))):
            last = not out
            out.append(self.stage(eqns, later, returned if last else ()))
            made = {v for e in eqns for v in e.outvars}
            later = (later | used) - made
        return out[::-1]

    def stage(self, eqns: Sequence[Any], later: set[Any], returned: Sequence[Any]) -> Stage:
        made = {v for e in eqns for v in e.outvars}
        reads = [v for e in eqns for v in e.invars if not isinstance(v, jaxprs.Literal) and v not in made]
        # A parameter that the function hands back is an output of the last stage like any other.
        used = list(dict.fromkeys([*reads, *(v for v in returned if v in self.slots)]))
        leaves = [v for v in used if v in self.slots]
        consts = [v for v in used if v in self.consts]
        live = [v for v in used if v not in self.slots and v not in self.consts]
        given = [v for v in dict.fromkeys([*(o for e in eqns for o in e.outvars), *leaves]) if v in later]
        given = [v for v in given if v in made or v in returned]

        def fn(*values: Any) -> list[Any]:
            env = dict(zip([*leaves, *consts, *live], values, strict=True))
            for e in eqns:
                args = [v.val if isinstance(v, jaxprs.Literal) else env[v] for v in e.invars]
                env.update(zip(e.outvars, jaxprs.bind(e, args), strict=True))
            return [env[v] for v in given]

        closed = jax.make_jaxpr(fn)(*(v.aval for v in (*leaves, *consts, *live)))
        # The text names variables in order of appearance, so equal texts are equal programs. No constant
        # hides in it: constants are inputs.
        key = f"{len(leaves)} {[v.aval for v in (*leaves, *consts, *live)]} {closed.jaxpr}"
        if key not in self.programs:
            self.programs[key] = Program(closed, len(leaves), key)
        return Stage(
            self.programs[key],
            tuple(self.slots[v] for v in leaves),
            tuple(self.named[place] for place in names(eqns)),
            tuple(self.name(v) for v in live),
            tuple(self.consts[v] for v in consts),
            tuple(self.name(v) for v in given),
            frozenset(self.name(v) for v in later),
        )


def stages(fn: Callable[..., Any], params: Any, *args: Any, cut: str = "block", **kwargs: Any) -> list[Stage]:
    """Cuts `fn(params, *args)` at values named `cut` and at scans over stacked parameters.

    Args:
        fn: pure function.
        params: pytree of arrays, or of anything with a shape and a dtype: nothing is read.
        args: example arguments, or their shapes; stages hold for arguments of these shapes.
        cut: the name given to `jax.ad_checkpoint.checkpoint_name`.

    Returns:
        Stages to be run in order; `run` does that. A function without cuts is one stage.

    Example:
        >>> carry = (tokens,)                                                     # doctest: +SKIP
        >>> for stage in jaxq.stages(model.apply, model.params, tokens):          # doctest: +SKIP
        ...     carry = stage.fn(stage.take(model.params), carry)                 # doctest: +SKIP
    """
    call = tracing.trace(fn, (split(params)[0], *args), kwargs)
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in call.values]

    def flat(*values: Any) -> list[Any]:
        return _flat(call.jaxpr, call.consts, values, set(call.jaxpr.invars[: call.parameters]), cut)

    cutter = _Cutter(jax.make_jaxpr(flat)(*shapes), call.parameters, call.paths[: call.parameters], cut)
    out = cutter.stages()
    data = [cutter.name(v) for v in cutter.jaxpr.invars[call.parameters :]]

    def start(given: Any) -> Carry:
        leaves = [x for x in jax.tree.leaves((given, kwargs)) if tracing.is_array(x)]
        return dict(zip(data, leaves, strict=True))

    def finish(env: Carry) -> Any:
        outs = [v.val if isinstance(v, jaxprs.Literal) else env[cutter.name(v)] for v in cutter.outvars]
        return call.finish(outs)

    out[0] = dataclasses.replace(out[0], start=start)
    out[-1] = dataclasses.replace(out[-1], finish=finish)
    return out


def run(pieces: Sequence[Stage], params: Any, *args: Any, integer: bool = False) -> Any:
    """The function's output, computed stage by stage. integer: as of `jaxq.quantized`."""
    params, quantizers = split(params)
    flat = Activated(tracing.flatten(params), quantizers)
    step: Callable[[Any, Stage], Any] = lambda carry, stage: stage.fn(stage.take(flat), carry, integer=integer)  # noqa: E731
    return functools.reduce(step, pieces, args)
