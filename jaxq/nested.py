"""How the walk enters nested jaxprs: calls, custom derivative rules, loops, branches and shards.

Each function takes the walk, an equation and the values of its operands, and gives outputs and records.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxq import jaxprs
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.tracked import Copies, Leaf, Named, Record, Records
from jaxq.views import View

if TYPE_CHECKING:
    from jaxq.interpreter import Walk


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
        return [walk.plain(o, "is returned by a checkpointed function") for o in outs], records

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
    inner = walk.deeper()
    slices: list[Any] = []
    for i, x in enumerate(xs):
        view = x.view.unstack() if isinstance(x, Leaf) else None
        if isinstance(x, Leaf) and view is not None and not x.index:
            slices.append(dataclasses.replace(x, view=view, levels=(*x.levels, level)))
        else:
            slices.append(None)
            leaf = isinstance(x, Leaf)
            xs[i] = walk.plain(x, "scanned along an axis that is not its leading one" if leaf else "scanned over")
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
            values[i] = walk.plain(v, "enters a shard_map")
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
