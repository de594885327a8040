"""Activations that a function names with `jax.ad_checkpoint.checkpoint_name`, and quantizers of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxq import jaxprs, tracing
from jaxq.errors import JaxqError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activated:
    """Parameters together with quantizers of named activations; a pytree.

    Where a quantized function or a stage takes parameters, it takes this too, and rounds each activation where
    it is named.

    params: the parameters. activations: {path: quantizer}; a quantizer is any callable pytree, x -> x of the same
    shape and dtype. Paths are those that `jaxq.activations` lists.
    """

    params: Any
    activations: dict[str, Any]


def split(params: Any) -> tuple[Any, dict[str, Any]]:
    """(parameters, quantizers of named activations)."""
    return (params.params, params.activations) if isinstance(params, Activated) else (params, {})


@dataclasses.dataclass(frozen=True)
class Name:
    """A named activation.

    path: scope and name, made unique in order of appearance by "#2", "#3". repeated: one equation makes several
    activations, or none: it stands in a loop, a branch, or a function that is called more than once.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    repeated: bool


def names(eqns: Sequence[Any], without: frozenset[str] = frozenset()) -> dict[int, Name]:
    """{id of the equation: Name} in order, through nested jaxprs. without: names that count as none."""
    found: dict[int, Name] = {}
    counts: dict[str, int] = {}
    for eqn, scope, looped in _equations(eqns, "", False):
        if eqn.params["name"] in without:
            continue
        if id(eqn) in found:
            # Equal calls share one jaxpr.
            found[id(eqn)] = dataclasses.replace(found[id(eqn)], repeated=True)
            continue
        # Without the first component: the root module or function.
        path = "/".join(p for p in (scope.partition("/")[2], eqn.params["name"]) if p)
        counts[path] = n = counts.get(path, 0) + 1
        aval = eqn.outvars[0].aval
        found[id(eqn)] = Name(path if n == 1 else f"{path}#{n}", tuple(aval.shape), aval.dtype, looped)
    return found


def assigned(eqns: Sequence[Any], quantizers: dict[str, Any]) -> dict[int, Any]:
    """{id of the equation: quantizer}; JaxqError for a path that is not there, or not one activation."""
    if not quantizers:
        return {}
    known = {name.path: (place, name) for place, name in names(eqns).items()}
    for path in quantizers:
        if path not in known:
            shown = ", ".join(list(known)[:6]) + (", ..." if len(known) > 6 else "")
            raise JaxqError(f"no activation is named {path!r}; those of the function are {shown or 'none'}")
        if known[path][1].repeated:
            raise JaxqError(
                f"{path} is named in a loop or in a function called more than once, so one quantizer cannot "
                "belong to it: unroll the loop, or quantize it stage by stage"
            )
    return {known[path][0]: quantizer for path, quantizer in quantizers.items()}


def _equations(eqns: Sequence[Any], scope: str, looped: bool) -> Iterator[tuple[Any, str, bool]]:
    for eqn in eqns:
        here = "/".join(s for s in (scope, jaxprs.scope_of(eqn)) if s)
        if eqn.primitive.name == "name":
            yield eqn, here, looped
        inside = looped or eqn.primitive.name not in jaxprs.CALLS | jaxprs.CUSTOM
        for inner in jaxprs.subjaxprs(eqn):
            yield from _equations(inner.eqns, here, inside)


def activations(fn: Callable[..., Any], params: Any, *args: Any, cut: str = "block", **kwargs: Any) -> list[Name]:
    """The activations that `fn(params, *args)` names, in order, without running it.

    cut: the name that marks where `jaxq.stages` cuts; it counts as none.
    """
    call = tracing.trace(fn, (split(params)[0], *args), kwargs)
    return list(names(call.jaxpr.eqns, frozenset({cut})).values())
