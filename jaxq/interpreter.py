"""Evaluates a jaxpr while following its parameter leaves: the one idea of jaxq.

Every verb is a set of `Rules` for the same walk. A leaf is followed through layout operations (a `View`) and
through nested jaxprs; where it meets data, the rules decide what happens, and may leave a *record* there (a
statistic). Records are values: they leave loops, branches and shards as ordinary outputs, so that the walk
stays a pure function which composes with jit, grad, vmap and shard_map.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxq import jaxprs, uses
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.views import View


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter on its way to a product.

    value: the stored array, dense or quantized. levels: nesting levels of the scans that sliced it.
    index: (position, length) for each leading axis that a dynamic index took, outermost first.
    """

    value: Any
    path: str
    view: View
    levels: tuple[int, ...] = ()
    index: tuple[tuple[jax.Array, int], ...] = ()

    @classmethod
    def of(cls, value: Any, path: str) -> Leaf:
        return cls(value, path, View.of(value.shape))

    def dense(self) -> jax.Array:
        return self.view.apply(self.value.dequantize() if is_quantized(self.value) else self.value)

    def with_view(self, view: View) -> Leaf:
        return dataclasses.replace(self, view=view)


@dataclasses.dataclass(frozen=True)
class Named:
    """An activation that `checkpoint_name` named, through layout operations and scalings."""

    value: Any
    path: str


@dataclasses.dataclass(frozen=True)
class Copies:
    """A value that a shard_map declared to differ over an axis only because the other operand does.

    source: the value before that; statistics of it must not count its copies.
    """

    value: Any
    source: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["stacked", "levels"])
@dataclasses.dataclass(frozen=True)
class Record:
    """A statistic's state with `stacked` leading axes; `levels` are the scans that have still to stack it."""

    state: Any
    stacked: int = 0
    levels: tuple[int, ...] = ()


Records = dict[str, Record]


class Rules:
    """What a verb does where a leaf meets data. The base class runs everything dense and records nothing."""

    #: Follow activations named by checkpoint_name.
    follow_names = False
    #: Keep custom derivative rules around calls that leaves enter (needed where the walk is differentiated).
    keep_custom_rules = False

    def site(self, use: uses.Use, leaf: Leaf, x: Any, dense: Callable[[], Any]) -> tuple[Any, Records]:
        return dense(), {}

    def product(self, eqn: Any, names: tuple[str | None, str | None]) -> None:
        """A product of two activations of which at least one is named."""

    def named(self, path: str, value: Any) -> Records:
        return {}

    def fallback(self, leaf: Leaf, reason: str) -> None:
        """The leaf is made dense here."""

    def initial(self, path: str) -> Any:
        """The neutral state of a record."""
        raise NotImplementedError(path)

    def merge(self, path: str, a: Any, b: Any) -> Any:
        raise NotImplementedError(path)


