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

from jaxq import jaxprs, uses
from jaxq.errors import JaxqError
from jaxq.nested import NESTED
from jaxq.tracked import KEEPS_NAME, LAYOUT, Coded, Copies, Leaf, Named, Record, Records


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

    def named(self, eqn: Any, path: str, value: Any) -> tuple[Any, Records]:
        """What becomes of an activation where it is named."""
        return value, {}

    def activation(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        """Outputs of a primitive on named activations and arrays; None leaves it to the walk."""
        return None

    def fallback(self, tracked: Leaf | Coded, reason: str) -> None:
        """The leaf, or the codes of an activation, are made dense here."""

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
        if any(isinstance(v, Named) for v in values) and not any(isinstance(v, Leaf) for v in values):
            outs = self.rules.activation(eqn, values)
            if outs is not None:
                return outs, {}
        if name == "name" and self.rules.follow_names and not isinstance(values[0], Leaf):
            path = "/".join(p for p in (self.scope_path(eqn), eqn.params["name"]) if p)
            value, records = self.rules.named(eqn, path, self.plain(values[0]))
            return [value if isinstance(value, Coded) else Named(value, path)], records
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
            v
            if i == found.operand or isinstance(v, Coded)
            else self.plain(v, f"second parameter operand of {eqn.primitive.name}")
            for i, v in enumerate(values)
        ]

        def dense() -> Any:
            return jaxprs.bind(eqn, [v.dense() if isinstance(v, (Leaf, Coded)) else v for v in others])[0]

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

    def deeper(self) -> Walk:
        """The walk for the body of a scan."""
        return Walk(self.rules, self.level + 1, self.scope)

    # ---- helpers -----------------------------------------------------------------------------------------

    def plain(self, value: Any, reason: str | None = None) -> Any:
        """The value as an array; a leaf, or codes, that this makes dense is reported with the reason."""
        if isinstance(value, Copies):
            return value.value
        if isinstance(value, Named) and not isinstance(value, Coded):
            return value.dense()
        if not isinstance(value, (Leaf, Coded)):
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