class Walk:
    """One evaluation under the given rules. `level` counts the scans around the current jaxpr."""

    def __init__(self, rules: Rules, level: int = 0, scope: str = ""):
        self.rules, self.level, self.scope = rules, level, scope

    # ---- the loop over equations -------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], Records]:
        """Outputs (plain arrays, leaves or named values) and records of a jaxpr."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        records: Records = {}

        def read(v: Any) -> Any:
            return v.val if isinstance(v, jaxprs.Literal) else env[v]

        for eqn in jaxpr.eqns:
            outs, new = self.equation(eqn, [read(v) for v in eqn.invars])
            records = self.merged(records, new)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars], records

    def equation(self, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
        name = eqn.primitive.name
        if name == "name" and self.rules.follow_names and not isinstance(values[0], Leaf):
            path = "/".join(p for p in (self.scope_path(eqn), eqn.params["name"]) if p)
            value = self.plain(values[0])
            return [Named(value, path)], self.rules.named(path, value)
        if name == "pvary" and not any(isinstance(v, (Leaf, Named)) for v in values):
            sources = [v.source if isinstance(v, Copies) else v for v in values]
            outs = jaxprs.bind(eqn, [self.plain(v) for v in values])
            return [Copies(o, s) for o, s in zip(outs, sources, strict=True)], {}
        tracked = any(isinstance(v, (Leaf, Named, Copies)) for v in values)
        handler = NESTED.get(name)
        if handler is not None and (tracked or self.looks_inside(eqn)):
            inner = Walk(self.rules, self.level, "/".join(s for s in (self.scope, jaxprs.scope_of(eqn)) if s))
            return handler(inner, eqn, values)
        if not tracked:
            return jaxprs.bind(eqn, values), {}
        leaves = [v for v in values if isinstance(v, Leaf)]
        if not leaves:
            return self.activation(eqn, values), {}
        if name in LAYOUT and len(leaves) == 1 and isinstance(values[0], Leaf):
            out = LAYOUT[name](eqn, values)
            if out is not None:
                return [out], {}
        return self.at_site(eqn, values)

    def at_site(self, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
        """A primitive that consumes leaves: a site of one of them, or dense."""
        found = uses.find(eqn, [v.view if isinstance(v, Leaf) else None for v in values])
        if isinstance(found, str):
            return jaxprs.bind(eqn, [self.plain(v, found) for v in values]), {}
        leaf = values[found.operand]
        others = [
            v if i == found.operand else self.plain(v, f"second parameter operand of {eqn.primitive.name}")
            for i, v in enumerate(values)
        ]

        def dense() -> Any:
            return jaxprs.bind(eqn, [v.dense() if isinstance(v, Leaf) else v for v in others])[0]

        sources = [v.source if isinstance(v, Copies) else o for v, o in zip(values, others, strict=True)]
        data: Any = sources if found.kind == "grouped" else sources[1 - found.operand]
        out, records = self.rules.site(found, leaf, data, dense)
        return [out], records

    def activation(self, eqn: Any, values: list[Any]) -> list[Any]:
        """A primitive on named activations only: the name stays through layout operations and scalings."""
        if not any(isinstance(v, Named) for v in values):
            return jaxprs.bind(eqn, [self.plain(v) for v in values])
        out = jaxprs.bind(eqn, [self.plain(v) for v in values])
        name = eqn.primitive.name
        if name == "dot_general":
            lhs, rhs = (v.path if isinstance(v, Named) else None for v in values)
            self.rules.product(eqn, (lhs, rhs))
        scaled = name in ("mul", "div") and any(jnp.ndim(self.plain(v)) == 0 for v in values)
        if name in KEEPS_NAME or scaled:
            return [Named(out[0], next(v.path for v in values if isinstance(v, Named)))]
        return out

    # ---- helpers -----------------------------------------------------------------------------------------

    def plain(self, value: Any, reason: str | None = None) -> Any:
        """The value as an array; a leaf that this makes dense is reported with the reason."""
        if isinstance(value, (Named, Copies)):
            return value.value
        if not isinstance(value, Leaf):
            return value
        if reason is not None:
            self.rules.fallback(value, reason)
        return value.dense()

    def scope_path(self, eqn: Any) -> str:
        """Name stack of the equation without its first component, the root module or function."""
        scope = "/".join(s for s in (self.scope, jaxprs.scope_of(eqn)) if s)
        return scope.partition("/")[2]

    def looks_inside(self, eqn: Any) -> bool:
        if not self.rules.follow_names:
            return False
        is_name: Callable[[Any], bool] = lambda e: e.primitive.name == "name"  # noqa: E731
        return any(jaxprs.any_equation(j, is_name) for j in jaxprs.subjaxprs(eqn))

    def merge_record(self, path: str, a: Record, b: Record) -> Record:
        if (a.stacked, a.levels) != (b.stacked, b.levels):
            raise JaxqError(f"{path} is used both as a whole and as slices of a stack: observe it separately")
        merge = functools.partial(self.rules.merge, path)
        for _ in range(a.stacked):
            merge = jax.vmap(merge)
        return dataclasses.replace(a, state=merge(a.state, b.state))

    def merged(self, a: Records, b: Records) -> Records:
        out = dict(a)
        for path, record in b.items():
            out[path] = self.merge_record(path, out[path], record) if path in out else record
        return out

    def empty(self, like: Records) -> Records:
        """Neutral records of the same structure as (abstract) ones."""

        def fill(path: str, record: Record) -> Record:
            state = jax.tree.map(
                lambda neutral, want: jnp.broadcast_to(neutral, want.shape).astype(want.dtype),
                self.rules.initial(path),
                record.state,
            )
            return dataclasses.replace(record, state=state)

        return {path: fill(path, record) for path, record in like.items()}

    def fold(self, path: str, record: Record) -> Record:
        """Merges the records along their leading axis into one."""
        first, rest = (jax.tree.map(f, record.state) for f in (lambda s: s[0], lambda s: s[1:]))
        one = functools.partial(dataclasses.replace, record)
        state, _ = lax.scan(
            lambda a, b: (self.merge_record(path, one(state=a), one(state=b)).state, None), first, rest
        )
        return one(state=state)


# ---- layout operations on leaves: each returns the leaf's new view, or None where it has none ------------


def _view(change: Callable[[Any, View], View | None]) -> Callable[[Any, list[Any]], Leaf | None]:
    def rule(eqn: Any, values: list[Any]) -> Leaf | None:
        view = change(eqn, values[0].view)
        return None if view is None else values[0].with_view(view)

    return rule


def _reshape(eqn: Any, view: View) -> View | None:
    return view.reshape(eqn.params["new_sizes"]) if eqn.params["dimensions"] is None else None


def _broadcast(eqn: Any, view: View) -> View | None:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    placed = view.place(len(shape), dims)
    return placed if placed.shape == tuple(shape) else None


def _cast(eqn: Any, values: list[Any]) -> Leaf | None:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return dataclasses.replace(values[0], value=values[0].value.astype(dtype))


def _each_member(eqn: Any, values: list[Any]) -> Leaf:
    """An elementwise no-op (stop_gradient, pvary) on every array that the leaf is stored as."""
    leaf = values[0]
    return dataclasses.replace(leaf, value=jax.tree.map(lambda a: jaxprs.bind(eqn, [a])[0], leaf.value))


def _take_slice(leaf: Leaf, start: Any, shape: Sequence[int]) -> Leaf | None:
    """One layer or expert of a stack: a slice of size 1 along the leading batch axis of the leaf."""
    view = leaf.view
    inner = view.unstack()
    stack = leaf.value.batch_shape if is_quantized(leaf.value) else leaf.view.base[:-2]
    if inner is None or not stack or tuple(shape) != (1, *view.shape[1:]) or view.shape[0] == 1:
        return None
    value = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, start, 0, keepdims=False), leaf.value)
    return dataclasses.replace(
        leaf,
        value=value,
        view=dataclasses.replace(inner, axes=((), *inner.axes)),
        index=(*leaf.index, (start, view.shape[0])),
    )


def _slice(eqn: Any, values: list[Any]) -> Leaf | None:
    p = eqn.params
    if set(p["strides"] or (1,)) != {1} or any(p["start_indices"][1:]):
        return None
    sizes = [hi - lo for lo, hi in zip(p["start_indices"], p["limit_indices"], strict=True)]
    return _take_slice(values[0], p["start_indices"][0], sizes)


def _dynamic_slice(eqn: Any, values: list[Any]) -> Leaf | None:
    # Starts along axes that are taken whole are clamped to zero by the operation itself.
    return _take_slice(values[0], values[1], eqn.params["slice_sizes"])


LAYOUT: dict[str, Callable[[Any, list[Any]], Leaf | None]] = {
    "transpose": _view(lambda eqn, view: view.transpose(eqn.params["permutation"])),
    "squeeze": _view(lambda eqn, view: view.drop(eqn.params["dimensions"])),
    "reshape": _view(_reshape),
    "broadcast_in_dim": _view(_broadcast),
    # Hints and marks that change no value.
    "copy": _view(lambda eqn, view: view),
    "copy_p": _view(lambda eqn, view: view),
    "name": _view(lambda eqn, view: view),
    "sharding_constraint": _view(lambda eqn, view: view),
    "convert_element_type": _cast,
    "stop_gradient": _each_member,
    "pvary": _each_member,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}

KEEPS_NAME = frozenset(LAYOUT) - {"slice", "dynamic_slice"}


# ---- nested jaxprs ---------------------------------------------------------------------------------------


def _inline(walk: Walk, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
    return walk.run(*jaxprs.called(eqn), values)


def _pack(values: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """Splits tracked values into pytrees of arrays and the way back."""
    values = [v.value if isinstance(v, Copies) else v for v in values]
    arrays = [v.value if isinstance(v, (Leaf, Named)) else v for v in values]

    def unpack(arrays: Sequence[Any]) -> list[Any]:
        return [
            dataclasses.replace(v, value=a) if isinstance(v, (Leaf, Named)) else a
            for v, a in zip(values, arrays, strict=True)
        ]

    return arrays, unpack


def _remat(walk: Walk, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
    arrays, unpack = _pack(values)

    def body(*arrays: Any) -> tuple[list[Any], Records]:
        outs, records = walk.run(*jaxprs.called(eqn), unpack(arrays))
        return [walk.plain(o) for o in outs], records

    p = eqn.params
    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(*arrays)


def _custom(walk: Walk, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
    """A call with its own derivative rule.

    The value is computed by the walk, the derivative by the user's rule on the dense operands.
    """
    if not walk.rules.keep_custom_rules:
        return _inline(walk, eqn, values)
    arrays, unpack = _pack(values)

    def value(*arrays: Any) -> list[Any]:
        return [walk.plain(o) for o in walk.run(*jaxprs.called(eqn), unpack(arrays))[0]]

    def original(*arrays: Any) -> list[Any]:
        return jaxprs.bind(eqn, [walk.plain(v) for v in unpack(arrays)])

    if eqn.primitive.name == "custom_jvp_call":
        call = jax.custom_jvp(value)
        call.defjvp(lambda primals, tangents: (value(*primals), jax.jvp(original, primals, tangents)[1]))
    else:
        call = jax.custom_vjp(value)
        call.defvjp(
            lambda *arrays: (value(*arrays), arrays),
            lambda arrays, cotangents: jax.vjp(original, *arrays)[1](cotangents),
        )
    return call(*arrays), {}


def _invariant(carry: Sequence[Any], invars: Sequence[Any], outvars: Sequence[Any]) -> list[bool]:
    """Which carried values are leaves that the loop hands on unchanged."""
    return [isinstance(c, Leaf) and i is o for c, i, o in zip(carry, invars, outvars, strict=True)]


def _weave(fixed: Sequence[bool], values: Sequence[Any], moving: Sequence[Any]) -> list[Any]:
    """The carried values: fixed ones from `values`, the others from the loop's carry."""
    rest = iter(moving)
    return [v if keep else next(rest) for keep, v in zip(fixed, values, strict=True)]


def _scan(walk: Walk, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
    s = jaxprs.scan_parts(eqn)
    consts, carry, xs = values[: s.consts], values[s.consts :][: s.carry], values[s.consts + s.carry :]
    fixed = _invariant(carry, s.jaxpr.invars[s.consts :][: s.carry], s.jaxpr.outvars[: s.carry])
    level = walk.level
    inner = Walk(walk.rules, level + 1, walk.scope)
    slices: list[Any] = []
    for i, x in enumerate(xs):
        view = x.view.unstack() if isinstance(x, Leaf) else None
        if isinstance(x, Leaf) and view is not None and not x.index:
            slices.append(dataclasses.replace(x, view=view, levels=(*x.levels, level)))
        else:
            slices.append(None)
            xs[i] = walk.plain(x, "scanned along an axis that is not its leading one")
    arrays = [x.value if isinstance(x, Leaf) else x for x in xs]

    def body(moving: list[Any], arrays: list[Any]) -> tuple[list[Any], Any]:
        x = [
            a if leaf is None else dataclasses.replace(leaf, value=a)
            for leaf, a in zip(slices, arrays, strict=True)
        ]
        outs, records = inner.run(s.jaxpr, s.jaxpr_consts, [*consts, *_weave(fixed, carry, moving), *x])
        outs = [
            o if i < s.carry and fixed[i] else inner.plain(o, "returned by a scan") for i, o in enumerate(outs)
        ]
        return [o for o, keep in zip(outs[: s.carry], fixed, strict=True) if not keep], (
            outs[s.carry :],
            records,
        )

    start = [walk.plain(c, "carried through a scan") for c, keep in zip(carry, fixed, strict=True) if not keep]
    moved, (ys, records) = lax.scan(body, start, arrays, s.length, reverse=s.reverse, unroll=s.unroll)
    stacked = {path: _leave_scan(walk, path, record, level) for path, record in records.items()}
    return [*_weave(fixed, carry, moved), *ys], stacked


def _leave_scan(walk: Walk, path: str, record: Record, level: int) -> Record:
    if level in record.levels:
        rest = tuple(n for n in record.levels if n != level)
        return dataclasses.replace(record, stacked=record.stacked + 1, levels=rest)
    return walk.fold(path, record)


def _while(walk: Walk, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
    p = eqn.params
    nc, nb = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, consts, carry = values[:nc], values[nc:][:nb], values[nc + nb :]
    cond, body = jaxprs.opened(p["cond_jaxpr"]), jaxprs.opened(p["body_jaxpr"])
    fixed = _invariant(carry, body[0].invars[nb:], body[0].outvars)

    def step(moving: list[Any]) -> tuple[list[Any], Records]:
        outs, records = walk.run(*body, [*consts, *_weave(fixed, carry, moving)])
        keep = [walk.plain(o, "carried through a loop") for o, f in zip(outs, fixed, strict=True) if not f]
        return keep, records

    def proceed(state: tuple[list[Any], Records]) -> Any:
        return walk.plain(walk.run(*cond, [*cond_consts, *_weave(fixed, carry, state[0])])[0][0])

    def advance(state: tuple[list[Any], Records]) -> tuple[list[Any], Records]:
        moving, records = step(state[0])
        return moving, walk.merged(state[1], records)

    start = [walk.plain(c, "carried through a loop") for c, f in zip(carry, fixed, strict=True) if not f]
    records = walk.empty(jax.eval_shape(step, start)[1])
    moved, records = lax.while_loop(proceed, advance, (start, records))
    return _weave(fixed, carry, moved), records


def _cond(walk: Walk, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
    index, operands = walk.plain(values[0]), values[1:]

    def taken(branch: Any) -> tuple[list[Any], Records]:
        outs, records = walk.run(*jaxprs.opened(branch), operands)
        return [walk.plain(o, "returned by a branch") for o in outs], records

    branches = [functools.partial(taken, b) for b in eqn.params["branches"]]
    kinds: Records = {}
    for branch in branches:
        kinds |= jax.eval_shape(branch)[1]

    def complete(branch: Callable[[], tuple[list[Any], Records]]) -> tuple[list[Any], Records]:
        outs, records = branch()
        return outs, {**walk.empty({p: k for p, k in kinds.items() if p not in records}), **records}

    return lax.switch(index, [functools.partial(complete, b) for b in branches])


def _shard_map(walk: Walk, eqn: Any, values: list[Any]) -> tuple[list[Any], Records]:
    """Leaves enter with their members sharded alike; records leave with one leading axis over the shards."""
    p = eqn.params
    values, specs, leaves = list(values), list(p["in_specs"]), {}
    for i, v in enumerate(values):
        if not isinstance(v, Leaf):
            values[i] = walk.plain(v)
            continue
        spec = _member_specs(v, specs[i], p["mesh"])
        if isinstance(spec, str):
            values[i] = walk.plain(v, spec)
        else:
            values[i], specs[i], leaves[i] = v.value, spec, v
    jaxpr, consts = jaxprs.opened(p["jaxpr"])

    def local(*arrays: Any) -> tuple[list[Any], Records]:
        args = [
            dataclasses.replace(leaves[i], value=a, view=View.of(a.shape)) if i in leaves else a
            for i, a in enumerate(arrays)
        ]
        outs, records = walk.run(jaxpr, consts, args)
        return [walk.plain(o, "returned by a shard_map") for o in outs], records

    manual = tuple(a for a in p["mesh"].axis_names if a in p["newly_manual_axes"])
    varying: dict[str, frozenset[str]] = {}

    def body(*arrays: Any) -> tuple[list[Any], Records]:
        outs, records = local(*arrays)
        for path, record in records.items():
            varying[path] = frozenset().union(*map(jaxprs.varying_axes, jax.tree.leaves(record.state)))
        return outs, jax.tree.map(lambda s: s[None], records)

    outs, records = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(specs),
        out_specs=(list(p["out_specs"]), PartitionSpec(manual)),
        axis_names=set(manual),
        check_vma=p["check_vma"],
    )(*values)
    if not p["check_vma"]:
        # Unchecked bodies do not track what varies: go by what the data is sharded over.
        data = {a for i, s in enumerate(p["in_specs"]) if i not in leaves for a in _spec_axes(s)}
        varying = dict.fromkeys(records, frozenset(data))
    sizes = [p["mesh"].shape[a] for a in manual]
    for path, record in records.items():
        # Shards along an axis over which the record does not vary hold copies of it: take one.
        pick = tuple(slice(None) if a in varying[path] else 0 for a in manual)

        def distinct(s: Any, pick: tuple[Any, ...] = pick) -> Any:
            chosen = jnp.reshape(s, (*sizes, *s.shape[1:]))[pick]
            return jnp.reshape(chosen, (-1, *s.shape[1:]))

        records[path] = walk.fold(path, jax.tree.map(distinct, record))
    return outs, records


def _spec_axes(spec: PartitionSpec) -> set[str]:
    return {a for part in spec if part is not None for a in (part if isinstance(part, tuple) else (part,))}


def _member_specs(leaf: Leaf, spec: PartitionSpec, mesh: Any) -> Any:
    """Specs of a leaf's members for the leaf's own spec, or the reason why it has to enter dense."""
    if not leaf.view.is_identity or leaf.levels or leaf.index:
        return "enters a shard_map in another layout than it is stored in"
    if not is_quantized(leaf.value):
        return spec
    try:
        return leaf.value.partition_specs(spec, mesh)
    except JaxqError as error:
        return str(error)


NESTED: dict[str, Callable[[Walk, Any, list[Any]], tuple[list[Any], Records]]] = {
    **{name: _inline for name in jaxprs.CALLS},
    **{name: _remat for name in ("remat", "remat2", "checkpoint")},
    **{name: _custom for name in jaxprs.CUSTOM},
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
